"""Make a tiny base checkpoint of a ChatGLM family, small enough to train from nothing on two CPU cores.

    python scripts/make_base.py --mode glm3 --output_dir output/base-glm3

It has the files, names and keys of a released checkpoint and a vocabulary of its own, so every other command of
this project takes it like a real one. It has read made-up vehicle fault reports (scripts/make_data.py) and answered
questions about them. It has never seen the extraction task of data/spo_0.json: no line of its answers is a
`head_relation_tail`, and no text names a combination that data/spo_1.json keeps for testing. A second call with the
same settings finds the checkpoint and returns at once.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder
from runtime import entry  # noqa: I001  first: Ctrl-C is heard while the others are imported

# isort: split

import hashlib
import io
import json
import math
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import make_data
import sentencepiece
import torch
from base_sources import base_sources

from checkpoints.released_files import save_config
from checkpoints.weight_files import write_weights
from flags.common import OneLineParser, expanded_path
from modes import MODES
from rows.batches import collate
from rows.encoding import encode_row
from runtime.exits import UserError  # noqa: E402
from runtime.streams import progress_bar
from utils import (
    prepare_environment,
    read_json,
    write_json,
)

# Hidden size, layers, key/value heads (glm2 and glm3), inner sizes (gated: glm2 and glm3; plain: glm).
SIZE = dict(hidden=192, layers=4, groups=2, gated=512, plain=768)
HEAD_SIZE = 48
ROPE_RATIO = {"glm2": 1, "glm3": 0.01}  # by the family's rule; glm3: faster angles, because the rows are short
WEIGHT_STD = 0.06  # initial weights; the released 0.02 is meant for wide layers
# What a block adds to its input starts and moves larger by this: glm's residual is scaled for 28 layers.
OUTPUT_SCALE = {"glm": math.sqrt(28 / SIZE["layers"]), "glm2": 1.0, "glm3": 1.0}
EMBEDDING_STD = {"glm": 0.05, "glm2": 0.2, "glm3": 0.2}
NUM_STEPS = 1400
VOCAB_SIZE = 2400  # pieces of the sentencepiece model
BATCH_SIZE = 16  # rows of an update
MATRIX_LEARNING_RATE = 0.02  # of Muon, for the matrices inside the layers
LEARNING_RATE = 5e-3  # of AdamW, for embeddings, norms and biases
MAX_LEN = 256  # tokens; longer rows are cut
NUM_EVAL_ROWS = 256
POOL_SIZE = 50  # batches that are made and sorted by length together

# ---------------------------------------------------------------- tasks
# A task is a function (rng, report) -> (question, answer), or None where the report has nothing to ask.

pick = make_data.pick
RELATION_QUESTIONS = {
    make_data.FAULT: "哪些零件有毛病，各是什么？",
    make_data.SYMPTOM: "哪些车辆或总成表现不好，怎么不好？",
    make_data.COMPONENT: "哪些总成里装有哪些零件？",
    make_data.TOOL: "量了哪些东西，各用什么量的？",
}
STYLES = (  # how pairs are written: what the question says of it, one pair, what stands between two
    ("用冒号写。", "{0}：{1}", "；"),
    ("用等号分行写。", "{0}={1}", "\n"),
    ("用括号倒着写。", "{1}（{0}）", "、"),
)
NOTHING = "没有"


def write_pairs(rng, question, triples):
    """Pairs of head and tail in one of the styles; the relation is not named."""
    style, pair, between = pick(rng, STYLES)
    return question + style, between.join(pair.format(head, tail) for head, _, tail in triples) or NOTHING


def ask_all_pairs(rng, report):
    return write_pairs(rng, "文中说了哪些成立的事？", report.triples)


def ask_denied_pairs(rng, report):
    return write_pairs(rng, "文中说了哪些不成立的事？", report.denied)


def ask_relation_pairs(rng, report):
    present = [relation for _, relation, _ in report.triples + report.denied]
    relation = pick(rng, present if rng.random() < 0.9 else make_data.RELATIONS)
    return write_pairs(rng, RELATION_QUESTIONS[relation], [t for t in report.triples if t[1] == relation])


def ask_partner(rng, report):
    """What belongs to one word of the text."""
    word = pick(rng, report.parts + report.faults + report.systems + report.symptoms + report.tools)
    found = [tail if head == word else head for head, _, tail in report.triples if word in (head, tail)]
    return f"文中什么和“{word}”对得上？", "、".join(found) or NOTHING


def ask_whether(rng, report):
    head, relation, tail = triple = pick(rng, report.triples + report.denied)
    return f"“{head}”和“{tail}”对得上吗？", "对" if triple in report.triples else "不对"


def ask_list(rng, report):
    name, found = pick(rng, (
        ("零件", report.parts), ("毛病", report.faults), ("车辆和总成", report.systems), ("表现", report.symptoms),
        ("量具", report.tools), ("参数", report.parameters), ("好的零件", report.normal),
        ("数字", re.findall(r"[A-Z]?\d[\d.]*", report.text)),
    ))
    question, found = pick(rng, ((f"列出文中的{name}。", found), (f"倒着列出文中的{name}。", found[::-1])))
    return question, "、".join(found) or NOTHING


def ask_topics(rng, report):
    return "文中讲了哪几方面？", "、".join(dict.fromkeys(relation for _, relation, _ in report.triples))


def ask_kind(rng, report):
    name, vocabulary = pick(rng, (("零件", report.parts), ("毛病", report.faults), ("车辆或总成", report.systems),
                                  ("表现", report.symptoms), ("量具", report.tools), ("参数", report.parameters)))
    return (f"文中的“{pick(rng, vocabulary)}”是哪一类？", name) if vocabulary else None


def ask_copy(rng, report):
    return "抄写文中的话。", report.text


TASKS = (  # with their shares
    (ask_all_pairs, 40), (ask_relation_pairs, 20), (ask_denied_pairs, 5), (ask_partner, 10), (ask_whether, 3),
    (ask_list, 8), (ask_topics, 2), (ask_kind, 2), (ask_copy, 7),
)
FIRST_TASKS = ((ask_copy, 75), (ask_list, 25))  # of the first steps: to find words in a text comes before reading it
FIRST_SHARE = 0.2
OTHER_SHARE = 0.03  # of questions about documents and of advertisements


def make_row(rng, forbidden, tasks=TASKS):
    """(query, answer) of a task drawn at random; no text names a combination in `forbidden`."""
    if rng.random() < OTHER_SHARE:
        row = pick(rng, (make_data.d2q_row, make_data.adgen_row))(rng)
        return row["instruction"] + row["input"], row["output"]
    while True:
        report = make_data.make_report(rng, forbidden=forbidden)
        asked = make_data.pick_weighted(rng, tasks)(rng, report)
        if asked is not None:
            return f"{asked[0]}文本：{report.text}", asked[1]


# ---------------------------------------------------------------- tokenizer

WORDS = sorted({*make_data.PARTS, *make_data.FAULTS, *make_data.SYSTEMS, *make_data.SYMPTOMS, *make_data.TOOLS,
                *make_data.PARAMETERS, *make_data.RELATIONS}, key=lambda word: (-len(word), word))
WORD_BORDER = "‖"  # between words in the corpus: no piece reaches over it


def tokenizer_corpus(mode, seed, num_lines=6000):
    """Lines of text cut at the words of the reports, and before the first, so that the space in front stays alone.

    The extraction task's instruction is among them, so that it takes few pieces; the model never reads it.
    """
    rng, forbidden = random.Random(seed), make_data.held_out_combinations()
    word = re.compile(f"({'|'.join(WORDS)})")
    query_text = getattr(MODES[mode].prompt, "query_text", str)  # glm and glm2 put words around a query
    lines = [make_data.SPO_INSTRUCTION] * (num_lines // 20)
    while len(lines) < num_lines:
        query, answer = make_row(rng, forbidden)
        lines += f"{query_text(query)}\n{answer}".split("\n")
    return [WORD_BORDER + WORD_BORDER.join(part for part in word.split(line) if part) for line in lines]


def train_tokenizer(mode, folder, seed):
    """Write the family's sentencepiece model into `folder` and return its tokenizer."""
    settings = dict(
        vocab_size=VOCAB_SIZE, character_coverage=0.9999, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2,
        split_digits=True, pretokenization_delimiter=WORD_BORDER, num_threads=1, minloglevel=2,
    )
    if mode == "glm":
        white_space = ["<n>", "<|tab|>"] + [f"<|blank_{k}|>" for k in range(2, 81)]
        controls = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
        settings |= dict(pad_id=3, control_symbols=controls, user_defined_symbols=white_space,
                         normalization_rule_name="nmt_nfkc")
    else:
        settings |= dict(pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
                         allow_whitespace_only_pieces=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_corpus(mode, seed)), model_writer=model, model_type="bpe", **settings
    )
    tokenizer_class = MODES[mode].tokenizer_class
    path = os.path.join(folder, tokenizer_class.vocab_files_names["vocab_file"])
    Path(path).write_bytes(model.getvalue())
    return tokenizer_class(path)


# ---------------------------------------------------------------- model

# Of the released config.json of glm2 and glm3; nothing here reads them, other programs do.
RELEASED_KEYS = dict(
    apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True, bias_dropout_fusion=True, original_rope=True,
    quantization_bit=0,
)


def make_model(mode, tokenizer):
    """A model with new weights and the keys of a released config.json."""
    s = SIZE
    vocab_size = -(-len(tokenizer) // 64) * 64
    network = "modeling_chatglm.ChatGLMForConditionalGeneration"
    common = dict(
        num_layers=s["layers"], hidden_size=s["hidden"], num_attention_heads=s["hidden"] // HEAD_SIZE,
        auto_map={"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": network,
                  "AutoModelForCausalLM": network, "AutoModelForSeq2SeqLM": network},
    )
    if mode == "glm":
        ids = {f"{name}_token_id": tokenizer.get_command(token) for name, token in (
            ("bos", "<sop>"), ("eos", "<eop>"), ("pad", "<pad>"), ("mask", "[MASK]"), ("gmask", "[gMASK]"))}
        config = MODES[mode].config_class(
            vocab_size=vocab_size, inner_hidden_size=s["plain"], max_sequence_length=2048, **ids, **common
        )
    else:
        config = MODES[mode].config_class(
            padded_vocab_size=vocab_size, ffn_hidden_size=s["gated"], kv_channels=HEAD_SIZE,
            multi_query_group_num=s["groups"], seq_length=2048, rope_ratio=ROPE_RATIO[mode], **RELEASED_KEYS, **common
        )
    model = MODES[mode].model_class(config)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for matrix, scale in layer_matrices(model, mode):
        torch.nn.init.normal_(matrix, std=WEIGHT_STD * scale)
    torch.nn.init.normal_(embedding, std=EMBEDDING_STD[mode])
    with torch.no_grad():
        output.copy_(embedding)  # to copy a word from the text is then a short way from the start
    return model


def layer_matrices(model, mode):
    """(weight matrix, its scale) inside the layers: all but the embedding and the output layer."""
    outputs = (".dense.weight", ".dense_4h_to_h.weight")
    return [
        (parameter, OUTPUT_SCALE[mode] if name.endswith(outputs) else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and ".layers." in name
    ]


# ---------------------------------------------------------------- training

def encoded_rows(rng, count, tokenizer, prompt, tasks=TASKS):
    """`count` new rows as ids."""
    forbidden = make_data.held_out_combinations()
    rows = (make_row(rng, forbidden, tasks) for _ in range(count))
    return [encode_row(query, answer, tokenizer, prompt, MAX_LEN, MAX_LEN // 2) for query, answer in rows]


def batches(rng, tokenizer, prompt, num_steps):
    """Batches of new rows; rows of like length stand together, so that little is padding."""
    for start in range(0, num_steps, POOL_SIZE):
        tasks = FIRST_TASKS if start < FIRST_SHARE * num_steps else TASKS
        rows = encoded_rows(rng, min(POOL_SIZE, num_steps - start) * BATCH_SIZE, tokenizer, prompt, tasks)
        rows.sort(key=lambda row: len(row["input_ids"]))
        pool = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
        rng.shuffle(pool)
        for group in pool:
            yield collate(group, tokenizer.pad_token_id)


def rate_share(step, num_steps):
    """Share of the full rate: linear warm-up over the first 5 % of the steps, then a cosine to a twentieth."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


def muon_step(matrices, momenta, scales, rate, decay=0.1, beta=0.95):
    """Muon (Jordan 2024): a step along the momentum with its singular values set to about 1, by Newton-Schulz.

    A matrix with a scale takes a step that many times as large.
    `torch.optim.Muon` does the same in bfloat16, which is slow on many CPUs; this stays in float32.
    """
    with torch.no_grad():
        for matrix, momentum, scale in zip(matrices, momenta, scales, strict=True):
            momentum.lerp_(matrix.grad, 1 - beta)
            update = matrix.grad.lerp(momentum, beta)
            is_tall = update.shape[0] > update.shape[1]
            x = (update.T if is_tall else update) / update.norm().clamp(min=1e-7)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
            step = rate * scale * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.mul_(1 - rate * decay).add_(x.T if is_tall else x, alpha=-step)


def train(model, mode, tokenizer, num_steps, seed):
    """Train on new rows at every step."""
    matrices, scales = zip(*layer_matrices(model, mode))
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizer = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    num_tokens, average = 0, None
    source = batches(random.Random(seed), tokenizer, MODES[mode].prompt, num_steps)
    progress = progress_bar(source, total=num_steps, desc="training the base", mininterval=5)
    for step, batch in enumerate(progress):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = rate_share(step, num_steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        optimizer.step()
        muon_step(matrices, momenta, scales, MATRIX_LEARNING_RATE * share)
        model.zero_grad()
        num_tokens += batch["input_ids"].numel()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}", tokens=f"{num_tokens:,}", refresh=False)
    return num_tokens


def accuracy(model, tokenizer, prompt, seed):
    """Share of new rows, in percent, whose whole answer greedy decoding would give."""
    model.eval()
    rows = encoded_rows(random.Random(seed), NUM_EVAL_ROWS, tokenizer, prompt)
    num_right = 0
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collate(rows[start : start + BATCH_SIZE], tokenizer.pad_token_id)
        with torch.no_grad():
            guesses = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        num_right += ((guesses == labels) | (labels == -100)).all(dim=1).sum().item()
    return 100 * num_right / len(rows)


# ---------------------------------------------------------------- command

def settings_of(args):
    """Everything that decides the checkpoint."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in base_sources())).hexdigest()
    return {"mode": args.mode, "num_steps": args.num_steps, "seed": args.seed, "sources": digest}


def check_output(output_dir, settings):
    """Is the checkpoint there already? UserError for a folder that holds something else."""
    marker = os.path.join(output_dir, "base.json")
    if not os.path.lexists(output_dir) or (os.path.isdir(output_dir) and not os.listdir(output_dir)):
        return False
    if not os.path.isfile(marker):
        raise UserError(f"--output_dir {output_dir}: holds something else than a base: name a new folder")
    return read_json(marker) == settings


def write_config(model, folder, mode):
    """config.json with the release's name, by which programs tell ChatGLM3 from ChatGLM2: their keys are alike."""
    model.config.architectures = [type(model).__name__]
    save_config(model.config, folder, model.dtype)
    path = os.path.join(folder, "config.json")
    name = f"tiny base in the shape of THUDM/{MODES[mode].released_name.removesuffix('-6b')}-6b"
    write_json({**read_json(path), "_name_or_path": name}, path)


def put_in_place(folder, output_dir):
    """Move a finished folder to its place. What was there is moved beside the folder, to be removed with it."""
    if os.path.isdir(output_dir):
        os.rename(output_dir, f"{folder}-before")
    os.rename(folder, output_dir)


def make_base(args):
    """Train the tokenizer and the model and save them into args.output_dir."""
    settings = settings_of(args)
    output_dir = os.path.abspath(args.output_dir)
    if check_output(output_dir, settings):
        print(f"{args.output_dir}: holds this base already, nothing to do")
        return
    prepare_environment()
    started = time.monotonic()
    os.makedirs(os.path.dirname(output_dir), exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".base-", dir=os.path.dirname(output_dir))
    try:
        torch.manual_seed(args.seed)
        tokenizer = train_tokenizer(args.mode, scratch, args.seed)
        model = make_model(args.mode, tokenizer)
        num_weights = sum(p.numel() for p in model.parameters())
        print(f"{args.mode}: {num_weights:,} weights, {len(tokenizer):,} tokens in the vocabulary")
        num_tokens = train(model, args.mode, tokenizer, args.num_steps, args.seed + 1)
        right = accuracy(model, tokenizer, MODES[args.mode].prompt, args.seed + 2)
        folder = os.path.join(scratch, "whole")
        os.makedirs(folder)
        write_weights({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder)
        tokenizer.save_pretrained(folder)
        write_config(model, folder, args.mode)
        Path(folder, "base.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        put_in_place(folder, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{args.output_dir}: {right:.1f} % of {NUM_EVAL_ROWS} new questions answered exactly, after {num_tokens:,}"
          f" tokens in {time.monotonic() - started:.0f} s")


def parse_args(argv=None):
    parser = OneLineParser(prog="make_base.py", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=tuple(MODES), default="glm3", help="family")
    parser.add_argument(
        "--output_dir", type=expanded_path, required=True, help="folder of the checkpoint; a base in it is replaced"
    )
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS, help="optimizer updates")
    parser.add_argument("--seed", type=int, default=1234, help="seed of rows and weights")
    args = parser.parse_args(argv)
    if args.num_steps < 1:
        parser.error(f"--num_steps {args.num_steps}: give at least 1")
    return args


if __name__ == "__main__":
    entry.run(lambda argv: make_base(parse_args(argv)))
