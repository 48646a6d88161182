"""Tokenizer of ChatGLM3-6B: glm2's, with the tokens of the four roles."""

from __future__ import annotations

from glm2.tokenization_chatglm import ChatGLMTokenizer as ChatGLM2Tokenizer


class ChatGLMTokenizer(ChatGLM2Tokenizer):
    """`[gMASK] sop` + text, and one control token for each role."""

    appended_tokens = (
        *ChatGLM2Tokenizer.appended_tokens,
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    )
