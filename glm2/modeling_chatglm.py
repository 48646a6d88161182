"""ChatGLM2-6B: a causal language model with grouped-query attention (released weights, THUDM/chatglm2-6b).

Shapes: B batch, L tokens, H hidden size, N query heads, G key/value heads, D head size, V vocabulary, P prefix length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from glm2.configuration_chatglm import ChatGLMConfig
from modeling.attention import Mask, PackedRows, Pair, Rotary, attend, flex_mask, visible_mask
from modeling.base_model import ChatGLMBackbone, ChatGLMCausalLM, LayerInputs
from modeling.fused_ops import Rotation, SwiGLU, rms_norm
from modeling.loss import OutputLayer
from modeling.prefix_encoder import PrefixEncoder


def rotary_angles(positions: torch.Tensor, config: Any, dtype: torch.dtype) -> Rotary:
    """cos and sin (B, 1, L, rotary size / 2) for positions (B, L); angles in float32, by the family's rotary rule."""
    rotary_size = config.kv_channels // 2
    exponents = torch.arange(0, rotary_size, 2, device=positions.device, dtype=torch.float32) / rotary_size
    inv_freq = 1.0 / config.rotary_base**exponents
    angles = (positions[..., None].float() / config.position_divisor * inv_freq)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs (2i, 2i+1) in the first D / 2 channels of x (B, N, L, D); the others pass through."""
    result = x.clone(memory_format=torch.contiguous_format)
    (even, odd), (new_even, new_odd) = (
        tensor[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1) for tensor in (x, result)
    )
    new_even.mul_(cos).addcmul_(odd, sin, value=-1)
    new_odd.mul_(cos).addcmul_(even, sin)
    return result


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention; the fused projection is q (N D), then k (G D), then v (G D)."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_size = config.kv_channels
        query_size = config.num_attention_heads * self.head_size
        key_size = config.num_key_value_heads * self.head_size
        self.sizes = [query_size, key_size, key_size]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_size**-0.5
        self.attention_dropout = config.attention_dropout
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.add_qkv_bias)
        self.dense = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: Mask,
        rotary: Rotary,
        prefix: Pair | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # B heads L D
            for part in self.query_key_value(hidden_states).split(self.sizes, dim=-1)
        )
        query, key = (Rotation.apply(part, *rotary, rotate) for part in (query, key))
        value = value.contiguous()  # kept for the backward pass, a view would keep the whole projection
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.dense(attend(self, query, key, value, mask, prefix))


class MLP(nn.Module):
    """Two linear layers with SwiGLU between them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(SwiGLU.apply(self.dense_h_to_4h(hidden_states)))


class GLMBlock(GradientCheckpointingLayer):
    """Pre-norm block with plain residuals."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: Mask,
        rotary: Rotary,
        prefix_key: torch.Tensor | None = None,
        prefix_value: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        prefix = None if prefix_key is None else (prefix_key, prefix_value)
        attended = self.self_attention(normed, mask, rotary, prefix, past_key_values=past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Embedding(nn.Module):
    """Holds `word_embeddings`: the released names have this level."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """Holds the blocks and the final norm: the released names have this level."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class ChatGLMModel(ChatGLMBackbone):
    """Embedding, blocks, final norm; it also owns the output layer, as in the released names."""

    config_class = ChatGLMConfig
    _no_split_modules = ["GLMBlock"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = OutputLayer(config.hidden_size, config.padded_vocab_size)
        self.prefix_encoder = None
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(config, config.num_key_value_heads, config.kv_channels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        row_lengths: list[int] | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, L) or inputs_embeds (B, L, H); position_ids (B, L), from the first real token if None.

        row_lengths: rows packed into one sequence; positions start again in each.
        """
        hidden_states = self.embedding.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = hidden_states.shape
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if row_lengths is not None:
                position_ids = torch.cat([torch.arange(n, device=hidden_states.device) for n in row_lengths])[None]
            elif attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_past:]
            else:
                position_ids = torch.arange(num_past, num_past + length, device=hidden_states.device)[None]

        num_rows = batch if row_lengths is None else len(row_lengths)
        prefix = self.prefix_keys_values(num_rows, past_key_values, hidden_states.dtype)
        num_prefix = 0 if prefix is None else prefix.shape[3]
        mask: Mask = None
        if self.uses_flex(attention_mask, past_key_values):
            mask = flex_mask(batch, length, row_lengths, None, num_prefix, hidden_states.device)
        elif row_lengths is not None:
            mask = PackedRows(row_lengths, [None] * num_rows)
        elif attention_mask is not None:
            mask = visible_mask(length, num_past, num_prefix, attention_mask, None, hidden_states.device)
        rotary = rotary_angles(position_ids, self.config, hidden_states.dtype)
        layers, final_norm = self.encoder.layers, self.encoder.final_layernorm
        inputs = LayerInputs(mask, rotary, prefix, past_key_values)
        return self.run_layers(layers, final_norm, hidden_states, inputs, output_hidden_states)


class ChatGLMForConditionalGeneration(ChatGLMCausalLM):
    """ChatGLM2-6B with its own output layer."""

    config_class = ChatGLMConfig
    _no_split_modules = ["GLMBlock"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: Any) -> None:
        self.transformer.output_layer = value
