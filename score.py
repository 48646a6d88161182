"""Score generated answers against their references.

    python score.py --predictions predictions.jsonl
    python score.py --predictions before.jsonl after.jsonl --task extraction

Reads JSON Lines with a prediction and a reference in each row, prints a table and writes the same
numbers, with how each was computed, as JSON beside the predictions. Several files over the same rows
are also compared with the first one. Needs no accelerator and no model: the deep learning libraries
are not imported, the text libraries only once a row is scored.
"""

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
import contextlib
from pathlib import Path

from evaluation.metrics import score_rows
from evaluation.predictions import Predictions, problem, write_reports
from evaluation.score_report import difference_report, format_table, make_report
from evaluation.tasks import NO_TASK, find_task
from flags.score import overwrite_problem, read_inputs, score_parser
from runtime.exits import UserError, fail
from runtime.holding import holding

METRICS = NO_TASK.metrics  # what score_rows computes where no task is named


def main(argv: list[str] | None = None) -> int:
    """Score the files, print the table, write the JSON files; returns the exit code."""
    args = score_parser().parse_args(argv)
    inputs, outputs = read_inputs(args)
    with contextlib.ExitStack() as alone:
        for output, path in outputs.items():
            found = lambda: filter(None, [overwrite_problem(output, path, args)])  # noqa: B023, E731  called at once
            alone.enter_context(holding(str(output), check=found))
        score_files(args, inputs, outputs)
    return 0


def score_files(args: argparse.Namespace, inputs: dict[str, Predictions], outputs: dict[Path, str]) -> None:
    """Score what `read_inputs` has read, write the files and print the table."""
    task = find_task(args.task)
    reports, scored = {}, {}
    for path, rows in inputs.items():
        scored[path] = score_rows(rows.answers, rows.references, args.task, normalize=not args.no_normalize)
        if scored[path][task.primary] is None:
            rule, fix = task.missing
            fail(str(problem("--task", f"{args.task}: {path}", rule, fix)), "score.py")
        reports[path] = make_report(path, rows, scored[path], args)
    first, *others = inputs
    for path in others:
        reports[path]["difference"] = None
        if inputs[path].references == inputs[first].references:
            two = scored[first]["rows"], scored[path]["rows"]
            reports[path]["difference"] = difference_report(first, *two, task.metrics, args.bootstrap)

    try:
        write_reports({output: reports[path] for output, path in outputs.items()})
    except UserError as error:
        fail(str(error), "score.py")
    print(format_table([reports[path] for path in args.predictions]))


if __name__ == "__main__":
    entry.run(main)
