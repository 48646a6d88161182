"""Answer the rows of a file with a vLLM server: the same rows, prompts and output lines as predict.py.

    python scripts/predict_vllm.py --url http://127.0.0.1:8000 --model_path output-glm3/epoch-2-step-720-merged \
        --test_path data/spo_1.json --output_path predictions.jsonl

vLLM lives in an environment of its own and does not know these tokenizers, so only token ids go over the line: prompts
are encoded and answers decoded here. scripts/predict_vllm.sh starts the server as well; docs/vllm.md says how.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder
from runtime import entry  # noqa: I001  first: Ctrl-C is heard while the others are imported

# isort: split

import http.client
import json
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

from checkpoints.kinds import KINDS, kind_of, marked_kind
from checkpoints.opening import RUN_FILE, open_checkpoint, read_run
from flags.common import OneLineParser, add_answered_row_flags, collect, expanded_path, model_problems, range_problems
from flags.predict import add_sampling_flags, model_label, output_file_problems, sampling_problems
from generation.lengths import settle_columns, settle_lengths
from generation.prediction_file import describe_cut_questions, output_row
from modes import MODES
from rows.reading import data_files, read_to_answer
from runtime.exits import (
    UserError,
    fail,
)
from runtime.folders import whole_file
from runtime.holding import holding, require_there
from runtime.streams import progress_bar
from utils import (
    prepare_environment,
    read_json,
)

VLLM_MODES = [name for name, mode in MODES.items() if mode.vllm_values is not None]
PAUSES = (0.5, 1, 2, 4, 8)  # seconds before each new try of a request
TIMEOUT = 3600  # seconds for one answer, the wait in the server's queue included


def parser():
    """Flags of predict_vllm.py: those of predict.py that a server obeys, and where it is."""
    parser = OneLineParser(prog="predict_vllm.py", description="Answer rows of a file with a vLLM server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is, without a path")
    parser.add_argument(
        "--model_path", type=expanded_path, required=True, help="released or merged folder, the one that the server has"
    )
    parser.add_argument("--mode", choices=VLLM_MODES, help="model family; left out: read from the checkpoint")
    parser.add_argument(
        "--test_path",
        type=expanded_path,
        nargs="+",
        required=True,
        help="rows to answer: JSON Lines or array files, or folders",
    )
    parser.add_argument(
        "--output_path", type=expanded_path, help="JSON Lines to write; left out: predictions/MODEL/TEST.jsonl"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.add_argument("--num_requests", type=int, default=64, help="rows that the server has at a time")
    add_answered_row_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most")
    parser.add_argument(
        "--num_return_sequences", type=int, default=1, help="answers for each row; above 1 needs --do_sample"
    )
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=int, default=1234, help="of the draws: row i has seed + i")
    parser.add_argument(
        "--check", action="store_true", help="check the flags, the rows and the folder, print the folder and end"
    )
    return parser


def parse(argv):
    """Checked flags; ends with exit code 2 and all problems at once."""
    flags = parser()
    args = flags.parse_args(argv)
    typed = flags.typed(argv)
    problems = url_problems(args.url)
    problems += range_problems(
        args, at_least_one="num_requests max_new_tokens num_return_sequences", at_least_zero="top_k", seed="seed"
    )
    problems += sampling_problems(args, typed)
    if not args.do_sample and args.num_return_sequences > 1:
        problems.append(
            f"--num_return_sequences {args.num_return_sequences}: greedy search has one answer: add --do_sample"
        )
    problems += collect(data_files, args.test_path, prefix="--test_path ")
    if args.output_path is None:
        stem = os.path.splitext(os.path.basename(os.path.normpath(args.test_path[0])))[0]
        args.output_path = os.path.join("predictions", model_label(args.model_path), f"{stem}.jsonl")
    problems += output_file_problems(args.output_path, args.test_path, args.overwrite)
    problems += folder_problems(args)
    if problems:
        fail(problems, flags.prog)
    return args


def url_problems(url):
    """Is --url an address without a path?"""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        return [f"--url {url}: is no server's address: write it like http://127.0.0.1:8000"]
    return []


def folder_problems(args):
    """Is --model_path a folder with a whole checkpoint of a family that vLLM knows? Only JSON files are read."""
    path = args.model_path
    if not os.path.isdir(path):
        return [f"--model_path {path}: no such folder: give the folder of a merged or released checkpoint"]
    run = {}
    if os.path.isfile(os.path.join(path, RUN_FILE)):
        try:
            run = read_run(os.path.join(path, RUN_FILE))
        except UserError as error:
            return [f"--model_path {error}"]
    elif not marked_kind(path) and (problems := model_problems(args, "--model_path", path)):  # fills in args.mode
        return problems
    mode = run.get("mode", args.mode)
    if not run:
        try:
            run = {"weights": kind_of(path).name}
        except UserError as error:
            return [f"--model_path {error}"]
    if mode and mode not in VLLM_MODES:
        return [f"--model_path {path}: is of {mode}, and vLLM knows {' and '.join(VLLM_MODES)} only: use predict.py"]
    kind = KINDS.get(run.get("weights"))
    if kind and kind.not_for_vllm:
        return [f"--model_path {path}: holds {kind.words}, {kind.not_for_vllm.format(path=path)}"]
    try:
        config = read_json(os.path.join(path, "config.json"))
    except UserError as error:
        return [f"--model_path {error}"]
    for key, value in MODES[mode].vllm_values.items():
        if config.get(key, value) != value:
            return [
                f"--model_path {path}: {key} = {config[key]} in config.json: vLLM computes something else from it than"
                f" {mode} does, and is right with {value} only: use predict.py"
            ]
    return []


def main(argv):
    """Answer all rows, or only check that they can be."""
    args = parse(argv)
    columns, notes = settle_columns(args)
    rows, said = read_to_answer(args.test_path, columns)
    notes += [said] * bool(said)
    prepare_environment("cpu")
    opened = open_checkpoint(args.model_path, args.mode)
    config = opened.config()
    tokenizer = opened.tokenizer(config)
    notes += settle_lengths(args, config, opened.mode.prompt)
    if args.check:
        print(os.path.abspath(opened.folder))
        return
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    started = time.monotonic()
    with holding(
        args.output_path, check=lambda: output_file_problems(args.output_path, args.test_path, args.overwrite)
    ):
        lines = answer_rows(Client(args.url, tokenizer, opened.mode.prompt, args), rows, args.num_requests)
        require_there(args.output_path)
        write_whole(args.output_path, lines)
    print(f"{len(lines)} rows in {time.monotonic() - started:.1f} s, {args.output_path}")
    print(describe_cut_questions(lines, args.max_src_len))


class Client:
    """Sends a row's prompt to the server's /v1/completions as ids and makes texts of the ids that come back."""

    def __init__(self, url, tokenizer, prompt, args):
        self.url = url
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_src_len = args.max_src_len
        self.num_return_sequences = args.num_return_sequences
        self.seed = args.seed if args.do_sample else None
        self.stop_ids = prompt.stop_ids(tokenizer)
        self.given_up = threading.Event()
        # Everything is said: what is left out, a server may take from a generation_config.json.
        self.settings = {
            "max_tokens": args.max_new_tokens,
            "n": args.num_return_sequences,
            "temperature": args.temperature if args.do_sample else 0.0,
            "top_p": args.top_p if args.do_sample else 1.0,
            "top_k": args.top_k if args.do_sample else 0,
            "repetition_penalty": args.repetition_penalty,
            "stop_token_ids": self.stop_ids,
            "return_token_ids": True,
        }

    def __call__(self, number, row):
        """One line of the output for row `number`; UserError where the server gives no answer."""
        ids, source_cut = self.prompt.encode_prompt(self.tokenizer, row["query"], max_src_len=self.max_src_len)
        request = {"prompt": ids, **self.settings}
        if self.seed is not None:
            request["seed"] = self.seed + number
        choices = self.post(request, row["place"]).get("choices")
        if not isinstance(choices, list) or len(choices) != self.num_return_sequences:
            raise UserError(f"--url {self.url}: {row['place']} has no answer: is it the completions of vLLM 0.33?")
        answers = [self.read_choice(choice, row["place"]) for choice in choices]
        result = {
            "predictions": [text for text, _ in answers],
            "stopped": [stopped for _, stopped in answers],
            "source_cut": source_cut,
        }
        return output_row(number, row, result)

    def read_choice(self, choice, place):
        """(text, did it stop by itself?) of one answer. Its ids hold the one that ended it, if there is one."""
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(isinstance(token_id, int) for token_id in ids):
            raise UserError(f"--url {self.url}: the answer to {place} has no token_ids: use a vLLM that returns them")
        end = next((i for i, token_id in enumerate(ids) if token_id in self.stop_ids), len(ids))
        return self.prompt.clean_response(self.tokenizer.decode_text(ids[:end])), end < len(ids)

    def post(self, request, place):
        """The server's JSON object. A server that is busy or away is asked again, a few times."""
        body = json.dumps(request).encode()
        for pause in (*PAUSES, None):
            try:
                status, content = self.send(body)
            except (OSError, http.client.HTTPException) as error:
                problem = (
                    f"--url {self.url}: cannot be reached ({str(error) or type(error).__name__}): is the server up?"
                )
            else:
                if status == 200:
                    return self.read_json(content, place)
                problem = f"--url {self.url}: answered {status} to {place} ({error_message(content)})"
                if status != 503:
                    break
                problem += ": try again when it is ready"
            if pause is None or self.given_up.wait(pause):
                break
        raise UserError(problem)

    def send(self, body):
        """(status, content) of one request over a new connection to --url, never through a proxy."""
        parts = urllib.parse.urlsplit(self.url)
        secure = parts.scheme == "https"
        connection_class = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connection_class(parts.hostname, parts.port, timeout=TIMEOUT)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def read_json(self, content, place):
        """A JSON object out of bytes."""
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"--url {self.url}: the answer to {place} is not JSON: is it a vLLM server?")
        return value


def error_message(content):
    """What the server says of an error: vLLM's {"error": {"message": ...}}, or the first words of anything else."""
    try:
        return json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace").strip() or "without a word"


def answer_rows(client, rows, num_requests):
    """Output lines in the order of the rows. The first row that fails for good ends all."""
    pool = ThreadPoolExecutor(num_requests)
    try:
        futures = [pool.submit(client, number, row) for number, row in enumerate(rows)]
        return [future.result() for future in progress_bar(futures, desc="predicting", unit="row")]
    finally:  # after an error, rows that wait are not sent any more
        client.given_up.set()
        pool.shutdown(wait=False, cancel_futures=True)


def write_whole(path, lines):
    """JSON Lines under `path`, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


if __name__ == "__main__":
    entry.run(main)
