"""What an answering command takes over from the run that made its model, and what fits into the model's window."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from checkpoints.opening import RUN_FILE, read_run
from rows.checks import Columns
from runtime.exits import UserError

if TYPE_CHECKING:
    from modeling.family import Prompt

LEAST_SRC_LEN = 16  # tokens: the words around the question, and something of it

# {flag: (its value where neither the command line nor the run gives one, is a run's value good, rule)}
RUN_FLAGS = {
    "max_src_len": (
        1024,
        lambda value: type(value) is int and value >= LEAST_SRC_LEN,
        f"must be a whole number of at least {LEAST_SRC_LEN}",
    ),
    "prompt_column": (None, lambda value: value is None or type(value) is str, "must be a field's name or null"),
    "response_column": ("output", lambda value: type(value) is str, "must be a field's name"),
}


def take_from_run(args: argparse.Namespace, names: Sequence[str]) -> list:
    """Fill in the flags of these names that were left out: the run's own, else the usual ones.

    Returns lines that say what of the run's is not the usual. UserError for a run.json with values that cannot be.
    """
    path, notes = os.path.join(args.model_path, RUN_FILE), []
    flags = read_run(path).get("flags") if os.path.isfile(path) else None
    for name in names:
        if getattr(args, name) is not None:
            continue
        usual, is_good, rule = RUN_FLAGS[name]
        value = flags.get(name, usual) if isinstance(flags, dict) else usual
        if not is_good(value):
            raise UserError(f"{path}: flags.{name} is {value!r}: {rule}: give --{name}")
        setattr(args, name, value)
        if value != usual:
            notes.append(f"--{name} {value}, from run.json of the model")
    return notes


def settle_columns(args: argparse.Namespace) -> tuple[Columns, list[Any]]:
    """(fields of the rows to answer, lines that say what of them comes from the run)."""
    notes = take_from_run(args, ("prompt_column", "response_column")) if args.test_path else []
    return columns_of(args), notes


def settle_lengths(args: argparse.Namespace, config: Any, prompt: Prompt) -> list[str]:
    """Fill in --max_src_len: the run's own, else the usual one, lowered where the window is too small for it.

    Returns lines that say so. UserError where --max_src_len was given and does not fit with --max_new_tokens, or where
    these leave nothing of a question.
    """
    is_given = args.max_src_len is not None
    notes = take_from_run(args, ("max_src_len",))
    problem = window_problem(args.max_src_len, args.max_new_tokens, config, prompt)
    if problem is None:
        return notes
    room = config.window - prompt.RESERVED - args.max_new_tokens
    if is_given or room < LEAST_SRC_LEN:
        raise UserError(problem)
    args.max_src_len = room
    return [f"--max_src_len {room}: more does not fit, with --max_new_tokens, the model's window of {config.window}"]


def window_problem(
    max_src_len: int, max_new_tokens: int, config: Any, prompt: Prompt, flag: str = "max_new_tokens"
) -> str | None:
    """Why questions and answers of these lengths do not fit the model's window, with the fix; None where they do.

    flag: what the length of answers is called.
    """
    room = config.window - prompt.RESERVED
    if max_src_len + max_new_tokens <= room:
        return None
    fixes = [
        f"--{name} {room - other}"
        for name, other, least in (("max_src_len", max_new_tokens, LEAST_SRC_LEN), (flag, max_src_len, 1))
        if room - other >= least
    ]
    fix = f"use at most {' or '.join(fixes)}" if fixes else "lower both"
    return (
        f"--{flag} {max_new_tokens}: does not fit, with --max_src_len {max_src_len} and {prompt.RESERVED} more tokens,"
        f" the model's window of {config.window} tokens: {fix}"
    )


def columns_of(args: argparse.Namespace) -> Columns:
    """The row's field names that the flags give."""
    return Columns(prompt=args.prompt_column, response=args.response_column)
