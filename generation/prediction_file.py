"""The file of answers: written row by row, taken up again, put in order."""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from runtime.distributed import barrier
from runtime.exits import UserError
from runtime.folders import whole_file
from runtime.ranks import is_main

if TYPE_CHECKING:
    from checkpoints.opening import Opened


def part_path(path: str, rank: int) -> str:
    """Where a rank writes its answers until all are there."""
    return f"{path}.rank{rank}.partial"


def read_parts(path: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """({file: its key, None where it has no answer}, {row number: line}) of what interrupted runs have answered.

    Torn last lines are left out.
    """
    keys, lines = {}, {}
    for part in sorted(glob.glob(f"{glob.escape(path)}.rank*.partial")):
        key, keys[part] = None, None
        with open(part, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if not isinstance(value, dict):
                    continue
                key = value.get("key", key)
                if "index" in value:
                    lines[value["index"]], keys[part] = line, key
    return keys, lines


def take_up(path: str, key: str, overwrite: bool) -> dict:
    """{row number: line} of the answers that are there; afterwards they lie in the first rank's part. Collective."""
    keys, lines = read_parts(path)
    others = [part for part, found in keys.items() if found not in (None, key)]
    if others and not overwrite:
        raise UserError(
            f"{others[0]}: answers of an interrupted run with another model, rows, flags or precision: give"
            " --overwrite to drop them, or another --output_path"
        )
    lines = {} if others else lines
    barrier()  # all have read
    if is_main():
        with whole_file(part_path(path, 0)) as file:
            file.write(json.dumps({"key": key}) + "\n")
            file.writelines(lines.values())
        for part in keys:
            if part != part_path(path, 0):
                os.remove(part)
    barrier()
    return lines


def key_of(args: argparse.Namespace, opened: Opened, rows: Any, precision: str) -> str:
    """SHA-256 of what decides the answers: rows, flags, and the model's files by name, size and time."""
    free = "test_path output_path overwrite batch_size batch_tokens local_rank device prompt allow_other_base".split()
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in free} | {"precision": precision}
    files = [
        (name, os.path.getsize(path), os.stat(path).st_mtime_ns)
        for folder in dict.fromkeys((opened.folder, opened.base_folder))
        for name in sorted(os.listdir(folder))
        if os.path.isfile(path := os.path.join(folder, name))
    ]
    queries = [(row["query"], row["answer"]) for row in rows]
    return hashlib.sha256(json.dumps([flags, files, queries]).encode()).hexdigest()


def output_row(number: Any, row: dict, result: dict) -> dict:
    """One line of the output: the question, the reference if there is one, and the answer or answers.

    stopped: the answer ended by itself; cut: it was ended at --max_new_tokens; empty; repeated: it ends in a loop.
    """
    line = {"index": number, "query": row["query"]}
    if row["answer"] is not None:
        line["output"] = row["answer"]
    texts, stopped = result["predictions"], result["stopped"]
    columns = {
        "stopped": stopped,
        "cut": [not value for value in stopped],
        "empty": [not text.strip() for text in texts],
        "repeated": [is_repeated(text) for text in texts],
    }
    if len(texts) == 1:
        line |= {"prediction": texts[0], **{name: values[0] for name, values in columns.items()}}
    else:
        line |= {"predictions": texts, **columns}
    if result["source_cut"]:
        line["source_tokens_cut"] = result["source_cut"]
    return line


def is_repeated(text: str) -> bool:
    """Does the text end in a loop, the same 1 to 100 characters four times over, twenty characters in all?"""
    text = text.rstrip()
    for period in range(1, min(100, (len(text) + 1) // 4) + 1):
        length = period  # of the end of the text that repeats with this period
        while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
            length += 1
        if length >= max(4 * period - 1, 20):  # one character may have been white space at the end
            return True
    return False


def describe_answers(lines: list[dict], max_new_tokens: int) -> str:
    """The rates of stopped, cut, empty and repeated answers, as a line."""
    shares = {}
    for name in ("stopped", "cut", "empty", "repeated"):
        values = [value for line in lines for value in (line[name] if isinstance(line[name], list) else [line[name]])]
        shares[name] = sum(values) / max(1, len(values))
    return (
        f"answers: {shares['stopped']:.1%} stopped by themselves, {shares['cut']:.1%} cut at --max_new_tokens"
        f" {max_new_tokens}, {shares['empty']:.1%} empty, {shares['repeated']:.1%} end in a loop"
    )


def describe_cut_questions(lines: list[dict], max_src_len: int) -> str:
    """How many questions were cut and by how much, as a line."""
    cuts = [line["source_tokens_cut"] for line in lines if "source_tokens_cut" in line]
    if not cuts:
        return f"questions: none was cut at --max_src_len {max_src_len}"
    return (
        f"questions: cut {len(cuts):,} of {len(lines):,} at --max_src_len {max_src_len}: {sum(cuts):,} tokens lost,"
        f" {max(cuts):,} of the longest (source_tokens_cut)"
    )


def put_in_order(path: str, num_rows: int) -> list:
    """Join the ranks' parts into one file in input order, then remove them; the rows of the file.

    RuntimeError where they do not hold one answer for each of the rows: the parts stay as they are then.
    """
    keys, lines = read_parts(path)
    if missing := set(range(num_rows)) - set(lines):
        raise RuntimeError(
            f"{path}: {len(missing)} of {num_rows} rows have no answer, first that of index {min(missing)}"
        )
    lines = {number: lines[number] for number in range(num_rows)}
    with whole_file(path) as file:
        file.writelines(lines.values())
    for part in keys:
        os.remove(part)
    return [json.loads(line) for line in lines.values()]
