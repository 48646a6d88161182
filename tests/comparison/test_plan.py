"""The file of a comparison: what is refused, and what the methods get from it."""

import itertools
import re
import time
from pathlib import Path

import pytest
from comparing import FLAGS, GOOD, method, refused, write_config
from reference import ROOT

from comparison import plan as compare_plan
from comparison.plan import read_plan
from flags.train import train_parser

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
def test_what_the_file_gets_wrong_is_one_line(name, workdir, capsys):
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


def test_flags_of_the_command_line_are_checked(workdir, capsys):
    assert (
        "no such method: choose from all, lora, lora,learning_rate=0.003"
        in refused(["c.yaml", "--only", "x"], capsys)[0]
    )
    assert "--report_only: there is no output/compare-c" in refused(["c.yaml", "--report_only"], capsys)[0]
    assert "nothing.yaml: cannot be read" in refused(["nothing.yaml"], capsys)[0]
    assert "c.yaml is a file" in refused(["c.yaml", "--output_dir", "c.yaml/x"], capsys)[0]


def test_a_grid_is_expanded(workdir):
    plan, problems = read_plan("c.yaml")
    assert not problems
    names = ["lora,learning_rate=1e-3", "lora,learning_rate=0.003", "all"]
    assert [m.name for m in plan.methods] == names and [m.family for m in plan.methods] == ["lora", "lora", "all"]
    assert plan.methods[1].flags == {"lora_dim": 2, "learning_rate": 0.003}
    write_config({**GOOD, **method(grid={"learning_rate": [0.1], "lora_dim": [1, 2]})})
    assert [m.name for m in read_plan("c.yaml")[0].methods] == [f"m,learning_rate=0.1,lora_dim={n}" for n in (1, 2)]


def test_anchors_and_merges_of_a_usual_size(workdir):
    """What is bounded is still taken; a key of its own may replace one that is merged in, also where that is merged."""
    write_config(
        "a: [[{deep: &b {<<: &a {lora_dim: 2, max_len: 64}, max_len: 32}}]]\nb: {<<: *b}\nc: [*a, *a]\nd: 你　好\n"
    )
    values = compare_plan.read_yaml("c.yaml")
    assert values["b"] == {"lora_dim": 2, "max_len": 32} and values["c"] == [{"lora_dim": 2, "max_len": 64}] * 2
    write_config({**GOOD, "methods": [{"name": f"m{n}", "train_type": "lora"} for n in range(200)]})
    assert len(read_plan("c.yaml")[0].methods) == 200


def test_the_quickstart_comparison_has_every_train_type(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, problems = read_plan("configs/compare_quickstart.yaml")
    assert not problems and plan.forgetting
    assert {m.train_type for m in plan.methods} == {"freeze", "ptuning", "lora", "all"}
    assert {str(m.all.get("prefix_projection")) for m in plan.methods} == {"None", "True", "False"}


def test_a_methods_own_flag_goes_before_that_of_all(workdir):
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


def test_two_names_that_differ_in_case_are_one_folder(workdir, capsys):
    """On some file systems they would be."""
    twins = [{"name": "Lora", "train_type": "lora"}, {"name": "lorA", "train_type": "lora"}]
    write_config({**GOOD, "methods": twins})
    [line] = refused(["c.yaml"], capsys)
    assert "methods[1].name lorA: is taken: give another" in line
