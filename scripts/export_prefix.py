"""Write a prefix encoder as the official P-Tuning code loads it: pytorch_model.bin and config.json in a folder.

    python scripts/export_prefix.py --model_dir output-glm/epoch-2-step-720

Prefix encoders of up to 256 MiB are saved that way by train.py already; this is for the larger ones.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder
from runtime import entry  # noqa: I001  first: Ctrl-C is heard while the others are imported

# isort: split

import shutil

from checkpoints.adapter_settings import PREFIX_FILE
from checkpoints.kinds import KINDS
from checkpoints.opening import RUN_FILE, read_run
from checkpoints.released_files import PREFIX_BIN_FILE
from checkpoints.saving import check_written
from checkpoints.weight_files import finite_problem, safetensors_shapes, write_bin
from flags.common import OneLineParser, place_problem
from runtime.exits import UserError
from runtime.folders import new_folder, require_space, verify
from runtime.holding import holding, require_there
from utils import prepare_environment


def export_prefix(model_dir, output_dir):
    """Write `output_dir`, which appears whole or not at all; UserError says what is wrong with the folders."""
    if problem := place_problem("--output_dir", output_dir):
        raise UserError(problem)
    with holding(output_dir, "--output_dir"):
        write_export(model_dir, output_dir)


def write_export(model_dir, output_dir):
    """`export_prefix`, alone with `output_dir`."""
    run_path = os.path.join(model_dir, RUN_FILE)
    if not os.path.isfile(run_path):
        raise UserError(f"--model_dir {model_dir}: no {RUN_FILE} in it: name a checkpoint folder that train.py saved")
    kind = KINDS[read_run(run_path)["weights"]]
    if not kind.base_makes_it:
        raise UserError(f"--model_dir {model_dir}: holds {kind.name} weights: name one of --train_type ptuning")
    if os.path.exists(output_dir):
        raise UserError(f"--output_dir {output_dir}: exists: choose a new folder")
    if problem := next(iter(verify(model_dir)), None):
        raise UserError(problem)
    path = os.path.join(model_dir, PREFIX_FILE)
    safetensors_shapes(path)  # says what is wrong with the file
    require_space(output_dir, os.path.getsize(path), "the prefix encoder")

    from safetensors.torch import load_file

    state = load_file(path)
    if bad := finite_problem(state.items()):
        raise UserError(f"{path}: {bad}: use another checkpoint")
    require_there(output_dir)
    with new_folder(output_dir) as scratch:
        shutil.copyfile(os.path.join(model_dir, "config.json"), os.path.join(scratch, "config.json"))
        write_bin(state, os.path.join(scratch, PREFIX_BIN_FILE))
        check_written(scratch, state)


def main(argv):
    parser = OneLineParser(prog="export_prefix.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True, help="checkpoint folder of --train_type ptuning")
    parser.add_argument("--output_dir", help="new folder; without it: the checkpoint's name and -official")
    args = parser.parse_args(argv)
    prepare_environment("cpu")
    output_dir = args.output_dir or os.path.normpath(args.model_dir) + "-official"
    try:
        export_prefix(args.model_dir, output_dir)
    except OSError as error:
        raise UserError(str(error)) from None
    print(f"saved {output_dir}")


if __name__ == "__main__":
    entry.run(main)
