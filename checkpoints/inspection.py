"""What lies in a folder, and whether it is whole and would load."""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from checkpoints import base_weights, weight_files
from checkpoints.bases import require_own_base
from checkpoints.kinds import marked_kind
from checkpoints.opening import RUN_FILE, look_into, open_checkpoint
from checkpoints.state_checks import state_problems
from checkpoints.trained_weights import check_trained, trained_tensors
from runtime.exits import UserError
from runtime.folders import MANIFEST, PARTIAL, REPLACED, verify
from runtime.machine import BAD, INSTALL, NOTE, OK, attempt, installed, memory, memory_limit, older, quiet
from runtime.streams import size_text
from utils import read_json

if TYPE_CHECKING:
    from checkpoints.opening import Opened

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {"F16": "fp16", "float16": "fp16", "BF16": "bf16", "bfloat16": "bf16", "F32": "fp32", "float32": "fp32"}
STALE_SECONDS = 600  # no build of one op takes longer
# fmt: off
BROKEN = (  # (condition, mark, name, what breaks, fix), from the libraries' own sources and requirements
    (lambda f: sys.version_info < (3, 10), BAD, "python", "torch needs 3.10", "install Python 3.10 or newer"),
    (lambda f: older("transformers", "5"), BAD, "transformers", "has no transformers.initialization before 5", INSTALL),
    (lambda f: older("transformers", "5.17"), NOTE, "transformers", "5.17 is the oldest that was tried", INSTALL),
    (lambda f: older("torch", "2.11"), NOTE, "torch", "2.11 is the oldest that was tried", INSTALL),
    (lambda f: older("peft", "0.20"), NOTE, "peft", "transformers works with 0.20 and newer", INSTALL),
    (lambda f: installed("vllm"), NOTE, "vllm", "wants other versions of torch and transformers",
     "give it an environment of its own: docs/vllm.md"),
    (lambda f: not f.gpus, NOTE, "fp16", "does not train on a CPU", "leave --precision out (fp32), or bf16"),
    (lambda f: any(gpu.capability < (8, 0) for gpu in f.gpus), NOTE, "bf16",
     "a GPU before compute capability 8.0 has none", "leave --precision out: it is fp16 with loss scaling"),
    (lambda f: f.gpus and os.environ.get("DS_ACCELERATOR") == "cpu", NOTE, "DS_ACCELERATOR",
     "is cpu, so the GPUs are left alone", "unset it"),
)



def broken_lines(facts: Any) -> Iterator[tuple[str, str, str]]:
    """Combinations that are known to fail."""
    found = [(mark, name, f"{what}: {fix}") for condition, mark, name, what, fix in BROKEN if condition(facts)]
    yield from found or [(OK, "pairs", f"none of the {len(BROKEN)} known here")]





def folder_lines(path: str, args: argparse.Namespace, facts: Any) -> Iterator[tuple[str, str, str]]:
    """What a folder is, and whether it is whole."""
    names = os.listdir(path) if os.path.isdir(path) else []
    runs = [name for name in names if re.match(r"best(\.|$)|(state|epoch-\d+)-step-\d+", name)]
    if not os.path.isdir(path):
        rule = "is a file: name its folder" if os.path.exists(path) else "no such folder (hub names are not fetched)"
        yield BAD, "folder", f"{path}: {rule}"
    elif re.match(r"state-step-\d+", os.path.basename(os.path.normpath(path))):
        info = attempt("what", read_json, os.path.join(path, "state.json"))
        text = "state to resume from, saved by {} processes"
        yield info if info[0] == BAD else (OK, "what", text.format(info[2].get("world_size")))
        yield from manifest_lines(path, args, is_needed=True)
    elif {RUN_FILE, "config.json"} & set(names) or marked_kind(path) or (args.model_name_or_path and not runs):
        yield from checkpoint_lines(path, args, facts)
    elif not runs:
        rule = f"no config.json or {RUN_FILE} in it: name a checkpoint or training output folder"
        yield BAD, "folder", f"{path}: {rule}"
    else:
        yield OK, "what", f"training output with {len(runs)} saved folders"
    for name in sorted(runs, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        if name.endswith((PARTIAL, REPLACED)):
            yield NOTE, name, "left half written by a run that was stopped: if none is under way, remove it"
            continue
        mark, _, lines = attempt(name, list, folder_lines(os.path.join(path, name), args, facts))
        bad = [lines] if mark == BAD else [text for mark, _, text in lines if mark == BAD]
        yield (BAD, name, bad[0]) if bad else (OK, name, f"whole: {lines[0][2]}")


def manifest_lines(path: str, args: argparse.Namespace, is_needed: bool = False) -> Iterator[tuple[str, str, Any]]:
    """Sizes and, with --full, SHA-256 of the files against the manifest, where there is one."""
    is_told = is_needed and os.path.isfile(os.path.join(path, MANIFEST))
    problems = state_problems(path, args.full) if is_told else verify(path, full=args.full)
    if os.path.isfile(os.path.join(path, MANIFEST)) and not problems:
        yield OK, "manifest", f"{'sizes and SHA-256' if args.full else 'sizes'} of the files are as saved"
    elif is_needed and not problems:
        problems = [f"{path}/{MANIFEST}: missing, so the state is not whole: use another one"]
    yield from [(BAD, "manifest", problem) for problem in problems]


def open_folder(path: str, args: argparse.Namespace) -> tuple[Opened, Any, list[Any] | list[Any] | list[str]]:
    """(opened checkpoint, its configuration, names of the modes that it can be)."""
    found = look_into(path, args.model_name_or_path, flag="folder")
    names = [args.mode] if args.mode else found.modes
    if not names:
        raise UserError(f"{found.base_folder}/config.json: of no family known here: name a ChatGLM checkpoint")
    opened = open_checkpoint(path, names[0], args.model_name_or_path, flag="folder")
    return opened, opened.config(), names


def checkpoint_lines(path: str, args: argparse.Namespace, facts: Any) -> Iterator[tuple[str, str, Any]]:
    """A checkpoint: what it is, whether its files are whole and fit the model."""
    mark, name, found = attempt("what", open_folder, path, args)
    if mark == BAD:
        yield mark, name, found
        return
    opened, config, names = found
    run, counts, is_open = opened.run, [], len(names) > 1
    of = f" on {opened.base_folder}" if opened.kind.needs_base else ""
    by = f", --train_type {run.get('train_type')}, step {run.get('step')}{', merged' * ('merged_from' in run)}"
    text = f"{opened.mode.name}: {opened.kind.name} weights{of}{by if run else ', not saved by this toolkit'}"
    lines = [(OK, "what", text)]
    if is_open:
        text = f"the files do not tell {' and '.join(names)} apart: give every command its --mode"
        lines.append((NOTE, "mode", text))
    if run:
        lines.append(saved_line(run.get("versions")))
    lines.append(attempt("tokenizer", lambda: f"{opened.tokenizer(config).vocab_size:,} ids fit the model"))
    lines.append(attempt("base" if of else "weights", base_text, opened, config, counts))
    if run and of and "base_fingerprint" not in run:
        text = "saved before run.json kept a fingerprint of its base: whether this is that one is not known"
        lines.append((NOTE, "base's weights", text))
    if of:
        lines.append(attempt(opened.kind.name, trained_text, opened, config, counts))
    lines += manifest_lines(path, args)
    if args.full and all(mark != BAD for mark, *_ in lines):
        lines.append(attempt("values", finite_text, opened))
    yield from lines
    if all(mark != BAD for mark, *_ in lines):
        capability = min((gpu.capability for gpu in facts.gpus), default=None)
        precision = "fp32" if capability is None else "bf16" if capability >= (8, 0) else "fp16"  # --precision auto
        needed = sum(counts) * BYTES[precision]
        free = max((gpu.free for gpu in facts.gpus), default=min(memory()[1], memory_limit()))
        text = f"{size_text(needed)} to predict in {precision}, and the tokens; {size_text(free)} free"
        yield (NOTE, "memory", f"{text}: too little") if needed > free else (OK, "memory", text)
        flag = f" --model_name_or_path {args.model_name_or_path}" if args.model_name_or_path else ""
        flag += f" --mode {names[0]}" if is_open or args.mode else ""
        yield OK, "loads", f"python predict.py --model_path {path}{flag}"


def saved_line(versions: Any) -> tuple[str, str, str]:
    """The packages that saved a run, beside those that are here."""
    versions = versions if isinstance(versions, dict) else {}
    others = {name: installed(name) for name in versions if installed(name) != versions[name]}
    text = ", ".join(f"{k} {v}{f' (here {others[k]})' if k in others else ''}" for k, v in versions.items())
    return NOTE if others else OK, "saved with", text or "versions that run.json does not tell"


def measured(shapes: dict, names: Iterable[str], paths: list[str], counts: Any) -> str:
    """Number, precision and bytes of the named weights; adds the number to `counts`."""
    found = [shapes[name] for name in names if name in shapes]
    counts.append(sum(math.prod(shape) for shape, _ in found))
    dtypes = " and ".join(sorted({DTYPES.get(dtype, dtype) for _, dtype in found}))
    return f"{counts[-1]:,} in {dtypes}, {size_text(sum(map(os.path.getsize, paths)))} on disk, names and shapes fit"


def base_text(opened: Opened, config: Any, counts: Any) -> str:
    """Names and shapes of a whole checkpoint's weights against the model; of a base, is it that of the training?"""
    folder = opened.base_folder
    names = base_weights.check_weights(folder, opened.mode, config, new_prefix=opened.kind.base_makes_it)
    require_own_base(opened, config)
    paths = [os.path.join(folder, name) for name in weight_files.weight_files(folder)]
    return measured(weight_files.weight_shapes(folder), names, paths, counts)


def trained_text(opened: Opened, config: Any, counts: Any) -> str:
    """Names and shapes of an adapter or a prefix encoder against the model."""
    with quiet():
        found = check_trained(opened, config)
    return measured(found, found, [opened.trained_path], counts)


def finite_text(opened: Opened) -> str:
    """Every value, read once; UserError for one that is not finite."""
    problems = {opened.base_folder: base_problem(opened.base_folder)}
    if opened.kind.needs_base:
        problems[opened.folder] = weight_files.finite_problem(trained_tensors(opened).items())
    for folder, problem in problems.items():
        if problem:
            raise UserError(f"{folder}: {problem}: download it again, or use an earlier checkpoint")
    return "all are finite"


@functools.lru_cache
def base_problem(folder: str) -> str | None:
    """The first weight that is not finite; asked once for all adapters of a base."""
    return weight_files.finite_problem((name, rows[:]) for name, _, rows in weight_files.stored_tensors(folder))
