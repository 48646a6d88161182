"""Look at this machine, the packages and checkpoint folders: what works, what does not, and what to do.

    python doctor.py
    python doctor.py ChatGLM3-6B/ output-glm3 --full
    python doctor.py ChatGLM-6B/ --train_path data/spo_0.json

Each line has a mark: ok, note (worth knowing), BAD (will fail, and how to fix it). The exit code is 1 where something
is BAD. Nothing is fetched, and nothing is written but, with --full, the compiled optimizer in its cache.
"""

from __future__ import annotations

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
import glob
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import Any

from checkpoints.inspection import STALE_SECONDS, broken_lines, folder_lines, open_folder
from checkpoints.kinds import marked_kind
from checkpoints.opening import RUN_FILE
from evaluation.round_trip import describe, send_through
from flags.common import place_problem
from flags.doctor import parse_doctor
from generation.lengths import columns_of
from rows.cache import cache_folder
from rows.reading import read_rows
from runtime.exits import UserError
from runtime.machine import (
    BAD,
    IMPORTS,
    INSTALL,
    NOTE,
    OK,
    Facts,
    attempt,
    find_gpus,
    installed,
    memory,
    memory_limit,
    numbers,
    output_of,
    pins,
    quiet,
)
from runtime.streams import size_text, visible
from training.optimizer import cpu_adam_problem
from utils import prepare_environment

# Packages.


def version_lines() -> Iterator[tuple[str, str, str]]:
    """Packages against requirements.txt, and what each of them needs of others."""
    yield OK, "python", platform.python_version()
    same = []
    for name, pinned in pins().items():
        found, fix = installed(name), f"pip install {name}=={pinned}"
        with quiet():
            mark, _, text = attempt(name, importlib.import_module, IMPORTS.get(name, "sys"))
        if found is None:
            yield BAD, name, f"missing: {fix}"
        elif mark == BAD:
            yield BAD, name, f"{found} cannot be imported ({text}): {fix} --force-reinstall"
        elif found.split("+")[0] != pinned:
            yield NOTE, name, f"{found}, but the tests run with {pinned}: {fix}"
        elif name == "torch":
            cuda = sys.modules["torch"].version.cuda
            yield OK, name, f"{found}, built for {f'CUDA {cuda}' if cuda else 'CPU only'}"
        elif name in IMPORTS:
            yield OK, name, found
        else:
            same.append(f"{name} {found}")
    if same:
        yield OK, "others", ", ".join(same)
    if not all(map(installed, pins())):
        yield NOTE, "missing ones", f"all at once: {INSTALL}"
    for name in filter(installed, IMPORTS):
        yield from needs_of(name)


def needs_of(name: str) -> Iterator[tuple[str, str, str]]:
    """Lines for what an installed package says that it needs and does not find."""
    from packaging.requirements import Requirement

    for needed in map(Requirement, importlib.metadata.requires(name) or []):
        found, wanted = installed(needed.name), f"{needed.name}{needed.specifier}"
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            if found is None or not needed.specifier.contains(found, prereleases=True):
                yield BAD, name, f"needs {wanted}, here is {found or 'none'}: pip install '{wanted}'"


# The machine.

PLACES = (  # name, path, bytes that should be free, what for, the mark where it cannot be written
    ("disk here", os.getcwd, 12.5e9, "a saved whole 6B checkpoint takes 12.5 GB", NOTE),
    ("disk for rows", cache_folder, 1e9, "encoded rows; HF_DATASETS_CACHE moves them", BAD),
    ("disk TMPDIR", tempfile.gettempdir, 1e9, "compilers; TMPDIR moves it", BAD),
)


def place_line(name: str, path_of: Any, least: int, use: Any, mark: str) -> tuple[str, str, str]:
    """The line of a place on a disk."""
    path = path_of()
    if problem := place_problem(name, path):
        return mark, name, problem
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    return NOTE if free < least else OK, name, f"{size_text(free)} free at {path} ({use})"


def machine_lines(facts: Any) -> Iterator[Any]:
    """System, cores, memory, disks, limits."""
    yield OK if sys.platform == "linux" else BAD, "system", f"{platform.platform()} (Linux is needed)"
    yield OK, "CPU cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used"
    total, available = memory()
    yield OK, "memory", f"{size_text(total)}, available {size_text(available)}"
    if memory_limit() < total:
        yield NOTE, "memory limit", f"{size_text(memory_limit())} for this container or job: more ends the process"
    for place in PLACES:
        mark, name, line = attempt(place[0], place_line, *place)
        yield line if mark == OK else (mark, name, line)
    shm = os.statvfs("/dev/shm")
    size = shm.f_frsize * shm.f_blocks
    is_small = size < 1 << 30 and len(facts.gpus) > 1
    fix = ": too small for NCCL between several GPUs: docker run --shm-size=1g" if is_small else ""
    yield NOTE if is_small else OK, "/dev/shm", size_text(size) + fix
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield (NOTE, "open files", f"{files}: few: ulimit -n 4096") if 0 <= files < 1024 else (OK, "open files", str(files))


# GPUs.


def gpu_lines(facts: Any) -> Iterator[tuple[str, str, str]]:
    """GPUs, or why torch sees none."""
    if facts.gpus:
        driver = "".join(re.findall(r"Driver Version: (\S+)", facts.smi[1])[:1])
        runs = f"torch is built for {facts.cuda}, the driver {driver} runs up to {facts.driver_cuda or 'unknown'}"
        yield OK, "CUDA", runs
    for number, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        text = f"{size_text(gpu.total)}, free {size_text(gpu.free)}, compute capability {major}.{minor}"
        yield OK, f"GPU {number}", f"{gpu.name}, {text}, bf16 {'yes' if major >= 8 else 'no'}"
    yield from [(NOTE, "torch warns", text) for text in facts.warned]
    has_driver = facts.smi[0] is not None and "No devices" not in facts.smi[1] or glob.glob("/dev/nvidia[0-9]*")
    if not facts.gpus and has_driver:
        yield BAD, "GPUs", f"there is a driver, but torch sees no GPU: {why_no_gpu(facts)}"
    elif not facts.gpus:
        yield NOTE, "GPUs", "none: tiny models only"


def why_no_gpu(facts: Any) -> str:
    """The likely cause, and the fix."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if facts.smi[0]:
        return f"nvidia-smi says {' '.join(facts.smi[1].split())[:200]!r}: fix the driver (updated? restart)"
    if facts.cuda is None:
        return "torch cannot be imported: see versions"
    if not facts.cuda:
        fix = f"pip install --force-reinstall --index-url https://pypi.org/simple torch=={pins().get('torch')}"
        return f"this torch is built for CPU only: {fix}"
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip()):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides all: unset it, or name GPUs, as in 0,1"
    if facts.driver_cuda and numbers(facts.driver_cuda)[0] < numbers(facts.cuda)[0]:
        runs, built = f"CUDA {facts.driver_cuda}", f"CUDA {facts.cuda}"
        return f"the driver runs up to {runs}, torch is built for {built}: update the driver, or a torch for {runs}"
    return f"torch says {facts.problem!r}: look at /dev/nvidia* (in a container: docker run --gpus all)"


# Compilers and compiled ops.

OPS = {  # DeepSpeed's compiled ops that a run here can ask for: what for, and what they need
    "cpu_adam": ("for the _offload files", "g++ and ninja"),
    "async_io": ("for offload to NVMe, in a --ds_file of your own", "libaio: apt install libaio-dev"),
    "quantizer": ("for zero_quantized_*, in a --ds_file of your own", "a GPU and nvcc"),
    "fused_adam": ("not used: AdamW on GPUs is torch's", "nvcc"),
}
COMPILERS = {"C++": ("c++", "apt install g++"), "ninja": ("ninja", "activate the environment, or pip install ninja")}


def compiler_lines(facts: Any) -> Iterator[tuple[str, str, str]]:
    """What DeepSpeed's compiled optimizer for offload needs, and CUDA's compiler."""
    for name, (program, fix) in COMPILERS.items():
        code, text = output_of(program, "--version")
        if code == 0:
            yield OK, name, f"{shutil.which(program)}: {text.splitlines()[0]}"
        else:
            yield NOTE, name, f"missing: offload then takes torch's slower AdamW: {fix}"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version")[1])
    if release is None:
        yield OK, "nvcc", f"none ({nvcc}); nothing here needs it"
    elif facts.cuda and numbers(facts.cuda)[0] != numbers(release[1])[0]:
        fix = f"set CUDA_HOME to that of CUDA {facts.cuda}, if you need them"
        yield NOTE, "nvcc", f"{nvcc} is of CUDA {release[1]}, torch of {facts.cuda}: CUDA ops do not compile: {fix}"
    else:
        yield OK, "nvcc", f"{nvcc}: CUDA {release[1]}"


def op_lines(facts: Any, is_full: bool) -> Iterator[tuple[str, str, str]]:
    """DeepSpeed's compiled ops."""
    with quiet():
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder.all_ops import ALL_OPS
        from torch.utils.cpp_extension import get_default_build_root
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    folder = f"{python}_{'cu' + facts.cuda.replace('.', '') if facts.cuda else 'cpu'}"  # as torch names it
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(get_default_build_root(), folder)
    for name, (use, needs) in OPS.items():
        lock, problem, state = os.path.join(root, name, "lock"), None, "compiled at first use"
        if os.path.exists(lock):  # torch waits until it is gone, for ever if the process that made it was killed
            is_stale = time.time() - os.path.getmtime(lock) > STALE_SECONDS
            text = "a killed build left it, and the next waits for ever: remove it" if is_stale else "being built"
            yield BAD if is_stale else NOTE, name, f"{lock}: {text}"
            continue
        with quiet():
            if name not in ALL_OPS or attempt(name, ALL_OPS[name].is_compatible)[2] is not True:
                problem = f"does not build here, it needs {needs}"
            elif is_full and name == "cpu_adam":
                problem, state = cpu_adam_problem(), "loads"
            elif installed_ops.get(name) or os.path.exists(os.path.join(root, name, f"{name}.so")):
                state = "built"
        yield NOTE if problem else OK, name, f"{problem or state} ({use})"


# fmt: on


# Folders.


def row_lines(path: str, args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """How the answers of --train_path come back from a folder's tokenizer; reads no weights."""
    is_checkpoint = {RUN_FILE, "config.json"} & set(os.listdir(path) if os.path.isdir(path) else [])
    if not is_checkpoint and not marked_kind(path):
        raise UserError(f"{path}: has no tokenizer: name a checkpoint for --train_path")
    opened, config, _ = open_folder(path, args)
    rows = read_rows(args.train_path, columns_of(args))
    found = send_through(rows, opened.tokenizer(config), opened.mode.prompt)
    for name, text in zip(["answers", *["example"] * len(found.examples)], describe(found)):
        yield NOTE if found.num_changed else OK, name, text


def show(title: str, lines: Iterable[Any]) -> list[str]:
    """Print a section as it comes; returns the marks."""
    print(f"\n{visible(title)}", flush=True)
    rest, marks = iter(lines), []
    while True:
        found = attempt("not looked at", next, rest, None)  # a library that is missing ends its own section only
        line = found if found[0] == BAD else found[2]
        if line is None:
            return marks
        marks.append(line[0])
        text = f"  {line[0]:<4}  {visible(line[1]):<14}  {visible(line[2])}"
        indent: dict[str, Any] = {"subsequent_indent": " " * 24, "break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(text, 100, **indent), flush=True)


def main(argv: list[str]) -> int:
    """Print all sections; returns the exit code."""
    args = parse_doctor(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts = Facts()
    with quiet():
        attempt("environment", prepare_environment)  # before the libraries start; without torch, they are told of below
    marks = show("versions", version_lines())
    with quiet():
        attempt("GPUs", find_gpus, facts)
    marks += show("machine", machine_lines(facts))
    marks += show("GPUs", gpu_lines(facts))
    marks += show("compilers", compiler_lines(facts))
    marks += show("compiled ops of DeepSpeed", op_lines(facts, args.full))
    marks += show("known to fail", broken_lines(facts))
    for path in args.folders:
        marks += show(path, folder_lines(path, args, facts))
        if args.train_path:
            marks += show(f"{path} on {' '.join(args.train_path)}", row_lines(path, args))
    print(f"\n{marks.count(BAD)} BAD, {marks.count(NOTE)} notes")
    return 1 if BAD in marks else 0


if __name__ == "__main__":
    entry.run(main)
