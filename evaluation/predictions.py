"""Files of predictions, and the reports that lie beside them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runtime.exits import UserError


class Predictions(NamedTuple):
    """The rows of one file: all answers of each row, its reference, its line."""

    answers: list[list[str]]
    references: list[str]
    line_numbers: list[int]

    @property
    def predictions(self) -> list[str]:
        """The first answer of each row."""
        return [answers[0] for answers in self.answers]

    @property
    def empty_references(self) -> list[int]:
        """Lines of the rows that have nothing to compare with."""
        return [number for number, text in zip(self.line_numbers, self.references, strict=True) if not text.strip()]

    @property
    def num_extra(self) -> int:
        """Number of answers after the first ones."""
        return sum(map(len, self.answers)) - len(self.answers)


def problem(where: str, value: str, rule: str, fix: str) -> UserError:
    """An error for the user: the flag or the file and line, the value, the rule, what to do."""
    return UserError(f"{where}: {value}: {rule}: {fix}")


def quote(value: object, limit: int = 60) -> str:
    """A value as it would stand in JSON, on one line and cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "..."


def describe(value: object) -> str:
    """What a JSON value is, with the value itself where it is short and cannot be nested."""
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "the string "}
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


def numbered_rows(path: str | Path, content: bytes) -> Iterator[tuple[int, str, dict]]:
    """(line number, file:line, row) of each row of a JSON Lines file, whose blank lines are left out.

    Of bytes, because text mode would also end a line at a carriage return, which shifts the line numbers.
    """
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, f"{path}:{number}", parse_row(f"{path}:{number}", line)


def require_column(where: str, row: dict, column: str, flag: str) -> Any:
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
        content = Path(path).read_bytes()
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise problem("--predictions", str(path), rule, "name an existing file") from None
    for number, where, row in numbered_rows(path, content):
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


def write_reports(reports: dict[Path, dict]) -> None:
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
