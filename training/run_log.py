"""What a run shows and keeps: progress bar, train_log.jsonl, events.jsonl, TensorBoard, loss.png. On rank 0 only."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.metrics import METRICS
from reports.plots import picture
from runtime.exits import EXIT_LEFT, BadNumbersError, UserError, fail
from runtime.json_lines import JsonLines
from runtime.ranks import is_main, print_rank_0
from runtime.streams import progress_bar
from utils import name_rows

if TYPE_CHECKING:
    from checkpoints.progress import Progress


class Speed:
    """Tokens per second since it was last taken."""

    def __init__(self) -> None:
        self.num_tokens, self.start = 0, time.monotonic()

    def count(self, num_tokens: int) -> None:
        """These are done, too."""
        self.num_tokens += num_tokens

    def take(self) -> float | None:
        """The speed, and begin again."""
        now = time.monotonic()
        speed = per_second(self.num_tokens, now - self.start)
        self.num_tokens, self.start = 0, now
        return speed


def per_second(amount: float, seconds: float) -> float | None:
    """A rate; None where no time has passed: no clock is so fine."""
    return amount / seconds if seconds > 0 else None


class RunLog:
    """Writes one record at a time to every place; does nothing on other ranks."""

    def __init__(self, output_dir: str, num_steps: int, step: int = 0, evaluated_step: int | None = None) -> None:
        """step: updates that are done already, where a run is resumed: its log goes on after them; evaluated_step:
        those whose evaluation is done, left out: the same."""
        evaluated_step = step if evaluated_step is None else evaluated_step
        self.enabled = is_main()
        self.started = time.monotonic()
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.output_dir = output_dir
        try:
            self.log = JsonLines(os.path.join(output_dir, "train_log.jsonl"), step)
            self.evaluations = JsonLines(os.path.join(output_dir, "eval_log.jsonl"), evaluated_step)
            self.events = JsonLines(os.path.join(output_dir, "events.jsonl"), step)
            self.writer = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=step + 1 if step else None)
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror}): make room") from None
        if self.log.records:
            self.started -= self.log.records[-1]["seconds"]
        # A log file gets a line now and then instead of ten a second.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = progress_bar(
            total=num_steps, initial=step, desc="training", unit="step", dynamic_ncols=True, mininterval=interval
        )

    def event(self, step: int, event: str, **values: Any) -> None:
        """Keep something that happened at a step and is not a figure: a save, a spike, the end."""
        if self.enabled:
            self.events.add({"step": step, "event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values})

    def bad_rows(self, messages: list[str]) -> None:
        """Keep what is wrong with each row that was left out: bad_rows.txt."""
        if not self.enabled or not messages:
            return
        path = os.path.join(self.output_dir, "bad_rows.txt")
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(f"{message}\n" for message in messages)
        except OSError as error:
            print(f"{path}: {error.strerror}: the run goes on without it", file=sys.stderr, flush=True)

    def saved(self, step: int, path: str, problem: str | None) -> None:
        """A checkpoint or state is saved, or not, and why."""
        print_rank_0(f"\n{path} was not saved, the run goes on: {problem}" if problem else f"\nsaved {path}")
        self.event(step, "not saved" if problem else "saved", path=path, **({"problem": problem} if problem else {}))

    def evaluated(self, step: int, scores: dict, is_best: bool) -> None:
        """Figures over the held-out rows: eval_log.jsonl, TensorBoard and a line."""
        if not self.enabled:
            return
        self.evaluations.add({"step": step, **scores})
        for name, value in scores.items():
            self.add_scalar(f"eval/{name}", value, step)
        names = [name for name in scores if name == "loss" or METRICS[name].is_shown]
        shown = ", ".join(f"{name} {scores[name]:.4g}" for name in names)
        print(f"\nstep {step}: evaluation: {shown}{' (the best so far)' if is_best else ''}", flush=True)

    def seconds(self) -> Any:
        """Since the run began, the time before it was resumed included."""
        return time.monotonic() - self.started

    def done(self, progress: Progress, trained: int, total: int, peak_memory: int) -> None:
        """The run has come to its end; what it took."""
        self.event(
            progress.step,
            "done",
            seconds=self.seconds(),
            tokens_per_second=per_second(progress.num_tokens, self.seconds()),
            peak_memory_bytes=peak_memory,
            trained_weights=trained,
            all_weights=total,
            best_step=progress.best_step,
            best_value=progress.best_value,
        )

    def spike(self, step: int, loss: float, usual_loss: float, places: Any) -> None:
        """The loss of an update is far above the usual one: keep the places of its rows, and show the first."""
        places = list(places)
        print_rank_0(f"\nstep {step}: loss {loss:.4f}, usually {usual_loss:.4f}; rows {name_rows(places)}")
        self.event(step, "loss spike", loss=loss, usual_loss=usual_loss, rows=places)

    def advance(self) -> None:
        """One update is done."""
        if self.enabled:
            self.bar.update()

    def record(
        self,
        step: int,
        epoch: float,
        loss: float | None,
        learning_rate: float,
        grad_norm: float | None,
        tokens_per_second: float | None,
    ) -> None:
        """Show and keep one line of figures. loss: per supervised token; grad_norm: before clipping.

        What is not finite is kept as null: JSON has no other word for it.
        """
        if not self.enabled:
            return
        loss, grad_norm = (value if value is not None and math.isfinite(value) else None for value in (loss, grad_norm))
        record = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "seconds": self.seconds(),
        }
        self.log.add(record)
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
            if record[name] is not None:
                self.add_scalar(name, record[name], step)
        norm = "not finite" if grad_norm is None else f"{grad_norm:.2f}"
        shown = "not finite" if loss is None else f"{loss:.4f}"
        speed = "-" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
        self.bar.set_postfix_str(
            f"loss {shown}, lr {learning_rate:.2e}, grad norm {norm}, {speed} tokens/s",
            refresh=sys.stderr.isatty(),
        )

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        """A point of TensorBoard's curves, which end where the disk is full."""
        if self.writer is None:
            return
        try:
            self.writer.add_scalar(name, value, step)
        except OSError as error:
            print(f"\ntensorboard: {error.strerror}: its curves end here", file=sys.stderr, flush=True)
            self.writer = None

    def close(self) -> None:
        """Draw loss.png and close the files."""
        if not self.enabled:
            return
        self.bar.close()
        try:
            if self.log.records:
                draw_loss(self.log.records, os.path.join(self.output_dir, "loss.png"), self.evaluations.records)
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            print(f"\n{self.output_dir}: {error.strerror}: no loss.png", file=sys.stderr, flush=True)


def draw_loss(records: list[dict], path: str, evaluations: Sequence[dict] = ()) -> None:
    """Loss, that of held-out rows where there are any, and learning rate over the updates, as a PNG."""

    def curve(axis: Any, lines: Sequence[dict], **style: Any) -> None:
        losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
        axis.plot([line["step"] for line in lines], losses, marker=".", **style)

    steps = [record["step"] for record in records]
    with picture(path, size=(8, 4.5)) as axis:
        curve(axis, records, color="tab:blue", label="training rows")
        if evaluations:
            curve(axis, evaluations, color="tab:green", label="held-out rows")
            axis.legend(loc="upper right")
        axis.set_xlabel("update")
        axis.set_ylabel("loss per supervised token")
        axis.set_ylim(bottom=0)
        rate = axis.twinx()
        rate.plot(steps, [record["learning_rate"] for record in records], color="tab:orange", alpha=0.6)
        rate.set_ylabel("learning rate", color="tab:orange")
        rate.set_ylim(bottom=0)


def end(output_dir: str, progress: Progress, is_last: bool, problem: str | None) -> None:
    """The last words of a run: it is done, or it leaves because it was asked to."""
    step, num_left_out = progress.step, progress.step - progress.num_applied
    if num_left_out:
        print_rank_0(f"{num_left_out} of {step} updates were left out: their gradients were not finite")
    if problem and is_last:
        fail(f"{problem}; make room and start again with --resume auto: the last checkpoint is missing", code=1)
    if problem:
        fail(f"left after step {step} without a state: {problem}", code=1)
    if not is_last:
        print_rank_0(f"left after step {step}: the same command with --resume auto goes on from {output_dir}")
        sys.exit(EXIT_LEFT)
    if progress.num_applied == 0:
        raise BadNumbersError(
            "no update was applied, every gradient was infinite or NaN: check the base weights, or use --precision bf16"
        )
    print_rank_0(f"done: {step} updates, {output_dir}")
