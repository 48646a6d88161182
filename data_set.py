"""Rows: read, checked and turned into ids."""

import codecs
import collections
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

BOM = b"\xef\xbb\xbf"
ARRAY_PIECE = 1 << 20  # characters of a JSON array that are read at a time
MAX_ROW = 1 << 24  # bytes of a row at most: to encode one takes about fifty times its size in memory


@dataclass(frozen=True)
class Columns:
    """Names of the fields of a row; `prompt` replaces instruction + input where it is given."""

    prompt: str | None = None
    response: str = "output"

    @property
    def sources(self):
        """Fields whose texts, put together, are the query."""
        return (self.prompt,) if self.prompt else ("instruction", "input")


def data_files(paths):
    """Files behind `--train_path`: files as given, folders as their *.json and *.jsonl, sorted."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            names = [n for n in sorted(os.listdir(path)) if n.endswith((".json", ".jsonl")) and not n.startswith(".")]
            inside = [os.path.join(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
            if not inside:
                raise ValueError(f"{path}: no *.json or *.jsonl file in this folder: put rows there or name a file")
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder: check the path")
    return files


class Part(NamedTuple):
    """Consecutive lines of a file, or values of the JSON array in it."""

    path: str
    is_array: bool
    items: Iterable  # bytes; the last may be the ValueError that ended the reading
    first: int = 1  # number of the first item; lines and values are counted from 1


def place_of(path, is_array, number):
    """How messages name a line, or a row of an array."""
    return f"{path}:row {number}" if is_array else f"{path}:{number}"


def read_file(path):
    """The whole file, JSON Lines or one JSON array, as a Part whose items are read when they are asked for."""
    with open_rows(path) as file:
        is_array = file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    return Part(path, is_array, read_array(path) if is_array else read_lines(path))


def read_lines(path):
    """Yield the lines, which may be empty or anything but JSON; of one that is over MAX_ROW only the start."""
    with open_rows(path) as file:
        start = file.read(len(BOM))
        file.seek(len(start) if start == BOM else 0)
        read = functools.partial(file.readline, MAX_ROW + 1)
        for line in iter(read, b""):
            rest = line
            while len(rest) > MAX_ROW and not rest.endswith(b"\n"):
                rest = read()
            yield line


def open_rows(path):
    """The file's bytes; ValueError where it may not be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None


class KeyTwice(ValueError):
    """A key that stands twice in an object."""


def make_object(pairs):
    """The object of (key, value) pairs; json alone would keep the last of two values and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise KeyTwice(collections.Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


parse_json = json.JSONDecoder(object_pairs_hook=make_object).decode


def parse_line(text, place):
    """The JSON value of a line."""
    try:
        return parse_json(text)
    except KeyTwice as error:
        key = repr(str(error)[:60])
        raise ValueError(f"{place}: field {key} stands twice: a row has a field once: remove one of them") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        reason = error
    raise ValueError(f"{place}: {text.strip()[:60]!r}: not a JSON object ({reason}): mend or remove it")


def read_array(path):
    """Yield the values in one JSON array, as JSON text in bytes; a piece of the file is in memory at a time."""
    with open_rows(path) as file:
        text = ArrayText(path, file)
        text.take("[")
        separator = text.take("]") if text.peek() == "]" else ","
        while separator == ",":
            yield text.take_value().encode()
            separator = text.take(",]")
        if text.peek():
            raise text.error("Extra data", text.at)


class ArrayText:
    """The text of a file with one JSON array: a piece of it, and the place that is reached."""

    skip_white_space = re.compile(r"[ \t\r\n]*").match
    read_value = json.JSONDecoder().raw_decode

    def __init__(self, path, file):
        self.path = path
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self.text, self.at, self.num_lines = "", 0, 0  # num_lines: those that are read and gone

    def refill(self, size):
        """Drop what has been read and add `size` characters; False, and nothing changes, at the end of the file."""
        try:
            piece = self.file.read(size)
        except UnicodeDecodeError:
            raise self.not_utf_8() from None
        if not piece:
            return False
        self.num_lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + piece, 0
        return True

    def peek(self):
        """The next character that is not white space; '' at the end of the file."""
        while True:
            self.at = self.skip_white_space(self.text, self.at).end()
            if self.at < len(self.text) or not self.refill(ARRAY_PIECE):
                return self.text[self.at : self.at + 1]

    def take(self, expected):
        """Step over the next character, which is one of those expected, and return it."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"Expecting '{expected[0]}' delimiter", self.at)
        self.at += 1
        return found

    def take_value(self):
        """Step over the next JSON value and return its text."""
        self.peek()
        while True:
            try:
                end, error = self.read_value(self.text, self.at)[1], None
            except json.JSONDecodeError as caught:
                end, error = len(self.text), caught
            except (ValueError, RecursionError) as caught:
                where = f"in the value that begins at line {self.line_of(self.at)}"
                reason = f"not a JSON array ({caught} {where}): give rows of plain strings"
                raise ValueError(f"{self.path}: {reason}") from None
            # Where the piece ends inside a value, the value looks broken: read on and look again, each time at twice
            # as much, so that a long row is not looked at too often.
            rest = len(self.text) - self.at
            if end < len(self.text) or rest > MAX_ROW or not self.refill(max(ARRAY_PIECE, rest)):
                break
        if error is not None:
            too_long = f", or a row of more than {MAX_ROW:,} bytes" if rest > MAX_ROW else ""
            raise self.error(error.msg + too_long, error.pos)
        start, self.at = self.at, end
        return self.text[start:end]

    def line_of(self, position):
        """Number of the line in which the character stands."""
        return self.num_lines + self.text.count("\n", 0, position) + 1

    def error(self, message, position):
        """The error for a character that JSON does not allow where it stands."""
        return ValueError(f"{self.path}:{self.line_of(position)}: not a JSON array ({message}): mend this line")

    def not_utf_8(self):
        """The error for bytes that are not UTF-8; the file is read again, in pieces, to find their line."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        line, size = 1, 0  # size: bytes of the line that have been read
        with open_rows(self.path) as file:
            for piece in itertools.chain(iter(functools.partial(file.readline, ARRAY_PIECE), b""), [b""]):
                size += len(piece)
                try:
                    decoder.decode(piece, final=not piece)
                except UnicodeDecodeError as error:
                    return not_utf_8(f"{self.path}:{line}", error, size - len(error.object))
                if piece.endswith(b"\n"):
                    line, size = line + 1, 0
        raise AssertionError(f"{self.path} has changed while it was read")


def decode_line(line, place):
    """UTF-8 text of bytes; ValueError with the place otherwise."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf_8(place, error) from None


def not_utf_8(place, error, column=0):
    """The error for bytes that are not UTF-8; `column` is the place in the line of the first that were decoded."""
    reason = f"{error.reason} at byte {column + error.start} of the line"
    return ValueError(f"{place}: not UTF-8 ({reason}): save the file as UTF-8")


def read_rows(paths, columns, need_response=True, bad_rows=None):
    """Yield {"query", "answer", "place"} of every row; ValueError with file:line for the first that is not one.

    A row is an object with string fields; the answer must not be empty where it is needed. bad_rows: a list for the
    messages of what is not a row, which is then left out.
    """
    num_rows = 0
    for path in data_files(paths):
        for _, row in check_items(read_file(path), columns, need_response, bad_rows):
            yield row
            num_rows += 1
    if not num_rows:
        raise no_row(paths)


def no_row(paths):
    """The error for files without rows."""
    return ValueError(f"{' '.join(paths)}: no row in it: give at least one")


def check_items(part, columns, need_response=True, bad_rows=None):
    """Yield (number, checked row) of the items of a Part.

    bad_rows: a list for the messages of the rows that are not right; without it the first of them is raised. What
    ended the reading of a file is raised in any case.
    """
    for number, item in enumerate(part.items, part.first):
        if isinstance(item, ValueError):
            raise item
        try:
            row = check_item(item, place_of(part.path, part.is_array, number), columns, need_response)
        except ValueError as error:
            if bad_rows is None:
                raise
            bad_rows.append(str(error))
            continue
        if row is not None:
            yield number, row


def check_item(item, place, columns, need_response):
    """The checked row of a line, or of a value in an array; None for white space, which is no row."""
    if len(item) > MAX_ROW:
        raise ValueError(
            f"{place}: a row of more than {MAX_ROW:,} bytes: give each row a line of its own, or shorten it"
        )
    text = decode_line(item, place)
    return check_row(parse_line(text, place), place, columns, need_response) if text.strip() else None


def json_type(value):
    """What JSON calls the value, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_row(row, place, columns, need_response):
    """One checked row."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {json_type(row)}, not an object: a row is {{...}} with string fields")
    sources, answer = columns.sources, row.get(columns.response)
    has_answer = need_response or isinstance(answer, str)
    for name in (*sources, columns.response) if has_answer else sources:
        if name not in row:
            raise ValueError(
                f"{place}: no field {name!r} (it has {', '.join(map(repr, row))[:200] or 'none'}):"
                " add it, or name yours with --prompt_column and --response_column"
            )
        if not isinstance(row[name], str):
            raise ValueError(f"{place}: field {name!r} is {json_type(row[name])}: it must be a string")
        try:
            encoded = row[name].encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{place}: field {name!r} holds half a surrogate pair: it must be valid text") from None
        if 0 in encoded:
            raise ValueError(f"{place}: field {name!r} holds a NUL character: it must be text: remove it")
    query = "".join([row[name] for name in sources])
    if not query.strip():
        raise ValueError(f"{place}: {' and '.join(sources)} empty: a row needs a question")
    if need_response and not answer.strip():
        raise ValueError(f"{place}: field {columns.response!r} is empty: a row needs an answer to learn")
    return {"query": query, "answer": answer if has_answer else None, "place": place}


def encode_row(query, answer, tokenizer, prompt, max_len, max_src_len):
    """One training row as ids, with what was cut.

    Returns input_ids (at most max_len), num_unlabelled (positions before the first label), and the numbers of
    source and answer ids that found no room. The id that ends the answer is never cut. `prompt` is the family's
    prompt module.
    """
    prompt_ids, source_cut = prompt.encode_prompt(tokenizer, query, max_src_len=max_src_len)
    answer_ids = prompt.encode_answer(tokenizer, answer)
    room = max_len - len(prompt_ids) - 1
    answer_cut = max(0, len(answer_ids) - room)
    input_ids = prompt_ids + answer_ids[: len(answer_ids) - answer_cut] + prompt.stop_ids(tokenizer)[:1]
    return {
        "input_ids": input_ids,
        "num_unlabelled": len(prompt_ids) - prompt.SUPERVISED_PROMPT_IDS,
        "source_cut": source_cut,
        "answer_cut": answer_cut,
    }


def show_row(row, tokenizer):
    """The first row as the model sees it: `【` before the supervised part and `】` behind it."""
    ids, start = [int(token_id) for token_id in row["input_ids"]], row["num_unlabelled"]
    prompt, supervised = (text_with_control_tokens(part, tokenizer) for part in (ids[:start], ids[start:]))
    return f"first row ({len(ids)} tokens): {prompt}【{supervised}】"


def text_with_control_tokens(ids, tokenizer):
    """Decoded text in which control tokens stand by name; decoding alone drops some of them, such as `</s>`."""
    text, run = "", []
    for token_id in ids:
        name = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in tokenizer.control_ids and tokenizer.piece_text(name) == name:  # and not white space
            text += tokenizer.decode(run) + name
            run = []
        else:
            run.append(token_id)
    return text + tokenizer.decode(run)
