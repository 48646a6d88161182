"""Is a state what a run has saved? Its files against the manifest, its values against what a run can count.

A file that was edited, by hand or by an accident, is refused by name, and nothing in it is followed out of the folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Any

from checkpoints.progress import Progress
from runtime.exits import UserError
from runtime.folders import MANIFEST, read_manifest, verify
from utils import read_json

STATE = r"state-step-(\d+)"
STATE_FILE = "state.json"
TAG = "deepspeed"  # folder of DeepSpeed's files inside a state
KINDS = ("optim_states.pt", "model_states.pt")  # of them: one for each process, and the weights
COUNTS_OF_STEPS = ("num_applied", "num_skipped", "best_step", "num_worse", "usual_loss.count")  # at most the updates
ANY_SIGN = ("best_value", "usual_loss.mean", "window_loss")
MOST = 2**63 - 1  # of any other count; infinity is more


def state_problems(folder: str, full: bool = True) -> list[str]:
    """Why a state is not whole, one line each: files that are not as they were saved, or that no process has saved.

    full: compare SHA-256 too.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.lexists(path):
        return [f"{path}: missing"]
    if problems := verify(folder, full):
        return problems
    named = set(read_manifest(folder))
    if STATE_FILE not in named:
        return [f"{path}: does not name {STATE_FILE}"]
    try:
        world = read_json(os.path.join(folder, STATE_FILE)).get("world_size")
    except UserError as error:
        return [str(error)]
    optimizers, weights = (sum(name.startswith(f"{TAG}/") and name.endswith(kind) for name in named) for kind in KINDS)
    if type(world) is not int or world != optimizers or not weights:
        return [f"{path}: names {optimizers} files of optimizers and {weights} of weights, of {world!r} processes"]
    if missing := [name for rank in range(world) if (name := f"rank-{rank}.pt") not in named]:
        return [f"{path}: does not name {missing[0]}"]
    extra = [name for name in sorted(os.listdir(os.path.join(folder, TAG))) if f"{TAG}/{name}" not in named]
    return [f"{os.path.join(folder, TAG, name)}: is not in {MANIFEST}" for name in extra]


def read_info(folder: str) -> dict:
    """state.json of a state."""
    path = os.path.join(folder, STATE_FILE)
    info = read_json(path)
    kinds = {"progress": dict, "fingerprint": dict, "split": list, "world_size": int}
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind):
            raise UserError(f"--resume: {path}: {key} is {info.get(key)!r}: use another state")
    split, progress = info["split"], info["progress"]
    if len(split) != 3 or any(type(number) is not int or number < 1 for number in split):
        raise UserError(f"--resume: {path}: split is {split!r}, not three numbers: use another state")
    new = {"step": 0, **asdict(Progress())}
    unlike = [name for name in progress if name not in new or not is_like(progress[name], new[name])]
    unlike += [name for name in ("step", "usual_loss") if name not in progress]
    if unlike:
        value = progress.get(unlike[0], "missing")
        raise UserError(f"--resume: {path}: progress.{unlike[0]} is {value!r}: use another state")
    if info["world_size"] != split[2]:
        raise UserError(
            f"--resume: {path}: world_size is {info['world_size']}, but split is {split!r}: use another state"
        )
    return info


def is_like(value: Any, new: Any) -> bool:
    """Is a value of a state's progress of the kind that it is in a new run?"""
    if isinstance(new, dict):
        return isinstance(value, dict) and all(name in new and is_like(value[name], new[name]) for name in value)
    if new is None:
        return value is None or type(value) in (int, float)
    return type(value) in (int, float) if type(new) is float else type(value) is type(new)


def check_range(folder: str, info: dict, num_steps: int) -> None:
    """UserError where a count of a state can be that of no run of `num_steps` updates: it was edited.

    A state is saved after an update that is not the last one.
    """
    path, progress = os.path.join(folder, STATE_FILE), info["progress"]
    step = progress["step"]
    counted = progress | {f"usual_loss.{name}": value for name, value in progress["usual_loss"].items()}
    for name, value in counted.items():
        if type(value) not in (int, float):
            continue
        least = -MOST if name in ANY_SIGN else 0
        most = num_steps - 1 if name == "step" else step if name in COUNTS_OF_STEPS else MOST
        if not least <= value <= most:  # nor is a NaN
            rule = f"must be from {least} to {most} in this run: use another state"
            raise UserError(f"--resume: {path}: progress.{name} is {value}, {rule}")
    named = re.fullmatch(STATE, os.path.basename(os.path.abspath(folder)))
    if named and int(named[1]) != step:
        raise UserError(f"--resume: {path}: progress.step is {step}, its folder says {named[1]}: use another state")
