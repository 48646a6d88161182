"""P-Tuning v2: trained keys and values in front of every layer (Liu et al. 2022, arXiv:2110.07602)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init


class PrefixEncoder(nn.Module):
    """`pre_seq_len` virtual tokens -> a key and a value for every layer.

    Without projection one table of (P, K); with it a smaller table and a two-layer tanh network in front
    (`hidden_size` wide). K = num_layers x 2 x heads x D. Parameter names are the released ones:
    `embedding.weight`, `trans.0.*`, `trans.2.*`.
    """

    def __init__(self, config: Any, num_heads: int, head_size: int, embedding_size: int | None = None) -> None:
        """config: `pre_seq_len`, `prefix_projection`, `num_hidden_layers` and `hidden_size` of it decide the sizes;
        embedding_size: of the smaller table (None: K)."""
        super().__init__()
        self.shape = (2 * config.num_hidden_layers, num_heads, head_size)
        width = math.prod(self.shape)
        self.pre_seq_len = config.pre_seq_len
        embedding_size = embedding_size if config.prefix_projection and embedding_size else width
        self.embedding = nn.Embedding(config.pre_seq_len, embedding_size)
        self.trans = None
        if config.prefix_projection:
            hidden_size = config.hidden_size
            self.trans = nn.Sequential(nn.Linear(embedding_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, width))
        self.dropout = nn.Dropout(0.1)

    def reset_parameters(self) -> None:
        """New weights as the released code makes them: torch's own for an embedding and for linear layers."""
        init.normal_(self.embedding.weight)
        linear: Any = (self.trans[0], self.trans[2]) if self.trans is not None else ()
        for layer in linear:
            bound = layer.in_features**-0.5
            init.uniform_(layer.weight, -bound, bound)
            init.uniform_(layer.bias, -bound, bound)

    def forward(self, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns (2 num_layers, B, heads, P, D): slot 2i is layer i's key, 2i + 1 its value, without rotary angles."""
        tokens = torch.arange(self.pre_seq_len, device=self.embedding.weight.device)
        prefix = self.embedding(tokens)
        if self.trans is not None:
            prefix = self.trans(prefix)
        prefix = prefix.to(dtype).view(1, self.pre_seq_len, *self.shape).expand(batch_size, -1, -1, -1, -1)
        return self.dropout(prefix).permute(2, 0, 3, 1, 4)
