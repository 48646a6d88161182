"""Tokenizer of ChatGLM2-6B (`tokenizer.model`): byte-fallback pieces, then control tokens by number."""

from __future__ import annotations

from typing import Any

from modeling.tokenizer import SentencePieceTokenizer


class ChatGLMTokenizer(SentencePieceTokenizer):
    """`[gMASK] sop` + text; unknown and padding are id 0, the end token is `</s>` (2)."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    appended_tokens: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    read_only_keys = ("bos_token", "eos_token", "unk_token", "pad_token")

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str = "<unk>",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_file, bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token, **kwargs
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[gMASK] sop + ids (+ second ids + </s>)."""
        ids = [self.get_command("[gMASK]"), self.get_command("sop")] + token_ids_0
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.get_command("</s>")]
