"""How commands end: the exit codes, what the user can fix, and what ends a run whose numbers went bad."""

EXIT_WRONG_INPUT = 2  # a `UserError`: one line says what to change
EXIT_BAD_NUMBERS = 3  # a loss or gradients that are not finite
EXIT_STALLED = 4  # --step_timeout
EXIT_GONE = 5  # a `FolderGone`: the folder that a command wrote into has gone
EXIT_LEFT = 75  # asked to leave, and everything is saved: start again with --resume auto (EX_TEMPFAIL of sysexits.h)
EXIT_SIGNAL = 128  # and the signal's number, as shells count: Ctrl-C is 130, a terminal that closes 129, SIGTERM 143
EXIT_UNREAD = 141  # a pipe whose reader has gone


class UserError(ValueError):
    """What the user can fix: one line with the flag or file:line, the value, the rule and the fix.

    Every other exception is a fault of this program: it keeps its traceback and ends with exit code 1.
    """


class BadNumbers(Exception):
    """The run cannot go on, its numbers are not finite. The message is for the user."""


class FolderGone(Exception):
    """What a command writes into was removed or renamed meanwhile. The message is for the user."""
