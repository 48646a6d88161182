"""What a run counts, and what its evaluations are compared by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SPIKE_AFTER = 20  # updates before the usual loss is known
SPIKE_DEVIATIONS, SPIKE_FACTOR = 6.0, 1.5  # a spike is that far above the usual loss, by both measures
DECAY = 0.98  # of the running mean of the loss; it looks back over about fifty updates


@dataclass
class LossAverage:
    """Running mean and variance of the loss of an update."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Is this loss far above the usual one? Then it does not count as usual either."""
        distance = loss - self.mean
        if self.count >= SPIKE_AFTER and distance > max(
            SPIKE_DEVIATIONS * math.sqrt(self.variance), (SPIKE_FACTOR - 1) * self.mean
        ):
            return True
        self.count += 1
        weight = max(1 - DECAY, 1 / self.count)
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance * distance)
        return False


@dataclass
class Progress:
    """What a run counts; the whole of it that is not in the engine.

    step: updates done; num_applied: those whose gradients were finite; num_skipped: those, one after another, whose
    were not. window_loss, window_labels: sum of the loss, and supervised tokens, since the last line of the log.
    num_tokens: of all updates. best_value, best_step: of --metric_for_best_model; num_worse: evaluations since then;
    judged_by: that metric, and the key of the held-out rows. owes_evaluation: it was due, but the run had to leave.
    """

    step: int = 0
    num_applied: int = 0
    num_skipped: int = 0
    window_loss: float = 0.0
    window_labels: int = 0
    num_tokens: int = 0
    best_value: float | None = None
    best_step: int = 0
    num_worse: int = 0
    judged_by: str = ""
    owes_evaluation: bool = False
    usual_loss: LossAverage = field(default_factory=LossAverage)

    @classmethod
    def from_info(cls, info: dict) -> Progress:
        """The progress in a state's state.json; a new run's without one."""
        values = dict(info["progress"]) if info else {}
        if values:
            values["usual_loss"] = LossAverage(**values["usual_loss"])
        return cls(**values)

    def forget_best(self, before: dict) -> None:
        """The weights of the best evaluation could not be saved: before is (best_value, best_step) of what is there."""
        self.best_value, self.best_step = before

    def judge_by(self, metric: str | None, rows_key: str) -> None:
        """What evaluations are compared by; values of another metric, or of other rows, are forgotten."""
        if self.judged_by not in ("", f"{metric} {rows_key}"):
            self.best_value, self.best_step, self.num_worse = None, 0, 0
        self.judged_by = f"{metric} {rows_key}"

    def is_best(self, metric: str | None, value: Any) -> bool:
        """Note an evaluation: is its value of this metric the best so far? One that is not finite never is."""
        is_finite = value is not None and math.isfinite(value)
        best = self.best_value
        if is_finite and (best is None or (value < best if metric == "loss" else value > best)):
            self.best_value, self.best_step, self.num_worse = value, self.step, 0
            return True
        self.num_worse += 1
        return False

    def count(self, loss: float, num_labels: int, num_tokens: int, is_applied: bool) -> None:
        """An update is done; its loss is a sum over its supervised tokens."""
        self.num_tokens += num_tokens
        self.step += 1
        self.num_applied += is_applied
        self.num_skipped = 0 if is_applied else self.num_skipped + 1
        self.window_loss += loss
        self.window_labels += num_labels
