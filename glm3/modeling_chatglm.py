"""ChatGLM3-6B: the network of ChatGLM2-6B, with its own configuration (released weights, THUDM/chatglm3-6b)."""

from __future__ import annotations

from glm2 import modeling_chatglm as glm2
from glm3.configuration_chatglm import ChatGLMConfig


class ChatGLMModel(glm2.ChatGLMModel):
    """Embedding, blocks and final norm."""

    config_class = ChatGLMConfig


class ChatGLMForConditionalGeneration(glm2.ChatGLMForConditionalGeneration):
    """ChatGLM3-6B with its own output layer."""

    config_class = ChatGLMConfig
