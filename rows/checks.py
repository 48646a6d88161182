"""What a row is: its fields checked, and what a run says once about the fields of all its rows."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from typing import Any

from runtime.exits import UserError
from runtime.streams import visible

MOST_NAMES = 20  # fields that are not used, by name; more are counted
CHAT = "several turns: give the last question and answer as a row"
EXAMPLE_CHARS = 20
MEDIA = "what no model here sees: leave out such rows, or the field"
PREFERENCE = "a preference, and training here has one answer: give the chosen one as the answer"

MEANINGFUL = {  # fields that other tools give a meaning to: a row that uses one would say less here than it does there
    "history": "earlier turns: put them into the question",
    "system": "a system prompt: put it in front of the question",
    **dict.fromkeys(("messages", "conversations", "conversation"), CHAT),
    **dict.fromkeys(("tools", "functions"), "tools to call: put them into the question"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "kto_tag"), PREFERENCE),
}
DATA_SET_KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}


@dataclass(frozen=True)
class Columns:
    """Names of the fields of a row; `prompt` replaces instruction + input where it is given.

    others: fields that the reader uses besides; they are passed on unchecked.
    """

    prompt: str | None = None
    response: str = "output"
    others: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Fields whose texts, put together with nothing between, are the query."""
        return (self.prompt,) if self.prompt else ("instruction", "input")

    @functools.cached_property
    def used(self) -> frozenset[str]:
        """All fields that are read."""
        return frozenset((*self.sources, self.response, *self.others))


class Number(str):
    """The text of a number, as it stands in the file: 1.0 is not 1, and 1e3 not 1000.0."""


@dataclass
class Notes:
    """What there is to say once about the rows that were read."""

    rows: int = 0
    numbers: int = 0  # fields with a number where a text is expected
    joined: int = 0  # rows whose question runs two words together
    example: str = ""  # the first of these
    unused: dict[str, int] = field(default_factory=dict)  # rows that have this field, which is not used
    others: int = 0  # fields of rows beyond MOST_NAMES

    def add(self, other: Notes) -> None:
        """Count the rows of `other`, which come behind, too."""
        self.rows += other.rows
        self.numbers += other.numbers
        self.joined += other.joined
        self.example = self.example or other.example
        self.others += other.others
        for name, num_rows in other.unused.items():
            self.count_unused(name, num_rows)

    def count_unused(self, name: str, num_rows: int = 1) -> None:
        """A field of rows that is not used."""
        if name in self.unused or len(self.unused) < MOST_NAMES:
            self.unused[name] = self.unused.get(name, 0) + num_rows
        else:
            self.others += num_rows

    def lines(self, what: str = "rows") -> list[str]:
        """The sentences; what: which rows they are about."""
        said = []
        if self.unused:
            names = [
                visible(name[:60]) + ("" if num_rows == self.rows else f" (in {num_rows:,} rows)")
                for name, num_rows in self.unused.items()
            ]
            said.append(f"fields not used: {', '.join(names)}" + " and others" * bool(self.others))
        if self.numbers:
            said.append(f"{self.numbers:,} numbers taken as text, as they are written")
        if self.joined:
            said.append(
                f"{self.joined:,} rows join instruction and input inside a word ({self.example}):"
                " end the instruction with a space or a line break"
            )
        return [f"{what}: {text}" for text in said]


def json_type(value: Any) -> str:
    """What JSON calls the value, with its article."""
    if isinstance(value, float):  # numbers are kept as they are written, so only these three are left
        return {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN") + ", which is no JSON"
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_row(row: dict, place: str, columns: Columns, need_response: bool, notes: Notes) -> dict:
    """One checked row, {"query", "answer", "place", "joint"}, and what `columns.others` names; UserError otherwise.

    joint: characters of the query that are the instruction's, 0 where there is nothing to join. notes: counts it.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: {json_type(row)}, not an object: a row is {{...}} with string fields")
    if others := row.keys() - columns.used:
        check_fields(row, place, columns)
    texts = [text_of(row, name, place, may_lack=name == "input" and not columns.prompt) for name in columns.sources]
    query = "".join(text or "" for text in texts)
    answer = text_of(row, columns.response, place, may_lack=not need_response)
    if not query.strip():
        raise UserError(f"{place}: {' and '.join(columns.sources)} empty: a row needs a question")
    if need_response and not answer.strip():
        raise UserError(f"{place}: field {columns.response!r} is empty: a row needs an answer to learn")
    notes.rows += 1
    notes.numbers += [type(row.get(name)) for name in (*columns.sources, columns.response)].count(Number)
    joint = len(texts[0]) if all(texts) and len(texts) == 2 else 0
    if joint and (word := joined_word(*texts)):
        notes.joined += 1
        notes.example = notes.example or word
    if others:
        for name in filter(others.__contains__, row):  # in the order of the file
            if name not in MEANINGFUL or not is_empty(row[name]):
                notes.count_unused(name)
    more = {name: row[name] for name in columns.others if name in row}
    return {"query": query, "answer": answer, "place": place, "joint": joint, **more}


def check_fields(row: dict, place: str, columns: Columns) -> None:
    """Does the object hold rows, files or what only other tools understand instead of a question and an answer?"""
    for name, why in MEANINGFUL.items():
        if name in row and name not in columns.used and not is_empty(row[name]):
            raise UserError(f"{place}: field {name!r} would be ignored: it holds {why}")
    if row and all(isinstance(value, dict) and DATA_SET_KEYS & value.keys() for value in row.values()):
        raise UserError(f"{place}: a list of data sets (dataset_info.json): name the files with the rows themselves")
    if not set(columns.sources) & row.keys():
        for name, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                raise wrapped(place, name)


def wrapped(place: str, name: str) -> UserError:
    """The error for an object around the rows."""
    key = f".{name}" if re.fullmatch(r"[A-Za-z_]\w{0,60}", name, re.ASCII) else f"'.[{json.dumps(name[:60])}]'"
    return UserError(
        f"{place}: one object with the rows under {name[:60]!r}: give the list itself (jq {key} FILE > rows.json)"
    )


def is_empty(value: Any) -> bool:
    """Does a field say nothing?"""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def text_of(row: dict, name: str, place: str, may_lack: bool) -> Any:
    """The text of a field; a number is its text. may_lack: absent or null is None."""
    value = row.get(name)
    if may_lack and value is None:
        return None
    if name not in row:
        raise UserError(
            f"{place}: no field {name!r} (it has {', '.join(map(repr, row))[:200] or 'none'}):"
            " add it, or name yours with --prompt_column and --response_column"
        )
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} is {json_type(value)}: it must be a string or a number")
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place}: field {name!r} holds half a surrogate pair: it must be valid text") from None
    if 0 in encoded:
        raise UserError(f"{place}: field {name!r} holds a NUL character: it must be text: remove it")
    return str(value)


def joined_word(instruction: str, text: str) -> str | None:
    """How an instruction and an input of Latin script run together, as an example; None where they do not."""
    if not (instruction[-1] + text[0]).isascii() or not (instruction[-1] + text[0]).isalnum():
        return None
    end = re.search(r"[A-Za-z0-9]+\Z", instruction[-EXAMPLE_CHARS:])
    start = re.match(r"[A-Za-z0-9]+", text[:EXAMPLE_CHARS])
    return f"{end[0]!r} + {start[0]!r} is {end[0] + start[0]!r}"
