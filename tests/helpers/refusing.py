"""Scripts run inside the tests' process on bad input: harness, tables' lines, and ways to spoil a checkpoint.

A script runs as `python train.py ...` would run it, up to the point where weights are read; the process group alone
is left out.
"""

import json
import os
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_lines import PARSERS
from safetensors.torch import save_file

from checkpoints import base_weights, opening
from flags import common
from modes import MODES
from rows import cache as row_cache
from runtime import hosts, watchdog
from training import setup

ROOT = Path(common.__file__).resolve().parent.parent
FOLDERS = {mode.name: ROOT / "tests" / "golden" / mode.package for mode in MODES.values()}
ROW = {"instruction": "问", "input": "", "output": "答"}
ROW_LINE = json.dumps(ROW)
OUTPUT_LAYER = "transformer.output_layer.weight"
NO_CUDA = (torch.cuda.is_available(), "there is a CUDA device")


def case(name, *values, bug=None, skip=None):
    """A line of a table; `bug` says what the program does instead, until that is fixed."""
    marks = [pytest.mark.xfail(strict=True, reason=bug)] if bug else []
    marks += [pytest.mark.skipif(skip[0], reason=skip[1])] if skip else []
    return pytest.param(*values, id=name, marks=marks)


class Sandbox:
    """A folder of one test, with the scripts run in it."""

    def __init__(self, folder, cache, capsys, monkeypatch):
        self.folder = folder
        self.cache = cache
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.write("rows.json", "\n".join([ROW_LINE] * 4))

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self, mode="glm3", name="model"):
        """A copy of a family's checkpoint, to be spoilt."""
        path = self.folder / name
        shutil.copytree(FOLDERS[mode], path, ignore=shutil.ignore_patterns("golden.*"))
        return path

    def adapter(self, name="adapter", drop=(), **run):
        """A folder with a run.json and, where the test adds nothing else, no weights."""
        run = {"mode": "glm3", "train_type": "lora", "weights": "adapter", "base_model": str(FOLDERS["glm3"]), **run}
        path = self.folder / name
        path.mkdir()
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(FOLDERS["glm3"] / file, path)
        (path / "run.json").write_text(json.dumps({key: run[key] for key in run if key not in drop}))
        return path

    def files(self):
        """Everything here, with what tells a change of a file."""
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
            for path in self.folder.rglob("*")
        }

    def run(self, script, *argv):
        """(exit code, lines on stderr) of a script; checks what is true of every error."""
        argv = [str(word) for word in argv]
        self.monkeypatch.setattr(sys, "argv", [script, *argv])
        before = self.files()
        with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit) as stop:
            warnings.resetwarnings()
            for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", unseen)
            runpy.run_path(str(ROOT / script), run_name="__main__")
        lines = self.capsys.readouterr().err.splitlines()
        assert [str(warning.message) for warning in caught] == []
        assert self.files() == before, "something was written"
        assert not self.cache.exists() or os.listdir(self.cache) == []
        for line in lines:
            assert re.match(rf"{script}: (rank \d+: )?error: ", line)
            assert not re.search(r"[\x00-\x1f\x7f]|Traceback|weights_only", line)
            if "unrecognized arguments" not in line:
                told = re.sub(r"\(python \w+\.py [^)]*\)", "", line)  # another command, in full
                named = set(re.findall(r"--[a-z][a-z_]+", told))
                assert named <= set(PARSERS[script]()._option_string_actions), "it names a flag that there is not"
        return stop.value.code, lines

    def fails(self, script, *argv, says):
        """The script ends with code 2 and one line in which the pattern is found."""
        code, lines = self.run(script, *argv)
        assert code == 2
        assert len(lines) == 1, lines
        assert re.search(says, lines[0]), f"{lines[0]!r} does not say {says!r}"

    def fill(self, text):
        """A line of flags as words; {name} is the sandbox or a checkpoint, '' an empty word."""
        places = {name: str(path) for name, path in FOLDERS.items()} | {"sandbox": str(self.folder)}
        return [word.format(**places) if word != "''" else "" for word in text.split()]

    def train_fails(self, flags="", says="", **changes):
        """train.py with good flags, those changed or left out (None), and more."""
        base = {"train_path": "rows.json", "model_name_or_path": FOLDERS["glm3"], "output_dir": "out", "device": "cpu"}
        words = self.fill(flags)
        given = {**base, **changes}
        kept = [(k, v) for k, v in given.items() if v is not None and f"--{k}" not in words]
        self.fails("train.py", *[w for k, v in kept for w in (f"--{k}", v)], *words, says=says)

    def allow_weights(self):
        """For errors that show only when weights are read."""
        for module in (base_weights, opening, setup):
            self.monkeypatch.setattr(module, "load_base", LOAD_BASE)


LOAD_BASE = base_weights.load_base


class WeightsReached(Exception):
    """The weights would be read now."""


@pytest.fixture
def sandbox(tmp_path, tmp_path_factory, monkeypatch, capsys):
    def too_late(*args, **kwargs):
        raise WeightsReached

    cache = tmp_path_factory.mktemp("cache") / "rows"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(row_cache, "cache_folder", lambda: str(cache))
    for module in (base_weights, opening, setup):
        monkeypatch.setattr(module, "load_base", too_late)
    for module in (hosts, setup):
        monkeypatch.setattr(module, "start_distributed", lambda device, minutes=0: None)
    monkeypatch.setattr(watchdog.Watch, "start", lambda *args: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: int(os.environ.get("RANK", "0")))
    environment = dict(os.environ)
    yield Sandbox(tmp_path, cache, capsys, monkeypatch)
    os.environ.clear()
    os.environ.update(environment)


def lines(*texts):
    """The text of a file."""
    return "\n".join(texts)


def row(**changes):
    """A line that holds a good row but for the changes."""
    return json.dumps({**ROW, **changes})


# Ways to spoil a checkpoint folder: functions that make functions of the folder.


def change_json(name, **changes):
    """A function that changes keys of a JSON file; None removes them."""

    def spoil(folder):
        values = json.loads((folder / name).read_text())
        values.update(changes)
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


def put(name, content):
    """A function that writes a file."""

    def spoil(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def drop(*patterns):
    """A function that removes files."""

    def spoil(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return spoil


def weight_map(value):
    """A function that writes an index."""
    return put("pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": value}))


def cut(pattern, share=0.5):
    """A function that keeps the first part of a file."""

    def spoil(folder):
        [path] = folder.glob(pattern)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return spoil


def one_file(change=lambda state: state, name="model.safetensors"):
    """A function that stores the weights, changed, in one file."""

    def spoil(folder):
        state = {}
        for path in sorted(folder.glob("pytorch_model-*.bin")):
            state |= torch.load(path, weights_only=True)
        drop("pytorch_model*")(folder)
        state = change(state)
        if name.endswith(".safetensors"):
            save_file(state, folder / name)
        else:
            torch.save(state, folder / name)

    return spoil


def without(state):
    """Weights without the output layer."""
    return {name: tensor for name, tensor in state.items() if name != OUTPUT_LAYER}


def replaced(tensor_of):
    """A function of the weights that makes another output layer of theirs."""
    return lambda state: {**state, OUTPUT_LAYER: tensor_of(state[OUTPUT_LAYER])}


def both(*spoils):
    """A function that does the one, then the other."""

    def spoil(folder):
        for one in spoils:
            one(folder)

    return spoil


NO_CHANGE = put("adapter_model.safetensors", b"")  # an adapter whose weights are never looked at
