"""compare.py: what it refuses, what it runs and does not run again, and what the report says."""

import json
import shlex
import signal
import sys
from pathlib import Path

import pytest
from comparing import BASE, FLAGS, GOOD, FakeCommands, method, refused, write_config
from reference import ROOT

import compare
from comparison import commands as steps
from reports import page as report

draw_pictures = report.draw_pictures


def test_a_whole_comparison(workdir, monkeypatch):
    commands = FakeCommands()
    assert compare.main(["c.yaml"], run_words=commands) == 0
    assert len(commands.ran) == 3 + 6 * 4 and commands.ran[:3] == [
        ("predict", "output/compare-c/base/predictions.jsonl"),
        ("score", "output/compare-c/base/predictions.jsonl"),
        ("forgetting", "output/compare-c/base/forgetting.json"),
    ]
    assert not list(workdir.rglob("state-step-*"))
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    by_name = {entry["name"]: entry for entry in results["methods"]}
    best = by_name["lora,learning_rate=0.003"]
    assert results["best"] == best["name"] and best["metrics"]["f1"] == pytest.approx(75)
    assert best["to_best"] is None and best["to_base"][0] == pytest.approx(75) and best["spread"] == 0
    assert by_name["all"]["to_best"][0] == pytest.approx(-55)
    assert best["forgetting"] == {"loss": [0.41, 0.3, 0.55], "score": None} and best["peak_memory_bytes"] == 6.5e8
    assert best["runs"][1]["loss"] == [[10, 0.3], [20, 0.15]] and best["runs"][1]["seed"] == 2
    assert best["checkpoint_bytes"] == sum(
        path.stat().st_size for path in Path(best["runs"][0]["checkpoint"]).iterdir()
    )
    assert len(results["commands"]) == 27 and all(shlex.split(command) for command in results["commands"])
    assert {"torch", "python"} <= set(results["machine"]["versions"])
    monkeypatch.setattr(report, "draw_pictures", draw_pictures)
    assert compare.main(["c.yaml", "--report_only"], run_words=None) == 0
    page = Path("output/compare-c/report/index.html").read_text()
    assert page.count("data:image/png") == 4 and "1 min 23 s" in page and "650.0 MB" in page and "1.48% of 2 M" in page


def test_nothing_is_done_twice(workdir, capsys):
    assert compare.main(["c.yaml", "--only", "all"], run_words=FakeCommands()) == 0
    commands = FakeCommands()
    assert compare.main(["c.yaml", "--only", "all"], run_words=commands) == 0 and commands.ran == []
    assert compare.main(["c.yaml", "--report_only"], run_words=None) == 0
    assert "Without figures: lora,learning_rate=1e-3" in Path("output/compare-c/report/index.html").read_text()
    # Other flags of the prediction are done anew; those of a training are refused before anything runs.
    write_config({**GOOD, "predict_flags": {"max_new_tokens": 9}})
    assert compare.main(["c.yaml", "--only", "all"], run_words=commands) == 0
    assert [name for name, _ in commands.ran] == ["predict"] * 3  # with the same answers, and so the same scores
    write_config({**GOOD, "train_flags": {**FLAGS, "num_train_epochs": 2}})
    lines = refused(["c.yaml"], capsys)
    assert lines == [
        f"c.yaml: output/compare-c/runs/all/seed-{seed}/train: is of other settings: remove or rename it"
        for seed in (1, 2)
    ]
    assert compare.main(["c.yaml", "--report_only"], run_words=None) == 0
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    assert [entry["status"] for entry in results["methods"]] == ["not run"] * 3  # those figures are of other flags


def test_figures_of_other_rows_are_not_shown(workdir):
    """Rows, base or DeepSpeed file with the same name and other contents: what came of them is not compared."""
    Path("test.jsonl").write_text(Path("rows.jsonl").read_text())
    Path("ds.json").write_text((ROOT / "configs" / "ds_zero2_no_offload.json").read_text())
    write_config({**GOOD, "test_path": "test.jsonl", "train_flags": {**FLAGS, "ds_file": "ds.json"}})
    assert compare.main(["c.yaml"], run_words=FakeCommands()) == 0

    def statuses():
        assert compare.main(["c.yaml", "--report_only"], run_words=None) == 0
        results = json.loads(Path("output/compare-c/report/results.json").read_text())
        return [entry["status"] for entry in (results["base"], *results["methods"])]

    assert statuses() == ["done"] * 4
    Path("test.jsonl").write_text("".join(Path("rows.jsonl").read_text().splitlines(True)[:10]))
    assert statuses() == ["not run"] * 4
    commands = FakeCommands()
    assert compare.main(["c.yaml", "--only", "all"], run_words=commands) == 0
    assert {name for name, _ in commands.ran} == {"predict"} and statuses() == ["done", "not run", "not run", "done"]
    Path("ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert statuses() == ["done", "not run", "not run", "not run"]


def test_texts_are_folded_unless_the_file_says_no(workdir):
    """The figures of the report are scored as the command scores, with the same switch."""

    class Folding(FakeCommands):
        def predict(self, output, flags):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text('{"query": "", "output": "（a）_b_c", "prediction": "(a)_b_c"}\n')

    for off, f1 in ((False, 100), (True, 0)):
        write_config({**GOOD, "no_normalize": off})
        assert compare.main(["c.yaml", "--only", "all"], run_words=Folding()) == 0
        results = json.loads(Path("output/compare-c/report/results.json").read_text())
        assert results["no_normalize"] == off and results["base"]["metrics"]["f1"] == f1
    scored = [command for command in results["commands"] if "score.py" in command]
    assert len(scored) == 3 and all(command.endswith("--no_normalize --overwrite") for command in scored)
    assert "texts as they are (no_normalize)" in Path("output/compare-c/report/index.html").read_text()


def test_answers_that_were_changed_since_are_not_shown(workdir, capsys):
    """Kind: a step counts as done though its result is not what it left."""
    assert compare.main(["c.yaml", "--only", "all"], run_words=FakeCommands()) == 0
    path = Path("output/compare-c/runs/all/seed-1/predictions.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert compare.main(["c.yaml", "--report_only"], run_words=None) == 0
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    assert [entry["status"] for entry in (results["base"], results["methods"][2])] == ["done", "not run"]
    commands = FakeCommands()
    capsys.readouterr()
    assert compare.main(["c.yaml", "--only", "all"], run_words=commands) == 0
    assert commands.ran == [("predict", str(path))] and path.read_bytes() == content
    assert f"\n{path}: is not what this step wrote: it is made again\n" in capsys.readouterr().out


def test_a_report_of_another_file_is_replaced_with_a_word_and_other_files_are_not(workdir, capsys):
    """Kind: an output that another command, or other settings, wrote is replaced without a word."""
    assert compare.main(["c.yaml", "--only", "all"], run_words=FakeCommands()) == 0
    assert compare.main(["c.yaml", "--report_only"], run_words=None) == 0
    assert "replaces" not in capsys.readouterr().out
    write_config(GOOD, "d.yaml")
    assert compare.main(["d.yaml", "--report_only", "--output_dir", "output/compare-c"], run_words=None) == 0
    again = "python compare.py c.yaml --output_dir output/compare-c --report_only"
    assert f"replaces the report on c.yaml, which this makes again: {again}" in capsys.readouterr().out
    Path("mine/report").mkdir(parents=True)
    Path("mine/report/index.html").write_text("mine")
    [line] = refused(["c.yaml", "--output_dir", "mine"], capsys)
    assert line == "--output_dir: mine/report: the report goes there, and it holds something else: remove or rename it"
    assert Path("mine/report/index.html").read_text() == "mine"


def test_an_interrupted_comparison_goes_on(workdir):
    leaves = FakeCommands(lambda script, output: 75 if output.endswith("lora,learning_rate=0.003/seed-1/train") else 0)
    with pytest.raises(SystemExit) as stop:
        compare.main(["c.yaml"], run_words=leaves)
    assert stop.value.code == 75
    [state] = workdir.rglob("state-step-10")
    commands = FakeCommands(lambda script, output: 0 if state.exists() or script != "train" else 1)
    compare.main(["c.yaml", "--only", "lora"], run_words=commands)
    assert commands.ran[0] == ("train", "output/compare-c/runs/lora,learning_rate=0.003/seed-1/train")
    done = [output for script, output in leaves.ran if script == "train"]
    assert not {output for _, output in commands.ran} & set(done[:-1])


def test_a_run_that_fails_does_not_end_the_others(workdir, capsys):
    fails = FakeCommands(lambda script, output: 3 if script == "train" and "1e-3" in output else 0)
    assert compare.main(["c.yaml"], run_words=fails) == 1
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    assert [entry["status"] for entry in results["methods"]] == ["failed with exit code 3", "done", "done"]
    assert "| failed exit code 3 |" in Path("output/compare-c/report/report.md").read_text()
    again = FakeCommands()
    assert compare.main(["c.yaml"], run_words=again) == 0
    assert len(again.ran) == 2 * 4


def test_layers_that_the_base_does_not_have(workdir, capsys):
    write_config(
        {**GOOD, "methods": [{"name": "f", "train_type": "freeze", "flags": {"freeze_module_name": "layers.99."}}]}
    )
    [line] = refused(["c.yaml"], capsys)
    assert "c.yaml: f: --freeze_module_name layers.99.: matches no weight" in line


def test_the_base_is_made_where_it_is_absent(workdir, capsys):
    write_config({**GOOD, "base": "made", "base_command": "python make.py --output_dir made", **method()})

    class Makes(FakeCommands):
        def make(self, output, flags):
            output.symlink_to(BASE)

    commands = Makes()
    assert compare.main(["c.yaml"], run_words=commands) == 0 and commands.ran[0] == ("make", "made")
    said = "\nbase_command of c.yaml is run, whatever it is: python make.py --output_dir made\n"
    assert said in capsys.readouterr().out.split("== make-base")[0]
    assert compare.main(["c.yaml"], run_words=None) == 0


def test_a_signal_reaches_the_command(tmp_path):
    """run_words asks the command to leave, and waits until it has."""
    code = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    code += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the tests' own parent may ignore it
    try:
        assert steps.run_words([sys.executable, "-c", code], None) == (75, True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps.run_words([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], None) == (137, False)
