"""What did fine-tuning make the model forget? Loss and scored answers on a fixed suite of general questions.

    python forgetting.py --model_path ChatGLM3-6B --output_path before.json
    python forgetting.py --model_path output-glm3/epoch-2-step-720 --before before.json --output_path after.json

Takes what predict.py takes. The suite, and how its rows are scored: data/general/README.md.
"""

from __future__ import annotations

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
from typing import Any

from checkpoints.bases import known_bases
from checkpoints.opening import load_opened, open_checkpoint
from evaluation.forgetting import (
    differences,
    format_result,
    measure_answers,
    measure_losses,
    require_comparable,
    require_room,
    require_same_base,
    rescore,
    save,
    summary,
    verdict,
)
from evaluation.general_suite import suite_hash
from flags.forgetting import output_problems, parse_args
from generation.answerer import Answerer, DecodingSettings
from runtime.exits import UserError
from runtime.holding import holding, require_there
from runtime.machine import versions
from utils import choose_device, choose_precision, prepare_environment, torch_dtype

PACKAGES = ("torch", "transformers", "peft", "rouge-chinese", "jieba")


def main(argv: list[str]) -> int:
    """Measure a model on the suite, compare with an earlier result, write the result, print the table."""
    args, suite, before = parse_args(argv)
    with holding(args.output_path, check=lambda: output_problems(args)):
        measure(args, suite, before)
    return 0


def measure(args: argparse.Namespace, suite: Any, before: dict) -> None:
    """From the checked flags to the table."""
    prepare_environment(args.device)
    opened = open_checkpoint(args.model_path, args.mode, base=args.model_name_or_path)
    if args.allow_other_base and not opened.kind.needs_base and not args.before:
        raise UserError(f"--allow_other_base: {args.model_path} holds whole weights, which need no base: remove it")
    config = opened.config()
    require_room(suite, opened.tokenizer(config), opened.mode.prompt, config, args)
    device = choose_device(args.device)
    trained_from, bases = known_bases(opened, config)
    result = {
        "model": args.model_path,
        "mode": opened.mode.name,
        "precision": choose_precision(args.precision, device),
        "suite": {"path": args.suite, "sha256": suite_hash(suite)},
        "max_new_tokens": None if args.no_generate else args.max_new_tokens,
        "bases": bases,
    }
    if before:
        require_comparable(before, result, args.before)
        if not args.allow_other_base:
            require_same_base(before, trained_from, args)
        rescore(before["rows"], suite)
    model, tokenizer = load_opened(opened, torch_dtype(result["precision"]), device, args.allow_other_base)
    rows = measure_losses(model, tokenizer, opened.mode.prompt, suite, args)
    require_there(args.output_path)
    if not args.no_generate:
        answer = Answerer(model, tokenizer, opened.mode.prompt, DecodingSettings(args.max_new_tokens))
        answers = measure_answers(answer, suite, args)
        rows = [{**row, **answer} for row, answer in zip(rows, answers)]
    result |= {**summary(rows), "before": None, "difference": None, "verdict": None}
    if before:
        result["before"] = {"path": args.before, "model": before["model"], **summary(before["rows"])}
        result["difference"] = differences(rows, before["rows"], args.before)
        result["verdict"] = verdict(result["difference"])
    save(result | {"versions": versions(PACKAGES), "rows": rows}, args.output_path)
    print(format_result(result))


# The suite, and how an answer is scored.


# Measuring.


# Totals and differences.


# Output.


if __name__ == "__main__":
    entry.run(main)
