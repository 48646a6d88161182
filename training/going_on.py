"""Training that goes on from an adapter or a prefix encoder: its settings taken over, its values put onto the base."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from checkpoints.bases import OTHER_BASE_FIX
from checkpoints.kinds import KINDS, NO_BASE_FIX, SavedKind, has, marked_kind
from checkpoints.opening import BASE_FIX, RUN_FILE, check_opened, open_checkpoint, read_run
from checkpoints.trained_weights import fill, trained_shapes
from runtime.exits import UserError
from runtime.folders import file_entry
from train_types import TRAIN_TYPES, split_names

if TYPE_CHECKING:
    from checkpoints.opening import Opened

FIXES = {  # of the commands that are told the base by --model_name_or_path: of train.py
    BASE_FIX: "put it back there, or a link to it",
    NO_BASE_FIX: "write its folder or hub name into that file",
    OTHER_BASE_FIX: "put its own base there, or start anew from this one",
}
FREE_FLAG = "lora_dropout"  # of the training alone: the function of an adapter does not depend on it


def kind_to_go_on_from(path: str) -> Any:
    """The `SavedKind` of what --model_name_or_path names, where a training can go on from it, else None. UserError for
    a bad run.json."""
    if has(path, RUN_FILE):
        kind: SavedKind | None = KINDS[read_run(os.path.join(path, RUN_FILE))["weights"]]
    else:
        kind = marked_kind(path)
    return kind if kind and kind.flags else None


def take_over(args: argparse.Namespace, typed: Collection[str]) -> list[str] | None:
    """Fill in the flags that an adapter or a prefix encoder at --model_name_or_path decides.

    Returns problems, or None where it is a base. Sets args.continued_from, what run.json keeps of it: {"path", "step"},
    or None. typed: names of the flags on the command line.
    """
    args.continued_from = None
    path = args.model_name_or_path
    try:
        kind = kind_to_go_on_from(path)
        if kind is None:
            return None
        run = read_run(os.path.join(path, RUN_FILE)) if has(path, RUN_FILE) else {}
        fitting = [name for name, train_type in TRAIN_TYPES.items() if train_type.weights == kind.name]
        if args.train_type not in fitting:
            return [wrong_type(args, kind, fitting)]
        values = kind.flags(path, bool(run))
    except UserError as error:
        return [f"--model_name_or_path {error}"]
    problems = []
    for flag, value in values.items():
        own = getattr(args, flag)
        if flag in typed and flag != FREE_FLAG and not is_same(own, value):
            problems.append(
                f"--{flag} {own}: {kind.words} is trained on as it is, and {path} has {value}: remove this flag, or"
                " start anew from the base"
            )
        elif flag not in typed:
            setattr(args, flag, value)
    if run and args.mode not in (None, run["mode"]):
        problems.append(f"--mode {args.mode}: {path} is of {run['mode']}: change --mode or --model_name_or_path")
    args.mode = args.mode or run.get("mode")
    args.continued_from = {"path": os.path.abspath(path), "step": run.get("step")}
    return problems


def wrong_type(args: argparse.Namespace, kind: Any, fitting: list[str]) -> str:
    """The line for a train type that cannot go on from these weights."""
    path = args.model_name_or_path
    said = f"--train_type {args.train_type}: {path} holds {kind.words}, which --train_type {fitting[0]} trains on"
    return f"{said}; {kind.for_other_types.format(path=path)}"


def is_same(given: str, value: Any) -> Any:
    """Is a flag's value that of the adapter? Names of modules in any order."""
    return set(split_names(given)) == set(split_names(value)) if isinstance(value, str) else given == value


def open_start(args: argparse.Namespace) -> Opened | None:
    """The adapter or the prefix encoder that the run goes on from, opened; None where it begins with a base.

    From here on --model_name_or_path is the base, in run.json too, and flags say what the weights are. UserError as
    `open_checkpoint`.
    """
    if not getattr(args, "continued_from", None):
        return None
    with fixes_of_train():
        opened = open_checkpoint(args.model_name_or_path, args.mode, flag="--model_name_or_path")
    args.mode, args.model_name_or_path = opened.mode.name, opened.base_name
    vars(args).update(opened.config_changes())
    vars(args).update(opened.kind.flags_of_weights(opened, trained_shapes(opened)))
    return opened


@contextlib.contextmanager
def fixes_of_train() -> Iterator[None]:
    """In train.py the flag of the base names what it goes on from: a UserError gets a fix that is possible there."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for usual, fix in FIXES.items():
            text = text.replace(usual, fix)
        raise UserError(text) from None


def check_start(start: Any, config: Any) -> None:
    """`check_opened` for what a run goes on from; nothing where it begins with a base."""
    if start:
        with fixes_of_train():
            check_opened(start, config)


def put_start(model: Any, start: Any, args: argparse.Namespace) -> Any:
    """The base model as the start was, with its weights training. Collective under ZeRO-3."""
    if start.kind.trains:
        model = start.kind.trains(model, start, trained_shapes(start), args)
    else:
        model = TRAIN_TYPES[args.train_type].prepare(model, args, start.mode)
    fill(model, start)
    return model


def start_hashes(continued_from: dict) -> list:
    """SHA-256 of the files that decide what a run goes on from."""
    folder = continued_from["path"]
    names = [*dict.fromkeys(name for kind in KINDS.values() for name in (*kind.files, *kind.marks)), "config.json"]
    paths = [os.path.join(folder, name) for name in names if has(folder, name)]
    return sorted(file_entry(path)["sha256"] for path in paths)
