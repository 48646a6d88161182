"""Rows as other tools write them: read with the same ids, or named for what they are; no field is lost in silence."""

import functools
import gzip
import io
import json
import zipfile

import pytest
from reference import ROOT, Golden
from refusing import FOLDERS, WeightsReached, sandbox  # noqa: F401, a fixture

from comparison import plan
from data_set import describe_counts
from evaluation import predictions
from judging import rows as judge_rows
from judging import verdicts
from rows import cache as rows_cache
from rows import encoding, reading
from rows.cache import load_rows
from rows.checks import MEANINGFUL, Columns, Notes
from rows.encoding import Encoding, show_row
from rows.reading import check_items, read_file, read_row, read_rows, read_to_answer
from runtime import file_kinds
from training.ds_config import read_ds_file

ROW = {"instruction": "问题", "input": "一", "output": "答案"}
ROWS = [ROW, {**ROW, "input": "", "more": {"a": [{"b": "}{"}]}}, {**ROW, "output": "两\n行 {"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
PRETTY = "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS)


@pytest.fixture(scope="module")
def glm3():
    return Golden("glm3")


@pytest.fixture(scope="module")
def tokenizer(glm3):
    return glm3.tokenizer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of encoded rows."""
    monkeypatch.setattr(rows_cache, "cache_folder", lambda: str(tmp_path / "cache"))


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def load(glm3, tokenizer, path, columns=Columns(), **kwargs):
    more = {name: kwargs.pop(name) for name in ("skip_bad_rows",) if name in kwargs}
    return load_rows([path], Encoding(columns, tokenizer, glm3.mode, 512, 384, False, **more), **kwargs)


def read(path, content, columns=Columns(), **kwargs):
    return list(read_rows([write(path, content)], columns, **kwargs))


def said(counts):
    """What a run says about its rows, but for their numbers."""
    return describe_counts(counts, 512, 384, False).splitlines()[1:]


# ---------------------------------------------------------------- shapes that are read

SHAPES = {
    "lines": (LINES, "1 2 3"),
    "pretty": (PRETTY, "1 6 18"),
    "no-indent": ("\n".join(json.dumps(row, ensure_ascii=False, indent=0) for row in ROWS), "1 6 18"),
    "blank-lines-first": ("\n\n" + PRETTY.replace("\n{", "\n\n\n{"), None),
    "in-one-line": (LINES.replace("\n", ""), "1 1 1"),
    "pretty-without-breaks": (PRETTY.replace("\n{", "{"), None),
    "first-in-one-line": (LINES.split("\n")[0] + PRETTY[PRETTY.index("}") + 1 :].lstrip(), "1 1 13"),
    "lost-line-break": ("\n".join(LINES.split("\n")[:2]) + LINES.split("\n")[2], "1 2 2"),
    "pretty-then-lines": (PRETTY[: PRETTY.index("}") + 1] + "\n" + "\n".join(LINES.split("\n")[1:]), "1 6 7"),
    "array": (json.dumps(ROWS, ensure_ascii=False, indent=1), None),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_rows_in_any_shape(tmp_path, monkeypatch, name, piece, start, line_end):
    """White space between and inside objects, line ends and marks at the start are no part of a row."""
    monkeypatch.setattr(reading, "ARRAY_PIECE", piece)
    content, line_numbers = SHAPES[name]
    rows = read(tmp_path / "rows.json", start + content.replace("\n", line_end).encode())
    assert [(row["query"], row["answer"]) for row in rows] == [
        (row["instruction"] + row["input"], row["output"]) for row in ROWS
    ]
    places = [row["place"].removeprefix(str(tmp_path / "rows.json")) for row in rows]
    assert len(set(places)) == len(ROWS)
    if line_numbers:
        assert [place.split(" ")[0] for place in places] == [f":{number}" for number in line_numbers.split()]
    if name == "in-one-line":
        assert places == [":1", ":1 (object 2)", ":1 (object 3)"]


def test_the_same_ids_in_any_shape(glm3, tokenizer, tmp_path, cache, monkeypatch):
    """And the same places after encoding, in batches of one row."""
    monkeypatch.setattr(encoding, "BATCH_ROWS", 1)
    found = []
    for name, (content, _) in SHAPES.items():
        path = write(tmp_path / f"{name}.json", content)
        rows, _ = load(glm3, tokenizer, path)
        found.append([row["input_ids"].tolist() for row in rows])
        assert [rows.place(n) for n in range(len(rows))] == [row["place"] for row in read_rows([path], Columns())]
    assert all(ids == found[0] for ids in found) and len(found[0]) == len(ROWS)


def test_a_bad_row_among_objects_over_lines_is_left_out(tmp_path):
    content = "\n".join(json.dumps(row, indent=1) for row in (ROW, {**ROW, "output": ""}, ROW))
    messages = []
    path = write(tmp_path / "rows.json", content)
    found = check_items(read_file(path), Columns(), bad_rows=messages)
    assert [number for number, _ in found] == [1, 11]
    assert messages == [f"{path}:6: field 'output' is empty: a row needs an answer to learn"]


def test_objects_over_lines_are_read_in_pieces(tmp_path, monkeypatch):
    """However long the file, and however broken, no more than a row is in memory."""
    monkeypatch.setattr(reading, "ARRAY_PIECE", 10)
    monkeypatch.setattr(reading, "MAX_ROW", 100)
    path = write(tmp_path / "rows.json", '{\n"a": 1\n}\n{\n"b": "' + "x" * 10_000)
    with open(path, "rb") as file:
        text = reading.JsonText(path, file)
        assert json.loads(text.take_value()) == {"a": 1}
        with pytest.raises(ValueError, match=r"rows\.json:5: not a JSON object \(Unterminated .*, or a row of more th"):
            text.take_value()
        assert len(text.text) < 300


# ---------------------------------------------------------------- shapes that are named

LINE = json.dumps(ROW)
NAMED = {
    "comma-behind-a-row": (f"{LINE},\n{LINE},\n", r":1: .*: remove the comma behind the object, or put \[ \] around"),
    "comma-between-rows": (f"{LINE}, {LINE}", r":1: .*: remove the comma behind the object, or put \[ \] around all"),
    "comma-between-objects": (",\n".join([json.dumps(ROW, indent=1)] * 2), r":5: .*: remove the comma behind the obj"),
    "comma-at-the-end-of-an-array": (f"[{LINE},\n]", r":2: not a JSON array .*: remove the comma before \]"),
    "comma-at-the-end-of-an-object": (LINE[:-1] + ",}", ":1: .*: remove the comma"),
    "python": (str(ROW), r":1: .*: it is a Python dict: write rows with json\.dumps"),
    "python-array": (f"[\n{ROW}]", r":2: .*: it is a Python dict: write rows with json\.dumps"),
    "python-over-lines": (str(ROW).replace(",", ",\n").replace("{", "{\n"), r":2: .*: it is a Python dict: write"),
    "none": (LINE[:-1] + ', "more": None}', ":1: .*: it is a Python dict"),
    "object-over-lines-below": (f"{LINE}\n{PRETTY}", r":2: '\{': not .* in one line \(jq -c \. FILE > rows\.jsonl\)"),
    "under-a-key": (json.dumps({"data": ROWS}), r":1: one object with the rows under 'data': give the list itself"),
    "under-a-key-over-lines": (json.dumps({"data": ROWS}, indent=1), r":1: one object .* \(jq \.data FILE > rows"),
    "under-a-later-key": (json.dumps({"version": "1", "rows": ROWS}), ":1: one object with the rows under 'rows'"),
    "under-an-odd-key": (json.dumps({"a b": ROWS}), r"""under 'a b': give .* \(jq '\.\["a b"\]' FILE"""),
    "dataset-info": (json.dumps({"a": {"file_name": "a.json"}, "b": {"hf_hub_url": "b"}}), ":1: a list of data sets"),
    "nan": (LINE.replace('"\\u7b54\\u6848"', "NaN"), ":1: field 'output' is NaN, which is no JSON: it must be"),
    "lfs": ("version https://git-lfs.github.com/spec/v1\n", r"\.json: is a Git LFS pointer, .*: fetch the file itself"),
    "page": ("\n <!DOCTYPE html><html>", r"\.json: is a web page: download the file itself"),
    "html": ("<html>{}</html>", r"\.json: is a web page"),
    "gzip": (gzip.compress(LINE.encode()), r"\.json: is a gzip archive: unpack it first"),
    "parquet": (b"PAR1\x15\x04", r"\.json: is a Parquet file: convert it .* pandas\.read_parquet\(FILE\)\.to_json\("),
    "csv": ("instruction,input,output\na,b,c\n", r"\.json: is a table with separators \(CSV\): .* pandas\.read_csv"),
    "csv-of-excel": ('\ufeff"问题";"答案"\r\n', r"\.json: is a table with separators \(CSV\)"),
    "tsv": ("instruction\toutput\n", r"\.json: is a table with separators \(CSV\)"),
}


def archive(*names):
    """A zip file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "a")
    return content.getvalue()


NAMED |= {
    "zip": (archive("rows.json"), r"\.json: is a zip archive: unpack it first"),
    "xlsx": (archive("[Content_Types].xml", "xl/workbook.xml"), r"\.json: is an Excel workbook: .*read_excel"),
    "weights": ((FOLDERS["glm3"] / "pytorch_model-00001-of-00002.bin").read_bytes()[:5000], r"\.json: is a file of w"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_rows_is_named_with_the_next_step(tmp_path, name):
    """Shapes that are no rows say which shape they are, in one line."""
    content, says = NAMED[name]
    with pytest.raises(ValueError, match=says) as error:
        read(tmp_path / "rows.json", content)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.xlsx", "rows.parquet"])
def test_file_kinds_are_known_by_name_unless_they_hold_json(tmp_path, name):
    """Unless they hold JSON."""
    with pytest.raises(ValueError, match=rf"{name}: is a"):
        read(tmp_path / name, "")
    assert len(read(tmp_path / name, LINES)) == len(ROWS)


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key_are_named_when_there_are_too_many_for_one_row(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(reading, "MAX_ROW", 100)
    with pytest.raises(ValueError, match=r"rows\.json:1: one object with the rows under 'data'"):
        read(tmp_path / "rows.json", json.dumps({"data": ROWS * 9}, indent=indent))


def test_every_kind_says_what_to_do():
    assert all(kind.what.split()[0] in ("a", "an") and len(kind.next_step) > 10 for kind in file_kinds.KINDS.values())


# ---------------------------------------------------------------- fields with a meaning


@pytest.mark.parametrize("need_response", [True, False], ids=["train", "predict"])
@pytest.mark.parametrize("name", MEANINGFUL)
def test_a_field_with_a_meaning_is_refused_by_name(tmp_path, name, need_response):
    """No field that says something is thrown away; an empty one says nothing, and a named column is used."""
    path = tmp_path / "rows.json"
    for value in (["a"], "a", {"a": 1}, True, 0):
        with pytest.raises(ValueError, match=rf"rows\.json:2: field '{name}' would be ignored: it holds "):
            read(path, f"{LINE}\n{json.dumps({**ROW, name: value})}", need_response=need_response)
    for value in (None, "", " ", [], {}):
        rows = read(path, json.dumps({**ROW, name: value}), need_response=need_response)
        assert rows[0]["query"] == "问题一"
    [row] = read(path, json.dumps({**ROW, name: "问"}), Columns(prompt=name), need_response=need_response)
    assert row["query"] == "问"


def test_a_chat_is_refused_before_its_missing_columns_are(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.json:1: field 'conversations' .* several turns: give the last"):
        read(tmp_path / "rows.json", json.dumps({"conversations": [{"from": "human", "value": "a"}], "id": 1}))


@pytest.mark.parametrize("flag", ["train_path", "eval_path", "replay_path"])
def test_every_flag_for_rows_refuses_such_a_field(sandbox, flag):  # noqa: F811
    sandbox.write("chat.json", json.dumps({**ROW, "history": [["a", "b"]]}))
    flags = f"--{flag} chat.json" + " --replay_ratio 0.5" * (flag == "replay_path")
    code, lines = run_with_cache(sandbox, flags)
    assert code == 2 and len(lines) == 1
    assert "chat.json:1: field 'history' would be ignored: it holds earlier turns: put them into the ques" in lines[0]


def run_with_cache(sandbox, flags):  # noqa: F811
    """train.py, which may encode the good rows that come first."""
    sandbox.monkeypatch.setattr(rows_cache, "cache_folder", lambda: str(sandbox.cache.parent / "filled"))
    path = [] if "--train_path" in flags else ["--train_path", "rows.json"]
    base = ["--model_name_or_path", FOLDERS["glm3"], "--output_dir", "out", "--device", "cpu"]
    return sandbox.run("train.py", *path, *base, *flags.split())


# ---------------------------------------------------------------- numbers, and what may be absent

NUMBERS = ["1", "1.0", "-0", "1e3", "0.50", "1" * 5000]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda text: text[:9])
@pytest.mark.parametrize("is_array", [False, True])
def test_a_number_is_its_text(tmp_path, number, is_array):
    """As it is written, in training and in prediction alike."""
    line = f'{{"instruction": {number}, "input": "", "output": {number}, "more": [{number}]}}'
    for need_response in (True, False):
        notes = Notes()
        content = f"[{line}]" if is_array else line
        [row] = read(tmp_path / "rows.json", content, need_response=need_response, notes=notes)
        assert (row["query"], row["answer"]) == (number, number) and type(row["answer"]) is str
        assert notes.lines() == ["rows: fields not used: more", "rows: 2 numbers taken as text, as they are written"]


@pytest.mark.parametrize("value", [True, False, [], ["a"], {}])
def test_an_answer_that_is_no_text_is_refused_everywhere(tmp_path, value):
    """It is not dropped in prediction."""
    for need_response in (True, False):
        with pytest.raises(ValueError, match=r"rows\.json:1: field 'output' is .*: it must be a string or a number"):
            read(tmp_path / "rows.json", json.dumps({**ROW, "output": value}), need_response=need_response)


@pytest.mark.parametrize("fields", [{}, {"input": None}, {"input": ""}])
def test_rows_of_the_alpaca_kind_need_no_input(tmp_path, fields):
    rows = read(tmp_path / "rows.json", json.dumps({"instruction": "问", "output": "答", **fields}))
    assert [(row["query"], row["answer"], row["joint"]) for row in rows] == [("问", "答", 0)]


@pytest.mark.parametrize("columns, name", [(Columns(), "instruction"), (Columns(prompt="input"), "input")])
def test_the_question_itself_must_be_there(tmp_path, columns, name):
    for row in ({"output": "答"}, {"output": "答", name: None}):
        with pytest.raises(ValueError, match=rf"rows\.json:1: (no )?field '{name}'"):
            read(tmp_path / "rows.json", json.dumps(row), columns)


# ---------------------------------------------------------------- what is said once


def test_fields_that_are_not_used_are_said(glm3, tokenizer, tmp_path, cache, capsys):
    """Also when the rows come from the cache; a field that only some rows have with their number."""
    rows = [{**ROW, "id": n, "sys\x1btem": "", **({"inptu": "x"} if n == 2 else {})} for n in range(3)]
    path = write(tmp_path / "rows.json", "\n".join(map(json.dumps, rows)))
    for encodes in (True, False):
        _, counts = load(glm3, tokenizer, path, encodes=encodes)
        assert said(counts) == ["rows: fields not used: id, sys\\x1btem, inptu (in 1 rows)"]
    assert read_to_answer([path], Columns())[1] == said(counts)[0]
    _, counts = load(glm3, tokenizer, path, Columns(prompt="id"))
    assert said(counts)[0].startswith("rows: fields not used: instruction, input, sys")
    many = {**ROW, **{f"f{n}": n for n in range(30)}}
    notes = Notes()
    read(tmp_path / "many.json", json.dumps(many), notes=notes)
    assert notes.lines()[0].endswith(", f18, f19 and others")


def test_notes_of_batches_are_added(glm3, tokenizer, tmp_path, cache, monkeypatch):
    """One batch or many, one process or two: the same is said."""
    rows = [{**ROW, "instruction": "to French", "input": f"apple{n}", f"f{n % 3}": n} for n in range(7)]
    path = write(tmp_path / "rows.json", "\n".join(map(json.dumps, rows)))
    found = []
    for batch_rows, max_len in ((1000, 512), (1, 511)):  # another length, another place in the cache
        monkeypatch.setattr(encoding, "BATCH_ROWS", batch_rows)
        _, counts = load_rows([path], Encoding(Columns(), tokenizer, glm3.mode, max_len, 384, False))
        found.append(said(counts))
    assert found[0] == found[1] == [
        "rows: fields not used: f0 (in 3 rows), f1 (in 2 rows), f2 (in 2 rows)",
        "rows: 7 rows join instruction and input inside a word ('French' + 'apple0' is 'Frenchapple0'): end the"
        " instruction with a space or a line break",
    ]


@pytest.mark.parametrize("instruction, text, is_joined", [
    ("to French", "apple", True), ("1", "2", True), ("to French ", "apple", False), ("to French", "\napple", False),
    ("to French:", "apple", False), ("翻译", "apple", False), ("to French", "苹果", False),
    ("to French", "", False),
])
def test_words_that_run_together_are_counted(tmp_path, instruction, text, is_joined):
    """Instruction and input are joined with nothing between."""
    notes = Notes()
    row = {"instruction": instruction, "input": text, "output": "a"}
    [found] = read(tmp_path / "rows.json", json.dumps(row), notes=notes)
    assert found["query"] == instruction + text
    assert (notes.joined == 1) == is_joined == any("inside a word" in line for line in notes.lines())


def test_the_shown_row_marks_where_instruction_and_input_meet(glm3, tokenizer, tmp_path, cache):
    bad, rows = "3", [{**ROW, "instruction": "Translate to French", "input": "apple"}, {**ROW, "input": None}]
    path = write(tmp_path / "rows.json", "\n".join([bad, *map(json.dumps, rows)]))
    encoded, _ = load(glm3, tokenizer, path, skip_bad_rows=True)
    first, second = (
        show_row(encoded[n], tokenizer, read_row([path], Columns(), encoded.place(n))) for n in range(2)
    )
    assert "Translate to French⏐apple【" in first and "⏐" not in second


def test_files_of_a_folder_that_are_not_read_are_said(glm3, tokenizer, tmp_path, cache):
    folder = tmp_path / "rows"
    write(folder / "a.json", LINE)
    for name in ("README.md", ".b.csv", "c.csv", "d.txt", "e.JSON", "f.parquet", "g.jsonl.gz", "h.xlsx"):
        write(folder / name, "")
    (folder / "more").mkdir()
    says = f"rows: in {folder} only *.json and *.jsonl are read, not "
    says += "c.csv, d.txt, e.JSON, f.parquet, g.jsonl.gz and 2 others"
    for _ in range(2):  # from the cache too
        _, counts = load(glm3, tokenizer, str(folder))
        assert said(counts) == [says]
    assert read_to_answer([str(folder)], Columns())[1] == says
    (folder / "a.json").unlink()
    with pytest.raises(ValueError, match=r"no \*\.json or \*\.jsonl file in this folder: .* not c\.csv, d\.txt, e"):
        reading.data_files([str(folder)])


# ---------------------------------------------------------------- line ends


def test_files_of_the_clone_have_their_line_ends():
    """A clone on Windows must not change what a script, a row or a golden value is."""
    lines = (ROOT / ".gitattributes").read_text().splitlines()
    assert "* text=auto eol=lf" in lines
    for ending in ("bin", "model", "safetensors"):
        assert f"*.{ending} binary" in lines


@pytest.mark.parametrize("name, content, read", [
    ("criteria.txt", "One.\n\nTwo.\n", lambda path: verdicts.read_criteria(path, verdicts.KINDS["pairs"], "en")),
    ("plan.yaml", "base: |\n  a\n  b\nmethods:\n  - 1\n", plan.read_yaml),
    ("ds.json", '{\n"zero_optimization": {\n"stage": 2\n}\n}\n', read_ds_file),
    ("rows.jsonl", LINES, lambda path: [row["query"] for row in read_rows([path], Columns())]),
    ("answers.jsonl", '{"prediction": "a", "output": "b"}\n' * 2, lambda path: predictions.read_predictions(path).answers),
    ("answers.jsonl", '{"query": "q", "prediction": "a"}\n' * 2, functools.partial(judge_rows.read_answers, "--predictions")),
])
def test_line_ends_do_not_matter_in_files_that_people_bring(tmp_path, name, content, read):
    """LF or CR LF, a mark at the start or none: the same is read."""
    found = [
        read(write(tmp_path / name, start + content.replace("\n", end).encode()))
        for end in ("\n", "\r\n")
        for start in (b"", b"\xef\xbb\xbf")
    ]
    assert all(value == found[0] for value in found)


def test_good_rows_are_trained_with(sandbox):  # noqa: F811
    """Numbers, no input, objects over lines: as far as weights are read."""
    sandbox.write("rows.json", json.dumps({"instruction": 1, "output": 2.0}, indent=1))
    with pytest.raises(WeightsReached):
        sandbox.train_fails("--train_path rows.json")
