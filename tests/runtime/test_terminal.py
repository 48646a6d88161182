"""No text of a row, an answer, a file's name or a flag makes the terminal do something: it is spelled out."""

import io
import json
import re
import runpy
import sys

import pytest
from command_lines import COMMANDS, NEEDED, run_on
from reference import GOLDEN, ROOT
from refusing import WeightsReached, sandbox  # noqa: F401, a fixture

import doctor
import predict
import score
from generation import answerer
from runtime import entry, machine
from runtime import streams as utils

# Clear the screen, the same with a C1 byte, a title, bell, delete, text that runs backwards, back to the line's begin.
HOSTILE = "a\x1b[2Jb\x9b2J\x1b]0;t\x07\x7f\u202e\u2066\r"
SPELLED = r"a\x1b[2Jb\x9b2J\x1b]0;t\x07\x7f\u202e\u2066\r"
FLAGS = ["--model_path", GOLDEN / "glm3", "--device", "cpu"]


def is_harmless(*texts):
    """Does a terminal show these texts, and do nothing? A progress bar alone goes back to the line's begin."""
    obeyed = "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return not any(re.search(obeyed, text) for text in texts)


@pytest.fixture
def hostile_answers(monkeypatch):
    def answer(self, encoded):
        return [{"predictions": [f"{HOSTILE}\n\tsecond"], "stopped": [True], "source_cut": 0} for _ in encoded]

    monkeypatch.setattr(answerer.Answerer, "__call__", answer)


def said_by(main, monkeypatch, name, *argv):
    """(exit code, stdout, stderr) of a command's main function behind its door."""
    streams = [io.StringIO(), io.StringIO()]
    for place, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, place, stream)
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        entry.run(main)
    return stop.value.code, *(stream.getvalue() for stream in streams)


@pytest.mark.parametrize("script", COMMANDS)
def test_flags_of_every_command(script, monkeypatch):
    code, *said = run_on("utf-8", monkeypatch, script, *NEEDED.get(script, "").split(), f"--{HOSTILE}")
    assert code == 2 and is_harmless(*said) and r"\x1b[2J" in said[1]


def test_control_characters_of_answers_are_spelled_out(monkeypatch, hostile_answers):
    """To --prompt and --interactive; line ends and tabs of an answer stay."""
    code, out, errors = said_by(predict.main, monkeypatch, "predict.py", *FLAGS, "--prompt", HOSTILE)
    assert not code and is_harmless(out, errors) and out == f"{SPELLED}\n\tsecond\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HOSTILE}\n\n"))
    code, out, errors = said_by(predict.main, monkeypatch, "predict.py", *FLAGS, "--interactive")
    assert not code and is_harmless(out, errors) and f"{SPELLED}\n\tsecond\n" in out


def test_names_of_files_and_labels(monkeypatch, tmp_path, hostile_answers):
    rows, predictions = tmp_path / f"{HOSTILE}.json", tmp_path / f"out{HOSTILE}.jsonl"
    row = {"instruction": HOSTILE, "input": "", "output": HOSTILE, HOSTILE: "x"}
    rows.write_text(json.dumps(row), encoding="utf-8")
    words = ["--test_path", rows, "--output_path", predictions]
    code, out, errors = said_by(predict.main, monkeypatch, "predict.py", *FLAGS, *words)
    assert not code and is_harmless(out, errors) and f"out{SPELLED}.jsonl" in out
    words = ["--predictions", predictions, "--task", "classification"]
    code, out, errors = said_by(score.main, monkeypatch, "score.py", *words)
    assert code == 0 and is_harmless(out, errors) and f"out{SPELLED}.jsonl" in out


def test_the_first_row_of_a_training(sandbox, tmp_path, monkeypatch):  # noqa: F811
    sandbox.write("rows.json", json.dumps({"instruction": HOSTILE, "input": "x", "output": HOSTILE}))
    streams = [io.StringIO(), io.StringIO()]
    for place, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, place, stream)
    words = ["--train_path", "rows.json", "--model_name_or_path", GOLDEN / "glm3", "--output_dir", f"out{HOSTILE}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words), "--device", "cpu"])
    with pytest.raises(WeightsReached):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = [stream.getvalue() for stream in streams]
    assert "first row (" in said[0] and is_harmless(*said)


def test_what_doctor_shows(monkeypatch):
    lines = [(machine.BAD, HOSTILE, f"word {HOSTILE}")]
    _, *said = said_by(lambda argv: doctor.show(HOSTILE, lines), monkeypatch, "doctor.py")
    assert is_harmless(*said) and said[0].count(r"a\x1b[2J") == 3


def test_a_stream_is_as_it_was_but_for_that():
    """A bar on stderr goes back to the line's begin; a second start puts nothing around it again."""
    inner = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    stream = utils.PlainStream(inner, "\r")
    assert stream.write("\r10%\x1b[A\n") == 8 and inner.buffer.getvalue() == b"\r10%\\x1b[A\n"
    stream.writelines(["\x9b", "水👨\u200d👩"])
    assert inner.buffer.getvalue().decode().endswith("\\x9b水👨\u200d👩") and stream.encoding == "utf-8"
    entry.prepare_streams()
    first = sys.stdout
    entry.prepare_streams()
    assert sys.stdout is first and isinstance(first, utils.PlainStream)
