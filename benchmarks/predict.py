"""How many answer tokens a second: one row at a time, batches with generate's own loop, batches with ours.

    python benchmarks/predict.py --mode glm2
    python benchmarks/predict.py --mode glm --min_new_tokens 64 --save

Random weights in float32. Rows are sorted by length, as predict.py does. The three ways take turns within each round,
and their answers must be equal. Only real answer tokens are counted: no padding, the end's token included.
"""

import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks import report
from benchmarks.presets import PRESETS, preset_config
from generation.decoding import decode
from modes import MODES
from utils import prepare_environment

PROMPT_LENGTHS = (40, 160)
MARK = -3  # place of a prompt's mark: in front of what closes a prompt of ChatGLM-6B
NUM_ORDINARY_IDS = 60000  # from 100 on: special ids of all families lie outside


class EndWhenPlanned(LogitsProcessor):
    """Ends the row with mark m after lengths[m] tokens and never before.

    The mark is a prompt id, so that the plan holds in a batch of any rows.
    """

    def __init__(self, lengths, prompt_length, stop_id):
        self.lengths = torch.tensor(lengths)
        self.prompt_length = prompt_length
        self.stop_id = stop_id

    def __call__(self, input_ids, scores):
        num_new = input_ids.shape[1] - self.prompt_length + 1
        planned = self.lengths[input_ids[:, self.prompt_length + MARK]]
        end = torch.where(planned == num_new, torch.inf, -torch.inf)
        scores[:, self.stop_id] = end.to(scores.dtype)
        return scores


def make_rows(mode, config, args):
    """(prompts, lists of ids, longest first; planned answer lengths by mark)."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw(low, high, size):
        return torch.randint(low, high + 1, (size,), generator=generator).tolist()

    lengths = draw(args.min_new_tokens, args.max_new_tokens, args.rows)
    prompts = []
    for mark, length in enumerate(sorted(draw(*PROMPT_LENGTHS, args.rows), reverse=True)):
        ids = draw(100, 100 + NUM_ORDINARY_IDS, length)
        ids[MARK] = mark
        if mode.name == "glm":
            ids[-2:] = [config.gmask_token_id, config.bos_token_id]
        prompts.append(ids)
    return prompts, lengths


def answer(model, prompts, lengths, batch_size, custom_generate, max_new_tokens):
    """Answers (lists of ids, the end included) of all prompts."""
    answers = []
    stop_id, pad_id = model.config.eos_token_id, model.config.pad_token_id
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
        settings = {"max_new_tokens": max_new_tokens, "eos_token_id": [stop_id], "pad_token_id": pad_id}
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=GenerationConfig(do_sample=False, **settings),
                logits_processor=LogitsProcessorList([EndWhenPlanned(lengths, longest, stop_id)]),
                custom_generate=custom_generate,
            )
        answers += [ids[: ids.index(stop_id) + 1] for ids in output[:, longest:].tolist()]
    return answers


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="size of the network")
    parser.add_argument("--mode", choices=MODES, default="glm2", help="model family")
    parser.add_argument("--batch_size", type=int, default=16, help="rows answered together")
    parser.add_argument("--rows", type=int, default=32, help="rows to answer")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--min_new_tokens", type=int, default=1, help="shortest answer")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured")
    parser.add_argument("--seed", type=int, default=1234, help="of weights, prompts and lengths")
    parser.add_argument("--save", action="store_true", help="put the figures into benchmarks/RESULTS.md")
    args = parser.parse_args(argv)

    mode = MODES[args.mode]
    prepare_environment("cpu")
    config = preset_config(args.preset, args.mode)
    torch.manual_seed(args.seed)
    model = mode.model_class(config).eval()
    prompts, lengths = make_rows(mode, config, args)
    ways = {
        "single rows": (1, None),
        f"batch {args.batch_size}, generate's loop": (args.batch_size, None),
        f"batch {args.batch_size}, ours": (args.batch_size, decode),
    }
    print(f"{mode.name} {args.preset}: {model.num_parameters() / 1e6:.0f} M weights, {torch.get_num_threads()} threads")

    answer(model, prompts[-2:], lengths, 2, decode, args.max_new_tokens)  # the first calls are slower
    rates = {name: [] for name in ways}
    expected = None
    for number in range(args.rounds):
        for name, (batch_size, custom_generate) in ways.items():
            started = time.perf_counter()
            answers = answer(model, prompts, lengths, batch_size, custom_generate, args.max_new_tokens)
            rates[name].append(sum(map(len, answers)) / (time.perf_counter() - started))
            expected = expected or answers
            if answers != expected:
                sys.exit(f"{name}: answers differ from those of single rows")
        print(f"round {number + 1}: " + ", ".join(f"{name} {rate[-1]:.0f}" for name, rate in rates.items()), flush=True)

    single, stock, ours = rates
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        f"{ours} / {base}": statistics.median(a / b for a, b in zip(rates[ours], rates[base], strict=True))
        for base in (single, stock)
    }
    for name, value in medians.items():
        print(f"{name}: {value:.1f} tokens/s")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    if args.save:
        command = " ".join(["python benchmarks/predict.py", *(word for word in argv if word != "--save")])
        row = {"mode": mode.name, "answer tokens": sum(lengths)}
        row |= {f"{name}, tokens/s": f"{value:.0f}" for name, value in medians.items()}
        report.save("Prediction", command, [row | {name: f"{value:.2f}" for name, value in ratios.items()}])


if __name__ == "__main__":
    main(sys.argv[1:])
