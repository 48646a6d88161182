"""ChatGLM-6B: a prefix language model with two-dimensional rotary positions (released weights, THUDM/chatglm-6b).

Shapes: B batch, L tokens, H hidden size, N heads, D head size (H / N), V vocabulary, P prefix length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from glm1.configuration_chatglm import ChatGLMConfig
from modeling.attention import Mask, PackedRows, Pair, Rotary, attend, flex_mask, visible_mask
from modeling.base_model import ChatGLMBackbone, ChatGLMCausalLM, LayerInputs
from modeling.fused_ops import Rotation
from modeling.loss import OutputLayer
from modeling.prefix_encoder import PrefixEncoder
from runtime.exits import UserError

# Of a block's residuals. Every release has 28 here whatever num_layers is: the block's default is never overridden.
RESIDUAL_FACTOR = math.sqrt(2 * 28)


def rotary_angles(positions: torch.Tensor, rotary_size: int, dtype: torch.dtype) -> Rotary:
    """cos and sin (B, 1, L, 2 rotary_size) for positions (B, 2, L), rounded to float16 at every step.

    The first half of the channels is for position row 0, the second for row 1.

    The weights were trained with frequencies, angles, cos and sin in float16 and the released code still computes
    them so; exact angles give other logits on long rows. Hence the rounding for every dtype of the model.
    """
    exponents = torch.arange(0, rotary_size, 2, device=positions.device, dtype=torch.float32) / rotary_size
    inv_freq = (1.0 / 10000**exponents).half().float()
    angles = (positions[..., None].half().float() * inv_freq).half().float()  # B 2 L R/2
    angles = torch.cat((angles, angles), dim=-1).transpose(1, 2).flatten(2)[:, None]
    return angles.cos().half().to(dtype), angles.sin().half().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, N, L, D) by cos and sin (B, 1, L, D): within each half of the channels, first half with second."""
    result = x * cos
    (first, second), (new_first, new_second), (first_sin, second_sin) = (
        tensor.unflatten(-1, (2, 2, -1)).unbind(-2) for tensor in (x, result, sin)
    )
    new_first.addcmul_(second, first_sin, value=-1)
    new_second.addcmul_(first, second_sin)
    return result


class Attention(nn.Module):
    """Multi-head attention; the fused projection is interleaved per head: (N, 3 D) -> q, k, v."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_size = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_size**-0.5
        self.attention_dropout = 0.0  # of every release
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: Mask,
        rotary: Rotary,
        prefix: Pair | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, length, self.num_heads, 3 * self.head_size)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)  # B N L D
        query, key = (Rotation.apply(part, *rotary, rotate) for part in (query, key))
        value = value.contiguous()  # kept for the backward pass, a view would keep the whole projection
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.dense(attend(self, query, key, value, mask, prefix))


class MLP(nn.Module):
    """Two linear layers with GELU (tanh approximation)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class GLMBlock(GradientCheckpointingLayer):
    """n1 = LN(x), x = a n1 + attention(n1), n2 = LN(x), x = a n2 + mlp(n2), with a = RESIDUAL_FACTOR.

    The residual takes the normalised value, not x.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
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
        attended = self.attention(normed, mask, rotary, prefix, past_key_values=past_key_values)
        hidden_states = normed * RESIDUAL_FACTOR + attended
        normed = self.post_attention_layernorm(hidden_states)
        return normed * RESIDUAL_FACTOR + self.mlp(normed)


class ChatGLMModel(ChatGLMBackbone):
    """Word embedding, blocks and final norm; works out the prefix mask and both rows of positions itself."""

    config_class = ChatGLMConfig
    _no_split_modules = ["GLMBlock"]
    norm_last_hidden_state = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.prefix_encoder = None
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(
                config, config.num_attention_heads, config.head_dim, embedding_size=config.hidden_size
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

    def prompt_layout(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Per row (B,): index of the first `<sop>` (without one all is context), index of its mask, left padding.

        The mask is `[gMASK]`, or `[MASK]` where there is no gMASK.
        """
        length = input_ids.shape[1]
        index = torch.arange(length, device=input_ids.device)

        def first(token_id: int, default: torch.Tensor) -> torch.Tensor:
            found = torch.where(input_ids == token_id, index, length).amin(dim=1)
            return torch.where(found < length, found, default)

        context = first(self.config.bos_token_id, torch.full_like(input_ids[:, 0], length))
        mask = first(self.config.gmask_token_id, first(self.config.mask_token_id, (context - 1).clamp(min=0)))
        padding = torch.zeros_like(context)
        if attention_mask is not None and attention_mask.dim() == 2:
            padding = (attention_mask[:, :length].long().cumsum(dim=1) == 0).sum(dim=1)
        return context, mask, padding

    def position_rows(
        self, layout: tuple[torch.Tensor, ...], start: int, stop: int, device: torch.device
    ) -> torch.Tensor:
        """Positions (B, 2, stop - start) of the tokens start..stop.

        Row 0: 0, 1, ... before `<sop>`, the index of the mask from there on; row 1: 0 before `<sop>`, then
        1, 2, 3, ... Left padding does not count.
        """
        context, mask, padding = (x[:, None] for x in layout)
        index = torch.arange(start, stop, device=device)[None]
        row0 = torch.where(index < context, (index - padding).clamp(min=0), mask - padding)
        row1 = (index - context + 1).clamp(min=0)
        return torch.stack((row0, row1), dim=1)

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
        """input_ids (B, L); position_ids (B, 2, L) or None; a cache remembers the rows' prompt layout.

        row_lengths: rows packed into one sequence, each with its own `[gMASK]` and `<sop>`.
        """
        if input_ids is None:
            raise UserError("ChatGLM-6B needs input_ids: its mask and positions follow from [gMASK] and <sop>")
        batch, length = input_ids.shape
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        rows = input_ids
        if row_lengths is not None:  # (rows, longest), padded on the right
            batch = len(row_lengths)
            rows = pad_sequence(input_ids[0].split(row_lengths), batch_first=True, padding_value=-1)
        if num_past:
            layout = past_key_values.prompt_layout
        else:
            layout = self.prompt_layout(rows, attention_mask)
            if past_key_values is not None:
                past_key_values.prompt_layout = layout
        if position_ids is None:
            position_ids = self.position_rows(layout, num_past, num_past + rows.shape[1], input_ids.device)
            if row_lengths is not None:
                position_ids = torch.cat([p[:, :n] for p, n in zip(position_ids, row_lengths)], dim=1)[None]
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds

        prefix = self.prefix_keys_values(batch, past_key_values, hidden_states.dtype)
        num_prefix = 0 if prefix is None else prefix.shape[3]
        mask: Mask = None
        if self.uses_flex(attention_mask, past_key_values):
            mask = flex_mask(batch, length, row_lengths, layout[0], num_prefix, input_ids.device)
        elif row_lengths is not None:
            contexts = layout[0].split(1)
            masks = [visible_mask(n, 0, num_prefix, None, c, input_ids.device) for n, c in zip(row_lengths, contexts)]
            mask = PackedRows(row_lengths, masks)
        elif attention_mask is not None or length > 1:
            mask = visible_mask(length, num_past, num_prefix, attention_mask, layout[0], input_ids.device)
        rotary = rotary_angles(position_ids, self.config.head_dim // 2, hidden_states.dtype)
        inputs = LayerInputs(mask, rotary, prefix, past_key_values)
        return self.run_layers(self.layers, self.final_layernorm, hidden_states, inputs, output_hidden_states)


class ChatGLMForConditionalGeneration(ChatGLMCausalLM):
    """ChatGLM-6B with its output layer, which is the word embedding."""

    config_class = ChatGLMConfig
    _no_split_modules = ["GLMBlock"]
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict:
        """The stock positions are one row of plain counts; ours follow from the prompt, so they are dropped."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        inputs.pop("position_ids", None)
        return inputs
