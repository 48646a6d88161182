"""Look at this machine, the packages and checkpoint folders: what works, what does not, and what to do.

    python doctor.py
    python doctor.py ChatGLM3-6B/ output-glm3 --full
    python doctor.py ChatGLM-6B/ --train_path data/spo_0.json

Each line has a mark: ok, note (worth knowing), BAD (will fail, and how to mend it). The exit code is 1 where something
is BAD. Nothing is fetched, and nothing is written but, with --full, the compiled optimizer in its cache.
"""

import entry  # first: Ctrl-C is heard while the others are imported

import contextlib
import functools
import glob
import importlib
import importlib.metadata
import io
import math
import os
import pathlib
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass, field

import weights
from arguments import columns_of, parse_doctor, place_problem
from bases import require_own_base
from checkpoint import RUN_FILE, look_into, open_checkpoint
from data_set import read_rows
from exits import UserError
from folders import MANIFEST, PARTIAL, REPLACED, size_text, verify
from modes import read_json
from optimizer import cpu_adam_problem
from round_trip import describe, send_through
from row_cache import cache_folder
from foreign import holds_adapter
from state_checks import state_problems
from trained_weights import check_trained, trained_tensors
from utils import prepare_environment, visible

OK, NOTE, BAD = "ok", "note", "BAD"
INSTALL = "pip install -r requirements.txt"
REQUIREMENTS = pathlib.Path(__file__).resolve().parent / "requirements.txt"
# What training and prediction import, deep enough for a broken installation to show.
IMPORTS = {
    **{name: name for name in ("torch", "peft", "deepspeed", "sentencepiece", "numpy")},
    "transformers": "transformers.modeling_utils",
    "safetensors": "safetensors.torch",
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {"F16": "fp16", "float16": "fp16", "BF16": "bf16", "bfloat16": "bf16", "F32": "fp32", "float32": "fp32"}
STALE_SECONDS = 600  # no build of one op takes longer


def attempt(name, function, *values):
    """The line of a check, (mark, name, text): what the function returns, or BAD and the reason."""
    try:
        return OK, name, function(*values)
    except Exception as error:  # broken files and libraries fail in many ways, and telling is what we are here for
        text = " ".join(str(error).split())[:400]
        # Our own messages are UserErrors written for users.
        return BAD, name, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def quiet():
    """Without what libraries print and warn. stderr stays: DeepSpeed hands it to compilers as a file."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def output_of(*command):
    """(exit code, output) of a program; (None, "") where it is missing or hangs."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return process.returncode, process.stdout.strip() or process.stderr.strip()


def installed(name):
    """Version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version):
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def older(name, version):
    """Is a package there, and older than this?"""
    return installed(name) is not None and numbers(installed(name)) < numbers(version)


# Packages.


def pins(python=sys.version_info[:2]):
    """{name: version} of requirements.txt for a version of Python."""
    found = {}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        match = re.match(r'([\w.-]+)==([\w.]+)(?:; python_version (>=|<) "(\d+)\.(\d+)")?$', line)
        if match and (match[3] is None or (python >= (int(match[4]), int(match[5]))) == (match[3] == ">=")):
            found[match[1]] = match[2]
    return found


def version_lines():
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


def needs_of(name):
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


def place_line(name, path_of, least, use, mark):
    """The line of a place on a disk."""
    path = path_of()
    if problem := place_problem(name, path):
        return mark, name, problem
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    return NOTE if free < least else OK, name, f"{size_text(free)} free at {path} ({use})"


def memory():
    """(total, available) bytes of this machine."""
    with open("/proc/meminfo", encoding="ascii") as file:
        values = dict(re.findall(r"^(\w+): +(\d+) kB", file.read(), re.M))
    return int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024


def memory_limit(groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Least memory limit in bytes of this process's control groups, version 1 or 2; infinite without one."""
    limits = [math.inf]
    for _, kinds, path in re.findall(r"^(\d+):(|memory):(.*)$", pathlib.Path(groups).read_text(), re.M):
        group = pathlib.Path(f"{root}/{kinds}/{path}")
        for folder in (group, *group.parents):  # a limit above counts too; a container may see its group as the root
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # 'max' is no number
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def machine_lines(facts):
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
    is_small = size < 1 << 30 and len(facts.cards) > 1
    fix = ": too small for NCCL between several cards: docker run --shm-size=1g" if is_small else ""
    yield NOTE if is_small else OK, "/dev/shm", size_text(size) + fix
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield (NOTE, "open files", f"{files}: few: ulimit -n 4096") if 0 <= files < 1024 else (OK, "open files", str(files))


# Cards.


Card = namedtuple("Card", "name total free capability")  # sizes in bytes, capability as in (9, 0)


@dataclass
class Facts:
    """What torch and nvidia-smi say about cards."""

    cuda: str = None  # that torch is built for, '' for CPU only, None where torch cannot be imported
    driver_cuda: str = ""  # the newest that the driver runs
    cards: list = field(default_factory=list)
    problem: str = ""  # why torch sees none, in its words
    warned: list = field(default_factory=list)  # by torch, as of a card that it has no code for
    smi: tuple = (None, "")  # exit code and output of nvidia-smi


def find_cards(facts):
    """Fill in the facts of cards."""
    facts.smi = output_of("nvidia-smi")
    facts.driver_cuda = "".join(re.findall(r"CUDA\D*Version: (\d+\.\d+)", facts.smi[1])[:1])
    import torch

    facts.cuda = torch.version.cuda or ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        mark, _, facts.problem = attempt("cards", torch.cuda.init)
        for number in range(torch.cuda.device_count() if mark == OK else 0):
            card = torch.cuda.get_device_properties(number)
            is_free, _, free = attempt("free", torch.cuda.mem_get_info, number)  # fails on a card that others fill
            free = free[0] if is_free == OK else 0
            facts.cards.append(Card(card.name, card.total_memory, free, (card.major, card.minor)))
    facts.warned = [" ".join(str(warning.message).split()) for warning in warned]


def card_lines(facts):
    """Cards, or why torch sees none."""
    if facts.cards:
        driver = "".join(re.findall(r"Driver Version: (\S+)", facts.smi[1])[:1])
        runs = f"torch is built for {facts.cuda}, the driver {driver} runs up to {facts.driver_cuda or 'unknown'}"
        yield OK, "CUDA", runs
    for number, card in enumerate(facts.cards):
        major, minor = card.capability
        text = f"{size_text(card.total)}, free {size_text(card.free)}, compute capability {major}.{minor}"
        yield OK, f"card {number}", f"{card.name}, {text}, bf16 {'yes' if major >= 8 else 'no'}"
    yield from [(NOTE, "torch warns", text) for text in facts.warned]
    has_driver = facts.smi[0] is not None and "No devices" not in facts.smi[1] or glob.glob("/dev/nvidia[0-9]*")
    if not facts.cards and has_driver:
        yield BAD, "cards", f"there is a driver, but torch sees no card: {why_no_card(facts)}"
    elif not facts.cards:
        yield NOTE, "cards", "none: tiny models only"


def why_no_card(facts):
    """The likely cause, and the fix."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if facts.smi[0]:
        return f"nvidia-smi says {' '.join(facts.smi[1].split())[:200]!r}: mend the driver (updated? restart)"
    if facts.cuda is None:
        return "torch cannot be imported: see versions"
    if not facts.cuda:
        fix = f"pip install --force-reinstall --index-url https://pypi.org/simple torch=={pins().get('torch')}"
        return f"this torch is built for CPU only: {fix}"
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip()):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides all: unset it, or name cards, as in 0,1"
    if facts.driver_cuda and numbers(facts.driver_cuda)[0] < numbers(facts.cuda)[0]:
        runs, built = f"CUDA {facts.driver_cuda}", f"CUDA {facts.cuda}"
        return f"the driver runs up to {runs}, torch is built for {built}: update the driver, or a torch for {runs}"
    return f"torch says {facts.problem!r}: look at /dev/nvidia* (in a container: docker run --gpus all)"


# Compilers and compiled ops.

OPS = {  # DeepSpeed's compiled ops that a run here can ask for: what for, and what they need
    "cpu_adam": ("for the _offload files", "g++ and ninja"),
    "async_io": ("for offload to NVMe, in a --ds_file of your own", "libaio: apt install libaio-dev"),
    "quantizer": ("for zero_quantized_*, in a --ds_file of your own", "a card and nvcc"),
    "fused_adam": ("not used: AdamW on cards is torch's", "nvcc"),
}
COMPILERS = {"C++": ("c++", "apt install g++"), "ninja": ("ninja", "activate the environment, or pip install ninja")}


def compiler_lines(facts):
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


def op_lines(facts, is_full):
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


# fmt: off
BROKEN = (  # (condition, mark, name, what breaks, fix), from the libraries' own sources and requirements
    (lambda f: sys.version_info < (3, 10), BAD, "python", "torch needs 3.10", "install Python 3.10 or newer"),
    (lambda f: older("transformers", "5"), BAD, "transformers", "has no transformers.initialization before 5", INSTALL),
    (lambda f: older("transformers", "5.17"), NOTE, "transformers", "5.17 is the oldest that was tried", INSTALL),
    (lambda f: older("torch", "2.11"), NOTE, "torch", "2.11 is the oldest that was tried", INSTALL),
    (lambda f: older("peft", "0.20"), NOTE, "peft", "transformers works with 0.20 and newer", INSTALL),
    (lambda f: installed("vllm"), NOTE, "vllm", "wants other versions of torch and transformers",
     "give it an environment of its own: docs/vllm.md"),
    (lambda f: not f.cards, NOTE, "fp16", "does not train on a CPU", "leave --precision out (fp32), or bf16"),
    (lambda f: any(card.capability < (8, 0) for card in f.cards), NOTE, "bf16",
     "a card before compute capability 8.0 has none", "leave --precision out: it is fp16 with loss scaling"),
    (lambda f: f.cards and os.environ.get("DS_ACCELERATOR") == "cpu", NOTE, "DS_ACCELERATOR",
     "is cpu, so the cards are left alone", "unset it"),
)
# fmt: on


def broken_lines(facts):
    """Combinations that are known to fail."""
    found = [(mark, name, f"{what}: {fix}") for condition, mark, name, what, fix in BROKEN if condition(facts)]
    yield from found or [(OK, "pairs", f"none of the {len(BROKEN)} known here")]


# Folders.


def folder_lines(path, args, facts):
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
    elif {RUN_FILE, "config.json"} & set(names) or holds_adapter(path) or (args.model_name_or_path and not runs):
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


def manifest_lines(path, args, is_needed=False):
    """Sizes and, with --full, SHA-256 of the files against the manifest, where there is one."""
    is_told = is_needed and os.path.isfile(os.path.join(path, MANIFEST))
    problems = state_problems(path, args.full) if is_told else verify(path, full=args.full)
    if os.path.isfile(os.path.join(path, MANIFEST)) and not problems:
        yield OK, "manifest", f"{'sizes and SHA-256' if args.full else 'sizes'} of the files are as saved"
    elif is_needed and not problems:
        problems = [f"{path}/{MANIFEST}: missing, so the state is not whole: use another one"]
    yield from [(BAD, "manifest", problem) for problem in problems]


def open_folder(path, args):
    """(opened checkpoint, its configuration, names of the modes that it can be)."""
    found = look_into(path, args.model_name_or_path, flag="folder")
    names = [args.mode] if args.mode else found.modes
    if not names:
        raise UserError(f"{found.base_folder}/config.json: of no family known here: name a ChatGLM checkpoint")
    opened = open_checkpoint(path, names[0], args.model_name_or_path, flag="folder")
    return opened, opened.config(), names


def checkpoint_lines(path, args, facts):
    """A checkpoint: what it is, whether its files are whole and fit the model."""
    mark, name, found = attempt("what", open_folder, path, args)
    if mark == BAD:
        yield mark, name, found
        return
    opened, config, names = found
    run, counts, is_open = opened.run, [], len(names) > 1
    of = f" on {opened.base_folder}" if opened.weights != "whole" else ""
    by = f", --train_type {run.get('train_type')}, step {run.get('step')}{', merged' * ('merged_from' in run)}"
    text = f"{opened.mode.name}: {opened.weights} weights{of}{by if run else ', not saved by this toolkit'}"
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
        lines.append(attempt(opened.weights, trained_text, opened, config, counts))
    lines += manifest_lines(path, args)
    if args.full and all(mark != BAD for mark, *_ in lines):
        lines.append(attempt("values", finite_text, opened))
    yield from lines
    if all(mark != BAD for mark, *_ in lines):
        capability = min((card.capability for card in facts.cards), default=None)
        precision = "fp32" if capability is None else "bf16" if capability >= (8, 0) else "fp16"  # --precision auto
        needed = sum(counts) * BYTES[precision]
        free = max((card.free for card in facts.cards), default=min(memory()[1], memory_limit()))
        text = f"{size_text(needed)} to predict in {precision}, and the tokens; {size_text(free)} free"
        yield (NOTE, "memory", f"{text}: too little") if needed > free else (OK, "memory", text)
        flag = f" --model_name_or_path {args.model_name_or_path}" if args.model_name_or_path else ""
        flag += f" --mode {names[0]}" if is_open or args.mode else ""
        yield OK, "loads", f"python predict.py --model_path {path}{flag}"


def row_lines(path, args):
    """How the answers of --train_path come back from a folder's tokenizer; reads no weights."""
    is_checkpoint = {RUN_FILE, "config.json"} & set(os.listdir(path) if os.path.isdir(path) else [])
    if not is_checkpoint and not holds_adapter(path):
        raise UserError(f"{path}: has no tokenizer: name a checkpoint for --train_path")
    opened, config, _ = open_folder(path, args)
    rows = read_rows(args.train_path, columns_of(args))
    found = send_through(rows, opened.tokenizer(config), opened.mode.prompt)
    for name, text in zip(["answers", *["example"] * len(found.examples)], describe(found)):
        yield NOTE if found.num_changed else OK, name, text


def saved_line(versions):
    """The packages that saved a run, beside those that are here."""
    versions = versions if isinstance(versions, dict) else {}
    others = {name: installed(name) for name in versions if installed(name) != versions[name]}
    text = ", ".join(f"{k} {v}{f' (here {others[k]})' if k in others else ''}" for k, v in versions.items())
    return NOTE if others else OK, "saved with", text or "versions that run.json does not tell"


def measured(shapes, names, paths, counts):
    """Number, precision and bytes of the named weights; adds the number to `counts`."""
    found = [shapes[name] for name in names if name in shapes]
    counts.append(sum(math.prod(shape) for shape, _ in found))
    dtypes = " and ".join(sorted({DTYPES.get(dtype, dtype) for _, dtype in found}))
    return f"{counts[-1]:,} in {dtypes}, {size_text(sum(map(os.path.getsize, paths)))} on disk, names and shapes fit"


def base_text(opened, config, counts):
    """Names and shapes of a whole checkpoint's weights against the model; of a base, is it that of the training?"""
    folder = opened.base_folder
    names = weights.check_weights(folder, opened.mode, config, new_prefix=opened.weights == "prefix")
    require_own_base(opened, config)
    paths = [os.path.join(folder, name) for name in weights.weight_files(folder)]
    return measured(weights.weight_shapes(folder), names, paths, counts)


def trained_text(opened, config, counts):
    """Names and shapes of an adapter or a prefix encoder against the model."""
    with quiet():
        found = check_trained(opened, config)
    return measured(found, found, [opened.trained_path], counts)


def finite_text(opened):
    """Every value, read once; UserError for one that is not finite."""
    problems = {opened.base_folder: base_problem(opened.base_folder)}
    if opened.weights != "whole":
        problems[opened.folder] = weights.finite_problem(trained_tensors(opened).items())
    for folder, problem in problems.items():
        if problem:
            raise UserError(f"{folder}: {problem}: download it again, or use an earlier checkpoint")
    return "all are finite"


@functools.lru_cache
def base_problem(folder):
    """The first weight that is not finite; asked once for all adapters of a base."""
    return weights.finite_problem((name, rows[:]) for name, _, rows in weights.stored_tensors(folder))


def show(title, lines):
    """Print a section as it comes; returns the marks."""
    print(f"\n{visible(title)}", flush=True)
    lines, marks = iter(lines), []
    while True:
        found = attempt("not looked at", next, lines, None)  # a library that is missing ends its own section only
        line = found if found[0] == BAD else found[2]
        if line is None:
            return marks
        marks.append(line[0])
        text = f"  {line[0]:<4}  {visible(line[1]):<14}  {visible(line[2])}"
        indent = {"subsequent_indent": " " * 24, "break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(text, 100, **indent), flush=True)


def main(argv):
    """Print all sections; returns the exit code."""
    args = parse_doctor(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts = Facts()
    with quiet():
        attempt("environment", prepare_environment)  # before the libraries start; without torch, they are told of below
    marks = show("versions", version_lines())
    with quiet():
        attempt("cards", find_cards, facts)
    marks += show("machine", machine_lines(facts))
    marks += show("cards", card_lines(facts))
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
