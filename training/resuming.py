"""Which state a run goes on from, and whether it is that of this run."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from checkpoints.opening import CHECKPOINT
from checkpoints.state_checks import STATE, check_range, read_info, state_problems
from checkpoints.states import LEFTOVERS
from checkpoints.weight_files import weight_files
from runtime.exits import UserError
from runtime.folders import file_entry, numbered, remove_leftovers, whole_file
from training.ds_config import what_counts
from training.going_on import start_hashes
from utils import dump_json, read_json

if TYPE_CHECKING:
    from rows.batches import Split
    from training.setup import Setup

FINGERPRINT_FILE = "fingerprint.json"  # in the run's folder
# What may differ between a run and the one that goes on: where things lie (their contents are compared), what is
# shown and kept, and the split of an update, whose size is compared instead.
FREE_FLAGS = (
    "output_dir resume save_model_step save_state_step save_total_limit show_loss_step step_timeout start_timeout"
    " local_rank num_proc train_path model_name_or_path ds_file device precision optimizer per_device_train_batch_size"
    " gradient_accumulation_steps eval_path eval_step eval_generate eval_max_new_tokens metric_for_best_model"
    " early_stopping_patience replay_path task continued_from"
).split()


def choose_state(
    args: argparse.Namespace, current: dict, split: Split, num_steps: int
) -> tuple[str | None, dict | None]:
    """(folder, state.json) of the state that `--resume` means, checked against this run; (None, None): begin anew.

    current: the run's `fingerprint`. num_steps: its updates. UserError names what differs. For the first process.
    """
    remove_leftovers(args.output_dir, LEFTOVERS)
    if args.resume is None:
        return None, None
    folder, skipped = find_state(args.resume, args.output_dir)
    for line in skipped:
        print(line, flush=True)
    if folder is None:
        check_own_folder(args.output_dir, current)
        print(f"--resume auto: no whole state in {args.output_dir}, the run begins", flush=True)
        return None, None
    info = read_info(folder)
    notes = check_same_run(folder, info, current, split)
    check_range(folder, info, num_steps)
    print(f"resumed from {folder}: {info['progress']['step']} updates are done", flush=True)
    for line in notes:
        print(f"note: {line}", flush=True)
    return folder, info


def check_own_folder(output_dir: str, current: dict) -> None:
    """May a run begin anew where no state is? UserError where the folder has checkpoints of another run."""
    kept = numbered(output_dir, CHECKPOINT)
    path = os.path.join(output_dir, FINGERPRINT_FILE)
    lines = differences(read_json(path), current) if os.path.isfile(path) else ["it does not say what its flags were"]
    if kept and lines:
        raise UserError(
            f"--resume auto: {output_dir} has {kept[0]} of another run ({'; '.join(lines)}) and no whole state: choose"
            " a new --output_dir, so that no run is lost"
        )


def find_state(resume: str | None, output_dir: str) -> tuple[str | None, list[str]]:
    """(folder of the state to resume from or None, lines that say what was skipped) for `--resume`.

    auto: the newest whole state in output_dir. UserError where a named state is not whole.
    """
    if resume != "auto":
        if problems := state_problems(resume):
            raise UserError(f"--resume {resume}: {problems[0]}: use an older state, or --resume auto")
        return resume, []
    skipped = []
    for name in numbered(output_dir, STATE):
        folder = os.path.join(output_dir, name)
        problems = state_problems(folder)
        if not problems:
            return folder, skipped
        skipped.append(f"--resume auto: {folder} is left out, it is not whole: {problems[0]}")
    return None, skipped


def fingerprint(args: argparse.Namespace, base_folder: str, rows_key: str, setup: Setup, optimizer_name: str) -> dict:
    """Everything that decides the weights of a run besides the split of its updates: {name: value}.

    Reads the base weights once, for their SHA-256.
    """
    names = [*weight_files(base_folder), "config.json"]
    with ThreadPoolExecutor(4) as threads:
        hashes = list(threads.map(lambda name: file_entry(os.path.join(base_folder, name))["sha256"], names))
    flags = {f"--{name}": value for name, value in sorted(vars(args).items()) if name not in FREE_FLAGS}
    start = getattr(args, "continued_from", None)
    return {
        **flags,
        **({"weights it went on from": start_hashes(start)} if start else {}),
        "--precision": setup.precision,
        "--device": setup.device.type,
        "--optimizer": optimizer_name,
        "--ds_file": what_counts(setup.ds_config),
        "rows of --train_path": rows_key,
        "base weights": sorted(hashes),
    }


def write_fingerprint(output_dir: str, current: dict) -> None:
    """Say in the run's folder, before anything else lies there, whose it is: whole or not at all."""
    with whole_file(os.path.join(output_dir, FINGERPRINT_FILE)) as file:
        dump_json(current, file)


def differences(saved: dict, current: dict) -> list:
    """What differs between two fingerprints, one line each."""
    lines = []
    for name in sorted({*saved, *current}):
        old, new = saved.get(name), current.get(name)
        if name == "--ds_file" and isinstance(old, dict):
            old = what_counts(old)
        if name not in saved and new is False:
            continue  # a switch that came after the run began, and is off
        if old != new:
            values = f"{old}, now it is {new}" if name.startswith("--") and name != "--ds_file" else "other contents"
            lines.append(f"{name} was {values}")
    # A flag of the rows changes their key too: the flag says more.
    return [line for line in lines if line.startswith("--")] or lines


def check_same_run(folder: str, info: dict, current: dict, split: Split) -> list:
    """Is this the run that saved the state? UserError names what differs. Returns notes on why bits may differ.

    split: (micro-batch, accumulation, processes). Another split is fine where an update has as many rows.
    """
    if lines := differences(info["fingerprint"], current):
        raise UserError(
            f"--resume {folder}: {'; '.join(lines)}: resume with what the run began with, or start anew in another"
            " --output_dir"
        )
    old, new = info["split"], list(split)
    sizes = [parts[0] * parts[1] * parts[2] for parts in (old, new)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--resume {folder}: an update had {sizes[0]} rows ({' x '.join(map(str, old))}: micro-batch, accumulation,"
            f" processes), now it has {sizes[1]} ({' x '.join(map(str, new))}): change --gradient_accumulation_steps"
            f" so that it is {sizes[0]}"
        )
    notes = []
    if old != new:
        notes.append(
            f"an update is split differently ({' x '.join(map(str, old))} before, {' x '.join(map(str, new))} now): the"
            " same rows make the same updates, but rounding and dropout differ"
        )
    if str(current.get("--optimizer")).startswith("DeepSpeed"):
        notes.append("DeepSpeed's CPU AdamW does not restart to the bit, --optimizer torch does: docs/reliability.md")
    return notes
