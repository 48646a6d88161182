"""Rows that are not right end train.py with exit code 2 and one line that names them; nothing is written."""

import json
import os

import pytest
from refusing import (
    ROW,
    ROW_LINE,
    case,
    lines,
    row,
    sandbox,  # noqa: F401, a fixture
)

# ---------------------------------------------------------------- rows

TRAIN_PATHS = [
    case("missing-file", "no.json", {}, r"--train_path no\.json: no such file or folder: check the path"),
    case("folder-without-json", "rows", {"rows/a.txt": ROW_LINE},
         r"--train_path rows: no \*\.json or \*\.jsonl file in this folder"),
    case("second-file-missing", "rows.json no.json", {}, r"--train_path no\.json: no such file or folder"),
    case("bad-row-in-folder", "rows", {"rows/a.json": ROW_LINE, "rows/b.json": "3"},
         r"rows/b\.json:1: a number, not an object"),
]


@pytest.mark.parametrize("paths, files, says", TRAIN_PATHS)
def test_train_path(sandbox, paths, files, says):
    for name, content in files.items():
        sandbox.write(name, content)
    sandbox.train_fails(f"--train_path {paths}", says)


ROWS = [
    case("empty-file", "", r"bad\.json: no row in it: give at least one"),
    case("blank-lines", "\n \n\n", r"bad\.json: no row in it: give at least one"),
    case("empty-array", "[]", r"bad\.json: no row in it: give at least one"),
    case("broken-line", lines(ROW_LINE, "", '{"instruction" "a"}'),
         r"""bad\.json:3: '\{"instruction" "a"\}': not a JSON object \(Expecting ':' delimiter at column 16\): """
         r"""fix or remove it"""),
    case("cut-off-line", lines(ROW_LINE, '{"instruction": "a'),
         r"bad\.json:2: .*: not a JSON object \(Unterminated string .*\): fix"),
    case("object-over-lines-broken", json.dumps(ROW, indent=1).replace(": ", " "),
         r"bad\.json:2: not a JSON object \(Expecting ':' delimiter\): fix this line"),
    case("not-json", "instruction and input", r"bad\.json:1: 'instruction and input': not a JSON object"),
    case("broken-array", f"[{ROW_LINE},\n{ROW_LINE},\n{{,}}]",
         r"bad\.json:3: not a JSON array \(Expecting .*\): remove the comma"),
    case("cut-off-array", f"[{ROW_LINE},\n{ROW_LINE}",
         r"bad\.json:2: not a JSON array \(Expecting ',' delimiter\): fix this line"),
    case("row-is-a-number", lines(ROW_LINE, "3"),
         r"bad\.json:2: a number, not an object: a row is \{\.\.\.\} with string fields"),
    case("row-is-a-string", '"a"', r"bad\.json:1: a string, not an object"),
    case("row-is-null", "null", r"bad\.json:1: null, not an object"),
    case("row-is-an-array", f"[{ROW_LINE}, []]", r"bad\.json:row 2: an array, not an object"),
    case("no-answer-field", lines(ROW_LINE, '{"instruction": "a", "input": ""}'),
         r"bad\.json:2: no field 'output' \(it has 'instruction', 'input'\): add it, or name yours with"),
    case("no-instruction-field", '{"input": "a", "output": "b"}', r"bad\.json:1: no field 'instruction'"),
    case("no-field-at-all", "{}", r"bad\.json:1: no field 'instruction' \(it has none\)"),
    case("a-thousand-other-fields", json.dumps(dict.fromkeys(map(str, range(1000)))),
         r"^.{,400}bad\.json:1: no field 'instruction' .{,400}$"),
    case("answer-is-true", lines(ROW_LINE, row(output=True)),
         r"bad\.json:2: field 'output' is true or false: it must be a string or a number"),
    case("answer-is-null", row(output=None), r"bad\.json:1: field 'output' is null: it must be a string"),
    case("input-is-an-object", row(input={}), r"bad\.json:1: field 'input' is an object: it must be a string"),
    case("instruction-is-a-list", row(instruction=["a"]),
         r"bad\.json:1: field 'instruction' is an array: it must be a string"),
    case("answer-is-empty", lines(ROW_LINE, row(output="")),
         r"bad\.json:2: field 'output' is empty: a row needs an answer"),
    case("answer-is-white-space", row(output=" \n"), r"bad\.json:1: field 'output' is empty: a row needs an answer"),
    case("question-is-empty", lines(ROW_LINE, row(instruction="", input=" ")),
         r"bad\.json:2: instruction and input empty: a row needs a question"),
    case("not-utf-8", ROW_LINE.encode() + b'\n{"a": "\xff"}',
         r"bad\.json:2: not UTF-8 \(invalid start byte at byte 7 of the line\): save the file as UTF-8"),
    case("not-utf-8-in-array", b"[" + ROW_LINE.encode() + b',\n"\xff"]',
         r"bad\.json:2: not UTF-8 \(.*\): save the file as UTF-8"),
    case("utf-16", ROW_LINE.encode("utf-16"), r"bad\.json:1: not UTF-8"),
    case("gbk", json.dumps(ROW, ensure_ascii=False).encode("gbk"), r"bad\.json:1: not UTF-8"),
    case("half-a-surrogate-pair", lines(ROW_LINE, row(output="\ud83d")),
         r"bad\.json:2: field 'output' holds half a surrogate pair: it must be valid text"),
    case("half-a-pair-in-the-question", row(input="a\udfffb"),
         r"bad\.json:1: field 'input' holds half a surrogate pair"),
    case("number-of-5000-digits", '{"a": ' + "1" * 5000 + "}",
         r"bad\.json:1: no field 'instruction' \(it has 'a'\)"),
    case("number-of-5000-digits-in-array", '[{"a": ' + "1" * 5000 + "}]",
         r"bad\.json:row 1: no field 'instruction' \(it has 'a'\)"),
    case("brackets-without-end", "[" * 100_000, r"bad\.json: not a JSON array \(.*\): give rows of plain strings"),
    case("braces-without-end", '{"a":' * 100_000, r"bad\.json:1: .{,80}: not a JSON object \(.*recursion"),
]


@pytest.mark.parametrize("content, says", ROWS)
def test_bad_rows_are_refused(sandbox, content, says):
    sandbox.train_fails("--train_path bad.json", says, **{"train_path": sandbox.write("bad.json", content).name})


def test_rows_that_may_not_be_read(sandbox, monkeypatch):
    """Permissions do not stop the superuser, who may run the tests."""
    real_open = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("secret.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    sandbox.write("secret.json", ROW_LINE)
    monkeypatch.setattr("os.open", refuse)
    says = r"secret\.json: cannot be read \(Permission denied\): check its permissions"
    sandbox.train_fails("--train_path secret.json", says)


def test_is_skip_that_leaves_nothing(sandbox):
    sandbox.write("rows.json", row(instruction="水" * 100))
    says = r"rows\.json: --is_skip left no row of 1: raise --max_len or --max_src_len"
    sandbox.train_fails("--is_skip --max_len 32 --max_src_len 16", says)
