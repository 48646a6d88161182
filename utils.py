"""Devices, precision, seeds; JSON files; rows named in a message."""

from __future__ import annotations

import json
import os
import random
import warnings
from typing import TYPE_CHECKING, Any

from runtime.exits import UserError
from runtime.file_kinds import BROUGHT_ELSE, explain
from runtime.plain_files import parse_json, read_json_text
from runtime.ranks import local_rank, rank

if TYPE_CHECKING:
    import torch

MAX_NAMED = 8  # rows named in a message


def prepare_environment(device: str = "auto") -> None:
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


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, as torch does on a GPU.

    It would give blocks of 32 MiB and more back at once and get them again, page by page.
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


def choose_device(name: str) -> Any:
    """torch.device for `--device auto|cuda|cpu`; UserError where CUDA is asked for and absent.

    auto is the GPU of this rank, unless there is none or DS_ACCELERATOR=cpu is set.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device: check the driver (nvidia-smi) or use --device cpu")
    wants_cpu = name == "cpu" or (name == "auto" and os.environ.get("DS_ACCELERATOR") == "cpu")
    if wants_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def choose_precision(name: str, device: torch.device) -> str:
    """'bf16', 'fp16' or 'fp32' for `--precision`: auto is bf16 where the GPU has it, fp16 elsewhere, fp32 on CPU."""
    import torch

    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: a CPU trains in fp32 or bf16 only: use --precision fp32")
        return name
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def torch_dtype(precision: str) -> Any:
    """The torch dtype of 'bf16', 'fp16', 'fp32'."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch; each rank draws its own dropout."""
    import numpy
    import torch

    seed += rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def read_json(path: Any) -> dict:
    """A JSON object from a file; UserError that names the file otherwise."""
    try:
        value = parse_json(read_json_text(path))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if os.path.isfile(path) and (said := explain(path, BROUGHT_ELSE)):
            raise UserError(f"{path}: {said}") from None
        raise UserError(f"{path}: cannot be read as JSON ({error}): give a complete file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is a {type(value).__name__}, not a JSON object")
    return value


def dump_json(value: Any, file: Any) -> None:
    """`write_json` to an open file."""
    json.dump(value, file, ensure_ascii=False, indent=2)
    file.write("\n")


def write_json(value: Any, path: Any) -> None:
    """A JSON file, indented, with Chinese as it is."""
    with open(path, "w", encoding="utf-8") as file:
        dump_json(value, file)


def name_rows(places: Any) -> str:
    """The first places, and how many more there are."""
    more = len(places) - MAX_NAMED
    return ", ".join(places[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """The text in one line, with what cannot be shown written as in a Python string."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
