"""What a judge is given: rows of prediction files, each text in a place that it cannot leave."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from evaluation.predictions import describe, numbered_rows, problem
from judging.endpoint import sendable


class Answer(NamedTuple):
    """One row of a prediction file: all its answers; `place` is its file:line."""

    query: str
    reference: str | None
    texts: tuple[str, ...]
    place: str

    @property
    def text(self) -> str:
        """The first answer, which counts where one is asked for."""
        return self.texts[0]


class Job(NamedTuple):
    """One verdict to get. order: one of the kind's ORDERS; all that the verdict depends on is in `key`; facts: what is
    known of the row already and goes into the verdict."""

    index: int  # type: ignore[assignment]  # it hides the method of tuples, which nobody needs here
    order: str
    prompt: str
    key: str
    place: str
    facts: dict


def digest(*values: object) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def read_bytes(flag: str, path: str) -> bytes:
    """A whole file; UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise problem(flag, path, f"cannot be read ({error.strerror})", "name an existing file") from None


def read_answers(flag: str, path: str) -> dict[int, Answer]:
    """The rows of a prediction file by "index", or by their place where they have none; UserError for a bad row."""
    answers: dict[int, Answer] = {}
    fix = "write the file with predict.py"
    for _, place, row in numbered_rows(path, read_bytes(flag, path)):
        several = row.get("prediction", row.get("predictions"))
        several = several if isinstance(several, list) and several else [several]
        values = [("query", row.get("query")), ("output", row.get("output"))]
        texts: list = []
        for name, value in [*values, *(("prediction", text) for text in several)]:
            if not isinstance(value, str) and (value is not None or name != "output"):
                raise problem(place, f'"{name}" is {describe(value)}', "must be a string", fix)
            texts.append(None if value is None else sendable(value))
        index = row.get("index", len(answers))
        if type(index) is not int:
            raise problem(place, f'"index" is {describe(index)}', "must be a number", fix)
        if index in answers:
            raise problem(place, f"index {index}", f"is that of {answers[index].place} too", "remove one of the rows")
        answers[index] = Answer(texts[0], texts[1], tuple(texts[2:]), place)
    if not answers:
        raise problem(path, "no rows", "there is nothing to judge", fix)
    return answers


def fence(texts: list | dict) -> str:
    """The code in the marker lines around these texts.

    It is a hash of all of them, so whoever wrote one of them could not know it, and no text can end its place.
    """
    return digest(texts)[:16]


def block(label: str, text: str, code: str) -> str:
    """A text between its marker lines."""
    return f"<<<{label} {code}>>>\n{text}\n<<</{label} {code}>>>"
