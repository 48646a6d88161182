"""Training that goes on from an adapter or a prefix encoder: its settings taken over, its values put onto the base."""

import contextlib
import os

from checkpoints.adapter_settings import MATRIX, SETTINGS_FILE, read_settings
from checkpoints.bases import OTHER_BASE_FIX
from checkpoints.foreign import NO_BASE_FIX, has, holds_adapter
from checkpoints.opening import BASE_FIX, RUN_FILE, check_opened, open_checkpoint, read_run
from checkpoints.trained_weights import TRAINED_FILES, fill, settings_of, trained_shapes
from modes import LORA_TARGETS
from runtime.exits import UserError
from runtime.folders import file_entry
from runtime.plain_files import shown
from train_types import TRAIN_TYPES, add_lora, split_names
from utils import read_json

NAMES = {"adapter": "an adapter", "prefix": "a prefix encoder"}
FIXES = {  # of the commands that are told the base by --model_name_or_path: of train.py
    BASE_FIX: "put it back there, or a link to it",
    NO_BASE_FIX: "write its folder or hub name into that file",
    OTHER_BASE_FIX: "put its own base there, or start anew from this one",
}
FREE_FLAG = "lora_dropout"  # of the training alone: the function of an adapter does not depend on it


def kind_to_go_on_from(path):
    """The kind of what --model_name_or_path names: "adapter", "prefix", or None. UserError for a bad run.json."""
    if has(path, RUN_FILE):
        weights = read_run(os.path.join(path, RUN_FILE))["weights"]
        return weights if weights in NAMES else None
    return "adapter" if holds_adapter(path) else None


def take_over(args, typed):
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
        fitting = [name for name, train_type in TRAIN_TYPES.items() if train_type.weights == kind]
        if args.train_type not in fitting:
            return [wrong_type(args, kind, fitting)]
        values = adapter_flags(path, bool(run)) if kind == "adapter" else prefix_flags(path)
    except UserError as error:
        return [f"--model_name_or_path {error}"]
    problems = []
    for flag, value in values.items():
        own = getattr(args, flag)
        if flag in typed and flag != FREE_FLAG and not is_same(own, value):
            problems.append(
                f"--{flag} {own}: {NAMES[kind]} is trained on as it is, and {path} has {value}: remove this flag, or"
                " start anew from the base"
            )
        elif flag not in typed:
            setattr(args, flag, value)
    if run and args.mode not in (None, run["mode"]):
        problems.append(f"--mode {args.mode}: {path} is of {run['mode']}: change --mode or --model_name_or_path")
    args.mode = args.mode or run.get("mode")
    args.continued_from = {"path": os.path.abspath(path), "step": run.get("step")}
    return problems


def wrong_type(args, kind, fitting):
    """The line for a train type that cannot go on from these weights."""
    path = args.model_name_or_path
    said = f"--train_type {args.train_type}: {path} holds {NAMES[kind]}, which --train_type {fitting[0]} trains on"
    if kind == "adapter":
        return f"{said}; for others merge it (python merge_lora.py --model_dir {path}) and give the merged folder"
    return f"{said}; for others give the base: a prefix encoder cannot be merged into it"


def is_same(given, value):
    """Is a flag's value that of the adapter? Names of modules in any order."""
    return set(split_names(given)) == set(split_names(value)) if isinstance(value, str) else given == value


def adapter_flags(folder, is_own):
    """{flag: value} of an adapter's settings."""
    values = read_settings(folder, is_own)
    dropout, targets = values.get("lora_dropout") or 0.0, values["target_modules"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{folder}/{SETTINGS_FILE}: lora_dropout = {dropout!r}: must be 0 or more and below 1")
    names = LORA_TARGETS if targets == "all-linear" else targets
    names = shown(names) if isinstance(names, str) else ",".join(sorted({name.split(".")[-1] for name in names}))
    return {
        "lora_dim": values["r"],
        "lora_alpha": float(values["lora_alpha"]),
        "lora_module_name": names,
        FREE_FLAG: float(dropout),
    }


def prefix_flags(folder):
    """{flag: value} of a prefix encoder's settings; what is wrong with them is said when it is opened."""
    saved = read_json(os.path.join(folder, "config.json"))
    return {name: saved.get(name) for name in ("pre_seq_len", "prefix_projection")}


def open_start(args):
    """The adapter or the prefix encoder that the run goes on from, opened; None where it begins with a base.

    From here on --model_name_or_path is the base, in run.json too, and flags say what the weights are. UserError as
    `open_checkpoint`.
    """
    if not getattr(args, "continued_from", None):
        return None
    with fixes_of_train():
        opened = open_checkpoint(args.model_name_or_path, args.mode, flag="--model_name_or_path")
    args.mode, args.model_name_or_path = opened.mode.name, opened.base_name
    if opened.weights == "prefix":
        vars(args).update(opened.prefix_settings())
    else:  # an expression may have chosen the modules
        modules = {match[1].split(".")[-1] for match in map(MATRIX.fullmatch, trained_shapes(opened)) if match}
        args.lora_module_name = ",".join(sorted(modules))
    return opened


@contextlib.contextmanager
def fixes_of_train():
    """In train.py the flag of the base names what it goes on from: a UserError gets a fix that is possible there."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for usual, fix in FIXES.items():
            text = text.replace(usual, fix)
        raise UserError(text) from None


def check_start(start, config):
    """`check_opened` for what a run goes on from; nothing where it begins with a base."""
    if start:
        with fixes_of_train():
            check_opened(start, config)


def put_start(model, start, args):
    """The base model as the start was, with its weights training. Collective under ZeRO-3."""
    if start.weights == "adapter":
        changes = {"inference_mode": False, "lora_dropout": args.lora_dropout}
        model = add_lora(model, settings_of(start, trained_shapes(start), **changes))
    else:
        model = TRAIN_TYPES[args.train_type].prepare(model, args, start.mode)
    fill(model, start)
    return model


def start_hashes(continued_from):
    """SHA-256 of the files that decide what a run goes on from."""
    folder = continued_from["path"]
    names = [*dict.fromkeys(name for names in TRAINED_FILES.values() for name in names), SETTINGS_FILE, "config.json"]
    paths = [os.path.join(folder, name) for name in names if has(folder, name)]
    return sorted(file_entry(path)["sha256"] for path in paths)
