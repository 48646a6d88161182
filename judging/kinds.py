"""What a kind of judging is, for --task of judge.py."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from judging.rows import Job


@dataclass(frozen=True)
class Kind:
    """A kind of judging; adding one is an object of this class, in a file of its own, and an entry in verdicts.KINDS.

    what: the rows, in the first line of the report. needs: flags without which nothing can be asked. orders: in which
    a row is asked for, a verdict each. languages: {name: {"criteria", "prompt", "again", "last_line", ...}}, what the
    judge reads. unread: what a verdict says whose reply could not be read; `read_reply` gives the same keys.
    definitions: {key of the report: how it is computed}.
    """

    what: str
    needs: tuple[str, ...]
    orders: Sequence[str]
    languages: dict[str, dict]
    unread: dict
    definitions: dict[str, str]
    # (args of judge.py, criteria): the verdicts to get, of all rows of the files.
    make_jobs: Callable[[argparse.Namespace, str], list[Job]]
    # (job, reply): (the reasons, what the reply says or None where its last line is not as asked for).
    read_reply: Callable[[Job, str], tuple[str, dict | None]]
    # Is what a verdict of the output file says what `read_reply` finds? KeyError, TypeError, AttributeError and
    # ValueError say that it is not.
    is_sound: Callable[[dict], bool]
    # (verdicts, number of rows): the figures of the report.
    summarize: Callable[[list[dict], int], dict]
    # The lines of such a report for a reader.
    table: Callable[[dict], list[str]]
