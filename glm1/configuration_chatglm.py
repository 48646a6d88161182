"""Configuration of ChatGLM-6B; keys and defaults are those of the released config.json (vocabulary of v1.1)."""

from typing import Any

from modeling.base_config import ChatGLMConfigBase
from runtime.exits import UserError


class ChatGLMConfig(ChatGLMConfigBase):
    """Settings of ChatGLM-6B. `pre_seq_len` (tokens; None is off) and `prefix_projection` add a prefix encoder."""

    attribute_map = {"num_hidden_layers": "num_layers"}
    window_key = "max_sequence_length"
    fixed_values = {"position_encoding_2d": True, "rope_ratio": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0}

    num_layers: int = 28
    vocab_size: int = 130528
    hidden_size: int = 4096
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    bos_token_id: int = 130004
    eos_token_id: int = 130005
    pad_token_id: int = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    # Released config.json does not mention it: the output layer is the word embedding.
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vocab_size == 150528:
            raise UserError(
                "config.json: vocab_size = 150528: this is ChatGLM-6B v1.0, whose ids are shifted by 20000 image"
                " tokens: use the release of 2023-04-06 or later (v1.1, vocab_size 130528)"
            )

        if self.hidden_size % (4 * self.num_attention_heads):
            raise UserError(
                f"config.json: num_attention_heads = {self.num_attention_heads}: must divide hidden_size ="
                f" {self.hidden_size} into heads of a size that 4 divides: each turns by two positions, in halves"
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads
