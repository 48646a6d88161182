"""The quickstart's steps: run once, rerun after a break, and the base shared by all train types."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
from launching import load_script
from reference import ROOT

import score
from runtime.folders import close_folder


@pytest.fixture(scope="module")
def quickstart():
    return load_script("quickstart")


@pytest.fixture
def step(quickstart, tmp_path):
    """step(folder, result, exit_code): run a step that adds a line to a log and makes `result`; returns its runs."""
    log = tmp_path / "log"
    rows = tmp_path / "rows"
    rows.write_text("1")

    def run(folder, result, exit_code=0):
        code = f"import os, sys; open({str(log)!r}, 'a').write('x'); os.makedirs({str(result)!r}, exist_ok=True); sys.exit({exit_code})"
        command = shlex.join([sys.executable, "-c", code])
        quickstart.Steps(tmp_path / folder).run("train", command, [str(rows)], result)
        return len(log.read_text())

    run.rows = rows
    return run


def test_a_finished_step_is_not_run_again_until_its_inputs_change(step, tmp_path, capsys):
    result = tmp_path / "run" / "train"
    assert step("run", result) == 1
    assert step("run", result) == 1
    step.rows.write_text("2")
    with pytest.raises(SystemExit) as stop:
        step("run", result)
    assert stop.value.code == 2
    assert f"{result}: is of other settings: remove or rename it" in capsys.readouterr().err


def test_a_step_that_broke_off_starts_anew(step, tmp_path):
    result = tmp_path / "run" / "train"
    with pytest.raises(SystemExit) as stop:
        step("run", result, exit_code=9)
    assert stop.value.code == 9
    (result / "half").write_text("")
    assert step("run", result) == 2
    assert not (result / "half").exists()


def test_results_outside_the_folder_are_not_removed(step, tmp_path):
    base = tmp_path / "base"
    assert step("one", base) == 1
    (base / "weights").write_text("")
    assert step("two", base) == 2
    assert (base / "weights").exists()


def test_a_result_that_was_changed_is_made_again(quickstart, tmp_path, capsys):
    """Kind: a step counts as done though its result is not what it left."""
    log, result = tmp_path / "log", tmp_path / "run" / "answers.jsonl"
    code = f"open({str(log)!r}, 'a').write('x'); open({str(result)!r}, 'w').write('whole')"
    command = shlex.join([sys.executable, "-c", code])

    def run():
        quickstart.Steps(tmp_path / "run").run("before", command, [], result)
        return len(log.read_text())

    assert run() == run() == 1
    for spoil in (lambda: result.write_text("who"), lambda: result.write_text("whose"), result.unlink):
        spoil()
        num_runs = len(log.read_text())
        capsys.readouterr()
        assert run() == run() == num_runs + 1 and result.read_text() == "whole"
        assert ("is not what this step wrote: it is made again" in capsys.readouterr().out) == (spoil != result.unlink)
    # Stamps of before there was a hash of the result.
    stamp = tmp_path / "run" / "before.stamp.json"
    values = json.loads(stamp.read_text())
    del values["result"]
    stamp.write_text(json.dumps(values))
    assert run() == 4


def test_a_training_whose_files_were_cut_is_not_taken_for_done(step, tmp_path, capsys):
    """It is not thrown away either: who cut it decides."""
    result = tmp_path / "run" / "train"
    assert step("run", result) == 1
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "weights").write_text("12345")
    close_folder(str(scratch), str(result / "epoch-1-step-2"))
    assert step("run", result) == 1
    (result / "epoch-1-step-2" / "weights").write_text("123")
    with pytest.raises(SystemExit) as stop:
        step("run", result)
    assert stop.value.code == 2 and (result / "epoch-1-step-2" / "weights").read_text() == "123"
    line = capsys.readouterr().err
    assert "weights: has 3 bytes, it was saved with 5" in line and f"or remove or rename {result}" in line


def test_the_table_is_of_the_answers_whoever_scored_them(quickstart, tmp_path):
    """Kind: a reader of a file that another command writes, with other metrics in it."""
    path = tmp_path / "after.jsonl"
    rows = [{"prediction": f"零件{n}(前)_部件故障_开裂", "output": "零件1（前）_部件故障_开裂"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = quickstart.scores_of(path)
    assert values["f1"] == 25 and set(values) == set(quickstart.METRICS)
    assert score.main(["--predictions", str(path), "--task", "extraction", "--bootstrap", "0"]) == 0
    assert quickstart.scores_of(path) == values


def test_flags_are_taken_by_train(quickstart):
    from flags.train import train_parser
    from train_types import TRAIN_TYPES

    assert set(quickstart.FLAGS) == set(TRAIN_TYPES)
    for name, flags in quickstart.FLAGS.items():
        words = f"{quickstart.COMMON} {flags} --train_type {name} --train_path a --model_name_or_path b --output_dir c".split()
        args = train_parser().parse_args(words)
        assert args.num_train_epochs >= 4 and args.train_type == name


def test_the_base_is_made_from_the_networks_too(quickstart, monkeypatch):
    """Of a kind: what is kept and found again is of everything that decided it, the code of the network included."""

    class Asked(Exception):
        pass

    class Recorder:
        def __init__(self, folder):
            pass

        def run(self, name, command, inputs, result):
            raise Asked(name, *inputs)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart, "Steps", Recorder)
    with pytest.raises(Asked) as asked:
        quickstart.run_all(SimpleNamespace(mode="glm2", train_type="lora"), "nowhere")
    name, *inputs = asked.value.args
    assert name == "base" and all(path.is_file() for path in inputs)
    wanted = "scripts/make_base.py scripts/make_data.py scripts/data_words.py glm1/modeling_chatglm.py"
    wanted += " glm2/modeling_chatglm.py glm2/configuration_chatglm.py glm3/configuration_chatglm.py modeling/loss.py"
    assert {ROOT / path for path in wanted.split()} <= set(inputs)
