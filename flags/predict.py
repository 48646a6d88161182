"""The flags of predict.py, with their checks."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Collection

from checkpoints.opening import CHECKPOINT
from flags.common import (
    OneLineParser,
    add_answered_row_flags,
    add_device_flags,
    add_model_flags,
    collect,
    expanded_path,
    opened_problems,
    place_problem,
    range_problems,
)
from generation.lengths import LEAST_SRC_LEN
from rows.reading import data_files
from runtime.exits import fail
from runtime.ranks import is_main, launcher_problem


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How the tokens of an answer are chosen."""
    parser.add_argument("--do_sample", action="store_true", help="draw tokens; off: always the likeliest")
    parser.add_argument("--temperature", type=float, default=0.8, help="with --do_sample: below 1 is more careful")
    parser.add_argument("--top_p", type=float, default=0.8, help="with --do_sample: share of probability kept; 1: all")
    parser.add_argument("--top_k", type=int, default=0, help="with --do_sample: tokens kept; 0: all")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids repetition; 1: off")


def sampling_problems(args: argparse.Namespace, typed: Collection[str]) -> list:
    """What is wrong with --max_src_len of a question to answer and with the flags of `add_sampling_flags`.

    typed: names of the flags on the command line.
    """
    problems = []
    if args.max_src_len is not None and args.max_src_len < LEAST_SRC_LEN:
        problems.append(f"--max_src_len {args.max_src_len}: leaves nothing of a question: use at least {LEAST_SRC_LEN}")
    for name in ("temperature", "repetition_penalty"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"--{name} {getattr(args, name)}: must be above 0 and finite")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if not args.do_sample:
        problems += [
            f"--{name}: needs --do_sample: add it or remove this flag"
            for name in ("temperature", "top_p", "top_k", "seed")
            if name in typed
        ]
    return problems


def predict_parser() -> OneLineParser:
    """Flags of predict.py."""
    parser = OneLineParser(prog="predict.py", description="Answer rows of a file, one prompt, or a conversation.")
    add_model_flags(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--test_path", type=expanded_path, nargs="+", help="rows to answer: JSON Lines or array files, or folders"
    )
    source.add_argument("--prompt", help="one question")
    source.add_argument("--interactive", action="store_true", help="talk; an empty line ends, /clear forgets")
    parser.add_argument(
        "--output_path", type=expanded_path, help="JSON Lines to write; left out: predictions/MODEL/TEST.jsonl"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.add_argument("--batch_size", type=int, default=16, help="rows answered together at most")
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=16384,
        help="tokens of a batch at most: rows x answers or beams of a row x (its longest prompt + --max_new_tokens);"
        " one row is always taken; 0: off",
    )
    add_answered_row_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most")
    parser.add_argument(
        "--num_return_sequences",
        type=int,
        default=1,
        help="answers for each row; above 1 needs --do_sample or --num_beams",
    )
    parser.add_argument("--num_beams", type=int, default=1, help="beam search; 1: off")
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=int, default=1234, help="of the draws")
    add_device_flags(parser)
    return parser


def parse_predict(argv: list[str]) -> argparse.Namespace:
    """Checked flags of predict.py; ends with exit code 2 and all problems at once."""
    parser = predict_parser()
    args = parser.parse_args(argv)
    typed = parser.typed(argv)
    problems = range_problems(
        args,
        at_least_one="batch_size max_new_tokens num_return_sequences num_beams",
        at_least_zero="batch_tokens top_k",
        seed="seed",
    )
    problems += sampling_problems(args, typed)
    if not args.do_sample and args.num_return_sequences > max(1, args.num_beams):
        problems.append(
            f"--num_return_sequences {args.num_return_sequences}: greedy search has one answer: add --do_sample,"
            " or --num_beams of as many"
        )
    problems += filter(None, [launcher_problem()])
    if args.prompt is not None and not args.prompt.strip():
        problems.append(f"--prompt {args.prompt!r}: is empty: ask something")
    if args.prompt is not None and any("\ud800" <= character <= "\udfff" for character in args.prompt):
        problems.append(f"--prompt {args.prompt!r}: is not UTF-8: check the terminal's encoding")
    if args.test_path:
        problems += collect(data_files, args.test_path, prefix="--test_path ")
        if args.output_path is None:
            stem = os.path.splitext(os.path.basename(os.path.normpath(args.test_path[0])))[0]
            args.output_path = os.path.join("predictions", model_label(args.model_path), f"{stem}.jsonl")
        if is_main():
            problems += output_file_problems(args.output_path, args.test_path, args.overwrite)
    else:
        problems += [
            f"--{name}: belongs to --test_path: remove it"
            for name in ("overwrite", "batch_size", "batch_tokens", "prompt_column", "response_column")
            if name in typed
        ]
        if args.output_path is not None:
            problems.append(f"--output_path {args.output_path}: belongs to --test_path: remove it")
    problems += opened_problems(args, "--model_path", args.model_path)
    if problems:
        fail(problems, parser.prog)
    return args


def output_file_problems(path: str, inputs: list[str], overwrite: bool) -> list[str]:
    """Is --output_path a file that may be written, and none of the inputs?"""
    if os.path.isdir(path):
        return [f"--output_path {path}: is a folder: name a file"]
    if any(os.path.exists(path) and os.path.samefile(path, source) for source in inputs if os.path.exists(source)):
        return [f"--output_path {path}: is the input: choose another file"]
    if os.path.exists(path) and not overwrite:
        return [f"--output_path {path}: exists: choose another or add --overwrite"]
    problem = place_problem("--output_path", path)
    return [problem] if problem else []


def model_label(path: str) -> str:
    """A short name for a model: its folder, with the run's folder in front of a checkpoint's."""
    parts = [part for part in os.path.abspath(path).split(os.sep) if part]
    is_of_run = parts and re.match(rf"best$|{CHECKPOINT}", parts[-1])
    return "-".join(parts[-2:]) if is_of_run else (parts or ["model"])[-1]
