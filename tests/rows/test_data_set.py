"""Rows: how they are read, which ids carry loss, what is cached, how an epoch is shared out over the ranks."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from launching import default_signals
from reference import ROOT, Golden

import data_set
from modes import MODES
from rows import cache as rows_cache
from rows import encoding as rows_encoding
from rows import reading
from rows.batches import collate
from rows.cache import load_rows
from rows.checks import Columns
from rows.encoding import Encoding, Run, encode_row, show_row
from rows.reading import Part, data_files, read_rows
from runtime.exits import UserError

GLM1 = str(ROOT / "tests" / "golden" / "glm1")
ROW = {"instruction": "问题", "input": "一", "output": "答案"}
CONTROL_TEXT = "[gMASK]<sop><|user|>\n</s><n><eop> <|assistant|>[MASK]<|blank_3|>sop"


@pytest.fixture(scope="module")
def tokenizer(golden):
    return golden.tokenizer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of encoded rows."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(rows_cache, "cache_folder", lambda: str(folder))
    return folder


def encode(golden, tokenizer, query, answer, max_len=512, max_src_len=384):
    return encode_row(query, answer, tokenizer, golden.mode.prompt, max_len, max_src_len)


def ids_and_labels(row):
    """Of one row, through the batch that training sees."""
    batch = collate([row], pad_token_id=0)
    return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def as_lines(rows):
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def load(golden, tokenizer, path, max_len=512, max_src_len=384, is_skip=False, columns=Columns(), **kwargs):
    paths = path if isinstance(path, list) else [str(path)]
    more = {name: kwargs.pop(name) for name in ("skip_bad_rows",) if name in kwargs}
    return load_rows(paths, Encoding(columns, tokenizer, golden.mode, max_len, max_src_len, is_skip, **more), **kwargs)


def text_control_ids(tokenizer, ids):
    """Control ids among ids that came from text; the pieces of glm that stand for white space are none."""
    is_space = {i for i in tokenizer.control_ids if tokenizer.piece_text(tokenizer._convert_id_to_token(i)).isspace()}
    return set(ids) & (tokenizer.control_ids - is_space)


# ---------------------------------------------------------------- ids and labels


@pytest.mark.parametrize("setting", ["encoded", "encoded_short", "encoded_skip"])
def test_ids_and_labels_are_the_reference_ones(golden, tokenizer, setting):
    reference = golden.values[setting]
    lengths = reference["max_len"], reference["max_src_len"]
    rows = [
        encode(golden, tokenizer, row["instruction"] + row["input"], row["output"], *lengths)
        for row in golden.values["rows"]
    ]
    if setting == "encoded_skip":
        rows = [row for row in rows if not row["source_cut"] and not row["answer_cut"]]
    assert [ids_and_labels(row) for row in rows] == reference["examples"]


def test_skipped_rows_are_the_reference_ones(golden, tokenizer, tmp_path, cache):
    path = write(tmp_path / "rows.json", *as_lines(golden.values["rows"]))
    reference = golden.values["encoded_skip"]
    rows, _ = load(golden, tokenizer, path, reference["max_len"], reference["max_src_len"], is_skip=True)
    assert [ids_and_labels(row) for row in rows] == reference["examples"]


def test_is_skip_leaves_exactly_the_rows_that_need_no_cut(golden, tokenizer, tmp_path, cache):
    path = write(tmp_path / "rows.json", *as_lines(golden.values["rows"]))
    whole, short = golden.values["encoded"]["examples"], golden.values["encoded_short"]["examples"]
    uncut = [row for row in whole if row in short]
    if not uncut:  # every one of glm's rows is longer
        with pytest.raises(ValueError, match=r"--is_skip left no row of 9: raise --max_len or --max_src_len"):
            load(golden, tokenizer, path, 96, 48, is_skip=True)
        return
    rows, counts = load(golden, tokenizer, path, 96, 48, is_skip=True)
    assert [ids_and_labels(row) for row in rows] == uncut
    assert (counts["rows"], counts["skipped"]) == (len(uncut), len(whole) - len(uncut))


PINNED = {  # the prompt, and the tokens that carry loss, of 发动机水温高 -> 风扇_堵塞\n轿车_动力
    "glm": (
        "▁[ R o u nd ▁1 ] <n> 问 : 发动机 水 温 高 <n> 答 : [gMASK]",
        "<sop> ▁风扇 _ 堵塞 <n> 轿车 _ 动 力 <eop>",
    ),
    "glm2": (
        "[gMASK] sop ▁[ R o u nd ▁ 1 ] <0x0A> <0x0A> 问 ： 发动机 水 温 高 <0x0A> <0x0A> 答 ：",
        "▁ 风扇 _ 堵塞 <0x0A> 轿车 _ 动力 </s>",
    ),
    "glm3": (
        "[gMASK] sop <|user|> ▁ <0x0A> ▁ 发动机 水 温 高",
        "<|assistant|> ▁ <0x0A> ▁ 风扇 _ 堵塞 <0x0A> 轿车 _ 动力 </s>",
    ),
}


def test_supervised_tokens_are_pinned(golden, tokenizer):
    row = ids_and_labels(encode(golden, tokenizer, "发动机水温高", "风扇_堵塞\n轿车_动力"))
    tokens = [tokenizer._convert_id_to_token(i) for i in row["input_ids"]]
    prompt, supervised = (text.split(" ") for text in PINNED[golden.mode.name])
    assert tokens == prompt + supervised
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]


SHOWN = {
    "glm": "(28 tokens): [Round 1]\n问:发动机水温高\n答:[gMASK]【<sop>风扇_堵塞\n轿车_动力<eop>】",
    "glm2": "(31 tokens): [gMASK]sop[Round 1]\n\n问：发动机水温高\n\n答：【风扇_堵塞\n轿车_动力</s>】",
    "glm3": "(22 tokens): [gMASK]sop<|user|>\n 发动机水温高【<|assistant|>\n 风扇_堵塞\n轿车_动力</s>】",
}


def test_the_shown_row_marks_what_is_supervised(golden, tokenizer):
    row = encode(golden, tokenizer, "发动机水温高", "风扇_堵塞\n轿车_动力")
    assert show_row(row, tokenizer) == f"first row {SHOWN[golden.mode.name]}"


@pytest.mark.parametrize("query, answer", [("水" * 300, "风"), ("水", "风" * 300), ("水" * 300, "风" * 300)])
def test_over_long_rows_are_cut_to_max_len_and_keep_their_ends(golden, tokenizer, query, answer):
    max_len, max_src_len = 60, 30
    prompt = golden.mode.prompt
    whole = encode(golden, tokenizer, query, answer, 2000, 1000)
    row = encode(golden, tokenizer, query, answer, max_len, max_src_len)
    ids, end = row["input_ids"], prompt.stop_ids(tokenizer)[0]
    assert len(ids) <= max_len and ids[-1] == end
    assert ids_and_labels(row)["labels"][-1] == end
    assert len(ids) + row["source_cut"] + row["answer_cut"] == len(whole["input_ids"])
    assert (row["source_cut"] > 0) == (len(query) > 1)
    if len(answer) > 1:
        assert row["answer_cut"] > 0 and len(ids) == max_len
    # What closes the question is that of the uncut row, and its source has exactly the room it was given.
    start, whole_start = row["runs"][0].start, whole["runs"][0].start
    closing = {"glm": 4, "glm2": 4, "glm3": 0}[golden.mode.name]
    assert ids[start - closing : start + 1] == whole["input_ids"][whole_start - closing : whole_start + 1]
    if row["source_cut"]:
        assert start == whole_start - row["source_cut"]
        prompt_ids, _ = prompt.encode_prompt(tokenizer, query, max_src_len=max_src_len)
        assert len(prompt_ids) == max_src_len + (3 if golden.mode.name == "glm3" else 2)


@pytest.mark.parametrize("cut_ids", [0, 1])
def test_an_answer_that_just_fits_is_whole(golden, tokenizer, cut_ids):
    whole = encode(golden, tokenizer, "水", "风扇堵塞", 512, 384)
    row = encode(golden, tokenizer, "水", "风扇堵塞", len(whole["input_ids"]) - cut_ids, 384)
    assert row["answer_cut"] == cut_ids
    ids = whole["input_ids"]
    assert row["input_ids"] == ids[: len(ids) - 1 - cut_ids] + ids[-1:]


@pytest.mark.parametrize("place", ["query", "answer"])
def test_control_tokens_in_text_stay_text(golden, tokenizer, place):
    query, answer = (CONTROL_TEXT, "答") if place == "query" else ("问", CONTROL_TEXT)
    ids = encode(golden, tokenizer, query, answer)["input_ids"]
    plain = encode(golden, tokenizer, "问", "答")["input_ids"]
    for token_id in tokenizer.control_ids - {tokenizer.encode_text("\n")[-1]}:  # the text has a line break
        assert ids.count(token_id) == plain.count(token_id), tokenizer.convert_ids_to_tokens(token_id)
    assert CONTROL_TEXT in tokenizer.decode(ids)
    text_ids = tokenizer.encode_text(CONTROL_TEXT)
    assert not text_control_ids(tokenizer, text_ids)
    assert tokenizer.decode(text_ids) == CONTROL_TEXT


@pytest.mark.parametrize(
    "text, clean", [("<\x01n>", "<n>"), ("<|ta\x7fb|>", "<|tab|>"), ("<|\x1bblank_3|>", "<|blank_3|>")]
)
def test_characters_that_glm_drops_cannot_hide_a_control_token(text, clean):
    tokenizer = MODES["glm"].tokenizer_class.from_pretrained(GLM1)
    assert tokenizer.decode(tokenizer.encode_text(text)) == clean


# ---------------------------------------------------------------- reading


ROWS = [ROW, {**ROW, "input": "二"}, {**ROW, "input": ""}]
READ = [
    {"query": "问题一", "answer": "答案"},
    {"query": "问题二", "answer": "答案"},
    {"query": "问题", "answer": "答案"},
]
BOM = b"\xef\xbb\xbf"
LINES = "\n".join(as_lines(ROWS))
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=2)


def read(paths, columns=Columns(), **kwargs):
    paths = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return [{name: row[name] for name in ("query", "answer")} for row in read_rows(paths, columns, **kwargs)]


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        LINES.encode() + b"\n",
        BOM + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        ("\n \n" + LINES.replace("\n", "\n\n\t\n") + "\n\n").encode(),
        ARRAY.encode(),
        BOM + ARRAY.encode(),
        b"\n\n  " + ARRAY.encode() + b"\n",
        json.dumps(ROWS).encode(),
    ],
    ids="lines newline bom crlf blank-lines array array-bom array-indented array-ascii".split(),
)
def test_rows_are_read_in_every_format(tmp_path, content):
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    assert read(path) == READ


def test_places_are_lines_of_the_file(tmp_path):
    lines = write(tmp_path / "a.jsonl", "", as_lines([ROW])[0], "", as_lines([ROW])[0])
    assert [row["place"] for row in read_rows([lines], Columns())] == [f"{lines}:2", f"{lines}:4"]
    array = write(tmp_path / "b.json", ARRAY)
    assert [row["place"] for row in read_rows([array], Columns())] == [f"{array}:row {i}" for i in (1, 2, 3)]


def items(path):
    """The texts of a file's rows, unchecked; what they are numbered with is looked at where it matters."""
    return [item for _, item in reading.read_file(str(path)).items]


HOSTILE_VALUES = {
    "twice": (
        '{"instruction": "a", "input": "", "output": "b", "output": "c"}',
        "field 'output' stands twice: a row has a field once: remove one of them",
    ),
    "twice-inside": (
        '{"instruction": "a", "input": "", "output": "b", "more": {"k": 1, "k": 1}}',
        "field 'k' stands twice",
    ),
    "long-key": ('{"%s": 1, "%s": 2}' % ("k" * 1000, "k" * 1000), f"field '{'k' * 60}' stands twice"),
    "nul": (
        '{"instruction": "a\\u0000", "input": "", "output": "b"}',
        "field 'instruction' holds a NUL character: it must be text: remove it",
    ),
    "nan": (
        '{"instruction": NaN, "input": "", "output": "b"}',
        "field 'instruction' is NaN, which is no JSON: it must be a string or a number",
    ),
    "infinity": ('{"instruction": "a", "input": -Infinity, "output": "b"}', "field 'input' is -Infinity, which is no"),
    "long": (json.dumps("x" * 3000), "a row of more than 2,500 bytes: give each row a line of its own, or shorten it"),
}
HOSTILE_LINES = HOSTILE_VALUES | {
    "raw-nul": ('{"instruction": "a\0", "input": ""}', "not a JSON object (Invalid control character at column 19)"),
    "bom-inside": ('\ufeff{"instruction": "a", "input": ""}', "not a JSON object (Expecting value at column 1)"),
}


@pytest.mark.parametrize("is_array, name", [*((True, n) for n in HOSTILE_VALUES), *((False, n) for n in HOSTILE_LINES)])
def test_hostile_rows_are_named(tmp_path, monkeypatch, is_array, name):
    monkeypatch.setattr(reading, "MAX_ROW", 2500)
    text, says = HOSTILE_LINES[name]
    good = as_lines([ROW])[0]
    path = write(tmp_path / "rows.json", *([f"[{good},", text, f",{good}]"] if is_array else [good, text, good]))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:row 2: " if is_array else f"{path}:2: ") and says in str(error.value)
    messages = []
    found = reading.check_items(reading.read_file(path), Columns(), bad_rows=messages)
    assert [number for number, _ in found] == [1, 3] and messages == [str(error.value)]


OTHERS = ["NaN", "-Infinity", "1e999", "[[[]]]", '{"a": null}', '"\\ud800\\u0000"', "1" * 5000]


@pytest.mark.parametrize("value", OTHERS)
def test_what_other_fields_hold_does_not_matter(tmp_path, value):
    path = write(tmp_path / "rows.json", f'{as_lines([ROW])[0][:-1]}, "more": {value}}}')
    assert read(path) == READ[:1]


@pytest.mark.parametrize("answer", ["\ud800", "a\0"])
def test_an_answer_that_is_no_text_is_refused_in_prediction_too(tmp_path, answer):
    """It would be written beside the prediction."""
    path = write(tmp_path / "rows.json", json.dumps({**ROW, "output": answer}))
    with pytest.raises(ValueError, match=r"rows\.json:1: field 'output' holds "):
        read(path, need_response=False)


@pytest.mark.parametrize("size", [199, 200, 201, 401, 402, 1000])
def test_a_line_that_is_too_long_is_read_in_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr(reading, "MAX_ROW", 200)
    good = as_lines([ROW])[0]
    path = write(tmp_path / "rows.json", good, "x" * size, good)
    first, long, last = items(path)
    assert first == last == good.encode() + b"\n" and len(long) == min(size + 1, 201)
    messages = []
    found = reading.check_items(reading.read_file(path), Columns(), bad_rows=messages)
    assert [number for number, _ in found] == [1, 3]
    assert ("more than 200 bytes" in messages[0]) == (size >= 200)


def test_the_documented_limit():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) MiB", text) == [str(reading.MAX_ROW >> 20)] * 2


def test_a_value_that_python_cannot_read_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "rows.json", "[1,", "2,", f'{{"a": {"[" * 100_000}}}]')
    with pytest.raises(ValueError, match=r"rows\.json: not a JSON array \(.* in the value that begins at line 3\): "):
        items(path)


@pytest.mark.parametrize("piece", [1, 2, 3, 1000])
def test_bytes_that_are_not_utf_8_are_found_in_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "ARRAY_PIECE", piece)
    path = tmp_path / "rows.json"
    for content, says in (
        ("[1,\n2, '水水".encode() + b"\xff", r":2: not UTF-8 \(invalid start byte at byte 10 of the line\)"),
        ("[1,\n2, '水".encode()[:-1], r":2: not UTF-8 \(unexpected end of data at byte 4 of the line\)"),
        (b"[1,\n2, \xe6\xb0\n]", r":2: not UTF-8 \(invalid continuation byte at byte 3 of the line\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            items(path)


NESTED = [{**ROW, "more": [1, -2.5e3, {"a": [[], {}]}, True, None, "[,]} \\u6c34 \\\\"]}, 12, "é水😀"] * 3


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_in_pieces(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr(reading, "ARRAY_PIECE", piece)
    path = write(tmp_path / "rows.json", "", json.dumps(NESTED, ensure_ascii=False, indent=indent), "")
    assert [json.loads(text) for text in items(path)] == NESTED
    assert [items(write(tmp_path / "no.json", text)) for text in ("[]", " [ ] ")] == [[], []]


@pytest.mark.parametrize("piece", [1, 5, 1000])
@pytest.mark.parametrize(
    "text, says",
    [
        ("[1,\n2,\n3", r":3: not a JSON array \(Expecting ',' delimiter\)"),
        ("[1,\n2\n\n3]", r":4: not a JSON array \(Expecting ',' delimiter\)"),
        ("[1,\n2,\n]", r":3: not a JSON array \(Expecting value\)"),
        ("[1,\n2,\n", r"rows.json:[34]: not a JSON array \(Expecting value\)"),
        ('[1,\n"ab', r":2: not a JSON array \(Unterminated string starting at\)"),
        ('[1,\n{"a" 2}]', r":2: not a JSON array \(Expecting ':' delimiter\)"),
        ('[{"a": 1},\n{"a":\n2},\n\n{"a":\n3,\n"b" 4}]', r":7: not a JSON array \(Expecting ':' delimiter\)"),
        ('\n[{"a": 1},\n\n{"a":\n2}\n, {"a":\n3', r":7: not a JSON array \(Expecting ',' delimiter\)"),
        ("[1,\n2]\n\n{}", r":4: not a JSON array \(Extra data\)"),
        ("[1] [2]", r":1: not a JSON array \(Extra data\)"),
        ("[1, 2", r":1: not a JSON array \(Expecting ',' delimiter\)"),
        ("[", r":1: not a JSON array \(Expecting value\)"),
        ("[1,\n2,\n'\udcff']", r":3: not UTF-8 \(invalid start byte at byte 1 of the line\)"),
    ],
)
def test_a_broken_array_is_named_with_its_line(tmp_path, monkeypatch, piece, text, says):
    monkeypatch.setattr(reading, "ARRAY_PIECE", piece)
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=says):
        items(path)


def test_a_broken_array_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "ARRAY_PIECE", 10)
    monkeypatch.setattr(reading, "MAX_ROW", 100)
    path = write(tmp_path / "rows.json", "[1,", '"' + "x" * 10_000)
    with open(path, "rb") as file:
        text = reading.JsonText(path, file, "array")
        with pytest.raises(ValueError, match=r"rows\.json:2: not a JSON array \(Unterminated string .*, or a row of"):
            assert (text.take("["), text.take_value(), text.take(",")) == ("[", "1", ",")
            text.take_value()
        assert len(text.text) < 300


def test_several_files_and_folders_in_order(tmp_path):
    folder = tmp_path / "rows[1]*"  # not a pattern
    folder.mkdir()
    for name, text in (("c.json", "四"), ("b.jsonl", "三"), ("notes.txt", "no row"), (".hidden.json", "no row")):
        write(folder / name, json.dumps({**ROW, "input": text}))
    (folder / "d.json").mkdir()
    one, two = (write(tmp_path / f"{n}.json", json.dumps({**ROW, "input": n})) for n in "二一")
    assert [row["query"][-1] for row in read([one, folder, two])] == list("二三四一")
    assert data_files([str(folder)]) == [str(folder / "b.jsonl"), str(folder / "c.json")]


def test_an_empty_file_beside_others_adds_nothing(tmp_path):
    paths = [write(tmp_path / "a.json", ""), write(tmp_path / "b.json", json.dumps(ROW))]
    assert len(read(paths)) == 1


def test_columns_are_chosen_by_name(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps({"question": "问", "answer": "答", "id": 7, "output": 3}))
    assert read(path, Columns(prompt="question", response="answer")) == [{"query": "问", "answer": "答"}]


def test_questions_alone_are_enough_for_prediction(tmp_path):
    rows = [{"instruction": "问", "input": ""}, {**ROW, "output": ""}, {**ROW, "output": None}]
    path = write(tmp_path / "rows.json", *as_lines(rows))
    assert [row["answer"] for row in read(path, need_response=False)] == [None, "", None]


# ---------------------------------------------------------------- the cache


@pytest.fixture
def rows_path(golden, tmp_path):
    return write(tmp_path / "rows.json", *as_lines(golden.values["rows"]))


def test_counts_of_rows_and_tokens_cut(golden, tokenizer, rows_path, cache):
    rows, counts = load(golden, tokenizer, rows_path, 96, 48)
    whole, short = (golden.values[key]["examples"] for key in ("encoded", "encoded_short"))
    assert [ids_and_labels(row) for row in rows] == short
    lost = [len(a["input_ids"]) - len(b["input_ids"]) for a, b in zip(whole, short)]
    num_labels = [sum(label != -100 for label in row["labels"]) for row in short]
    assert rows.num_labels.tolist() == num_labels
    assert counts["rows"] == len(rows) == len(short)
    assert counts["rows_cut"] == sum(n > 0 for n in lost)
    assert counts["source_tokens_cut"] + counts["answer_tokens_cut"] == sum(lost)
    assert counts["skipped"] == 0
    assert counts["longest"] == max(len(row["input_ids"]) for row in whole)
    assert counts["tokens"] == sum(len(row["input_ids"]) for row in short)
    assert counts["labels"] == sum(num_labels)
    said = data_set.describe_counts(counts, 96, 48, is_skip=False)
    assert f"rows: {counts['rows']} with {counts['tokens']:,} tokens, {counts['labels']:,} of them supervised" in said
    assert f"cut {counts['rows_cut']} rows over --max_len 96 / --max_src_len 48: {counts['source_tokens_cut']}" in said


def test_counts_of_answers_cut_and_rows_skipped(golden, tokenizer, tmp_path, cache):
    rows = [ROW, {**ROW, "output": "风" * 100}, {**ROW, "input": "水" * 100}]
    path = write(tmp_path / "rows.json", *as_lines(rows))
    ids = [encode(golden, tokenizer, r["instruction"] + r["input"], r["output"]) for r in rows]
    _, counts = load(golden, tokenizer, path, 64, 40)
    assert counts["rows_cut"] == 2 and counts["rows"] == 3
    assert counts["answer_tokens_cut"] == len(ids[1]["input_ids"]) - 64
    assert 0 < counts["source_tokens_cut"] < 100
    kept, counts = load(golden, tokenizer, path, 64, 40, is_skip=True)
    assert (len(kept), counts["rows"], counts["skipped"], counts["rows_cut"]) == (1, 1, 2, 2)
    assert kept[0]["input_ids"].tolist() == ids[0]["input_ids"]
    assert "left out 2 rows" in data_set.describe_counts(counts, 64, 40, is_skip=True)


def test_rows_are_encoded_once(golden, tokenizer, rows_path, cache, monkeypatch):
    first = load(golden, tokenizer, rows_path)
    monkeypatch.setattr(rows_encoding, "encode_row", lambda *args: pytest.fail("encoded again"))
    second = load(golden, tokenizer, rows_path)
    assert first[1] == second[1] and first[0].ids.tolist() == second[0].ids.tolist()
    assert len(os.listdir(cache)) == 1


def test_a_change_of_rows_or_flags_is_noticed(golden, tokenizer, rows_path, cache):
    load(golden, tokenizer, rows_path)
    seen = set(os.listdir(cache))
    for change in (
        {"max_len": 511},
        {"max_src_len": 383},
        {"is_skip": True},
        {"columns": Columns(response="input")},
        {"columns": Columns(prompt="instruction")},
        {"path": [rows_path, rows_path]},
    ):
        load(golden, tokenizer, **{"path": rows_path, **change})
        new = set(os.listdir(cache)) - seen
        assert len(new) == 1, change
        seen |= new
    with open(rows_path, "a", encoding="utf-8") as file:
        file.write(json.dumps(ROW) + "\n")
    rows, _ = load(golden, tokenizer, rows_path)
    assert len(rows) == len(golden.values["rows"]) + 1
    assert len(os.listdir(cache)) == len(seen) + 1


@pytest.mark.parametrize("vocab_size, name", [(1 << 16, "uint16"), ((1 << 16) + 1, "int32")])
def test_the_smallest_type_that_holds_every_id(vocab_size, name):
    """Ids begin at 0: 65536 of them fit into two bytes."""
    encoding = Encoding(Columns(), SimpleNamespace(vocab_size=vocab_size), MODES["glm3"], 9, 9, False)
    assert encoding.id_type == name


def test_the_tokenizer_is_part_of_the_key(rows_path, tmp_path):
    """Another vocabulary file gives other ids; the same bytes in another folder do not. So do the rows' files."""

    def key(vocabulary, paths=(rows_path,), settings=("glm3", 3)):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.model"
        path.write_bytes(vocabulary)
        return rows_cache.cache_key(list(paths), SimpleNamespace(vocab_file=str(path)), list(settings))

    assert key(b"a") == key(b"a") and len(key(b"a")) == 32
    assert len({key(b"a"), key(b"b"), key(b""), key(b"a", [rows_path] * 2), key(b"a", settings=("glm3", 4))}) == 5
    ab, c, a, bc = (write(tmp_path / name, text) for name, text in (("1", "ab"), ("2", "c"), ("3", "a"), ("4", "bc")))
    assert key(b"a", [ab, c]) != key(b"a", [a, bc]), "where a file ends matters"


def test_families_do_not_share_cached_rows(tokenizer, golden, rows_path):
    """glm2 and glm3 have the same vocabulary file."""
    keys = {
        rows_cache.cache_key([rows_path], tokenizer, [name, None, "output", 512, 384, False, False])
        for name in ("glm", "glm2", "glm3")
    }
    assert len(keys) == 3


@pytest.mark.parametrize("bad", ['{"instruction": "a"}', "{", "[]", '{"instruction": "a", "input": "", "output": ""}'])
def test_a_bad_row_leaves_nothing_behind(golden, tokenizer, rows_path, cache, bad):
    with open(rows_path, "a", encoding="utf-8") as file:
        file.write(bad + "\n")
    with pytest.raises(ValueError, match=f"{rows_path}:10: "):
        load(golden, tokenizer, rows_path)
    assert os.listdir(cache) == []


def test_two_runs_that_encode_at_once_do_not_disturb_each_other(golden, tokenizer, rows_path, cache, monkeypatch):
    """While this run encodes, another one finishes the same folder."""
    original, done = rows_encoding.encode_row, []

    def encode_while_another_run_does(*args):
        if not done:
            done.append(True)
            load(golden, tokenizer, rows_path)
        return original(*args)

    monkeypatch.setattr(rows_encoding, "encode_row", encode_while_another_run_does)
    rows, counts = load(golden, tokenizer, rows_path)
    assert len(rows) == counts["rows"] == len(golden.values["rows"])
    assert len(os.listdir(cache)) == 1


def test_a_cache_that_cannot_be_written_is_named(golden, tokenizer, rows_path, tmp_path, monkeypatch):
    blocked = tmp_path / "file" / "cache"
    blocked.parent.write_text("")
    monkeypatch.setattr(rows_cache, "cache_folder", lambda: str(blocked))
    with pytest.raises(ValueError, match=rf"{blocked}: encoded rows cannot be kept there \(.+\): set HF_DATASETS_"):
        load(golden, tokenizer, rows_path)


def test_collate_takes_rows_of_the_data_set(golden, tokenizer, rows_path, cache):
    rows, _ = load(golden, tokenizer, rows_path)
    batch = collate([rows[i] for i in (0, 7)], tokenizer.pad_token_id)
    examples = [golden.values["encoded"]["examples"][i] for i in (0, 7)]
    length = max(len(row["input_ids"]) for row in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, length)
    for i, row in enumerate(examples):
        padding = length - len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [tokenizer.pad_token_id] * padding
        assert batch["labels"][i].tolist() == row["labels"] + [-100] * padding
    assert int((batch["labels"] != -100).sum()) == rows.num_labels[[0, 7]].sum()


@pytest.fixture(scope="module")
def glm3():
    return Golden("glm3")


@pytest.fixture(scope="module")
def tokenizer3(glm3):
    return glm3.tokenizer()


def test_rows_are_views_of_the_file(golden, tokenizer, rows_path, cache):
    rows, _ = load(golden, tokenizer, rows_path, 96, 48)
    wanted = [
        encode(golden, tokenizer, row["instruction"] + row["input"], row["output"], 96, 48)
        for row in golden.values["rows"]
    ]
    assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"] for row in wanted]
    assert [row["runs"].tolist() for row in rows] == [[list(run) for run in row["runs"]] for row in wanted]
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in wanted]
    assert rows.num_labels.tolist() == [run.num_labels for row in wanted for run in row["runs"]]
    assert all(row["input_ids"].base is not None and not row["input_ids"].flags.writeable for row in rows)
    assert rows[-1]["input_ids"].tolist() == wanted[-1]["input_ids"]
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[outside]
    assert show_row(rows[0], tokenizer) == show_row(wanted[0], tokenizer)


def test_ids_take_16_bits_where_the_vocabulary_fits(glm3, tokenizer3, tmp_path, cache, monkeypatch):
    def id_type(vocab_size):
        return Encoding(Columns(), SimpleNamespace(vocab_size=vocab_size), glm3.mode, 96, 48, False).id_type

    assert [id_type(size) for size in (64798, 2**16, 2**16 + 1, 130344)] == ["uint16", "uint16", "int32", "int32"]
    path = write(tmp_path / "rows.json", *as_lines(glm3.values["rows"]))
    small, _ = load(glm3, tokenizer3, path)
    monkeypatch.setattr(type(tokenizer3), "vocab_size", 2**16 + 1)
    large, _ = load(glm3, tokenizer3, path, max_len=513)
    assert (small.ids.dtype, large.ids.dtype) == ("uint16", "int32")
    assert small.ids.tolist() == large.ids.tolist()


FILES = ["ids.bin", "offsets.bin", "runs.bin", "run_offsets.bin", "places.bin", "bad_rows.txt", "counts.json"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "bit", "gone"])
def test_damaged_rows_are_encoded_again(glm3, tokenizer3, tmp_path, cache, capsys, name, damage):
    """What is kept is compared before it is believed: a flipped bit has the size, and the key, of the right rows."""
    path = write(tmp_path / "rows.json", *as_lines(glm3.values["rows"] + [ROW]), "{", "{", "{")
    rows, _ = load(glm3, tokenizer3, path, skip_bad_rows=True)
    right = [row["input_ids"].tolist() for row in rows]
    [folder] = cache.iterdir()
    content = (folder / name).read_bytes()
    changed = {"empty": b"", "half": content[: len(content) // 2], "bit": bytes([content[0] ^ 1]) + content[1:]}
    (folder / name).unlink() if damage == "gone" else (folder / name).write_bytes(changed[damage])
    capsys.readouterr()
    again, _ = load(glm3, tokenizer3, path, skip_bad_rows=True)
    assert [row["input_ids"].tolist() for row in again] == right and again.key == rows.key
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == 1 and str(folder) in said[0]
    assert (folder / name).read_bytes() == content and list(cache.iterdir()) == [folder]


def test_rows_that_change_while_they_are_opened_are_refused(glm3, tokenizer3, tmp_path, cache, monkeypatch):
    path = write(tmp_path / "rows.json", *as_lines(glm3.values["rows"]))
    load(glm3, tokenizer3, path)
    [folder] = cache.iterdir()
    monkeypatch.setattr(rows_cache, "barrier", lambda: (folder / "offsets.bin").write_bytes(b""))
    with pytest.raises(UserError, match=f"{folder}: encoded rows are damaged: start again"):
        load(glm3, tokenizer3, path)


def test_scratch_folders_of_killed_processes_are_removed(glm3, tokenizer3, rows_path3, cache, monkeypatch):
    """Scratch folders go when no process holds them, and stay while one does, however old they are."""
    cache.mkdir(exist_ok=True)
    code = (
        "import sys\nfrom runtime import folders\nwith folders.scratch_folder(sys.argv[1], 'encoding') as path:\n"
        " open(path + '/ids.bin', 'w').close(); print(path, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(cache)], cwd=ROOT, **pipes) for _ in range(2)]
    killed, alive = (process.stdout.readline().strip() for process in processes)
    processes[0].kill()
    processes[0].wait()
    (cache / "of-a-killed-one.encoding").touch()
    (cache / "of-a-living-one.encoding").touch()
    for path in (alive, cache / "of-a-killed-one.encoding"):
        os.utime(path, (0, 0))
    rows, _ = load(glm3, tokenizer3, rows_path3)
    left = {name for name in os.listdir(cache) if name != rows.key}
    assert left == {os.path.basename(alive), "of-a-living-one.encoding"} and os.listdir(alive) == ["ids.bin"]
    assert os.path.dirname(killed) == str(cache)
    processes[1].communicate("")
    assert not os.path.exists(alive)


# ---------------------------------------------------------------- places and bad rows


def test_places_of_encoded_rows(glm3, tokenizer3, tmp_path, cache):
    good, long = as_lines([ROW, {**ROW, "output": "风" * 100}])
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = write(folder / "a.jsonl", "", good, long, "  ", good)
    write(folder / "b.json", "")
    array = write(folder / "c.json", f"[{long}, {good},\n{good}]")
    rows, counts = load(glm3, tokenizer3, [str(folder), lines], 64, 40, is_skip=True)
    places = [f"{lines}:2", f"{lines}:5", f"{array}:row 2", f"{array}:row 3", f"{lines}:2", f"{lines}:5"]
    assert [rows.place(n) for n in range(len(rows))] == places and rows.place(-2) == places[-2]
    assert [file["rows"] for file in counts["files"]] == [2, 0, 2, 2]
    assert [file["is_array"] for file in counts["files"]] == [False, False, True, False]
    assert str(folder) not in "".join(file.read_text(errors="replace") for file in cache.rglob("*") if file.is_file())
    for outside in (6, -7):
        with pytest.raises(IndexError):
            rows.place(outside)


def test_the_same_rows_elsewhere_have_the_places_there(glm3, tokenizer3, tmp_path, cache):
    found = []
    for name in ("a", "b\n\x1b[31m"):
        folder = tmp_path / name
        folder.mkdir()
        rows, counts = load(glm3, tokenizer3, write(folder / "x.json", *as_lines([ROW]), "{"), skip_bad_rows=True)
        assert rows.place(0) == f"{folder}/x.json:1"
        found.append((rows.key, rows.bad_rows))
        assert counts["first_bad_row"] == rows.bad_rows[0]
    assert len(os.listdir(cache)) == 1 and found[0][0] == found[1][0] == os.listdir(cache)[0]
    assert found[0][1][0].startswith(f"{tmp_path}/a/x.json:2: '{{': not a JSON object (Expecting property")
    assert found[1][1][0].startswith(f"{tmp_path}/b\\n\\x1b[31m/x.json:2: '{{': not a JSON object (Expecting property")


def test_where_files_end_is_part_of_the_key(tokenizer3, tmp_path):
    contents = ("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ("a\0file\0bc",), ("a", "bc", "")
    keys = set()
    for number, content in enumerate(contents):
        paths = [tmp_path / f"{number}-{n}" for n in range(len(content))]
        for path, text in zip(paths, content):
            path.write_text(text)
        keys.add(rows_cache.cache_key([str(path) for path in paths], tokenizer3, []))
    assert len(keys) == len(contents)


BAD = ["{", '{"instruction": "a"}', "3", '{"a": 1, "a": 2}', "\udcff", '{"output": "\\ud800"}', "x\x1b[2J\u2028y"]


def write_some_bad(tmp_path):
    """(file, lines of the good rows, lines of the bad ones)."""
    path = tmp_path / "rows.json"
    lines = [line for pair in zip(BAD, as_lines([ROW] * len(BAD))) for line in pair]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return str(path), range(2, 2 * len(BAD) + 1, 2), range(1, 2 * len(BAD), 2)


def test_bad_rows_are_left_out_and_listed(glm3, tokenizer3, tmp_path, cache, monkeypatch):
    path, good, bad = write_some_bad(tmp_path)
    with pytest.raises(ValueError, match=r"rows\.json:1: '\{': not a JSON object"):
        load(glm3, tokenizer3, path)
    found = []
    for _ in range(2):  # the second time from the cache
        rows, counts = load(glm3, tokenizer3, path, skip_bad_rows=True)
        assert [rows.place(n) for n in range(len(rows))] == [f"{path}:{n}" for n in good]
        found.append(rows.bad_rows)
        monkeypatch.setattr(rows_encoding, "encode_row", lambda *args: pytest.fail("encoded again"))
    assert found[0] == found[1] and len(found[0]) == counts["bad_rows"] == len(BAD)
    assert all(message.startswith(f"{path}:{n}: ") for message, n in zip(found[0], bad))
    assert all(message.isprintable() for message in found[0])
    said = data_set.describe_counts(counts, 512, 384, is_skip=False).splitlines()
    assert said[-1] == f"rows: left out 7 bad rows, for example {found[0][0]}"


def test_a_message_about_a_bad_row_is_one_line(glm3, tokenizer3, tmp_path, cache):
    rows = [{"q\n\ud800": text, "output": "b"} for text in ("a", " ", "")]
    path = write(tmp_path / "rows.json", *map(json.dumps, rows))
    rows, _ = load(glm3, tokenizer3, path, columns=Columns(prompt="q\n\ud800"), skip_bad_rows=True)
    assert rows.bad_rows == [f"{path}:{n}: q\\n\\ud800 empty: a row needs a question" for n in (2, 3)]


def test_a_run_without_bad_rows_says_nothing_about_them(glm3, tokenizer3, rows_path3, cache):
    rows, counts = load(glm3, tokenizer3, rows_path3, skip_bad_rows=True)
    assert rows.bad_rows == [] and (counts["bad_rows"], counts["first_bad_row"]) == (0, None)
    assert "bad" not in data_set.describe_counts(counts, 512, 384, is_skip=False)
    assert rows.key != load(glm3, tokenizer3, rows_path3)[0].key


def test_files_without_a_good_row_are_refused(glm3, tokenizer3, tmp_path, cache):
    path = write(tmp_path / "rows.json", "", "{", "3")
    says = rf"^{path}: --skip_bad_rows left no row of 2, the first of them is {path}:2: '{{': not a JSON object"
    with pytest.raises(ValueError, match=says):
        load(glm3, tokenizer3, path, skip_bad_rows=True)
    with pytest.raises(ValueError, match=rf"^{path}: no row in it: give at least one$"):
        load(glm3, tokenizer3, write(tmp_path / "rows.json", ""), skip_bad_rows=True)
    long = write(tmp_path / "rows.json", "{", json.dumps({**ROW, "output": "风" * 100}))
    with pytest.raises(ValueError, match="--is_skip left no row of 1: raise"):
        load(glm3, tokenizer3, long, 64, 40, is_skip=True, skip_bad_rows=True)
    assert os.listdir(cache) == []


@pytest.mark.parametrize(
    "content, says",
    [
        ("[%s, {]", r":1: not a JSON array"),
        ("[%s, 2", r":1: not a JSON array"),
        ("[%s, '\udcff']", r":1: not UTF-8"),
        ("[%s, " + "[" * 100_000, r": not a JSON array"),
    ],
    ids="broken cut-off not-utf-8 brackets".split(),
)
def test_an_array_that_cannot_be_read_on_is_refused(glm3, tokenizer3, tmp_path, cache, content, says):
    path = tmp_path / "rows.json"
    path.write_bytes((content % as_lines([ROW])[0]).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"rows\.json{says}"):
        load(glm3, tokenizer3, path, skip_bad_rows=True)


# ---------------------------------------------------------------- several processes


@pytest.fixture
def small_pool(monkeypatch):
    """A pool for few rows."""
    monkeypatch.setattr(rows_encoding, "BATCH_ROWS", 100)
    monkeypatch.setattr(rows_cache, "MIN_POOL_BATCHES", 2)


def many_rows(num_rows):
    return [{**ROW, "input": str(n), "output": "风" * (n % 90)} for n in range(1, num_rows + 1) if n % 90]


def test_rows_of_several_runs_come_back(glm3, tokenizer3, tmp_path, monkeypatch):
    """Runs of each row, its supervised tokens, and what is shown, after they have lain on the disk."""
    encode_one, wanted = rows_encoding.encode_row, []

    def encode_turns(*args):
        item = encode_one(*args)
        [(start, end, _)] = item["runs"]
        item["runs"] = [Run(start, start + 2, 7), Run(start + 3, end)][: 1 + len(wanted) % 2]
        wanted.append(item)
        return item

    monkeypatch.setattr(rows_encoding, "encode_row", encode_turns)
    path = write(tmp_path / "rows.json", *as_lines(many_rows(5)))
    for _ in range(2):  # the second time from the cache
        rows, counts = load(glm3, tokenizer3, path, num_proc=1)
        assert [row["runs"].tolist() for row in rows] == [[list(run) for run in item["runs"]] for item in wanted]
        labels = [sum(end - start + (end_id >= 0) for start, end, end_id in item["runs"]) for item in wanted]
        assert rows.num_labels.tolist() == labels and counts["labels"] == sum(labels) and len(wanted) == 5
        assert [show_row(row, tokenizer3).count("【") for row in rows] == [1, 2, 1, 2, 1]
        batch = collate([rows[n] for n in range(5)], 0)
        assert len(batch["label_positions"]) == sum(labels)


def test_two_processes_give_the_same_files_as_one(glm3, tokenizer3, tmp_path, small_pool, monkeypatch, capsys):
    def fits(row):
        item = encode(glm3, tokenizer3, row["instruction"] + row["input"], row["output"], 64, 40)
        return not item["source_cut"] and not item["answer_cut"]

    lines = as_lines(many_rows(3000))
    lines[7:7] = [" \u3000 ", "{"]
    lines[2600:2600] = ["3", "[]"]
    paths = [write(tmp_path / "a.json", *lines[:2500]), write(tmp_path / "b.json", f"[{','.join(lines[2500:])}]")]
    places = [f"{paths[0]}:{n + 1}" if n < 2500 else f"{paths[1]}:row {n - 2499}" for n in range(len(lines))]
    kept = [place for place, line in zip(places, lines) if line.startswith('{"') and fits(json.loads(line))]
    found, said = [], []
    for num_proc in (1, 2):
        cache = tmp_path / str(num_proc)
        monkeypatch.setattr(rows_cache, "cache_folder", lambda folder=str(cache): folder)
        rows, _ = load(glm3, tokenizer3, paths, 64, 40, is_skip=True, num_proc=num_proc, skip_bad_rows=True)
        assert 1000 < len(rows) < 2900
        bad = [message.split(": ")[0] for message in rows.bad_rows]
        assert bad == [f"{paths[0]}:9", f"{paths[1]}:row 101", f"{paths[1]}:row 102"]
        assert [rows.place(n) for n in range(len(rows))] == kept
        found.append({str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()})
        said.append(capsys.readouterr().out)
    assert found[0] == found[1] and len(found[0]) == 8
    assert said[0].startswith("encoded 2,967 rows in ") and said[0].endswith(" s with 1 process\n")
    assert said[1].startswith("encoded 2,967 rows in ") and said[1].endswith(" s with 2 processes\n")
    assert not multiprocessing.active_children()


def test_few_rows_need_no_pool(glm3, tokenizer3, tmp_path, cache, capsys):
    load(glm3, tokenizer3, write(tmp_path / "rows.json", *as_lines(many_rows(50))), num_proc=2)
    assert "with 1 process\n" in capsys.readouterr().out


def test_the_first_bad_row_of_the_file_is_reported(glm3, tokenizer3, tmp_path, cache, small_pool):
    """Later ones are found sooner: by the second process, and by the reader of the second file."""
    lines = as_lines([{**ROW, "input": "水" * 20_000}] * 60) + ["{"] * 300
    paths = [write(tmp_path / "a.json", *lines), write(tmp_path / "b.json", "[1, 2")]
    with pytest.raises(ValueError, match=r"a\.json:61: '{': not a JSON object"):
        load(glm3, tokenizer3, paths, num_proc=2)
    assert os.listdir(cache) == [] and not multiprocessing.active_children()


def test_what_cannot_be_read_is_reported_in_its_turn(glm3, tokenizer3, tmp_path, cache, small_pool):
    good = write(tmp_path / "a.json", *as_lines(many_rows(250)))
    broken = write(tmp_path / "b.json", f"[{json.dumps(ROW)}")
    with pytest.raises(ValueError, match=r"b\.json:2: not a JSON array \(Expecting ',' delimiter\)"):
        load(glm3, tokenizer3, [good, broken], num_proc=2)
    for num_good in (1, 99, 100, 101):  # the faults are in one batch, or in two
        first = write(tmp_path / "c.json", *as_lines([ROW] * num_good), "{")
        with pytest.raises(ValueError, match=rf"c\.json:{num_good + 1}: '{{': not a JSON object"):
            load(glm3, tokenizer3, [first, broken], num_proc=1)


def encoding_of(glm3, tokenizer3):
    return Encoding(Columns(), tokenizer3, glm3.mode, 512, 384, False)


def test_a_process_that_dies_is_an_error(glm3, tokenizer3):
    def batches():
        for n in range(50):
            if n == 3:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            yield [(0, Part("here", False, [(1, json.dumps(ROW).encode())] * 100))]

    with pytest.raises(ValueError, match="--num_proc 2: a process that encoded rows was ended from outside"):
        list(rows_encoding.encode_in_pool(batches(), encoding_of(glm3, tokenizer3), 2))
    assert not multiprocessing.active_children()


ENDLESS = """
import itertools, multiprocessing, sys
from modes import MODES
from rows.checks import Columns
from rows.encoding import Encoding, encode_in_pool
from rows.reading import Part

mode = MODES["glm3"]
encoding = Encoding(Columns(), mode.tokenizer_class.from_pretrained(sys.argv[1]), mode, 512, 384, False)
batch = [(0, Part("here", False, [(1, b'{"instruction": "a", "input": "", "output": "b"}')] * 1000))]
for number, _ in enumerate(encode_in_pool(itertools.repeat(batch), encoding, 2)):
    if number == 3:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_no_process_is_left_behind(glm3, number):
    command = [sys.executable, "-c", ENDLESS, glm3.folder]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=default_signals, **streams)
    try:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert 1 <= len(pids) <= 2
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        errors = process.communicate(timeout=300)[1]
        for _ in range(2400):
            if not any(is_running(pid) for pid in pids):
                break
            time.sleep(0.05)
        else:
            pytest.fail("a process of the pool is still there")
        assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT), errors
    finally:
        process.kill()


def is_running(pid):
    """Is there such a process, and not only what is left of one that nobody has asked about?"""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- waiting for the process that encodes


@pytest.fixture
def fast_heartbeat(monkeypatch):
    for name, seconds in (("BEAT_SECONDS", 0.02), ("SILENT_SECONDS", 0.4), ("POLL_SECONDS", 0.01)):
        monkeypatch.setattr(rows_cache, name, seconds)


def encode_slowly(monkeypatch, seconds):
    original = rows_encoding.encode_row
    monkeypatch.setattr(rows_encoding, "encode_row", lambda *args: (time.sleep(seconds), original(*args))[1])


def folder_of(glm3, tokenizer3, path, cache):
    """Where `load` keeps the rows of this file."""
    return cache / rows_cache.cache_key([path], tokenizer3, ["glm3", None, "output", 512, 384, False, False])


@pytest.mark.parametrize("is_stale", [False, True])
def test_other_processes_wait_while_one_encodes(
    glm3, tokenizer3, rows_path3, cache, fast_heartbeat, monkeypatch, is_stale
):
    """Longer than a silence may last; a file of a killed run changes nothing."""
    heart = f"{folder_of(glm3, tokenizer3, rows_path3, cache)}.encoding"
    if is_stale:
        open(heart, "w").close()
        os.utime(heart, (1, 1))
    encode_slowly(monkeypatch, 0.1)  # 9 rows
    found = []
    other = threading.Thread(target=lambda: found.append(load(glm3, tokenizer3, rows_path3, encodes=False)))
    other.start()
    time.sleep(0.1)
    started = time.monotonic()
    rows, counts = load(glm3, tokenizer3, rows_path3)
    assert time.monotonic() - started > rows_cache.SILENT_SECONDS
    other.join(timeout=120)
    assert found[0][1] == counts and found[0][0].ids.tolist() == rows.ids.tolist()
    assert os.listdir(cache) == [os.path.basename(heart).removesuffix(".encoding")]


def test_rows_that_are_there_are_not_waited_for(glm3, tokenizer3, rows_path3, cache, monkeypatch):
    first, _ = load(glm3, tokenizer3, rows_path3)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    second, _ = load(glm3, tokenizer3, rows_path3, encodes=False)
    assert first.ids.tolist() == second.ids.tolist()


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_silent_process_is_noticed(glm3, tokenizer3, rows_path3, cache, fast_heartbeat, is_stale):
    heart = f"{folder_of(glm3, tokenizer3, rows_path3, cache)}.encoding"
    if is_stale:
        open(heart, "w").close()
        os.utime(heart, (1, 1))
    started = time.monotonic()
    says = rf"{heart}: not touched for 0\.4 s: the process of this host that encodes the rows \(LOCAL_RANK 0\) has"
    with pytest.raises(ValueError, match=says):
        load(glm3, tokenizer3, rows_path3, encodes=False)
    assert time.monotonic() - started > rows_cache.SILENT_SECONDS


def test_a_bad_row_is_told_by_the_process_that_found_it(
    glm3, tokenizer3, rows_path3, cache, fast_heartbeat, monkeypatch
):
    """The others say nothing until the launcher has had its time to end them."""
    with open(rows_path3, "a", encoding="utf-8") as file:
        file.write("{")
    encode_slowly(monkeypatch, 0.02)
    ended = []

    def wait():
        with pytest.raises(ValueError, match="not touched for"):
            load(glm3, tokenizer3, rows_path3, encodes=False)
        ended.append(time.monotonic())

    other = threading.Thread(target=wait)
    other.start()
    with pytest.raises(ValueError, match=r"rows\.json:10: "):
        load(glm3, tokenizer3, rows_path3)
    failed = time.monotonic()
    assert os.listdir(cache) == []
    other.join(timeout=120)
    assert ended[0] - failed > 0.9 * rows_cache.SILENT_SECONDS


def test_a_run_that_ends_does_not_stop_the_heartbeat_of_another(tmp_path, fast_heartbeat):
    path = tmp_path / "x.encoding"
    with rows_cache.heartbeat(str(path)):
        path.unlink()  # what the other run does at its end
        time.sleep(0.2)
        assert path.exists()
    assert not path.exists()


@pytest.fixture
def rows_path3(glm3, tmp_path):
    return write(tmp_path / "rows.json", *as_lines(glm3.values["rows"]))
