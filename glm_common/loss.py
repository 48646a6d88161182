"""The training objective: next-token cross entropy over the positions that carry a label."""

import torch.nn.functional as F


def labelled_positions(hidden_states, labels):
    """Hidden states (M, H) whose next token has a label, and those labels (M,); M = labels[:, 1:] != -100."""
    targets = labels[:, 1:]
    mask = targets != -100
    return hidden_states[:, :-1][mask], targets[mask]


def labelled_loss(hidden_states, labels, output_layer, num_items=None):
    """Cross entropy in float32 over labelled positions only: logits are never made for the others.

    hidden_states (B, L, H), labels (B, L) with -100 where nothing is asked. The sum is divided by `num_items`
    (the number of supervised tokens of the whole update) or, without it, by this batch's own number.
    """
    hidden, targets = labelled_positions(hidden_states, labels)
    logits = output_layer(hidden).float()
    total = F.cross_entropy(logits, targets, reduction="sum")
    if num_items is None:
        num_items = targets.numel()
    return total / num_items
