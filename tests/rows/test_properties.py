"""What holds for any input: files, texts, lengths, strings."""

import json
import math
import os
import re
import tempfile
import unicodedata

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Golden

import score
from evaluation import metrics, predictions
from rows import cache, encoding
from rows.batches import Split, Updates, pack
from rows.cache import load_rows
from rows.checks import Columns
from rows.reading import check_items, read_file, read_rows
from tests.rows.test_data_set import encode, ids_and_labels, text_control_ids


def examples(number):
    """Settings of a property that is tried on so many inputs, the same ones in every run."""
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(golden):
    return golden.tokenizer()


# ---------------------------------------------------------------- reading


def row(number, **changes):
    return {"instruction": "问", "input": str(number), "output": "答", **changes}


def as_json(value):
    return json.dumps(value).encode()


GOOD = '{"instruction": "问", "input": "", "output": "答"}'.encode()
ROW_BEGINS = b'{"instruction": "a", "input": "", "output": "b", '
BAD_VALUES = [  # JSON, but no rows; what Python's json writes for them, so also NaN and Infinity
    *map(as_json, (1, -0.5, "a", "", True, None, [], {}, [{}], {"instruction": "a"}, math.nan, 10**400)),
    *(as_json(row(0, output=value)) for value in (None, True, [], {}, ["a"], {"a": "b"}, math.inf, "", " \n", "a\0")),
    *(as_json(row(0, input=value)) for value in (True, {}, "\0", "\ud800", "a\udfffb")),
    as_json(row(0, instruction=" ", input="\u3000")),
    *(ROW_BEGINS + rest for rest in (b'"output": "c"}', b'"more": {"a": 1, "a": 2}}')),
]
BAD_LINES = [
    *(b"x", b"\0", b"\xff", b"not JSON", GOOD[:-1], GOOD + b"x", GOOD + b"\0", b"\xef\xbb\xbf" + GOOD),
    *(GOOD.replace(b'""', b'"' + inside + b'"') for inside in (b"\0", b"\t", b"\xed\xa0\x80", b"\\u00", b'"', b"\xe9")),
    *(b"{" * 2000, b"[" * 2000, b'{"a":' * 2000, ROW_BEGINS + b'"n": ' + b"-" * 5000 + b"}", "{}".encode("utf-16")),
]
PIECES = [
    *(GOOD, GOOD[:-1], ROW_BEGINS, b"\xef\xbb\xbf", b"\r\n", b"\n", b" ", b"[", b"]", b",", b"{", b"}", b":", b'"'),
    *(
        b'"input": "", ',
        b'"a"',
        b"null",
        b"NaN",
        b"1e999",
        b'"\\ud800"',
        b"\xe9\x97",
        b"\x0b",
        b"\xc2\x85",
        b"\x1f\x8b",
    ),
    *(b"1" * 5000, b"[" * 3000, b'{"a":' * 3000),
]
FILES = st.lists(st.sampled_from(PIECES + BAD_VALUES + BAD_LINES) | st.binary(max_size=8), max_size=12).map(b"".join)
VALUES = st.lists(st.sampled_from(["good", "long"]) | st.sampled_from(BAD_VALUES), min_size=1, max_size=8)
LINES = st.lists(
    st.sampled_from(["good", "long"]) | st.sampled_from([b"", b" ", b"\t\r", *BAD_VALUES, *BAD_LINES]), max_size=8
).map(lambda lines: ["good", *lines])  # the first line tells JSON Lines from an array


def write(folder, content, name="rows.json"):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(content)
    return path


def make_file(entries, is_array):
    """(bytes of a file, {number: row} of what is good in it, numbers of what is bad)."""
    texts, good, bad = [], {}, []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str):
            good[number] = row(number, output="风" * 100 if entry == "long" else "答")
            entry = json.dumps(good[number], ensure_ascii=number % 2 == 0).encode()
        elif entry.strip():
            bad.append(number)
        texts.append(entry)
    return b"[" + b",\n".join(texts) + b"]" if is_array else b"\n".join(texts), good, bad


def check_message(message, start):
    """One short line that begins with the place and holds nothing that a terminal would obey."""
    assert message.startswith(start) and message.isprintable() and len(message) < len(start) + 500, message


@examples(500)
@given(content=FILES, need_response=st.booleans())
def test_any_file_holds_rows_or_one_error(tmp_path, content, need_response):
    path = write(tmp_path, content)
    try:
        rows = list(read_rows([path], Columns(), need_response))
    except ValueError as error:
        check_message(str(error), f"{path}:")
    else:
        assert rows and all(row["query"].strip() for row in rows)
        assert all(re.fullmatch(r":(row )?\d+( \(object \d+\))?", row["place"].removeprefix(path)) for row in rows)


@examples(300)
@given(file=st.tuples(LINES, st.just(False)) | st.tuples(VALUES, st.just(True)))
def test_the_good_rows_among_bad_ones_all_come_out(tmp_path, file):
    content, good, bad = make_file(*file)
    path, messages = write(tmp_path, content), []
    found = dict(check_items(read_file(path), Columns(), bad_rows=messages))
    assert list(found) == list(good)
    assert [row["query"] for row in found.values()] == [f"问{number}" for number in good]
    assert len(messages) == len(bad)
    for number, message in zip(bad, messages):
        check_message(message, f"{path}:{'row ' if file[1] else ''}{number}: ")
    if bad:  # the first of them is the error of a run that skips none
        with pytest.raises(ValueError) as error:
            list(read_rows([path], Columns()))
        assert str(error.value) == messages[0]


# ---------------------------------------------------------------- encoding

FRAGMENTS = [
    *("[gMASK]", "<sop>", "sop", "<|user|>", "</s>", "<n>", "<eop>", "<|tab|>", "<|blank_2|>", "<unk>", "＜sop＞"),
    *("<0x0A>", "\n", "\t", " ", "  ", " " * 81, "问：", "\n\n答：", "水温", "\u3000", "，", "\ufeff", "\u200b"),
]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(CHARACTERS, max_size=20), max_size=12).map("".join)
FRAMES = {"glm": "[gMASK] <sop> <eop>", "glm2": "[gMASK] sop </s>", "glm3": "[gMASK] sop <|user|> <|assistant|> </s>"}


@examples(200)
@given(query=TEXTS, answer=TEXTS, max_len=st.integers(30, 80), share=st.floats(0, 1))
def test_any_text_makes_a_row(golden, tokenizer, query, answer, max_len, share):
    prompt = golden.mode.prompt
    most = max_len - prompt.RESERVED - 1  # of --max_src_len, as the flags are checked
    max_src_len = 16 + round(share * (most - 16))
    row = encode(golden, tokenizer, query, answer, max_len, max_src_len)
    batch = ids_and_labels(row)
    end = prompt.stop_ids(tokenizer)[0]
    assert len(row["input_ids"]) <= max_len and 1 <= row["runs"][0].start < row["runs"][0].end == len(row["input_ids"])
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in row["input_ids"])
    assert any(label != -100 for label in batch["labels"][1:])  # the first position predicts nothing
    assert batch["input_ids"][-1] == batch["labels"][-1] == end
    # The row holds the control tokens of its frame, once each, and none from the texts.
    control = text_control_ids(tokenizer, batch["input_ids"])
    wanted = [tokenizer.get_command(name) for name in FRAMES[golden.mode.name].split()]
    assert control == set(wanted)
    assert [batch["input_ids"].count(token_id) for token_id in wanted] == [1] * len(wanted)


@examples(200)
@given(text=TEXTS)
def test_any_text_keeps_its_characters(golden, tokenizer, text):
    """glm2 and glm3: all but U+2581, sentencepiece's own sign for a space. glm normalises, but only once."""
    ids = tokenizer.encode_text(text)
    decoded = tokenizer.decode(ids)
    assert not text_control_ids(tokenizer, ids)
    if golden.mode.name == "glm":
        newline, tab = (tokenizer.encode_text(c)[-1] for c in "\n\t")
        assert (ids.count(newline), ids.count(tab)) == (text.count("\n"), text.count("\t"))
        assert tokenizer.decode(tokenizer.encode_text(decoded)).strip(" ") == decoded.strip(" ")
    else:
        assert decoded == text.replace("\u2581", " ")


def is_normal(text):
    """Is the text in Unicode's form NFKC, without characters that cannot be seen?"""
    return unicodedata.normalize("NFKC", text) == text and not set(text) & set("\ufeff\u200b\ufffd\u2581")


NORMAL = st.sampled_from(list(filter(is_normal, FRAGMENTS))) | st.text(
    st.characters(categories=["L", "M", "N", "P", "S"]).filter(is_normal), max_size=10
)


@examples(300)
@given(text=st.lists(NORMAL, max_size=12).map("".join).filter(is_normal))
def test_normal_text_comes_back_in_glm(glm, text):
    """But for one space at either end."""
    decoded = glm.decode(glm.encode_text(text))
    assert decoded in (text, text[1:], text[:-1], text[1:-1]) and decoded.strip(" ") == text.strip(" ")


@pytest.fixture(scope="module")
def glm():
    return Golden("glm").tokenizer()


# ---------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def glm3():
    return Golden("glm3")


@pytest.fixture(scope="module")
def tokenizer3(glm3):
    return glm3.tokenizer()


@examples(80)
@given(
    files=st.lists(st.tuples(LINES, st.just(False)) | st.tuples(VALUES, st.just(True)), min_size=1, max_size=4),
    is_skip=st.booleans(),
    batch_rows=st.integers(1, 6),
)
def test_encoded_rows_are_those_of_the_files(glm3, tokenizer3, monkeypatch, files, is_skip, batch_rows):
    monkeypatch.setattr(encoding, "BATCH_ROWS", batch_rows)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(cache, "cache_folder", lambda: os.path.join(folder, "cache"))
        wanted, bad_places = [], []
        for n, (entries, is_array) in enumerate(files):
            content, good, bad = make_file(entries, is_array)
            path = write(folder, content, f"{n}.json") + (":row " if is_array else ":")
            wanted += [(f"{path}{number}", good[number]) for number in good]
            bad_places += [f"{path}{number}: " for number in bad]
        encoded = [(place, encode_short(glm3, tokenizer3, row)) for place, row in wanted]
        kept = [(place, row) for place, row in encoded if not (is_skip and row["answer_cut"])]
        paths = [folder]
        encoding_of_run = encoding.Encoding(Columns(), tokenizer3, glm3.mode, 40, 30, is_skip, skip_bad_rows=True)
        if not kept:
            with pytest.raises(ValueError) as error:
                load_rows(paths, encoding_of_run, num_proc=1)
            check_message(str(error.value), f"{folder}: --")
            return
        for _ in range(2):  # the second time from the cache
            rows, counts = load_rows(paths, encoding_of_run, num_proc=1)
            assert [rows.place(n) for n in range(len(rows))] == [place for place, _ in kept]
            for found, (_, row) in zip(rows, kept, strict=True):
                assert found["input_ids"].tolist() == row["input_ids"]
                assert found["runs"].tolist() == [list(run) for run in row["runs"]]
            assert counts["bad_rows"] == len(bad_places) and counts["skipped"] == len(encoded) - len(kept)
            assert len(rows.bad_rows) == len(bad_places)
            for message, place in zip(rows.bad_rows, bad_places):
                check_message(message, place)


def encode_short(glm3, tokenizer3, row):
    return encode(glm3, tokenizer3, row["instruction"] + row["input"], row["output"], 40, 30)


# ---------------------------------------------------------------- updates

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**32 - 1)


@examples(200)
@given(lengths=LENGTHS, pack_to=st.integers(60, 250), seed=SEEDS)
def test_packs_hold_every_row_once_and_are_never_too_long(lengths, pack_to, seed):
    packs = pack(numpy.array(lengths), pack_to, numpy.random.default_rng(seed))
    assert sorted(number for numbers in packs for number in numbers) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in numbers) <= pack_to for numbers in packs)


@examples(200)
@given(
    lengths=LENGTHS,
    split=st.tuples(*[st.integers(1, 4)] * 3),
    pack_to=st.none() | st.integers(60, 250),
    seed=SEEDS,
    epoch=st.integers(0, 5),
)
def test_every_row_once_an_epoch_and_in_the_same_update_for_any_split(lengths, split, pack_to, seed, epoch):
    def rows_of_updates(batch_size, accumulation, world):
        """The rows of each update, sorted; batch size and labels are checked."""
        ranks = [
            list(Updates(lengths, num_labels, Split(batch_size, accumulation, world), rank, seed, pack_to).epoch(epoch))
            for rank in range(world)
        ]
        found = []
        for update in zip(*ranks, strict=True):
            assert len({len(part.micro_batches) for part in update}) == 1
            batches = [numbers for part in update for numbers in part.micro_batches]
            assert len(batches) <= accumulation * world
            most = batch_size * (pack_to or 60)
            assert all(sum(lengths[number] for number in numbers) <= most for numbers in batches)
            found.append(sorted(number for numbers in batches for number in numbers))
            assert {part.num_labels for part in update} == {sum(num_labels[number] for number in found[-1])}
        return found

    num_labels = [length // 2 for length in lengths]
    found = rows_of_updates(*split)
    assert sorted(sum(found, [])) == list(range(len(lengths)))
    assert found == rows_of_updates(math.prod(split), 1, 1) == rows_of_updates(1, 1, math.prod(split))


# ---------------------------------------------------------------- scores

STRINGS = st.text(max_size=30) | st.text("今天气好。,!?？….”’“_aB1%- \n\r\t\u3000\x1c\x85\u200b😀\ud800", max_size=40)


@examples(150)
@given(prediction=STRINGS, reference=STRINGS)
def test_scores_are_in_range_and_none_beats_the_reference_itself(prediction, reference):
    result, best = metrics.score_rows([prediction], [reference]), metrics.score_rows([reference], [reference])
    for name in score.METRICS:
        for value in (result[name], result["rows"][0].get(name), best[name]):
            assert value is None or (math.isfinite(value) and 0 <= value <= 100), name
        if best[name] is not None:
            assert result[name] <= best[name] + 1e-9, name
    assert best["exact_match"] == (100 if reference.strip() else 0)
    assert best["f1"] in (None, 100)


@examples(200)
@given(content=FILES)
def test_any_file_of_predictions_is_scored_or_one_error(tmp_path, content):
    path = write(tmp_path, content.replace(b"instruction", b"prediction"), "predictions.jsonl")
    try:
        rows = predictions.read_predictions(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:")
    else:
        assert len(rows.predictions) == len(rows.references) == len(rows.line_numbers) > 0
