"""The flags of compare.py."""

from flags.common import OneLineParser, expanded_path
from reports.words import LANGUAGES


def compare_parser() -> OneLineParser:
    """Flags of compare.py."""
    parser = OneLineParser(prog="compare.py", description="Train, score and compare several methods on one task.")
    parser.add_argument(
        "config", type=expanded_path, help="YAML file: base, rows, task and methods, as configs/compare_quickstart.yaml"
    )
    parser.add_argument(
        "--output_dir", type=expanded_path, help="folder of all runs and the report; left out: output/compare-NAME"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these methods only; left out: all of them")
    parser.add_argument("--report_only", action="store_true", help="run nothing, write the report of what is done")
    parser.add_argument(
        "--forgetting", action="store_true", help="measure forgetting too; off: where the file says forgetting: true"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the report")
    return parser
