"""Rows: how they are read, which ids carry loss, what is cached, how an epoch is shared out over the ranks."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_set
from batches import collate
from data_set import Columns, data_files, encode_row, load_rows, read_rows, show_row
from modes import MODES

GLM1 = os.path.join(os.path.dirname(__file__), "golden", "glm1")
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
    monkeypatch.setattr(data_set, "cache_folder", lambda: str(folder))
    return folder


def encode(golden, tokenizer, query, answer, max_len=512, max_src_len=384):
    return encode_row(query, answer, tokenizer, golden.mode.prompt, max_len, max_src_len)


def ids_and_labels(row):
    """Of one row, through the batch that training sees."""
    batch = collate([row], pad_token_id=0)
    return {name: tensor[0].tolist() for name, tensor in batch.items()}


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def as_lines(rows):
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def load(golden, tokenizer, path, max_len=512, max_src_len=384, is_skip=False, columns=Columns()):
    paths = path if isinstance(path, list) else [str(path)]
    return load_rows(paths, columns, tokenizer, golden.mode, max_len, max_src_len, is_skip)


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
    start, whole_start = row["num_unlabelled"], whole["num_unlabelled"]
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


FRAGMENTS = st.sampled_from(
    ["[gMASK]", "<sop>", "sop", "<|user|>", "</s>", "<n>", "<eop>", "<|tab|>", "<|blank_2|>", "<unk>", "＜sop＞"]
    + ["<0x0A>", "\n", "\t", "  ", " " * 81, "问：", "\n\n答：", "水温", "\u3000", "，"]
)
# U+2581 is sentencepiece's own sign for a space: it comes back as one.
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20)
TEXTS = st.lists(FRAGMENTS | CHARACTERS, max_size=12).map("".join)


FRAMES = {"glm": "[gMASK] <sop> <eop>", "glm2": "[gMASK] sop </s>", "glm3": "[gMASK] sop <|user|> <|assistant|> </s>"}


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(query=TEXTS, answer=TEXTS, max_len=st.integers(30, 80), share=st.floats(0, 1))
def test_any_text_makes_a_row(golden, tokenizer, query, answer, max_len, share):
    prompt = golden.mode.prompt
    most = max_len - prompt.RESERVED - 1  # of --max_src_len, as the flags are checked
    max_src_len = 16 + round(share * (most - 16))
    row = encode(golden, tokenizer, query, answer, max_len, max_src_len)
    batch = ids_and_labels(row)
    end = prompt.stop_ids(tokenizer)[0]
    assert len(batch["input_ids"]) <= max_len
    assert any(label != -100 for label in batch["labels"][1:])  # the first position predicts nothing
    assert batch["input_ids"][-1] == batch["labels"][-1] == end
    # The row holds the control tokens of its frame, once each, and none from the texts.
    control = text_control_ids(tokenizer, batch["input_ids"])
    wanted = [tokenizer.get_command(name) for name in FRAMES[golden.mode.name].split()]
    assert control == set(wanted)
    assert [batch["input_ids"].count(token_id) for token_id in wanted] == [1] * len(wanted)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_any_text_keeps_its_characters(golden, tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert not text_control_ids(tokenizer, ids)
    if golden.mode.name == "glm":  # it normalises; new lines and tabs stay
        newline, tab = (tokenizer.encode_text(c)[-1] for c in "\n\t")
        assert (ids.count(newline), ids.count(tab)) == (text.count("\n"), text.count("\t"))
    else:
        assert tokenizer.decode(ids) == text


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
def test_formats(tmp_path, content):
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    assert read(path) == READ


def test_places_are_lines_of_the_file(tmp_path):
    lines = write(tmp_path / "a.jsonl", "", as_lines([ROW])[0], "", as_lines([ROW])[0])
    assert [row["place"] for row in read_rows([lines], Columns())] == [f"{lines}:2", f"{lines}:4"]
    array = write(tmp_path / "b.json", ARRAY)
    assert [row["place"] for row in read_rows([array], Columns())] == [f"{array}:row {i}" for i in (1, 2, 3)]


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


def test_columns(tmp_path):
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


def test_counts(golden, tokenizer, rows_path, cache):
    rows, counts = load(golden, tokenizer, rows_path, 96, 48)
    whole, short = (golden.values[key]["examples"] for key in ("encoded", "encoded_short"))
    assert [ids_and_labels(row) for row in rows] == short
    lost = [len(a["input_ids"]) - len(b["input_ids"]) for a, b in zip(whole, short)]
    num_labels = [sum(label != -100 for label in row["labels"]) for row in short]
    assert rows["num_labels"][:] == num_labels
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
    assert kept[0]["input_ids"] == ids[0]["input_ids"]
    assert "left out 2 rows" in data_set.describe_counts(counts, 64, 40, is_skip=True)


def test_rows_are_encoded_once(golden, tokenizer, rows_path, cache, monkeypatch):
    first = load(golden, tokenizer, rows_path)
    monkeypatch.setattr(data_set, "encode_row", lambda *args: pytest.fail("encoded again"))
    second = load(golden, tokenizer, rows_path)
    assert first[1] == second[1] and first[0][:] == second[0][:]
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


def test_families_do_not_share_cached_rows(tokenizer, golden, rows_path):
    """glm2 and glm3 have the same vocabulary file."""
    keys = {
        data_set.cache_key([rows_path], tokenizer, [name, None, "output", 512, 384, False])
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
    original, done = data_set.encode_row, []

    def encode_while_another_run_does(*args):
        if not done:
            done.append(True)
            load(golden, tokenizer, rows_path)
        return original(*args)

    monkeypatch.setattr(data_set, "encode_row", encode_while_another_run_does)
    rows, counts = load(golden, tokenizer, rows_path)
    assert len(rows) == counts["rows"] == len(golden.values["rows"])
    assert len(os.listdir(cache)) == 1


def test_a_cache_that_cannot_be_written_is_named(golden, tokenizer, rows_path, tmp_path, monkeypatch):
    blocked = tmp_path / "file" / "cache"
    blocked.parent.write_text("")
    monkeypatch.setattr(data_set, "cache_folder", lambda: str(blocked))
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
    assert int((batch["labels"] != -100).sum()) == rows[0]["num_labels"] + rows[7]["num_labels"]
