"""doctor.py tells what is whole and what is not, in lines with a mark, and never ends in a traceback."""

# ruff: noqa: F811

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from doctor_lines import adapter, bad, look, spoilt, text_of
from made_states import STATE_FILES
from packaging.requirements import Requirement
from reference import GOLDEN_FOLDERS, ROOT
from refusing import (  # noqa: F401, a fixture
    OUTPUT_LAYER,
    both,
    change_json,
    cut,
    drop,
    one_file,
    put,
    replaced,
    sandbox,
)
from safetensors.torch import load_file, save_file

import doctor
from checkpoints import base_weights, inspection
from checkpoints.opening import read_config
from flags import doctor as flags_doctor
from modes import MODES
from runtime import machine
from runtime.folders import close_folder
from tests.checkpoints.test_bad_checkpoints import MODELS as SPOILT
from tests.checkpoints.test_bad_checkpoints import NO_NAMES, PREFIX_CONFIG
from tests.checkpoints.test_bad_checkpoints import SAVED as SPOILT_RUNS

H100 = machine.GPU("H", 80 * 10**9, 70 * 10**9, (9, 0))
SMI = "NVIDIA-SMI 550.1  Driver Version: 550.1  CUDA Version: 12.4"
ZEROS = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"


# Folders.


@pytest.mark.parametrize("mode", MODES)
def test_a_good_checkpoint(mode):
    lines = look(GOLDEN_FOLDERS[mode], full=True)
    assert {mark for mark, *_ in lines} == {machine.OK}
    assert text_of(lines, "what").startswith(f"{mode}: whole")
    assert "fp16" in text_of(lines, "weights") and text_of(lines, "values") == "all are finite"
    assert text_of(lines, "loads").endswith(f"--model_path {GOLDEN_FOLDERS[mode]}")


@pytest.mark.parametrize("mode, spoil, says", SPOILT)
def test_a_spoilt_checkpoint(sandbox, mode, spoil, says):
    folder = sandbox.model(mode)
    spoil(folder)
    if spoil is NO_NAMES:
        lines = look(folder)
        assert "glm2 and glm3" in text_of(lines, "mode") and text_of(lines, "loads").endswith("--mode glm2")
        assert text_of(look(folder, "glm3"), "loads").endswith("--mode glm3")
    else:
        assert spoilt(look(folder))
    assert not (sandbox.folder / "code-ran").exists()


def test_what_is_said_of_a_spoilt_checkpoint(sandbox):
    for number, (spoil, *says) in enumerate(
        [
            (cut("pytorch_model-00001*"), "pytorch_model-00001-of-00002.bin: truncated", "download it again"),
            (one_file(replaced(lambda t: t[:3].contiguous())), f"{OUTPUT_LAYER} has shape [3, 64]", "needs [1280, 64]"),
            (drop("tokenizer.model"), "tokenizer.model: missing"),
            (both(drop("tokenizer.model"), cut("pytorch_model-00002*")), "tokenizer.model: missing", "truncated"),
            (put("config.json", "{}"), "config.json: of no family known here"),
        ]
    ):
        folder = sandbox.model(name=f"model-{number}")
        spoil(folder)
        assert spoilt(look(folder), *says)
    assert spoilt(look(sandbox.model(name="other"), mode="glm"), "--mode glm: ", "is of glm3")


def test_values_that_are_not_finite_show_with_full(sandbox):
    folder = sandbox.model()
    one_file(replaced(lambda t: t.index_fill(0, torch.tensor([7]), float("nan"))))(folder)
    assert not bad(look(folder))
    assert spoilt(look(folder, full=True), f"{OUTPUT_LAYER} holds values that are not finite", "download it again")


def test_an_adapter(sandbox):
    folder = adapter(sandbox, step=7, versions={"torch": "1.0", "peft": machine.installed("peft")})
    lines = look(folder, full=True)
    assert not bad(lines)
    assert "glm3: adapter weights on" in text_of(lines, "what") and "lora, step 7" in text_of(lines, "what")
    assert "torch 1.0 (here" in text_of(lines, "saved with") and text_of(lines, "saved with").count("here") == 1
    assert "3,072 in fp32" in text_of(lines, "adapter") and "shapes fit" in text_of(lines, "base")
    state = load_file(folder / "adapter_model.safetensors")
    save_file({**state, ZEROS: state[ZEROS] + float("inf")}, folder / "adapter_model.safetensors")
    assert spoilt(look(folder, full=True), "lora_A", "not finite")
    save_file({**state, ZEROS: torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    assert spoilt(look(folder), "lora_A.weight has shape (1, 1), its r is 4")
    change_json("adapter_config.json", use_dora=True)(folder)
    assert spoilt(look(folder), "use_dora = True: DoRA also rescales the base's weights: copy the folder again")
    change_json("run.json", base_model="/gone/base")(folder)
    assert spoilt(look(folder), "base model /gone/base is not there")
    change_json("run.json", base_model="THUDM/chatglm3-6b", versions=["x"])(folder)
    assert spoilt(look(folder), "THUDM/chatglm3-6b: cannot be fetched")


def test_a_prefix_encoder(sandbox):
    folder = sandbox.adapter(train_type="ptuning", weights="prefix")
    put("config.json", PREFIX_CONFIG)(folder)
    config = read_config(str(folder), MODES["glm3"])
    wanted = base_weights.empty_model(MODES["glm3"], config).state_dict()
    save_file(
        {name: torch.zeros(t.shape) for name, t in wanted.items() if "prefix_encoder." in name},
        folder / "prefix_encoder.safetensors",
    )
    lines = look(folder)
    assert not bad(lines) and "names and shapes fit" in text_of(lines, "prefix")


@pytest.mark.parametrize("run, spoil, says, reads_weights", SPOILT_RUNS)
def test_a_spoilt_run(sandbox, run, spoil, says, reads_weights):
    folder = sandbox.adapter(**run)
    spoil(folder)
    assert spoilt(look(folder))


def test_lines_about_the_manifest(sandbox):
    scratch = sandbox.model(name="scratch")
    close_folder(str(scratch), str(sandbox.folder / "model"))
    folder = sandbox.folder / "model"
    assert "sizes of" in text_of(look(folder), "manifest") and "SHA-256" in text_of(look(folder, full=True), "manifest")
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace(":", " :", 1).replace("\n", "", 1))
    assert not bad(look(folder)) and spoilt(look(folder, full=True), "tokenizer_config.json", "SHA-256")
    path.write_text(path.read_text() + "\n\n")
    assert spoilt(look(folder), "tokenizer_config.json: has", "saved with")
    put("manifest.json", "[]")(folder)
    assert spoilt(look(folder), "manifest.json: not a manifest")


def test_a_training_output_folder(sandbox):
    out = sandbox.folder / "out"
    out.mkdir()
    sandbox.model(name="out/epoch-1-step-10")
    cut("pytorch_model-00001*")(sandbox.model(name="out/epoch-1-step-9"))
    for name, closes in (("state-step-8", True), ("state-step-9", False)):
        state = out / (name + ".new")
        state.mkdir()
        (state / "deepspeed").mkdir()
        for file in STATE_FILES:
            (state / file).touch()
        put("state.json", json.dumps({"world_size": 2}))(state)
        close_folder(str(state), str(out / name)) if closes else state.rename(out / name)
    (out / "state-step-10.partial").mkdir()
    cut("pytorch_model-00001*")(sandbox.model(name="out/best"))
    (out / "best.replaced").mkdir()
    lines = look(out)
    marks = {name: mark for mark, name, _ in lines}
    assert marks == {
        "what": "ok",
        "state-step-8": "ok",
        "state-step-9": "BAD",
        "state-step-10.partial": "note",
        "best": "BAD",
        "best.replaced": "note",
        "epoch-1-step-9": "BAD",
        "epoch-1-step-10": "ok",
    }
    assert "truncated" in text_of(lines, "epoch-1-step-9") and "whole: glm3" in text_of(lines, "epoch-1-step-10")
    assert "manifest.json: missing" in text_of(lines, "state-step-9") and "2 proc" in text_of(lines, "state-step-8")
    assert spoilt(look(out / "state-step-9"))


def test_what_is_no_checkpoint(sandbox):
    (sandbox.folder / "empty").mkdir()
    for name, says in (
        ("nowhere", "no such folder"),
        ("THUDM/chatglm3-6b", "hub names are not fetched"),
        ("rows.json", "is a file"),
        ("empty", "no config.json or run.json in it"),
    ):
        assert spoilt(look(name), name, says)


def test_memory_to_predict(sandbox, monkeypatch):
    folder = sandbox.model()
    for facts, says in (
        (machine.Facts(), "1.4 MB to predict in fp32"),
        (machine.Facts(gpus=[H100]), "698.5 KB to predict in bf16, and the tokens; 70.0 GB free"),
        (machine.Facts(gpus=[H100._replace(capability=(7, 5))]), "in fp16"),
        (machine.Facts(gpus=[H100._replace(capability=(8, 0))]), "in bf16"),  # an A100
        (machine.Facts(gpus=[H100, H100._replace(capability=(7, 5), free=2 * 10**9)]), "in fp16"),
    ):
        assert says in text_of(look(folder, facts=facts), "memory")
    monkeypatch.setattr(inspection, "memory", lambda: (1000, 1000))
    assert "too little" in text_of(look(folder), "memory")


# The machine.


def test_pins_are_those_of_requirements():
    lines = [line for line in machine.REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    for python in ("3.10", "3.11", "3.13"):
        kept = [Requirement(line) for line in lines]
        kept = [line for line in kept if line.marker is None or line.marker.evaluate({"python_version": python})]
        wanted = {line.name: str(line.specifier).removeprefix("==") for line in kept}
        assert machine.pins(tuple(map(int, python.split(".")))) == wanted
    assert set(machine.IMPORTS) <= set(wanted)


def test_lines_about_packages(monkeypatch):
    installed = machine.installed
    versions = {"peft": None, "numpy": "1.0", "tokenizers": "0.1"}
    for module in (machine, doctor, inspection):
        monkeypatch.setattr(module, "installed", lambda name: versions[name] if name in versions else installed(name))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    lines = list(doctor.version_lines())
    assert (machine.BAD, "peft", f"missing: pip install peft=={machine.pins()['peft']}") in lines
    assert text_of(lines, "missing ones").endswith("pip install -r requirements.txt")
    assert "cannot be imported (ModuleNotFoundError" in text_of(lines, "sentencepiece")
    assert text_of(lines, "numpy").startswith("1.0, but the tests run with 2")
    assert any("needs tokenizers<" in text and "here is 0.1: pip install 'tokenizers<" in text for text in bad(lines))
    versions |= {"transformers": "4.33.0", "torch": "2.0.1+cu118"}
    found = [(mark, name) for mark, name, _ in inspection.broken_lines(machine.Facts(gpus=[H100]))]
    assert found.count(("BAD", "transformers")) == 1 and ("note", "torch") in found


def test_a_missing_library_ends_its_section_only(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed.git_version_info", None)
    assert doctor.show("ops", doctor.op_lines(machine.Facts(), False)) == [machine.BAD]
    assert "not looked at" in capsys.readouterr().out


def test_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list(doctor.gpu_lines(machine.Facts(cuda=""))) == [("note", "GPUs", "none: tiny models only")]
    for facts, says in (
        (machine.Facts(smi=(0, SMI)), "torch cannot be imported"),
        (machine.Facts(cuda="", smi=(0, SMI)), "built for CPU only: pip install --force-reinstall"),
        (machine.Facts(cuda="13.0", driver_cuda="12.4", smi=(0, SMI)), "the driver runs up to CUDA 12.4, torch is"),
        (machine.Facts(cuda="12.8", driver_cuda="12.4", smi=(0, SMI), problem="no device"), "torch says 'no device'"),
        (machine.Facts(cuda="13.0", smi=(9, "it couldn't communicate")), "nvidia-smi says"),
    ):
        assert says in bad(doctor.gpu_lines(facts))[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in bad(doctor.gpu_lines(machine.Facts(cuda="13.0", smi=(0, SMI))))[0]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_a_driver_and_a_torch_for_cpu(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{SMI}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = machine.Facts()
    machine.find_gpus(facts)
    assert facts.driver_cuda == "12.4" and "built for CPU only" in bad(doctor.gpu_lines(facts))[0]


def test_lines_about_gpus_and_drivers(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    old = H100._replace(name="T", capability=(7, 5))
    facts = machine.Facts(cuda="12.8", driver_cuda="12.4", gpus=[H100, old], smi=(0, SMI), warned=["no code"])
    lines = list(doctor.gpu_lines(facts))
    assert text_of(lines, "CUDA") == "torch is built for 12.8, the driver 550.1 runs up to 12.4"
    assert text_of(lines, "GPU 0") == "H, 80.0 GB, free 70.0 GB, compute capability 9.0, bf16 yes"
    assert text_of(lines, "GPU 1").endswith("bf16 no") and ("note", "torch warns", "no code") in lines
    assert [name for _, name, _ in inspection.broken_lines(facts)] == ["bf16", "DS_ACCELERATOR"]
    size = os.statvfs("/dev/shm")
    monkeypatch.setattr(doctor.os, "statvfs", lambda path: argparse.Namespace(f_frsize=1, f_blocks=64 << 20))
    assert size and "--shm-size=1g" in text_of(list(doctor.machine_lines(facts)), "/dev/shm")


def test_memory_limits(tmp_path):
    groups = tmp_path / "cgroup"
    for line, files, limit in (
        ("0::/job/step", {"job/memory.max": "500", "job/step/memory.max": "max"}, 500),
        ("0::/not/seen/here", {"memory.max": "700"}, 700),
        ("0::/job/step", {"job/memory.max": "900", "job/step/memory.max": "800"}, 800),
        ("0::/job/step", {"job/memory.max": "600", "job/step/memory.max": "650"}, 600),
        ("9:cpu:/\n4:memory:/job", {"memory/job/memory.limit_in_bytes": "300"}, 300),
        ("0::/", {}, float("inf")),
    ):
        root = tmp_path / f"root-{limit}"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        groups.write_text(line + "\n")
        assert machine.memory_limit(groups, root) == limit


def test_a_whole_checkpoint_takes_what_is_said():
    mode = MODES["glm3"]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in mode.model_class(mode.config_class()).parameters())
    assert doctor.PLACES[0][2] == pytest.approx(2 * count, rel=0.01)


def test_compiled_ops(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert text_of(list(doctor.op_lines(machine.Facts(cuda=""), False)), "cpu_adam").startswith("built")
    monkeypatch.setattr(doctor, "cpu_adam_problem", lambda: "no C++ compiler")
    assert ("note", "cpu_adam", "no C++ compiler (for the _offload files)") in doctor.op_lines(machine.Facts(), True)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    assert not bad(doctor.op_lines(machine.Facts(), True))  # and the op is not loaded: that would wait
    os.utime(lock, (time.time() - 3600,) * 2)
    assert "remove it" in bad(doctor.op_lines(machine.Facts(), True))[0]


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = list(doctor.compiler_lines(machine.Facts()))
    assert "apt install g++" in text_of(lines, "C++") and "pip install ninja" in text_of(lines, "ninja")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "is of CUDA 11.8, torch of 13.0" in text_of(list(doctor.compiler_lines(machine.Facts(cuda="13.0"))), "nvcc")
    assert text_of(list(doctor.compiler_lines(machine.Facts(cuda="11.6"))), "nvcc").endswith("CUDA 11.8")


def test_lines_are_short_and_plain(capsys):
    doctor.show("title", [(machine.BAD, "name", "word " * 60 + "\x1b[31m" + "/a-b" * 30)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and all(len(line) <= 100 for line in out.splitlines()[:-1])


# Rows.


def answers_of(sandbox, *answers):
    """A file of rows with these answers."""
    lines = [json.dumps({"instruction": "问", "input": "", "output": text}, ensure_ascii=False) for text in answers]
    return str(sandbox.write("answers.json", "\n".join(lines)))


def look_at_rows(mode, path):
    """The lines on the rows, from a folder without weights."""
    args = flags_doctor.parse_doctor([str(mode), "--train_path", path])
    return list(doctor.row_lines(args.folders[0], args))


def test_answers_that_a_tokenizer_changes(sandbox):
    """Kind: a perfect model cannot write the reference, and nothing says so before the training."""
    path = answers_of(
        sandbox, "发动机组（汽油）", "很长的一句话在前面，这里有一个控制符\x02然后再说几句", "水泵漏水 \n", "水,泵"
    )
    folder = sandbox.model("glm")
    drop("pytorch_model*")(folder)  # weights are not read
    lines = look_at_rows(folder, path)
    assert [(mark, name) for mark, name, _ in lines] == [("note", "answers"), ("note", "example"), ("note", "example")]
    assert lines[0][2] == (
        "4 rows: 3 answers come back as another text; 1 of these differ after NFKC folding too, and no model can match "
        "them exactly"
    )
    assert (
        lines[1][2].startswith(f"{path}:2: '...") and "控制符\\x02然后" in lines[1][2] and "控制符然后" in lines[1][2]
    )
    assert lines[2][2] == f"{path}:1: '发动机组（汽油）' comes back as '发动机组(汽油)'"
    assert look_at_rows(GOLDEN_FOLDERS["glm3"], path) == [
        ("ok", "answers", "4 rows: every answer comes back from the tokenizer as it is")
    ]
    path = answers_of(sandbox, "（甲）", "乙")
    assert "as metrics compare texts, all of them are alike" in text_of(look_at_rows(folder, path), "answers")


def test_rows_need_a_tokenizer(sandbox, capsys):
    for words, says in (
        (["--train_path", "rows.json"], "--train_path rows.json: needs the tokenizer of a checkpoint: name its folder"),
        ([str(GOLDEN_FOLDERS["glm"]), "--train_path", "no.json"], "--train_path no.json: no such file or folder"),
        ([str(GOLDEN_FOLDERS["glm"]), "--response_column", "a"], "--response_column: belongs to --train_path: add it"),
        (["x", "--train_path", "rows.json", "--response_column", "input"], "input: is part of the question: name"),
    ):
        with pytest.raises(SystemExit) as stop:
            doctor.main(words)
        [line] = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and says in line
    (sandbox.folder / "out").mkdir()
    args = flags_doctor.parse_doctor(["out", "--train_path", "rows.json"])
    with pytest.raises(ValueError, match="out: has no tokenizer: name a checkpoint"):
        list(doctor.row_lines("out", args))
    put("rows.json", "{}")(sandbox.folder)
    with pytest.raises(ValueError, match="rows.json:1: no field 'instruction'"):
        look_at_rows(GOLDEN_FOLDERS["glm"], "rows.json")


# The command.


def test_unknown_flags_are_refused(capsys):
    for words in (["--fast"], ["--mode", "glm4"]):
        with pytest.raises(SystemExit) as stop:
            doctor.main(words)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_help_needs_no_torch():
    code = "import sys, doctor\ntry: doctor.main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "--full" in process.stdout


def test_the_command_reports_every_section(sandbox):
    cut("pytorch_model-00001*")(sandbox.model())
    command = [sys.executable, str(ROOT / "doctor.py"), str(GOLDEN_FOLDERS["glm"]), "model"]
    command += ["--train_path", answers_of(sandbox, "（甲）")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr == ""
    for title in ("versions", "machine", "GPUs", "compilers", "known to fail", "model", str(GOLDEN_FOLDERS["glm"])):
        assert f"\n{title}\n" in process.stdout
    assert "\n  BAD   weights         model/pytorch_model-00001-of-00002.bin: truncated" in process.stdout
    assert "\n  ok    torch " in process.stdout and "python predict.py --model_path" in process.stdout
    assert "'（甲）' comes back as '(甲)'" in " ".join(process.stdout.split())
