"""Answers to rows: batches of prompts in, texts out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling.family import Prompt
    from modeling.tokenizer import SentencePieceTokenizer


@dataclass(frozen=True)
class DecodingSettings:
    """How questions are answered; the fields are the flags of the same names. The usual values: one greedy answer."""

    max_new_tokens: int  # of an answer at most
    max_src_len: int | None = None  # tokens of a question, the rest is cut; None: nothing is
    num_return_sequences: int = 1
    num_beams: int = 1
    repetition_penalty: float = 1.0  # 1: off
    do_sample: bool = False
    temperature: float = 0.8  # this and what follows: with do_sample
    top_p: float = 0.8
    top_k: int = 0  # 0: all

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> DecodingSettings:
        """Those of a command's flags."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def for_generate(self, stop_ids: list[int], pad_token_id: int) -> dict[str, Any]:
        """The settings of transformers' `generate`."""
        names = ["max_new_tokens", "num_return_sequences", "num_beams", "do_sample", "repetition_penalty"]
        names += ["temperature", "top_p", "top_k"] if self.do_sample else []
        ids = {"eos_token_id": stop_ids, "pad_token_id": pad_token_id}
        return {**{name: getattr(self, name) for name in names}, **ids}


class Answerer:
    """A model with its prompt and decoding settings; called with a batch of encoded prompts, it answers them.

    A batch gives the same greedy answers as its rows alone: prompts are padded on the left and hidden. is_split: the
    weights are split over the ranks (ZeRO-3), which therefore generate in step until the last one is done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: SentencePieceTokenizer,
        prompt: Prompt,
        settings: DecodingSettings,
        is_split: bool = False,
    ) -> None:
        self.model = model
        self.is_split = is_split
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_src_len = settings.max_src_len
        self.num_return_sequences = settings.num_return_sequences
        self.settings = settings.for_generate(prompt.stop_ids(tokenizer), tokenizer.pad_token_id)

    def prompt_ids(self, query: str, history: Sequence = ()) -> tuple[list[int], int]:
        """(ids, number of source ids that were cut)."""
        return self.prompt.encode_prompt(self.tokenizer, query, history, max_src_len=self.max_src_len)

    def __call__(self, encoded: list[tuple[list[int], int]]) -> list[dict]:
        """For each of `prompt_ids`: {"predictions": texts, "stopped": bools, "source_cut": ids cut away}."""
        import torch
        from transformers import GenerationConfig

        from generation.decoding import decode

        length = max(len(ids) for ids, _ in encoded)
        input_ids = torch.full((len(encoded), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for i, (ids, _) in enumerate(encoded):
            input_ids[i, length - len(ids) :] = torch.tensor(ids)
            mask[i, length - len(ids) :] = 1
        device = self.model.device
        with torch.no_grad():  # inference_mode would leave tensors that training cannot use
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(**self.settings),
                custom_generate=decode if self.settings["num_beams"] == 1 and not self.is_split else None,
                synced_gpus=self.is_split,
            )
        stop_ids = set(self.settings["eos_token_id"])
        answers = []
        for new_ids in output[:, length:].tolist():
            end = next((i for i, token_id in enumerate(new_ids) if token_id in stop_ids), len(new_ids))
            text = self.prompt.clean_response(self.tokenizer.decode_text(new_ids[:end]))
            answers.append((text, end < len(new_ids)))
        n = self.num_return_sequences
        return [
            {
                "predictions": [text for text, _ in answers[i * n : (i + 1) * n]],
                "stopped": [stopped for _, stopped in answers[i * n : (i + 1) * n]],
                "source_cut": encoded[i][1],
            }
            for i in range(len(encoded))
        ]


def make_batches(sizes: dict[int, int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """Lists of row numbers, the longest rows first, so that a lack of memory shows at once.

    sizes: tokens of each row, answers included, by its number. A batch has at most `batch_size` rows and, with each
    counted as its longest, `batch_tokens` tokens (0: off); one row is always taken.
    """
    batches: list[list[int]] = []
    room = 0  # rows that the last batch may still take
    for number in sorted(sizes, key=lambda number: (sizes[number], number), reverse=True):
        if room < 1:
            batches.append([])
            room = min(batch_size, batch_tokens // sizes[number]) if batch_tokens else batch_size
        batches[-1].append(number)
        room -= 1
    return batches
