"""What training objectives are made of: the cross entropy of supervised tokens, with logits for no other position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Float32 logits that exist at one time; beyond it they are made in chunks of rows. A quarter of it where the output
# layer trains: its gradient needs room as well.
MAX_LOGITS_BYTES = 2**28


class OutputLayer(nn.Linear):
    """The layer that makes logits. With targets it makes their losses instead, inside its own forward, so that
    DeepSpeed's hooks (ZeRO-3 gathers the weight there) see one module do the work."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden_states (..., H) -> logits (..., V); with targets (M,) and hidden_states (M, H) -> the cross entropy
        of each, float32 (M,)."""
        if targets is None:
            return few_rows_linear(hidden_states, self.weight)
        return LinearCrossEntropy.apply(hidden_states, self.weight, targets, torch.is_grad_enabled())


def few_rows_linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear. On a CPU the product of a few rows with a large matrix, which is what decoding needs, is made in blocks
    of the matrix: twice as fast, because both stay in the cache."""
    num_rows = hidden_states.numel() // hidden_states.shape[-1]
    num_blocks = math.gcd(weight.shape[0], 128)
    is_slow = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32  # bfloat16 is not
    if not is_slow or num_rows > 64 or num_blocks < 8 or torch.is_grad_enabled():
        return F.linear(hidden_states, weight)
    blocks = weight.unflatten(0, (num_blocks, -1)).transpose(1, 2)  # blocks H V/blocks
    logits = hidden_states.flatten(0, -2) @ blocks  # blocks rows V/blocks
    return logits.transpose(0, 1).reshape(*hidden_states.shape[:-1], -1)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T` for each row, softmax in float32, a chunk of rows at a time.

    The gradient of a row's loss is known as soon as its logits are (softmax minus one-hot), so it is taken while they
    exist: nothing of size M x V is kept or made a second time, and the backward pass multiplies by what comes from
    outside, a number for each row. The weight's gradient is summed over the rows right away, as the usual objective,
    a multiple of the sum of all losses, has it; for one that weighs rows differently it is made again in the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
    ) -> torch.Tensor:
        """hidden (M, H), weight (V, H), targets (M,) -> float32 (M,)."""
        needs_hidden, needs_weight = (needs_gradient and needed for needed in ctx.needs_input_grad[:2])
        losses = hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype))
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=losses.dtype) if needs_weight else None
        for chunk, logits in logits_of(hidden, weight, needs_weight):
            rows, row_targets = hidden[chunk], targets[chunk, None]
            logits -= logits.amax(dim=-1, keepdim=True)
            wanted = logits.gather(1, row_targets)
            exps = logits.exp_()
            sums = exps.sum(dim=-1, keepdim=True)
            losses[chunk] = (sums.log() - wanted).squeeze(1)
            if not (needs_hidden or needs_weight):
                continue
            grad = exps.div_(sums)
            grad.scatter_add_(1, row_targets, grad.new_full(row_targets.shape, -1.0))
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[chunk])
            if weight_grad is not None:
                add_product(weight_grad, grad, rows)
        ctx.grads = hidden_grad, weight_grad
        if needs_weight:
            ctx.save_for_backward(hidden, weight, targets)
        return losses

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple:
        """Both gradients, times outer (M,), what comes from outside; they are used up, so the graph serves once."""
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        # One number for all rows: seen without waiting for a GPU, since the gradient of a sum is expanded.
        factor = outer[0] if len(outer) and (outer.stride(0) == 0 or len(outer) == 1) else None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(outer[:, None] if factor is None else factor)
        if weight_grad is not None:
            hidden, weight, targets = ctx.saved_tensors
            if factor is None:
                weight_grad = weighted_gradient(weight_grad.zero_(), hidden, weight, targets, outer)
            else:
                weight_grad = weight_grad.mul_(factor)
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, None, None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of losses: float32, or float64 where the network has it."""
    return torch.promote_types(dtype, torch.float32)


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, needs_weight: bool) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (slice of the rows, their logits (rows, V), to be overwritten), as much at a time as there is room for."""
    max_bytes = MAX_LOGITS_BYTES / (4 if needs_weight else 1)
    num_chunks = max(1, math.ceil(hidden.shape[0] * weight.shape[0] * 4 / max_bytes))
    num_rows = max(1, math.ceil(hidden.shape[0] / num_chunks))
    memory = torch.empty(num_rows, weight.shape[0], dtype=wide(hidden.dtype), device=hidden.device)
    for start in range(0, hidden.shape[0], num_rows):
        rows = hidden[start : start + num_rows]
        logits = memory[: rows.shape[0]]
        if hidden.dtype == logits.dtype:
            torch.mm(rows, weight.T, out=logits)
        else:
            logits.copy_(rows @ weight.T)
        yield slice(start, start + num_rows), logits


def add_product(weight_grad: torch.Tensor, grad: torch.Tensor, rows: torch.Tensor) -> None:
    """Add grad (rows, V) x rows (rows, H) to the gradient (V, H) of the weight."""
    if rows.dtype == torch.bfloat16:
        weight_grad += grad.T @ rows
    else:  # float16 would overflow where many rows are summed
        weight_grad.addmm_(grad.to(weight_grad.dtype).T, rows.to(weight_grad.dtype))


def weighted_gradient(
    weight_grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, outer: torch.Tensor
) -> torch.Tensor:
    """The gradient of the weight where each row's loss counts `outer` (M,) times; summed into weight_grad."""
    for chunk, logits in logits_of(hidden, weight, needs_weight=True):
        grad = logits.softmax(dim=-1)
        grad.scatter_add_(1, targets[chunk, None], grad.new_full((grad.shape[0], 1), -1.0))
        add_product(weight_grad, grad.mul_(outer[chunk, None]).to(hidden.dtype), hidden[chunk])
    return weight_grad


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where the next token has a label: flat positions (M,) in labels (B, L). On a GPU this waits for the result,
    so training makes them on the CPU with the batch."""
    is_labelled = F.pad(labels[:, 1:] != -100, (0, 1), value=False)
    return is_labelled.flatten().nonzero().squeeze(1)


def token_losses(
    hidden_states: torch.Tensor, labels: torch.Tensor, output_layer: OutputLayer, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy of each labelled position, float32 (M,): logits are never made for the others.

    hidden_states (B, L, H), labels (B, L) with -100 where nothing is asked, positions as `label_positions` gives them.
    """
    if positions is None:
        positions = label_positions(labels)
    hidden = hidden_states.flatten(0, 1).index_select(0, positions)
    return output_layer(hidden, labels.flatten()[1:].index_select(0, positions))
