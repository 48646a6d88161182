"""TinyLM: transformers' LLaMA, with the loss of supervised tokens that training asks for.

Shapes: B batch, L tokens, H hidden size, V vocabulary.
"""

from transformers import LlamaForCausalLM, LlamaModel

from modeling.base_model import LabelledLM
from modeling.loss import OutputLayer
from tinylm.configuration_tinylm import TinyLMConfig


class TinyLMModel(LlamaModel):
    """Embedding, layers and final norm; positions are counted from the first token that is not padding."""

    config_class = TinyLMConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        """input_ids (B, L), attention_mask (B, past + L) -> hidden states (B, L, H)."""
        if position_ids is None and attention_mask is not None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_past:]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class TinyLMForCausalLM(LabelledLM, LlamaForCausalLM):
    """TinyLM with its output layer."""

    config_class = TinyLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyLMModel(config)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size)
        self.post_init()
