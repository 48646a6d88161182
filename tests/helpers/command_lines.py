"""Every command: its parser, the words that it needs, and a run on a terminal of some encoding."""

import io
import runpy
import sys

import pytest
from reference import ROOT

from flags import compare, doctor, forgetting, judge, merge_lora, predict, score, train

PARSERS = {
    "train.py": train.train_parser,
    "predict.py": predict.predict_parser,
    "merge_lora.py": merge_lora.merge_parser,
    "score.py": score.score_parser,
    "doctor.py": doctor.doctor_parser,
    "compare.py": compare.compare_parser,
    "forgetting.py": forgetting.forgetting_parser,
    "judge.py": judge.judge_parser,
}
SCRIPTS = ("export_prefix", "make_base", "make_data", "mutate", "predict_vllm", "quickstart")
COMMANDS = [*sorted(PARSERS), *(f"scripts/{name}.py" for name in SCRIPTS)]
NEEDED = {  # words without which a command says nothing of another flag
    "train.py": "--train_path x --model_name_or_path x --output_dir x",
    "predict.py": "--model_path x --prompt x",
    "merge_lora.py": "--model_dir x",
    "score.py": "--predictions x",
    "compare.py": "x",
    "judge.py": "--output_path x",
    "forgetting.py": "--model_path x --output_path x",
    "scripts/export_prefix.py": "--model_dir x",
    "scripts/make_base.py": "--output_dir x",
    "scripts/predict_vllm.py": "--model_path x --test_path x",
}


def run_on(encoding, monkeypatch, script, *argv):
    """(exit code, stdout, stderr) of a script in this process, on a terminal of this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)
