"""The door of every command: how it begins, and what is said when it ends early.

A command imports this first, before what takes time to import: from then on Ctrl-C ends it with one line.
"""

import codecs
import os
import signal
import sys

from exits import EXIT_STOPPED, EXIT_UNREAD, NotStarted, UserError


def program():
    """The command's name, as its messages begin."""
    return os.path.basename(sys.argv[0])


def stopped(interrupt):
    """End at once after Ctrl-C, in one line. The usual way out would wait for threads that are at work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
    from utils import is_main

    if is_main():
        print("", ": ".join([program(), "stopped", *map(str, interrupt.args)]), sep="\n", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # its reader has gone
    os._exit(EXIT_STOPPED)


def on_error(kind, error, trace):
    """In place of `sys.excepthook`: a line for Ctrl-C, the traceback for all else."""
    if issubclass(kind, KeyboardInterrupt):
        stopped(error)
    sys.__excepthook__(kind, error, trace)


def prepare_streams():
    """What a terminal cannot show is written as `\\u6c34`, what it would obey as `\\x1b`; what it sends in another
    encoding is read as U+FFFD.

    None of it ends a command. A terminal that calls itself ASCII is read as UTF-8, which it is a part of. A stream that
    the parent has closed takes everything.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    from utils import PlainStream

    for name, kept in (("stdout", ""), ("stderr", "\r")):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # not where a test or another program has put something else in its place
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream, kept))
    if hasattr(sys.stdin, "reconfigure"):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def listen(handler, numbers=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
    """Let `handler` hear these signals, but for those that the parent ignores (nohup, a shell's background).

    Returns what heard them before: {number: handler}, for `listen_as_before`.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def listen_as_before(handlers):
    """The inverse of `listen`."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(main):
    """Run `main(argv)` and end with the exit code that it returns; UserError is the user's error."""
    prepare_streams()
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # who reads has seen enough, as `head` has: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_UNREAD)
    except KeyboardInterrupt as interrupt:
        stopped(interrupt)
    except (UserError, NotStarted) as error:
        from utils import fail

        fail(" ".join(str(error).split()), code=error.code)


sys.excepthook = on_error
