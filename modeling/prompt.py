"""Making a prompt fit its room, alike in all families."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modeling.tokenizer import SentencePieceTokenizer

Turn = tuple[str, str]  # a question and its answer


def fit_turns(
    encode: Callable[[Sequence[Turn]], list[int]], history: Sequence[Turn], max_src_len: int | None
) -> list[int]:
    """Ids of `encode(history)`, the oldest turns left out until they fit `max_src_len` (None: no limit)."""
    history = list(history)
    ids = encode(history)
    while history and max_src_len is not None and len(ids) > max_src_len:
        history.pop(0)
        ids = encode(history)
    return ids


def cut_question(ids: list[int], max_src_len: int | None, num_tail: int) -> tuple[list[int], int]:
    """(ids cut to `max_src_len`, number cut away); the last `num_tail` ids, which close the prompt, stay."""
    if max_src_len is None or len(ids) <= max_src_len:
        return ids, 0
    assert max_src_len > num_tail, (max_src_len, num_tail)
    return ids[: max_src_len - num_tail] + ids[len(ids) - num_tail :], len(ids) - max_src_len


def num_tail_ids(tokenizer: SentencePieceTokenizer, tail: str) -> int:
    """Number of ids that `tail` takes at the end of a text."""
    return len(tokenizer.encode_text("x" + tail)) - len(tokenizer.encode_text("x"))
