"""Decoding where finished rows leave the batch, its cache, and batches under a token budget."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

import predict
from generation import decoding
from generation.decoding import decode, longer_mask
from generation.kv_cache import PreallocatedCache, PreallocatedLayer

NUM_NEW = 20
STOP_ID = 1


def prompts(golden, texts=("你好", "发动机水温高，风扇始终是低速转动", "a  b\tc\n\nd", "再见")):
    """(ids, mask) of prompts, padded on the left."""
    tokenizer = golden.tokenizer()
    rows = [golden.mode.prompt.encode_prompt(tokenizer, text)[0] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def generate(model, ids, mask, **settings):
    """Ids of the answers."""
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


class EndWhenPlanned(LogitsProcessor):
    """Ends the answer of each prompt after its number of tokens: the rows of a batch end at different steps."""

    def __init__(self, ids, lengths):
        self.prompt_length = ids.shape[1]
        self.lengths = dict(zip(map(tuple, ids.tolist()), lengths, strict=True))

    def __call__(self, input_ids, scores):
        for i, row in enumerate(input_ids.tolist()):
            if len(row) + 1 == self.prompt_length + self.lengths[tuple(row[: self.prompt_length])]:
                scores[i] = -torch.inf
                scores[i, STOP_ID] = 0.0
        return scores


def ending(ids, lengths):
    """Settings with which the answers have these lengths at most."""
    return {"logits_processor": LogitsProcessorList([EndWhenPlanned(ids, lengths)]), "eos_token_id": [STOP_ID]}


@pytest.fixture
def batch_sizes(monkeypatch):
    """Numbers of rows that stay when rows leave."""
    sizes = []

    class Watched(PreallocatedCache):
        def batch_select_indices(self, indices):
            sizes.append(len(indices))
            super().batch_select_indices(indices)

    monkeypatch.setattr(decoding, "PreallocatedCache", Watched)
    return sizes


@pytest.mark.parametrize("prefix", [None, "prefix_projection"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}], ids=["plain", "penalty"])
def test_greedy_tokens_are_those_of_generate(golden, prefix, settings, batch_sizes):
    model = golden.prefix_model(prefix) if prefix else golden.model()
    ids, mask = prompts(golden)
    settings = {**settings, **ending(ids, [3, 9, 30, 9])}
    wanted = generate(model, ids, mask, **settings)
    assert (wanted[[0, 1, 3], -1] == 0).all(), "rows have ended early"
    assert generate(model, ids, mask, custom_generate=decode, **settings).tolist() == wanted.tolist()
    assert batch_sizes == [3, 1]
    # Looking less often leaves the answers as they are.
    found = generate(model, ids, mask, custom_generate=decode, check_every=7, **settings)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("check_every", [1, 4])
def test_all_rows_end_early(golden, check_every):
    model = golden.model()
    ids, mask = prompts(golden)
    settings = ending(ids, [3, 1, 4, 5])
    wanted = generate(model, ids, mask, **settings)
    found = generate(model, ids, mask, custom_generate=decode, check_every=check_every, **settings)
    width = wanted.shape[1]
    assert width == 5 and found.shape[1] < width + check_every
    assert torch.equal(found[:, :width], wanted) and not found[:, width:].any()


def test_prompts_of_one_length_need_no_mask(golden, monkeypatch):
    model = golden.model()
    ids, mask = prompts(golden, ["你好吗", "你好吗"])
    ids[1, 2:4] = ids[1, 2:4].flip(0)
    wanted = generate(model, ids, mask)
    masks = []
    forward = model.transformer.forward
    monkeypatch.setattr(
        model.transformer, "forward", lambda **kwargs: masks.append(kwargs["attention_mask"]) or forward(**kwargs)
    )
    assert generate(model, ids, mask, custom_generate=decode).tolist() == wanted.tolist()
    assert len(masks) == NUM_NEW and all(each is None for each in masks)
    assert longer_mask(torch.tensor([[0, 1], [1, 1]]), 4).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_draws_follow_from_the_seed(golden):
    model = golden.model()
    ids, mask = prompts(golden)
    settings = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2, "top_k": 0}
    lengths = [3, 9, 30, 9]

    def drawn(seed, **more):
        torch.manual_seed(seed)
        return generate(model, ids, mask, **settings, **more).tolist()

    ours = [drawn(seed, custom_generate=decode, **ending(ids, lengths)) for seed in (1, 1, 2)]
    assert ours[0] == ours[1] != ours[2] and len(ours[0]) == 2 * len(ids)
    # As long as all rows are in the batch, the draws are those of generate.
    assert drawn(3, custom_generate=decode) == drawn(3)


def test_adapter_is_used(golden):
    from peft import LoraConfig, get_peft_model

    model = golden.model()
    ids, mask = prompts(golden)
    base = generate(model, ids, mask, custom_generate=decode).tolist()
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"]))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted, found = (
        wrapped.generate(input_ids=ids, attention_mask=mask, custom_generate=way, **settings)[:, ids.shape[1] :]
        for way in (None, decode)
    )
    assert found.tolist() == wanted.tolist() != base


@pytest.mark.parametrize("capacity", [0, 9, 100])
def test_cache_holds_what_the_stock_one_holds(capacity):
    torch.manual_seed(0)
    stock, ours = DynamicCache(), PreallocatedCache(num_layers=2, capacity=capacity)
    ours.prompt_layout = (torch.arange(3), torch.arange(3) + 10)

    def update(num_rows, num_tokens):
        for layer in range(2):
            states = torch.randn(2, num_rows, 4, num_tokens, 8)
            for found, wanted in zip(ours.update(*states, layer), stock.update(*states, layer)):
                assert torch.equal(found, wanted)
        assert ours.get_seq_length() == stock.get_seq_length()

    def both(name, *values):
        for cache in (stock, ours):
            getattr(cache, name)(*values)

    assert ours.get_seq_length() == 0
    update(3, 7)
    update(3, 1)
    both("crop", -2)
    update(3, 5)
    both("batch_select_indices", torch.tensor([0, 2]))
    assert [of_rows.tolist() for of_rows in ours.prompt_layout] == [[0, 2], [10, 12]]
    update(2, 1)
    both("reorder_cache", torch.tensor([1, 0]))
    update(2, 1)
    both("batch_repeat_interleave", 2)
    update(4, 1)
    ours.reset()
    stock = DynamicCache()  # older releases of transformers keep a reset cache's length
    update(5, 2)


def test_cache_writes_in_place():
    layer, stock = PreallocatedLayer(capacity=8), DynamicLayer()
    places = {layer.update(*torch.randn(2, 1, 1, 1, 4))[0].data_ptr() for _ in range(8)}
    assert len(places) == 1 and layer.keys.dtype == torch.float32
    layer = PreallocatedLayer(capacity=8)
    half = torch.randn(2, 1, 1, 3, 4).to(torch.bfloat16)
    assert torch.equal(layer.update(*half)[1], stock.update(*half)[1]) and layer.keys.dtype == torch.bfloat16


class NotingAnswerer:
    """Stands for a model: notes the batches; a row's prompt is as long as the number in its query."""

    def __init__(self):
        self.batches = []

    def prompt_ids(self, query):
        return [7] * int(query), 0

    def __call__(self, encoded):
        self.batches.append([len(ids) for ids, _ in encoded])
        return [{"predictions": [str(len(ids))], "stopped": [True], "source_cut": 0} for ids, _ in encoded]


@pytest.mark.parametrize(
    "budget, answers", [(0, {}), (1, {}), (300, {}), (700, {"num_return_sequences": 3}), (700, {"num_beams": 2})]
)
def test_batches_stay_within_the_budget(tmp_path, budget, answers):
    draw = random.Random(budget)
    lengths = [draw.randint(1, 100) for _ in range(50)]
    rows = [{"query": str(length), "answer": None} for length in lengths]
    args = SimpleNamespace(batch_size=8, batch_tokens=budget, max_new_tokens=20, output_path=str(tmp_path / "p.jsonl"))
    vars(args).update({"num_return_sequences": 1, "num_beams": 1, "overwrite": False, "max_src_len": 64, **answers})
    answerer = NotingAnswerer()
    predict.predict_file(answerer, rows, args, key="k")

    per_row = max(args.num_return_sequences, args.num_beams)
    needed = [(max(batch) + 20) * len(batch) * per_row for batch in answerer.batches]
    assert all(len(batch) == 1 or not budget or tokens <= budget for batch, tokens in zip(answerer.batches, needed))
    assert max(map(len, answerer.batches)) <= 8
    # No batch could have taken the next row too.
    for batch, following in zip(answerer.batches, answerer.batches[1:]):
        assert len(batch) == 8 or (max(batch) + 20) * (len(batch) + 1) * per_row > budget > 0
    flat = [length for batch in answerer.batches for length in batch]
    assert flat == sorted(lengths, reverse=True)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["index"], line["prediction"]) for line in lines] == [(i, str(n)) for i, n in enumerate(lengths)]
