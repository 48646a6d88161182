"""The door of every command: how it begins, and what is said when it ends early.

A command imports this first, before what takes time to import: from then on Ctrl-C ends it with one line. While it
works, a terminal that closes (SIGHUP) and SIGTERM do the same: all three are a KeyboardInterrupt on their way out, so
that what is half written goes.
"""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from runtime.exits import EXIT_SIGNAL, EXIT_UNREAD, ending

SAID = {signal.SIGINT: "stopped", signal.SIGHUP: "stopped: the terminal has gone", signal.SIGTERM: "stopped by SIGTERM"}
ended_by = []  # SIGHUP or SIGTERM, from when it has come


def program() -> str:
    """The command's name, as its messages begin."""
    return os.path.basename(sys.argv[0])


def on_signal(number: Any, frame: Any) -> None:
    """SIGHUP and SIGTERM as Ctrl-C; once is enough: a launcher sends several."""
    if not ended_by:
        ended_by.append(number)
        raise KeyboardInterrupt


def stopped(interrupt: Any) -> NoReturn:
    """End at once after a signal, in one line. The usual way out would wait for threads that are at work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
    from runtime.ranks import is_main

    number = (ended_by or [signal.SIGINT])[0]
    if is_main():
        words = ": ".join([program(), SAID[number], *map(str, interrupt.args)])
        try:
            print("", words, sep="\n", file=sys.stderr)
        except OSError:
            pass  # the terminal has gone
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # its reader has gone
    os._exit(EXIT_SIGNAL + number)


def on_error(kind: Any, error: BaseException, trace: Any) -> None:
    """In place of `sys.excepthook`: a line for Ctrl-C, the traceback for all else."""
    if issubclass(kind, KeyboardInterrupt):
        stopped(error)
    sys.__excepthook__(kind, error, trace)


def prepare_streams() -> None:
    """What a terminal cannot show is written as `\\u6c34`, what it would obey as `\\x1b`; what it sends in another
    encoding is read as U+FFFD.

    None of it ends a command. A terminal that calls itself ASCII is read as UTF-8, which it is a part of. A stream that
    the parent has closed takes everything.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    from runtime.streams import PlainStream

    for name, kept in (("stdout", ""), ("stderr", "\r")):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # not where a test or another program has put something else in its place
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream, kept))
    if hasattr(sys.stdin, "reconfigure"):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def outlive_terminal() -> None:
    """Leave out what is written to a terminal that has gone: who lets SIGHUP be ignored wants the command done."""
    from runtime.streams import TolerantStream

    for name in ("stdout", "stderr"):
        if getattr(sys, name).isatty():
            setattr(sys, name, TolerantStream(getattr(sys, name), errno.EIO))


def listen(handler: Callable, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)) -> dict:
    """Let `handler` hear these signals, but for those that the parent ignores (nohup, a shell's background).

    Returns what heard them before: {number: handler}, for `listen_as_before`.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def listen_as_before(handlers: dict) -> None:
    """The inverse of `listen`."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def discard_output() -> None:
    """What standard output still holds cannot be written, and ending must not try it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run(main: Callable) -> None:
    """Run `main(argv)` and end with the exit code that it returns; what the user can fix is one line (`ending`)."""
    prepare_streams()
    outlive_terminal()
    ended_by.clear()
    before = listen(on_signal, (signal.SIGTERM, signal.SIGHUP))
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            listen_as_before(before)
            sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # who reads has seen enough, as `head` has: no error of ours
        discard_output()
        sys.exit(EXIT_UNREAD)
    except KeyboardInterrupt as interrupt:
        stopped(interrupt)
    except Exception as error:
        if not (end := ending(error)):
            raise
        if isinstance(error, OSError):  # perhaps of standard output itself, which would be tried again at the end
            discard_output()
        from runtime.exits import fail

        fail(end[0], code=end[1])


sys.excepthook = on_error
