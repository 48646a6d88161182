"""Let a language model judge predictions, over any OpenAI-compatible endpoint.

    python judge.py --predictions tuned.jsonl --baseline base.jsonl --output_path verdicts.jsonl \
        --model NAME --base_url http://127.0.0.1:8000/v1 --language zh
    python judge.py --task questions --predictions questions.jsonl --output_path verdicts.jsonl \
        --model NAME --base_url http://127.0.0.1:8000/v1

The judge gives reasons and scores both answers of a row, in either order; or it says which of the questions made for a
document are wrong. A verdict is in the output file as soon as it comes: the same command again asks only for what is
missing. The endpoint's key is read from an environment variable (--api_key_env) and neither printed nor stored.
"""

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse

from evaluation.predictions import problem, write_reports
from flags.judge import parse
from judging.endpoint import GO_ON
from judging.verdicts import (
    KINDS,
    complete,
    format_table,
    make_report,
    read_criteria,
    read_report,
    read_verdicts,
    replaced,
    report_path,
    select,
)
from runtime.holding import holding, require_there
from runtime.streams import visible


def main(argv: list[str] | None = None) -> None:
    """Get the verdicts that are missing, then report on all of them."""
    args = parse(argv)
    with holding(args.output_path):
        judge_all(args)


def judge_all(args: argparse.Namespace) -> None:
    """From the checked flags to the report."""
    kind, jobs = KINDS[args.task], None
    if args.predictions:
        criteria = read_criteria(args.criteria, kind, args.language)
        jobs = kind.make_jobs(args, criteria)
    verdicts, size = read_verdicts(args.output_path, kind)
    if not args.report_only:
        try:
            complete(args, kind, jobs or [], criteria, verdicts, size)
        except OSError as error:
            rule = f"cannot be written ({error.strerror})"
            raise problem("--output_path", args.output_path, rule, f"fix that and {GO_ON}") from None
        verdicts, _ = read_verdicts(args.output_path, kind)
        if missing := {job.key for job in jobs or []} - {verdict["prompt_hash"] for verdict in verdicts}:
            raise RuntimeError(f"{args.output_path}: {len(missing)} verdicts that were written are not in it")
    require_there(args.output_path)
    verdicts = select(args.output_path, verdicts, jobs)
    if not verdicts:
        raise problem("--output_path", args.output_path, "has no verdict to report", "leave out --report_only")
    report = make_report(kind, verdicts, len({row.index for row in jobs or []} or {row["index"] for row in verdicts}))
    before = read_report(args.output_path)
    write_reports({report_path(args.output_path): report})
    text = "\n".join(filter(None, [format_table(args.output_path, kind, report), replaced(before, report)]))
    print(*map(visible, text.split("\n")), sep="\n")


if __name__ == "__main__":
    entry.run(main)
