"""How commands end: the exit codes, what the user can fix, and what ends a run whose numbers went bad."""

import errno
import os

EXIT_WRONG_INPUT = 2  # a `UserError`: one line says what to change
EXIT_BAD_NUMBERS = 3  # a loss or gradients that are not finite
EXIT_STALLED = 4  # --step_timeout
EXIT_LEFT = 75  # asked to leave, and everything is saved: start again with --resume auto (EX_TEMPFAIL of sysexits.h)
EXIT_STOPPED, EXIT_UNREAD = 130, 141  # Ctrl-C, and a pipe whose reader has gone, as shells count them


class UserError(ValueError):
    """What the user can fix: one line with the flag or file:line, the value, the rule and the fix.

    Every other exception is a fault of this program: it keeps its traceback and ends with exit code 1.
    """


class BadNumbers(Exception):
    """The run cannot go on, its numbers are not finite. The message is for the user."""


FIXES = {  # errors of the machine, which no program can foresee and its user can mend
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


def told(error: BaseException) -> str | None:
    """What the user is told of an error, in one line; None for a fault of this program, which keeps its traceback."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in FIXES:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{place}{error.strerror or os.strerror(error.errno)}: {FIXES[error.errno]}"
    return None
