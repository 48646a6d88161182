"""The commands that users of this project's first version have in their notes run as written."""

import json
import os
import shlex

import pytest
import torch
from launching import check_done, free_port, run_command
from reference import GOLDEN, ROOT

from flags.train import parse_train, train_parser
from modes import MODES

COMMANDS = (ROOT / "tests" / "commands" / "first_version.txt").read_text(encoding="utf-8").splitlines()
MODEL_NAMES = {"glm": "ChatGLM-6B", "glm2": "ChatGLM2-6B", "glm3": "ChatGLM3-6B"}
PORT = "--master_port 520 "  # a port below 1024 is root's: the tests take a free one


def parts(command):
    """(environment variables, train.py's flags) of a command line."""
    words = shlex.split(command)
    start = words.index("train.py")
    return [word for word in words[:start] if "=" in word], words[start + 1 :]


def is_run(command):
    """A command for each mode, of a train type in turn; test_launch.py starts others.

    ALL_CASES=1 runs each mode and train type on one GPU, and what exists for four GPUs alone.
    """
    args = train_parser().parse_args(parts(command)[1])
    if os.environ.get("ALL_CASES"):
        return "DEVICES=0 " in command or args.train_type == "all"
    is_sample = (args.mode, args.train_type) in (("glm", "ptuning"), ("glm2", "freeze"), ("glm3", "lora"))
    return is_sample and "DEVICES=0 " in command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with the names in the commands: tiny checkpoints of 28 layers."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "data").mkdir()
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:5]
    (folder / "data" / "spo_0.json").write_text("\n".join(rows), encoding="utf-8")
    for name, mode in MODES.items():
        golden = GOLDEN / mode.package
        config = mode.config_class.from_pretrained(golden, num_layers=28)
        torch.manual_seed(0)
        mode.model_class(config).half().save_pretrained(folder / MODEL_NAMES[name])
        mode.tokenizer_class.from_pretrained(golden).save_pretrained(folder / MODEL_NAMES[name])
    return folder


def test_all_commands_are_here():
    modes_and_types = {
        (args.mode, args.train_type) for args in map(lambda c: train_parser().parse_args(parts(c)[1]), COMMANDS)
    }
    assert len(COMMANDS) == 21 and len(modes_and_types) == 12
    assert len([command for command in COMMANDS if is_run(command)]) == (12 if os.environ.get("ALL_CASES") else 3)


@pytest.mark.parametrize("command", COMMANDS, ids=range(1, len(COMMANDS) + 1))
def test_flags_are_taken(command, models, monkeypatch):
    monkeypatch.chdir(models)
    flags = parts(command)[1]
    args = parse_train(flags)
    assert f"--mode {args.mode} " in command and args.train_type in ("lora", "ptuning", "freeze", "all")
    for flag, value in zip(flags, flags[1:]):
        if flag.startswith("--") and not value.startswith("--"):
            given = getattr(args, flag[2:])
            assert str(given[0] if isinstance(given, list) else given) == value or float(given) == float(value)


@pytest.mark.launch
@pytest.mark.parametrize("command", [c for c in COMMANDS if is_run(c)], ids=lambda c: shlex.split(c)[-1][2:])
def test_command_runs_as_written(command, models, tmp_path):
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    num_gpus = 4 if "0,1,2,3" in command else 1
    process = run_command(command.replace(PORT, f"--master_port {free_port()} "), tmp_path, LOCAL_SIZE=str(num_gpus))
    check_done(process)
    # The launcher ends with 0, too, where its second process is killed from outside: the run itself must have said it.
    assert "done: " in process.stdout, f"{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    args = train_parser().parse_args(parts(command)[1])
    [log] = tmp_path.glob("output-glm*/train_log.jsonl")
    updates_per_epoch = -(-5 // (args.per_device_train_batch_size * args.gradient_accumulation_steps * num_gpus))
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["step"] == updates_per_epoch * args.num_train_epochs
    assert len(list(log.parent.glob("epoch-*/run.json"))) == args.num_train_epochs
