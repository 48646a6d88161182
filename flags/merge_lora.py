"""The flags of merge_lora.py, with their checks."""

from __future__ import annotations

import argparse
import os

from checkpoints.kinds import KINDS, kind_of, merge_problem
from checkpoints.opening import RUN_FILE, no_checkpoint_problem, read_run
from flags.common import OneLineParser, add_base_flag, add_device_flags, expanded_path, model_problems, place_problem
from modes import MODES
from runtime.exits import UserError


def merge_parser() -> OneLineParser:
    """Flags of merge_lora.py."""
    parser = OneLineParser(prog="merge_lora.py", description="Merge a LoRA adapter into its base: a plain checkpoint.")
    parser.add_argument(
        "--model_dir",
        type=expanded_path,
        required=True,
        help="a folder that train.py saved with --train_type lora, or an adapter of another tool",
    )
    parser.add_argument("--mode", choices=MODES, help="model family; left out: read from the run or the base")
    parser.add_argument("--output_dir", type=expanded_path, help="new folder; left out: MODEL_DIR-merged")
    add_base_flag(parser)
    add_device_flags(parser, precision="of the merged weights; auto: the base checkpoint's own")
    parser.set_defaults(device="cpu")  # it merges in float32, which not every GPU has room for
    return parser


def check_arguments(args: argparse.Namespace, output_dir: str) -> None:
    """UserError where --model_dir is no adapter, or the merged model cannot be written."""
    folder = args.model_dir
    [mergeable] = [kind for kind in KINDS.values() if kind.not_mergeable is None]
    run_path = os.path.join(folder, RUN_FILE)
    if os.path.isfile(run_path):
        kind = KINDS[read_run(run_path)["weights"]]
    elif problem := no_checkpoint_problem("--model_dir", folder, mergeable.name):
        raise UserError(problem)
    elif os.path.isdir(folder):
        kind = kind_of(folder)
    else:
        [problem] = model_problems(args, "--model_dir", folder) or [None]
        if problem:
            raise UserError(problem)
        kind = mergeable  # a hub name
    if problem := merge_problem("--model_dir", folder, kind):
        raise UserError(problem)
    for problem in output_problems(output_dir):
        raise UserError(problem)


def output_problems(output_dir: str) -> list[str]:
    """Why the merged model cannot be written there, a line in a list."""
    if os.path.exists(output_dir):
        return [f"--output_dir {output_dir}: exists: choose a new folder"]
    return list(filter(None, [place_problem("--output_dir", output_dir)]))
