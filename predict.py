"""Answer the rows of a file, one prompt, or a person.

    python predict.py --model_path output-glm3/epoch-2-step-3900 --test_path data/spo_1.json
    python predict.py --model_path ChatGLM3-6B --prompt "你好"
    deepspeed predict.py --model_path ... --test_path ...      (the rows are shared out over the cards)

Takes a released checkpoint and every folder that train.py and merge_lora.py save.
"""

import json
import os
import sys
import time

from arguments import columns_of, parse_predict
from checkpoint import load_opened, open_checkpoint
from data_set import read_rows
from utils import (
    barrier,
    choose_device,
    choose_precision,
    fail,
    is_main,
    prepare_environment,
    print_rank_0,
    set_seed,
    start_distributed,
    stop_distributed,
    torch_dtype,
    world_size,
)


def main(argv):
    """Answer rows, a prompt or a person."""
    args = parse_predict(argv)
    if world_size() > 1 and not args.test_path:
        fail("--prompt and --interactive: are for one process: start it with python, not with the launcher")
    rows = list(read_rows(args.test_path, columns_of(args), need_response=False)) if args.test_path else []
    prepare_environment(args.device)
    opened = open_checkpoint(args.model_path, args.mode, base=args.model_name_or_path)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    if world_size() > 1:
        start_distributed(device)
    set_seed(args.seed)
    model, tokenizer = load_opened(opened, torch_dtype(precision), device)
    answer = Answerer(model, tokenizer, opened.mode.prompt, args)

    if args.prompt is not None:
        print_rank_0("\n".join(answer([answer.prompt_ids(args.prompt)])[0]["predictions"]))
    elif args.interactive:
        talk(answer)
    else:
        predict_file(answer, rows, args)
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


def predict_file(answer, rows, args):
    """Answer all rows, the longest first, written as they come; at the end the file is put into input order."""
    from tqdm import tqdm

    started = time.time()
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    # Shared out by length in characters, which needs no encoding, so that the ranks have equally much to do.
    mine = sorted(range(len(rows)), key=lambda i: (len(rows[i]["query"]), i), reverse=True)[rank::world]
    prompts = {number: answer.prompt_ids(rows[number]["query"]) for number in mine}
    copies = max(args.num_return_sequences, args.num_beams)  # of a row, side by side in its batch
    sizes = {number: copies * (len(ids) + args.max_new_tokens) for number, (ids, _) in prompts.items()}
    batches = make_batches(sizes, args.batch_size, args.batch_tokens)
    part = f"{args.output_path}.rank{rank}.partial"
    os.makedirs(os.path.dirname(os.path.abspath(part)), exist_ok=True)
    with open(part, "w", encoding="utf-8", buffering=1) as file:
        with tqdm(total=len(mine), desc="predicting", unit="row", disable=not is_main()) as bar:
            for numbers in batches:
                for number, result in zip(numbers, answer([prompts[number] for number in numbers])):
                    file.write(json.dumps(output_row(number, rows[number], result), ensure_ascii=False) + "\n")
                bar.update(len(numbers))
    barrier()
    if is_main():
        put_in_order(args.output_path, world)
        print(f"{len(rows)} rows in {time.time() - started:.1f} s, {args.output_path}")


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
    """One line of the output: the question, the reference if there is one, and the answer or answers."""
    line = {"index": number, "query": row["query"]}
    if row["answer"] is not None:
        line["output"] = row["answer"]
    if len(result["predictions"]) == 1:
        line |= {"prediction": result["predictions"][0], "stopped": result["stopped"][0]}
    else:
        line |= {"predictions": result["predictions"], "stopped": result["stopped"]}
    if result["source_cut"]:
        line["source_tokens_cut"] = result["source_cut"]
    return line


def put_in_order(path, world):
    """Join the ranks' parts into one file in input order, then remove them."""
    parts = [f"{path}.rank{rank}.partial" for rank in range(world)]
    lines = []
    for part in parts:
        with open(part, encoding="utf-8") as file:
            lines += file
    lines.sort(key=lambda line: json.loads(line)["index"])
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(path + ".partial", path)
    for part in parts:
        os.remove(part)


def talk(answer):
    """A conversation on the terminal; earlier turns are part of the prompt."""
    history = []
    print("empty line: end; /clear: forget")
    while True:
        try:
            query = input("> ").strip()
        except EOFError:
            return
        if not query:
            return
        if query == "/clear":
            history = []
            continue
        text = answer([answer.prompt_ids(query, history)])[0]["predictions"][0]
        print(text)
        history.append((query, text))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        fail(" ".join(str(error).split()))
