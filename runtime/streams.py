"""What is written to a terminal: harmless, lasting, and bars that show how far a command is."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

BLANKS = "\n\t\xa0\u3000"  # not printable, but no harm to a terminal
# What a terminal obeys: control characters but for tab and line end, and marks that turn the direction of writing.
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MOST_MESSAGE = 2000  # characters of an error


def shortened(text: str) -> str:
    """A message that a terminal can show: of one that a stranger's value makes too long, the beginning and the fix."""
    return text if len(text) <= MOST_MESSAGE else f"{text[: MOST_MESSAGE - 300]} ... {text[-300:]}"


def visible(text: Any, as_lines: bool = False) -> str:
    """A text on one line, with the characters that a terminal would obey, or nobody would see, spelled out.

    as_lines: keep the line ends, and the blanks that are harmless.
    """
    text, kept = (str(text), BLANKS) if as_lines else (" ".join(str(text).splitlines()), "")
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


class OtherStream:
    """A stream that writes otherwise than the one that it stands for, and is as that one in all else."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)


class PlainStream(OtherStream):
    """A stream on which no text makes a terminal do something: what it would obey is spelled out, as `\\x1b`.

    kept: what is written as it is nevertheless; a progress bar goes back to the line's begin.
    """

    def __init__(self, stream: Any, kept: str = "") -> None:
        super().__init__(stream)
        self.kept = kept

    def write(self, text: str) -> int:
        self.stream.write(OBEYED.sub(lambda match: match[0] if match[0] in self.kept else repr(match[0])[1:-1], text))
        return len(text)


class TolerantStream(OtherStream):
    """A stream for a long run: what cannot be written (a full disk, a pipe whose reader has gone) is left out.

    only: the one error number for which it is; None: all.
    """

    def __init__(self, stream: Any, only: int | None = None) -> None:
        super().__init__(stream)
        self.only = only

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Let an error pass."""
        try:
            yield
        except OSError as error:
            if self.only not in (None, error.errno):
                raise

    def write(self, text: str) -> int:
        with self.trying():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.trying():
            self.stream.flush()


def progress_bar(*rows: Any, **how: Any) -> Any:
    """A bar of tqdm that goes by a clock which nobody sets: no speed is negative, and none has no end."""
    import tqdm.std

    tqdm.std.time = time.monotonic  # each bar takes it from there when it begins
    tqdm._monitor.time = time.monotonic
    return tqdm.tqdm(*rows, **how)


def size_text(num_bytes: float) -> str:
    """Bytes for a reader: 16.2 KB, 12.4 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
