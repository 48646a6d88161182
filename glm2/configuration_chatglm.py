"""Configuration of ChatGLM2-6B; keys and defaults are those of the released config.json."""

from typing import Any

from modeling.base_config import ChatGLMConfigBase
from runtime.exits import UserError


class ChatGLMConfig(ChatGLMConfigBase):
    """Settings of ChatGLM2-6B. `pre_seq_len` (tokens; None is off) and `prefix_projection` add a prefix encoder."""

    attribute_map = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size", "head_dim": "kv_channels"}
    window_key = "seq_length"
    fixed_values = {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "fp32_residual_connection": False,
        "add_bias_linear": False,
        "interleaved_qkv": False,
        "original_rope": True,
        "rotary_percent": 0.5,
        "tie_word_embeddings": False,
        "hidden_dropout": 0.0,
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 32768
    rope_ratio: float = 1.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.json: multi_query_group_num = {self.multi_query_group_num}: must divide num_attention_heads ="
                f" {self.num_attention_heads}"
            )

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies; `rope_ratio` does not change it (released modeling_chatglm.py)."""
        return 10000.0

    @property
    def position_divisor(self) -> float:
        """What positions are divided by: ChatGLM2-6B-32k has a rope_ratio of 16."""
        return self.rope_ratio

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads G: shared by num_attention_heads / G query heads each."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads
