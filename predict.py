"""Answer the rows of a file, one prompt, or a person.

    python predict.py --model_path output-glm3/epoch-2-step-3900 --test_path data/spo_1.json
    python predict.py --model_path ChatGLM3-6B --prompt "你好"
    deepspeed predict.py --model_path ... --test_path ...      (the rows are shared out over the GPUs)

Takes a released checkpoint and every folder that train.py and merge_lora.py save.
"""

from __future__ import annotations

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from checkpoints.opening import load_opened, open_checkpoint
from flags.predict import output_file_problems, parse_predict
from generation.answerer import Answerer, DecodingSettings, make_batches
from generation.lengths import settle_columns, settle_lengths
from generation.prediction_file import (
    describe_answers,
    describe_cut_questions,
    key_of,
    output_row,
    part_path,
    put_in_order,
    take_up,
)
from generation.talk import talk
from rows.reading import read_to_answer
from runtime.distributed import barrier, stop_distributed
from runtime.exits import UserError, fail
from runtime.holding import holding, require_there
from runtime.hosts import start_distributed
from runtime.ranks import is_main, print_rank_0, rank, world_size
from runtime.streams import progress_bar
from utils import choose_device, choose_precision, prepare_environment, set_seed, torch_dtype


def main(argv: list[str]) -> None:
    """Answer rows, a prompt or a person."""
    args = parse_predict(argv)
    if world_size() > 1 and not args.test_path:
        fail("--prompt and --interactive: are for one process: start it with python, not with the launcher")
    columns, notes = settle_columns(args)
    rows, said = read_to_answer(args.test_path, columns) if args.test_path else ([], "")
    notes += [said] * bool(said)
    prepare_environment(args.device)
    opened = open_checkpoint(args.model_path, args.mode, base=args.model_name_or_path)
    if args.allow_other_base and not opened.kind.needs_base:
        raise UserError(f"--allow_other_base: {args.model_path} holds whole weights, which need no base: remove it")
    notes += settle_lengths(args, opened.config(), opened.mode.prompt)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    if world_size() > 1:
        start_distributed(device)
    set_seed(args.seed)
    alone = holding(
        args.output_path, check=lambda: output_file_problems(args.output_path, args.test_path, args.overwrite)
    )
    with alone if args.test_path else contextlib.nullcontext():
        model, tokenizer = load_opened(opened, torch_dtype(precision), device, args.allow_other_base)
        answer = Answerer(model, tokenizer, opened.mode.prompt, DecodingSettings.from_flags(args))
        for note in notes:
            print_rank_0(note, file=sys.stderr)  # on stdout an answer stands alone

        if args.prompt is not None:
            encoded = answer.prompt_ids(args.prompt)
            if encoded[1]:
                print(f"--max_src_len {args.max_src_len}: cut {encoded[1]} tokens of the question", file=sys.stderr)
            print_rank_0("\n".join(answer([encoded])[0]["predictions"]))
        elif args.interactive:
            talk(answer)
        else:
            predict_file(answer, rows, args, key_of(args, opened, rows, precision))
    if world_size() > 1:
        stop_distributed()


def predict_file(answer: Any, rows: Any, args: argparse.Namespace, key: str) -> None:
    """Answer all rows, the longest first, written as they come; at the end the file is put into input order.

    Rows that an interrupted run with the same `key` has answered are not answered again.
    """
    started = time.monotonic()
    own_rank, world = rank(), world_size()
    done = take_up(args.output_path, key, args.overwrite)
    if done:
        print_rank_0(f"{len(done)} of {len(rows)} rows are answered already, {args.output_path} is continued")
    # Shared out by length in characters, which needs no encoding, so that the ranks have equally much to do.
    left = [i for i in range(len(rows)) if i not in done]
    mine = sorted(left, key=lambda i: (len(rows[i]["query"]), i), reverse=True)[own_rank::world]
    prompts = {number: answer.prompt_ids(rows[number]["query"]) for number in mine}
    copies = max(args.num_return_sequences, args.num_beams)  # of a row, side by side in its batch
    sizes = {number: copies * (len(ids) + args.max_new_tokens) for number, (ids, _) in prompts.items()}
    batches = make_batches(sizes, args.batch_size, args.batch_tokens)
    part = part_path(args.output_path, own_rank)
    with telling_what_is_left(), open(part, "a", encoding="utf-8", buffering=1) as file:
        if own_rank:
            file.write(json.dumps({"key": key}) + "\n")
        with progress_bar(total=len(mine), desc="predicting", unit="row", disable=not is_main()) as bar:
            for numbers in batches:
                require_there(args.output_path)
                for number, result in zip(numbers, answer([prompts[number] for number in numbers])):
                    file.write(json.dumps(output_row(number, rows[number], result), ensure_ascii=False) + "\n")
                bar.update(len(numbers))
    barrier()
    if is_main():
        require_there(args.output_path)
        lines = put_in_order(args.output_path, len(rows))
        print(f"{len(lines)} rows in {time.monotonic() - started:.1f} s, {args.output_path}")
        print(describe_answers(lines, args.max_new_tokens))
        print(describe_cut_questions(lines, args.max_src_len))


@contextlib.contextmanager
def telling_what_is_left() -> Iterator[None]:
    """Let Ctrl-C say how the rows that are not answered yet get their answers."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command answers the rows that are left") from None


if __name__ == "__main__":
    entry.run(main)
