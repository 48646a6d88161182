"""Configuration of ChatGLM3-6B: glm2's keys with its own window."""

from glm2.configuration_chatglm import ChatGLMConfig as ChatGLM2Config


class ChatGLMConfig(ChatGLM2Config):
    """Settings of ChatGLM3-6B (8k; the 32k release sets seq_length 32768 and rope_ratio 50 itself)."""

    seq_length: int = 8192

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies, multiplied by `rope_ratio`, unlike glm2's (released modeling_chatglm.py)."""
        return 10000.0 * self.rope_ratio

    @property
    def position_divisor(self) -> float:
        """Positions are taken as they are."""
        return 1.0
