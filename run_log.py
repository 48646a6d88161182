"""What a run shows and keeps: progress bar, train_log.jsonl, TensorBoard, loss.png. On rank 0 only."""

import json
import math
import os
import sys
import time

from utils import is_main


class RunLog:
    """Writes one record at a time to every place; does nothing on other ranks."""

    def __init__(self, output_dir, num_steps):
        self.enabled = is_main()
        self.records = []
        self.started = time.time()
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.output_dir = output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.file = open(os.path.join(output_dir, "train_log.jsonl"), "w", encoding="utf-8", buffering=1)
        self.writer = SummaryWriter(os.path.join(output_dir, "tensorboard"))
        # A log file gets a line now and then instead of ten a second.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=num_steps, desc="training", unit="step", dynamic_ncols=True, mininterval=interval)

    def advance(self):
        """One update is done."""
        if self.enabled:
            self.bar.update()

    def record(self, step, epoch, loss, learning_rate, grad_norm, tokens_per_second):
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
            "seconds": time.time() - self.started,
        }
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
            if record[name] is not None:
                self.writer.add_scalar(name, record[name], step)
        norm = "not finite" if grad_norm is None else f"{grad_norm:.2f}"
        shown = "not finite" if loss is None else f"{loss:.4f}"
        self.bar.set_postfix_str(
            f"loss {shown}, lr {learning_rate:.2e}, grad norm {norm}, {tokens_per_second:,.0f} tokens/s",
            refresh=sys.stderr.isatty(),
        )

    def close(self):
        """Draw loss.png and close the files."""
        if not self.enabled:
            return
        self.bar.close()
        self.file.close()
        self.writer.close()
        if self.records:
            draw_loss(self.records, os.path.join(self.output_dir, "loss.png"))


def draw_loss(records, path):
    """Loss and learning rate over the updates, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [record["step"] for record in records]
    axis.plot(
        steps,
        [math.nan if record["loss"] is None else record["loss"] for record in records],
        color="tab:blue",
        marker=".",
        label="loss",
    )
    axis.set_xlabel("update")
    axis.set_ylabel("loss per supervised token")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(steps, [record["learning_rate"] for record in records], color="tab:orange", alpha=0.6)
    rate.set_ylabel("learning rate", color="tab:orange")
    rate.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
