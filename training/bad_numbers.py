"""Numbers gone bad: a loss that is not finite, updates that cannot be applied, a loss that jumps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from rows.batches import collate, to_device
from runtime.distributed import gather
from runtime.exits import BadNumbersError
from utils import name_rows

if TYPE_CHECKING:
    import torch

    from rows.batches import Update
    from training.setup import Setup

MAX_SKIPPED = 16  # updates left out one after another; fp16's loss scale has gone from 2**16 to 1 by then


def keep_going_at_low_scale(engine: Any) -> None:
    """fp16: DeepSpeed would end at its lowest loss scale with an exception; `check_skipped` does it with advice."""
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def check_skipped(num_skipped: int, step: int, precision: str, scale: float) -> None:
    """BadNumbersError where too many updates in a row had gradients that are not finite."""
    if num_skipped < MAX_SKIPPED:
        return
    advice = (
        f"the loss scale is down to {scale:g}: use --precision bf16 or fp32"
        if precision == "fp16"
        else "lower --learning_rate or look at the rows of these updates"
    )
    raise BadNumbersError(
        f"step {step}: the gradients of {num_skipped} updates in a row were not finite and were left out; {advice}"
    )


def explain_bad_loss(
    model: torch.nn.Module, update: Update, rows: Any, step: int, pad_token_id: int, setup: Setup
) -> NoReturn:
    """BadNumbersError that names rows and layer behind a loss that is not finite. Collective.

    A second pass, without dropout, over each row of the update alone: the rows whose loss is not finite, and the
    first module, in the order in which they end, whose output is not.
    """
    sizes: list[Any] = gather([len(numbers) for numbers in update.micro_batches])
    found: dict[str, Any] = {"weights": bad_weight(model), "rows": []}
    model.eval()
    for numbers, *sizes_of_ranks in zip(update.micro_batches, *sizes):
        # Every rank runs as many forward passes, on nothing where it has no row: ZeRO-3 gathers weights in each.
        for number in [*numbers, *[None] * (max(sizes_of_ranks) - len(numbers))]:
            batch = to_device(collate([] if number is None else [rows[number]], pad_token_id), setup.device)
            loss, module = first_bad_module(model, batch)
            if number is not None and not math.isfinite(loss):
                found["rows"].append((rows.place(number), module))
    gathered: list[Any] = gather(found)
    bad = [pair for part in gathered for pair in part["rows"]]
    weight = next((part["weights"] for part in gathered if part["weights"]), None)
    text = f"step {step}: the loss is not finite, the update was not applied"
    if bad:
        modules = sorted({module for _, module in bad if module})
        text += f"; rows {name_rows([place for place, _ in bad])}"
        text += f"; first output that is not finite: {', '.join(modules[:3])}" if modules else ""
    else:
        text += f"; rows {name_rows([rows.place(n) for n in update.rows])}; each alone and without dropout is finite"
    if weight:
        text += (
            f"; the weight {weight} is not finite: the base checkpoint is damaged, or an update before was too large"
        )
    elif setup.precision == "fp16":
        text += ": use --precision bf16 or fp32"
    else:
        text += ": lower --learning_rate, or look at these rows"
    raise BadNumbersError(text)


def bad_weight(model: torch.nn.Module) -> str | None:
    """Name of the first weight that is not finite, of those that this rank holds."""
    import torch

    for name, parameter in model.named_parameters():
        # Under ZeRO-3 this rank's part, and the whole where it happens to be gathered.
        if not all(torch.isfinite(part).all() for part in (parameter, getattr(parameter, "ds_tensor", parameter))):
            return name
    return None


def first_bad_module(model: torch.nn.Module, batch: dict) -> tuple[float, str | None]:
    """(loss of a batch, name of the first module whose output is not finite or None)."""
    import torch

    names: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if not names and any(not torch.isfinite(tensor).all() for tensor in floats):
                names.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            loss = model(**batch).token_losses.sum().item()
    finally:
        for handle in handles:
            handle.remove()
    return loss, names[0] if names else None
