"""Files that are something else than what a flag asks for: recognised by their first bytes, named, with what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from runtime.plain_files import open_plain

HEAD_BYTES = 4096  # of a file, in which its kind shows
TO_JSON_LINES = 'to_json("rows.jsonl", orient="records", lines=True, force_ascii=False)'


class Kind(NamedTuple):
    """What a file is and what its owner can do; recognised by its first bytes or by the end of its name."""

    what: str
    next_step: str
    is_head: Callable[[bytes], object]
    endings: tuple[str, ...] = ()


def starts_with(*starts: bytes) -> Callable[[bytes], bool]:
    """A test of the first bytes of a file."""
    return lambda head: head.startswith(starts)


def from_pandas(function: str) -> str:
    """How a table becomes rows."""
    return f"convert it to JSON Lines, with pandas for example: pandas.{function}(FILE).{TO_JSON_LINES}"


is_page = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)\b", re.IGNORECASE).match
is_header = re.compile(r"""\ufeff?(["']?)[^\W\d][\w .-]*\1([,;\t]\1[^\W\d][\w .-]*\1)+\r?(\n|\Z)""").match


def is_table(head: bytes) -> re.Match | None:
    """Is the first line two or more names with separators? A row of JSON Lines begins with a brace."""
    return is_header(head.decode("utf-8", "ignore"))


def is_weights(head: bytes) -> bool:
    """Does it begin as torch.save or safetensors write it?"""
    is_torch = head.startswith(b"PK\x03\x04") and b"/data.pkl" in head[:300]
    return is_torch or (head[8:10] == b'{"' and head[5:8] == bytes(3))


def is_json(head: bytes) -> bool:
    """Does it begin as rows do? Then the name of the file does not matter."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


KINDS = {  # the first that fits
    "lfs": Kind(
        "a Git LFS pointer, which only names the file",
        "fetch the file itself with git lfs pull, or download it",
        starts_with(b"version https://git-lfs"),
    ),
    "page": Kind("a web page", "download the file itself, not the page that shows it", is_page),
    "xlsx": Kind(
        "an Excel workbook",
        from_pandas("read_excel"),
        lambda head: head.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in head,
        (".xlsx", ".xls"),
    ),
    "parquet": Kind("a Parquet file", from_pandas("read_parquet"), starts_with(b"PAR1"), (".parquet",)),
    "arrow": Kind("an Arrow file", from_pandas("read_feather"), starts_with(b"ARROW1"), (".arrow", ".feather")),
    "weights": Kind("a file of weights", "give what the flag is for: weights lie in a checkpoint folder", is_weights),
    "zip": Kind("a zip archive", "unpack it first", starts_with(b"PK\x03\x04", b"PK\x05\x06")),
    "gzip": Kind("a gzip archive", "unpack it first", starts_with(b"\x1f\x8b")),
    "archive": Kind(
        "a compressed archive",
        "unpack it first",
        starts_with(b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!"),
    ),
    "csv": Kind("a table with separators (CSV)", from_pandas("read_csv"), is_table, (".csv", ".tsv")),
}
BROUGHT_ELSE = ("lfs", "page", "zip", "gzip", "archive")  # what a download brings in place of a file, or around it


def kind_of(path: str) -> str | None:
    """The name in KINDS of what a file is; None where it is none of them. OSError where it cannot be read."""
    with open_plain(path) as file:
        head = file.read(HEAD_BYTES)
    for name, kind in KINDS.items():
        if kind.is_head(head) or (str(path).lower().endswith(kind.endings) and not is_json(head)):
            return name
    return None


def explain(path: str, kinds: Any = KINDS) -> str | None:
    """'is WHAT: NEXT STEP' of a file that is one of `kinds`, names in KINDS; None where it is none of them."""
    name = kind_of(path)
    return f"is {KINDS[name].what}: {KINDS[name].next_step}" if name in kinds else None
