"""How fast is a training step, and how much memory does it take?

    python benchmarks/step.py --mode glm3 --train_type lora --against plain
    python benchmarks/step.py --mode glm glm2 glm3 --train_type all lora ptuning freeze --against plain --save
    python benchmarks/step.py --train_type lora --rows data/spo_0.json --max_len 1024 --against unpacked
    python benchmarks/step.py --preset 6b --precision bf16 --length 1560 --batch_size 1 --train_type lora --packing

Preset `small` (real vocabulary, hidden size 512, 8 layers) is for a CPU, `6b` (released shapes, random weights made
on the device) for a GPU. One engine runs both ways in turn, so that a noisy machine is noisy for both; the ratio is
that of the medians. A step is one update: forward, backward, clipping, AdamW.

--against plain: benchmarks/plain.py, the usual way. --against unpacked: the same rows, padded batches, for --rows.

MFU counts useful work only: no weight gradients of frozen layers, no recomputation, logits of labelled positions; the
peak is the GPU's datasheet for bf16, and on a CPU the speed of a large matrix product in the same run.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from types import SimpleNamespace

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from modes import MODES  # noqa: E402
from runtime.distributed import stop_distributed
from runtime.hosts import start_distributed  # noqa: E402
from train_types import TRAIN_TYPES  # noqa: E402
from utils import (  # noqa: E402
    choose_device,
    choose_precision,
    prepare_environment,
    torch_dtype,  # noqa: E402
)

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A40": 149.7e12}  # dense bf16


def main(argv):
    """Each combination in a process of its own, so that none inherits memory from another."""
    args = parse(argv)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(measure(args)), encoding="utf-8")
        return
    rows = []
    own = strip(argv, ("--mode", "--train_type", "--save"))
    for mode in args.mode:
        for train_type in args.train_type:
            one = [*own, "--mode", mode, "--train_type", train_type]
            row = run(one)
            if choose_device(args.device).type == "cpu":
                # Here memory that is freed goes back at once, so that the process's peak is that of the tensors.
                watched = run([*one, "--memory", "--steps", "1"], MALLOC_MMAP_THRESHOLD_="1000000")
                row |= {name: value for name, value in watched.items() if "GB" in name or "memory" in name}
            rows.append(shown(row))
            print(report.table(rows[-1:]), flush=True)
    if args.save:
        command = " ".join(["python benchmarks/step.py", *strip(argv, ("--save",))])
        report.save("Training steps", command, rows)


def run(argv, **environment):
    """Figures of one combination, measured by a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *argv, "--json", file.name]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        return json.load(file)


def parse(argv):
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "small", "6b"), default="small")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=["glm3"])
    parser.add_argument("--train_type", choices=TRAIN_TYPES, nargs="+", default=["lora"])
    parser.add_argument("--against", choices=("plain", "unpacked"), help="alternate with another way")
    parser.add_argument("--batch_size", type=int, default=4, help="rows, or with --packing sequences, of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each random row")
    parser.add_argument("--labelled", type=float, default=1 / 3, help="share of a random row that is answer")
    parser.add_argument("--rows", nargs="+", help="take the lengths of the rows of these files (real batches)")
    parser.add_argument("--max_len", type=int, default=1024, help="with --rows: tokens of a packed sequence")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--gradient_checkpointing_interval", type=int, default=1)
    parser.add_argument("--attention", choices=("sdpa", "flex_attention", "eager"), default="sdpa")
    parser.add_argument("--lora_dim", type=int, default=16)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--prefix_projection", action="store_true")
    parser.add_argument("--freeze_layers", type=int, help="trained layers at the top; left out: a quarter")
    parser.add_argument("--ds_file", default="ds_zero2_no_offload.json")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each way")
    parser.add_argument("--json", help="measure one combination and write its figures there")
    parser.add_argument("--memory", action="store_true", help="with --json on a CPU: measure memory as well")
    parser.add_argument("--save", action="store_true", help="put the figures into benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    if args.against == "unpacked":
        args.packing = True
        if not args.rows:
            parser.error("--against unpacked: needs --rows")
    return args


def strip(argv, names):
    """argv without these flags and their values."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word in names
        if not dropping:
            kept.append(word)
    return kept


def training_flags(args, num_layers):
    """The flags of train.py that the engine, the optimizer and the train type read."""
    trained = args.freeze_layers or max(1, num_layers // 4)
    return SimpleNamespace(
        freeze_module_name=",".join(f"layers.{num_layers - 1 - i}." for i in range(trained)),
        pre_seq_len=args.pre_seq_len,
        prefix_projection=args.prefix_projection,
        lora_dim=args.lora_dim,
        lora_alpha=64,
        lora_dropout=0.1,
        lora_module_name="query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        learning_rate=1e-6,
        weight_decay=0.1,
        optimizer="auto",
    )


def make_rows(args, config):
    """Rows of random ids: all of one length, or with the lengths of real rows."""
    from benchmarks.presets import random_rows

    if not args.rows:
        labels = round(args.length * args.labelled)
        return random_rows(config, [args.length] * args.batch_size, [labels] * args.batch_size)
    from rows.checks import Columns
    from rows.encoding import encode_row
    from rows.reading import read_rows

    # The tests' tokenizer has a small vocabulary, which cuts text a little finer than the released one.
    mode = MODES[args.mode[0]]
    tokenizer = mode.tokenizer_class.from_pretrained(ROOT / "tests" / "golden" / mode.package)
    lengths, labels = [], []
    for row in read_rows(args.rows, Columns()):
        encoded = encode_row(row["query"], row["answer"], tokenizer, mode.prompt, args.max_len, args.max_len // 2)
        lengths.append(len(encoded["input_ids"]))
        labels.append(num_labels(encoded))
    return random_rows(config, lengths, labels)


def num_labels(row):
    """Supervised tokens of a row."""
    return sum(run.num_labels for run in row["runs"])


def batches_of(args, rows, packed, device, pad_token_id):
    """Endless (rows, batch) of an epoch, made as train.py makes them."""
    from rows.batches import Split, Updates, collate, to_device

    lengths = [len(row["input_ids"]) for row in rows]
    labels = [num_labels(row) for row in rows]
    pack_to = args.max_len if packed else None
    updates = Updates(lengths, labels, Split(args.batch_size, 1, 1), rank=0, seed=1, pack_to=pack_to)
    while True:
        for update in updates.epoch(0):
            mine = [rows[n] for n in update.micro_batches[0]]
            yield mine, lambda mine=mine: to_device(collate(mine, pad_token_id, packed), device)


def plain_batches(args, rows, device, pad_token_id):
    """Endless (rows, batch), padded to the longest, in the order of the file."""
    from benchmarks.plain import pad

    while True:
        for start in range(0, len(rows) - args.batch_size + 1, args.batch_size):
            mine = rows[start : start + args.batch_size]
            yield mine, lambda mine=mine: {name: tensor.to(device) for name, tensor in pad(mine, pad_token_id).items()}


def measure(args):
    """Figures of one mode and train type."""
    prepare_environment(args.device)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    start_distributed(device)
    engine = build_engine(args, device, precision)
    config = engine.module.config
    rows, pad_token_id = make_rows(args, config), config.pad_token_id
    ways = {"ours": batches_of(args, rows, args.packing, device, pad_token_id)}
    if args.against == "plain":
        ways["plain"] = plain_batches(args, rows, device, pad_token_id)
    elif args.against == "unpacked":
        ways["unpacked"] = batches_of(args, rows, False, device, pad_token_id)
    medians = time_steps(args, engine, ways, device)

    mine, make_batch = next(batches_of(args, rows, args.packing, device, pad_token_id))
    work = useful_flops(engine.module, make_batch(), mine, config)
    stop_distributed(engine)
    return result_of(args, medians, work, peak_speed(device, precision))


def build_engine(args, device, precision):
    """DeepSpeed's engine around a network with random weights, as train.py makes it."""
    import deepspeed
    import torch

    from benchmarks.presets import preset_config, random_model
    from modeling.gradient_checkpointing import checkpoint_layers
    from training.ds_config import complete_config, read_ds_file
    from training.optimizer import build_optimizer

    torch.manual_seed(0)
    mode, train_type = args.mode[0], TRAIN_TYPES[args.train_type[0]]
    flags = training_flags(args, preset_config(args.preset, mode).num_layers)
    model = random_model(args.preset, mode, torch_dtype(precision), device, **train_type.config_changes(flags))
    model.config._attn_implementation = args.attention
    model = train_type.prepare(model, flags, MODES[mode])
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.gradient_checkpointing_interval)
    ds_config = complete_config(read_ds_file(args.ds_file), flags, 1, precision)
    optimizer = build_optimizer(model, flags, MODES[mode].norms)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    engine.train()
    return engine


def time_steps(args, engine, ways, device):
    """{way: {figure: its median over the steps}}, the ways in turn."""
    figures = {way: [] for way in ways}
    for number in range(args.steps + 1):  # the first one of each way is a warm-up
        for way, batches in ways.items():
            result = one_step(engine, way, batches, device)
            if number:
                figures[way].append(result)
    medians = {way: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for way, runs in figures.items()}
    if args.memory or device.type == "cuda":
        for way, batches in ways.items():
            watched = [one_step(engine, way, batches, device, watch_memory=True) for _ in range(2)]
            medians[way] |= {name: max(result[name] for result in watched) for name in ("extra", "peak")}
    return medians


def one_step(engine, way, batches, device, watch_memory=False):
    """One update; returns its figures. Watching memory gives back what is free, which costs time later."""
    import torch

    from benchmarks.plain import plain_loss, plain_settings

    mine, make_batch = next(batches)
    num_items = sum(map(num_labels, mine))
    memory = Memory(device) if watch_memory else None
    start = time.perf_counter()
    batch = make_batch()
    outside = time.perf_counter() - start
    with plain_settings(engine.module, checkpointing=True) if way == "plain" else nullcontext():
        if way == "plain":
            loss = plain_loss(engine, batch, num_items)
        else:
            loss = engine(**batch).token_losses.sum() / num_items
        engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "outside": outside / seconds,
        "rows": len(mine) / seconds,
        "tokens": sum(len(row["input_ids"]) for row in mine) / seconds,
        "padded": batch["input_ids"].numel() / seconds,
        "extra": memory.extra() if memory else math.nan,
        "peak": memory.peak() if memory else math.nan,
    }


def result_of(args, medians, work, speed):
    """The line of the table. work: floating-point operations of a step; speed: (name, operations a second at most)."""
    ours, (peak_name, peak) = medians["ours"], speed
    result = {
        "mode": args.mode[0],
        "train type": args.train_type[0],
        "step s": ours["seconds"],
        "rows/s": ours["rows"],
        "tokens/s": ours["tokens"],
        "padded tokens/s": ours["padded"],
        "outside engine": ours["outside"],
        "TFLOP/s": work / ours["seconds"] / 1e12,
        f"MFU ({peak_name})": work / ours["seconds"] / peak,
        "peak GB": ours["peak"] / 1e9,
        "extra GB": ours["extra"] / 1e9,
    }
    if args.against:
        other, unit = medians[args.against], "rows/s" if args.rows else "time"
        result[f"{args.against} step s"] = other["seconds"]
        result[f"{args.against} extra GB"] = other["extra"] / 1e9
        result[f"speed-up ({unit})"] = ours["rows"] / other["rows"] if args.rows else other["seconds"] / ours["seconds"]
        result["extra memory ratio"] = ours["extra"] / other["extra"]
    return result


class Memory:
    """Peak memory from here on: of the GPU's allocator, or of this process."""

    def __init__(self, device):
        import torch

        self.cuda = torch.cuda if device.type == "cuda" else None
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.start = self.cuda.memory_allocated()
        else:
            import ctypes

            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed goes back
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
            self.start = self.status("VmRSS")

    @staticmethod
    def status(name):
        """A line of /proc/self/status, in bytes."""
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)

    def peak(self):
        """Bytes in all."""
        return self.cuda.max_memory_allocated() if self.cuda else self.status("VmHWM")

    def extra(self):
        """Bytes above the start."""
        return self.peak() - self.start


def useful_flops(model, batch, rows, config):
    """Floating-point operations that a step of this kind needs.

    Each linear layer is asked in one forward pass how many rows it gets, whether gradients flow to its input and
    whether its weight trains: 2 x rows x in x out for each of the three products that are needed. Attention: visible
    pairs x heads x head size x 4 forward, twice that backward where gradients flow.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    total = 0
    num_padded, num_tokens = batch["input_ids"].numel(), sum(len(row["input_ids"]) for row in rows)
    pairs = sum(len(row["input_ids"]) * (len(row["input_ids"]) + 1) / 2 for row in rows)
    pairs += sum(len(row["input_ids"]) for row in rows) * (getattr(config, "pre_seq_len", None) or 0)
    if getattr(config, "gmask_token_id", None) is not None:  # the question sees all of itself
        starts = [row["runs"][0].start for row in rows]
        pairs += sum((start - 1) * (start - 2) / 2 for start in starts)
    width = config.num_attention_heads * config.head_dim

    def linear(module, inputs, output):
        nonlocal total
        num_rows = inputs[0].numel() // module.in_features
        if num_rows == num_padded:
            num_rows = num_tokens
        products = 1 + inputs[0].requires_grad + module.weight.requires_grad
        total += 2 * num_rows * module.in_features * module.out_features * products

    def layer(module, inputs, output):
        nonlocal total
        total += 4 * pairs * width * (3 if output.requires_grad else 1)

    hooks = []
    checkpointed = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_hook(linear))
        elif isinstance(module, GradientCheckpointingLayer):
            hooks.append(module.register_forward_hook(layer))
            checkpointed.append((module, module.gradient_checkpointing))
            module.gradient_checkpointing = False
    model(**batch)
    for hook in hooks:
        hook.remove()
    for module, setting in checkpointed:
        module.gradient_checkpointing = setting
    return total


def peak_speed(device, precision):
    """(name, FLOP/s) of what the machine can do at most."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        for key, value in PEAKS.items():
            if key in name:
                return f"{key} datasheet", value
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch_dtype(precision)) for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return "a matrix product here", 2 * size**3 / min(times)


def shown(row):
    """Figures as they are read."""
    shares = ("outside engine", "MFU")
    return {
        name: value
        if isinstance(value, str)
        else f"{value:.1%}"
        if name.startswith(shares)
        else f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:.2f}"
        for name, value in row.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
