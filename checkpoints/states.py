"""States that a run is resumed from: saved by all ranks, found again, compared with the run, loaded.

A state is a folder state-step-N: DeepSpeed's files (trained weights, optimizer shards, learning rate, loss scale;
frozen weights are not written), rank-R.pt with the random states of each rank, state.json with the counters and a
fingerprint of the run, and the manifest that closes it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from checkpoints.opening import CHECKPOINT
from checkpoints.pickles import check_pickle
from checkpoints.state_checks import KINDS, STATE, STATE_FILE, TAG
from checkpoints.weight_files import finite_problem
from runtime import folders
from runtime.distributed import gather, on_main
from runtime.exits import BadNumbersError, UserError
from runtime.folders import PARTIAL, close_folder, require_space
from runtime.ranks import is_main, world_size
from utils import write_json

if TYPE_CHECKING:
    import torch

LEFTOVERS = f"({STATE}(-universal)?|{CHECKPOINT}|best)"  # what a process may leave half written of, in a run's folder
DEAD_SECONDS = 3  # if an error comes of another process's death, the watch ends this one meanwhile, and says so


def safe_classes() -> list:
    """What DeepSpeed's files hold besides tensors and plain Python values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, collections.OrderedDict]


def load_tensors(path: str, map_location: Any = "cpu") -> Any:
    """torch.load of a state's file, which may hold nothing that runs; UserError otherwise."""
    import torch

    try:
        check_pickle(path, tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in safe_classes()))
        with torch.serialization.safe_globals(safe_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UserError as error:
        raise UserError(f"--resume: {error}") from None
    except pickle.UnpicklingError as error:
        reason = "holds more than tensors: it is not read, since that could run code of others"
        raise UserError(f"--resume: {path}: {reason} ({str(error).splitlines()[0][:80]}): do not use it") from None
    except Exception as error:  # bytes that are no tensors make the reader fail in many ways
        raise UserError(f"--resume: {path}: cannot be read ({type(error).__name__}): use another state") from None


def state_files(folder: str) -> Any:
    """DeepSpeed's interface to storage, for one state: notes what it writes, unpickles nothing but tensors.

    Errors of the disk are kept in `problem` and not raised: all ranks must come to the end of a save together.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class StateFiles(CheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.problem: Any = None
            self.written: dict[str, int] = {}

        def create(self, info: dict) -> None:
            """Nothing to prepare."""

        def commit(self, info: dict) -> bool:
            """Nothing to close: `close_state` does that for all ranks."""
            return True

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """A folder inside the state's, which is there unless somebody has removed it."""
            with self.noting_problem(), contextlib.suppress(FileExistsError):
                os.mkdir(path)

        def save(self, state_dict: dict, path: str) -> None:
            """Write a file to the disk."""
            import torch

            folders.reached("before a file")
            with self.noting_problem():
                if bad := finite_problem(tensors_in(state_dict)):
                    self.problem = BadNumbersError(f"{bad}: no state was saved")
                if self.problem is None:
                    with folders.new_file(path) as file, without_crc32():
                        torch.save(state_dict, file)
                    self.written[os.path.relpath(path, folder)] = os.path.getsize(path)
            folders.reached("after a file")

        def load(self, path: str, map_location: Any = None) -> Any:
            """Read a file."""
            return load_tensors(path, map_location)

        @contextlib.contextmanager
        def noting_problem(self) -> Iterator[None]:
            """Keep the error of a full or broken disk."""
            try:
                yield
            except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
                self.problem = self.problem or str(getattr(error, "strerror", None) or error)

    return StateFiles()


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """torch.save without the checksums of its file format: the manifest's SHA-256 says more, and costs no waiting."""
    import torch

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def tensors_in(value: Any, name: str = "") -> Iterator[Any]:
    """Yield (name, tensor) of all tensors inside dicts, lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_in(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from tensors_in(part, f"{name}.{number}".lstrip("."))


def random_states() -> dict:
    """The random states of this process, as plain values and tensors."""
    import numpy
    import torch

    state: Any = numpy.random.get_state()
    name, keys, *rest = state
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Any) -> None:
    """The inverse of `random_states`."""
    import numpy
    import torch

    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, "uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# Saving.


def state_bytes(num_trained: int, dtype: torch.dtype) -> int:
    """About what a state takes: float32 weights and both moments of Adam, and the weights as the model holds them."""
    return num_trained * (12 + dtype.itemsize) + (1 << 20)


def write_state(engine: Any, folder: str, num_bytes: int) -> dict:
    """Write the files of a state beside its name, not yet flushed: {relative path: bytes}. Collective.

    num_bytes: about what it will take. UserError, on every rank, where the disk is full: all is as it was before.
    BadNumbersError where a value is not finite.
    """
    import torch.distributed as dist

    scratch = folder + PARTIAL

    def prepare() -> None:
        require_space(os.path.dirname(folder), num_bytes, "a state")
        shutil.rmtree(scratch, ignore_errors=True)
        os.mkdir(scratch)

    on_main(prepare)
    files = state_files(scratch)
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda path: None  # DeepSpeed writes it past `files`
    engine.save_checkpoint(scratch, TAG, save_latest=False, exclude_frozen_parameters=True)
    files.save(random_states(), os.path.join(scratch, f"rank-{dist.get_rank()}.pt"))
    found = gather((files.problem, files.written))
    for problem, _ in found:
        if problem:
            if is_main():
                shutil.rmtree(scratch, ignore_errors=True)
            raise problem if isinstance(problem, BadNumbersError) else UserError(problem)
    return {name: size for _, written in found for name, size in written.items()}


def close_state(folder: str, info: dict, sizes: dict) -> None:
    """Flush and hash a state that all ranks have written, and give it its name. For the first process.

    info: what state.json holds. sizes: what `write_state` returned. OSError leaves everything as it was.
    """
    scratch = folder + PARTIAL
    optimizers = [name for name in sizes if name.endswith(KINDS[0])]
    randoms = [name for name in sizes if name.startswith("rank-")]
    assert len(optimizers) == len(randoms) == info["world_size"], f"files of a state are missing: {sorted(sizes)}"
    try:
        write_json(info, os.path.join(scratch, STATE_FILE))
        close_folder(scratch, folder, sizes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def universal_folder(state: str) -> str:
    """Where a state lies that was converted for another number of processes; removed when it has been loaded."""
    return os.path.normpath(state) + "-universal" + PARTIAL


def convert(state: str) -> None:
    """Convert a state of another number of processes to DeepSpeed's universal format. Collective."""

    def run() -> None:
        shutil.rmtree(universal_folder(state), ignore_errors=True)
        for name in os.listdir(os.path.join(state, TAG)):  # the converter unpickles whatever it finds
            load_tensors(os.path.join(state, TAG, name), "meta")
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", os.path.join(state, TAG)]
        command += ["--output_folder", os.path.join(universal_folder(state), TAG)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"--resume {state}: DeepSpeed cannot convert it to {world_size()} processes ({reason}): start as many"
                " as before"
            )

    on_main(run)


def load_state(engine: Any, state: str, info: dict, seed: int) -> None:
    """Load a state into the engine and set the random states. Collective."""
    import torch
    import torch.distributed as dist

    is_same_world = info["world_size"] == world_size()
    folder = state if is_same_world else universal_folder(state)
    engine.checkpoint_engine = state_files(folder)
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    try:
        path, _ = engine.load_checkpoint(folder, TAG, load_module_strict=False)
        if is_same_world:
            set_random_states(load_tensors(os.path.join(state, f"rank-{dist.get_rank()}.pt")))
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        if world_size() > 1:
            time.sleep(DEAD_SECONDS)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"--resume {state}: its parts are not those of this run ({reason}): use another state"
        ) from error
    if path is None:
        raise UserError(f"--resume {state}: DeepSpeed finds nothing in it: use another state")
    if engine.global_steps != info["progress"]["step"]:
        raise UserError(
            f"--resume {state}: {STATE_FILE} says {info['progress']['step']} updates, DeepSpeed's files"
            f" {engine.global_steps}: use another state"
        )
    if not is_same_world:
        fix_converted(engine, decays)
        torch.manual_seed(seed + info["progress"]["step"] * world_size() + dist.get_rank())
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))


def fix_converted(engine: Any, decays: Any) -> None:
    """What DeepSpeed leaves wrong when it loads a converted state under ZeRO-3.

    All parameters share one step counter, to which Adam then adds once for each of them; all groups have the weight
    decay of the first one; and the first update would have the learning rate of a new run. decays: one a group.
    """
    for values in engine.optimizer.optimizer.state.values():
        if hasattr(values.get("step"), "clone"):
            values["step"] = values["step"].clone()
    for group, rate, decay in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), decays):
        group["lr"], group["weight_decay"] = rate, decay
