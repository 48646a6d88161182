"""Prompt of ChatGLM2-6B, for training and prediction alike: `[gMASK] sop` text answer `</s>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modeling.prompt import Turn
    from modeling.tokenizer import SentencePieceTokenizer

from modeling.prompt import cut_question, fit_turns, num_tail_ids

RESERVED = 3  # ids of a row that are neither source nor answer: [gMASK] sop </s>
SUPERVISED_PROMPT_IDS = 0  # the row is trained from the answer on
PROMPT_TAIL = "\n\n答："


def query_text(query: str, history: Sequence[Turn] = ()) -> str:
    """Turns are counted from 1 and joined by a blank line. history: earlier (query, answer) pairs."""
    turns = [f"[Round {i}]\n\n问：{q}{PROMPT_TAIL}{a}" for i, (q, a) in enumerate([*history, (query, "")], start=1)]
    return "\n\n".join(turns)


def encode_prompt(
    tokenizer: SentencePieceTokenizer, query: str, history: Sequence[Turn] = (), max_src_len: int | None = None
) -> tuple[list[int], int]:
    """(ids of the generation prompt, number of ids of the question cut away).

    The oldest turns give way first, then the end of the question; the words that close the prompt stay.
    """
    ids = fit_turns(lambda turns: tokenizer.encode_text(query_text(query, turns)), history, max_src_len)
    ids, num_cut = cut_question(ids, max_src_len, num_tail_ids(tokenizer, PROMPT_TAIL))
    return [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")] + ids, num_cut


def encode_answer(tokenizer: SentencePieceTokenizer, answer: str) -> list[int]:
    """Ids of the answer text, without its end."""
    return tokenizer.encode_text(answer)


def stop_ids(tokenizer: SentencePieceTokenizer) -> list[int]:
    """Ids that end an answer; the first one closes training rows."""
    return [tokenizer.get_command("</s>")]


def clean_response(text: str) -> str:
    """What the released chat does to decoded text."""
    return text.strip().replace("[[训练时间]]", "2023年")
