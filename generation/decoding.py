"""Greedy search and sampling where finished rows leave the batch.

Shapes: B rows still in the batch, N rows of the result, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from generation.kv_cache import PreallocatedCache

STEPS_BETWEEN_CHECKS = 4  # on a GPU, where a look at the result waits for all that was started


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    check_every: int | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """For `model.generate(..., custom_generate=decode)`: the tokens that generate's own loop gives, sooner.

    input_ids: (N, prompt), padded on the left. Returns (N, prompt + new): prompts and answers, in the given order,
    `pad_token_id` behind an answer's end. Every `check_every` steps (None: 1 on a CPU, more on a GPU) those rows
    leave the batch that have finished; processors and criteria must judge each row by itself. Draws follow from the
    seed, but differ from those of generate's loop once a row has left.
    """
    num_rows, prompt_length = input_ids.shape
    max_length = generation_config.max_length
    if check_every is None:
        check_every = 1 if input_ids.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    cache = PreallocatedCache(model.config.num_hidden_layers, capacity=max_length)
    mask = longer_mask(model_kwargs["attention_mask"], max_length)
    output = input_ids.new_full((num_rows, max_length), generation_config.pad_token_id)
    output[:, :prompt_length] = input_ids
    rows = torch.arange(num_rows, device=input_ids.device)  # (B,) where those in the batch belong in the output
    tokens = output.clone()  # (B, max_length) of those in the batch
    finished = torch.zeros_like(rows, dtype=torch.bool)
    start = 0
    for length in range(prompt_length, max_length):
        logits = model(
            input_ids=tokens[:, start:length],
            attention_mask=None if mask is None else mask[:, :length],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        scores = logits_processor(tokens[:, :length], logits.float())  # B V
        if generation_config.do_sample:
            next_ids = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            next_ids = scores.argmax(dim=-1)
        tokens[:, length] = next_ids.masked_fill(finished, generation_config.pad_token_id)
        finished = finished | stopping_criteria(tokens[:, : length + 1], None)
        start = length
        if (start - prompt_length) % check_every == 0 and finished.any():
            output[rows[finished]] = tokens[finished]
            going_on = (~finished).nonzero()[:, 0]
            rows, tokens, finished = rows[going_on], tokens[going_on], finished[going_on]
            if not len(rows):
                break
            mask = mask if mask is None else mask[going_on]
            cache.batch_select_indices(going_on)
            keep_rows(logits_processor, going_on)
    output[rows] = tokens
    return output[:, : start + 1]


def longer_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask (N, prompt) with ones up to (N, length); None where it hides nothing, so that no layer needs one."""
    if attention_mask is None or attention_mask.all():
        return None
    return torch.nn.functional.pad(attention_mask, (0, length - attention_mask.shape[1]), value=1)


def keep_rows(logits_processor: Any, indices: torch.Tensor) -> None:
    """Keep the rows `indices` of what processors know about rows: the repetition penalty, their left padding."""
    for processor in logits_processor:
        if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):
            processor.prompt_ignore_length = processor.prompt_ignore_length[indices]
