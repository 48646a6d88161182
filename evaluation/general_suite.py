"""The suite of general questions: read, checked, scored."""

import hashlib
import json
import os
import re
from collections.abc import Callable

from evaluation.row_scores import fold
from rows.checks import Columns, Notes
from rows.reading import check_items, data_files, read_file
from runtime.exits import UserError

SUITE_COLUMNS = Columns(others=("category", "check", "accept"))


def read_suite(path: str, notes: Notes | None = None) -> list[dict]:
    """Rows {"query", "answer", "place", "category", "check", "accept"} of a file or of the files in a folder.

    notes: Notes that are filled while rows are read.
    """
    rows = []
    for file in data_files([path]):
        for _, row in check_items(read_file(file), SUITE_COLUMNS, notes=notes):
            rows.append({**row, **check_scoring(row, row["place"])})
    if not rows:
        raise UserError(f"{path}: no row in it: give at least one")
    return rows


def check_scoring(row: dict, place: str) -> dict:
    """The fields of a row that say how its answer is scored, checked."""
    category, check, accept = row.get("category"), row.get("check"), row.get("accept", [])
    if not isinstance(category, str) or not category.strip():
        raise UserError(f"{place}: field 'category': must be a string that is not empty")
    if check not in list(CHECKS):
        raise UserError(f"{place}: field 'check': must be one of {', '.join(CHECKS)}")
    lists = accept if check == "all" else [accept]
    is_right = isinstance(lists, list) and all(is_list_of_texts(texts) for texts in lists)
    if not is_right or (check in ("all", "contains") and not (lists and all(lists))):
        kind = "lists of strings" if check == "all" else "strings"
        raise UserError(f"{place}: field 'accept': check {check} takes a list of {kind}, none of them empty")
    if check == "number" and last_number(row["answer"]) is None:
        raise UserError(f"{place}: field 'output' holds no number, which check number needs: add one")
    return {"category": category, "check": check, "accept": accept}


def is_list_of_texts(value: object) -> bool:
    """Is the value a list of strings, each with something in it?"""
    return isinstance(value, list) and all(isinstance(text, str) and words(text) for text in value)


def suite_hash(rows: list[dict]) -> str:
    """SHA-256 of what is asked and how it is scored, wherever the rows lie."""
    fields = [[row[name] for name in ("query", "answer", "category", "check", "accept")] for row in rows]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def words(text: str) -> str:
    """The text with spaces around each word (of ASCII letters, digits and `_`) and each other character.

    `words(a) in words(b)` then means: a stands in b, whatever the white space, and not inside a longer word or number.
    """
    return "".join(f" {word} " for word in re.findall(r"\w+|\S", fold(text), re.ASCII))


def bare_words(text: str) -> str:
    """`words` of a text without the quotes and full stops around it."""
    return words(fold(text).strip(" \t\r\n\"'“”‘’「」《》`*。.!"))


def last_number(text: str) -> float | None:
    """The last number of a text, with or without commas between thousands; None where there is none."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", fold(text).replace("−", "-"))
    found = re.findall(r"(?:(?<![A-Za-z0-9_)])-)?[0-9]+(?:\.[0-9]+)?", text)
    return float(found[-1]) if found else None


def stands_in(answer: str, texts: list[str]) -> bool:
    """Does one of the texts stand in the answer? Upper and lower case are alike."""
    return any(words(text).lower() in words(answer).lower() for text in texts)


def rouge_l(answer: str, references: list[str]) -> float:
    """ROUGE-L F1 of score.py against the reference that is nearest."""
    from evaluation.metrics import score_rows

    return max(score_rows([answer], [reference])["rougeL"] for reference in references)


CHECKS: dict[
    str, Callable[[str, dict], float]
] = {  # the `check` of a row: function of an answer and the row, 0..100 or true and false
    "exact": lambda answer, row: bare_words(answer) in [bare_words(text) for text in (row["answer"], *row["accept"])],
    "contains": lambda answer, row: stands_in(answer, row["accept"]),
    "all": lambda answer, row: 100 * sum(stands_in(answer, texts) for texts in row["accept"]) / len(row["accept"]),
    "number": lambda answer, row: last_number(answer) == last_number(row["answer"]),
    "rougeL": lambda answer, row: rouge_l(answer, [row["answer"], *row["accept"]]),
}


def score_answer(answer: str, row: dict) -> float:
    """0..100 by the row's check; rounded, because the ROUGE library misses 100 by its guard against 0 / 0."""
    value = CHECKS[row["check"]](answer, row)
    return 100.0 * value if isinstance(value, bool) else round(value, 4)


GENERAL = os.path.join(
    os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "data", "general"
)  # of the forgetting check
