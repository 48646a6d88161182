"""The flags of judge.py, with their checks."""

import argparse
import os
import re

from flags.common import OneLineParser, collect, expanded_path, place_problem, range_problems
from judging.endpoint import API_KEY_ENV
from judging.verdicts import KINDS, read_report
from runtime.exits import fail


def judge_parser() -> OneLineParser:
    """Flags of judge.py."""
    parser = OneLineParser(prog="judge.py", description="Let a language model judge predictions, row by row.")
    add_file_flags(parser)
    add_endpoint_flags(parser)
    parser.add_argument("--limit", type=int, default=0, help="judge the first rows only, this many; 0: all")
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="ask nothing, report what is in --output_path: of the rows, model and criteria given, or, without"
        " --predictions, --baseline and --model, of the whole file",
    )
    return parser


def add_file_flags(parser: OneLineParser) -> None:
    """What is judged, and where the verdicts go."""
    parser.add_argument(
        "--task",
        choices=tuple(KINDS),
        default="pairs",
        help="pairs: which answer is better, that of --predictions or of --baseline; questions: which of the questions"
        " that --predictions made for documents are wrong",
    )
    parser.add_argument(
        "--predictions", type=expanded_path, help="JSON Lines of predict.py: the answers, or questions, to judge"
    )
    parser.add_argument(
        "--baseline",
        type=expanded_path,
        help="JSON Lines of predict.py: the answers to the same rows to compare with; pairs only",
    )
    parser.add_argument(
        "--output_path",
        type=expanded_path,
        required=True,
        help="JSON Lines of verdicts; an existing file is continued, and what is in it is not asked again;"
        " the report goes to this name with .report.json behind",
    )


def add_endpoint_flags(parser: OneLineParser) -> None:
    """Who judges, by which criteria, and how it is asked."""
    parser.add_argument("--model", help="the judge, as the endpoint calls it")
    parser.add_argument(
        "--base_url",
        help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; left out: the variable OPENAI_BASE_URL,"
        " else OpenAI's own",
    )
    parser.add_argument("--api_key_env", default=API_KEY_ENV, help="environment variable that holds the endpoint's key")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="of the judge's prompt and reasons")
    parser.add_argument(
        "--criteria",
        type=expanded_path,
        help="UTF-8 text file with the criteria; left out: accuracy, completeness, clarity and format; of questions:"
        " answerable, right, clear and harmless",
    )
    parser.add_argument("--concurrency", type=int, default=4, help="requests under way at a time")
    parser.add_argument(
        "--timeout",
        type=int,
        default=600,
        help="seconds for a whole answer, from the connection to the last byte; each new try has as many; there is no"
        " way to wait for ever",
    )
    parser.add_argument(
        "--max_retries",
        type=int,
        default=6,
        help="new tries of a request that meets a rate limit, a time-out, an error of the server or no connection;"
        " 0: off",
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Checked flags; ends with exit code 2 and all problems at once."""
    parser = judge_parser()
    args = parser.parse_args(argv)
    problems = range_problems(args, at_least_one="concurrency timeout", at_least_zero="max_retries limit")
    args.base_url = args.base_url or os.environ.get("OPENAI_BASE_URL") or None
    if args.base_url is not None and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", args.base_url):
        shown = "" if re.search("[?@]", args.base_url) else f" {args.base_url}"  # it may hold a key
        problems.append(f"--base_url{shown}: is no plain address: write it like http://127.0.0.1:8000/v1")
    needed = KINDS[args.task].needs
    if args.baseline and "baseline" not in needed:
        problems.append(f"--baseline: does not apply to --task {args.task}: leave it out")
    if not args.report_only or any(getattr(args, name) for name in needed):
        problems += [f"--{name}: is not given: add it" for name in needed if not getattr(args, name)]
    inputs = [path for path in (args.predictions, args.baseline, args.criteria) if path and os.path.exists(path)]
    if os.path.isdir(args.output_path):
        problems.append(f"--output_path {args.output_path}: is a folder: name a file")
    elif os.path.exists(args.output_path) and any(os.path.samefile(args.output_path, path) for path in inputs):
        problems.append(f"--output_path {args.output_path}: is an input: choose another file")
    elif problem := place_problem("--output_path", args.output_path):
        problems.append(problem)
    elif found := collect(read_report, args.output_path):
        problems += found
    if problems:
        fail(problems, parser.prog)
    return args
