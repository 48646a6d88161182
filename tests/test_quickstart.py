"""The quickstart's steps: run once, rerun after a break, and the base shared by all train types."""

import importlib.util
import shlex
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_what_lies_elsewhere_is_left_to_its_own_command(step, tmp_path):
    base = tmp_path / "base"
    assert step("one", base) == 1
    (base / "weights").write_text("")
    assert step("two", base) == 2
    assert (base / "weights").exists()


def test_flags_are_taken_by_train(quickstart):
    from train_arguments import train_parser
    from tuning import TRAIN_TYPES

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
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--mode", "glm2"])
    with pytest.raises(Asked) as asked:
        quickstart.main()
    name, *inputs = asked.value.args
    assert name == "base" and all(path.is_file() for path in inputs)
    wanted = "scripts/make_base.py scripts/make_data.py scripts/data_words.py glm1/modeling_chatglm.py"
    wanted += " glm2/modeling_chatglm.py glm2/configuration_chatglm.py glm3/configuration_chatglm.py glm_common/loss.py"
    assert {ROOT / path for path in wanted.split()} <= set(inputs)
