"""How commands end: the exit codes, what the user can fix, and what ends a run whose numbers went bad."""

EXIT_WRONG_INPUT = 2  # a `UserError`: one line says what to change
EXIT_BAD_NUMBERS = 3  # a loss or gradients that are not finite
EXIT_STALLED = 4  # --step_timeout, --start_timeout
EXIT_LEFT = 75  # asked to leave, and everything is saved: start again with --resume auto (EX_TEMPFAIL of sysexits.h)
EXIT_STOPPED, EXIT_UNREAD = 130, 141  # Ctrl-C, and a pipe whose reader has gone, as shells count them


class UserError(ValueError):
    """What the user can fix: one line with the flag or file:line, the value, the rule and the fix.

    Every other exception is a fault of this program: it keeps its traceback and ends with exit code 1.
    """

    code = EXIT_WRONG_INPUT


class BadNumbers(Exception):
    """The run cannot go on, its numbers are not finite. The message is for the user."""

    code = EXIT_BAD_NUMBERS


class NotStarted(Exception):
    """The processes of a run did not come together. The message is for the user; `code`: the exit code."""

    def __init__(self, message, code=EXIT_STALLED):
        super().__init__(message)
        self.code = code
