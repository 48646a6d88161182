"""The metrics of score.py: what a row gives, what the rows give together, and the sentence that says how.

A row becomes a dict of numbers (`score_row`). A metric is a formula on the sums of these numbers over rows, so the
value of all rows, of some of them and of a thousand resamples (bootstrap.py) come from the same lines. The text
libraries and numpy are imported once a row is scored.
"""

import functools
import importlib.metadata
import logging
import math
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Callable, NamedTuple

from tasks import LABELS, NO_TASK, QUESTIONS, ROUGE, TRIPLES, find_task

# rouge_chinese keeps a dict with one entry for each pair of words: gigabytes for two long texts.
MAX_ROUGE_L_CELLS = 1_000_000

# The countable part of the rule for generated questions.
QUESTION_POINTS = 5.0  # of a row
QUESTION_FAULT = 0.25  # off for each fault
NEAR_DUPLICATE = 0.9  # overlap from which two questions count as one; asking for another fact overlaps up to about that
MAX_QUESTION_CHARS = 64  # a question above is no single question; people's rarely pass 40


def share(part, whole):
    """A share in per cent, of numbers or of arrays; a share of nothing is 0."""
    return 100.0 * part / (whole + (whole == 0))


def mean_of(column: str, over: str = "num_rows") -> Callable:
    """The formula of a mean over rows."""
    return lambda sums: sums[column] / sums[over]


def share_of(column: str, whole: str) -> Callable:
    """The formula of a share in per cent, both summed over the rows first."""
    return lambda sums: share(sums[column], sums[whole])


def macro_f1(sums):
    """The mean F1 of the labels that occur in references."""
    references, predictions, hits = (sums[f"label_{name}"] for name in ("references", "predictions", "hits"))
    occurs = references > 0
    return (share(2 * hits, references + predictions) * occurs).sum(axis=-1) / occurs.sum(axis=-1)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed and what is said of it.

    title: its line in the table. definition: its sentence in the JSON file; `definitions` fills the braces.
    formula(sums): the value from {column: sum over rows}, for arrays of sums at once.
    needs: the column without which there is no value: its sum must not be 0.
    """

    title: str
    definition: str
    formula: Callable
    needs: str = "num_rows"


METRICS = {
    "rouge1": Metric(
        "ROUGE-1 F1 over words, mean over rows",
        "{rouge} of rouge-1 {words}, joined by a space; repeated words count once; {empty}.",
        mean_of("rouge1"),
    ),
    "rouge2": Metric(
        "ROUGE-2 F1 over words, mean over rows",
        "{rouge} of rouge-2 {words}, joined by a space; repeated pairs count once; one word alone has none and counts "
        "as 0; {empty}.",
        mean_of("rouge2"),
    ),
    "rougeL": Metric(
        "ROUGE-L F1 over words, mean over rows",
        "{rouge} of rouge-l {words}, joined by a space; the same formula with our own subsequence length where the "
        "library's table would pass {cells} cells; {empty}.",
        mean_of("rougeL"),
    ),
    "bleu4": Metric(
        "BLEU-4 over characters, mean over rows",
        "{bleu} over characters without white space, {smoothing}, which leaves a text of under four characters below "
        "100 even when identical; {empty}.",
        mean_of("bleu4"),
    ),
    "bleu4_words": Metric(
        "BLEU-4 over words, mean over rows",
        "{bleu} {words}, {smoothing}, which leaves a text of under four words below 100 even when identical; {empty}.",
        mean_of("bleu4_words"),
    ),
    "precision": Metric(
        "correct share of predicted triples, mean over rows",
        "Mean over rows of the share of the row's predicted triples that are in its reference; {triple}; {macro}.",
        mean_of("precision", over="has_triples"),
        needs="num_reference",
    ),
    "recall": Metric(
        "found share of reference triples, mean over rows",
        "Mean over rows of the share of the row's reference triples that are predicted; {triple}; {macro}.",
        mean_of("recall", over="has_triples"),
        needs="num_reference",
    ),
    "f1": Metric(
        "F1 of triples, mean over rows",
        "Mean over rows of the row's F1, 2 * matched / (predicted + reference triples); {triple}; {macro}.",
        mean_of("f1", over="has_triples"),
        needs="num_reference",
    ),
    "precision_micro": Metric(
        "correct share of predicted triples, all rows together",
        "Matched triples over predicted triples, each summed over all rows, 0 where none is predicted; {triple}.",
        share_of("num_matched", "num_predicted"),
        needs="num_reference",
    ),
    "recall_micro": Metric(
        "found share of reference triples, all rows together",
        "Matched triples over reference triples, each summed over all rows; {triple}.",
        share_of("num_matched", "num_reference"),
        needs="num_reference",
    ),
    "f1_micro": Metric(
        "F1 of triples, all rows together",
        "2 * matched / (predicted + reference triples), each summed over all rows; {triple}.",
        lambda sums: share(2 * sums["num_matched"], sums["num_predicted"] + sums["num_reference"]),
        needs="num_reference",
    ),
    "exact_match": Metric(
        "rows equal to their reference",
        "Per cent of rows where prediction.strip() == reference.strip(); {empty}.",
        mean_of("exact_match"),
    ),
    "accuracy": Metric(
        "rows with the label of their reference",
        "Per cent of rows whose prediction is the label of the reference; {label}.",
        mean_of("accuracy"),
    ),
    "macro_f1": Metric(
        "F1 of a label, mean over the labels of the references",
        "Mean over the labels that occur in references, each counting alike, of 2 * right / (rows with the label as "
        "prediction + rows with it as reference); a prediction that is no label of a reference lowers the F1 of the "
        "label it misses and of no other; {label}.",
        macro_f1,
    ),
    "diversity": Metric(
        f"points of a row's questions, 0 to {QUESTION_POINTS:g}: {QUESTION_FAULT:g} off for each fault",
        "Mean over rows of max(0, {points} - {fault} * faults): points, not per cent. Each answer of a row is one "
        "question. Faults: {repeated}; {no_question}; {overlong}. This is what can be counted. Whether the document "
        "answers a question, and whether it reads well and does no harm, takes from the same points: judge.py --task "
        "questions asks a model that, and without it this number is an upper bound.",
        mean_of("diversity"),
        needs="has_several",
    ),
    "repeated_questions": Metric(
        "near-duplicates among all questions",
        "Per cent of all questions that are {repeated}.",
        share_of("num_repeated", "num_questions"),
        needs="has_several",
    ),
    "empty_questions": Metric(
        "empty ones among all questions",
        "Per cent of all questions that are {no_question}.",
        share_of("num_empty", "num_questions"),
        needs="has_several",
    ),
    "overlong_questions": Metric(
        "overlong ones among all questions",
        "Per cent of all questions that are {overlong}.",
        share_of("num_overlong", "num_questions"),
        needs="has_several",
    ),
}


FOLDING = {  # a sentence behind each definition
    True: "Both texts are folded first with NFKC (unicodedata.normalize): full-width and ASCII forms are alike, … "
    "becomes ..., ① 1, ² 2, ＿ _, and an ideographic space a plain one.",
    False: "The texts are compared as they are (--no_normalize): （ and ( differ.",
}


def fold(text: str) -> str:
    """A text as metrics compare it: NFKC, which is what ChatGLM-6B's tokenizer makes of every text that it reads."""
    return unicodedata.normalize("NFKC", text)


def definitions(names=NO_TASK.metrics, normalize: bool = True) -> dict[str, str]:
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
        "label": "a label is the whole text without white space and full stops (。．.) at its end and white space at "
        "its start; an empty prediction is no label",
        "points": f"{QUESTION_POINTS:g}",
        "fault": f"{QUESTION_FAULT:g}",
        "repeated": "near-duplicates of an earlier question of the row: 2 * longest common subsequence / (length + "
        f"length) of at least {NEAR_DUPLICATE:g} over their letters, digits and Chinese characters, punctuation and "
        "white space dropped",
        "no_question": "empty, without a letter, digit or Chinese character",
        "overlong": f"overlong, of more than {MAX_QUESTION_CHARS} characters without white space at the ends",
    }
    return {name: f"{METRICS[name].definition.format(**parts)} {FOLDING[normalize]}" for name in names}


# ---------------------------------------------------------------- a row


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


def score_words(prediction: str, reference: str) -> dict[str, float]:
    """What is computed over jieba words; 0 for an empty prediction."""
    if not prediction.strip():
        return {**rouge_f1([], []), "bleu4_words": 0.0}
    _, _, bleu4 = load_libraries()
    prediction_words, reference_words = split_words(prediction), split_words(reference)
    return {
        **rouge_f1(prediction_words, reference_words),
        "bleu4_words": 100.0 * bleu4(reference_words, prediction_words),
    }


def score_characters(prediction: str, reference: str) -> dict[str, float]:
    """What is computed over characters; 0 for an empty prediction."""
    if not prediction.strip():
        return {"bleu4": 0.0}
    _, _, bleu4 = load_libraries()
    return {"bleu4": 100.0 * bleu4(list("".join(reference.split())), list("".join(prediction.split())))}


def score_match(prediction: str, reference: str) -> dict[str, float]:
    """Is the prediction the reference?"""
    return {"exact_match": 100.0 * (prediction.strip() == reference.strip() != "")}


def parse_triples(text: str) -> set[tuple[str, str, str]]:
    """The triples of a text: its stripped lines of exactly three non-empty fields joined by `_`.

    A field of white space alone is empty; white space beside an inner `_` belongs to the field.
    """
    fields = (line.strip().split("_") for line in text.split("\n"))
    return {tuple(triple) for triple in fields if len(triple) == 3 and all(field.strip() for field in triple)}


def score_triples(prediction: str, reference: str) -> dict:
    """Triple counts of one row and its precision, recall and F1 in 0..100, None where neither side has a triple."""
    predicted, expected = parse_triples(prediction), parse_triples(reference)
    matched = len(predicted & expected)
    counts = {
        "num_matched": matched,
        "num_predicted": len(predicted),
        "num_reference": len(expected),
        "has_triples": int(bool(predicted or expected)),
    }
    if not counts["has_triples"]:
        return {**counts, "precision": None, "recall": None, "f1": None}
    return {
        **counts,
        "precision": share(matched, len(predicted)),
        "recall": share(matched, len(expected)),
        "f1": share(2 * matched, len(predicted) + len(expected)),
    }


def clean_label(text: str) -> str:
    """The label that a text is: a full stop behind it, which a model may add, does not make it another."""
    return text.strip().rstrip("。．. ").strip()


def score_label(prediction: str, reference: str) -> dict:
    """The two labels of one row, and whether they are one."""
    label, predicted = clean_label(reference), clean_label(prediction)
    return {"label": label, "predicted_label": predicted, "accuracy": 100.0 * (predicted == label != "")}


def score_questions(questions: list[str]) -> dict:
    """Faults among the questions of one row, and the points they leave."""
    letters = [[char for char in question if char.isalnum()] for question in questions]
    asked = [chars for chars in letters if chars]
    counts = {
        "num_questions": len(questions),
        "has_several": int(len(questions) > 1),
        "num_repeated": sum(any(is_near_duplicate(chars, e) for e in asked[:i]) for i, chars in enumerate(asked)),
        "num_empty": len(questions) - len(asked),
        "num_overlong": sum(len(question.strip()) > MAX_QUESTION_CHARS for question in questions),
    }
    num_faults = counts["num_repeated"] + counts["num_empty"] + counts["num_overlong"]
    return {**counts, "diversity": max(0.0, QUESTION_POINTS - QUESTION_FAULT * num_faults)}


def is_near_duplicate(first: list[str], second: list[str]) -> bool:
    """Do two lists of characters have a common subsequence of nearly their length?"""
    length = len(first) + len(second)
    if 2 * min(len(first), len(second)) / length < NEAR_DUPLICATE:
        return False
    return 2 * lcs_length(first, second) / length >= NEAR_DUPLICATE


def of_first(function: Callable) -> Callable:
    """Score the first of a row's answers."""
    return lambda answers, reference: function(answers[0], reference)


# What is computed together: the metrics, and the numbers they need from a row's answers and its reference.
GROUPS = (
    ((*ROUGE, "bleu4_words"), of_first(score_words)),
    (("bleu4",), of_first(score_characters)),
    (("exact_match",), of_first(score_match)),
    (TRIPLES, of_first(score_triples)),
    (LABELS, of_first(score_label)),
    (QUESTIONS, lambda answers, reference: score_questions(answers)),
)


def score_row(answers: list[str], reference: str, names=NO_TASK.metrics, normalize: bool = True) -> dict:
    """The numbers of one row that these metrics are computed from; an empty prediction gives 0 throughout.

    normalize: fold both sides first; every metric compares the folded texts.
    """
    if normalize:
        answers, reference = [fold(text) for text in answers], fold(reference)
    row = {}
    for metrics, function in GROUPS:
        if set(metrics) & set(names):
            row |= function(answers, reference)
    return row


# ---------------------------------------------------------------- rows together


class Columns(NamedTuple):
    """Scored rows as arrays over the N rows.

    numbers: {name: array}. labels: those of the references. The codes are places in it; a prediction that is no label
    has the code len(labels).
    """

    numbers: dict
    labels: list
    reference_codes: object
    predicted_codes: object


def labels_of(rows: list[dict]) -> list[str]:
    """The labels of the references, the most frequent first."""
    counts = Counter(row["label"] for row in rows)
    return sorted(counts, key=lambda label: (-counts[label], label))


def columns_of(rows: list[dict]) -> Columns:
    """Arrays of the numbers and labels of rows from `score_row`."""
    import numpy

    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    numbers = {name: numpy.array([row[name] or 0.0 for row in rows], dtype=float) for name in names}
    numbers["num_rows"] = numpy.ones(len(rows))
    if "label" not in rows[0]:
        return Columns(numbers, [], None, None)
    labels = labels_of(rows)
    places = {label: place for place, label in enumerate(labels)}
    reference_codes = numpy.array([places[row["label"]] for row in rows])
    # No prediction is the empty label, even where a reference is empty: it is never right.
    known = (places.get(row["predicted_label"] or None, len(labels)) for row in rows)
    return Columns(numbers, labels, reference_codes, numpy.array(list(known)))


def sums_of(columns: Columns, weights=None) -> dict:
    """{column: sum over rows}, with one sum for each row of `weights` [B, N], or with each row counted once.

    Sums of labels have a second axis, the labels.
    """
    import numpy

    if weights is None:
        # fsum: the order of the rows does not change the last digit.
        sums = {name: numpy.array([math.fsum(values)]) for name, values in columns.numbers.items()}
        weights = numpy.ones((1, len(columns.numbers["num_rows"])))
    else:
        table = weights @ numpy.stack(list(columns.numbers.values()), axis=1)  # [B, columns]
        sums = dict(zip(columns.numbers, table.T))
    if columns.labels:
        hits = columns.reference_codes == columns.predicted_codes
        sums["label_references"] = count_codes(columns.reference_codes, weights, len(columns.labels))
        sums["label_predictions"] = count_codes(columns.predicted_codes, weights, len(columns.labels))
        sums["label_hits"] = count_codes(columns.reference_codes, weights * hits, len(columns.labels))
    return sums


def count_codes(codes, weights, num_labels: int):
    """The weight [B, labels] of each code below `num_labels`, where `codes` [N] has one more."""
    import numpy

    width = num_labels + 1
    cells = codes + width * numpy.arange(len(weights))[:, None]  # [B, N]
    counts = numpy.bincount(cells.ravel(), weights.ravel(), minlength=width * len(weights))
    return counts.reshape(len(weights), width)[:, :num_labels]


def values_of(sums: dict, names) -> dict:
    """{metric: array of its values}, NaN where the metric has none."""
    import numpy

    with numpy.errstate(divide="ignore", invalid="ignore"):  # those places become NaN
        return {
            name: numpy.where(sums[METRICS[name].needs] > 0, METRICS[name].formula(sums), numpy.nan) for name in names
        }


def metrics_of(rows: list[dict], task: str | None = None) -> dict[str, float | None]:
    """The task's metrics of rows from `score_rows`, or of any choice of them; None where a metric has no value."""
    import numpy

    names = find_task(task).metrics
    if not rows:
        return dict.fromkeys(names)
    values = values_of(sums_of(columns_of(rows)), names)
    return {name: None if numpy.isnan(value[0]) else value[0].item() for name, value in values.items()}


def confusion_of(rows: list[dict]) -> dict:
    """What was predicted for each label of the references: {"labels", "counts": {label: {label: rows}}, "other"}.

    "other" counts, for each label, the predictions that are no label of a reference; cells of 0 are left out.
    """
    labels = labels_of(rows)
    known = set(labels) - {""}
    pairs = Counter((row["label"], row["predicted_label"]) for row in rows)
    counts = {label: {p: pairs[label, p] for p in labels if p in known and pairs[label, p]} for label in labels}
    other = Counter(row["label"] for row in rows if row["predicted_label"] not in known)
    return {"labels": labels, "counts": counts, "other": {label: other[label] for label in labels if other[label]}}


def score_rows(predictions: list, references: list[str], task: str | None = None, normalize: bool = True) -> dict:
    """Score predictions against the references at the same places.

    A prediction is a text, or a list of the row's answers, of which the first counts unless the task looks at all.
    normalize: fold both sides with NFKC first (`fold`).
    Returns the task's metrics by name, in 0..100 and None where a metric has no value (the triple metrics where no
    reference has a triple), and under "rows" the per-row numbers that `metrics_of` turns into them.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"predictions and references: {len(predictions)} and {len(references)}: there must be one reference for "
            "each prediction, and at least one: pass two lists of the same length"
        )
    names = find_task(task).metrics
    answers = ([prediction] if isinstance(prediction, str) else prediction for prediction in predictions)
    rows = [score_row(list(texts), reference, names, normalize) for texts, reference in zip(answers, references)]
    return {**metrics_of(rows, task), "rows": rows}
