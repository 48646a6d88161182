"""The page of reliability figures is made from the figures, and says what was not run; its commands are real ones."""

import random
import re
import shlex

import pytest
import soak
from faulty_train import POINTS, REPLACING
from reference import ROOT

from flags import train

KILLS = [
    {"type": "lora", "chain": 1, "kill": "rank 0", "saved": 4, "done": 7, "whole": True, "begun": 4},
    {"type": "lora", "chain": 1, "kill": "rank 1", "saved": 6, "done": 6, "whole": True, "begun": 6},
    {"type": "lora", "chain": 1, "identical": True},
    {"type": "all", "chain": 1, "kill": "rank 1", "saved": 8, "done": 9, "whole": True, "begun": 8},
    {"type": "all", "chain": 1, "identical": True},
]
TIMES = [
    {"case": "a.json", "bytes": 2e6, "seconds": s, "plain": 2.0, "ratio": s / 2, "named": 3} for s in (2.0, 9.0, 2.2)
]
EXACT = [{"case": f"{name}, a.json", "identical": name == "lora"} for name in ("lora", "all", "lora")]


def kept(rows, is_complete=True):
    """A part's figures."""
    return {"machine": "2 cores; today", "is_complete": is_complete, "rows": rows}


def test_tables_of_the_reliability_page():
    text = soak.figures_text({"kills": kept(KILLS), "saving": kept(TIMES), "exact": kept(EXACT, False)})
    assert "| lora | 2 | 1 | 1 | 0 | 3 |" in text and "| together · 合计 | 3 | 2 | 2 | 0 | 3 |" in text
    assert "| a.json | 2 | 3 | 2.20 | 2.00 | 1.10 | 3.00 |" in text
    assert "| lora | 2 | 2 |" in text and "| all | 1 | 0 |" in text
    assert text.count(soak.NOT_RUN) == len(soak.PARTS) - 3
    assert text.count("interrupted") == 1
    for name in soak.PARTS:
        assert f"--only {name}`" in text


@pytest.mark.parametrize(
    "change, says",
    [
        ({"begun": 2}, "saved was 4, it went on from 2"),
        ({"begun": None}, "saved was 4, it went on from None"),
        ({"whole": False}, "a folder is not whole"),
    ],
)
def test_what_does_not_hold_is_named(change, says):
    assert soak.kills_problems(KILLS) == []
    [problem] = soak.kills_problems([{**KILLS[0], **change}, *KILLS[1:]])
    assert problem == f"lora, chain 1, rank 0: {says}"


def test_problems_of_the_other_parts():
    assert soak.PARTS["exact"].problems(EXACT) == ["all, a.json: not identical"]
    assert soak.PARTS["saving"].problems(TIMES) == []
    assert soak.PARTS["saving"].problems(TIMES[1:2]) == ["a.json: a save takes 4.50 times a plain write"]
    slow = {"case": "training", "seconds": 61.0, "code": 1}
    assert soak.PARTS["deaths"].problems([slow]) == ["training: seconds is 61.0, at most 60"]


def test_figures_are_kept_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(soak.report, "machine", lambda: "2 cores; today")
    path = tmp_path / "figures.json"
    for rows, is_complete in ((KILLS[:1], False), (KILLS, True)):
        soak.keep(path, "kills", rows, is_complete)
    soak.keep(path, "adam", [], False)
    figures = soak.read_figures(path)
    assert list(figures) == ["kills", "adam"] and figures["kills"]["rows"] == KILLS
    assert [part["is_complete"] for part in figures.values()] == [True, False]
    assert all(part["machine"] == "2 cores; today" for part in figures.values())
    assert soak.figures_text(figures).count("interrupted") == 1


def test_the_page_is_that_of_the_figures():
    text = soak.PAGE.read_text(encoding="utf-8")
    assert soak.page_with(text, soak.read_figures(soak.FIGURES)) == text


def test_kills_at_all_points():
    kills = soak.planned_kills(20, random.Random(1))
    at_random = [kill for kill in kills if not kill.point]
    assert len(at_random) == 20 and sum(kill.is_loading for kill in at_random) == 4
    assert sum(kill.rank is None for kill in at_random) == 10
    assert {kill.point for kill in kills if kill.rank == 0} >= {*POINTS, REPLACING}
    assert {kill.point for kill in kills if kill.rank == 1} >= set(soak.FILE_POINTS)


def test_both_languages_say_the_same():
    text, _, figures = soak.PAGE.read_text(encoding="utf-8").partition("# Figures")
    halves = re.split(r"^# .*$", text, flags=re.M)[1:]
    assert len(halves) == 2 and figures
    for pattern in (r"^## ", r"^\|", r"^- ", r"`[^`\n]+`", r"```bash\n.*\n", r"\b\d+\b"):
        found = [sorted(re.findall(pattern, re.sub(r" +#.*", "", half), re.M)) for half in halves]
        assert found[0] == found[1], pattern


def test_commands_and_files_of_the_page_exist():
    text = soak.PAGE.read_text(encoding="utf-8")
    parser, names = train.train_parser(), set()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names |= {word for word in words if word.endswith((".py", ".sh"))}
            if "train.py" in words:
                parser.parse_args(words[words.index("train.py") + 1 :])
    assert names == {"train.py", "doctor.py", "scripts/job.sh"}
    for name in re.findall(r"`(?:bash )?((?:scripts/)?\w+\.(?:py|sh))", text):
        assert (ROOT / name).exists() or list((ROOT / "tests").rglob(name)), name
