"""Every flag of the scripts but train.py's, once, with the checks on their combinations; and what all scripts share."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from typing import Any

from checkpoints.kinds import has, marked_kind
from checkpoints.opening import RUN_FILE, no_checkpoint_problem
from checkpoints.weight_files import INDEX_FILES, WEIGHT_FILES
from modes import MODES, possible_modes
from runtime.exits import UserError, fail

MAX_NAME = 200  # bytes of a file's name; most file systems have 255, and endings such as .partial come behind


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line; flags are typed in full, so that none is taken for another."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        fail(f"{message} (see --help)", prog=self.prog)

    def typed(self, argv: list[str]) -> set[str]:
        """Names of the flags that stand on the command line."""
        given = {word.split("=")[0] for word in argv}
        return {action.dest for action in self._actions if given & set(action.option_strings)}


def expanded_path(text: str) -> str:
    """A path as a flag gives it, `~` for the home folder: a shell expands it at the start of a word only."""
    return os.path.expanduser(text)


def true_or_false(text: str) -> bool:
    """'True' or 'False' in any case; `bool` as a type would call every text true."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def add_device_flags(
    parser: Any, precision: str = "auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on CPU"
) -> None:
    """--device and --precision, alike everywhere."""
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=precision)
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="given by some launchers; the LOCAL_RANK variable decides",
    )


def add_row_flags(parser: Any) -> None:
    """Names of the fields of a row."""
    parser.add_argument(
        "--prompt_column",
        help="field that holds the whole question; left out: instruction and input, joined with nothing between",
    )
    parser.add_argument("--response_column", default="output", help="field that holds the answer, a string or a number")


def add_answered_row_flags(parser: argparse.ArgumentParser) -> None:
    """Those of rows to answer, which a run.json beside the model gives where they are left out (lengths.py)."""
    parser.add_argument(
        "--max_src_len", type=int, help="tokens of the question; the rest is cut; left out: the run's own, else 1024"
    )
    parser.add_argument(
        "--prompt_column",
        help="field that holds the whole question; '': instruction + input; left out: the run's own, else those two",
    )
    parser.add_argument("--response_column", help="field that holds the answer; left out: the run's own, else output")


def add_base_flag(parser: argparse.ArgumentParser) -> None:
    """Where the base model of an adapter or a prefix encoder is now."""
    parser.add_argument(
        "--model_name_or_path",
        type=expanded_path,
        help="base checkpoint, if it has moved since the training or the folder does not name it; left out: read from"
        " run.json or, of other tools' adapters, adapter_config.json",
    )
    parser.add_argument(
        "--allow_other_base",
        action="store_true",
        help="take a base of other weights, precision or config.json than the training had; off: refuse it",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The model that answers: whatever is saved here, a released one, or one of another tool."""
    parser.add_argument(
        "--model_path",
        type=expanded_path,
        required=True,
        help="released, merged, adapter or prefix folder, or a hub name",
    )
    parser.add_argument("--mode", choices=MODES, help="model family; left out: read from the checkpoint")
    add_base_flag(parser)


def add_normalize_flag(parser: Any, when: str = "") -> None:
    """--no_normalize, alike wherever answers are scored."""
    parser.add_argument(
        "--no_normalize",
        action="store_true",
        help=f"score texts as they are{when}; off: both sides are folded with NFKC, so that full-width and ASCII marks"
        " are alike",
    )


def collect(function: Callable, *values: Any, prefix: str = "") -> list[str]:
    """The problem that a call raises, as a list."""
    try:
        function(*values)
    except UserError as error:
        return [f"{prefix}{error}"]
    return []


def range_problems(
    args: argparse.Namespace, at_least_one: str = "", at_least_zero: str = "", share: str = "", seed: str = ""
) -> list:
    """Numbers outside their range."""
    problems = []
    for names, rule, good in (
        (at_least_one, "must be at least 1", lambda value: value >= 1),
        (at_least_zero, "must be 0 or more", lambda value: value >= 0 and math.isfinite(value)),
        (
            f"{at_least_one} {at_least_zero}",
            f"must be at most {2**31 - 1}",
            lambda value: not 2**31 <= value < math.inf,
        ),
        (share, "must be 0 or more and below 1", lambda value: 0 <= value < 1),
        (seed, f"must be from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not good(value):
                problems.append(f"--{name} {value}: {rule}")
    return problems


def model_problems(args: argparse.Namespace, flag: str, path: str) -> list[str]:
    """Is there a checkpoint at `path`, and is it of --mode? Fills in a missing args.mode; hub names come later."""
    if not os.path.isdir(path):
        if os.path.exists(path):
            return [f"{flag} {path}: is a file: name the checkpoint's folder"]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            return []
        return [f"{flag} {path}: no such folder: give a checkpoint folder or a hub name such as THUDM/chatglm3-6b"]
    return folder_problems(args, flag, path)


def opened_problems(args: argparse.Namespace, flag: str, path: str) -> list[str]:
    """`model_problems` of what a command opens on top of a base, too: opening it says what is wrong with it."""
    if has(path, RUN_FILE):
        return []
    if os.path.isdir(path) and (args.model_name_or_path or marked_kind(path)):
        return list(filter(None, [no_checkpoint_problem(flag, path)]))
    return model_problems(args, flag, path)


def folder_problems(args: argparse.Namespace, flag: str, path: str) -> list[str]:
    """Problems of a local checkpoint folder."""
    if problem := no_checkpoint_problem(flag, path):
        return [problem]
    if not os.path.isfile(os.path.join(path, "config.json")):
        return [f"{flag} {path}: no config.json in it: name a folder with a whole checkpoint"]
    if not any(os.path.isfile(os.path.join(path, name)) for name in (*WEIGHT_FILES, *INDEX_FILES)):
        return [
            f"{flag} {path}: no weights in it (none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))}):"
            " download them, or merge first if it is an adapter"
        ]
    try:
        names = possible_modes(path)
    except UserError as error:
        return [f"{flag} {error}"]
    if args.mode is None:
        if len(names) != 1:
            found = " or ".join(names) or "none of " + ", ".join(MODES)
            return [f"--mode: config.json of {path} fits {found}: give --mode"]
        args.mode = names[0]
    if args.mode not in names:
        found = " or ".join(names) or "no family known here"
        return [f"--mode {args.mode}: config.json of {path} is of {found}: change --mode or {flag}"]
    return []


def place_problem(flag: str, path: str) -> str | None:
    """Why nothing can be made at `path`, or None: the nearest folder that exists must be one to write in."""
    if not path:
        return f"{flag} '': is empty: name a place"
    if any(len(os.fsencode(part)) > MAX_NAME for part in path.split(os.sep)):
        return f"{flag} {path}: a name in it is longer than {MAX_NAME} bytes: choose a shorter one"
    parent = os.path.abspath(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) and parent != os.path.abspath(path):
        return f"{flag} {path}: {parent} is a file: choose another place"
    if not os.access(parent, os.W_OK):
        return f"{flag} {path}: {parent} is read-only: choose another place"
    return None
