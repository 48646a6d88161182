"""The language-model head, loss and checkpoint rules that all three families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from modeling.attention import Mask, Rotary
from modeling.loss import token_losses
from modeling.prefix_encoder import PrefixEncoder


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Flags that transformers reads, and the initial weights of new modules (normal, 0.02)."""

    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    # Released checkpoints carry rotary tables as buffers; we compute the angles from the positions.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"rotary_pos_emb\.inv_freq$"]

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, PrefixEncoder):  # called after its parts, so this is what they keep
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=0.02)
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif hasattr(module, "weight") and type(module).__name__ in ("LayerNorm", "RMSNorm"):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class LayerInputs(NamedTuple):
    """What all layers of a stack get beside the hidden states."""

    mask: Mask
    rotary: Rotary
    prefix: torch.Tensor | None  # (2 layers, rows, heads, P, D): slot 2i is layer i's key, 2i + 1 its value
    past_key_values: Any  # a cache of transformers, or None


class ChatGLMBackbone(ChatGLMPreTrainedModel):
    """Embedding, layers and final norm: what the families' `transformer` modules do alike."""

    norm_last_hidden_state = False
    prefix_encoder: PrefixEncoder | None

    def prefix_keys_values(self, num_rows: int, past_key_values: Any, dtype: torch.dtype) -> torch.Tensor | None:
        """The prefix encoder's output (2 layers, rows, heads, P, D), or None; computed once for each cache."""
        if self.prefix_encoder is None:
            return None
        prefix = getattr(past_key_values, "prefix_keys_values", None)
        if prefix is None:
            prefix = self.prefix_encoder(1 if past_key_values is not None else num_rows, dtype)
            if past_key_values is not None:
                past_key_values.prefix_keys_values = prefix
        return prefix.expand(-1, num_rows, -1, -1, -1)

    def uses_flex(self, attention_mask: torch.Tensor | None, past_key_values: Any) -> bool:
        """Flex attention is for training: rows without a cache, padded on the right or packed."""
        is_chosen = self.config._attn_implementation == "flex_attention"
        return is_chosen and attention_mask is None and past_key_values is None

    def run_layers(
        self,
        layers: nn.ModuleList,
        final_norm: nn.Module,
        hidden_states: torch.Tensor,
        inputs: LayerInputs,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPast:
        """Run the stack; the prefix goes in as plain tensors, so that recomputation keeps it.

        `hidden_states` of the result: the embedding, then each layer's output; the last one is taken after the
        final norm where `norm_last_hidden_state` is set (glm) and before it elsewhere, as the released code does.
        """
        all_hidden_states: tuple[torch.Tensor, ...] = ()
        for i, layer in enumerate(layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            prefix = () if inputs.prefix is None else (inputs.prefix[2 * i], inputs.prefix[2 * i + 1])
            hidden_states = layer(
                hidden_states, inputs.mask, inputs.rotary, *prefix, past_key_values=inputs.past_key_values
            )
        normed = final_norm(hidden_states)
        if output_hidden_states:
            all_hidden_states += (normed if self.norm_last_hidden_state else hidden_states,)
        return BaseModelOutputWithPast(
            last_hidden_state=normed,
            past_key_values=inputs.past_key_values,
            hidden_states=all_hidden_states if output_hidden_states else None,
        )


@dataclass
class LabelledOutput(CausalLMOutputWithPast):
    """`token_losses` (M,), float32, of the labelled positions in their order, beside what transformers gives."""

    token_losses: torch.Tensor | None = None


class LabelledLM:
    """The forward of a causal network that trains: logits, or the losses of the labelled positions alone.

    For a class of transformers' `PreTrainedModel` with a backbone (`base_model`) and an `OutputLayer`
    (`get_output_embeddings`).
    """

    config: Any
    training: bool
    base_model: Any
    get_output_embeddings: Callable

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        row_lengths: list[int] | None = None,
        label_positions: torch.Tensor | None = None,
        num_items_in_batch: float | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LabelledOutput:
        """input_ids (B, L), labels (B, L) with -100 where nothing is asked.

        With labels: `token_losses` (M,), the float32 cross entropy of each supervised token, and `loss`, their sum
        divided by `num_items_in_batch` or else by their number; `logits` is None, because only labelled positions get
        any. Without labels: `logits` (B, L, V), or of the last `logits_to_keep` positions.
        `attention_mask` (B, past + L) is 0 on padding; batches padded on the right do not need one.
        `row_lengths` (a list of ints): rows packed one after another into B = 1 sequence, which do not see each
        other. `label_positions` (M,): see modeling/loss.py; found out from the labels where not given.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if use_cache else None,
            inputs_embeds=inputs_embeds,
            output_hidden_states=bool(output_hidden_states or self.config.output_hidden_states),
            **({} if row_lengths is None else {"row_lengths": row_lengths}),
        )
        hidden_states = outputs.last_hidden_state
        output_layer = self.get_output_embeddings()
        losses = loss = logits = None
        if labels is not None:
            losses = token_losses(hidden_states, labels, output_layer, label_positions)
            loss = losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            if isinstance(logits_to_keep, torch.Tensor):
                keep = logits_to_keep
            logits = output_layer(hidden_states[:, keep])
        return LabelledOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            token_losses=losses,
        )


class ChatGLMCausalLM(LabelledLM, ChatGLMPreTrainedModel, GenerationMixin):
    """`transformer` plus output layer. Families say where the output layer is (`get_output_embeddings`)."""
