"""Files as users and strangers give them: only regular ones are opened, and JSON is read within limits."""

from __future__ import annotations

import collections
import json
import os
import stat
from typing import Any, BinaryIO

from runtime.exits import UserError

MOST_JSON_BYTES = 32 << 20  # of a file that is read whole; an index of a network here has some ten thousand
MOST_DIGITS = 100  # of a whole number; libraries write 10**30 for "without limit"
MOST_SHOWN = 60  # characters of a value in a message
OTHER_KINDS = (  # test of a mode, what it is
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def other_kind(path: str) -> str | None:
    """What a path is, links followed, where it is no regular file; None also where nothing is there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return next((what for is_kind, what in OTHER_KINDS if is_kind(mode)), None)


def open_plain(path: str) -> BinaryIO:
    """A regular file's bytes. UserError, at once, for what could be waited for or read without end; OSError."""
    if what := other_kind(path):
        raise UserError(f"{path}: is {what}, not a file: write its contents to a file and name that")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may have become a pipe since
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: is not a regular file: write its contents to a file and name that")
    return os.fdopen(handle, "rb")


class DuplicateKeyError(ValueError):
    """A key that stands twice in an object."""


def make_object(pairs: Any) -> dict:
    """The object of (key, value) pairs; json alone would keep the last of two values and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKeyError(collections.Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def whole_number(text: str) -> int:
    """The number of a JSON text; ValueError for more digits than any number here has."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError, or RecursionError for brackets by the thousand."""
    try:
        return json.loads(text, object_pairs_hook=make_object, parse_int=whole_number)
    except DuplicateKeyError as error:
        raise ValueError(f"key {shown(str(error))} stands twice") from None


def read_json_text(path: str) -> str:
    """The text of a JSON file; UserError for one that is too large, OSError, ValueError."""
    with open_plain(path) as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise UserError(f"{path}: is larger than {MOST_JSON_BYTES:,} bytes, which no such file is: download it again")
    return content.decode("utf-8-sig")


def shown(value: Any) -> str:
    """A value of a stranger's file, short enough for a message."""
    text = repr(value[: 2 * MOST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
