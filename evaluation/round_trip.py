"""Which answers a tokenizer gives back as another text: no model that is trained on them can write those as they stand.

The ids of an answer are those of training, and they become a text as in predict.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from evaluation.row_scores import fold
from utils import printable

NUM_EXAMPLES = 2
SHOWN = 12  # characters on either side of the first that differs


@dataclass
class RoundTrip:
    """What came of the answers. White space at the ends, which predict.py drops, does not count as a change.

    changed: answers that come back as another text. unlike: those of them that differ after NFKC folding too, so that
    they lower the exact metrics of a perfect model. examples: (place, answer, what comes back), the unlike ones first.
    """

    num_rows: int = 0
    num_changed: int = 0
    num_unlike: int = 0
    examples: list = field(default_factory=list)


def come_back(answer: str, tokenizer: Any, prompt: Any) -> str:
    """The text that predict.py would show of the ids that training supervises for an answer."""
    return prompt.clean_response(tokenizer.decode_text(prompt.encode_answer(tokenizer, answer)))


def send_through(rows: Iterable[dict], tokenizer: Any, prompt: Any) -> RoundTrip:
    """Send the answer of each row of `data_set.read_rows` through a tokenizer and back. prompt: the family's module."""
    found = RoundTrip()
    unlike: list[tuple] = []
    folded: list[tuple] = []
    for row in rows:
        found.num_rows += 1
        answer = row["answer"].strip()
        text = come_back(row["answer"], tokenizer, prompt)
        if text == answer:
            continue
        found.num_changed += 1
        is_unlike = fold(text).strip() != fold(answer).strip()
        found.num_unlike += is_unlike
        examples = unlike if is_unlike else folded
        if len(examples) < NUM_EXAMPLES:
            examples.append((row["place"], answer, text))
    found.examples = [*unlike, *folded][:NUM_EXAMPLES]
    return found


def describe(found: RoundTrip) -> list[str]:
    """Lines on what came of the answers: their numbers, then the examples."""
    if not found.num_changed:
        return [f"{found.num_rows:,} rows: every answer comes back from the tokenizer as it is"]
    rest = "folded with NFKC, as metrics compare texts, all of them are alike"
    if found.num_unlike:
        rest = f"{found.num_unlike:,} of these differ after NFKC folding too, and no model can match them exactly"
    lines = [f"{found.num_rows:,} rows: {found.num_changed:,} answers come back as another text; {rest}"]
    return lines + [f"{place}: {around(answer, text)}" for place, answer, text in found.examples]


def around(answer: str, text: str) -> str:
    """`(汽油)` of `（汽油）`: the place where two texts part, with a few characters on either side."""
    start = next((n for n, pair in enumerate(zip(answer, text)) if pair[0] != pair[1]), min(len(answer), len(text)))
    first, end = max(0, start - SHOWN), start + SHOWN
    cuts = [f"{'...' * (first > 0)}{printable(one[first:end])}{'...' * (end < len(one))}" for one in (answer, text)]
    return f"'{cuts[0]}' comes back as '{cuts[1]}'"
