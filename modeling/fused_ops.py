"""Steps of a layer that keep as little as they can for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last dimension, worked out in float32 (Zhang and Sennrich 2019)."""
    if hidden.device.type == "cpu":
        return RMSNormOnCPU.apply(hidden, weight, eps)
    return F.rms_norm(hidden, weight.shape, weight, eps)  # one kernel each way


class RMSNormOnCPU(torch.autograd.Function):
    """What a GPU's kernel does: keeps the input and a number for each row. (..., H), weight (H,)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=dtype).square_()
        scale = square.div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        hidden, weight, scale = ctx.saved_tensors
        dtype, weight_grad = hidden.dtype, None
        hidden, grad = hidden.to(scale.dtype), grad.to(scale.dtype)
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * hidden).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        dot = torch.linalg.vecdot(grad, hidden).unsqueeze(-1)
        grad.addcmul_(hidden, dot * scale.square() / hidden.shape[-1], value=-1).mul_(scale)
        return grad.to(dtype), weight_grad, None


class SwiGLU(torch.autograd.Function):
    """silu(first half) x second half (Shazeer 2020, arXiv:2002.05202); keeps its input alone.

    (..., 2 F) -> (..., F). Written with autograd's own operators it would keep silu(first half) as well.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        result = torch.empty_like(hidden)
        gate_grad, up_grad = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return result


class Rotation(torch.autograd.Function):
    """A rotation of x by `rotate(x, cos, sin)`, whose gradient is the rotation back: nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Callable) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, -sin), None, None, None


class SeededDropout(nn.Dropout):
    """Dropout that keeps the seed of its mask, not the mask."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return hidden
        # Drawn on the CPU: the seed is a number here, and a GPU is not waited for.
        seed = torch.randint(2**62, (), dtype=torch.int64).item()
        return MaskFromSeed.apply(hidden, self.p, seed)


class MaskFromSeed(torch.autograd.Function):
    """Times 0 with probability p, else times 1 / (1 - p); the mask is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        ctx.p, ctx.seed = p, seed
        return MaskFromSeed.times_mask(hidden, p, seed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return MaskFromSeed.times_mask(grad, ctx.p, ctx.seed), None, None

    @staticmethod
    def times_mask(tensor: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        generator = torch.Generator(tensor.device).manual_seed(seed)
        # One draw makes four numbers of 16 bits (p is right to 2**-17): drawing is what dropout costs on a CPU.
        bits = torch.empty(-(-tensor.numel() // 4), dtype=torch.int64, device=tensor.device)
        numbers = bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: tensor.numel()]
        keep = numbers.view(tensor.shape) >= round(p * 2**16) - 2**15
        return tensor.mul(1 / (1 - p)).mul_(keep)
