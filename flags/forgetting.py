"""The flags of forgetting.py, with their checks."""

from __future__ import annotations

import argparse

from evaluation.forgetting import read_before
from evaluation.general_suite import GENERAL, read_suite
from flags.common import (
    OneLineParser,
    add_device_flags,
    add_model_flags,
    collect,
    expanded_path,
    opened_problems,
    range_problems,
)
from flags.predict import output_file_problems
from rows.checks import Notes
from runtime.exits import fail
from runtime.ranks import world_size


def forgetting_parser() -> OneLineParser:
    """Flags of forgetting.py. Answers are greedy and questions are never cut."""
    parser = OneLineParser(prog="forgetting.py", description="Measure what fine-tuning made a model forget.")
    add_model_flags(parser)
    parser.add_argument(
        "--before", type=expanded_path, help="result for the model before fine-tuning; left out: nothing is compared"
    )
    parser.add_argument("--output_path", type=expanded_path, required=True, help="JSON to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.add_argument(
        "--suite",
        type=expanded_path,
        default=GENERAL,
        help="rows as in data/general/README.md: a file, or a folder of *.json and *.jsonl",
    )
    parser.add_argument("--no_generate", action="store_true", help="losses only; off: answers are scored too")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--batch_size", type=int, default=16, help="rows together at most")
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=16384,
        help="tokens of a batch at most: rows x its longest row, answer included; one row is always taken; 0: off",
    )
    add_device_flags(parser)
    return parser


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[dict], dict]:
    """(checked flags, rows of the suite, result of --before or {}); ends with exit code 2 and all problems at once."""
    parser = forgetting_parser()
    args = parser.parse_args(argv)
    suite, before, notes = [], {}, Notes()
    problems = range_problems(args, at_least_one="batch_size max_new_tokens", at_least_zero="batch_tokens")
    if args.no_generate and "max_new_tokens" in parser.typed(argv):
        problems.append("--max_new_tokens: belongs to the answers: remove it or --no_generate")
    if world_size() > 1:
        problems.append("WORLD_SIZE: this is one process: start it with python, not with the launcher")
    problems += collect(lambda: suite.extend(read_suite(args.suite, notes)), prefix="--suite ")
    if args.before:
        problems += collect(lambda: before.update(read_before(args.before)), prefix="--before ")
    problems += output_problems(args)
    problems += opened_problems(args, "--model_path", args.model_path)
    if problems:
        fail(problems, parser.prog)
    for line in notes.lines("suite"):
        print(line)
    return args, suite, before


def output_problems(args: argparse.Namespace) -> list[str]:
    """Is --output_path a file that may be written?"""
    inputs = [path for path in (args.before, args.suite) if path]
    return output_file_problems(args.output_path, inputs, args.overwrite)
