"""Score generated answers against their references.

    python score.py --predictions predictions.jsonl
    python score.py --predictions before.jsonl after.jsonl --task extraction

Reads JSON Lines with a prediction and a reference in each row, prints a table and writes the same
numbers, with how each was computed, as JSON beside the predictions. Several files over the same rows
are also compared with the first one. Needs no accelerator and no model: the deep learning libraries
are not imported, the text libraries only once a row is scored.
"""

import entry  # first: Ctrl-C is heard while the others are imported

import contextlib
import json
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import bootstrap
import metrics
from arguments import score_parser
from bootstrap import difference, differences, intervals
from exits import UserError
from holding import holding
from metrics import confusion_of, definitions, metrics_of, score_rows
from tasks import NO_TASK, find_task
from utils import fail

__all__ = ["difference", "intervals", "metrics_of", "read_predictions", "score_rows"]  # for other scripts

METRICS = NO_TASK.metrics  # what score_rows computes where no task is named
MAX_LISTED = 20  # line numbers
MAX_LABELS = 12  # of a printed confusion table
MAX_LABEL_WIDTH = 16  # columns of the terminal
LEAST_RESAMPLES = 100  # below, the ends of an interval rest on one or two resamples


class Predictions(NamedTuple):
    """The rows of one file: all answers of each row, its reference, its line."""

    answers: list[list[str]]
    references: list[str]
    line_numbers: list[int]

    @property
    def predictions(self):
        """The first answer of each row."""
        return [answers[0] for answers in self.answers]

    @property
    def empty_references(self):
        """Lines of the rows that have nothing to compare with."""
        return [number for number, text in zip(self.line_numbers, self.references) if not text.strip()]

    @property
    def num_extra(self):
        """Number of answers after the first ones."""
        return sum(map(len, self.answers)) - len(self.answers)


def problem(where: str, value: str, rule: str, fix: str) -> UserError:
    """An error for the user: the flag or the file and line, the value, the rule, what to do."""
    return UserError(f"{where}: {value}: {rule}: {fix}")


def quote(value, limit: int = 60) -> str:
    """A value as it would stand in JSON, on one line and cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "..."


def describe(value) -> str:
    """What a JSON value is, with the value itself where it is short and cannot be nested."""
    kinds = {dict: "an object", list: "a list", str: "the string "}
    kind = kinds.get(type(value), "")
    return kind if isinstance(value, (dict, list)) else kind + quote(value)


def parse_row(where: str, line: bytes) -> dict:
    """Decode one line of the file `where` names."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise problem(where, f"byte {line[error.start]:#04x}", "not UTF-8", "save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number too long to convert, or brackets too deep, also end here
        shown = quote(line.decode("utf-8").strip())
        raise problem(where, shown, f"not JSON ({error})", "write one JSON object on each line") from None
    if not isinstance(row, dict):
        raise problem(where, describe(row), "each row must be a JSON object", "write one JSON object on each line")
    return row


def require_column(where: str, row: dict, column: str, flag: str):
    """The value of a column that must be there."""
    if column not in row:
        keys = quote(list(row), limit=200) if row else "no columns"
        raise problem(where, keys, f"has no column {quote(column)}", f"name the column with {flag}")
    return row[column]


def read_predictions(
    path: str | Path, prediction_column: str = "prediction", reference_column: str = "output"
) -> Predictions:
    """Read a JSON Lines file of predictions and references; raise UserError for the first row that does not fit.

    A row with several answers has a list of strings, under `prediction_column` or under its plural
    (`predictions`).
    """
    rows = Predictions([], [], [])
    try:
        # Bytes, because text mode would also end a line at "\r", which shifts the line numbers.
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise problem("--predictions", str(path), rule, "name an existing file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = parse_row(where, line)
        plural = f"{prediction_column}s"
        column = plural if prediction_column not in row and plural in row else prediction_column
        answers = require_column(where, row, column, "--prediction_column")
        if answers == []:
            raise problem(
                where, f"{quote(column)} is an empty list", "a row needs a prediction", 'write "" for an empty answer'
            )
        answers = answers if isinstance(answers, list) else [answers]
        reference = require_column(where, row, reference_column, "--reference_column")
        for name, value in [*((column, answer) for answer in answers), (reference_column, reference)]:
            if not isinstance(value, str):
                fix = "put the text in quotes or name another column"
                raise problem(where, f"{quote(name)} is {describe(value)}", "must be a string", fix)
        rows.answers.append(answers)
        rows.references.append(reference)
        rows.line_numbers.append(number)
    if not rows.answers:
        raise problem(str(path), "no rows", "there is nothing to score", "write one JSON object on each line")
    return rows


def scores_path(path: str | Path, task: str | None = None) -> Path:
    """Where the scores of a file of predictions go if nothing else is said: those of each task in a file of its own."""
    return Path(path).with_suffix(f".{task}.scores.json" if task else ".scores.json")


def settings_of(args) -> dict:
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


def overwrite_problem(output: Path, path: str, args) -> UserError | None:
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


def plan_outputs(paths: list[str], output_path: str | None, task: str | None = None) -> dict[Path, str]:
    """Which file's scores go where; raise UserError where that would lose predictions or cannot be written."""
    sources = {Path(path).resolve() for path in paths}
    if output_path is not None and len(sources) > 1:
        fix = "leave it out to write one beside each"
        raise problem("--output_path", output_path, "one file cannot hold the scores of several", fix)
    outputs = {}
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


def write_reports(reports: dict[Path, dict]):
    """Write the JSON files: all of them beside their places first, then each moved in one step."""
    # Short names, because a long one with anything added could be too long.
    staged = {path: path.with_name(f".scores.{os.getpid()}.{i}.tmp") for i, path in enumerate(reports)}
    try:
        for path, report in reports.items():
            # A file name that is not UTF-8 comes as lone surrogates; their backslash form is their JSON escape.
            with open(staged[path], "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        for path in reports:
            os.replace(staged[path], path)
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise problem("--output_path", str(path), rule, "choose another --output_path") from None
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def make_report(path: str, rows: Predictions, scored: dict, args) -> dict:
    """What is written about one file."""
    task = find_task(args.task)
    settings = {"num_resamples": args.bootstrap, "seed": bootstrap.SEED, "level": bootstrap.LEVEL}
    report = {
        "task": args.task,
        "primary": task.primary,
        "metrics": {name: scored[name] for name in task.metrics},
        "intervals": intervals(scored["rows"], task.metrics, args.bootstrap),
        "bootstrap": {**settings, "definition": bootstrap.DEFINITION.format(**settings)},
        "num_rows": len(rows.answers),
        "empty": [n for n, text in zip(rows.line_numbers, rows.predictions) if not text.strip()],
        "empty_references": rows.empty_references if task.has_references else [],
        "num_extra_predictions": 0 if task.all_answers else rows.num_extra,
        "normalize": not args.no_normalize,
        "definitions": definitions(task.metrics, normalize=not args.no_normalize),
        "files": [path],
        "prediction_column": args.prediction_column,
        "reference_column": args.reference_column,
    }
    if task.confusion:
        report["confusion"] = confusion_of(scored["rows"])
    return report


def compare(first: str, rows_a: list[dict], rows_b: list[dict], names, num_resamples: int) -> dict:
    """What a report says of the difference to the first file; each metric is None where one side has no value."""
    found = {}
    for name, (value, low, high) in differences(rows_a, rows_b, names, num_resamples).items():
        interval = None if low is None else [low, high]
        inside_noise = None if low is None else low <= 0 <= high
        found[name] = None if value is None else {"value": value, "interval": interval, "inside_noise": inside_noise}
    return {"to": first, "metrics": found}


def format_file(label: str, report: dict) -> str:
    """One line about a file: its rows, its empty predictions and references, the answers left out."""
    parts = [f"rows: {report['num_rows']}"]
    if report["empty"]:
        parts.append(f"empty predictions: {format_lines(report['empty'])}")
    if report["empty_references"]:
        parts.append(f"empty references, which count as 0: {format_lines(report['empty_references'])}")
    if report["num_extra_predictions"]:
        parts.append(f"answers after the first of a row, not scored: {report['num_extra_predictions']}")
    return f"{label}: " + "; ".join(parts)


def format_lines(numbers: list[int]) -> str:
    """`3 (line 2, 5, 9)`: how many, and which."""
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    return f"{len(numbers)} (line {', '.join(map(str, numbers[:MAX_LISTED]))}{more})"


def format_value(value: float | None, interval: list[float] | None) -> str:
    """`83.50 [78.1, 88.4]`, the value in eight columns."""
    text = f"{'-' if value is None else f'{value:.2f}':>8}"
    return text if value is None or interval is None else f"{text} [{interval[0]:.1f}, {interval[1]:.1f}]"


def format_difference(found: dict | None) -> str:
    """`+2.10 [-0.35, +4.40] inside the noise`, the value in eight columns."""
    if found is None:
        return f"{'-':>8}"
    text = f"{found['value']:>+8.2f}"
    if found["interval"] is None:
        return text
    low, high = found["interval"]
    return f"{text} [{low:+.2f}, {high:+.2f}]" + " inside the noise" * found["inside_noise"]


def display_width(text: str) -> int:
    """Columns of a text on a terminal, where a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def align(cells: list[list[str]]) -> list[str]:
    """Lines of a table, every column as wide as its widest cell."""
    widths = [max(map(display_width, column)) for column in zip(*cells)]
    padded = ([cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths)] for row in cells)
    return ["".join(row).rstrip() for row in padded]


def format_table(reports: list[dict]) -> str:
    """The files, then a row for each metric with one column for each file, then what follows from them."""
    several = len(reports) > 1
    headers = [f"[{number}]" for number in range(1, len(reports) + 1)] if several else ["value"]
    lines = []
    for header, report in zip(headers, reports):
        path = report["files"][0]
        lines.append(format_file(f"{header} {path}" if several else path, report))
    if reports[0]["task"]:
        lines.append(f"task: {reports[0]['task']}; primary metric: {reports[0]['primary']}")
    if num_resamples := reports[0]["bootstrap"]["num_resamples"]:
        lines.append(f"in brackets: {bootstrap.LEVEL} % interval, {num_resamples:,} resamples of the rows")
    if not reports[0]["normalize"]:
        lines.append("texts are compared as they are: full-width and ASCII marks differ")
    cells = [["metric", *(f"{header:>8}" for header in headers), "  definition"]]
    for name in reports[0]["metrics"]:
        if any(report["metrics"][name] is not None for report in reports):
            values = [format_value(report["metrics"][name], report["intervals"][name]) for report in reports]
            cells.append([name, *values, f"  {metrics.METRICS[name].title}"])
    lines += ["", *align(cells), *format_differences(headers, reports)]
    for header, report in zip(headers, reports):
        if "confusion" in report:
            lines += ["", *format_confusion(f"{header} " * several, report["confusion"])]
    return "\n".join(lines)


def format_differences(headers: list[str], reports: list[dict]) -> list[str]:
    """A row for each metric with the differences to the first file, one column for each further file that has them."""
    if notes := [
        f"{header}: its references are not those of {headers[0]}, so there is no difference"
        for header, report in zip(headers, reports)
        if "difference" in report and report["difference"] is None
    ]:
        notes = ["", *notes]
    columns = [(header, r["difference"]["metrics"]) for header, r in zip(headers, reports) if r.get("difference")]
    if not columns:
        return notes
    cells = [["metric", *(f"{header:>8}" for header, _ in columns)]]
    for name in reports[0]["metrics"]:
        if any(found[name] is not None for _, found in columns):
            cells.append([name, *(format_difference(found[name]) for _, found in columns)])
    return ["", f"difference to {headers[0]}, row by row", *align(cells), *notes]


def format_confusion(prefix: str, confusion: dict) -> list[str]:
    """A row for each label of the references, a column for each predicted one; where they are few."""
    labels = confusion["labels"]
    if len(labels) > MAX_LABELS:
        return [f"{prefix}confusion of {len(labels)} labels: see the JSON file"]
    names = [shorten_label(label) for label in labels]
    cells = [["reference \\ prediction", *(f"  {name}" for name in [*names, "other"])]]
    for label, name in zip(labels, names):
        row = [confusion["counts"][label].get(column, 0) for column in labels] + [confusion["other"].get(label, 0)]
        cells.append([name, *(f"  {count}" for count in row)])
    return [f"{prefix}confusion, rows", *align(cells)]


def shorten_label(label: str) -> str:
    """A label on one line, cut to MAX_LABEL_WIDTH columns."""
    text = "".join(char if char.isprintable() else " " for char in label) or '""'
    if display_width(text) <= MAX_LABEL_WIDTH:
        return text
    while display_width(text) > MAX_LABEL_WIDTH - 3:
        text = text[:-1]
    return text + "..."


def read_inputs(args) -> tuple[dict[str, Predictions], dict[Path, str]]:
    """The rows of every file, and which file's scores go where; ends with all that is wrong, before a row is scored."""
    problems, inputs, outputs = [], {}, {}
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


def score_files(args, inputs: dict[str, Predictions], outputs: dict[Path, str]):
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
            reports[path]["difference"] = compare(first, *two, task.metrics, args.bootstrap)

    try:
        write_reports({output: reports[path] for output, path in outputs.items()})
    except UserError as error:
        fail(str(error), "score.py")
    print(format_table([reports[path] for path in args.predictions]))


if __name__ == "__main__":
    entry.run(main)
