"""Every command in the two READMEs and every script is run or parsed."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from command_lines import PARSERS
from launching import free_port
from reference import GOLDEN_FOLDERS, ROOT

from flags import train
from modes import MODES
from train_types import TRAIN_TYPES
from training.ds_config import read_ds_file

READMES = ("README.md", "README_zh.md")


def commands(name):
    """Lines of the ```bash blocks, continued lines joined, comments cut."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("name", READMES)
def test_commands_parse(name):
    seen = set()
    for words in commands(name):
        script = next(word for word in words if word.endswith((".py", ".sh")))
        seen.add(script)
        assert (ROOT / script).exists(), words
        if script in PARSERS:
            PARSERS[script]().parse_args(words[words.index(script) + 1 :])
    assert seen >= {*PARSERS, "scripts/quickstart.sh", "scripts/test.sh"}


def test_both_languages_say_the_same():
    english, chinese = (list(commands(name)) for name in READMES)
    assert english == chinese
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in READMES]
    for pattern in (r"^#+ ", r"^\|", r"`--[\w_]+", r"```text\n.*?```"):
        flags = re.M | re.S
        found = [re.findall(pattern, text, flags) for text in texts]
        assert sorted(found[0]) == sorted(found[1]), pattern


@pytest.mark.parametrize("name", READMES)
def test_flags_and_files_in_the_text_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    known = {option for parser in PARSERS.values() for action in parser()._actions for option in action.option_strings}
    known |= {"--master_port", "--master_addr", "--lora_"}
    assert set(re.findall(r"--[a-z_]+", text)) <= known
    for path in re.findall(r"`((?:scripts|data|configs)/[\w./]+|\w+\.py|ds_\w+\.json)`", text):
        assert (ROOT / path).exists() or (ROOT / "configs" / path).exists(), path
    for choice in (*MODES, *TRAIN_TYPES):
        assert f"--mode {choice}" in text or f"--train_type {choice}" in text


@pytest.mark.parametrize("name", READMES)
def test_every_room_is_on_the_map(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    rooms = [path.name for path in ROOT.glob("*.py")] + [f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")]
    assert [name for name in sorted(rooms) if f"`{name}`" not in text] == []
    [table] = re.findall(r"\n## (?:File map|文件地图)\n\n((?:\|.*\n)+)", text)
    assert table.count("\n") <= 25


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.name)
def test_names_of_configs_are_true(path):
    config = read_ds_file(path.name)
    assert f"zero{config['zero_optimization']['stage']}" in path.name
    assert ("offload_optimizer" in config["zero_optimization"]) == ("no_offload" not in path.name)


@pytest.mark.parametrize("path", sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]), ids=lambda p: p.name)
def test_shell_scripts_parse(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["train_one_gpu.sh", "train_four_gpus.sh", "train_hosts.sh"])
@pytest.mark.parametrize("mode", MODES)
def test_launchers(name, mode, tmp_path):
    """What the launcher scripts start is a command line that train.py takes."""
    stub = tmp_path / "deepspeed"
    stub.write_text('#!/bin/bash\necho "GPUS=$CUDA_VISIBLE_DEVICES"\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "hostfile").write_text("worker-1 slots=4\n")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MODE": mode,
        "MODEL": "some/model",
        "HOSTFILE": str(tmp_path / "hostfile"),
    }
    process = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), "--seed", "7"], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    gpus, *words = process.stdout.splitlines()
    args = train.train_parser().parse_args(words[words.index("train.py") + 1 :])
    assert args.mode == mode and args.seed == 7 and args.model_name_or_path == "some/model"
    read_ds_file(args.ds_file)
    if name == "train_four_gpus.sh":
        assert gpus == "GPUS=0,1,2,3" and ("offload.json" in args.ds_file)
        assert ("no_offload" not in args.ds_file) == (mode == "glm")


def test_help_texts_name_every_flag():
    """Each flag has a help text; --help needs neither torch nor a model."""
    for script, parser in PARSERS.items():
        assert all(action.help for action in parser()._actions), script
        code = f"import sys; import {script.removesuffix('.py')}; assert 'torch' not in sys.modules"
        process = subprocess.run(["python", "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr


# Run by tests of their own, or in need of a server.
RUN_ELSEWHERE = ("scripts/quickstart.sh", "scripts/test.sh", "compare.py", "judge.py")


@pytest.mark.launch
def test_the_readme_runs_word_for_word_and_in_order_in_one_clone(tmp_path):
    """Commands that are right one by one can stand in each other's way: two runs into one folder, a file that no
    command makes. Only the rows are fewer here, and with them the number of the last update; the model is tiny."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(lambda name: (ROOT / name).is_file(), names.stdout.splitlines()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    model = tmp_path / "ChatGLM3-6B"
    shutil.copytree(GOLDEN_FOLDERS["glm3"], model, ignore=shutil.ignore_patterns("golden.*"))
    for name in ("spo_0.json", "spo_1.json"):
        rows = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)[:4]
        (tmp_path / "data" / name).write_text("".join(rows), encoding="utf-8")
    suite = tmp_path / "data" / "general" / "suite.jsonl"
    suite.write_text("".join(suite.read_text(encoding="utf-8").splitlines(keepends=True)[::12]), encoding="utf-8")

    ran = []
    for words in commands("README.md"):
        if any(name in words for name in RUN_ELSEWHERE):
            continue
        line = (
            shlex.join(words)
            .replace("step-720", "step-2")
            .replace("--master_port 29500", f"--master_port {free_port()}")
        )
        line = re.sub(r"^(\w+=)'?([^' ]*)'?", r"\1\2", line)  # a variable in front of the command is not quoted
        process = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        ran.append(line)
        is_done = process.returncode == 0 or ("doctor.py" in words and "0 BAD" in process.stdout)
        assert is_done, f"{line}: exit code {process.returncode}\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}"
    assert len(ran) >= 10
