"""Attention masks and dispatch.

Shapes: B batch, Q new tokens, K keys (prefix + cached + new), N query heads, G key/value heads, D head size.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: the reference that the kernels are compared with.

    query (B, N, Q, D), key and value (B, G, K, D), attention_mask bool (B, 1, Q, K), True where visible.
    Returns (B, Q, N, D) and the probabilities (B, N, Q, K).
    """
    groups = module.num_key_value_groups
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probs = torch.nn.functional.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2), probs


def attend(module, query, key, value, attention_mask, dropout=0.0):
    """Run the attention function that `config._attn_implementation` names; (B, N, Q, D) -> (B, Q, N * D)."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    output, _ = function(
        module, query, key, value, attention_mask, dropout=dropout if module.training else 0.0, scaling=module.scaling
    )
    return output.reshape(*output.shape[:2], -1)


def visible_mask(num_queries, num_past, num_prefix, attention_mask, context_length, device):
    """Which keys a query may see, bool (B or 1, 1, Q, prefix + past + Q), True where visible.

    attention_mask: (B, past + Q), 0 on padding, or None; a ready (B, 1, Q, past + Q) bool mask is taken as it is.
    context_length: (B,) number of leading positions that every query sees (ChatGLM-6B's prefix mask), or None
    for a causal mask. The `num_prefix` keys of a prefix encoder stand first and are visible to all.
    """
    num_keys = num_past + num_queries
    if attention_mask is not None and attention_mask.dim() == 4:
        visible = attention_mask.bool()
    else:
        keys = torch.arange(num_keys, device=device)
        queries = torch.arange(num_past, num_keys, device=device)
        visible = (keys[None, :] <= queries[:, None])[None]  # 1 Q K
        if context_length is not None:
            visible = visible | (keys[None, None, :] < context_length[:, None, None])  # B Q K
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, :num_keys].bool()
        visible = visible[:, None]
    if num_prefix:
        visible = torch.nn.functional.pad(visible, (num_prefix, 0), value=True)
    return visible
