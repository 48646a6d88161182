"""The flags of doctor.py, with their checks."""

from __future__ import annotations

import argparse

from flags.common import OneLineParser, add_row_flags, collect, expanded_path
from generation.lengths import columns_of
from modes import MODES
from rows.reading import data_files
from runtime.exits import fail


def doctor_parser() -> OneLineParser:
    """Flags of doctor.py."""
    parser = OneLineParser(prog="doctor.py", description="Look at this machine, the packages and checkpoint folders.")
    parser.add_argument(
        "folders",
        type=expanded_path,
        nargs="*",
        default=[],
        help="checkpoint, adapter, prefix or training output folders",
    )
    parser.add_argument("--mode", choices=MODES, help="model family of the folders; left out: read from each")
    parser.add_argument(
        "--model_name_or_path",
        type=expanded_path,
        help="base of the folders, adapters or prefix encoders that do not name it; left out: read from each",
    )
    parser.add_argument(
        "--train_path",
        type=expanded_path,
        nargs="+",
        help="rows whose answers are sent through the folders' tokenizers and back: files, or folders of *.json[l];"
        " left out: none",
    )
    add_row_flags(parser)
    parser.add_argument(
        "--full",
        action="store_true",
        help="read every weight, compare SHA-256 and compile the offload optimizer; off: headers, names and sizes",
    )
    return parser


def parse_doctor(argv: list[str]) -> argparse.Namespace:
    """Checked flags of doctor.py; ends with exit code 2 and all problems at once."""
    parser = doctor_parser()
    args = parser.parse_args(argv)
    problems = []
    if args.train_path and not args.folders:
        fix = "name its folder first, python doctor.py FOLDER --train_path ROWS"
        problems.append(f"--train_path {' '.join(args.train_path)}: needs the tokenizer of a checkpoint: {fix}")
    problems += collect(data_files, args.train_path or [], prefix="--train_path ")
    problems += [
        f"--{name}: belongs to --train_path: add it or remove this flag"
        for name in ("prompt_column", "response_column")
        if name in parser.typed(argv) and not args.train_path
    ]
    if args.model_name_or_path and not args.folders:
        problems.append(
            f"--model_name_or_path {args.model_name_or_path}: is the base of folders: name one, or remove it"
        )
    if args.response_column in columns_of(args).sources:
        problems.append(f"--response_column {args.response_column}: is part of the question: name the answer's field")
    if problems:
        fail(problems, parser.prog)
    return args
