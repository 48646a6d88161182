"""The training objective: next-token cross entropy, with logits for the positions that carry a label and no others."""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Float32 logits that exist at one time; beyond it they are made in chunks of rows. A quarter of it where the output
# layer trains: its gradient needs room as well.
MAX_LOGITS_BYTES = 2**28


class OutputLayer(nn.Linear):
    """The layer that makes logits. With targets it makes their loss instead, inside its own forward, so that
    DeepSpeed's hooks (ZeRO-3 gathers the weight there) see one module do the work."""

    def __init__(self, hidden_size, vocab_size):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states, targets=None):
        """hidden_states (..., H) -> logits (..., V); with targets (M,) and hidden_states (M, H) -> their summed
        cross entropy, a float32 scalar."""
        if targets is None:
            return few_rows_linear(hidden_states, self.weight)
        return LinearCrossEntropy.apply(hidden_states, self.weight, targets, torch.is_grad_enabled())


def few_rows_linear(hidden_states, weight):
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
    """Summed cross entropy of `hidden @ weight.T`, softmax in float32, a chunk of rows at a time.

    The gradient of a sum of logits' losses is known as soon as the logits are (softmax minus one-hot), so each
    chunk's gradient is taken while its logits exist: nothing of size M x V is kept or made a second time, and the
    backward pass only multiplies by the gradient that comes from outside (1 / tokens, a loss scale, anything).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, needs_gradient):
        """hidden (M, H), weight (V, H), targets (M,) -> float32 scalar."""
        needs_hidden, needs_weight = (needs_gradient and needed for needed in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        max_bytes = MAX_LOGITS_BYTES / (4 if needs_weight else 1)
        num_chunks = max(1, math.ceil(hidden.shape[0] * weight.shape[0] * 4 / max_bytes))
        num_rows = max(1, math.ceil(hidden.shape[0] / num_chunks))
        memory = torch.empty(num_rows, weight.shape[0], dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], num_rows):
            rows, row_targets = hidden[start : start + num_rows], targets[start : start + num_rows, None]
            logits = memory[: rows.shape[0]]
            if hidden.dtype == wide:
                torch.mm(rows, weight.T, out=logits)
            else:
                logits.copy_(rows @ weight.T)
            logits -= logits.amax(dim=-1, keepdim=True)
            total -= logits.gather(1, row_targets).sum()
            exps = logits.exp_()
            sums = exps.sum(dim=-1, keepdim=True)
            total += sums.log().sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = exps.div_(sums)
            grad.scatter_add_(1, row_targets, grad.new_full(row_targets.shape, -1.0))
            grad = grad.to(hidden.dtype)
            if needs_hidden:
                torch.mm(grad, weight, out=hidden_grad[start : start + num_rows])
            if needs_weight and hidden.dtype == torch.bfloat16:
                weight_grad += grad.T @ rows
            elif needs_weight:  # float16 would overflow where many rows are summed
                weight_grad.addmm_(grad.to(wide).T, rows.to(wide))
        ctx.grads, ctx.weight_dtype = (hidden_grad, weight_grad), weight.dtype
        return total

    @staticmethod
    def backward(ctx, outer):
        """Both gradients, times what comes from outside; they are used up, so the graph serves once."""
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(outer)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(outer).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def label_positions(labels):
    """Where the next token has a label: flat positions (M,) in labels (B, L). On a GPU this waits for the result,
    so training makes them on the CPU with the batch."""
    is_labelled = F.pad(labels[:, 1:] != -100, (0, 1), value=False)
    return is_labelled.flatten().nonzero().squeeze(1)


def labelled_loss(hidden_states, labels, output_layer, num_items=None, positions=None):
    """Cross entropy over labelled positions only: logits are never made for the others.

    hidden_states (B, L, H), labels (B, L) with -100 where nothing is asked, positions as `label_positions` gives
    them. The sum is divided by `num_items` (the number of supervised tokens of the whole update) or, without it, by
    this batch's own number.
    """
    if positions is None:
        positions = label_positions(labels)
    hidden = hidden_states.flatten(0, 1).index_select(0, positions)
    total = output_layer(hidden, labels.flatten()[1:].index_select(0, positions))
    return total / (positions.numel() if num_items is None else num_items)
