"""Score generated answers against their references.

    python score.py --predictions predictions.jsonl

Reads JSON Lines with a prediction and a reference in each row, prints a table and writes the same
numbers, with how each was computed, as JSON beside the predictions. Needs no accelerator and no
model: the deep learning libraries are not imported, the text libraries only once a row is scored.
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from arguments import score_parser
from utils import fail

# metric: (line in the table, sentence in the JSON file). The order is that of the output.
METRICS = {
    "rouge1": (
        "ROUGE-1 F1 over words, mean over rows",
        "{rouge} of rouge-1 {words}, joined by a space; repeated words count once; {empty}.",
    ),
    "rouge2": (
        "ROUGE-2 F1 over words, mean over rows",
        "{rouge} of rouge-2 {words}, joined by a space; repeated pairs count once; one word alone has none and counts "
        "as 0; {empty}.",
    ),
    "rougeL": (
        "ROUGE-L F1 over words, mean over rows",
        "{rouge} of rouge-l {words}, joined by a space; the same formula with our own subsequence length where the "
        "library's table would pass {cells} cells; {empty}.",
    ),
    "bleu4": (
        "BLEU-4 over characters, mean over rows",
        "{bleu} over characters without white space, {smoothing}, which leaves a text of under four characters below "
        "100 even when identical; {empty}.",
    ),
    "bleu4_words": (
        "BLEU-4 over words, mean over rows",
        "{bleu} {words}, {smoothing}, which leaves a text of under four words below 100 even when identical; {empty}.",
    ),
    "precision": (
        "correct share of predicted triples, mean over rows",
        "Mean over rows of the share of the row's predicted triples that are in its reference; {triple}; {macro}.",
    ),
    "recall": (
        "found share of reference triples, mean over rows",
        "Mean over rows of the share of the row's reference triples that are predicted; {triple}; {macro}.",
    ),
    "f1": (
        "F1 of triples, mean over rows",
        "Mean over rows of the row's F1, 2 * matched / (predicted + reference triples); {triple}; {macro}.",
    ),
    "precision_micro": (
        "correct share of predicted triples, all rows together",
        "Matched triples over predicted triples, each summed over all rows, 0 where none is predicted; {triple}.",
    ),
    "recall_micro": (
        "found share of reference triples, all rows together",
        "Matched triples over reference triples, each summed over all rows; {triple}.",
    ),
    "f1_micro": (
        "F1 of triples, all rows together",
        "2 * matched / (predicted + reference triples), each summed over all rows; {triple}.",
    ),
    "exact_match": (
        "rows equal to their reference",
        "Per cent of rows where prediction.strip() == reference.strip(); {empty}.",
    ),
}
TEXT_METRICS = ("rouge1", "rouge2", "rougeL", "bleu4", "bleu4_words", "exact_match")
TRIPLE_METRICS = tuple(name for name in METRICS if name not in TEXT_METRICS)

# rouge_chinese keeps a dict with one entry for each pair of words: gigabytes for two long texts.
MAX_ROUGE_L_CELLS = 1_000_000
MAX_LISTED = 20


def definitions() -> dict[str, str]:
    """Say for each metric exactly how it is computed, with the installed library versions."""
    rouge, jieba, nltk = (importlib.metadata.version(name) for name in ("rouge-chinese", "jieba", "nltk"))
    parts = {
        "rouge": f"Mean over rows of the F1 from rouge_chinese.Rouge (rouge-chinese {rouge})",
        "bleu": f"Mean over rows of nltk.translate.bleu_score.sentence_bleu (nltk {nltk})",
        "words": f"over the words of jieba.cut (jieba {jieba}), white space dropped",
        "smoothing": "weights 1/4 each, SmoothingFunction().method3",
        "cells": MAX_ROUGE_L_CELLS,
        "empty": "a row with an empty prediction or reference counts as 0",
        "triple": "a triple is a stripped line of exactly three non-empty fields joined by '_', and the triples of a "
        "row are compared as sets; null if no reference has a triple",
        "macro": "a row where neither side has a triple is left out, one where a single side has none counts as 0",
    }
    return {name: sentence.format(**parts) for name, (_, sentence) in METRICS.items()}


@functools.cache
def load_libraries():
    """Import what scoring needs, late so that `--help` and a refused command line answer at once.

    Returns jieba, the Rouge class, and sentence BLEU as a function of (reference tokens, prediction tokens).
    """
    with warnings.catch_warnings():  # invalid escape sequences in their sources, nothing a user can act on
        warnings.simplefilter("ignore")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    jieba.setLogLevel(logging.WARNING)
    smoothing = SmoothingFunction().method3

    def bleu4(reference, prediction):
        return sentence_bleu([reference], prediction, weights=(0.25,) * 4, smoothing_function=smoothing)

    return jieba, Rouge, bleu4


def split_words(text: str) -> list[str]:
    """Split a text into jieba words, without white space.

    White space goes because rouge_chinese counts a blank line as a word.
    """
    jieba, _, _ = load_libraries()
    return [word for word in jieba.cut(text) if not word.isspace()]


def lcs_length(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, one integer operation over all of `first` per word of `second`.

    Source: Hyyrö (2004), Bit-parallel LCS-length computation revisited. A bit of `row` is 0 where the
    length grows by one at that position of `first`.
    """
    positions = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def rouge_f1(prediction_words: list[str], reference_words: list[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 of rouge_chinese, in 0..100."""
    # The library raises ValueError for a text without words, and for nothing else.
    if not prediction_words or not reference_words:
        return {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    _, Rouge, _ = load_libraries()
    prediction, reference = " ".join(prediction_words), " ".join(reference_words)
    use_library = len(prediction_words) * len(reference_words) <= MAX_ROUGE_L_CELLS
    rouge = Rouge(["rouge-1", "rouge-2", "rouge-l"] if use_library else ["rouge-1", "rouge-2"])
    scores = rouge.get_scores(prediction, reference)[0]
    if not use_library:
        # cut_sent also cuts a word of more than six dots, so the words are taken after it, as the library does.
        hyp = [word for sentence in rouge.cut_sent(prediction) for word in sentence.split()]
        ref = [word for sentence in rouge.cut_sent(reference) for word in sentence.split()]
        length = lcs_length(ref, hyp)
        precision, recall = length / len(hyp), length / len(ref)
        scores["rouge-l"] = {"f": 2.0 * precision * recall / (precision + recall + 1e-8)}
    return {f"rouge{name}": 100.0 * scores[f"rouge-{name.lower()}"]["f"] for name in ("1", "2", "L")}


def parse_triples(text: str) -> set[tuple[str, str, str]]:
    """The triples of a text: its stripped lines of exactly three non-empty fields joined by `_`.

    A field of white space alone is empty; white space beside an inner `_` belongs to the field.
    """
    fields = (line.strip().split("_") for line in text.split("\n"))
    return {tuple(triple) for triple in fields if len(triple) == 3 and all(field.strip() for field in triple)}


def score_triples(prediction: str, reference: str) -> dict:
    """Triple counts of one row and its precision, recall and F1 in 0..100, None where neither side has a triple."""
    predicted, expected = parse_triples(prediction), parse_triples(reference)
    counts = {
        "num_matched": len(predicted & expected),
        "num_predicted": len(predicted),
        "num_reference": len(expected),
    }
    if not predicted and not expected:
        return {**counts, "precision": None, "recall": None, "f1": None}
    return {**counts, **precision_recall_f1(**counts)}


def precision_recall_f1(num_matched: int, num_predicted: int, num_reference: int) -> dict[str, float]:
    """Precision, recall and F1 in 0..100 from counts; a share of nothing is 0."""
    return {
        "precision": 100.0 * num_matched / max(num_predicted, 1),
        "recall": 100.0 * num_matched / max(num_reference, 1),
        "f1": 100.0 * 2 * num_matched / max(num_predicted + num_reference, 1),
    }


def score_row(prediction: str, reference: str) -> dict:
    """All per-row values; an empty prediction gives 0 throughout."""
    triples = score_triples(prediction, reference)
    if not prediction.strip():
        return {**dict.fromkeys(TEXT_METRICS, 0.0), **triples}
    _, _, bleu4 = load_libraries()
    prediction_words, reference_words = split_words(prediction), split_words(reference)
    return {
        **rouge_f1(prediction_words, reference_words),
        "bleu4": 100.0 * bleu4(list("".join(reference.split())), list("".join(prediction.split()))),
        "bleu4_words": 100.0 * bleu4(reference_words, prediction_words),
        "exact_match": 100.0 * (prediction.strip() == reference.strip()),
        **triples,
    }


def aggregate_rows(rows: list[dict]) -> dict[str, float | None]:
    """The metrics of any choice of rows from `score_row`, so also of a resample of them."""
    metrics = dict.fromkeys(METRICS)
    for name in TEXT_METRICS:
        metrics[name] = math.fsum(row[name] for row in rows) / len(rows)
    sums = {name: sum(row[name] for row in rows) for name in ("num_matched", "num_predicted", "num_reference")}
    if sums["num_reference"]:
        for name, micro in precision_recall_f1(**sums).items():
            values = [row[name] for row in rows if row[name] is not None]
            metrics[name] = math.fsum(values) / len(values)
            metrics[f"{name}_micro"] = micro
    return metrics


def score_rows(predictions: list[str], references: list[str]) -> dict:
    """Score predictions against the references at the same places.

    Returns the metrics by name in 0..100, the triple metrics None where no reference has a triple, and
    under "rows" the per-row values that `aggregate_rows` turns into them.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"predictions and references: {len(predictions)} and {len(references)}: there must be one reference for "
            "each prediction, and at least one: pass two lists of the same length"
        )
    rows = [score_row(prediction, reference) for prediction, reference in zip(predictions, references)]
    return {**aggregate_rows(rows), "rows": rows}


class Predictions(NamedTuple):
    """The rows of one file; `num_extra` counts the answers after the first of each row, which are not scored."""

    predictions: list[str]
    references: list[str]
    line_numbers: list[int]
    num_extra: int


def problem(where: str, value: str, rule: str, fix: str) -> ValueError:
    """An error for the user: the flag or the file and line, the value, the rule, what to do."""
    return ValueError(f"{where}: {value}: {rule}: {fix}")


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
    """Read a JSON Lines file of predictions and references; raise ValueError for the first row that does not fit.

    A row with several answers has a list of strings, under `prediction_column` or under its plural
    (`predictions`); the first one counts.
    """
    rows = Predictions([], [], [], 0)
    num_extra = 0
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
        rows.predictions.append(answers[0])
        rows.references.append(reference)
        rows.line_numbers.append(number)
        num_extra += len(answers) - 1
    if not rows.predictions:
        raise problem(str(path), "no rows", "there is nothing to score", "write one JSON object on each line")
    return rows._replace(num_extra=num_extra)


def plan_outputs(paths: list[str], output_path: str | None) -> dict[Path, str]:
    """Which file's scores go where; raise ValueError where that would lose a file or cannot be written."""
    sources = {Path(path).resolve() for path in paths}
    if output_path is not None and len(sources) > 1:
        fix = "leave it out to write one beside each"
        raise problem("--output_path", output_path, "one file cannot hold the scores of several", fix)
    outputs = {}
    for path in paths:
        # Resolved, so that two spellings of one place are one place.
        output = (Path(path).with_suffix(".scores.json") if output_path is None else Path(output_path)).resolve()
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


def format_file(label: str, report: dict) -> str:
    """One line about a file: its rows, its empty predictions, the answers left out."""
    parts = [f"rows: {report['num_rows']}"]
    if empty := report["empty"]:
        more = f" and {len(empty) - MAX_LISTED} more" if len(empty) > MAX_LISTED else ""
        lines = ", ".join(str(number) for number in empty[:MAX_LISTED])
        parts.append(f"empty predictions: {len(empty)} (line {lines}{more})")
    if report["num_extra_predictions"]:
        parts.append(f"answers after the first of a row, not scored: {report['num_extra_predictions']}")
    return f"{label}: " + "; ".join(parts)


def format_table(reports: list[dict]) -> str:
    """The files, then a row for each metric with one column for each file."""
    several = len(reports) > 1
    headers = [f"[{number}]" for number in range(1, len(reports) + 1)] if several else ["value"]
    lines = []
    for header, report in zip(headers, reports):
        path = report["files"][0]
        lines.append(format_file(f"{header} {path}" if several else path, report))
    cells = [["metric", *headers, "definition"]]
    for name, (definition, _) in METRICS.items():
        values = [report["metrics"][name] for report in reports]
        if any(value is not None for value in values):
            cells.append([name, *("-" if value is None else f"{value:.2f}" for value in values), definition])
    width = max(len(row[0]) for row in cells)
    lines += ["", *(f"{row[0]:<{width}}" + "".join(f"{c:>8}" for c in row[1:-1]) + f"  {row[-1]}" for row in cells)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Score the files, print the table, write the JSON files; returns the exit code."""
    args = score_parser().parse_args(argv)

    # Everything that can be refused is refused here, all at once, before a row is scored.
    problems, inputs = [], {}
    if args.prediction_column == args.reference_column:
        rule = "is also --reference_column, so every row would match itself"
        problems.append(problem("--prediction_column", args.prediction_column, rule, "name two different columns"))
    for path in dict.fromkeys(args.predictions):
        try:
            inputs[path] = read_predictions(path, args.prediction_column, args.reference_column)
        except ValueError as error:
            problems.append(error)
    try:
        outputs = plan_outputs(list(inputs), args.output_path)
    except ValueError as error:
        problems.append(error)
    if problems:
        fail([str(error) for error in problems], "score.py")

    reports = {}
    for path, rows in inputs.items():
        scores = score_rows(rows.predictions, rows.references)
        reports[path] = {
            "metrics": {name: scores[name] for name in METRICS},
            "num_rows": len(rows.predictions),
            "empty": [n for n, text in zip(rows.line_numbers, rows.predictions) if not text.strip()],
            "num_extra_predictions": rows.num_extra,
            "definitions": definitions(),
            "files": [path],
            "prediction_column": args.prediction_column,
            "reference_column": args.reference_column,
        }
    try:
        write_reports({output: reports[path] for output, path in outputs.items()})
    except ValueError as error:
        fail(str(error), "score.py")
    print(format_table([reports[path] for path in args.predictions]))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name the terminal cannot show must not end the run
    sys.exit(main())
