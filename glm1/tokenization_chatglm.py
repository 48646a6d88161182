"""Tokenizer of ChatGLM-6B (`ice_text.model`): white space has its own pieces, special ids are appended."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import sentencepiece

from modeling.tokenizer import SentencePieceTokenizer
from runtime.exits import UserError

MAX_BLANKS = 80  # longest run of spaces with a piece of its own
BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")
WHITE_SPACE = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{k}|>": " " * k for k in range(2, MAX_BLANKS + 1)}
# The model file's normaliser (nmt_nfkc) drops these, so they could hide a marker from a search: `<`, 0x01, `sop>`.
DROPPED = dict.fromkeys([*range(0x1, 0x9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F])
MARKERS = re.compile(r"\[[gs]?MASK\]|<(sop|eop|ENC|dBLOCK|pad|unused_\d+)>")


class ChatGLMTokenizer(SentencePieceTokenizer):
    """Text + `[gMASK] <sop>`; the model file normalises with NFKC, so full-width punctuation becomes ASCII."""

    vocab_files_names = {"vocab_file": "ice_text.model"}
    settings = SentencePieceTokenizer.settings | {
        "num_image_tokens": (lambda value: type(value) is int and value >= 0, "a whole number")
    }

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        gmask_token: str = "[gMASK]",
        mask_token: str = "[MASK]",
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        if num_image_tokens:
            raise UserError(
                f"tokenizer_config.json: num_image_tokens = {num_image_tokens}: this is the v1.0 vocabulary of"
                " ChatGLM-6B, whose ids are shifted: use the release of 2023-04-06 or later (v1.1)"
            )
        super().__init__(
            vocab_file,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            gmask_token=gmask_token,
            mask_token=mask_token,
            num_image_tokens=num_image_tokens,
            **kwargs,
        )

    def is_control_piece(self, token_id: int) -> bool:
        """Also markers that a file keeps as ordinary pieces, and the pieces that stand for white space."""
        piece = self.sp_model.id_to_piece(token_id)
        return super().is_control_piece(token_id) or bool(MARKERS.fullmatch(piece) or piece in WHITE_SPACE)

    def normalise(self, text: str) -> str:
        return unicodedata.normalize("NFKC", text.translate(DROPPED))

    def encode_plain(self, text: str, reader: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Newline to `<n>`, tab to `<|tab|>`, runs of 2 to 80 spaces to `<|blank_k|>`, the longest first."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return super().encode_plain(BLANKS.sub(lambda run: f"<|blank_{len(run.group())}|>", text), reader)

    def piece_text(self, piece: str) -> str:
        return WHITE_SPACE.get(piece, piece)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """ids + [gMASK] <sop> (+ second ids + <eop>)."""
        ids = token_ids_0 + [self.get_command("[gMASK]"), self.get_command("<sop>")]
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.get_command("<eop>")]
