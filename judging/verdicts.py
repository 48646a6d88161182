"""Verdicts: asked for, kept, selected, summarised."""

import argparse
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from evaluation.predictions import parse_row, problem, quote
from judging.endpoint import ASKS, GO_ON, MOST_REPLY, MOST_TOKENS, USAGE, Endpoint
from judging.kinds import Kind
from judging.pairs import PAIRS
from judging.questions import QUESTION_FAULTS
from judging.rows import Job, digest, read_bytes
from runtime.holding import require_there
from runtime.streams import progress_bar

KINDS: dict[str, Kind] = {"pairs": PAIRS, "questions": QUESTION_FAULTS}  # of --task
JUDGE = ("model", "language", "criteria_hash")
LINE_START = b'{"index": '
DEFINITIONS = {
    "num_unparsed": f"verdicts that could not be read: the last line was not as asked for {ASKS} times, or there were "
    f"more than {MOST_REPLY} characters",
    "tokens": "as the endpoint counted them, for all verdicts of the report; 0 for a count that is missing, or no "
    f"whole number from 0 to {MOST_TOKENS}",
}


def read_criteria(path: str | None, kind: Kind, language: str) -> str:
    """The criteria of a file, or the built-in ones."""
    if path is None:
        return kind.languages[language]["criteria"]
    try:
        text = read_bytes("--criteria", path).decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError:
        raise problem("--criteria", path, "is not UTF-8", "save it as UTF-8") from None
    if not text:
        raise problem("--criteria", path, "is empty", "write one criterion on each line")
    return text


class Judge:
    """A model behind an endpoint; called with a job it returns the verdict, ready to be written."""

    def __init__(self, args: argparse.Namespace, kind: Kind, criteria: str) -> None:
        self.kind, self.words = kind, kind.languages[args.language]
        self.about = dict(zip(JUDGE, (args.model, args.language, digest(criteria)), strict=True))
        self.endpoint = Endpoint(args)

    def __call__(self, job: Job) -> dict:
        """Ask for a verdict until its last line can be read, a few times at most."""
        again = self.words["again"].format(last_line=self.words["last_line"])
        reasons, found, usage = self.endpoint.ask_until(
            job.prompt, again, lambda reply: self.kind.read_reply(job, reply), job.place
        )
        verdict = {"index": job.index, "order": job.order, "prompt_hash": job.key, **self.about, **job.facts}
        return {**verdict, **(found or self.kind.unread), "reasons": reasons, "usage": usage}


def read_verdicts(path: str, kind: Kind) -> tuple[list[dict], int]:
    """(verdicts, bytes that they take) of an output file; a last line that a killed run did not finish is left out."""
    if not os.path.exists(path):
        return [], 0
    *lines, tail = read_bytes("--output_path", path).split(b"\n")
    rule, fix = "is no verdict of judge.py", "choose another --output_path"
    rows = [parse_row(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    for number, row in enumerate(rows, start=1):
        if not is_verdict(row, kind):
            raise problem(f"{path}:{number}", quote(row), rule, fix)
    if not (tail.startswith(LINE_START) or LINE_START.startswith(tail)):  # a file of somebody else is not cut
        raise problem(f"{path}:{len(lines) + 1}", quote(tail.decode("utf-8", "replace")), rule, fix)
    return rows, sum(len(line) + 1 for line in lines)


def is_verdict(row: dict, kind: Kind) -> bool:
    """Is a line of the output file what `Judge` makes?"""
    try:
        numbers = [row["index"], *(row["usage"][name] for name in USAGE)]
        named = row["order"] in kind.orders and all(isinstance(row[name], str) for name in (*JUDGE, "prompt_hash"))
        return named and all(type(number) is int for number in numbers) and kind.is_sound(row)
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def complete(
    args: argparse.Namespace, kind: Kind, jobs: list[Job], criteria: str, verdicts: list[dict], size: int
) -> None:
    """Get and write the verdicts that are missing; the first request that fails for good ends all.

    Afterwards the newest verdict of each row and order is that of its job, so that the file can be read alone: one
    that is known from another row, or from before the answers changed to and fro, is written again.
    """
    newest = {(verdict["index"], verdict["order"]): verdict["prompt_hash"] for verdict in verdicts}
    known = {verdict["prompt_hash"]: verdict for verdict in verdicts}
    missing: dict[str, list[Job]] = {}  # by key: rows that are alike are asked for once
    for job in jobs:
        if newest.get((job.index, job.order)) != job.key:
            missing.setdefault(job.key, []).append(job)
    if not missing:
        return
    judge = Judge(args, kind, criteria) if missing.keys() - known.keys() else None
    lock, failed = threading.Lock(), threading.Event()
    pool, wait = ThreadPoolExecutor(args.concurrency), True

    def work(key: str) -> int:
        if failed.is_set():
            return 0
        try:
            verdict = known.get(key) or judge(missing[key][0])  # type: ignore[misc]  # there is one where a key is not known
            require_there(args.output_path)
        except Exception:
            failed.set()  # at once: until the main thread knows of it, the next one would be asked
            raise
        lines = [json.dumps({**verdict, "index": job.index}, ensure_ascii=False) + "\n" for job in missing[key]]
        with lock:
            file.writelines(lines)
            file.flush()
        return len(lines)

    # Half of a surrogate pair cannot be written; its backslash form is its JSON escape.
    with open(args.output_path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.truncate(size)  # without the line that a killed run did not finish
        try:
            there = len(jobs) - sum(len(alike) for alike in missing.values())
            with progress_bar(total=len(jobs), initial=there, desc="judging", unit="verdict") as bar:
                for future in as_completed([pool.submit(work, key) for key in missing]):
                    bar.update(future.result())
        except KeyboardInterrupt:
            wait = False  # for the verdicts that are under way
            raise KeyboardInterrupt(GO_ON) from None
        finally:  # after an error, what is under way is still written
            pool.shutdown(wait=wait, cancel_futures=True)


def select(path: str, verdicts: list[dict], jobs: list[Job] | None) -> list[dict]:
    """The verdicts of the jobs; without jobs the newest ones of all rows in the file, which must have one judge."""
    if jobs is not None:
        known = {verdict["prompt_hash"]: verdict for verdict in verdicts}
        return [{**known[job.key], "index": job.index} for job in jobs if job.key in known]
    newest = {(verdict["index"], verdict["order"]): verdict for verdict in verdicts}
    judges = {tuple(verdict[name] for name in JUDGE) for verdict in newest.values()}
    if len(judges) > 1:
        rule = f"has verdicts of several judges, {quote(sorted(judges), limit=200)}"
        raise problem("--output_path", path, rule, "add --predictions, --baseline and the flags of one judge")
    return list(newest.values())


def make_report(kind: Kind, verdicts: list[dict], num_rows: int) -> dict:
    """The report on the verdicts of `num_rows` rows."""
    usage = {verdict["prompt_hash"]: verdict["usage"] for verdict in verdicts}.values()  # like rows are asked for once
    return {
        **{name: verdicts[0][name] for name in JUDGE},
        **kind.summarize(verdicts, num_rows),
        "num_verdicts": len(verdicts),
        "num_unparsed": sum(kind.unread.items() <= verdict.items() for verdict in verdicts),
        "tokens": {name: sum(used[name] for used in usage) for name in USAGE},
        "definitions": {**kind.definitions, **DEFINITIONS},
    }


def report_path(output_path: str) -> Path:
    """Where the report on a file of verdicts goes."""
    return Path(f"{output_path}.report.json")


def read_report(output_path: str) -> dict:
    """The report that the next one will replace, {} where there is none; UserError for a file of another kind."""
    path = report_path(output_path)
    if not os.path.lexists(path):
        return {}
    try:
        report = json.loads(read_bytes("--output_path", str(path)))
        if {*JUDGE, "num_verdicts"} <= report.keys():
            return report
    except (ValueError, AttributeError, RecursionError):
        pass
    rule = "the report goes there, and it is no report of judge.py"
    raise problem("--output_path", str(path), rule, "choose another --output_path")


def replaced(before: dict, report: dict) -> str:
    """A line about the report that this one has replaced, where that was of another judge; nothing otherwise."""
    if not before or all(before[name] == report[name] for name in JUDGE):
        return ""
    judge = f"{before['model']} ({before['language']}"
    judge += ", other criteria)" if before["criteria_hash"] != report["criteria_hash"] else ")"
    return f"it replaces the report on {judge}, which --report_only with the flags of that judge makes again"


def format_table(path: str, kind: Kind, report: dict) -> str:
    """The report for a reader."""
    lines = [f"{path}: {report['num_rows']} {kind.what}, judged by {report['model']} ({report['language']})", ""]
    if report["num_rows"]:
        lines += [*kind.table(report), ""]
    counts = {"verdicts": "num_verdicts", "unparsed": "num_unparsed", "rows left out": "num_left_out"}
    parts = [f"{label}: {report[name]}" for label, name in counts.items()]
    return "\n".join([*lines, "; ".join([*parts, "tokens: {} read, {} written".format(*report["tokens"].values())])])
