"""Every flag of the scripts but train.py's, once, with the checks on their combinations; and what all scripts share."""

import argparse
import math
import os
import re

from checkpoint import CHECKPOINT, RUN_FILE, no_checkpoint_problem
from data_set import Columns, data_files
from exits import UserError
from foreign import has, holds_adapter
from modes import MODES, possible_modes
from report_words import LANGUAGES
from tasks import TASKS
from utils import fail, is_main, launcher_problem
from weights import INDEX_FILES, WEIGHT_FILES

MAX_NAME = 200  # bytes of a file's name; most file systems have 255, and endings such as .partial come behind
GENERAL = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data", "general")  # of the forgetting check
API_KEY_ENV = "OPENAI_API_KEY"  # where the key of judge.py is looked for
LEAST_SRC_LEN = 16  # tokens: the words around the question, and something of it


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line; flags are typed in full, so that none is taken for another."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message} (see --help)", prog=self.prog)

    def typed(self, argv):
        """Names of the flags that stand on the command line."""
        given = {word.split("=")[0] for word in argv}
        return {action.dest for action in self._actions if given & set(action.option_strings)}


def path(text):
    """A path as a flag gives it, `~` for the home folder: a shell expands it at the start of a word only."""
    return os.path.expanduser(text)


def true_or_false(text):
    """'True' or 'False' in any case; `bool` as a type would call every text true."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def add_device_flags(parser, precision="auto: bf16 where the card has it, fp16 on older cards, fp32 on CPU"):
    """--device and --precision, alike everywhere."""
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a card if there is one"
    )
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=precision)
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="given by some launchers; the LOCAL_RANK variable decides",
    )


def add_row_flags(parser):
    """Names of the fields of a row."""
    parser.add_argument(
        "--prompt_column",
        help="field that holds the whole question; left out: instruction and input, joined with nothing between",
    )
    parser.add_argument("--response_column", default="output", help="field that holds the answer, a string or a number")


def add_answered_row_flags(parser):
    """Those of rows to answer, which a run.json beside the model gives where they are left out (lengths.py)."""
    parser.add_argument(
        "--max_src_len", type=int, help="tokens of the question; the rest is cut; left out: the run's own, else 1024"
    )
    parser.add_argument(
        "--prompt_column",
        help="field that holds the whole question; '': instruction + input; left out: the run's own, else those two",
    )
    parser.add_argument(
        "--response_column", help="field that holds the answer; left out: the run's own, else output"
    )


def add_base_flag(parser):
    """Where the base model of an adapter or a prefix encoder is now."""
    parser.add_argument(
        "--model_name_or_path",
        type=path,
        help="base checkpoint, if it has moved since the training or the folder does not name it; left out: read from"
        " run.json or, of other tools' adapters, adapter_config.json",
    )
    parser.add_argument(
        "--allow_other_base",
        action="store_true",
        help="take a base of other weights, precision or config.json than the training had; off: refuse it",
    )


def add_normalize_flag(parser, when=""):
    """--no_normalize, alike wherever answers are scored."""
    parser.add_argument(
        "--no_normalize",
        action="store_true",
        help=f"score texts as they are{when}; off: both sides are folded with NFKC, so that full-width and ASCII marks"
        " are alike",
    )


def collect(function, *values, prefix=""):
    """The problem that a call raises, as a list."""
    try:
        function(*values)
    except UserError as error:
        return [f"{prefix}{error}"]
    return []


def range_problems(args, at_least_one="", at_least_zero="", share="", seed=""):
    """Numbers outside their range."""
    problems = []
    for names, rule, good in (
        (at_least_one, "must be at least 1", lambda value: value >= 1),
        (at_least_zero, "must be 0 or more", lambda value: value >= 0 and math.isfinite(value)),
        (
            f"{at_least_one} {at_least_zero}",
            f"must be at most {2**31 - 1}",
            lambda value: not 2**31 <= value < math.inf,
        ),
        (share, "must be 0 or more and below 1", lambda value: 0 <= value < 1),
        (seed, f"must be from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not good(value):
                problems.append(f"--{name} {value}: {rule}")
    return problems


def model_problems(args, flag, path):
    """Is there a checkpoint at `path`, and is it of --mode? Fills in a missing args.mode; hub names come later."""
    if not os.path.isdir(path):
        if os.path.exists(path):
            return [f"{flag} {path}: is a file: name the checkpoint's folder"]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            return []
        return [f"{flag} {path}: no such folder: give a checkpoint folder or a hub name such as THUDM/chatglm3-6b"]
    return folder_problems(args, flag, path)


def opened_problems(args, flag, path):
    """`model_problems` of what a command opens on top of a base, too: opening it says what is wrong with such a folder."""
    if has(path, RUN_FILE):
        return []
    if os.path.isdir(path) and (args.model_name_or_path or holds_adapter(path)):
        return list(filter(None, [no_checkpoint_problem(flag, path)]))
    return model_problems(args, flag, path)


def folder_problems(args, flag, path):
    """Problems of a local checkpoint folder."""
    if problem := no_checkpoint_problem(flag, path):
        return [problem]
    if not os.path.isfile(os.path.join(path, "config.json")):
        return [f"{flag} {path}: no config.json in it: name a folder with a whole checkpoint"]
    if not any(os.path.isfile(os.path.join(path, name)) for name in (*WEIGHT_FILES, *INDEX_FILES)):
        return [
            f"{flag} {path}: no weights in it (none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))}):"
            " download them, or merge first if it is an adapter"
        ]
    try:
        names = possible_modes(path)
    except UserError as error:
        return [f"{flag} {error}"]
    if args.mode is None:
        if len(names) != 1:
            found = " or ".join(names) or "none of " + ", ".join(MODES)
            return [f"--mode: config.json of {path} fits {found}: give --mode"]
        args.mode = names[0]
    if args.mode not in names:
        found = " or ".join(names) or "no family known here"
        return [f"--mode {args.mode}: config.json of {path} is of {found}: change --mode or {flag}"]
    return []


def place_problem(flag, path):
    """Why nothing can be made at `path`, or None: the nearest folder that exists must be one to write in."""
    if not path:
        return f"{flag} '': is empty: name a place"
    if any(len(os.fsencode(part)) > MAX_NAME for part in path.split(os.sep)):
        return f"{flag} {path}: a name in it is longer than {MAX_NAME} bytes: choose a shorter one"
    parent = os.path.abspath(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) and parent != os.path.abspath(path):
        return f"{flag} {path}: {parent} is a file: choose another place"
    if not os.access(parent, os.W_OK):
        return f"{flag} {path}: {parent} is read-only: choose another place"
    return None


def columns_of(args):
    """The row's field names that the flags give."""
    return Columns(prompt=args.prompt_column, response=args.response_column)


def merge_parser():
    """Flags of merge_lora.py."""
    parser = OneLineParser(prog="merge_lora.py", description="Merge a LoRA adapter into its base: a plain checkpoint.")
    parser.add_argument(
        "--model_dir",
        type=path,
        required=True,
        help="a folder that train.py saved with --train_type lora, or an adapter of another tool",
    )
    parser.add_argument("--mode", choices=MODES, help="model family; left out: read from the run or the base")
    parser.add_argument("--output_dir", type=path, help="new folder; left out: MODEL_DIR-merged")
    add_base_flag(parser)
    add_device_flags(parser, precision="of the merged weights; auto: the base checkpoint's own")
    parser.set_defaults(device="cpu")  # it merges in float32, which not every card has room for
    return parser


def add_sampling_flags(parser):
    """How the tokens of an answer are chosen."""
    parser.add_argument("--do_sample", action="store_true", help="draw tokens; off: always the likeliest")
    parser.add_argument("--temperature", type=float, default=0.8, help="with --do_sample: below 1 is more careful")
    parser.add_argument("--top_p", type=float, default=0.8, help="with --do_sample: share of probability kept; 1: all")
    parser.add_argument("--top_k", type=int, default=0, help="with --do_sample: tokens kept; 0: all")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids repetition; 1: off")


def sampling_problems(args, typed):
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


def predict_parser():
    """Flags of predict.py."""
    parser = OneLineParser(prog="predict.py", description="Answer rows of a file, one prompt, or a conversation.")
    parser.add_argument(
        "--model_path", type=path, required=True, help="released, merged, adapter or prefix folder, or a hub name"
    )
    parser.add_argument("--mode", choices=MODES, help="model family; left out: read from the checkpoint")
    add_base_flag(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--test_path", type=path, nargs="+", help="rows to answer: JSON Lines or array files, or folders"
    )
    source.add_argument("--prompt", help="one question")
    source.add_argument("--interactive", action="store_true", help="talk; an empty line ends, /clear forgets")
    parser.add_argument("--output_path", type=path, help="JSON Lines to write; left out: predictions/MODEL/TEST.jsonl")
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


def parse_predict(argv):
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
            problems += output_file_problems(args)
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


def output_file_problems(args):
    """Is --output_path a file that may be written?"""
    path = args.output_path
    if os.path.isdir(path):
        return [f"--output_path {path}: is a folder: name a file"]
    if any(
        os.path.exists(path) and os.path.samefile(path, source) for source in args.test_path if os.path.exists(source)
    ):
        return [f"--output_path {path}: is the input: choose another file"]
    if os.path.exists(path) and not args.overwrite:
        return [f"--output_path {path}: exists: choose another or add --overwrite"]
    problem = place_problem("--output_path", path)
    return [problem] if problem else []


def model_label(path):
    """A short name for a model: its folder, with the run's folder in front of a checkpoint's."""
    parts = [part for part in os.path.abspath(path).split(os.sep) if part]
    is_of_run = parts and re.match(rf"best$|{CHECKPOINT}", parts[-1])
    return "-".join(parts[-2:]) if is_of_run else (parts or ["model"])[-1]


def score_parser():
    """Flags of score.py."""
    parser = OneLineParser(prog="score.py", description="Score predictions against their references.")
    parser.add_argument(
        "--predictions",
        type=path,
        nargs="+",
        required=True,
        help="JSON Lines files, one object with a prediction and a reference per line; several are shown side by side,"
        " and compared with the first where their references are the same",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="metrics of this kind of answer; left out: ROUGE, BLEU, exact match, and triples where there are any",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        help="resamples of the rows that the 95 %% intervals are made of; 0: no intervals",
    )
    parser.add_argument(
        "--output_path",
        type=path,
        help="JSON for the scores of one file; left out: FILE.scores.json, with --task FILE.TASK.scores.json",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file with scores of other settings, or of another kind; off: only scores of the same settings",
    )
    add_normalize_flag(parser)
    parser.add_argument(
        "--prediction_column",
        default="prediction",
        help="key of the prediction: a string, or a list of strings of which the first is scored; its plural is read"
        " where a row has no such key",
    )
    parser.add_argument("--reference_column", default="output", help="key of the reference, a string")
    return parser


def forgetting_parser():
    """Flags of forgetting.py. Answers are greedy and questions are never cut."""
    parser = OneLineParser(prog="forgetting.py", description="Measure what fine-tuning made a model forget.")
    parser.add_argument(
        "--model_path", type=path, required=True, help="released, merged, adapter or prefix folder, or a hub name"
    )
    parser.add_argument("--mode", choices=MODES, help="model family; left out: read from the checkpoint")
    add_base_flag(parser)
    parser.add_argument(
        "--before", type=path, help="result for the model before fine-tuning; left out: nothing is compared"
    )
    parser.add_argument("--output_path", type=path, required=True, help="JSON to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.add_argument(
        "--suite",
        type=path,
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
    parser.set_defaults(max_src_len=None, num_return_sequences=1, num_beams=1, do_sample=False, repetition_penalty=1.0)
    return parser


def judge_parser():
    """Flags of judge.py."""
    parser = OneLineParser(prog="judge.py", description="Let a language model judge predictions, row by row.")
    parser.add_argument(
        "--task",
        choices=("pairs", "questions"),
        default="pairs",
        help="pairs: which answer is better, that of --predictions or of --baseline; questions: which of the questions"
        " that --predictions made for documents are wrong",
    )
    parser.add_argument(
        "--predictions", type=path, help="JSON Lines of predict.py: the answers, or questions, to judge"
    )
    parser.add_argument(
        "--baseline",
        type=path,
        help="JSON Lines of predict.py: the answers to the same rows to compare with; pairs only",
    )
    parser.add_argument(
        "--output_path",
        type=path,
        required=True,
        help="JSON Lines of verdicts; one that exists is gone on with, and what is in it is not asked again;"
        " the report goes to this name with .report.json behind",
    )
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
        type=path,
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
    parser.add_argument("--limit", type=int, default=0, help="judge the first rows only, this many; 0: all")
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="ask nothing, report what is in --output_path: of the rows, model and criteria given, or, without"
        " --predictions, --baseline and --model, of the whole file",
    )
    return parser


def compare_parser():
    """Flags of compare.py."""
    parser = OneLineParser(prog="compare.py", description="Train, score and compare several methods on one task.")
    parser.add_argument(
        "config", type=path, help="YAML file: base, rows, task and methods, as configs/compare_quickstart.yaml"
    )
    parser.add_argument(
        "--output_dir", type=path, help="folder of all runs and the report; left out: output/compare-NAME"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these methods only; left out: all of them")
    parser.add_argument("--report_only", action="store_true", help="run nothing, write the report of what is done")
    parser.add_argument(
        "--forgetting", action="store_true", help="measure forgetting too; off: where the file says forgetting: true"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the report")
    return parser


def doctor_parser():
    """Flags of doctor.py."""
    parser = OneLineParser(prog="doctor.py", description="Look at this machine, the packages and checkpoint folders.")
    parser.add_argument(
        "folders", type=path, nargs="*", default=[], help="checkpoint, adapter, prefix or training output folders"
    )
    parser.add_argument("--mode", choices=MODES, help="model family of the folders; left out: read from each")
    parser.add_argument(
        "--model_name_or_path",
        type=path,
        help="base of the folders, adapters or prefix encoders that do not name it; left out: read from each",
    )
    parser.add_argument(
        "--train_path",
        type=path,
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


def parse_doctor(argv):
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
        problems.append(f"--model_name_or_path {args.model_name_or_path}: is the base of folders: name one, or remove it")
    if args.response_column in columns_of(args).sources:
        problems.append(f"--response_column {args.response_column}: is part of the question: name the answer's field")
    if problems:
        fail(problems, parser.prog)
    return args
