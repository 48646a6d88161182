"""Configuration of TinyLM: the keys of a LLaMA's config.json."""

from transformers import LlamaConfig

from modeling.base_config import ReleasedConfig


class TinyLMConfig(ReleasedConfig, LlamaConfig):
    """Settings of TinyLM."""

    fixed_values = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    pad_token_id: int = 0
