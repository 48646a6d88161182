"""A conversation on the terminal: lines are edited, kept while it lasts, and what is typed wrongly does not end it."""

from __future__ import annotations

import codecs
import locale
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from runtime import entry

# isort: split
from runtime.entry import listen, listen_as_before


def prepare_terminal() -> None:
    """Let lines be edited, with those before them at hand, where somebody types. Needs no line editor to go on.

    The editor moves and deletes by whole characters only where the locale says that they are UTF-8, as Python does.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    is_utf8 = codecs.lookup(sys.stdin.encoding).name == "utf-8"
    if is_utf8 and "utf" not in locale.nl_langinfo(locale.CODESET).lower():
        os.environ["LC_ALL"] = "C.UTF-8"
    try:
        import readline
    except ImportError:  # a Python that was built without it
        return
    for setting in ("input-meta on", "output-meta on", "convert-meta off"):  # bytes above 127 are no commands
        readline.parse_and_bind(f"set {setting}")


class LineDroppedError(Exception):
    """Ctrl-C on a line that something stands on."""


def on_interrupt(number: Any, frame: Any) -> NoReturn:
    """Ctrl-C at the prompt: only the line editor knows what has been typed, and only now."""
    readline = sys.modules.get("readline")
    raise LineDroppedError if readline and readline.get_line_buffer() else KeyboardInterrupt


def read_line() -> str | None:
    """The next question; None at the end: an empty line or Ctrl-D. Ctrl-C drops what was typed, or is raised."""
    while True:
        before = listen(on_interrupt, [signal.SIGINT])
        try:
            return input("> ").strip() or None
        except EOFError:
            print()
            return None
        except LineDroppedError:
            print()
        finally:
            listen_as_before(before)


def talk(answer: Any) -> None:
    """Ask and answer until the end; earlier turns are part of the prompt. Ctrl-C ends an answer, not the talk.

    answer: an `Answerer`.
    """
    history = []
    prepare_terminal()
    print("empty line: end; /clear: forget; Ctrl-C: stop an answer")
    while query := read_line():
        if query == "/clear":
            history = []
            continue
        encoded = answer.prompt_ids(query, history)
        if lost := describe_lost(answer, query, history, encoded):
            print(lost)
        try:
            text = answer([encoded])[0]["predictions"][0]
        except KeyboardInterrupt:
            if entry.ended_by:  # not Ctrl-C
                raise
            print("\n(stopped)")
            continue
        print(text)
        history.append((query, text))


def describe_lost(answer: Any, query: str, history: Sequence, encoded: Any) -> str:
    """What of a conversation found no room in its prompt, `encoded`, as a line; '' where all did."""
    num_left_out = 0
    while num_left_out < len(history) and answer.prompt_ids(query, history[num_left_out + 1 :]) == encoded:
        num_left_out += 1
    lost = ["the oldest turn" if num_left_out == 1 else f"the {num_left_out} oldest turns"] * (num_left_out > 0)
    lost += [f"{encoded[1]} tokens of the question"] * (encoded[1] > 0)
    return f"(no room in --max_src_len {answer.max_src_len} for {' and '.join(lost)})" if lost else ""
