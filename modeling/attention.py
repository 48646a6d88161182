"""Which keys a query sees, and dispatch to the kernels.

Shapes: B batch, Q new tokens, K keys (prefix + cached + new), N query heads, G key/value heads, D head size.

A mask is one of
- None: causal, the last query sees all keys (in front of the queries stand a prefix or cached keys, visible to all).
  The kernels know this case by themselves, so no mask is ever made for it;
- a bool tensor (B or 1, 1, Q, K), True where visible;
- `PackedRows`: several rows in one sequence, each with a mask of its own, that do not see each other;
- a `BlockMask`: any of these for flex attention, which leaves out blocks that nobody sees (`flex_mask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class PackedRows(NamedTuple):
    """Rows that share a sequence: their numbers of tokens in order, and the mask of each (None: causal)."""

    lengths: list[int]
    masks: Sequence[torch.Tensor | None]


Mask = torch.Tensor | PackedRows | BlockMask | None
Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin
Pair = tuple[torch.Tensor, torch.Tensor]  # key and value


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """bool (1, 1, Q, K): the last query sees all keys, each earlier one a key less."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=num_keys - num_queries)[None, None]


def eager_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the reference that the kernels are compared with.

    query (B, N, Q, D), key and value (B, G, K, D), attention_mask bool (B, 1, Q, K), True where visible, or None.
    Returns (B, Q, N, D) and the probabilities (B, N, Q, K).
    """
    groups = module.num_key_value_groups
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is None:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    probs = F.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2), probs


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask,
    prefix: Pair | None = None,
) -> torch.Tensor:
    """Attention of new tokens (query (B, N, Q, D)) over prefix and other keys ((B, G, K, D)): (B, Q, N * D).

    prefix: key and value (B, G, P, D), or (rows, G, P, D) where rows are packed, which every token sees; None: none.
    The module has `attention_dropout`, `scaling`, `num_key_value_groups` and the model's `config`.
    """
    if isinstance(mask, PackedRows):
        rows: Any = zip(*(tensor.split(mask.lengths, dim=2) for tensor in (query, key, value)), mask.masks, strict=True)
        prefixes: Any = [None] * len(mask.lengths) if prefix is None else zip(*(part.split(1) for part in prefix))
        outputs = [attend(module, q, k, v, m, each) for (q, k, v, m), each in zip(rows, prefixes, strict=True)]
        return torch.cat(outputs, dim=1)

    if prefix is not None:
        if prefix[0].shape[0] != key.shape[0]:  # packed rows in one call: the prefixes of all rows stand in front
            prefix = prefix[0].transpose(0, 1).flatten(1, 2)[None], prefix[1].transpose(0, 1).flatten(1, 2)[None]
        key, value = torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
    num_queries = query.shape[2]
    if mask is None and 1 < num_queries < key.shape[2]:
        # Kernels align the causal rule at the first query and key. Empty queries in front move ours to the end,
        # which costs less than a mask: the first queries see few keys.
        query = F.pad(query, (0, 0, key.shape[2] - num_queries, 0))
    name = module.config._attn_implementation
    if name == "flex_attention" and not isinstance(mask, BlockMask):
        name = "sdpa"  # generation, with its cache
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    dropout = module.attention_dropout if module.training else 0.0
    output, _ = function(module, query, key, value, mask, dropout=dropout, scaling=module.scaling)
    return output[:, -num_queries:].flatten(2)


def visible_mask(
    num_queries: int,
    num_past: int,
    num_prefix: int,
    attention_mask: torch.Tensor | None,
    context_length: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Which keys a query may see, bool (B or 1, 1, Q, prefix + past + Q), True where visible.

    attention_mask: (B, past + Q), 0 on padding, or None; a ready (B, 1, Q, past + Q) bool mask is taken as it is.
    context_length: (B,) number of leading positions that every query sees (ChatGLM-6B's prefix mask), or None
    for a causal mask. The `num_prefix` keys of a prefix encoder stand first and are visible to all.
    """
    num_keys = num_past + num_queries
    if attention_mask is not None and attention_mask.dim() == 4:
        visible = attention_mask.bool()
    else:
        visible = causal_mask(num_queries, num_keys, device)
        if context_length is not None:
            keys = torch.arange(num_keys, device=device)
            visible = visible | (keys < context_length[:, None, None, None])
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :num_keys].bool()
    return F.pad(visible, (num_prefix, 0), value=True)


def flex_mask(
    batch_size: int,
    length: int,
    row_lengths: list[int] | None,
    context_length: torch.Tensor | None,
    num_prefix: int,
    device: torch.device,
) -> BlockMask:
    """The mask of a training batch for flex attention; arguments as above, row_lengths of packed rows or None."""
    if row_lengths is None:

        def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            place = key - num_prefix  # below 0 in the prefix
            seen = place <= query
            return seen if context_length is None else seen | (place < context_length[batch])

        num_keys = num_prefix + length
    else:
        batch_size, num_keys = 1, num_prefix * len(row_lengths) + length
        lengths = torch.tensor(row_lengths)
        row = torch.arange(len(row_lengths)).repeat_interleave(lengths)
        place = torch.cat([torch.arange(n) for n in row_lengths])
        key_row = torch.cat((torch.arange(len(row_lengths)).repeat_interleave(num_prefix), row))
        key_place = F.pad(place, (num_prefix * len(row_lengths), 0), value=-1)
        row, place, key_row, key_place = (tensor.to(device) for tensor in (row, place, key_row, key_place))

        def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = key_place[key] <= place[query]
            if context_length is not None:
                seen = seen | (key_place[key] < context_length[row[query]])
            return seen & (key_row[key] == row[query])

    return create_block_mask(visible, batch_size, None, length, num_keys, device=device)
