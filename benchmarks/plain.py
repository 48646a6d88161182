"""The plain way to do a training step, as most scripts for these models do it: what the fast path is compared with.

Rows are padded to the longest, attention is written out with a mask of all pairs and with keys repeated for every
query head, logits are made for every token in float32, and with checkpointing every layer is recomputed, frozen or
not, because the inputs are made to require gradients.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from batches import IGNORE


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
        batch["labels"][i, row["num_unlabelled"] : len(ids)] = ids[row["num_unlabelled"] :]
    return batch


def plain_loss(model, batch, num_items):
    """Cross entropy over logits of all tokens, summed, divided by `num_items`."""
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits.float()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    return total / num_items


@contextmanager
def plain_settings(model, checkpointing):
    """Eager attention, and with `checkpointing` transformers' switch for it: every layer is recomputed, and a hook
    makes the embeddings require gradients."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = model.config._attn_implementation, [layer.gradient_checkpointing for layer in layers]
    model.config._attn_implementation = "eager"  # a peft wrapper and its model share one configuration
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        for layer in layers:
            layer.gradient_checkpointing = False
    try:
        yield
    finally:
        model.config._attn_implementation = before[0]
        if checkpointing:
            model.disable_input_require_grads()
        for layer, setting in zip(layers, before[1]):
            layer.gradient_checkpointing = setting
