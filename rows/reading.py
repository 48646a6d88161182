"""Files of rows: found, read as JSON in its many shapes, checked row by row."""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rows.checks import Columns, Notes, Number, check_row, wrapped
from runtime import file_kinds
from runtime.exits import UserError
from runtime.plain_files import DuplicateKeyError, make_object, open_plain, other_kind

BOM = b"\xef\xbb\xbf"
ARRAY_PIECE = 1 << 20  # characters of a JSON text that are read at a time
MAX_ROW = 1 << 24  # bytes of a row at most: to encode one takes about fifty times its size in memory


ROW_FILES = (".json", ".jsonl")
OTHER_FILES = (  # endings of files that may hold rows and are not read
    *(".ndjson", ".csv", ".tsv", ".txt", ".xlsx", ".xls", ".parquet", ".arrow", ".feather", ".yaml", ".yml"),
    *(".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"),
)


def data_files(paths: list[str]) -> list[str]:
    """Files behind `--train_path`: files as given, folders as their *.json and *.jsonl, sorted."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            inside = [os.path.join(path, name) for name in names_in(path) if name.endswith(ROW_FILES)]
            inside = [file for file in inside if os.path.isfile(file)]
            if not inside:
                found = "; ".join(files_left([path])) or "put rows there or name a file"
                raise UserError(f"{path}: no *.json or *.jsonl file in this folder: {found}")
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        elif what := other_kind(path):
            raise UserError(f"{path}: is {what}: rows are read more than once: write them to a file and name that")
        else:
            raise UserError(f"{path}: no such file or folder: check the path")
    return files


def names_in(folder: str) -> list[str]:
    """Names of what lies in a folder and is not hidden, sorted."""
    return [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]


def files_left(paths: list[str]) -> list[str]:
    """Of each folder among the paths a sentence about what may hold rows in it and is not read; none where all is."""
    said = []
    for folder in filter(os.path.isdir, paths):
        names = []
        for name in names_in(folder):
            is_folder = os.path.isdir(os.path.join(folder, name))
            if is_folder or (name.lower().endswith((*ROW_FILES, *OTHER_FILES)) and not name.endswith(ROW_FILES)):
                names.append(name + "/" * is_folder)
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
            said.append(f"in {folder} only *.json and *.jsonl are read, not {shown}")
    return said


class Part(NamedTuple):
    """Consecutive rows of a file: of lines, or of the JSON array in it."""

    path: str
    is_array: bool
    items: Iterable  # (number, bytes); the last may be (0, the UserError that ended the reading)


def place_of(path: str, is_array: bool, number: int) -> str:
    """How messages name a line, or a row of an array: both are counted from 1."""
    if is_array:
        return f"{path}:row {number}"
    position, line = divmod(number, 1 << 32)
    return f"{path}:{line} (object {position + 1})" if position else f"{path}:{line}"


def number_of(line: int, position: int) -> int:
    """The number that stands for an object of a line, which may hold several; `position` counts them from 0."""
    return line + (position << 32)


def read_file(path: str) -> Part:
    """The whole file as a Part whose items are read when they are asked for.

    It holds JSON Lines, one JSON array, or JSON objects one after another over any number of lines.
    """
    with open_rows(path) as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
    if what := file_kinds.explain(path):
        raise UserError(f"{path}: {what}")
    if head.startswith(b"["):
        return Part(path, True, read_array(path))
    return Part(path, False, read_objects(path) if spans_lines(path) else read_lines(path))


def spans_lines(path: str) -> bool:
    """Does the first object of a file go on in the next line, or stand before others in its line?"""
    lines = (line.strip() for _, line in read_lines(path) if line.strip())
    first, second = next(lines, b""), next(lines, b"")
    if first == b"{":  # also where the object is broken, which its own line says best
        return second.startswith((b'"', b"'", b"}"))
    if not first.startswith(b"{"):
        return False
    with open_rows(path) as file:
        text = JsonText(path, file)
        try:
            text.peek()
            line = text.line_of(text.at)
            text.take_value()
            last = text.line_of(text.at)
            return last > line or (text.peek() == "{" and text.line_of(text.at) == last)
        except ValueError:
            return False


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line): it may be empty or anything but JSON; of one that is over MAX_ROW only the start."""
    with open_rows(path) as file:
        start = file.read(len(BOM))
        file.seek(len(start) if start == BOM else 0)
        read = functools.partial(file.readline, MAX_ROW + 1)
        for number, line in enumerate(iter(read, b""), start=1):
            rest = line
            while len(rest) > MAX_ROW and not rest.endswith(b"\n"):
                rest = read()
            yield number, line


def open_rows(path: str) -> Any:
    """The file's bytes; UserError where it may not be read."""
    try:
        return open_plain(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None


read_json = json.JSONDecoder(object_pairs_hook=make_object, parse_int=Number, parse_float=Number).raw_decode
skip_white_space = re.compile(r"[ \t\r\n]*").match


def parse_line(text: str, place: str) -> Any:
    """The JSON values of a line: one, or several objects one after another."""
    values, end = [], skip_white_space(text).end()
    try:
        while not values or text.startswith("{", end):
            value, end = read_json(text, end)
            values.append(value)
            end = skip_white_space(text, end).end()
        if end == len(text):
            return values
        reason, at = f"Extra data at column {end + 1}", end
    except DuplicateKeyError as error:
        key = repr(str(error)[:60])
        raise UserError(f"{place}: field {key} stands twice: a row has a field once: remove one of them") from None
    except json.JSONDecodeError as error:
        reason, at = f"{error.msg.removesuffix(' at')} at column {error.colno}", error.pos
    except (ValueError, RecursionError) as error:  # thousands of brackets
        reason, at = str(error), 0
    fix = advice(text, at) or "fix or remove it"
    if at >= len(text.rstrip()):
        fix = "fix it, or write each row in one line (jq -c . FILE > rows.jsonl)"
    raise UserError(f"{place}: {text.strip()[:60]!r}: not a JSON object ({reason}): {fix}")


def advice(text: str, at: int) -> str | None:
    """What to do about a text that is no JSON from a character on, where its fault is a usual one; else None."""
    before, behind = text[:at].rstrip(), text[at : at + 100].lstrip()
    if behind.startswith(("'", "None", "True", "False")):
        return "it is a Python dict: write rows with json.dumps"
    if behind.startswith(("}", "]")) and before.endswith(","):
        return f"remove the comma before {behind[0]}"
    if behind.startswith(",") and behind[1:].lstrip()[:1] in ("}", "]"):
        return "remove the comma"
    if behind.startswith(",") and before.endswith("}"):
        return "remove the comma behind the object, or put [ ] around all rows"
    return None


def read_array(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of one JSON array, as JSON text in bytes; a piece of the file is in memory at a time."""
    with open_rows(path) as file:
        text = JsonText(path, file, "array")
        text.take("[")
        separator = text.take("]") if text.peek() == "]" else ","
        for number in itertools.count(1):
            if separator != ",":
                break
            yield number, text.take_value().encode()
            separator = text.take(",]")
        if text.peek():
            raise text.error("Extra data", text.at)


def read_objects(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of JSON values one after another, as `read_array` does."""
    line, position = 0, 0
    with open_rows(path) as file:
        text = JsonText(path, file)
        while text.peek():
            start = text.line_of(text.at)
            line, position = start, position + 1 if start == line else 0
            yield number_of(line, position), text.take_value().encode()


class JsonText:
    """The text of a file with JSON values: a piece of it, and the place that is reached. what: an array or objects."""

    read_value = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode

    def __init__(self, path: str, file: Any, what: str = "object") -> None:
        self.path, self.what = path, what
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self.text, self.at = "", 0
        self.num_lines, self.counted = 0, 0  # lines before the character `counted`

    def refill(self, size: int) -> Any:
        """Drop what has been read and add `size` characters; False, and nothing changes, at the end of the file."""
        try:
            piece = self.file.read(size)
        except UnicodeDecodeError:
            raise self.not_utf_8() from None
        if not piece:
            return False
        self.line_of(self.at)
        self.text, self.at, self.counted = self.text[self.at :] + piece, 0, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; '' at the end of the file."""
        while True:
            self.at = skip_white_space(self.text, self.at).end()
            if self.at < len(self.text) or not self.refill(ARRAY_PIECE):
                return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> Any:
        """Step over the next character, which is one of those expected, and return it."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"Expecting '{expected[0]}' delimiter", self.at)
        self.at += 1
        return found

    def take_value(self) -> str:
        """Step over the next JSON value and return its text."""
        self.peek()
        while True:
            try:
                end, error = self.read_value(self.text, self.at)[1], None
            except json.JSONDecodeError as caught:
                end, error = len(self.text), caught
            except (ValueError, RecursionError) as caught:
                where = f"in the value that begins at line {self.line_of(self.at)}"
                reason = f"not a JSON {self.what} ({caught} {where}): give rows of plain strings"
                raise UserError(f"{self.path}: {reason}") from None
            # Where the piece ends inside a value, the value looks broken: read on and look again, each time at twice
            # as much, so that a long row is not looked at too often.
            rest = len(self.text) - self.at
            if end < len(self.text) or rest > MAX_ROW or not self.refill(max(ARRAY_PIECE, rest)):
                break
        if error is not None:
            if rest > MAX_ROW and (key := wrapping_key(self.text[self.at : self.at + 4096])):
                raise wrapped(f"{self.path}:{self.line_of(self.at)}", key)
            too_long = f", or a row of more than {MAX_ROW:,} bytes" if rest > MAX_ROW else ""
            raise self.error(error.msg + too_long, error.pos)
        start, self.at = self.at, end
        return self.text[start:end]

    def line_of(self, position: int) -> int:
        """Number of the line in which a character stands that is not before the last one asked about."""
        self.num_lines += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.num_lines + 1

    def error(self, message: str, position: int) -> UserError:
        """The error for a character that JSON does not allow where it stands."""
        fix = advice(self.text, position) or "fix this line"
        return UserError(f"{self.path}:{self.line_of(position)}: not a JSON {self.what} ({message}): {fix}")

    def not_utf_8(self) -> UserError:
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


def decode_line(line: bytes, place: str) -> str:
    """UTF-8 text of bytes; UserError with the place otherwise."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf_8(place, error) from None


def not_utf_8(place: str, error: UnicodeDecodeError, column: int = 0) -> UserError:
    """The error for bytes that are not UTF-8; `column` is the place in the line of the first that were decoded."""
    reason = f"{error.reason} at byte {column + error.start} of the line"
    return UserError(f"{place}: not UTF-8 ({reason}): save the file as UTF-8")


def read_rows(
    paths: list[str],
    columns: Columns,
    need_response: bool = True,
    bad_rows: list[str] | None = None,
    notes: Notes | None = None,
) -> Iterator[dict]:
    """Yield {"query", "answer", "place", "joint"} of every row, see `check_row`; UserError for the first that is bad.

    A row is an object with string fields; the answer must not be empty where it is needed. bad_rows: a list for the
    messages of what is not a row, which is then left out. notes: Notes that are filled while rows are read.
    """
    num_rows = 0
    for path in data_files(paths):
        for _, row in check_items(read_file(path), columns, need_response, bad_rows, notes):
            yield row
            num_rows += 1
    if not num_rows:
        raise no_row(paths)


def read_to_answer(paths: list[str], columns: Columns) -> tuple[list[dict], str]:
    """(rows to answer, as `read_rows` gives them, what there is to say about them)."""
    notes = Notes()
    rows = list(read_rows(paths, columns, need_response=False, notes=notes))
    return rows, "\n".join([*(f"rows: {left}" for left in files_left(paths)), *notes.lines()])


def read_row(paths: list[str], columns: Columns, place: str) -> dict | None:
    """The row that stands at a place, None where there is none; the rows before it may be bad."""
    rows = read_rows(paths, columns, bad_rows=[])
    return next((row for row in rows if row["place"] == place), None)


def no_row(paths: list[str]) -> UserError:
    """The error for files without rows."""
    return UserError(f"{' '.join(paths)}: no row in it: give at least one")


def check_items(
    part: Part,
    columns: Columns,
    need_response: bool = True,
    bad_rows: list[str] | None = None,
    notes: Notes | None = None,
) -> Iterator[tuple[int, dict]]:
    """Yield (number, checked row) of the items of a Part.

    bad_rows: a list for the messages of the rows that are not right; without it the first of them is raised. What
    ended the reading of a file is raised in any case.
    """
    notes = Notes() if notes is None else notes

    def leave_out(error: UserError) -> None:
        if bad_rows is None:
            raise error
        bad_rows.append(str(error))

    for number, item in part.items:
        if isinstance(item, UserError):
            raise item
        try:
            values = parse_item(item, place_of(part.path, part.is_array, number))
        except UserError as error:
            leave_out(error)
            continue
        for position, value in enumerate(values):
            place = place_of(part.path, part.is_array, number_of(number, position))
            try:
                row = check_row(value, place, columns, need_response, notes)
            except UserError as error:
                leave_out(error)
                continue
            yield number_of(number, position), row


def parse_item(item: Any, place: str) -> list:
    """The JSON values of a line, or of a value in an array; none where it is white space."""
    if len(item) > MAX_ROW:
        if key := wrapping_key(item[:4096].decode("utf-8", "ignore")):
            raise wrapped(place, key)
        raise UserError(
            f"{place}: a row of more than {MAX_ROW:,} bytes: give each row a line of its own, or shorten it"
        )
    text = decode_line(item, place)
    return parse_line(text, place) if text.strip() else []


def wrapping_key(head: str) -> str | None:
    """The key of the rows where a text begins as an object around a list of them; None elsewhere."""
    found = re.match(r'\s*\{\s*"([^"\\]+)"\s*:\s*\[\s*\{', head)
    return found[1] if found else None
