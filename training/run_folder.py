"""What a run leaves in its folder: checkpoints, the best one, states to resume from, and how many are kept."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checkpoints.opening import CHECKPOINT, RUN_FILE, read_run
from checkpoints.saving import describe_run, save_checkpoint
from checkpoints.state_checks import STATE
from checkpoints.states import LEFTOVERS, close_state, state_bytes, write_state
from runtime.distributed import on_main
from runtime.exits import FolderGoneError, UserError
from runtime.folders import is_whole, keep_newest, new_folder, numbered, remove_leftovers
from runtime.holding import place_now, require_there
from runtime.json_lines import read_records
from runtime.ranks import is_main, world_size
from runtime.watchdog import CLOSING
from train_types import count_parameters
from training.resuming import FREE_FLAGS

if TYPE_CHECKING:
    from checkpoints.progress import Progress
    from training.setup import Setup

STATES_KEPT = 2  # without --save_total_limit: should one turn out damaged, there is another


class RunFolder:
    """Writes into --output_dir; all ranks take part. `problem` says why the last save failed (a full disk), or is None.

    compared: what a state is compared with when it is resumed from, {"fingerprint", "split"}.
    """

    def __init__(
        self, args: argparse.Namespace, base: Any, setup: Setup, engine: Any, log: Any, compared: dict
    ) -> None:
        self.args, self.base, self.setup, self.engine = args, base, setup, engine
        self.log, self.compared = log, compared
        self.problem: str | None = None
        self.is_closing = False
        self.closing: Closing | None = None

    @functools.cached_property
    def counts(self) -> tuple[int, int]:
        """(trained, all) numbers of weights."""
        return count_parameters(self.engine.module)

    def require(self) -> None:
        """FolderGoneError on the first process where --output_dir was removed or renamed; the others end by the watch.

        Where it was renamed, nothing half written is left in it.
        """
        try:
            require_there(self.args.output_dir)
        except FolderGoneError:
            if self.closing:
                self.closing.join()
            with contextlib.suppress(OSError):  # it is removed, not renamed
                remove_leftovers(place_now(self.args.output_dir), LEFTOVERS)
            print(file=sys.stderr)  # off the bar's line
            raise

    def save_weights(self, step: int, epoch: int, name: str | None = None, **more: Any) -> None:
        """A checkpoint epoch-E-step-S, or one with a name of its own; more: what else its run.json says."""
        self.finish_state()
        path = os.path.join(self.args.output_dir, name or f"epoch-{epoch}-step-{step}")
        trained, total = self.counts
        more |= {"trained_weights": trained, "all_weights": total, "base_fingerprint": self.base.fingerprint}
        run = describe_run(self.args, self.base.folder, self.setup.precision, epoch=epoch, step=step, **more)
        zero3 = self.engine.zero_optimization_stage() == 3
        self.problem = save_checkpoint(self.engine.module, self.base.tokenizer, path, self.base.train_type, run, zero3)
        self.require()
        self.log.saved(step, path, self.problem)
        if self.problem is None:
            on_main(lambda: keep_newest(path, CHECKPOINT, self.args.save_total_limit))

    def take_best(self, state: str, step: int) -> None:
        """Copy best/, the weights of this step, from beside a state that lies in another folder. Collective."""
        path = os.path.join(self.args.output_dir, "best")
        source = os.path.join(os.path.dirname(os.path.abspath(state)), "best")

        def copy() -> None:
            try:
                if os.path.exists(path):
                    return
                run = read_run(os.path.join(source, RUN_FILE)) if is_whole(source) else {}
                if run.get("step") == step and self.is_own(run):
                    with new_folder(path) as scratch:
                        shutil.copytree(source, scratch, dirs_exist_ok=True)
                    return
                reason = f"the weights of step {step} of this run are not in {source}"
            except (OSError, UserError) as error:
                reason = str(getattr(error, "strerror", None) or error)
            print(f"note: {path} is not there before an evaluation is better than that of step {step}: {reason}")

        on_main(copy)

    def is_own(self, run: dict) -> bool:
        """Is a run.json of this run, as far as it tells?"""
        flags = {name: value for name, value in vars(self.args).items() if name not in FREE_FLAGS}
        told = run["flags"] if isinstance(run.get("flags"), dict) else {}
        is_same_base = run.get("base_fingerprint", self.base.fingerprint) == self.base.fingerprint
        return is_same_base and all(told.get(name, value) == value for name, value in flags.items())

    def save_state(self, progress: Progress) -> None:
        """A state state-step-S of all ranks. The loop waits until it is written; flushing, hashing and naming it is
        done by a thread of the first process while the training goes on."""
        self.finish_state()
        path = os.path.join(self.args.output_dir, f"state-step-{progress.step}")
        values = {"progress": asdict(progress), **self.compared}
        num_bytes = state_bytes(self.counts[0], next(self.engine.module.parameters()).dtype)
        try:
            sizes = write_state(self.engine, path, num_bytes)
        except UserError as error:
            self.require()
            self.problem = str(error)
            self.log.saved(progress.step, path, self.problem)
            return
        self.problem, self.is_closing = None, True
        if is_main():
            self.closing = Closing(path, {**values, "world_size": world_size()}, sizes, self.args, self.log)
            self.closing.start()

    def finish_state(self) -> None:
        """Wait until the last state has its name. Collective."""
        if self.is_closing:
            self.is_closing = False
            self.problem = on_main(lambda: self.closing.result())
            self.require()


class Closing(threading.Thread):
    """Gives a written state its name, and removes the oldest; says so when that is done."""

    def __init__(self, path: str, info: dict, sizes: dict, args: argparse.Namespace, log: Any) -> None:
        super().__init__(name=CLOSING, daemon=True)
        self.path, self.info, self.sizes, self.args, self.log = path, info, sizes, args, log
        self.problem: str | None = None

    def run(self) -> None:
        try:
            close_state(self.path, self.info, self.sizes)
            keep_newest(self.path, STATE, self.args.save_total_limit or STATES_KEPT)
        except Exception as error:  # a thread that ended without a word would pass for a state that is saved
            self.problem = str(getattr(error, "strerror", None) or error)
        try:
            require_there(self.args.output_dir)
        except FolderGoneError:
            return  # the main thread says so
        self.log.saved(self.info["progress"]["step"], self.path, self.problem)

    def result(self) -> str | None:
        """Why it could not be done, or None; waits for the end."""
        self.join()
        return self.problem


def last_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint of a run that has come to its end; None where it has not, or the checkpoint is not whole."""
    for event in reversed(read_records(os.path.join(output_dir, "events.jsonl"))):
        if event["event"] == "done":
            for name in numbered(output_dir, CHECKPOINT):
                path = os.path.join(output_dir, name)
                if name.endswith(f"-step-{event['step']}") and is_whole(path):
                    return path
    return None
