"""The benchmarks run, count what they say they count, and write their page from what they measured."""

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from reference import ROOT

from benchmarks import report, step
from benchmarks.presets import preset_config, random_model, random_rows
from rows.batches import collate
from train_types import TRAIN_TYPES


def test_a_step_against_the_plain_way(tmp_path):
    figures = tmp_path / "figures.json"
    command = "benchmarks/step.py --preset tiny --mode glm --train_type lora --length 40 --batch_size 2 --steps 1"
    subprocess.run(
        [sys.executable, *f"{command} --against plain --memory --device cpu --json {figures}".split()],
        cwd=ROOT,
        check=True,
        timeout=200,
    )
    row = json.loads(figures.read_text())
    assert row["mode"] == "glm" and row["train type"] == "lora"
    assert row["tokens/s"] == pytest.approx(80 / row["step s"], rel=1e-6)
    assert row["speed-up (time)"] == pytest.approx(row["plain step s"] / row["step s"])
    assert 0 < row["extra GB"] < row["peak GB"] and 0 <= row["outside engine"] < 1


@pytest.mark.parametrize("mode", ["glm", "glm3"])
def test_useful_work_is_counted(mode):
    """By hand: three products for each weight that trains, two where gradients pass, one where none do."""
    config = preset_config("tiny", mode)
    rows = random_rows(config, [20, 30], [5, 10])
    batch = collate(rows, 0)
    per_layer = sum(
        parameter.numel()
        for name, parameter in random_model("tiny", mode, torch.float32, "cpu").named_parameters()
        if "layers.1." in name and parameter.dim() > 1
    )
    width = config.num_attention_heads * config.head_dim
    pairs = 20 * 21 / 2 + 30 * 31 / 2
    if mode == "glm":  # the part in front of <sop> sees itself whole
        pairs += 14 * 13 / 2 + 19 * 18 / 2
    head = config.vocab_size * config.hidden_size * 2 * 15
    layer, attention = 2 * per_layer * 50, 4 * pairs * width  # the 10 padded positions are no useful work
    for trains, wanted in (
        ("all", 2 * 3 * (layer + attention) + 3 * head),
        ("layers.1.", (layer + attention) + 3 * (layer + attention) + 2 * head),
    ):
        model = random_model("tiny", mode, torch.float32, "cpu").train()
        if trains != "all":
            model = TRAIN_TYPES["freeze"].prepare(model, SimpleNamespace(freeze_module_name=trains), mode)
        assert step.useful_flops(model, batch, rows, config) == pytest.approx(wanted, rel=0.02)


def test_the_page_is_made_from_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "RESULTS.md")
    for value in (1, 2):
        report.save("Steps", "python step.py", [{"mode": "glm", "s": value}, {"mode": "glm3", "GB": 3}])
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| mode | s | GB |\n| --- | --- | --- |\n| glm | 2 |  |\n| glm3 |  | 3 |\n" in text
    assert text.count("python step.py") == 1


def test_the_shipped_page_is_that_of_the_shipped_figures():
    results = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert report.page(results) == report.PAGE.read_text(encoding="utf-8")


def test_commands_of_the_performance_page_parse():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    seen = 0
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line)
            assert words[:2] == ["python", "benchmarks/step.py"]
            step.parse(words[2:])
            seen += 1
    assert seen >= 5
