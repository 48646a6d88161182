"""Files that nobody would write by hand, given to the code that reads them: each must be taken or refused in one line.

    python scripts/fuzz.py                              # 10,000 files, some minutes on two cores
    python scripts/fuzz.py --inputs 300 --only pickle   # some of one kind
    python scripts/fuzz.py --only yaml --first 471 --inputs 1   # the file that was called "yaml 471", again

From valid files (the small checkpoints of tests/golden, rows, a YAML file, replies of a judge) it makes others, by
their grammar: a value of another kind, a key gone, twice or of another library, numbers without end, an opcode more,
bytes cut or turned. They are read in forked processes, so that nothing is imported again, each with {memory} GB of
address space above what it began with and {seconds} s for a file. Anything but success and a UserError is a problem,
and so is a process that dies or hangs; the file is then kept in --keep. The same seed makes the same files.
bash scripts/soak.sh --only fuzz writes the figures into docs/reliability.md.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402, the path comes first
from safetensors.torch import save_file  # noqa: E402

from checkpoints import (
    adapter_settings,  # noqa: E402
    bases,  # noqa: E402
    opening,  # noqa: E402
    state_checks,
    states,
    trained_weights,  # noqa: E402
    weight_files,  # noqa: E402
)
from checkpoints.progress import Progress  # noqa: E402
from comparison import plan  # noqa: E402
from evaluation import predictions  # noqa: E402
from generation import lengths  # noqa: E402
from judging import (
    endpoint,  # noqa: E402
    pairs,  # noqa: E402
    questions,  # noqa: E402
)
from modes import MODES, possible_modes  # noqa: E402
from rows import (
    checks,
    encoding,
    reading,  # noqa: E402
)
from runtime import (
    folders,  # noqa: E402
    streams,  # noqa: E402
)
from runtime.exits import UserError  # noqa: E402
from training import (
    ds_config,  # noqa: E402
    resuming,  # noqa: E402
)

GOLDEN = {name: ROOT / "tests" / "golden" / mode.package for name, mode in MODES.items()}
MEMORY, SECONDS, GRACE, NUM_INPUTS = 2 << 30, 30, 5, 10_000  # GRACE: seconds for an alarm to be heard
KEEP = ROOT / "output" / "fuzz"
SAFE, BIN, INDEX = "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"
ROW = {"instruction": "发动机水温高，", "input": "怎么办？", "output": "检查冷却液。"}


# ---------------------------------------------------------------- JSON that is nearly right


class Raw(str):
    """A piece of JSON text that no Python value stands for."""


DEEP = Raw("[" * 5000 + "]" * 5000)
VALUES = [  # what is put in place of a value
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-300, 1e300, 10**8, 2**31, 2**63, 10**12, -(10**12)),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("1." + "0" * 3000 + "1"), DEEP),
    *("", "a", "0", "four", "../../etc/passwd", "/dev/zero", "x" * 3000, "\0", "\u202e\x1b[31m", Raw('"\\ud800"')),
    *("kernels-community/x", "float16", "load", "sdpa", "LORA", "whole", "evil/evil@main"),
    *([], {}, [[]], [None], ["a"], [1, 2, 3], {"a": 1}, {"": "evil/evil"}, {"0": {"a": []}}, [{}] * 5, [10**9] * 3),
]
KEYS = (  # of other files and of libraries: what a key is renamed to, or added as
    "_attn_implementation attn_implementation _attn_implementation_internal experts_implementation num_labels id2label"
    " label2id pruned_heads auto_map quantization_config torch_dtype dtype per_layer_config use_kernels kernel_config"
    " configuration_files vocab_size head_dim num_hidden_layers rope_scaling pre_seq_len prefix_projection"
    " quantization_bit tie_word_embeddings is_encoder_decoder problem_type name_or_path added_tokens_decoder"
    " extra_special_tokens chat_template padding_side backend bos_token eos_token model_max_length tokenizer_class"
    " modules_to_save target_modules rank_pattern alpha_pattern layers_to_transform peft_type r lora_alpha"
    " bias use_dora exclude_modules layers_pattern"
    " init_lora_weights base_model_name_or_path weight_map metadata __metadata__"
    " weights mode base_model base_fingerprint flags progress split world_size fingerprint files history messages"
    " instruction output __class__ __init__ self dict"
).split()


def places(value, path=()):
    """Paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def change_json(value, rng):
    """Change one thing in a JSON value, in place where it can be; returns the value."""
    path = rng.choice(list(places(value)))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    new = copy.deepcopy(rng.choice(VALUES))
    if not path:
        if isinstance(value, dict) and rng.random() < 0.9:
            value[rng.choice(KEYS)] = new
            return value
        return new
    last, kind = path[-1], rng.random()
    if isinstance(parent, dict) and kind < 0.15:
        del parent[last]
    elif isinstance(parent, dict) and kind < 0.25:
        parent[rng.choice(KEYS)] = parent.pop(last)
    elif isinstance(parent, dict) and kind < 0.35:
        parent[rng.choice(KEYS)] = new
    elif kind < 0.45:
        parent[last] = [parent[last]] if rng.random() < 0.5 else {"a": parent[last]}
    elif kind < 0.55 and type(parent[last]) in (int, float):
        parent[last] = rng.choice(
            (parent[last] + 1, parent[last] - 1, -parent[last], parent[last] * 2, str(parent[last]))
        )
    else:
        parent[last] = new
    return value


def json_text(value, rng):
    """JSON of a value; seldom a key stands twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        items = list(value.items())
        if items and rng.random() < 0.01:
            items.append(rng.choice(items))
        return "{" + ", ".join(f"{json.dumps(str(key))}: {json_text(part, rng)}" for key, part in items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(json_text(part, rng) for part in value) + "]"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def change_bytes(content, rng, most=4):
    """Cut, turn, add or repeat some bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, most)):
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 100))
        kind = rng.randrange(6)
        if kind == 0:
            del content[at : at + size]
        elif kind == 1:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            content[at:at] = rng.randbytes(size)
        elif kind == 3:
            content[at:at] = content[at : at + size]
        elif kind == 4:
            content[at:at] = rng.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"]", b",", b"\\u0000"))
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def json_file(value, rng):
    """The bytes of a JSON file that is nearly the value's."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = change_json(value, rng)
    content = json_text(value, rng).encode("utf-8", "surrogatepass")
    return change_bytes(content, rng) if rng.random() < 0.15 else content


# ---------------------------------------------------------------- pickles and headers that are nearly right

PIECES = [  # opcodes that are put in: calls, memory, marks, what torch allows and what it does not
    *(b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R", b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R", b"cos\nsystem\n"),
    *(b"ccollections\nOrderedDict\n)R", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"),
    *(b"}", b"]", b")", b"(", b"t", b"N", b"\x88", b"0", b"2", b".", b"s", b"u", b"a", b"e", b"b", b"R", b"\x81", b"Q"),
    *(
        b"h\0",
        b"q\0",
        b"j\xff\xff\xff\xff",
        b"r\xff\xff\xff\x7f",
        b"K\x01",
        b"J\0\0\0\x80",
        b"\x8a\xff" + b"\xff" * 255,
    ),
    *(
        b"X\xff\xff\xff\xff",
        b"X\x04\0\0\0abcd",
        b"\x8d" + b"\xff" * 8,
        b"G\x7f\xf8\0\0\0\0\0\0",
        b"\x85",
        b"\x86",
        b"\x87",
    ),
    *(b"q\0h\0\x86" * 50, b"c__builtin__\neval\n", b"\x95\xff\xff\xff\xff\0\0\0\0", b"\x80\x05", b"P1\n", b"I01\n"),
]


def change_pickle(content, rng):
    """Leave out, repeat, exchange or add opcodes, or change an argument's bytes."""
    starts = [position for _, _, position in pickletools.genops(content)]
    parts = [content[a:b] for a, b in itertools.pairwise([*starts, len(content)])]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(len(parts)), rng.randrange(6)
        if kind == 0 and len(parts) > 1:
            del parts[at]
        elif kind == 1:
            parts.insert(at, rng.choice(parts))
        elif kind == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3 and len(parts[at]) > 1:
            parts[at] = parts[at][:1] + change_bytes(parts[at][1:], rng, 1)
        elif kind == 4 and parts[at][:1] in (b"K", b"M", b"J", b"\x8a"):
            number = rng.choice((0, 1, 2**31, 2**40, 2**62, 255))
            parts[at] = b"\x8a\x08" + struct.pack("<q", number)
        else:
            parts.insert(at, rng.choice(PIECES))
    return b"".join(parts)


def bin_file(content, rng):
    """A .bin file, new or old, that is nearly this one."""
    if not content.startswith(b"PK"):
        if rng.random() < 0.3:
            return change_bytes(content, rng)
        ends, stream = [0], io.BytesIO(content)
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
            ends.append(stream.tell())
        parts = [content[a:b] for a, b in itertools.pairwise([*ends, len(content)])]
        at = rng.randrange(5)
        parts[at] = change_pickle(parts[at], rng)
        return b"".join(parts)
    if rng.random() < 0.2:
        return change_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [[name, archive.read(name)] for name in archive.namelist()]
    number = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    kind = rng.random()
    if kind < 0.75:
        records[number][1] = change_pickle(records[number][1], rng)
    elif kind < 0.85:
        at = rng.randrange(len(records))
        records[at][1] = rng.choice((b"", records[at][1][:-1], records[at][1] * 2, change_bytes(records[at][1], rng)))
    elif kind < 0.92:
        records.insert(rng.randrange(len(records)), list(rng.choice(records)))
    else:
        del records[rng.randrange(len(records))]
    packed, file = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED, io.BytesIO()
    with zipfile.ZipFile(file, "w", packed) as archive:
        for name, part in records:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two of one name
                archive.writestr(name, part)
    return file.getvalue()


def safetensors_file(content, rng):
    """A .safetensors file that is nearly this one."""
    [size] = struct.unpack("<Q", content[:8])
    if rng.random() < 0.15:
        return change_bytes(content, rng)
    header = json_file(json.loads(content[8 : 8 + size]), rng)
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, 2**27, 2**40, 2**64 - 1))
    return struct.pack("<Q", said) + header + content[8 + size :]


# ---------------------------------------------------------------- text that is nearly right

WORDS = (
    "&a *a <<: !!python/object:os.system !!binary !!timestamp 2020-01-01 0x1F 1_000 1e999 .nan .inf ~ null true yes [ ]"
    " { } - ? : | > ' \" # %YAML --- ... \t \0 \u2028 \u00a0 ﻿ [[5]] [[A]] [[10,10]] 10 10.5 -1 1e9 ９ ５ / , ; ： 、 none"
).split(" ")


def text_file(content, rng):
    """Lines left out, repeated, exchanged or joined, words put in."""
    lines = content.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(lines)), rng.randrange(6)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(at, rng.choice(lines))
        elif kind == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            column = rng.randrange(len(lines[at]) + 1)
            word = rng.choice(WORDS) if kind < 5 else str(rng.choice(VALUES))
            lines[at] = lines[at][:column] + word + lines[at][column + rng.choice((0, 0, 3)) :]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return change_bytes(content, rng) if rng.random() < 0.15 else content


def rows_file(content, rng):
    """JSON Lines, an array, or objects over several lines, nearly right."""
    rows = [json.loads(line) for line in content.splitlines()]
    texts = [json_text(change_json(dict(row), rng) if rng.random() < 0.4 else row, rng) for row in rows]
    kind = rng.randrange(3)
    text = "[" + ",\n".join(texts) + "]" if kind == 0 else "\n".join(texts)
    text = text.replace(", ", ",\n ") if kind == 2 else text
    content = text.encode("utf-8", "surrogatepass")
    return change_bytes(content, rng) if rng.random() < 0.3 else content


# ---------------------------------------------------------------- what is read, and by what


@dataclass(frozen=True)
class Target:
    """A kind of file. seeds: {name: bytes} of valid files; change: a file from one; read: reads the file in a folder.

    home: a folder that is copied, links in it, for the file to lie in; path: its name there.
    """

    path: str
    seeds: Callable
    change: Callable
    read: Callable
    home: Callable = lambda seed, folder: None


def golden_file(name):
    """The seeds of a file of the three small checkpoints."""
    return lambda: {mode: (folder / name).read_bytes() for mode, folder in GOLDEN.items()}


def golden_home(seed, folder):
    """Links to the files of a small checkpoint."""
    for path in GOLDEN[seed].iterdir():
        if not path.name.startswith("golden."):
            (folder / path.name).symlink_to(path)


def as_json(content, rng):
    """`json_file` of a file's bytes."""
    return json_file(json.loads(content), rng)


def read_model(seed, folder):
    """A checkpoint as commands open it, up to its weights."""
    possible_modes(folder)
    opened = opening.open_checkpoint(folder, seed)
    config = opened.config()
    opening.check_opened(opened, config)
    opened.tokenizer(config)
    weight_files.saved_dtype(folder)


def read_and_load(seed, folder):
    """A checkpoint with its weights and settings of generation."""
    opened = opening.open_checkpoint(folder, seed)
    model, tokenizer = opening.load_opened(opened, torch.float32, "cpu")
    bases.base_fingerprint(opened.base_folder, opened.mode, opened.config())
    tokenizer("水温高")


def weights_seeds(old=False):
    """Weights of a small network as torch saves them."""

    def seeds():
        found, table = {}, torch.nn.Linear(3, 2).state_dict()
        more = {"half": torch.ones(4, dtype=torch.float16), "kept": torch.nn.Parameter(torch.zeros(2, 2))}
        for name, value in (("table", table), ("more", {**table, **more}), ("plain", dict(more))):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=not old)
            found[name] = file.getvalue()
        return found

    return seeds


def safetensors_seeds():
    """Weights of two small networks as safetensors."""
    from safetensors.torch import save

    table = torch.nn.Linear(3, 2).state_dict()
    return {"table": save(table), "half": save({"a": torch.ones(4).half(), "b": torch.zeros(0)}, {"format": "pt"})}


def read_weights(seed, folder):
    """A file of weights: header, values, all finite."""
    name = SAFE if os.path.exists(os.path.join(folder, SAFE)) else BIN
    weight_files.file_shapes(os.path.join(folder, name))
    weight_files.finite_problem((name, rows[:]) for name, _, rows in weight_files.stored_tensors(folder))


ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
           "target_modules": ["query_key_value"], "base_model_name_or_path": str(GOLDEN["glm3"]), "rank_pattern": {},
           "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None}  # fmt: skip


def adapter_home(seed, folder):
    """The weights of an adapter of glm3; no run.json, as other tools save it."""
    state = {}
    for i in range(4):
        name = f"base_model.model.transformer.encoder.layers.{i}.self_attention.query_key_value"
        state |= {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.zeros(128, 4)}
    save_file(state, folder / "adapter_model.safetensors")


def run_home(seed, folder):
    """A run's adapter with its settings and tokenizer."""
    adapter_home(seed, folder)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).symlink_to(GOLDEN["glm3"] / name)


def read_adapter(seed, folder):
    """An adapter as commands open it."""
    opened = opening.open_checkpoint(folder, "glm3")
    config = opened.config()
    opening.check_opened(opened, config, allow_other_base=True)
    opened.tokenizer(config)
    adapter_settings.read_settings(folder, bool(opened.run))
    names = argparse.Namespace(model_path=folder, max_src_len=None, max_new_tokens=8, test_path=["x"],
                               prompt_column=None, response_column=None)  # fmt: skip
    lengths.settle_columns(names)
    lengths.settle_lengths(names, config, MODES["glm3"].prompt)
    trained_weights.trained_tensors(opened)


RUN = {
    "mode": "glm3",
    "train_type": "lora",
    "weights": "adapter",
    "base_model": str(GOLDEN["glm3"]),
    "step": 3,
    "flags": {"max_src_len": 48, "prompt_column": None, "response_column": "output"},
    "versions": {"torch": "2.0"},
}
INFO = {"progress": {"step": 4}, "fingerprint": {"--seed": 1}, "split": [1, 2, 1], "world_size": 1}


def state_seeds():
    """state.json of a run."""
    from dataclasses import asdict

    return {"state": json.dumps({**INFO, "progress": {"step": 4, **asdict(Progress())}}).encode()}


def read_state(seed, folder):
    """What --resume looks at of a state."""
    folders.verify(folder)
    info = state_checks.read_info(folder)
    resuming.check_same_run(folder, info, {"--seed": 1}, [1, 2, 1])
    Progress.from_info(info)


def manifest_home(seed, folder):
    """The files that the manifest names."""
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(b"abc")


def manifest_seeds():
    """manifest.json of two files."""
    with tempfile.TemporaryDirectory() as place:
        manifest_home("", pathlib.Path(place))
        folders.seal(place)
        return {"manifest": pathlib.Path(place, folders.MANIFEST).read_bytes()}


def read_manifest(seed, folder):
    """A manifest, and the files that it names."""
    if problems := folders.verify(folder):
        raise UserError(problems[0])


def read_rows(seed, folder):
    """Rows, strictly and with those left out that are not right; one is encoded."""
    path = [os.path.join(folder, "rows.json")]
    reading.files_left([folder])
    left = []
    try:
        rows = list(reading.read_rows(path, checks.Columns(), bad_rows=left))
    except UserError:
        rows = []
    for row in rows[:2]:
        tokenizer = tokenizer_of("glm3")
        encoding.encode_row(row["query"], row["answer"], tokenizer, MODES["glm3"].prompt, 96, 48)
    list(reading.read_rows(path, checks.Columns()))


def tokenizer_of(mode, known={}):  # noqa: B006, kept between calls
    """A small checkpoint's tokenizer."""
    if mode not in known:
        known[mode] = MODES[mode].tokenizer_class.from_pretrained(GOLDEN[mode])
    return known[mode]


def read_score(seed, folder):
    """Predictions as score.py reads them."""
    predictions.read_predictions(os.path.join(folder, "predictions.jsonl"))


COMPLETION = {
    "choices": [{"message": {"content": "Good.\n[[7, 5]]"}}],
    "usage": {"prompt_tokens": 5, "total_tokens": 9},
}


def read_completion(seed, folder):
    """An endpoint's answer."""
    content = pathlib.Path(folder, "answer.json").read_bytes().decode("utf-8", "replace")
    asked = endpoint.Endpoint.__new__(endpoint.Endpoint)
    asked.args, asked.key, asked.url, asked.settings = types.SimpleNamespace(model="m"), "secret-key", "http://a/v1", {}
    asked.openai = types.SimpleNamespace(APIError=endpoint.UnusableAnswerError)
    create = types.SimpleNamespace(create=lambda **_: types.SimpleNamespace(text=content))
    asked.client = types.SimpleNamespace(chat=types.SimpleNamespace(completions=types.SimpleNamespace(
        with_raw_response=create)))  # fmt: skip
    text, _ = asked.ask([], "row 1")
    read_replies(text)


def read_replies(text):
    """A reply as both kinds of judging read it."""
    pairs.read_reply(types.SimpleNamespace(order=next(iter(pairs.ORDERS))), text)
    questions.read_reply(types.SimpleNamespace(facts={"num_questions": 3, "empty": [2]}), text)


def read_reply(seed, folder):
    """A reply of a judge."""
    read_replies(pathlib.Path(folder, "reply.txt").read_bytes().decode("utf-8", "replace"))


def yaml_seeds():
    """The YAML file of the repository, with a base that is there."""
    text = (ROOT / "configs" / "compare_quickstart.yaml").read_text(encoding="utf-8")
    text = text.replace("output/base-glm3", str(GOLDEN["glm3"]), 1).replace("data/", f"{ROOT}/data/")
    return {"quickstart": "\n".join(line for line in text.split("\n") if not line.startswith("base_command")).encode()}


def read_yaml(seed, folder):
    """A comparison's plan."""
    _, problems = plan.read_plan(os.path.join(folder, "compare.yaml"))
    if problems:
        raise UserError(problems[0])


def linked(name):
    """A home with a small checkpoint in it but for one file."""

    def home(seed, folder):
        golden_home(seed, folder)
        (folder / name).unlink(missing_ok=True)

    return home


def one(name, value):
    """Seeds of a single file."""
    return lambda: {name: value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()}


def json_lines(rows):
    """Seeds of a file of rows."""
    return one("rows", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())


TARGETS = {
    "config": Target("config.json", golden_file("config.json"), as_json, read_model, golden_home),
    "tokenizer": Target(
        "tokenizer_config.json", golden_file("tokenizer_config.json"), as_json, read_model, golden_home
    ),
    "index": Target(INDEX, golden_file(INDEX), as_json, read_model, golden_home),
    "generation": Target(
        "generation_config.json",
        lambda: dict.fromkeys(MODES, b'{"eos_token_id": 2, "temperature": 0.5, "do_sample": true, "max_length": 9}'),
        as_json,
        read_and_load,
        golden_home,
    ),
    "adapter": Target("adapter_config.json", one("adapter", ADAPTER), as_json, read_adapter, adapter_home),
    "run": Target("run.json", one("run", RUN), as_json, read_adapter, run_home),
    "safetensors": Target(SAFE, safetensors_seeds, safetensors_file, read_weights),
    "pickle": Target(BIN, weights_seeds(), bin_file, read_weights),
    "old pickle": Target(BIN, weights_seeds(old=True), bin_file, read_weights),
    "state file": Target(
        "rank-0.pt",
        weights_seeds(),
        bin_file,
        lambda seed, folder: states.load_tensors(os.path.join(folder, "rank-0.pt")),
    ),
    "state": Target("state.json", state_seeds, as_json, read_state),
    "manifest": Target(folders.MANIFEST, manifest_seeds, as_json, read_manifest, manifest_home),
    "ds file": Target(
        "ds.json",
        lambda: {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.json")},
        as_json,
        lambda seed, folder: ds_config.read_ds_file(os.path.join(folder, "ds.json")),
    ),
    "rows": Target("rows.json", json_lines([ROW, {**ROW, "id": 5, "history": []}] * 3), rows_file, read_rows),
    "predictions": Target(
        "predictions.jsonl",
        json_lines([{"index": 0, "query": "a", "prediction": "b", "output": "c"}] * 3),
        rows_file,
        read_score,
    ),
    "yaml": Target("compare.yaml", yaml_seeds, text_file, read_yaml),
    "completion": Target("answer.json", one("answer", COMPLETION), as_json, read_completion),
    "reply": Target("reply.txt", one("reply", "A 更完整。\n[[7, 5]]\n[[1]]\n[[none]]".encode()), text_file, read_reply),
}


# ---------------------------------------------------------------- one input


class Slow(BaseException):
    """The alarm; no `except Exception` of a reader takes it for a broken file."""


def ring(*_):
    """What the alarm does."""
    raise Slow


def make_input(name, number, seed):
    """(target's name, seed's name, bytes) of an input."""
    rng = random.Random(f"{seed} {name} {number}")
    target = TARGETS[name]
    seeds = seeds_of(name)
    chosen = rng.choice(sorted(seeds))
    return name, chosen, target.change(seeds[chosen], rng)


def seeds_of(name, known={}):  # noqa: B006, kept between calls
    """A target's valid files, made once."""
    if name not in known:
        known[name] = TARGETS[name].seeds()
    return known[name]


def read_input(name, chosen, content, folder):
    """Read an input in a new folder: (outcome, what there is to say). outcome: accepted, refused or problem."""
    target, place = TARGETS[name], pathlib.Path(folder, "here")
    place.mkdir()
    target.home(chosen, place)
    path = place / target.path
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(chosen, str(place))
        return "accepted", ""
    except UserError as error:
        return "refused", streams.shortened(streams.visible(error))
    except SystemExit as error:
        return ("accepted" if error.code in (0, None) else "refused", "") if error.code in (0, None, 2) else (
            "problem", f"exit code {error.code}")  # fmt: skip
    except Slow:
        return "problem", f"not done after {SECONDS} s: {traceback.format_exc(limit=-3)}"
    except BaseException as error:
        return "problem", f"{type(error).__name__}: {traceback.format_exc(limit=-4)}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def held(what):
    """VmSize, VmRSS or VmHWM of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024


def work(connection, inputs, seed):
    """A worker: reads the inputs (name, number) and sends (input, outcome, text, seconds, bytes held) of each."""
    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + MEMORY,) * 2)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        for name, number in inputs:
            connection.send(((name, number), None, "", 0.0, 0))  # begun: if nothing more comes, this one is at fault
            item = make_input(name, number, seed)
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # the most that was held is counted anew
            before, start = held("VmRSS"), time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcome, text = read_input(*item, folder)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            memory = max(0, held("VmHWM") - before)
            if memory > MEMORY // 2:
                outcome, text = "problem", f"took {memory >> 20} MB: {text}"
            connection.send(((name, number), outcome, text, time.monotonic() - start, memory))
    connection.send(None)
    connection.close()


# ---------------------------------------------------------------- all inputs


def warm_up(names):
    """Read the valid files themselves, so that all is imported before the fork; RuntimeError where one is not taken."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for name in names:
            for chosen, content in seeds_of(name).items():
                outcome, text = read_input(name, chosen, content, folder)
                if outcome != "accepted":
                    raise RuntimeError(f"{name}, the valid file {chosen}: {outcome}: {text}")


def run_inputs(inputs, seed, jobs):
    """Yield (input, outcome, text, seconds, bytes) of all inputs, from forked workers; one that dies is replaced."""
    context = multiprocessing.get_context("fork")
    mixed = sorted(inputs, key=lambda pair: random.Random(str(pair)).random())  # each worker has some of each kind
    queues = [mixed[job::jobs] for job in range(jobs)]
    workers = {}

    def start(queue):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(theirs, queue, seed), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = [process, queue, None, time.monotonic()]  # the last two: what it reads, and since when

    for queue in filter(None, queues):
        start(queue)
    try:
        while workers:
            ready = multiprocessing.connection.wait(list(workers), timeout=1)
            for connection in ready:
                process, queue, number, _ = workers[connection]
                try:
                    found = connection.recv()
                except EOFError:
                    process.join()
                    ended = f"the process ended ({process.exitcode})"
                    yield from replace_worker(workers, connection, start, ended)
                    continue
                if found is None:
                    process.join()
                    del workers[connection]
                elif found[1] is None:
                    workers[connection][2:] = found[0], time.monotonic()
                else:
                    yield found
            for connection, (process, _, _, since) in list(workers.items()):
                if time.monotonic() - since > SECONDS + GRACE:  # in code that hears no alarm
                    process.kill()
                    process.join()
                    yield from replace_worker(workers, connection, start, f"hangs for more than {SECONDS} s")
    finally:
        for process, *_ in workers.values():
            process.kill()


def replace_worker(workers, connection, start, why):
    """The result of what a worker read when it ended; another one reads the rest."""
    _, queue, number, since = workers.pop(connection)
    connection.close()
    if number is None:
        raise RuntimeError(f"a worker could not begin: {why}")
    yield number, "problem", why, time.monotonic() - since, 0
    if rest := queue[queue.index(number) + 1 :]:
        start(rest)


def summary(found, names):
    """A row for each target: {target, inputs, accepted, refused, problems, seconds and MB at most}."""
    rows = []
    for name in names:
        mine = [result for result in found if result[0][0] == name]
        counts = {
            outcome: sum(result[1] == outcome for result in mine) for outcome in ("accepted", "refused", "problem")
        }
        rows.append(
            {
                "target": name,
                "inputs": len(mine),
                **counts,
                "seconds": round(max((result[3] for result in mine), default=0.0), 2),
                "megabytes": max((result[4] for result in mine), default=0) >> 20,
            }
        )
    return rows


def fuzz(num_inputs=NUM_INPUTS, seed=1, names=tuple(TARGETS), jobs=None, first=0, keep=None):
    """(rows of `summary`, problems as lines). keep: folder that the files of problems are written to."""
    warm_up(names)
    found, problems = [], []
    inputs = [(names[n % len(names)], first + n // len(names)) for n in range(num_inputs)]
    for result in run_inputs(inputs, seed, jobs or os.cpu_count() or 1):
        found.append(result)
        (name, number), outcome, text, *_ = result
        if outcome == "problem":
            problems.append(f"{name} {number}: {text}")
            print(problems[-1], flush=True)
            if keep:
                _, chosen, content = make_input(name, number, seed)
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}-{number}-{chosen}-{TARGETS[name].path}".replace(" ", "-")).write_bytes(content)
    return summary(found, names), problems


def parse(argv):
    """Flags."""
    text = __doc__.replace("{memory}", str(MEMORY >> 30)).replace("{seconds}", str(SECONDS))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=NUM_INPUTS, help="number of files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file of each kind")
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS), help="kinds; left out: all")
    parser.add_argument("--seed", type=int, default=1, help="of the changes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--keep", type=pathlib.Path, default=KEEP, help="for files with problems")
    return parser.parse_args(argv)


def main(argv):
    """Read all inputs; the exit code is 1 where one is neither taken nor refused."""
    args = parse(argv)
    start = time.monotonic()
    rows, problems = fuzz(args.inputs, args.seed, tuple(args.only), args.jobs, args.first, args.keep)
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{args.inputs:,} files in {time.monotonic() - start:.0f} s, problems: {len(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
