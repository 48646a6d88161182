"""Ranks, end of the process group, devices, precision, seeds."""

import contextlib
import os
import random
import re
import sys
import time
import warnings

from exits import EXIT_WRONG_INPUT, UserError

# What a terminal obeys: control characters but for tab and line end, and marks that turn the direction of writing.
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MOST_MESSAGE = 2000  # characters of an error
BLANKS = "\n\t\xa0\u3000"  # not printable, but no harm to a terminal


def launched_number(name, alone):
    """A number that the launcher gives each process; `alone` where there is one process, or no launcher.

    Variables that an earlier launch left in the shell name no rank: see `launcher_problem`.
    """
    is_launched = os.environ.get("RANK") and os.environ.get("MASTER_ADDR") and launcher_problem() is None
    return int(os.environ.get(name) or alone) if is_launched else alone


def launcher_problem():
    """What is wrong with the launcher's variables, or None: those of a launcher are there together, or none is."""
    values = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if os.environ.get(name)}
    for name, value in values.items():
        if not value.isdecimal():
            return f"{name}={value}: is not a whole number: unset {name}, or start with the launcher"
    world, rank = (int(values.get(name, alone)) for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)))
    missing = [name for name in ("RANK", "MASTER_ADDR") if not os.environ.get(name)]
    if world > 1 and missing:
        return f"WORLD_SIZE={world} is set but {missing[0]} is not: unset WORLD_SIZE, or start with the launcher"
    if rank >= world:
        size = f"WORLD_SIZE is {world}" if "WORLD_SIZE" in values else "WORLD_SIZE is not"
        return f"RANK={rank} is set but {size}: unset RANK, or start with the launcher"
    return None


def rank():
    """Number of this process over all hosts, 0 without a launcher."""
    return launched_number("RANK", 0)


def local_rank():
    """Number of this process on its host, 0 without a launcher."""
    return launched_number("LOCAL_RANK", 0)


def is_main():
    """Is this the first process of all hosts? True without a launcher."""
    return rank() == 0


def is_local_main():
    """Is this the first process of its host?"""
    return local_rank() == 0


def world_size():
    """Number of processes over all hosts, 1 without a launcher."""
    return launched_number("WORLD_SIZE", 1)


def peak_memory(device):
    """Most memory that this process has held: on its card, or its resident memory on a CPU. Bytes."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_rank_0(*values, **kwargs):
    """Print on the first process only."""
    if is_main():
        print(*values, **kwargs, flush=True)


class OtherStream:
    """A stream that writes otherwise than the one that it stands for, and is as that one in all else."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def writelines(self, lines):
        for line in lines:
            self.write(line)


class PlainStream(OtherStream):
    """A stream on which no text makes a terminal do something: what it would obey is spelled out, as `\\x1b`.

    kept: what is written as it is nevertheless; a progress bar goes back to the line's begin.
    """

    def __init__(self, stream, kept=""):
        super().__init__(stream)
        self.kept = kept

    def write(self, text):
        self.stream.write(OBEYED.sub(lambda match: match[0] if match[0] in self.kept else repr(match[0])[1:-1], text))
        return len(text)


class LastingStream(OtherStream):
    """A stream for a long run: what cannot be written (a full disk, a pipe whose reader has gone) is left out.

    only: the one error number for which it is; None: all.
    """

    def __init__(self, stream, only=None):
        super().__init__(stream)
        self.only = only

    @contextlib.contextmanager
    def trying(self):
        """Let an error pass."""
        try:
            yield
        except OSError as error:
            if self.only not in (None, error.errno):
                raise

    def write(self, text):
        with self.trying():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self.trying():
            self.stream.flush()


def progress_bar(*rows, **how):
    """A bar of tqdm that goes by a clock which nobody sets: no speed is negative, and none has no end."""
    import tqdm.std

    tqdm.std.time = time.monotonic  # each bar takes it from there when it begins
    tqdm._monitor.time = time.monotonic
    return tqdm.tqdm(*rows, **how)


def fail(problems, prog=None, code=EXIT_WRONG_INPUT):
    """End the program with an exit code and a line for each problem (a message or a list of them).

    All ranks usually find the same: the first one speaks. Another waits until the launcher has ended it, and speaks
    only if the fault is its own.
    """
    prog = prog or os.path.basename(sys.argv[0])
    if not is_main():
        time.sleep(5)
        prog = f"{prog}: rank {rank()}"
    for problem in [problems] if isinstance(problems, str) else problems:
        print(f"{prog}: error: {shortened(visible(problem))}", file=sys.stderr, flush=True)
    sys.exit(code)


def shortened(text):
    """A message that a terminal can show: of one that a stranger's value makes too long, the beginning and the fix."""
    return text if len(text) <= MOST_MESSAGE else f"{text[: MOST_MESSAGE - 300]} ... {text[-300:]}"


def visible(text, as_lines=False):
    """A text on one line, with the characters that a terminal would obey, or nobody would see, spelled out.

    as_lines: keep the line ends, and the blanks that are harmless.
    """
    text, kept = (str(text), BLANKS) if as_lines else (" ".join(str(text).splitlines()), "")
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def prepare_environment(device="auto"):
    """Settings that must be there before the libraries start: threads per rank, the accelerator, quiet libraries.

    device: the flag `--device`.
    """
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_size)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its notes on connections are stack traces; hosts.py tells
    # Deprecation notes between the libraries, of no use to a reader of the training log.
    for place in ("torch.distributed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=place.replace(".", r"\."))
    os.environ["DS_ACCELERATOR"] = choose_device(device).type  # DeepSpeed would guess for itself
    if os.environ["DS_ACCELERATOR"] == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors for the next ones, as torch does on a card.

    It would give blocks of 32 MiB and more back at once and get them again, page by page: an eighth of a step's time.
    Values that the environment gives (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) are left alone.
    """
    import ctypes

    options = {"MALLOC_MMAP_THRESHOLD_": (-3, 288 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30)}
    for name, (option, value) in options.items():  # option: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        if name not in os.environ:
            try:
                ctypes.CDLL("libc.so.6").mallopt(option, value)
            except (OSError, AttributeError):
                return  # another C library


def choose_device(name):
    """torch.device for `--device auto|cuda|cpu`; UserError where CUDA is asked for and absent.

    auto is the card of this rank, unless there is none or DS_ACCELERATOR=cpu is set.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device: check the driver (nvidia-smi) or use --device cpu")
    wants_cpu = name == "cpu" or (name == "auto" and os.environ.get("DS_ACCELERATOR") == "cpu")
    if wants_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def choose_precision(name, device):
    """'bf16', 'fp16' or 'fp32' for `--precision`: auto is bf16 where the card has it, fp16 elsewhere, fp32 on CPU."""
    import torch

    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: a CPU trains in fp32 or bf16 only: use --precision fp32")
        return name
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def torch_dtype(precision):
    """The torch dtype of 'bf16', 'fp16', 'fp32'."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def free_port():
    """A TCP port of this machine that nobody listens on now.

    It is none of those that the system gives to outgoing connections, one of which may take it before it is used.
    """
    import socket

    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def stop_distributed(engine=None):
    """Leave together and cleanly: gloo's worker thread may abort an interpreter that ends at once."""
    import torch.distributed as dist

    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.barrier()
        if engine is not None:
            engine.destroy()
        dist.destroy_process_group()
        time.sleep(0.3)


def sum_over_ranks(*values, group=None):
    """Sums of numbers over all processes, as floats. Collective, and waits for the card."""
    import torch
    import torch.distributed as dist

    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def on_main(function):
    """Call a function on the first process; every rank gets what it returns. Collective, where there are ranks.

    Its UserError is raised on every rank, and an OSError as a UserError.
    """
    dist = sys.modules.get("torch.distributed")  # without it there are no ranks, and no need to import it
    result = [None, None]
    if is_main():
        try:
            result[0] = function()
        except OSError as error:
            result[1] = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        except UserError as error:
            result[1] = str(error)
    if dist and dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def barrier():
    """Wait for all ranks, where there are several."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def set_seed(seed):
    """Seed Python, numpy and torch; each rank draws its own dropout."""
    import numpy
    import torch

    seed += rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
