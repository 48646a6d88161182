"""Prompt of ChatGLM3-6B, for training and prediction alike: `[gMASK] sop`, then messages that open with a role."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modeling.prompt import Turn
    from modeling.tokenizer import SentencePieceTokenizer

from modeling.prompt import cut_question, fit_turns

RESERVED = 6  # ids of a row that are neither source nor answer: [gMASK] sop <|assistant|> `▁` `\n` </s>
SUPERVISED_PROMPT_IDS = 1  # the row is trained from <|assistant|> on


def message_ids(tokenizer: SentencePieceTokenizer, role: str, text: str) -> list[int]:
    """`<|role|>`, the (empty) metadata's newline, the text: each encoded on its own, as released."""
    return [tokenizer.get_command(f"<|{role}|>"), *tokenizer.encode_text("\n"), *tokenizer.encode_text(text)]


def encode_prompt(
    tokenizer: SentencePieceTokenizer, query: str, history: Sequence[Turn] = (), max_src_len: int | None = None
) -> tuple[list[int], int]:
    """(ids of the generation prompt, number of ids of the question cut away). history: earlier (query, answer) pairs.

    The oldest turns give way first, then the end of the question.
    """

    def messages(turns: Sequence[Turn]) -> list[int]:
        said = [pair for turn in turns for pair in zip(("user", "assistant"), turn)] + [("user", query)]
        return [token_id for role, text in said for token_id in message_ids(tokenizer, role, text)]

    ids, num_cut = cut_question(fit_turns(messages, history, max_src_len), max_src_len, num_tail=0)
    start = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    return start + ids + [tokenizer.get_command("<|assistant|>")], num_cut


def encode_answer(tokenizer: SentencePieceTokenizer, answer: str) -> list[int]:
    """Ids of the answer: the newline that closes the (empty) metadata, then the text; without its end."""
    return tokenizer.encode_text("\n") + tokenizer.encode_text(answer)


def stop_ids(tokenizer: SentencePieceTokenizer) -> list[int]:
    """Ids that end an answer (the next role's turn does too); the first one closes training rows."""
    return [tokenizer.get_command(token) for token in ("</s>", "<|user|>", "<|observation|>")]


def clean_response(text: str) -> str:
    """What the released chat does to decoded text."""
    return text.strip().replace("[[训练时间]]", "2023年")
