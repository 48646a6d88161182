"""A table of bad inputs - flags, rows, files - run as real commands: what is refused, and how.

    python tests/faults/bad_inputs.py --json bad_inputs.json --jobs 2

Each line of the table prepares a folder, runs a command in it and says what the one line on stderr must hold. Each
command must end with exit code 2, write nothing and run nothing that lies in the files. The lines of GOOD are the
same folders before they are spoilt: they must be accepted.
"""

import argparse
import functools
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402, the path comes first
from refusing import (  # noqa: E402
    FOLDERS,
    OUTPUT_LAYER,
    ROW,
    ROW_LINE,
    both,
    change_json,
    cut,
    drop,
    lines,
    one_file,
    put,
    replaced,
    row,
    weight_map,
    without,
)
from safetensors.torch import load_file, save_file  # noqa: E402

TIME_LIMIT = 120  # seconds for a command
MEMORY_LIMIT = 16_000_000  # KiB of address space: what asks for much more fails here and not by filling the host
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
INDEX = "pytorch_model.bin.index.json"
ADAPTER, SETTINGS, TOKENIZER_CONFIG = "adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"
LARGE, NAN = 10**12, float("nan")


def nothing(folder):
    """The preparation of a command that needs none."""


@dataclass(frozen=True)
class BadInput:
    """A line of the table.

    command: the words of a command line; {glm}, {glm2} and {glm3} are good checkpoints. says: a pattern that is found
    in stderr. prepare: a function of the folder. num_lines: on stderr, one for each problem. code: the exit code.
    """

    id: str
    command: str
    says: str
    prepare: Callable = nothing
    num_lines: int = 1
    code: int = 2


# ---------------------------------------------------------------- folders to run in

TRAIN = "train.py --train_path rows.json --model_name_or_path {glm3} --output_dir out --device cpu"
TRAIN_DS = f"{TRAIN} --ds_file ds.json"
TRAIN_MODEL = TRAIN.replace("{glm3}", "model")
PROMPT = "predict.py --model_path {glm3} --device cpu --max_new_tokens 1 --prompt a"
PROMPT_MODEL = PROMPT.replace("{glm3}", "model")
PROMPT_SAVED = PROMPT.replace("{glm3}", "saved")
ANSWER = "predict.py --model_path {glm3} --device cpu --max_new_tokens 1 --test_path rows.json --output_path out.jsonl"
MERGE = "merge_lora.py --model_dir saved --output_dir out"
SCORE = "score.py --predictions answers.jsonl"


def make(name, content=""):
    """A function that writes a file, and the folders that it lies in."""

    def prepare(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def rows(content):
    """A function that replaces the rows."""
    return make("rows.json", content)


def ds_file(zero=None, **sections):
    """A function that writes a DeepSpeed file."""
    return make("ds.json", json.dumps({"zero_optimization": zero or {"stage": 2}, **sections}))


def permissions(name, bits):
    """A function that sets the permissions of a file or folder, which is made if it is absent."""

    def prepare(folder):
        if not (folder / name).exists():
            (folder / name).mkdir()
        (folder / name).chmod(bits)

    return prepare


def model(*spoils, mode="glm3"):
    """A function that copies a checkpoint to `model` and spoils the copy."""

    def prepare(folder):
        shutil.copytree(FOLDERS[mode], folder / "model", ignore=shutil.ignore_patterns("golden.*"))
        both(*spoils)(folder / "model")

    return prepare


def config(mode="glm3", **changes):
    """A function that copies a checkpoint to `model` and changes its config.json."""
    return model(change_json("config.json", **changes), mode=mode)


def saved(*spoils, **run):
    """A function that makes the folder `saved`: what train.py saves beside the weights; they are for the spoils."""

    def prepare(folder):
        path = folder / "saved"
        path.mkdir()
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(FOLDERS["glm3"] / name, path)
        values = {"mode": "glm3", "train_type": "lora", "weights": "adapter", "base_model": str(FOLDERS["glm3"])}
        put("run.json", json.dumps(values | run))(path)
        both(*spoils)(path)

    return prepare


def adapter(folder):
    """Weights of rank 4 beside every query_key_value of glm3, with their settings."""
    state = {}
    for i in range(4):
        name = f"base_model.model.transformer.encoder.layers.{i}.self_attention.query_key_value"
        state |= {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.zeros(128, 4)}
    save_file(state, folder / ADAPTER)
    values = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query_key_value"], "bias": "none"}
    put(SETTINGS, json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **values}))(folder)


def settings(**changes):
    """A function that makes `saved` with an adapter whose settings are changed."""
    return saved(adapter, change_json(SETTINGS, **changes))


def tensors(change):
    """A function that changes the weights {name: tensor} of an adapter."""

    def spoil(folder):
        save_file(change(load_file(folder / ADAPTER)), folder / ADAPTER)

    return spoil


def prefix_run(*spoils):
    """A function that makes `saved` with a prefix encoder of 8 virtual tokens for glm3, and spoils it."""

    def prefix(folder):
        put("config.json", (FOLDERS["glm3"] / "config.json").read_bytes())(folder)
        change_json("config.json", pre_seq_len=8, prefix_projection=False)(folder)
        state = {"transformer.prefix_encoder.embedding.weight": torch.zeros(8, 256)}
        save_file(state, folder / "prefix_encoder.safetensors")

    return saved(prefix, *spoils, weights="prefix")


def wider_heads(folder):
    """Make the checkpoint one of heads three times as wide."""

    def wider(name, tensor):
        if "query_key_value" in name:
            return tensor.repeat(3, *[1] * (tensor.dim() - 1))
        return tensor.repeat(1, 3) if name.endswith("attention.dense.weight") else tensor

    change_json("config.json", kv_channels=48)(folder)
    one_file(lambda state: {name: wider(name, tensor) for name, tensor in state.items()})(folder)


def all_as(dtype):
    """A function of the weights that makes all of them another type."""
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


# ---------------------------------------------------------------- files to distrust


def marker(folder):
    """The file that attacks in a folder's files make: beside the folder in which the command runs."""
    return next(path for path in folder.parents if path.name.startswith("case-")) / "code-ran"


class Attack:
    """An object whose pickle runs a command when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def attack(name, protocol=None):
    """A function that writes a file which runs a command: in torch's format, or a plain pickle of a protocol."""

    def spoil(folder):
        content = {OUTPUT_LAYER: Attack(marker(folder))}
        if protocol is None:
            torch.save(content, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))

    return spoil


def attack_in_module(name):
    """A function that writes Python code which runs a command when it is imported."""

    def spoil(folder):
        (folder / name).write_text(f"open({str(marker(folder))!r}, 'w')\n")

    return spoil


BYSTANDERS = both(  # files that other tools leave beside weights, and that nobody here has any reason to open
    *(attack(n) for n in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin")),
    attack("pytorch_model-00003-of-00003.bin"),
    attack("data.pkl", protocol=4),
    *(attack_in_module(n) for n in ("modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py")),
)


def append(name, content):
    """A function that puts bytes behind a file."""

    def spoil(folder):
        with open(folder / name, "ab") as file:
            file.write(content)

    return spoil


def header(change):
    """A function that changes the header of model.safetensors, {name: {dtype, shape, data_offsets}}."""

    def spoil(folder):
        content = (folder / SAFE).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        values = json.loads(content[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        put(SAFE, struct.pack("<Q", len(text)) + text + content[8 + size :])(folder)

    return spoil


def claim(**values):
    """A function that changes what the header says of the output layer."""
    return both(one_file(), header(lambda tensors: tensors[OUTPUT_LAYER].update(values)))


def index(change):
    """A function that changes the weight_map of the index."""

    def spoil(folder):
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        put(INDEX, json.dumps(values))(folder)

    return spoil


def output_layer(tensor_of, name=BIN):
    """A function that stores the weights in one file, with another output layer."""
    return one_file(replaced(tensor_of), name)


class Rebuilt:
    """A pickle of a tensor with a size and steps of its own over the memory of another."""

    def __init__(self, tensor, size, stride, offset=0):
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        self.arguments = (storage, offset, size, stride, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def compressed(folder):
    """Pack a .bin file again, smaller."""
    path = folder / SHARDS[0]
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def in_both_shards(folder):
    """Store a weight of the first shard in the second, too."""
    first, second = (torch.load(folder / name, weights_only=True) for name in SHARDS)
    name = next(name for name in first if name.endswith("dense.weight"))
    torch.save({**second, name: first[name]}, folder / SHARDS[1])


def links(folder):
    """Make the checkpoint what the hub's cache has: links to files outside of the folder, named by their contents."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


# ---------------------------------------------------------------- the table

# fmt: off
FLAGS = [  # id, command, what stderr says, and where it is needed: preparation, lines on stderr, exit code
    ("flag-unknown", f"{TRAIN} --max_length 8", "unrecognized arguments: --max_length 8"),
    ("flag-shortened", f"{TRAIN} --lora 8", "unrecognized arguments: --lora 8"),
    ("flags-missing", "train.py --train_path rows.json", "required: --model_name_or_path, --output_dir"),
    ("flag-without-value", f"{TRAIN} --max_len", "--max_len: expected one argument"),
    ("mode-unknown", f"{TRAIN} --mode glm4", r"--mode: invalid choice: 'glm4' \(choose from 'glm', 'glm2', 'glm3'\)"),
    ("mode-of-another-model", f"{TRAIN} --mode glm", r"--mode glm: config\.json of \S+ is of glm3: change --mode"),
    ("number-as-text", f"{TRAIN} --learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
    ("number-nan", f"{TRAIN} --learning_rate nan", "--learning_rate nan: must be 0 or more"),
    ("number-negative", f"{TRAIN} --num_train_epochs=-1", "--num_train_epochs -1: must be at least 1"),
    ("number-of-5000-digits", f"{TRAIN} --seed {'1' * 5000}", "--seed: invalid int value: '111"),
    ("rank-enormous", f"{TRAIN} --lora_dim {10**9}", f"--lora_dim {10**9}: "),
    ("prefix-enormous", f"{TRAIN} --train_type ptuning --pre_seq_len {10**9}", f"--pre_seq_len {10**9}: "),
    ("answer-enormous", f"{PROMPT} --max_new_tokens {10 * LARGE**2}", f"--max_new_tokens {10 * LARGE**2}: "),
    ("source-longer-than-row", f"{TRAIN} --max_src_len 1018", "--max_src_len 1018 leaves no room .* at most 1017"),
    ("longer-than-the-window", f"{TRAIN} --max_len 8193", "--max_len 8193: the model's window is 8192 tokens: use"),
    ("flag-of-another-type", f"{TRAIN} --train_type all --lora_dim 4", "--lora_dim: belongs to --train_type lora"),
    ("lora-module-unknown", f"{TRAIN} --lora_module_name q_proj", "--lora_module_name q_proj: matches no linear layer"),
    ("freeze-layer-unknown", f"{TRAIN} --train_type freeze --freeze_module_name layers.99.",
     r"--freeze_module_name layers\.99\.: matches no weight: this model has layers\.0\. to layers\.3\."),
    ("no-GPU", TRAIN.replace("cpu", "cuda"), "--device cuda: torch sees no CUDA device: check"),
    ("half-precision-on-cpu", f"{TRAIN} --precision fp16", "--precision fp16: a CPU trains in fp32 or bf16 only: use"),
    ("two-bad-flags", f"{TRAIN} --max_grad_norm=-1 --lora_dropout 2",
     r"(?s)--max_grad_norm -1\.0: must be 0 or more.*--lora_dropout 2\.0: must be 0 or more and below 1", nothing, 2),
    ("seven-bad-flags", "train.py --train_path no.json --model_name_or_path nowhere --output_dir rows.json"
     " --ds_file no.json --max_grad_norm=-1 --lora_dim 0 --pre_seq_len 4",
     "(?s)--lora_dim 0.*--pre_seq_len.*--train_path no.json.*--model_name_or_path nowhere.*--output_dir.*--ds_file",
     nothing, 7),
    ("ds-file-missing", f"{TRAIN} --ds_file no.json", r"--ds_file no\.json: no such file here or in configs/: use"),
    ("ds-file-broken", TRAIN_DS, r"ds\.json: cannot be read as JSON", make("ds.json", "{")),
    ("ds-file-nested-deeply", TRAIN_DS, r"ds\.json: cannot be read as JSON", make("ds.json", "[" * 10**5)),
    ("ds-file-of-stage-1", TRAIN_DS, r"ds\.json: zero_optimization\.stage is 1: use 2 or 3", ds_file({"stage": 1})),
    ("ds-file-contradicts", TRAIN_DS, r"ds\.json: gradient_clipping is 0\.5 but --max_grad_norm is 1\.0: give it once",
     ds_file(gradient_clipping=0.5)),
    ("ds-file-switch-as-text", TRAIN_DS, r"ds\.json: .*bf16", ds_file(bf16={"enabled": "yes"})),
    ("ds-file-section-as-number", TRAIN_DS, r"ds\.json: .*data_types", ds_file(data_types=5)),
    ("ds-file-number-as-text", TRAIN_DS, r"ds\.json: .*steps_per_print", ds_file(steps_per_print="ten")),
    ("ds-file-unknown-key", TRAIN_DS, "magic: .*DeepSpeed refuses it", ds_file({"stage": 2, "magic": 1})),
    ("path-of-two-lines", f"{TRAIN} --train_path 'no\nsuch.json'", r"--train_path no such\.json: no such file or fol"),
    ("path-with-an-escape", f"{TRAIN} --train_path '\x1b[31mno.json'", r"--train_path .*no\.json: no such file"),
    ("prompt-not-utf-8", f"{PROMPT} --prompt '\udcff'", "--prompt '.*': "),
    ("two-sources", f"{PROMPT} --interactive", "--interactive: not allowed with argument --prompt"),
    ("temperature-unused", f"{PROMPT} --temperature 0.5", "--temperature: needs --do_sample: add it or remove this"),
    ("score-own-column", f"{SCORE} --prediction_column output", "--prediction_column: output: is also --reference_col",
     make("answers.jsonl", ROW_LINE)),
]

ROWS = [
    ("rows-missing", f"{TRAIN} --train_path no.json", r"--train_path no\.json: no such file or folder: check the path"),
    ("rows-folder-empty", f"{TRAIN} --train_path d", r"d: no \*\.json or \*\.jsonl file in this", make("d/a.txt", "x")),
    ("rows-empty", TRAIN, r"rows\.json: no row in it: give at least one", rows("")),
    ("rows-blank", TRAIN, r"rows\.json: no row in it: give at least one", rows("\n \n\n")),
    ("rows-empty-array", TRAIN, r"rows\.json: no row in it: give at least one", rows("[]")),
    ("row-broken", TRAIN, r"rows\.json:2: '\{': not a JSON object", rows(lines(ROW_LINE, "{"))),
    ("row-over-lines-broken", TRAIN, r"rows\.json:2: not a JSON object",
     rows(json.dumps(ROW, indent=1).replace(":", ""))),
    ("rows-over-lines-with-commas", TRAIN, r"rows\.json:5: not a JSON object .*: remove the comma behind the object",
     rows(",\n".join([json.dumps(ROW, indent=1)] * 2))),
    ("row-ends-with-a-comma", TRAIN, r"rows\.json:1: .*: remove the comma behind the object, or put \[ \] around all",
     rows(f"{ROW_LINE},\n{ROW_LINE},\n")),
    ("array-ends-with-a-comma", TRAIN, r"rows\.json:2: not a JSON array .*: remove the comma before \]",
     rows(f"[{ROW_LINE},\n]")),
    ("rows-of-python", TRAIN, r"rows\.json:1: .*: it is a Python dict: write rows with json\.dumps", rows(str(ROW))),
    ("rows-under-a-key", TRAIN, r"rows\.json:1: one object with the rows under 'data': give the list itself \(jq",
     rows(json.dumps({"data": [ROW]}))),
    ("rows-in-dataset-info", TRAIN, r"rows\.json:1: a list of data sets \(dataset_info\.json\): name the files",
     rows(json.dumps({"mine": {"file_name": "mine.json"}}, indent=2))),
    ("rows-as-lfs-pointer", TRAIN, r"rows\.json: is a Git LFS pointer, .*: fetch the file itself with git lfs pull",
     rows("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    ("rows-as-web-page", TRAIN, r"rows\.json: is a web page: download the file itself", rows("\n<!DOCTYPE html>")),
    ("rows-as-zip", TRAIN, r"rows\.json: is a zip archive: unpack it first", rows(b"PK\x03\x04a")),
    ("rows-as-gzip", TRAIN, r"rows\.json: is a gzip archive: unpack it first", rows(b"\x1f\x8b\x08a")),
    ("rows-as-csv", TRAIN, r"rows\.json: is a table .*CSV.*: convert it to JSON L", rows("instruction,output\na,b")),
    ("row-with-history", TRAIN, r"rows\.json:2: field 'history' would be ignored: it holds earlier turns",
     rows(lines(ROW_LINE, row(history=[["a", "b"]])))),
    ("row-with-messages", ANSWER, r"rows\.json:1: field 'messages' would be ignored: it holds several turns",
     rows('{"messages": [{"role": "user", "content": "a"}]}')),
    ("answer-row-is-true", ANSWER, r"rows\.json:1: field 'output' is true or false: it must", rows(row(output=True))),
    ("row-of-zeros", TRAIN, r"rows\.json:2: .*not a JSON object", rows(ROW_LINE.encode() + b"\n" + bytes(9))),
    ("array-broken", TRAIN, r"rows\.json:3: not a JSON array \(Expecting .*\): remove the comma",
     rows(f"[{ROW_LINE},\n{ROW_LINE},\n{{,}}]")),
    ("array-cut-off", TRAIN, r"rows\.json:2: not a JSON array", rows(f"[{ROW_LINE},\n{ROW_LINE}")),
    ("array-of-arrays", TRAIN, r"rows\.json:row 2: an array, not an object", rows(f"[{ROW_LINE}, []]")),
    ("row-number", TRAIN, r"rows\.json:2: a number, not an object", rows(lines(ROW_LINE, "3"))),
    ("answer-missing", TRAIN, r"rows\.json:1: no field 'output'", rows('{"instruction": "a", "input": ""}')),
    ("answer-list", TRAIN, r"rows\.json:1: field 'output' is an array: it must be a string", rows(row(output=["a"]))),
    ("answer-nan", TRAIN, r"rows\.json:1: field 'output' is NaN, which is no JSON: it must be", rows(row(output=NAN))),
    ("answer-empty", TRAIN, r"rows\.json:1: field 'output' is empty: a row needs an answer", rows(row(output=" "))),
    ("question-empty", TRAIN, r"rows\.json:1: instruction and input empty: a row needs", rows(row(instruction=""))),
    ("question-null", TRAIN, r"rows\.json:1: field 'instruction' is null: it must be", rows(row(instruction=None))),
    ("row-not-utf-8", TRAIN, r"rows\.json:2: not UTF-8 \(invalid start byte at byte 7 of the line\): save the file",
     rows(ROW_LINE.encode() + b'\n{"a": "\xff"}')),
    ("rows-utf-16", TRAIN, r"rows\.json:1: not UTF-8", rows(ROW_LINE.encode("utf-16"))),
    ("row-half-a-pair", TRAIN, r"rows\.json:1: field 'output' holds half a surrogate pair", rows(row(output="\ud83d"))),
    ("rows-nested-array", TRAIN, r"rows\.json: not a JSON array \(.*\): give rows of plain", rows("[" * 10**5)),
    ("rows-nested-object", TRAIN, r"rows\.json:1: .{,80}: not a JSON object \(.*recursion", rows('{"a":' * 10**5)),
    ("rows-are-weights", f"{TRAIN} --train_path {{glm3}}/{SHARDS[0]}", r"\.bin: is a file of weights: give what"),
    ("rows-locked", TRAIN, r"rows\.json: cannot be read \(Permission denied\): check its", permissions("rows.json", 0)),
    ("row-in-second-file", f"{TRAIN} --train_path d", r"d/b\.json:1: a string, not an object",
     both(make("d/a.json", ROW_LINE), make("d/b.json", '"a"'))),
    ("rows-all-left-out", f"{TRAIN} --is_skip --max_len 32 --max_src_len 16",
     r"rows\.json: --is_skip left no row of 1: raise --max_len or --max_src_len", rows(row(instruction="水" * 100))),
    ("answer-row-bad", ANSWER, r"rows\.json:2: no field 'instruction'", rows(lines(ROW_LINE, '{"input": "a"}'))),
    ("score-file-missing", SCORE, r"--predictions: answers\.jsonl: cannot be read"),
    ("score-row-bad", SCORE, r"answers\.jsonl:1: .*has no column", make("answers.jsonl", '{"prediction": "a"}')),
    ("score-not-utf-8", SCORE, r"answers\.jsonl:1: byte 0xff: not UTF-8: save", make("answers.jsonl", b"\xff")),
]

PLACES = [
    ("output-not-empty", TRAIN, "--output_dir out: is not empty: choose a new folder", make("out/a.txt")),
    ("output-is-a-file", TRAIN, "--output_dir out: is a file: choose a folder", make("out")),
    ("output-below-a-file", f"{TRAIN} --output_dir rows.json/out", r"--output_dir rows\.json/out: .* is a file"),
    ("output-read-only", f"{TRAIN} --output_dir d/out", "--output_dir d/out: .*d is read-", permissions("d", 0o555)),
    ("output-name-too-long", f"{TRAIN} --output_dir {'a' * 300}", "--output_dir a+: "),
    ("output-is-the-model", f"{TRAIN_MODEL} --output_dir model", "model: is the model's own folder: choose", model()),
    ("answers-exist", ANSWER, r"--output_path out\.jsonl: exists: choose another or add", make("out.jsonl")),
    ("answers-over-the-rows", f"{ANSWER} --output_path rows.json --overwrite", r"rows\.json: is the input: choose"),
    ("merged-exists", MERGE, "--output_dir out: exists: choose a new folder", both(saved(adapter), make("out/a"))),
    ("score-folder-missing", f"{SCORE} --output_path no/scores.json", r"no/scores\.json: its folder does not exist",
     make("answers.jsonl", '{"prediction": "a", "output": "b"}')),
]

MODELS = [
    ("model-missing", f"{TRAIN} --model_name_or_path nowhere", "--model_name_or_path nowhere: no such folder: give"),
    ("model-is-a-file", f"{TRAIN} --model_name_or_path rows.json", r"rows\.json: is a file: name the checkpoint's"),
    ("model-not-on-hub", f"{TRAIN} --model_name_or_path no/where", "no/where: cannot be fetched from the hub"),
    # config.json and other settings
    ("config-missing", TRAIN_MODEL, r"model: no config\.json in it: name a folder", model(drop("config.json"))),
    ("config-broken", TRAIN_MODEL, r"config\.json: cannot be read as JSON", model(put("config.json", "{"))),
    ("config-not-utf-8", TRAIN_MODEL, r"config\.json: cannot be read", model(put("config.json", b'{"a": "\xff"}'))),
    ("config-array", TRAIN_MODEL, r"config\.json: is a list, not a JSON object", model(put("config.json", "[]"))),
    ("config-nested-deeply", TRAIN_MODEL, r"config\.json: cannot be read", model(put("config.json", '{"a":' * 10**5))),
    ("config-of-a-llama", TRAIN_MODEL, r"config\.json: is of LLaMA \(model_type = llama\), which is not supported",
     model(put("config.json", '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4}'))),
    ("config-of-another-family", f"{TRAIN_MODEL} --mode glm3", r"--mode glm3: config\.json of model is of glm: change",
     model(put("config.json", (FOLDERS["glm"] / "config.json").read_bytes()))),
    ("config-size-negative", TRAIN_MODEL, r"model/config\.json: .*-(64|128)", config(ffn_hidden_size=-64)),
    ("config-size-zero", PROMPT_MODEL, r"model/config\.json: ", config(multi_query_group_num=0)),
    ("config-size-as-text", TRAIN_MODEL, r"model/config\.json: num_layers = 'four'", config(num_layers="four")),
    ("config-size-fraction", TRAIN_MODEL, r"model/config\.json: ", config(num_layers=3.5)),
    ("config-layers-enormous", TRAIN_MODEL, rf"model/config\.json: num_layers = {LARGE}", config(num_layers=LARGE)),
    ("config-width-enormous", PROMPT_MODEL, r"model(/config\.json)?: ", config(hidden_size=LARGE)),
    ("config-heads-negative", PROMPT_MODEL, r"model/config\.json: num_attention_heads",
     config(num_attention_heads=-2, mode="glm")),
    ("config-epsilon-nan", PROMPT_MODEL, r"model/config\.json: layernorm_epsilon", config(layernorm_epsilon=NAN)),
    ("config-rope-zero", PROMPT_MODEL, r"model/config\.json: rope_ratio", config(rope_ratio=0)),
    ("config-dropout-above-1", TRAIN_MODEL, r"model/config\.json: attention_dropout", config(attention_dropout=1.5)),
    ("config-other-network", TRAIN_MODEL, r"config\.json: rmsnorm = False: only True is", config(rmsnorm=False)),
    ("config-quantised", TRAIN_MODEL, r"config\.json: quantization_bit = 4: .* fp16 rel", config(quantization_bit=4)),
    ("generation-config-array", PROMPT_MODEL, r"model/generation_config\.json: is a list, not a JSON object",
     model(put("generation_config.json", "[]"))),
    ("generation-config-type", PROMPT_MODEL, r"model/generation_config\.json: ",
     model(put("generation_config.json", '{"temperature": "warm"}'))),
    ("tokenizer-missing", PROMPT_MODEL, r"model/tokenizer\.model: missing: copy it", model(drop("tokenizer.model"))),
    ("tokenizer-spoilt", TRAIN_MODEL, r"tokenizer\.model: not a sentence", model(put("tokenizer.model", "x" * 99))),
    ("tokenizer-of-another-family", TRAIN_MODEL, r"model: \w+ is \d+ in config\.json but .* of different releases",
     model(put("ice_text.model", (FOLDERS["glm3"] / "tokenizer.model").read_bytes()), mode="glm")),
    ("tokenizer-config-array", TRAIN_MODEL, r"tokenizer_config\.json: is a list", model(put(TOKENIZER_CONFIG, "[]"))),
    ("tokenizer-config-type", PROMPT_MODEL, r"model\S*: .*eos_t", model(change_json(TOKENIZER_CONFIG, eos_token=[5]))),
    # where weights lie
    ("weights-missing", TRAIN_MODEL, "model: no weights in it", model(drop("pytorch_model*"))),
    ("shard-missing", PROMPT_MODEL, rf"model/{SHARDS[1]}: missing, but {INDEX} names it", model(drop(SHARDS[1]))),
    ("index-outside", TRAIN_MODEL, r"index\.json: names '\.\./rows\.json', outside its folder: do not use",
     model(weight_map({"a": "../rows.json"}))),
    ("index-to-root", PROMPT_MODEL, "names '/etc/passwd', outside its folder", model(weight_map({"a": "/etc/passwd"}))),
    ("index-to-a-folder", PROMPT_MODEL, rf"model/sub: missing, but {INDEX} names it",
     model(weight_map({"a": "sub"}), make("sub/a"))),
    ("index-to-its-folder", PROMPT_MODEL, r"model/\.: missing, but", model(weight_map({"a": "."}))),
    ("index-to-settings", PROMPT_MODEL, r"model/config\.json: .*do not use", model(weight_map({"a": "config.json"}))),
    ("index-broken", TRAIN_MODEL, r"index\.json: cannot be read as JSON", model(put(INDEX, "{"))),
    ("index-nested-deeply", TRAIN_MODEL, r"index\.json: cannot be read", model(put(INDEX, '{"a":' * 10**5))),
    ("index-of-numbers", TRAIN_MODEL, "weight_map is not a table of file names", model(weight_map({"a": 1}))),
    ("index-exchanged", TRAIN_MODEL, rf"model: \S+ is in {SHARDS[0]}, the index says {SHARDS[1]}: the files do not",
     model(index(lambda table: table.update(dict.fromkeys(table, SHARDS[1]), other=SHARDS[0])))),
    ("index-without-a-shard", PROMPT_MODEL, "model: .* is missing.*: download",
     model(index(lambda table: [table.pop(name) for name in list(table) if table[name] == SHARDS[1]]))),
    ("weight-twice", TRAIN_MODEL, rf"model: \S+ is in both {SHARDS[0]} and {SHARDS[1]}: ", model(in_both_shards)),
    # .bin files
    ("bin-attack", TRAIN_MODEL, f"{SHARDS[1]}: holds more than tensors.*: do not use it", model(attack(SHARDS[1]))),
    ("bin-attack-first", PROMPT_MODEL, f"model/{SHARDS[0]}: holds more than tensors", model(attack(SHARDS[0]))),
    ("bin-attack-pickle", PROMPT_MODEL, f"{SHARDS[0]}: holds more than tensors", model(attack(SHARDS[0], 2))),
    ("bin-attack-new-pickle", PROMPT_MODEL, f"{SHARDS[0]}: holds more than tensors", model(attack(SHARDS[0], 4))),
    ("bin-cut-off", TRAIN_MODEL, f"model/{SHARDS[0]}: truncated or not a weight file", model(cut(SHARDS[0]))),
    ("bin-empty", TRAIN_MODEL, f"model/{SHARDS[0]}: truncated or not a weight file", model(put(SHARDS[0], ""))),
    ("bin-page", TRAIN_MODEL, f"model/{SHARDS[0]}: is a web page", model(put(SHARDS[0], "<html>404</html>"))),
    ("bin-compressed", TRAIN_MODEL, f"model/{SHARDS[0]}: .*(compressed|truncated)", model(compressed)),
    ("bin-names-are-numbers", TRAIN_MODEL, "not a plain table of tensors",
     model(one_file(lambda state: dict(enumerate(state.values())), BIN))),
    ("bin-sparse", TRAIN_MODEL, "not a plain table of tensors", model(output_layer(torch.Tensor.to_sparse))),
    ("bin-without-data", TRAIN_MODEL, "not a plain table of tensors", model(output_layer(lambda t: t.to("meta")))),
    ("bin-beyond-its-memory", PROMPT_MODEL, r"pytorch_model\.bin: truncated or not a weight file",
     model(output_layer(lambda t: Rebuilt(t[:2].clone(), (1280, 64), (64, 1))))),
    ("bin-expanded", TRAIN_MODEL, rf"{BIN}: {OUTPUT_LAYER} claims more than is stored of it: do not use it",
     model(output_layer(lambda t: torch.zeros(1, dtype=t.dtype).expand(LARGE, 64)))),
    ("bin-8-bits", TRAIN_MODEL, r"is quantised \(int8\): use the", model(output_layer(lambda t: t.to(torch.int8)))),
    ("bin-64-bits", TRAIN_MODEL, r"is of an unusual type \(float64\)", model(output_layer(torch.Tensor.double))),
    ("bin-complex", PROMPT_MODEL, r"is of an unusual type \(complex64\)", model(output_layer(torch.Tensor.cfloat))),
    ("bin-bool", PROMPT_MODEL, r"is of an unusual type \(bool\)", model(output_layer(torch.Tensor.bool))),
    ("name-with-an-escape", TRAIN_MODEL, "is not of --mode glm3",
     model(one_file(lambda state: {**state, "\x1b[2Jx": torch.ones(1)}))),
    # .safetensors files
    ("safetensors-cut-off", TRAIN_MODEL, r"model/model\.safetensors: truncated or not safetensors \(.*\): download it",
     model(one_file(), cut(SAFE, 0.9))),
    ("safetensors-oversized", TRAIN_MODEL, r"model/model\.safetensors: truncated or not safetensors \(.*\): download",
     model(one_file(), append(SAFE, bytes(4096)))),
    ("safetensors-header-enormous", PROMPT_MODEL, r"model\.safetensors: truncated or not safetensors",
     model(put(SAFE, struct.pack("<Q", 2**63) + b"{}"))),
    ("safetensors-header-not-json", PROMPT_MODEL, r"model\.safetensors: truncated or not safetensors",
     model(put(SAFE, struct.pack("<Q", 4) + b"oops"))),
    ("safetensors-shape-enormous", PROMPT_MODEL, "truncated or not safetensors", model(claim(shape=[LARGE, LARGE]))),
    ("safetensors-shape-negative", PROMPT_MODEL, "truncated or not safetensors", model(claim(shape=[-1280, -64]))),
    ("safetensors-beyond-the-file", PROMPT_MODEL, "truncated or not", model(claim(data_offsets=[0, 10**9]))),
    ("weight-of-another-shape", TRAIN_MODEL, rf"model: {OUTPUT_LAYER} has shape \[1280, 3\], .* needs \[1280, 64\]: ",
     model(output_layer(lambda t: t[:, :3].contiguous(), SAFE))),
    ("weight-missing", TRAIN_MODEL, rf"model: {OUTPUT_LAYER} is missing: download", model(one_file(without))),
    ("weight-unexpected", TRAIN_MODEL, "model: extra is not of --mode glm3: wrong --mode or files",
     model(one_file(lambda state: {**state, "extra": torch.zeros(1)}))),
    ("weights-of-8-bits", f"{MERGE} --model_name_or_path model", r"is quantised \(F8_E4M3\): use the fp16 release",
     both(saved(adapter), model(one_file(all_as(torch.float8_e4m3fn))))),
    ("weights-of-more-layers", TRAIN_MODEL, r"is not of --mode glm3 \(and 6 others\): wrong", config(num_layers=3)),
]

SAVED = [
    ("run-broken", PROMPT_SAVED, r"saved/run\.json: cannot be read as JSON", saved(adapter, put("run.json", "{"))),
    ("run-of-unknown-mode", PROMPT_SAVED, r"saved/run\.json: mode is 'glm9'", saved(adapter, mode="glm9")),
    ("run-of-unknown-weights", PROMPT_SAVED, r"run\.json: weights is 'delta'", saved(adapter, weights="delta")),
    ("run-weights-array", PROMPT_SAVED, r"run\.json: weights is \['adapter'\]", saved(adapter, weights=["adapter"])),
    ("base-moved", PROMPT_SAVED, "base model /gone is not there: give its place", saved(adapter, base_model="/gone")),
    ("base-of-another-family", PROMPT_SAVED, "is of glm, but the run is of glm3: give",
     saved(adapter, base_model=str(FOLDERS["glm"]))),
    ("base-is-itself", PROMPT_SAVED, "saved: no weights in it", saved(adapter, base_model="saved")),
    # adapters
    ("adapter-missing", PROMPT_SAVED, r"saved/adapter_model\.safetensors: missing, but run\.json says", saved()),
    ("adapter-as-pickle", PROMPT_SAVED, rf"saved/{ADAPTER}: missing, but", saved(attack("adapter_model.bin"))),
    ("adapter-cut-off", PROMPT_SAVED, f"saved/{ADAPTER}: truncated", saved(adapter, cut(ADAPTER, 0.9))),
    ("adapter-oversized", PROMPT_SAVED, f"saved/{ADAPTER}: truncated", saved(adapter, append(ADAPTER, b"x"))),
    ("adapter-tokenizer-missing", PROMPT_SAVED, r"tokenizer\.model: missing", saved(adapter, drop("tokenizer.model"))),
    ("adapter-of-another-model", f"{PROMPT_SAVED} --model_name_or_path model",
     rf"saved/{ADAPTER}: .* has shape \(128, 4\), the base model needs \(384, 4\): it is of another base model",
     both(saved(adapter), model(wider_heads))),
    ("adapter-8-bits", PROMPT_SAVED, f"saved/{ADAPTER}: .*quantised", saved(adapter, tensors(all_as(torch.int8)))),
    ("adapter-with-more", PROMPT_SAVED, f"saved/{ADAPTER}: extra is of a layer that",
     saved(adapter, tensors(lambda state: {**state, "extra": torch.ones(1)}))),
    ("settings-missing", PROMPT_SAVED, f"saved/{SETTINGS}: missing", saved(adapter, drop(SETTINGS))),
    ("settings-broken", PROMPT_SAVED, f"saved/{SETTINGS}: cannot be read", saved(adapter, put(SETTINGS, "{"))),
    ("settings-array", PROMPT_SAVED, f"saved/{SETTINGS}: is a list", saved(adapter, put(SETTINGS, "[]"))),
    ("settings-of-prompts", PROMPT_SAVED, f"saved/{SETTINGS}: peft_type", settings(peft_type="PROMPT_TUNING")),
    ("settings-of-ia3", MERGE, f"saved/{SETTINGS}: peft_type", settings(peft_type="IA3")),
    ("settings-of-nothing", PROMPT_SAVED, f"saved/{SETTINGS}: peft_type", settings(peft_type="MAGIC")),
    ("settings-rank", PROMPT_SAVED, r"saved/adapter_\S+: .*(\br\b.* 8|has shape)", settings(r=8)),
    ("settings-rank-merged", MERGE, r"saved/adapter_\S+: .*(\br\b.* 8|has shape)", settings(r=8)),
    ("settings-rank-zero", PROMPT_SAVED, rf"saved/{SETTINGS}: .*\br\b", settings(r=0)),
    ("settings-rank-as-text", PROMPT_SAVED, rf"saved/{SETTINGS}: .*\br\b", settings(r="4")),
    ("settings-rank-enormous", PROMPT_SAVED, r"saved/adapter_\S+: .*(\br\b|has shape)", settings(r=10**9)),
    ("settings-alpha-nan", PROMPT_SAVED, f"saved/{SETTINGS}: .*lora_alpha", settings(lora_alpha=NAN)),
    ("settings-other-modules", PROMPT_SAVED, r"saved/adapter_\S+: ", settings(target_modules=["dense"])),
    ("settings-no-module", PROMPT_SAVED, r"saved/adapter_\S+: .*q_proj", settings(target_modules=["q_proj"])),
    ("settings-import", PROMPT_SAVED, f"saved/{SETTINGS}: megatron", settings(megatron_config={}, megatron_core="os")),
    ("settings-doubled-layers", PROMPT_SAVED, f"saved/{SETTINGS}: layer_r", settings(layer_replication=[[0, 4]] * 2)),
    ("settings-unknown", PROMPT_SAVED, f"saved/{SETTINGS}: use_magic", settings(use_magic=True)),
    # prefix encoders
    ("prefix-missing", PROMPT_SAVED, r"saved/prefix_encoder\.safetensors: missing", saved(weights="prefix")),
    ("prefix-config-missing", PROMPT_SAVED, r"saved/config\.json: cannot be read", prefix_run(drop("config.json"))),
    ("prefix-of-another-length", PROMPT_SAVED, r"prefix_encoder\.safetensors: .* has shape \(8, 256\), the base model",
     prefix_run(change_json("config.json", pre_seq_len=4))),
    ("prefix-length-as-text", PROMPT_SAVED, r"saved/config\.json: .*pre_seq_len",
     prefix_run(change_json("config.json", pre_seq_len="eight"))),
    ("prefix-length-enormous", PROMPT_SAVED, r"saved/\S+: ", prefix_run(change_json("config.json", pre_seq_len=LARGE))),
    ("prefix-projection-as-text", PROMPT_SAVED, r"saved/config\.json: .*prefix_projection",
     prefix_run(change_json("config.json", prefix_projection="False"))),
    ("model-and-adapter-in-one", PROMPT_MODEL, r"model: holds an adapter .* and whole weights: move one of them",
     model(one_file(), attack("adapter_model.bin"))),
    # merging
    ("merge-of-no-run", MERGE.replace("saved", "{glm3}"), "holds a whole model, which needs no merging"),
    ("merge-of-a-prefix", MERGE, "saved: holds a prefix encoder, which cannot be merged", prefix_run()),
    ("merge-twice", MERGE.replace("saved", "model"), "model: holds a whole model, which needs no merging",
     model(put("run.json", '{"mode": "glm3", "weights": "whole"}'))),
    ("merge-base-cut-off", f"{MERGE} --model_name_or_path model", f"model/{SHARDS[0]}: truncated",
     both(saved(adapter), model(cut(SHARDS[0])))),
]

GOOD = [
    ("good-adapter", PROMPT_SAVED, "", saved(adapter, BYSTANDERS), 0, 0),
    ("good-prefix", PROMPT_SAVED, "", prefix_run(BYSTANDERS), 0, 0),
    ("good-model-with-bystanders", PROMPT_MODEL, "", model(one_file(), BYSTANDERS, drop("adapter_model.bin")), 0, 0),
    ("good-model-of-links", PROMPT_MODEL, "", model(links), 0, 0),
]
# fmt: on

TABLE = [BadInput(*values) for values in [*FLAGS, *ROWS, *PLACES, *MODELS, *SAVED, *GOOD]]
NEED_PERMISSIONS = ("rows-locked", "output-read-only")


# ---------------------------------------------------------------- running


@functools.cache
def plain_user():
    """Words in front of a command that make permissions count, which the superuser is above; None if that fails."""
    if os.geteuid() != 0:
        return []
    rights = "-dac_override,-dac_read_search"
    words = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    return words if shutil.which(words[0]) and subprocess.run([*words, "true"]).returncode == 0 else None


def files_in(folder):
    """Everything in a folder, with what tells a change of it."""
    return {
        str(path): (os.lstat(path).st_size, os.lstat(path).st_mtime_ns, os.lstat(path).st_mode)
        for path in folder.rglob("*")
    }


def problems_of(bad, folder):
    """Run one line of the table in an empty folder; a list of what is not as it should be."""
    place = folder / f"case-{bad.id}" / "here"
    place.mkdir(parents=True)
    put("rows.json", ROW_LINE)(place)
    bad.prepare(place)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"HF_DATASETS_CACHE": str(place.parent / "cache"), "HF_HUB_CACHE": str(place.parent / "hub")}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    script, *words = shlex.split(bad.command.format(**{name: shlex.quote(str(path)) for name, path in FOLDERS.items()}))
    limited = ["bash", "-c", f'ulimit -v {MEMORY_LIMIT}; exec "$@"', "bash", *(plain_user() or [])]
    before = files_in(place)
    try:
        done = subprocess.run(
            [*limited, sys.executable, str(ROOT / script), *words],
            cwd=place,
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return [f"still running after {TIME_LIMIT} s"]
    output, errors = (text.decode("utf-8", "backslashreplace") for text in (done.stdout, done.stderr))
    said = errors.splitlines()
    problems = []
    if done.returncode != bad.code:
        problems.append(f"exit code {done.returncode}, not {bad.code}")
    if len(said) != bad.num_lines or not all(line.startswith(f"{script}: error: ") for line in said):
        problems.append(f"stderr has {len(said)} lines, not {bad.num_lines} of {script}: error:")
    if not re.search(bad.says, errors):
        problems.append(f"stderr does not say {bad.says!r}")
    if re.search(r"[\x00-\x09\x0b-\x1f\x7f]", errors):
        problems.append("stderr holds control characters")
    if "Traceback" in output + errors:
        problems.append("a traceback")
    if files_in(place) != before:
        changed = sorted(dict(files_in(place).items() ^ before.items()))
        problems.append(f"written: {', '.join(os.path.relpath(path, place) for path in changed[:5])}")
    if marker(place).exists():
        problems.append("code in a file was run")
    return [*problems, f"stderr: {errors[-2000:].strip()}"] if problems else []


def run_table(table, folder, jobs=1):
    """Run lines of the table, `jobs` at a time; {id: problems} of those that are not as they should be."""
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip((bad.id for bad in table), pool.map(lambda bad: problems_of(bad, folder), table)))
    return {name: problems for name, problems in found.items() if problems}


def main(argv):
    """Run the table, print what fails, write the counts; the exit code is 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the counts")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--only", default="", help="pattern of the ids to run; left out: all")
    args = parser.parse_args(argv)
    assert len({bad.id for bad in TABLE}) == len(TABLE), "two lines of the table have one id"
    table = [bad for bad in TABLE if re.search(args.only, bad.id)]
    if plain_user() is None:
        print(f"left out, since the superuser is above permissions: {', '.join(NEED_PERMISSIONS)}")
        table = [bad for bad in table if bad.id not in NEED_PERMISSIONS]
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        failed = run_table(table, Path(folder), args.jobs)
    seconds = round(time.time() - start, 1)
    for name, problems in failed.items():
        print(f"{name}: {'; '.join(problems)}")
    counts = {
        "total": len(table),
        "as_documented": len(table) - len(failed),
        "failed": list(failed),
        "seconds": seconds,
    }
    print(f"{counts['as_documented']} of {counts['total']} as documented, {seconds} s")
    if args.json:
        Path(args.json).write_text(json.dumps(counts, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
