"""The plain way to do a training step, as most scripts for these models do it: what the fast path is compared with.

Rows are padded to the longest, attention is written out with a mask of all pairs and with keys repeated for every
query head, logits are made for every token in float32, norm, rotation, SwiGLU and dropout are written with autograd's
own operators as in the released code, and with checkpointing every layer is recomputed, frozen or not: reentrant
checkpoints, long the default, need inputs that require gradients.
"""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

import glm1.modeling_chatglm as glm1
import glm2.modeling_chatglm as glm2
from modeling.fused_ops import SeededDropout
from rows.batches import IGNORE


def pad(rows, pad_token_id):
    """Rows -> input_ids, attention_mask and labels, (B, longest) each, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORE),
    }
    for i, row in enumerate(rows):
        ids = torch.tensor([int(token_id) for token_id in row["input_ids"]])
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        [(start, end, _)] = row["runs"]
        batch["labels"][i, start:end] = ids[start:end]
    return batch


def plain_loss(model, batch, num_items):
    """Cross entropy over logits of all tokens, summed, divided by `num_items`."""
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    return total / num_items


def rms_norm(self, hidden_states):
    """RMSNorm.forward, operator by operator."""
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    variance = wide.pow(2).mean(-1, keepdim=True)
    return (self.weight * (hidden_states * torch.rsqrt(variance + self.eps))).to(hidden_states.dtype)


def swiglu(hidden):
    """silu(first half) x second half."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_pairs(x, cos, sin, _):
    """ChatGLM2's rotation: neighbouring channels, the second half of them passes through."""
    even, odd = x[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., 2 * cos.shape[-1] :]), dim=-1)


def rotate_halves(x, cos, sin, _):
    """ChatGLM-6B's rotation: each half of the channels by its own position row."""
    parts = []
    for part, part_cos, part_sin in zip(x.chunk(2, dim=-1), cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)):
        first, second = part.chunk(2, dim=-1)
        parts.append(part * part_cos + torch.cat((-second, first), dim=-1) * part_sin)
    return torch.cat(parts, dim=-1)


@contextmanager
def plain_settings(model, checkpointing):
    """The model takes the plain way within this block, backward pass included.

    Eager attention, plain operators, and with `checkpointing` transformers' switch for it: every layer is recomputed,
    and a hook makes the embeddings require gradients.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = model.config._attn_implementation, [layer.gradient_checkpointing for layer in layers]
    model.config._attn_implementation = "eager"  # a peft wrapper and its model share one configuration
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    else:
        for layer in layers:
            layer.gradient_checkpointing = False
    operators = [
        mock.patch.object(glm2.RMSNorm, "forward", rms_norm),
        mock.patch.object(glm2, "SwiGLU", SimpleNamespace(apply=swiglu)),
        mock.patch.object(glm2, "Rotation", SimpleNamespace(apply=rotate_pairs)),
        mock.patch.object(glm1, "Rotation", SimpleNamespace(apply=rotate_halves)),
        mock.patch.object(SeededDropout, "forward", torch.nn.Dropout.forward),
    ]
    try:
        with ExitStack() as stack:
            for operator in operators:
                stack.enter_context(operator)
            yield
    finally:
        model.config._attn_implementation = before[0]
        if checkpointing:
            model.disable_input_require_grads()
        for layer, setting in zip(layers, before[1], strict=True):
            layer.gradient_checkpointing = setting
