"""The flags of score.py, with their checks."""

import argparse
import json
import os
from pathlib import Path

from evaluation import intervals as bootstrap
from evaluation.predictions import Predictions, problem, quote, read_predictions
from evaluation.tasks import TASKS, find_task
from flags.common import OneLineParser, add_normalize_flag, expanded_path
from runtime.exits import UserError, fail


def score_parser() -> OneLineParser:
    """Flags of score.py."""
    parser = OneLineParser(prog="score.py", description="Score predictions against their references.")
    parser.add_argument(
        "--predictions",
        type=expanded_path,
        nargs="+",
        required=True,
        help="JSON Lines files, one object with a prediction and a reference per line; several are shown side by side,"
        " and compared with the first where their references are the same",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="metrics of this kind of answer; left out: ROUGE, BLEU, exact match, and triples where there are any",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        help="resamples of the rows that the 95 %% intervals are made of; 0: no intervals",
    )
    parser.add_argument(
        "--output_path",
        type=expanded_path,
        help="JSON for the scores of one file; left out: FILE.scores.json, with --task FILE.TASK.scores.json",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file with scores of other settings, or of another kind; off: only scores of the same settings",
    )
    add_normalize_flag(parser)
    parser.add_argument(
        "--prediction_column",
        default="prediction",
        help="key of the prediction: a string, or a list of strings of which the first is scored; its plural is read"
        " where a row has no such key",
    )
    parser.add_argument("--reference_column", default="output", help="key of the reference, a string")
    return parser


LEAST_RESAMPLES = 100  # below, the ends of an interval rest on one or two resamples


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, Predictions], dict[Path, str]]:
    """The rows of every file, and which file's scores go where; ends with all that is wrong, before a row is scored."""
    problems: list[UserError] = []
    inputs: dict[str, Predictions] = {}
    outputs: dict[Path, str] = {}
    if args.prediction_column == args.reference_column:
        rule = "is also --reference_column, so every row would match itself"
        problems.append(problem("--prediction_column", args.prediction_column, rule, "name two different columns"))
    if args.bootstrap and args.bootstrap < LEAST_RESAMPLES:
        rule = f"is too few for the ends of a {bootstrap.LEVEL} % interval"
        fix = f"use at least {LEAST_RESAMPLES}, or 0 for no intervals"
        problems.append(problem("--bootstrap", str(args.bootstrap), rule, fix))
    for path in dict.fromkeys(args.predictions):
        try:
            inputs[path] = rows = read_predictions(path, args.prediction_column, args.reference_column)
            if find_task(args.task).has_references and len(rows.empty_references) == len(rows.references):
                rule = f"is empty in all {len(rows.references)} rows, so every answer would count as 0"
                fix = "name the column of the references with --reference_column"
                problems.append(problem(path, quote(args.reference_column), rule, fix))
        except UserError as error:
            problems.append(error)
    try:
        outputs = plan_outputs(list(inputs), args.output_path, args.task)
        problems += filter(None, (overwrite_problem(output, path, args) for output, path in outputs.items()))
    except UserError as error:
        problems.append(error)
    if problems:
        fail([str(error) for error in problems], "score.py")
    return inputs, outputs


def plan_outputs(paths: list[str], output_path: str | None, task: str | None = None) -> dict[Path, str]:
    """Which file's scores go where; raise UserError where that would lose predictions or cannot be written."""
    sources = {Path(path).resolve() for path in paths}
    if output_path is not None and len(sources) > 1:
        fix = "leave it out to write one beside each"
        raise problem("--output_path", output_path, "one file cannot hold the scores of several", fix)
    outputs: dict[Path, str] = {}
    for path in paths:
        # Resolved, so that two spellings of one place are one place.
        output = (scores_path(path, task) if output_path is None else Path(output_path)).resolve()
        if output in sources:
            fix = "choose another --output_path"
            raise problem("--output_path", str(output), "the scores would replace the predictions", fix)
        if os.path.isdir(output):
            raise problem("--output_path", str(output), "is a folder", "name a file, such as scores.json in it")
        if not os.path.isdir(output.parent):
            raise problem("--output_path", str(output), "its folder does not exist", f"create {output.parent} first")
        owner = outputs.setdefault(output, path)
        if Path(owner).resolve() != Path(path).resolve():
            rule = f"its scores would go to {output}, as those of {owner} do"
            raise problem("--predictions", path, rule, "rename one, or score them in two runs with --output_path")
    return outputs


def scores_path(path: str | Path, task: str | None = None) -> Path:
    """Where the scores of a file of predictions go if nothing else is said: those of each task in a file of its own."""
    return Path(path).with_suffix(f".{task}.scores.json" if task else ".scores.json")


def settings_of(args: argparse.Namespace) -> dict:
    """{flag: value} of what decides the figures of a file."""
    return {
        "--task": args.task,
        "--no_normalize": args.no_normalize,
        "--prediction_column": args.prediction_column,
        "--reference_column": args.reference_column,
        "--bootstrap": args.bootstrap,
    }


def settings_in(report: dict) -> dict:
    """`settings_of` that a report was written with; KeyError or TypeError where it is none."""
    return {
        "--task": report["task"],
        "--no_normalize": not report.get("normalize", False),  # a report that does not say it is from before
        "--prediction_column": report["prediction_column"],
        "--reference_column": report["reference_column"],
        "--bootstrap": report["bootstrap"]["num_resamples"],
    }


def overwrite_problem(output: Path, path: str, args: argparse.Namespace) -> UserError | None:
    """Why a file that is there must not be replaced by the scores of `path`: it holds something else."""
    if args.overwrite or not os.path.exists(output):
        return None
    fix = "add --overwrite to replace it, or name another file with --output_path"
    try:
        report = json.loads(output.read_bytes())
        there, [source] = settings_in(report), report["files"]
        # A report beside its predictions moves with them; elsewhere files of the same name can be different ones.
        is_same = os.path.basename(source) == os.path.basename(path)
        is_same = is_same and (args.output_path is None or Path(source).resolve() == Path(path).resolve())
    except OSError as error:
        return problem("--output_path", str(output), f"cannot be read ({error.strerror})", "choose another")
    except (ValueError, KeyError, TypeError, RecursionError):
        return problem("--output_path", str(output), "exists and holds no scores", fix)
    if not is_same:
        return problem("--output_path", str(output), f"holds the scores of {source}", fix)
    now = settings_of(args)
    if others := [name for name in now if there[name] != now[name]]:
        values = ", ".join(f"{name} was {quote(there[name])}, now it is {quote(now[name])}" for name in others)
        return problem("--output_path", str(output), f"holds scores of other settings ({values})", fix)
    return None
