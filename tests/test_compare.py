"""compare.py: what it refuses, what it runs and does not run again, and what the report says."""

import ast
import itertools
import json
import re
import shlex
import signal
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import GOLDEN_FOLDERS, ROOT

import compare
from comparison import commands as steps
from comparison import figures
from comparison import methods as comparison_methods
from comparison import plan as compare_plan
from comparison.plan import read_plan
from evaluation import metrics
from evaluation.intervals import difference, intervals
from evaluation.metrics import METRICS, titles_in
from evaluation.tasks import find_task
from flags import score as flags_score
from flags.train import train_parser
from reports import page as report
from reports import text as report_text
from reports import words as report_words

BASE = str(GOLDEN_FOLDERS["glm3"])
ROWS = [{"instruction": "抽取：", "input": f"零件{n}开裂", "output": f"零件{n}_部件故障_开裂"} for n in range(20)]
FLAGS = {"max_len": 64, "max_src_len": 32}
GOOD = {
    "base": BASE,
    "mode": "glm3",
    "task": "extraction",
    "train_path": "rows.jsonl",
    "test_path": ["rows.jsonl"],
    "train_flags": FLAGS,
    "predict_flags": {"max_new_tokens": 8},
    "methods": [
        {"name": "lora", "train_type": "lora", "flags": {"lora_dim": 2}, "grid": {"learning_rate": ["1e-3", 0.003]}},
        {"name": "all", "train_type": "all"},
    ],
    "seeds": [1, 2],
    "forgetting": True,
}


draw_pictures = report.draw_pictures


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to start from, with rows and the file of a comparison; pictures are left out, they take a second."""
    monkeypatch.setattr(report, "draw_pictures", lambda results, folder: {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Path("rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    write_config(GOOD)
    return tmp_path


def write_config(values, name="c.yaml"):
    is_text = isinstance(values, str)
    Path(name).write_text(values if is_text else yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


def refused(argv, capsys):
    """The lines with which compare.py ends."""
    with pytest.raises(SystemExit) as stop:
        compare.main(argv, run_words=None)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("compare.py: error: ") for line in lines)
    return [line.removeprefix("compare.py: error: ") for line in lines]


def method(**changes):
    """The file with one LoRA method that has these changes."""
    return {"methods": [{"name": "m", "train_type": "lora", **changes}]}


BAD = {
    "unknown key": ({"sedes": [1]}, r"c.yaml: sedes \[1\]: no such key: did you mean seeds\?"),
    "unknown key of a method": (method(flag={}), r"c.yaml: methods\[0\]\.flag {}: no such key: did you mean flags\?"),
    "missing": ({"test_path": None}, r"c.yaml: test_path: is missing: give a path or a list of them"),
    "type": ({"train_flags": "--max_len 3"}, r"c.yaml: train_flags --max_len 3: is a text: give flags of train.py"),
    "no methods": ({"methods": []}, r"c.yaml: methods \[\]: is a list: give a list of methods"),
    "method is a text": ({"methods": ["lora"]}, r"c.yaml: methods\[0\] lora: is a text: write name and train_type"),
    "mode": ({"mode": "glm4"}, r"c.yaml: mode glm4: is none of them: give one of glm, glm2, glm3"),
    "train type": (method(train_type="qlora"), r"c.yaml: methods\[0\].train_type qlora: is none of them: give one of"),
    "task": ({"task": "spo"}, r"c.yaml: task spo: is none of them: give one of extraction"),
    "rows": ({"train_path": "nowhere.jsonl"}, r"c.yaml: train_path nowhere.jsonl: no such file or folder: check"),
    "seeds": (
        {"seeds": [1, 1]},
        r"c.yaml: seeds \[1, 1\]: must be a list of different whole numbers, 0 or more: for example",
    ),
    "seed out of range": (
        {"seeds": [-1]},
        r"c.yaml: seeds \[-1\]: must be a list of different whole numbers, 0 or more",
    ),
    "name": (method(name="a/b"), r"c.yaml: methods\[0\].name a/b: is a folder's name too: give another"),
    "name of the base": (method(name="base"), r"c.yaml: methods\[0\].name base: is taken: give another"),
    "grid": (method(grid={"learning_rate": 3}), r"c.yaml: methods\[0\].grid.learning_rate 3: must be a list of differ"),
    "grid and flags": (method(grid={"lora_dim": [2]}, flags={"lora_dim": 4}), r"methods\[0\].grid.lora_dim: stands in"),
    "unknown flag": (
        method(flags={"lora_dimm": 4}),
        r"flags.lora_dimm 4: train.py has no such flag: did you mean lora_d",
    ),
    "unknown flag of all": (
        {"train_flags": {"x": 4}},
        r"train_flags.x 4: train.py has no such flag: see python train.py",
    ),
    "own flag": (method(flags={"seed": 4}), r"c.yaml: methods\[0\].flags.seed 4: compare.py gives it: remove it"),
    "flag of another type": (
        method(flags={"pre_seq_len": 4}),
        r"\(m\): --pre_seq_len: belongs to --train_type ptuning",
    ),
    "no number": (
        method(flags={"lora_dim": "x"}),
        r"methods\[0\] \(m\): argument --lora_dim: invalid int value: 'x': see",
    ),
    "range": (method(flags={"lora_dim": 0}), r"c.yaml: methods\[0\] \(m\): --lora_dim 0: must be at least 1"),
    "list": (
        method(flags={"lora_dim": [1, 2]}),
        r"--lora_dim \[1, 2\]: takes one value: give one, or write the list as",
    ),
    "switch": (method(flags={"packing": 1}), r"methods\[0\] \(m\): --packing 1: is on or off: give true or false"),
    "predict flag": ({"predict_flags": {"top_p": 0.5}}, r"c.yaml: predict_flags: --top_p: needs --do_sample: add it"),
    "no base": ({"base": "nowhere"}, r"c.yaml: methods\[0\].*--model_name_or_path nowhere: no such folder"),
    "not YAML": ("base: [", r"c.yaml:1: not YAML \("),
    "key twice": ("base: a\nseeds: [1]\nbase: b\n", r"c.yaml: not YAML|c.yaml:3: not YAML \(base stands here twice\)"),
    "a template": ("base: {{BASE}}\n", r"c.yaml:1: not YAML \("),
    "a long name": (
        method(grid={"lora_module_name": [",".join(f"layers.{n}.dense" for n in range(28)), "dense"]}),
        r"is a folder's name too, and longer than 200 bytes",
    ),
    "a grid too large": (
        method(grid={name: list(range(29)) for name in ("lora_dim", "max_len", "max_src_len", "seed", "x", "y")}),
        r"c.yaml: methods: are 594,823,321 with the choices of their grids, and at most 200 can be compared: take",
    ),
    "methods": (
        {"methods": [{"name": f"m{n}", "train_type": "all"} for n in range(201)]},
        r"c.yaml: methods: are 201 with",
    ),
    "many seeds": ({"seeds": list(range(101))}, r"c.yaml: seeds: are 101: at most 100 can be compared: remove some"),
    "a bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijk")),
        r"c.yaml:5: not YAML \(more than 20,000 values and keys, with every alias written out\): fix this line",
    ),
    "a bomb of merges": (
        "a: &a {x: 1}\n"
        + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise("abcdefghijk")),
        r"c.yaml:5: not YAML \(more than 20,000 values",
    ),
    "values": (f"[{'a,' * 25_000}]", r"c.yaml:1: not YAML \(more than 20,000 values"),
    "itself": ("a: &a [*a]", r"c.yaml:1: not YAML \(an alias inside of what it stands for\)"),
    "nested": ("[" * 90_000, r"c.yaml:1: not YAML \(nested deeper than 20"),
    "nested by aliases": (
        "- &a0 [x]\n" + "".join(f"- &a{n} [*a{n - 1}]\n" for n in range(1, 99)),
        r"c.yaml:20: not YAML \(nested deeper than 20",
    ),
    "a large file": ("#" * 100_001, r"c.yaml: is larger than 100,000 bytes: name the YAML file of a comparison"),
    "a long number": (f"seeds: [0x{'f' * 9000}]", r"c.yaml:1: not YAML \(a number of more than 50 characters\)"),
    "no date": ("\nbase: 2020-13-45", r"c.yaml:2: not YAML \(no value of tag.*month must be in 1..12\)\): fix this"),
    "code": ("base: !!python/object/apply:os.system [x]", r"c.yaml:1: not YAML \(could not determine a constructor"),
    "no character": (r'base: "\U99999999"', r"c.yaml: not YAML \(.*\): fix it"),
    **{
        f"hidden {char}": (f'base: "{char}"', r"c.yaml:1: not YAML \(the character \\.* in a text\): fix this line")
        for char in (r"\e[2J", r"\0", r"\ud800", r"\x9b", "\u202e")
    },
    "no command": ({"base_command": "make 'it"}, r"c.yaml: base_command make 'it: is no command line \(No closing"),
    "an empty command": ({"base_command": " "}, r"c.yaml: base_command ' ': is no command line \(it is empty\): fix"),
    "no mapping": ("- base", r"c.yaml: is a list: write keys with values"),
    "empty": ("", r"c.yaml: is empty: write keys with values"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_file_gets_wrong_is_one_line(name, here, capsys):
    """Of the kind: a value, or the file itself, is wrong or asks for more than there is; within a short time."""
    changes, expected = BAD[name]
    started = time.monotonic()
    if isinstance(changes, dict):
        changes = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    write_config(changes)
    lines = refused(["c.yaml"], capsys)
    assert any(re.search(expected, line) for line in lines), lines
    assert time.monotonic() - started < 10 and all(len(line) < 1000 for line in lines)
    assert not Path("output").exists()


def test_flags_of_the_command_line_are_checked(here, capsys):
    assert (
        "no such method: choose from all, lora, lora,learning_rate=0.003"
        in refused(["c.yaml", "--only", "x"], capsys)[0]
    )
    assert "--report_only: there is no output/compare-c" in refused(["c.yaml", "--report_only"], capsys)[0]
    assert "nothing.yaml: cannot be read" in refused(["nothing.yaml"], capsys)[0]
    assert "c.yaml is a file" in refused(["c.yaml", "--output_dir", "c.yaml/x"], capsys)[0]


def test_a_grid_is_expanded(here):
    plan, problems = read_plan("c.yaml")
    assert not problems
    names = ["lora,learning_rate=1e-3", "lora,learning_rate=0.003", "all"]
    assert [m.name for m in plan.methods] == names and [m.family for m in plan.methods] == ["lora", "lora", "all"]
    assert plan.methods[1].flags == {"lora_dim": 2, "learning_rate": 0.003}
    write_config({**GOOD, **method(grid={"learning_rate": [0.1], "lora_dim": [1, 2]})})
    assert [m.name for m in read_plan("c.yaml")[0].methods] == [f"m,learning_rate=0.1,lora_dim={n}" for n in (1, 2)]


def test_anchors_and_merges_of_a_usual_size(here):
    """What is bounded is still taken; a key of its own may replace one that is merged in, also where that is merged."""
    write_config(
        "a: [[{deep: &b {<<: &a {lora_dim: 2, max_len: 64}, max_len: 32}}]]\nb: {<<: *b}\nc: [*a, *a]\nd: 你　好\n"
    )
    values = compare_plan.read_yaml("c.yaml")
    assert values["b"] == {"lora_dim": 2, "max_len": 32} and values["c"] == [{"lora_dim": 2, "max_len": 64}] * 2
    write_config({**GOOD, "methods": [{"name": f"m{n}", "train_type": "lora"} for n in range(200)]})
    assert len(read_plan("c.yaml")[0].methods) == 200


def test_the_quickstart_is_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, problems = read_plan("configs/compare_quickstart.yaml")
    assert not problems and plan.forgetting
    assert {m.train_type for m in plan.methods} == {"freeze", "ptuning", "lora", "all"}
    assert {str(m.all.get("prefix_projection")) for m in plan.methods} == {"None", "True", "False"}


class FakeCommands:
    """Runs nothing, and writes what the commands would; `fails` decides what ends with which exit code."""

    def __init__(self, fails=None):
        self.ran = []
        self.fails = fails or (lambda script, words: 0)

    def __call__(self, words, environment):
        script = next(word for word in words if word.endswith(".py"))
        name = Path(script).stem
        flags = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
        output = flags.get("--output_dir") or flags.get("--output_path") or flags["--predictions"]
        self.ran.append((name, output))
        if name == "train":
            args = train_parser().parse_args(words[words.index(script) + 1 :])
            assert args.resume == "auto" and args.save_state_step == 100 and environment["CUDA_VISIBLE_DEVICES"] == "0"
            (Path(output) / "state-step-10").mkdir(parents=True, exist_ok=True)
        if code := self.fails(name, output):
            return code, False
        getattr(self, name)(Path(output), flags)
        return 0, False

    def train(self, output, flags):
        checkpoint = output / "epoch-1-step-20"
        checkpoint.mkdir()
        (checkpoint / "run.json").write_text("{}")
        (checkpoint / "adapter_model.safetensors").write_text(json.dumps(flags))
        log = [{"step": step, "loss": 3.0 / step} for step in (10, 20)]
        done = {"step": 20, "event": "done", "seconds": 83.0, "tokens_per_second": 1234.5, "peak_memory_bytes": 6.5e8}
        done |= {"trained_weights": 29_600, "all_weights": 2_000_000}
        (output / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        (output / "events.jsonl").write_text(json.dumps(done) + "\n" + '{"step": 2')

    def predict(self, output, flags):
        """The base knows nothing, `all` little, LoRA half or nearly all."""
        path = flags["--model_path"]
        share = 0.75 if "0.003" in path else 0.6 if "lora" in path else 0.2 if "all" in path else 0
        lines = []
        for n, row in enumerate(ROWS):
            answer = row["output"] if n < share * len(ROWS) else "<script>alert(1)</script>"
            query = row["instruction"] + row["input"]
            lines.append({"index": n, "query": query, "output": row["output"], "prediction": answer})
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def score(self, predictions, flags):
        flags_score.scores_path(predictions, flags.get("--task")).write_text("{}")

    def forgetting(self, output, flags):
        assert ("--before" in flags) == ("runs" in str(output))
        difference = {"loss": [0.41, 0.3, 0.55], "score": None} if "--before" in flags else None
        output.write_text(json.dumps({"loss": 1.0, "score": 2.0, "difference": difference}))


def test_a_whole_comparison(here, monkeypatch):
    commands = FakeCommands()
    assert compare.main(["c.yaml"], run_words=commands) == 0
    assert len(commands.ran) == 3 + 6 * 4 and commands.ran[:3] == [
        ("predict", "output/compare-c/base/predictions.jsonl"),
        ("score", "output/compare-c/base/predictions.jsonl"),
        ("forgetting", "output/compare-c/base/forgetting.json"),
    ]
    assert not list(here.rglob("state-step-*"))
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


def test_nothing_is_done_twice(here, capsys):
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


def test_figures_of_other_rows_are_not_shown(here):
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


def test_texts_are_folded_unless_the_file_says_no(here):
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


def test_answers_that_were_changed_since_are_not_shown(here, capsys):
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


def test_a_report_of_another_file_is_replaced_with_a_word_and_other_files_are_not(here, capsys):
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


def test_nothing_follows_from_one_row():
    rows = metrics.score_rows([["a_b_c"], [""]], ["a_b_c", "a_b_c"], "extraction")["rows"]
    one, other = ({"runs": [{"status": "done", "rows": [row]}]} for row in rows)
    for entry in (one, other):
        figures.add_means(entry, find_task("extraction"))
    assert one["intervals"]["f1"] is None and figures.compared(one, other, "f1") == [100, None, None]


def test_what_was_broken_off_goes_on(here):
    leaves = FakeCommands(lambda script, output: 75 if output.endswith("lora,learning_rate=0.003/seed-1/train") else 0)
    with pytest.raises(SystemExit) as stop:
        compare.main(["c.yaml"], run_words=leaves)
    assert stop.value.code == 75
    [state] = here.rglob("state-step-10")
    commands = FakeCommands(lambda script, output: 0 if state.exists() or script != "train" else 1)
    compare.main(["c.yaml", "--only", "lora"], run_words=commands)
    assert commands.ran[0] == ("train", "output/compare-c/runs/lora,learning_rate=0.003/seed-1/train")
    done = [output for script, output in leaves.ran if script == "train"]
    assert not {output for _, output in commands.ran} & set(done[:-1])


def test_a_run_that_fails_does_not_end_the_others(here, capsys):
    fails = FakeCommands(lambda script, output: 3 if script == "train" and "1e-3" in output else 0)
    assert compare.main(["c.yaml"], run_words=fails) == 1
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    assert [entry["status"] for entry in results["methods"]] == ["failed with exit code 3", "done", "done"]
    assert "| failed exit code 3 |" in Path("output/compare-c/report/report.md").read_text()
    again = FakeCommands()
    assert compare.main(["c.yaml"], run_words=again) == 0
    assert len(again.ran) == 2 * 4


def test_layers_that_the_base_does_not_have(here, capsys):
    write_config(
        {**GOOD, "methods": [{"name": "f", "train_type": "freeze", "flags": {"freeze_module_name": "layers.99."}}]}
    )
    [line] = refused(["c.yaml"], capsys)
    assert "c.yaml: f: --freeze_module_name layers.99.: matches no weight" in line


def test_the_base_is_made_where_it_is_absent(here, capsys):
    write_config({**GOOD, "base": "made", "base_command": "python make.py --output_dir made", **method()})

    class Makes(FakeCommands):
        def make(self, output, flags):
            output.symlink_to(BASE)

    commands = Makes()
    assert compare.main(["c.yaml"], run_words=commands) == 0 and commands.ran[0] == ("make", "made")
    said = "\nbase_command of c.yaml is run, whatever it is: python make.py --output_dir made\n"
    assert said in capsys.readouterr().out.split("== make-base")[0]
    assert compare.main(["c.yaml"], run_words=None) == 0


def test_differences_are_those_of_the_scores(here):
    """With one seed, the interval is that of score.py; with several, runs that are alike change nothing."""
    compare.main(["c.yaml"], run_words=FakeCommands())
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    rows = {}
    for name in ("all", "lora,learning_rate=0.003"):
        path = f"output/compare-c/runs/{name}/seed-1/predictions.jsonl"
        rows[name] = figures.scored(path, 0, "extraction", True)[0]
    expected = difference(rows["lora,learning_rate=0.003"], rows["all"], "f1")
    found = next(entry for entry in results["methods"] if entry["name"] == "all")["to_best"]
    assert found == pytest.approx(list(expected))


def test_seeds_are_averaged_within_each_resample():
    """One seed is right where the other is wrong: the mean is 50 whatever rows are drawn, and no row counts twice."""
    rows = [[metrics.score_rows([row["output"] if n % 2 == k else ""], [row["output"]], "extraction")["rows"][0]
             for n, row in enumerate(ROWS)] for k in (0, 1)]  # fmt: skip
    both = {"runs": [{"status": "done", "rows": part} for part in rows]}
    one = {"runs": both["runs"][:1]}
    for method in (both, one):
        figures.add_means(method, find_task("extraction"))
    assert both["metrics"]["f1"] == 50 and both["intervals"]["f1"] == pytest.approx([50, 50]) and both["spread"] == 0
    assert one["intervals"]["f1"] == intervals(rows[0], ["f1"])["f1"] and one["spread"] is None
    change = figures.compared(both, one, "f1")
    assert change[0] == 0 and change[1] < -10 and change[2] > 10


@pytest.mark.parametrize(
    "change, is_noise",
    [([1, -1, 3], True), ([1, 0, 3], True), ([-1, -2, 0], True), ([1, 0.1, 3], False), ([-1, -3, -0.1], False)]
    + [([1, None, None], True)],
)
def test_inside_the_noise(change, is_noise):
    assert report_text.is_noise(change) == is_noise
    assert ("inside the noise" in report_text.change_text(change)) == is_noise


def entry(name, value, **values):
    """A method as in results.json."""
    done = {
        "status": "done",
        "metrics": {"f1": value, "bleu4": None},
        "intervals": {"f1": [value - 5, value + 5], "bleu4": None},
    }
    costs = dict(
        seconds=83.0, tokens_per_second=1234.5, peak_memory_bytes=6.5e8, trained_weights=29600, all_weights=2e6
    )
    costs |= dict(checkpoint_bytes=12_345, forgetting={"loss": [0.4, 0.3, 0.5], "score": None}, spread=1.25)
    runs = [{"seed": seed, "loss": [[1, 2.0], [2, None], [3, 0.5]]} for seed in (1, 2)]
    kind = dict(train_type="lora", flags={"lora_alpha": "<b>"}, family=name)
    return {"name": name, **done, **costs, **kind, "runs": runs, "num_rows": 50, "to_base": [60, 50, 70], **values}


EVIL = "<script>alert('坏')</script>\n```\n| a | b |"
RESULTS = {
    "plan": "configs/<i>my</i>.yaml",
    "no_normalize": False,
    "base_model": "ChatGLM3-6B",
    "task": "extraction",
    "primary": "f1",
    "metrics": {"f1": "F1 of triples", "bleu4": "BLEU-4"},
    "train_path": ["a.json"],
    "test_path": ["b.json"],
    "seeds": [1, 2],
    "forgetting": True,
    "has_grid": True,
    "base": {"name": "base", "status": "done", "metrics": {"f1": 11.25, "bleu4": None}, "num_rows": 50}
    | {"intervals": {"f1": [8.5, 14.5], "bleu4": None}, "spread": None, "runs": [{}]},
    "methods": [
        entry("all", 78.25, to_best=[-3.5, -8.25, 1.5], seconds=None, peak_memory_bytes=4e8),
        entry("法", 81.75, to_best=None),
        entry("freeze", 41.75, to_best=[-40, -48, -32]),
        {
            "name": "late",
            "status": "not run",
            "train_type": "all",
            "flags": {},
            "family": "late",
            "runs": [{"loss": []}],
        },
    ],
    "best": "法",
    "samples": [
        {"row": 7, "question": EVIL, "reference": EVIL, "answers": {"base": {"text": EVIL, "score": None}}}
        | {"answers": {"法": {"text": "", "score": 50.0}}}
    ],
    "commands": ["python train.py --x '<script>'"],
    "machine": {"system": "Linux", "cpu": "2 x X", "memory_bytes": 1e9, "gpus": [], "versions": {"torch": "2.13.0"}},
    "time": "2026-01-01 10:00",
}


class Page(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write_report(RESULTS, str(folder), titles_in("en"))
    return folder


def test_the_page_needs_nothing_else(written):
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "i", "b>"} & {tag for tag, _ in page.tags}
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")


def test_the_report_has_all_numbers(written):
    page = " ".join(" ".join(Page((written / "index.html").read_text()).text).split())
    markdown = (written / "report.md").read_text().replace("\\", "")
    for text in (page, markdown):
        for number in ("81.75", "[76.75, 86.75]", "± 1.25 over 2 seeds", "-3.50", "[-8.25, +1.50] inside the noise"):
            assert number in text, number
        for number in ("1,234", "650.0 MB", "400.0 MB", "1 min 23 s", "29.6 K", "1.48% of 2 M", "12.3 KB", "11.25"):
            assert number in text, number
        for number in ("+0.40 [+0.30, +0.50]", "not known", "not run", "-40.00", "[-48.00, -32.00]", "2.13.0"):
            assert number in text, number
        assert "alert('坏')" in text and "f1 50" in text
    assert "[-48.00, -32.00] inside" not in page
    assert "81.75 [76.75, 86.75] not known" in page  # in the table of all metrics


def evil(value, key=None):
    """Results in which each text that is not this project's own is one that would do harm."""
    if isinstance(value, dict):
        return {f"{name}{HARM}" if key == "answers" else name: evil(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [evil(one, key) for one in value]
    is_own = key in ("status", "primary", "language") or value == "base"
    return f"{value}{HARM}" if isinstance(value, str) and not is_own else value


HARM = EVIL + "\"'><img src=x onerror=alert(1)></title></style></pre>\x1b[2J\x9b\u202e\ud800\0&"


def test_nothing_in_a_text_is_obeyed(written, tmp_path, monkeypatch):
    """Of the kind: a text of rows, models, paths or flags in a page, in Markdown, in JSON; any of them may do harm."""
    monkeypatch.setattr(report, "draw_pictures", lambda results, folder: {})
    report.write_report(evil(RESULTS), str(tmp_path), titles_in("en"))
    pages = [Page((folder / "index.html").read_text()) for folder in (written, tmp_path)]
    tags = [{(tag, *attributes) for tag, attributes in page.tags} for page in pages]
    assert tags[1] - {("wbr",)} <= tags[0] and pages[1].open == []
    text = " ".join(pages[1].text)
    assert text.count("onerror=alert(1)") > 20 and r"\x1b[2J\x9b\u202e\ud800\x00&" in text
    for path in tmp_path.iterdir():
        shown = path.read_text().replace("\n", "")
        assert shown.isprintable() and "onerror" in shown
    assert "default-src 'none'" in (tmp_path / "index.html").read_text()
    markdown = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", (tmp_path / "report.md").read_text())
    assert not re.search(r"<\w", markdown) and r"\[2J" in markdown


def test_what_a_command_line_shows_is_not_obeyed(tmp_path, capsys):
    """Names and paths on the terminal; and a command that does not exist ends with a line, as a shell's does."""
    runner = steps.Steps(tmp_path)
    with pytest.raises(steps.StepError) as stop:
        runner.run("n\x1b[2J", "'no\x1b[2J\u202e' command", [], tmp_path / "x")
    shown = capsys.readouterr()
    assert stop.value.code == 127 and "no\\x1b[2J\\u202e: cannot be started (No such file" in shown.err
    assert (shown.out + shown.err).replace("\n", "").isprintable()


def test_the_verdict():
    lines = report_text.verdict_lines(RESULTS)
    assert lines[0] == "Best: 法, f1 81.75 [76.75, 86.75] on 50 test rows."
    assert "cannot be told apart from all: more test rows" in lines[2]
    assert lines[3] == "Of these, all takes the least memory (400.0 MB)."  # the time of one is not known
    assert lines[-1] == "Without figures: late."
    assert report_text.verdict_lines({**RESULTS, "methods": []}) == ["No method has been trained and scored yet."]


def test_markdown_is_not_broken_by_answers(written):
    text = (written / "report.md").read_text()
    assert "<script>alert" not in re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", text)
    assert "````text\n<script>alert" in text and "&lt;b&gt;" in text
    assert all((written / name).exists() for name in re.findall(r"!\[.*?\]\((.*?)\)", text))


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


@pytest.fixture(scope="module")
def in_chinese(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zh")
    report.write_report({**RESULTS, "language": "zh"}, str(folder), titles_in("zh"))
    return folder


def test_the_report_in_chinese(in_chinese, written):
    """The same numbers, and no English but names of metrics, flags and commands."""
    page, english = ((folder / "index.html").read_text() for folder in (in_chinese, written))
    assert page.startswith('<!DOCTYPE html>\n<html lang="zh">') and english.startswith(
        '<!DOCTYPE html>\n<html lang="en">'
    )
    pages = [" ".join(" ".join(Page(text).text).split()) for text in (page, english)]
    for text in (
        "噪声之内",
        "81.75 [76.75, 86.75]",
        "± 1.25（2 个种子）",
        "2 M 的 1.48%",
        "三元组 F1，各行平均",
        "未运行",
    ):
        assert text in pages[0], text
    wanted = sorted(re.findall(r"\d+\.\d+", pages[1]))
    assert sorted(re.findall(r"\d+\.\d+", pages[0])) == wanted
    for text in report_words.ZH:
        assert text.count(" ") < 2 or "{" in text or text not in pages[0], text
    assert "## 各种方法" in (in_chinese / "report.md").read_text()


def test_every_text_has_its_words():
    """What the two rooms of the report say stands in the table, and nothing else does."""
    said = {"failed", "begun", "not run"}
    for module in (report, report_text):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("say", "head", "drawn")
            ):
                said |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    said |= {"time of a training", "peak memory", "minutes", "GB", "Comparison: {name}"}
    assert said == set(report_words.ZH)
    for english, chinese in report_words.ZH.items():
        assert set(re.findall(r"{(\w+)}", english)) == set(re.findall(r"{(\w+)}", chinese)), english
    titles = titles_in("zh")
    assert set(titles) == set(METRICS) and all(re.search("[一-鿿]", title) for title in titles.values())


def test_the_best_weights_are_compared(tmp_path):
    """best/ where the training chose one by held-out rows; a folder that is no checkpoint does not count."""
    for name in ("epoch-1-step-9", "epoch-2-step-18", "best"):
        (tmp_path / name).mkdir()
    for name in ("epoch-1-step-9", "epoch-2-step-18"):
        (tmp_path / name / "run.json").write_text("{}")
    assert comparison_methods.checkpoint_of(str(tmp_path)) == str(tmp_path / "epoch-2-step-18")
    (tmp_path / "best" / "run.json").write_text("{}")
    assert comparison_methods.checkpoint_of(str(tmp_path)) == str(tmp_path / "best")


def test_a_methods_own_flag_goes_before_that_of_all(here):
    """The flags of a method, then those of all methods, then the defaults."""
    common = {**FLAGS, "lora_dim": 8, "num_train_epochs": 5, "save_total_limit": 3}
    own = method(flags={"lora_dim": 2}, grid={"num_train_epochs": [7]})
    write_config({**GOOD, "train_flags": common, **own})
    [found] = read_plan("c.yaml")[0].methods
    assert found.flags == {"lora_dim": 2, "num_train_epochs": 7}
    wanted = {**FLAGS, "lora_dim": 2, "num_train_epochs": 7, "save_total_limit": 3, "save_state_step": 100}
    assert found.all == wanted
    words = compare_plan.train_words(read_plan("c.yaml")[0], found, 5, "out")
    args = train_parser().parse_args(words)
    assert (args.lora_dim, args.num_train_epochs, args.seed, args.output_dir) == (2, 7, 5, "out")


def test_two_names_that_differ_in_case_are_one_folder(here, capsys):
    """On some file systems they would be."""
    twins = [{"name": "Lora", "train_type": "lora"}, {"name": "lorA", "train_type": "lora"}]
    write_config({**GOOD, "methods": twins})
    [line] = refused(["c.yaml"], capsys)
    assert "methods[1].name lorA: is taken: give another" in line


def test_how_far_seeds_differ():
    """Kind: a figure that is 0 or null wherever it is looked at. The sample's deviation: 10, 20, 60 have 26.46."""
    reference = [row["output"] for row in ROWS[:10]]
    runs = []
    for right in (1, 2, 6):
        answers = reference[:right] + [""] * (10 - right)
        rows = metrics.score_rows(answers, reference, "extraction")["rows"]
        runs.append({"status": "done", "rows": rows, "done": {"seconds": right}, "checkpoint_bytes": 3 * right})
    found = {"runs": runs}
    figures.add_means(found, find_task("extraction"))
    assert found["metrics"]["f1"] == pytest.approx(30) and found["spread"] == pytest.approx(700**0.5)
    assert [run["metrics"]["f1"] for run in runs] == pytest.approx([10, 20, 60])
    assert (found["seconds"], found["checkpoint_bytes"], found["num_rows"]) == (3, 9, 10)
    assert found["tokens_per_second"] is None and found["forgetting"] == {"loss": None, "score": None}
    low, high = found["intervals"]["f1"]
    assert low < 30 < high
    two = {"runs": [{**run, "rows": run["rows"][:2]} for run in runs]}
    figures.add_means(two, find_task("extraction"))
    assert two["intervals"]["f1"] == [pytest.approx(2 * 100 / 3), 100], "right, half right, right: two rows have ends"
    one = {"runs": runs[:1]}
    figures.add_means(one, find_task("extraction"))
    assert one["spread"] is None
    unfinished = {"runs": [runs[0], {"status": "failed with exit code 3"}]}
    figures.add_means(unfinished, find_task("extraction"))
    assert unfinished["status"] == "failed with exit code 3" and "metrics" not in unfinished


@pytest.mark.parametrize(
    "change, is_forgotten",
    [([0.4, 0.3, 0.5], True), ([-0.4, -0.5, -0.3], False), ([0.4, -0.1, 0.9], False), (None, False)],
)
def test_what_is_called_forgetting(change, is_forgotten):
    """A loss on general questions that rose by more than the noise; one that fell is none."""
    methods = [entry("m", 50.0, to_best=None, forgetting={"loss": change, "score": None})]
    text = " ".join(report_text.verdict_lines({**RESULTS, "methods": methods}))
    assert ("Forgetting: the loss on general questions rose by more than the noise with m." in text) == is_forgotten


def test_the_verdict_in_words():
    """The best first; what the noise does not tell apart is said, and what of it costs least."""
    text = " ".join(report_text.verdict_lines(RESULTS))
    assert "Best: 法, f1 81.75 [76.75, 86.75] on 50 test rows." in text
    assert "The base model has 11.25; the difference is +60.00 [+50.00, +70.00]." in text
    assert "With these 50 rows it cannot be told apart from all:" in text and "freeze:" not in text
    assert "all takes the least memory (400.0 MB)" in text and "trains fastest" not in text
    assert "Without figures: late." in text
    clear = {**RESULTS, "methods": [RESULTS["methods"][1], RESULTS["methods"][2]]}
    assert "Its lead over every other method is larger than the noise" in " ".join(report_text.verdict_lines(clear))


def test_figures_for_a_reader():
    durations = {0.4: "0 s", 59.6: "1 min 0 s", 83: "1 min 23 s", 3599: "59 min 59 s", 3661: "1 h 1 min"}
    assert {seconds: report_text.duration(seconds) for seconds in durations} == durations
    counts = {999: "999", 1000: "1 K", 29_600: "29.6 K", 1e6: "1 M", 1e9: "1 B", 6.24e9: "6.24 B"}
    assert {number: report_text.count(number) for number in counts} == counts
    assert figures.mean([1, 2, 6]) == 3 and figures.mean([1, None]) is None
    assert (
        figures.mean_interval([[1, 0, 2], [3, 2, 6]]) == [2, 1, 4] and figures.mean_interval([None, [1, 0, 2]]) is None
    )
