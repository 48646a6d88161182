"""Steps of a layer that keep as little as they can for the backward pass."""

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(torch.autograd.Function):
    """silu(first half) x second half (Shazeer 2020, arXiv:2002.05202); keeps its input alone.

    (..., 2 F) -> (..., F). Written with autograd's own operators it would keep silu(first half) as well.
    """

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        result = torch.empty_like(hidden)
        gate_grad, up_grad = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return result


class SeededDropout(nn.Dropout):
    """Dropout that keeps the seed of its mask, not the mask."""

    def forward(self, hidden):
        if not self.training or self.p == 0.0:
            return hidden
        # Drawn on the CPU: the seed is a number here, and a card is not waited for.
        seed = torch.randint(2**62, (), dtype=torch.int64).item()
        return MaskFromSeed.apply(hidden, self.p, seed)


class MaskFromSeed(torch.autograd.Function):
    """Times 0 with probability p, else times 1 / (1 - p); the mask is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, p, seed):
        ctx.p, ctx.seed = p, seed
        return MaskFromSeed.times_mask(hidden, p, seed)

    @staticmethod
    def backward(ctx, grad):
        return MaskFromSeed.times_mask(grad, ctx.p, ctx.seed), None, None

    @staticmethod
    def times_mask(tensor, p, seed):
        generator = torch.Generator(tensor.device).manual_seed(seed)
        mask = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return mask.bernoulli_(1 - p, generator=generator).mul_(tensor).mul_(1 / (1 - p))
