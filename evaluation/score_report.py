"""What score.py says: reports, tables, differences."""

import argparse
from collections.abc import Sequence

from evaluation import intervals as bootstrap
from evaluation import metrics
from evaluation.intervals import differences, intervals
from evaluation.metrics import confusion_of, definitions
from evaluation.predictions import Predictions
from evaluation.tasks import find_task
from reports.tables import align, display_width

MAX_LISTED = 20  # line numbers
MAX_LABELS = 12  # of a printed confusion table
MAX_LABEL_WIDTH = 16  # columns of the terminal


def make_report(path: str, rows: Predictions, scored: dict, args: argparse.Namespace) -> dict:
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
        "empty": [n for n, text in zip(rows.line_numbers, rows.predictions, strict=True) if not text.strip()],
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


def difference_report(
    first: str, rows_a: list[dict], rows_b: list[dict], names: Sequence[str], num_resamples: int
) -> dict:
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


def format_table(reports: list[dict]) -> str:
    """The files, then a row for each metric with one column for each file, then what follows from them."""
    several = len(reports) > 1
    headers = [f"[{number}]" for number in range(1, len(reports) + 1)] if several else ["value"]
    lines = []
    for header, report in zip(headers, reports, strict=True):
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
    for header, report in zip(headers, reports, strict=True):
        if "confusion" in report:
            lines += ["", *format_confusion(f"{header} " * several, report["confusion"])]
    return "\n".join(lines)


def format_differences(headers: list[str], reports: list[dict]) -> list[str]:
    """A row for each metric with the differences to the first file, one column for each further file that has them."""
    if notes := [
        f"{header}: its references are not those of {headers[0]}, so there is no difference"
        for header, report in zip(headers, reports, strict=True)
        if "difference" in report and report["difference"] is None
    ]:
        notes = ["", *notes]
    columns = [
        (header, r["difference"]["metrics"]) for header, r in zip(headers, reports, strict=True) if r.get("difference")
    ]
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
    for label, name in zip(labels, names, strict=True):
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
