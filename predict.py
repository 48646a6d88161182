"""Answer the rows of a file, one prompt, or a person.

    python predict.py --model_path output-glm3/epoch-2-step-3900 --test_path data/spo_1.json
    python predict.py --model_path ChatGLM3-6B --prompt "你好"
    deepspeed predict.py --model_path ... --test_path ...      (the rows are shared out over the cards)

Takes a released checkpoint and every folder that train.py and merge_lora.py save.
"""

import entry  # first: Ctrl-C is heard while the others are imported

import contextlib
import glob
import hashlib
import json
import os
import sys
import time

from arguments import output_file_problems, parse_predict
from checkpoint import load_opened, open_checkpoint
from data_set import read_to_answer
from exits import UserError
from folders import whole_file
from holding import holding, require_there
from hosts import start_distributed
from lengths import settle_columns, settle_lengths
from talk import talk
from utils import (
    barrier,
    choose_device,
    choose_precision,
    fail,
    is_main,
    prepare_environment,
    print_rank_0,
    progress_bar,
    rank,
    set_seed,
    stop_distributed,
    torch_dtype,
    world_size,
)


def main(argv):
    """Answer rows, a prompt or a person."""
    args = parse_predict(argv)
    if world_size() > 1 and not args.test_path:
        fail("--prompt and --interactive: are for one process: start it with python, not with the launcher")
    columns, notes = settle_columns(args)
    rows, said = read_to_answer(args.test_path, columns) if args.test_path else ([], "")
    notes += [said] * bool(said)
    prepare_environment(args.device)
    opened = open_checkpoint(args.model_path, args.mode, base=args.model_name_or_path)
    if args.allow_other_base and opened.weights == "whole":
        raise UserError(f"--allow_other_base: {args.model_path} holds whole weights, which need no base: remove it")
    notes += settle_lengths(args, opened.config(), opened.mode.prompt)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    if world_size() > 1:
        start_distributed(device)
    set_seed(args.seed)
    alone = holding(args.output_path, check=lambda: output_file_problems(args))
    with alone if args.test_path else contextlib.nullcontext():
        model, tokenizer = load_opened(opened, torch_dtype(precision), device, args.allow_other_base)
        answer = Answerer(model, tokenizer, opened.mode.prompt, args)
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


class Answerer:
    """A model with its prompt and decoding flags; called with a batch of encoded prompts, it answers them.

    A batch gives the same greedy answers as its rows alone: prompts are padded on the left and hidden. is_split: the
    weights are split over the ranks (ZeRO-3), which therefore generate in step until the last one is done.
    """

    def __init__(self, model, tokenizer, prompt, args, is_split=False):
        self.model = model
        self.is_split = is_split
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_src_len = args.max_src_len
        self.num_return_sequences = args.num_return_sequences
        self.settings = {
            "max_new_tokens": args.max_new_tokens,
            "num_return_sequences": args.num_return_sequences,
            "num_beams": args.num_beams,
            "do_sample": args.do_sample,
            "repetition_penalty": args.repetition_penalty,
            "eos_token_id": prompt.stop_ids(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        }
        if args.do_sample:
            self.settings |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}

    def prompt_ids(self, query, history=()):
        """(ids, number of source ids that were cut)."""
        return self.prompt.encode_prompt(self.tokenizer, query, history, max_src_len=self.max_src_len)

    def __call__(self, encoded):
        """For each of `prompt_ids`: {"predictions": texts, "stopped": bools, "source_cut": ids cut away}."""
        import torch
        from transformers import GenerationConfig

        from glm_common.decoding import decode

        length = max(len(ids) for ids, _ in encoded)
        input_ids = torch.full((len(encoded), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for i, (ids, _) in enumerate(encoded):
            input_ids[i, length - len(ids) :] = torch.tensor(ids)
            mask[i, length - len(ids) :] = 1
        device = self.model.device
        with torch.no_grad():  # inference_mode would leave tensors that training cannot use
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(**self.settings),
                custom_generate=decode if self.settings["num_beams"] == 1 and not self.is_split else None,
                synced_gpus=self.is_split,
            )
        stop_ids = set(self.settings["eos_token_id"])
        answers = []
        for new_ids in output[:, length:].tolist():
            end = next((i for i, token_id in enumerate(new_ids) if token_id in stop_ids), len(new_ids))
            text = self.prompt.clean_response(self.tokenizer.decode_text(new_ids[:end]))
            answers.append((text, end < len(new_ids)))
        n = self.num_return_sequences
        return [
            {
                "predictions": [text for text, _ in answers[i * n : (i + 1) * n]],
                "stopped": [stopped for _, stopped in answers[i * n : (i + 1) * n]],
                "source_cut": encoded[i][1],
            }
            for i in range(len(encoded))
        ]


def predict_file(answer, rows, args, key):
    """Answer all rows, the longest first, written as they come; at the end the file is put into input order.

    Rows that an interrupted run with the same `key` has answered are not answered again.
    """
    started = time.monotonic()
    own_rank, world = rank(), world_size()
    done = take_up(args.output_path, key, args.overwrite)
    if done:
        print_rank_0(f"{len(done)} of {len(rows)} rows are answered already, {args.output_path} is gone on with")
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
def telling_what_is_left():
    """Let Ctrl-C say how the rows that are not answered yet get their answers."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command answers the rows that are left") from None


def part_path(path, rank):
    """Where a rank writes its answers until all are there."""
    return f"{path}.rank{rank}.partial"


def read_parts(path):
    """({file: its key, None where it has no answer}, {row number: line}) of what interrupted runs have answered.

    Torn last lines are left out.
    """
    keys, lines = {}, {}
    for part in sorted(glob.glob(f"{glob.escape(path)}.rank*.partial")):
        key, keys[part] = None, None
        with open(part, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if not isinstance(value, dict):
                    continue
                key = value.get("key", key)
                if "index" in value:
                    lines[value["index"]], keys[part] = line, key
    return keys, lines


def take_up(path, key, overwrite):
    """{row number: line} of the answers that are there; afterwards they lie in the first rank's part. Collective."""
    keys, lines = read_parts(path)
    others = [part for part, found in keys.items() if found not in (None, key)]
    if others and not overwrite:
        raise UserError(
            f"{others[0]}: answers of an interrupted run with another model, rows, flags or precision: give"
            " --overwrite to drop them, or another --output_path"
        )
    lines = {} if others else lines
    barrier()  # all have read
    if is_main():
        with whole_file(part_path(path, 0)) as file:
            file.write(json.dumps({"key": key}) + "\n")
            file.writelines(lines.values())
        for part in keys:
            if part != part_path(path, 0):
                os.remove(part)
    barrier()
    return lines


def key_of(args, opened, rows, precision):
    """SHA-256 of what decides the answers: rows, flags, and the model's files by name, size and time."""
    free = "test_path output_path overwrite batch_size batch_tokens local_rank device prompt allow_other_base".split()
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in free} | {"precision": precision}
    files = [
        (name, os.path.getsize(path), os.stat(path).st_mtime_ns)
        for folder in dict.fromkeys((opened.folder, opened.base_folder))
        for name in sorted(os.listdir(folder))
        if os.path.isfile(path := os.path.join(folder, name))
    ]
    queries = [(row["query"], row["answer"]) for row in rows]
    return hashlib.sha256(json.dumps([flags, files, queries]).encode()).hexdigest()


def make_batches(sizes, batch_size, batch_tokens):
    """Lists of row numbers, the longest rows first, so that a lack of memory shows at once.

    sizes: tokens of each row, answers included, by its number. A batch has at most `batch_size` rows and, with each
    counted as its longest, `batch_tokens` tokens (0: off); one row is always taken.
    """
    batches = []
    room = 0  # rows that the last batch may still take
    for number in sorted(sizes, key=lambda number: (sizes[number], number), reverse=True):
        if room < 1:
            batches.append([])
            room = min(batch_size, batch_tokens // sizes[number]) if batch_tokens else batch_size
        batches[-1].append(number)
        room -= 1
    return batches


def output_row(number, row, result):
    """One line of the output: the question, the reference if there is one, and the answer or answers.

    stopped: the answer ended by itself; cut: it was ended at --max_new_tokens; empty; repeated: it ends in a loop.
    """
    line = {"index": number, "query": row["query"]}
    if row["answer"] is not None:
        line["output"] = row["answer"]
    texts, stopped = result["predictions"], result["stopped"]
    columns = {
        "stopped": stopped,
        "cut": [not value for value in stopped],
        "empty": [not text.strip() for text in texts],
        "repeated": [is_repeated(text) for text in texts],
    }
    if len(texts) == 1:
        line |= {"prediction": texts[0], **{name: values[0] for name, values in columns.items()}}
    else:
        line |= {"predictions": texts, **columns}
    if result["source_cut"]:
        line["source_tokens_cut"] = result["source_cut"]
    return line


def is_repeated(text):
    """Does the text end in a loop, the same 1 to 100 characters four times over, twenty characters in all?"""
    text = text.rstrip()
    for period in range(1, min(100, len(text) // 4) + 1):
        length = period  # of the end of the text that repeats with this period
        while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
            length += 1
        if length >= max(4 * period - 1, 20):  # one character may have been white space at the end
            return True
    return False


def describe_answers(lines, max_new_tokens):
    """The rates of stopped, cut, empty and repeated answers, as a line."""
    shares = {}
    for name in ("stopped", "cut", "empty", "repeated"):
        values = [value for line in lines for value in (line[name] if isinstance(line[name], list) else [line[name]])]
        shares[name] = sum(values) / max(1, len(values))
    return (
        f"answers: {shares['stopped']:.1%} stopped by themselves, {shares['cut']:.1%} cut at --max_new_tokens"
        f" {max_new_tokens}, {shares['empty']:.1%} empty, {shares['repeated']:.1%} end in a loop"
    )


def describe_cut_questions(lines, max_src_len):
    """How many questions were cut and by how much, as a line."""
    cuts = [line["source_tokens_cut"] for line in lines if "source_tokens_cut" in line]
    if not cuts:
        return f"questions: none was cut at --max_src_len {max_src_len}"
    return (
        f"questions: cut {len(cuts):,} of {len(lines):,} at --max_src_len {max_src_len}: {sum(cuts):,} tokens lost,"
        f" {max(cuts):,} of the longest (source_tokens_cut)"
    )


def put_in_order(path, num_rows):
    """Join the ranks' parts into one file in input order, then remove them; the rows of the file.

    RuntimeError where they do not hold one answer for each of the rows: the parts stay as they are then.
    """
    keys, lines = read_parts(path)
    if missing := set(range(num_rows)) - set(lines):
        raise RuntimeError(f"{path}: {len(missing)} of {num_rows} rows have no answer, first that of index {min(missing)}")
    lines = {number: lines[number] for number in range(num_rows)}
    with whole_file(path) as file:
        file.writelines(lines.values())
    for part in keys:
        os.remove(part)
    return [json.loads(line) for line in lines.values()]


if __name__ == "__main__":
    entry.run(main)
