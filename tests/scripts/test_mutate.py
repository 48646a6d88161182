"""scripts/mutate.py: which faults a function gives, and what is said of them; none is tried here."""

import ast

import pytest
from launching import load_script

from runtime.exits import UserError

SOURCE = '''"""A file."""
LIMIT = 3  # 水


def kept(values, limit=LIMIT, is_open=True):
    """Text 1 < 2."""
    total = 0
    for value in values:  # 水
        if not value or value <= limit:
            continue
        total += max(value, -1) * weigh(value, "a", scale=2)
        print(value, 3)
        values.append(f"{value + 1}")
    if total > 9:
        raise ValueError(f"{total - 1} < 2")
    return [v for v in values if v] if is_open else total - 1
'''
WANTED = [
    ("3", "4"),
    ("True", "False"),
    ("0", "1"),
    ("not value or value <= limit", "(not value and value <= limit)"),
    ("not value", "value"),
    ("value <= limit", "(value < limit)"),
    ('total += max(value, -1) * weigh(value, "a", scale=2)', "total = max(value, -1) * weigh(value, 'a', scale=2)"),
    ("-1", "1"),
    ("1", "2"),
    ('weigh(value, "a", scale=2)', "weigh('a', value, scale=2)"),
    ('weigh(value, "a", scale=2)', "weigh(value, 'a')"),
    ("2", "3"),
    ('values.append(f"{value + 1}")', "pass"),
    ("total > 9", "(total >= 9)"),
    ("9", "10"),
    ("[v for v in values if v] if is_open else total - 1", "(total - 1 if is_open else [v for v in values if v])"),
    ("v", "True"),
    ("total - 1", "(total + 1)"),
    ("1", "2"),
]


@pytest.fixture(scope="module")
def mutate():
    return load_script("mutate")


def made(mutate, name):
    functions = mutate.functions_in(ast.parse(SOURCE))
    return mutate.made_from(SOURCE, functions[name], "a.py", name, "tests/a.py")


def test_faults_of_a_function(mutate):
    """No texts, no messages, nothing that is the same; each stands where it is replaced, and can be read."""
    found = made(mutate, "LIMIT") + made(mutate, "kept")
    assert sorted((mutant.before, mutant.after) for mutant in found) == sorted(WANTED)
    for mutant in found:
        assert SOURCE[mutant.start :].startswith(mutant.before)
        text = mutant.text(SOURCE)
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE))
        assert len(text) == len(SOURCE) - len(mutant.before) + len(mutant.after)


def test_the_choice_does_not_turn_on_where_a_function_stands(mutate, monkeypatch):
    first = [mutant.after for mutant in mutate.chosen(made(mutate, "kept"), 4)]
    monkeypatch.setitem(globals(), "SOURCE", SOURCE.replace("LIMIT = 3", "import os\n\n\nLIMIT = 3"))
    assert [mutant.after for mutant in mutate.chosen(made(mutate, "kept"), 4)] == first and len(first) == 4


TABLE = """
groups:
  - tests: tests/a.py
    functions: {a.py: "kept:3 LIMIT"}
    faults:
      - [a.py, "total > 9", "total > 90"]
      - [a.py, "LIMIT = 3", "LIMIT = 4"]
no_fault:
  - [a.py, "total > 9", "> 90", "nobody has so many", "没有这么多"]
"""


def test_the_table_and_the_figures(mutate, tmp_path, monkeypatch):
    """A change that is made twice counts once; what is no fault counts nowhere; both languages have the figures."""
    monkeypatch.setattr(mutate, "ROOT", str(tmp_path))
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "t.yaml").write_text(TABLE, encoding="utf-8")
    mutants, problems = mutate.read_table(tmp_path / "t.yaml")
    assert problems == [] and len(mutants) == 3 + 1 + 1
    [equal] = [mutant for mutant in mutants if mutant.reason]
    assert mutate.name_of(equal) == "a.py:14: if total > 9: → if total > 90:"
    for mutant in mutants[:-1]:
        mutant.found = mutant is not mutants[1]
    assert mutate.summary(mutants) == {"a.py": (4, 3)} and mutate.share_found(mutants) == 75
    page = f"# A\n{mutate.BEGIN}\nold\n{mutate.END}\n# 甲\n{mutate.BEGIN}\n{mutate.END}\nend\n"
    english, chinese = mutate.page_with(page, mutants).split("# 甲\n")
    assert "4 faults, 3 found: 75.0 %." in english and "old" not in english and "nobody has so many" in english
    assert "4 个错误，发现 3 个：75.0 %" in chinese and "没有这么多" in chinese and chinese.endswith("\nend\n")
    for text in (english, chinese):
        assert "| `a.py` | 4 | 3 |" in text and f"- `{mutate.name_of(mutants[1])}`" in text


def test_a_table_that_is_out_of_date(mutate, tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", str(tmp_path))
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "t.yaml").write_text(
        TABLE.replace("kept:3", "gone").replace("total > 90", "x").replace("LIMIT = 3", "total")
    )
    mutants, problems = mutate.read_table(tmp_path / "t.yaml")
    assert len(mutants) == 2 and [problem.partition(": fix")[0] for problem in problems] == [
        "t.yaml: a.py has no function gone",
        "t.yaml: 'total' is 5 times in a.py, not once",
    ]
    with pytest.raises(UserError, match="no.yaml"):
        mutate.read_table(tmp_path / "no.yaml")
