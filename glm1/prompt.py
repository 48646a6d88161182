"""Prompt of ChatGLM-6B, for training and prediction alike: text `[gMASK] <sop>` answer `<eop>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modeling.prompt import Turn
    from modeling.tokenizer import SentencePieceTokenizer

import re

from modeling.prompt import cut_question, fit_turns, num_tail_ids

RESERVED = 3  # ids of a row that are neither source nor answer: [gMASK] <sop> <eop>
SUPERVISED_PROMPT_IDS = 1  # the row is trained from <sop> on
PROMPT_TAIL = "\n答："


def query_text(query: str, history: Sequence[Turn] = ()) -> str:
    """One turn is `[Round 1]` as in the training rows; several are counted from 0, as the released chat does.

    history: earlier (query, answer) pairs.
    """
    if not history:
        return f"[Round 1]\n问：{query}{PROMPT_TAIL}"
    turns = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history))
    return f"{turns}[Round {len(history)}]\n问：{query}{PROMPT_TAIL}"


def encode_prompt(
    tokenizer: SentencePieceTokenizer, query: str, history: Sequence[Turn] = (), max_src_len: int | None = None
) -> tuple[list[int], int]:
    """(ids of the generation prompt, number of ids of the question cut away).

    The oldest turns give way first, then the end of the question; the words that close the prompt stay.
    """
    ids = fit_turns(lambda turns: tokenizer.encode_text(query_text(query, turns)), history, max_src_len)
    ids, num_cut = cut_question(ids, max_src_len, num_tail_ids(tokenizer, PROMPT_TAIL))
    return ids + [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")], num_cut


def encode_answer(tokenizer: SentencePieceTokenizer, answer: str) -> list[int]:
    """Ids of the answer text, without its end."""
    return tokenizer.encode_text(answer)


def stop_ids(tokenizer: SentencePieceTokenizer) -> list[int]:
    """Ids that end an answer; the first one closes training rows."""
    return [tokenizer.get_command("<eop>")]


def clean_response(text: str) -> str:
    """What the released chat does to decoded text: full-width punctuation next to Chinese characters comes back."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for ascii_mark, full_width in (",，", "!！", ":：", ";；", "?？"):
        text = re.sub(rf"([\u4e00-\u9fff])\{ascii_mark}", rf"\1{full_width}", text)
        text = re.sub(rf"\{ascii_mark}([\u4e00-\u9fff])", rf"{full_width}\1", text)
    return text
