"""How commands end: the exit codes, what the user can fix, and what ends a run whose numbers went bad."""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import NoReturn

from runtime.ranks import is_main, rank
from runtime.streams import shortened, visible

EXIT_WRONG_INPUT = 2  # a `UserError`: one line says what to change
EXIT_BAD_NUMBERS = 3  # a loss or gradients that are not finite
EXIT_STALLED = 4  # --step_timeout, --start_timeout
EXIT_GONE = 5  # a `FolderGoneError`: the folder that a command wrote into has gone
EXIT_LEFT = 75  # asked to leave, and everything is saved: start again with --resume auto (EX_TEMPFAIL of sysexits.h)
EXIT_SIGNAL = 128  # and the signal's number, as shells count: Ctrl-C is 130, a terminal that closes 129, SIGTERM 143
EXIT_UNREAD = 141  # a pipe whose reader has gone


class UserError(ValueError):
    """What the user can fix: one line with the flag or file:line, the value, the rule and the fix.

    Every other exception is a fault of this program: it keeps its traceback and ends with exit code 1.
    """

    code = EXIT_WRONG_INPUT


class BadNumbersError(Exception):
    """The run cannot go on, its numbers are not finite. The message is for the user."""

    code = EXIT_BAD_NUMBERS


class FolderGoneError(Exception):
    """What a command writes into was removed or renamed meanwhile. The message is for the user."""

    code = EXIT_GONE


class NotStartedError(Exception):
    """The processes of a run did not come together. The message is for the user; `code`: the exit code."""

    def __init__(self, message: str, code: int = EXIT_STALLED) -> None:
        super().__init__(message)
        self.code = code


FIXES = {  # errors of the machine, which no program can foresee and its user can fix
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room and start again",
    errno.EFBIG: "choose a place that takes larger files",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EIO: "look at the disk (dmesg), or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
}


def ending(error: BaseException) -> tuple[str, int] | None:
    """(what the user is told in one line, exit code) of an error; None for a fault of this program."""
    if isinstance(error, UserError | BadNumbersError | FolderGoneError | NotStartedError):
        return " ".join(str(error).split()), error.code
    if isinstance(error, OSError) and error.errno in FIXES:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{place}{error.strerror or os.strerror(error.errno)}: {FIXES[error.errno]}", EXIT_WRONG_INPUT
    return None


def fail(problems: str | list[str], prog: str | None = None, code: int = EXIT_WRONG_INPUT) -> NoReturn:
    """End the program with an exit code and a line for each problem (a message or a list of them).

    All ranks usually find the same: the first one speaks. Another waits until the launcher has ended it, and speaks
    only if the fault is its own.
    """
    prog = prog or os.path.basename(sys.argv[0])
    if not is_main():
        time.sleep(5)
        prog = f"{prog}: rank {rank()}"
    for problem in [problems] if isinstance(problems, str) else problems:
        print(f"{prog}: error: {shortened(visible(problem))}", file=sys.stderr, flush=True)
    sys.exit(code)
