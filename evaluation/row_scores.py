"""The scores of one row: words, characters, triples, labels, questions."""

import functools
import logging
import unicodedata
import warnings
from collections.abc import Callable
from typing import Any

Scorer = Callable[[list[str], str], dict]  # (a row's answers, its reference): columns

# rouge_chinese keeps a dict with one entry for each pair of words: gigabytes for two long texts.
MAX_ROUGE_L_CELLS = 1_000_000

# The countable part of the rule for generated questions.
QUESTION_POINTS = 5.0  # of a row
QUESTION_FAULT = 0.25  # off for each fault
NEAR_DUPLICATE = 0.9  # overlap from which two questions count as one; asking for another fact overlaps up to about that
MAX_QUESTION_CHARS = 64  # a question above is no single question; people's rarely pass 40


def share(part: Any, whole: Any) -> Any:
    """A share in per cent, of numbers or of arrays; a share of nothing is 0."""
    return 100.0 * part / (whole + (whole == 0))


FOLDING = {  # a sentence behind each definition
    True: "Both texts are folded first with NFKC (unicodedata.normalize): full-width and ASCII forms are alike, … "
    "becomes ..., ① 1, ² 2, ＿ _, and an ideographic space a plain one.",
    False: "The texts are compared as they are (--no_normalize): （ and ( differ.",
}


def fold(text: str) -> str:
    """A text as metrics compare it: NFKC, which is what ChatGLM-6B's tokenizer makes of every text that it reads."""
    return unicodedata.normalize("NFKC", text)


@functools.cache
def load_libraries() -> tuple[Any, Any, Callable]:
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

    def bleu4(reference: list[str], prediction: list[str]) -> float:
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
    positions: dict[str, int] = {}
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
    triples = [triple for triple in fields if len(triple) == 3 and all(field.strip() for field in triple)]
    return {(head, relation, tail) for head, relation, tail in triples}


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


def of_first(function: Callable[[str, str], dict]) -> Scorer:
    """Score the first of a row's answers."""
    return lambda answers, reference: function(answers[0], reference)


# What is computed together, for the metrics of metrics.METRICS.
WORDS = of_first(score_words)
CHARACTERS = of_first(score_characters)
MATCH = of_first(score_match)
TRIPLES = of_first(score_triples)
LABELS = of_first(score_label)
QUESTIONS: Scorer = lambda answers, reference: score_questions(answers)
