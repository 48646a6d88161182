"""Configuration of ChatGLM3-6B: glm2's keys with its own window."""

from glm2.configuration_chatglm import ChatGLMConfig as ChatGLM2Config


class ChatGLMConfig(ChatGLM2Config):
    """Settings of ChatGLM3-6B (8k; the 32k release sets seq_length 32768 and rope_ratio 50 itself)."""

    seq_length: int = 8192

    @property
    def rotary_rule(self):
        """(base of the rotary angles, divisor of the positions): here rope_ratio multiplies the base."""
        return 10000.0 * self.rope_ratio, 1.0
