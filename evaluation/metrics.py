"""The metrics of score.py: what a row gives, what the rows give together, and the sentence that says how.

A row becomes a dict of numbers (`score_row`). A metric is a formula on the sums of these numbers over rows, so the
value of all rows, of some of them and of a thousand resamples (intervals.py) come from the same lines. The text
libraries and numpy are imported once a row is scored.
"""

import importlib.metadata
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from evaluation import row_scores
from evaluation.row_scores import (
    FOLDING,
    MAX_QUESTION_CHARS,
    MAX_ROUGE_L_CELLS,
    NEAR_DUPLICATE,
    QUESTION_FAULT,
    QUESTION_POINTS,
    Scorer,
    fold,
    share,
)
from evaluation.tasks import NO_TASK, find_task


def mean_of(column: str, over: str = "num_rows") -> Callable:
    """The formula of a mean over rows."""
    return lambda sums: sums[column] / sums[over]


def share_of(column: str, whole: str) -> Callable:
    """The formula of a share in per cent, both summed over the rows first."""
    return lambda sums: share(sums[column], sums[whole])


def macro_f1(sums: dict) -> Any:
    """The mean F1 of the labels that occur in references."""
    references, predictions, hits = (sums[f"label_{name}"] for name in ("references", "predictions", "hits"))
    occurs = references > 0
    return (share(2 * hits, references + predictions) * occurs).sum(axis=-1) / occurs.sum(axis=-1)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed, what is said of it, and where it is offered. Adding a metric is an entry in METRICS.

    title: its line in the table; title_zh: the same in Chinese, for the report of compare.py.
    definition: its sentence in the JSON file; `definitions` fills the braces.
    formula(sums): the value from {column: sum over rows}, for arrays of sums at once.
    scorer(answers, reference): the columns that a row gives, of one or of several metrics; answers: all of the row.
    needs: the column without which there is no value: its sum must not be 0.
    is_shown: does the line of an evaluation while training have it? is_for_best: may --metric_for_best_model name it?
    """

    title: str
    title_zh: str
    definition: str
    formula: Callable
    needs: str = "num_rows"
    scorer: Scorer = field(kw_only=True)
    is_shown: bool = False
    is_for_best: bool = False


METRICS = {
    "rouge1": Metric(
        "ROUGE-1 F1 over words, mean over rows",
        "按词的 ROUGE-1 F1，各行平均",
        "{rouge} of rouge-1 {words}, joined by a space; repeated words count once; {empty}.",
        mean_of("rouge1"),
        scorer=row_scores.WORDS,
    ),
    "rouge2": Metric(
        "ROUGE-2 F1 over words, mean over rows",
        "按词的 ROUGE-2 F1，各行平均",
        "{rouge} of rouge-2 {words}, joined by a space; repeated pairs count once; one word alone has none and counts "
        "as 0; {empty}.",
        mean_of("rouge2"),
        scorer=row_scores.WORDS,
    ),
    "rougeL": Metric(
        "ROUGE-L F1 over words, mean over rows",
        "按词的 ROUGE-L F1，各行平均",
        "{rouge} of rouge-l {words}, joined by a space; the same formula with our own subsequence length where the "
        "library's table would pass {cells} cells; {empty}.",
        mean_of("rougeL"),
        scorer=row_scores.WORDS,
        is_shown=True,
        is_for_best=True,
    ),
    "bleu4": Metric(
        "BLEU-4 over characters, mean over rows",
        "按字的 BLEU-4，各行平均",
        "{bleu} over characters without white space, {smoothing}, which leaves a text of under four characters below "
        "100 even when identical; {empty}.",
        mean_of("bleu4"),
        scorer=row_scores.CHARACTERS,
        is_shown=True,
        is_for_best=True,
    ),
    "bleu4_words": Metric(
        "BLEU-4 over words, mean over rows",
        "按词的 BLEU-4，各行平均",
        "{bleu} {words}, {smoothing}, which leaves a text of under four words below 100 even when identical; {empty}.",
        mean_of("bleu4_words"),
        scorer=row_scores.WORDS,
    ),
    "exact_match": Metric(
        "rows equal to their reference",
        "与参考答案完全相同的行",
        "Per cent of rows where prediction.strip() == reference.strip(); {empty}.",
        mean_of("exact_match"),
        scorer=row_scores.MATCH,
        is_shown=True,
    ),
    "precision": Metric(
        "correct share of predicted triples, mean over rows",
        "预测的三元组中正确的比例，各行平均",
        "Mean over rows of the share of the row's predicted triples that are in its reference; {triple}; {macro}.",
        mean_of("precision", over="has_triples"),
        needs="num_reference",
        scorer=row_scores.TRIPLES,
    ),
    "recall": Metric(
        "found share of reference triples, mean over rows",
        "参考三元组中找到的比例，各行平均",
        "Mean over rows of the share of the row's reference triples that are predicted; {triple}; {macro}.",
        mean_of("recall", over="has_triples"),
        needs="num_reference",
        scorer=row_scores.TRIPLES,
    ),
    "f1": Metric(
        "F1 of triples, mean over rows",
        "三元组 F1，各行平均",
        "Mean over rows of the row's F1, 2 * matched / (predicted + reference triples); {triple}; {macro}.",
        mean_of("f1", over="has_triples"),
        needs="num_reference",
        scorer=row_scores.TRIPLES,
        is_shown=True,
        is_for_best=True,
    ),
    "precision_micro": Metric(
        "correct share of predicted triples, all rows together",
        "预测的三元组中正确的比例，所有行放在一起",
        "Matched triples over predicted triples, each summed over all rows, 0 where none is predicted; {triple}.",
        share_of("num_matched", "num_predicted"),
        needs="num_reference",
        scorer=row_scores.TRIPLES,
    ),
    "recall_micro": Metric(
        "found share of reference triples, all rows together",
        "参考三元组中找到的比例，所有行放在一起",
        "Matched triples over reference triples, each summed over all rows; {triple}.",
        share_of("num_matched", "num_reference"),
        needs="num_reference",
        scorer=row_scores.TRIPLES,
    ),
    "f1_micro": Metric(
        "F1 of triples, all rows together",
        "三元组 F1，所有行放在一起",
        "2 * matched / (predicted + reference triples), each summed over all rows; {triple}.",
        lambda sums: share(2 * sums["num_matched"], sums["num_predicted"] + sums["num_reference"]),
        needs="num_reference",
        scorer=row_scores.TRIPLES,
    ),
    "accuracy": Metric(
        "rows with the label of their reference",
        "标签与参考答案相同的行",
        "Per cent of rows whose prediction is the label of the reference; {label}.",
        mean_of("accuracy"),
        scorer=row_scores.LABELS,
        is_shown=True,
        is_for_best=True,
    ),
    "macro_f1": Metric(
        "F1 of a label, mean over the labels of the references",
        "各标签的 F1，对参考答案中的标签平均",
        "Mean over the labels that occur in references, each counting alike, of 2 * right / (rows with the label as "
        "prediction + rows with it as reference); a prediction that is no label of a reference lowers the F1 of the "
        "label it misses and of no other; {label}.",
        macro_f1,
        scorer=row_scores.LABELS,
        is_shown=True,
    ),
    "diversity": Metric(
        f"points of a row's questions, 0 to {QUESTION_POINTS:g}: {QUESTION_FAULT:g} off for each fault",
        f"每行问题的得分，0 到 {QUESTION_POINTS:g}：每个错误扣 {QUESTION_FAULT:g} 分",
        "Mean over rows of max(0, {points} - {fault} * faults): points, not per cent. Each answer of a row is one "
        "question. Faults: {repeated}; {no_question}; {overlong}. This is what can be counted. Whether the document "
        "answers a question, and whether it reads well and does no harm, takes from the same points: judge.py --task "
        "questions asks a model that, and without it this number is an upper bound.",
        mean_of("diversity"),
        needs="has_several",
        scorer=row_scores.QUESTIONS,
        is_shown=True,
    ),
    "repeated_questions": Metric(
        "near-duplicates among all questions",
        "所有问题中近似重复的",
        "Per cent of all questions that are {repeated}.",
        share_of("num_repeated", "num_questions"),
        needs="has_several",
        scorer=row_scores.QUESTIONS,
    ),
    "empty_questions": Metric(
        "empty ones among all questions",
        "所有问题中空白的",
        "Per cent of all questions that are {no_question}.",
        share_of("num_empty", "num_questions"),
        needs="has_several",
        scorer=row_scores.QUESTIONS,
    ),
    "overlong_questions": Metric(
        "overlong ones among all questions",
        "所有问题中过长的",
        "Per cent of all questions that are {overlong}.",
        share_of("num_overlong", "num_questions"),
        needs="has_several",
        scorer=row_scores.QUESTIONS,
    ),
}


def titles_in(language: str) -> dict[str, str]:
    """{metric: its title} in English ("en") or Chinese ("zh")."""
    return {name: metric.title_zh if language == "zh" else metric.title for name, metric in METRICS.items()}


def definitions(names: Iterable[str] = NO_TASK.metrics, normalize: bool = True) -> dict[str, str]:
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


class ScoreArrays(NamedTuple):
    """Scored rows as arrays over the N rows.

    numbers: {name: array}. labels: those of the references. The codes are places in it; a prediction that is no label
    has the code len(labels).
    """

    numbers: dict
    labels: list
    reference_codes: Any
    predicted_codes: Any


def labels_of(rows: list[dict]) -> list[str]:
    """The labels of the references, the most frequent first."""
    counts = Counter(row["label"] for row in rows)
    return sorted(counts, key=lambda label: (-counts[label], label))


def score_arrays(rows: list[dict]) -> ScoreArrays:
    """Arrays of the numbers and labels of rows from `score_row`."""
    import numpy

    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    numbers = {name: numpy.array([row[name] or 0.0 for row in rows], dtype=float) for name in names}
    numbers["num_rows"] = numpy.ones(len(rows))
    if "label" not in rows[0]:
        return ScoreArrays(numbers, [], None, None)
    labels = labels_of(rows)
    places: dict[str | None, int] = {label: place for place, label in enumerate(labels)}
    reference_codes = numpy.array([places[row["label"]] for row in rows])
    # No prediction is the empty label, even where a reference is empty: it is never right.
    known = (places.get(row["predicted_label"] or None, len(labels)) for row in rows)
    return ScoreArrays(numbers, labels, reference_codes, numpy.array(list(known)))


def sums_of(arrays: ScoreArrays, counts: Any = None) -> dict:
    """{column: sum over rows}, with one sum for each row of `counts` [B, N], how often each row occurs, or with each
    row counted once.

    Sums of labels have a second axis, the labels.
    """
    import numpy

    if counts is None:
        # fsum: the order of the rows does not change the last digit.
        sums = {name: numpy.array([math.fsum(values)]) for name, values in arrays.numbers.items()}
        counts = numpy.ones((1, len(arrays.numbers["num_rows"])))
    else:
        table = counts @ numpy.stack(list(arrays.numbers.values()), axis=1)  # [B, columns]
        sums = dict(zip(arrays.numbers, table.T, strict=True))
    if arrays.labels:
        hits = arrays.reference_codes == arrays.predicted_codes
        sums["label_references"] = count_codes(arrays.reference_codes, counts, len(arrays.labels))
        sums["label_predictions"] = count_codes(arrays.predicted_codes, counts, len(arrays.labels))
        sums["label_hits"] = count_codes(arrays.reference_codes, counts * hits, len(arrays.labels))
    return sums


def count_codes(codes: Any, counts: Any, num_labels: int) -> Any:
    """How many rows [B, labels] have each code below `num_labels`, where `codes` [N] has one more."""
    import numpy

    width = num_labels + 1
    cells = codes + width * numpy.arange(len(counts))[:, None]  # [B, N]
    found = numpy.bincount(cells.ravel(), counts.ravel(), minlength=width * len(counts))
    return found.reshape(len(counts), width)[:, :num_labels]


def values_of(sums: dict, names: Iterable[str]) -> dict:
    """{metric: array of its values}, NaN where the metric has none."""
    import numpy

    with numpy.errstate(divide="ignore", invalid="ignore"):  # those places become NaN
        return {
            name: numpy.where(sums[METRICS[name].needs] > 0, METRICS[name].formula(sums), numpy.nan) for name in names
        }


def score_row(
    answers: list[str], reference: str, names: Iterable[str] = NO_TASK.metrics, normalize: bool = True
) -> dict:
    """The numbers of one row that these metrics are computed from; an empty prediction gives 0 throughout.

    normalize: fold both sides first; every metric compares the folded texts.
    """
    if normalize:
        answers, reference = [fold(text) for text in answers], fold(reference)
    wanted = set(names)
    row: dict = {}
    for scorer in dict.fromkeys(metric.scorer for name, metric in METRICS.items() if name in wanted):
        row |= scorer(answers, reference)
    return row


def metrics_of(rows: list[dict], task: str | None = None) -> dict[str, float | None]:
    """The task's metrics of rows from `score_rows`, or of any choice of them; None where a metric has no value."""
    import numpy

    names = find_task(task).metrics
    if not rows:
        return dict.fromkeys(names)
    values = values_of(sums_of(score_arrays(rows)), names)
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
    rows = [
        score_row(list(texts), reference, names, normalize)
        for texts, reference in zip(answers, references, strict=True)
    ]
    return {**metrics_of(rows, task), "rows": rows}
