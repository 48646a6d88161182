"""What this machine has: packages, memory, GPUs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.exits import UserError

if TYPE_CHECKING:
    import torch

OK, NOTE, BAD = "ok", "note", "BAD"  # marks of a check


def attempt(name: str, function: Callable, *values: Any) -> tuple[str, str, Any]:
    """The line of a check, (mark, name, text): what the function returns, or BAD and the reason."""
    try:
        return OK, name, function(*values)
    except Exception as error:  # broken files and libraries fail in many ways, and telling is what we are here for
        text = " ".join(str(error).split())[:400]
        # Our own messages are UserErrors written for users.
        return BAD, name, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print and warn. stderr stays: DeepSpeed hands it to compilers as a file."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


INSTALL = "pip install -r requirements.txt"
REQUIREMENTS = pathlib.Path(__file__).resolve().parent.parent / "requirements.txt"
# What training and prediction import, deep enough for a broken installation to show.
IMPORTS = {
    **{name: name for name in ("torch", "peft", "deepspeed", "sentencepiece", "numpy")},
    "transformers": "transformers.modeling_utils",
    "safetensors": "safetensors.torch",
}


def output_of(*command: Any) -> tuple[None, str] | tuple[int, str]:
    """(exit code, output) of a program; (None, "") where it is missing or hangs."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return process.returncode, process.stdout.strip() or process.stderr.strip()


def installed(name: str) -> str | None:
    """Version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: Any) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def older(name: str, version: Any) -> bool:
    """Is a package there, and older than this?"""
    return installed(name) is not None and numbers(installed(name)) < numbers(version)


def pins(python: Any = sys.version_info[:2]) -> dict:
    """{name: version} of requirements.txt for a version of Python."""
    found = {}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        match = re.match(r'([\w.-]+)==([\w.]+)(?:; python_version (>=|<) "(\d+)\.(\d+)")?$', line)
        if match and (match[3] is None or (python >= (int(match[4]), int(match[5]))) == (match[3] == ">=")):
            found[match[1]] = match[2]
    return found


def memory() -> tuple[int, int]:
    """(total, available) bytes of this machine."""
    with open("/proc/meminfo", encoding="ascii") as file:
        values = dict(re.findall(r"^(\w+): +(\d+) kB", file.read(), re.M))
    return int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024


def memory_limit(groups: Any = "/proc/self/cgroup", root: Any = "/sys/fs/cgroup") -> float:
    """Least memory limit in bytes of this process's control groups, version 1 or 2; infinite without one."""
    limits = [math.inf]
    for _, kinds, path in re.findall(r"^(\d+):(|memory):(.*)$", pathlib.Path(groups).read_text(), re.M):
        group = pathlib.Path(f"{root}/{kinds}/{path}")
        for folder in (group, *group.parents):  # a limit above counts too; a container may see its group as the root
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # 'max' is no number
                    limits.append(int((folder / name).read_text()))
    return min(limits)


GPU = namedtuple("GPU", "name total free capability")  # sizes in bytes, capability as in (9, 0)


@dataclass
class Facts:
    """What torch and nvidia-smi say about GPUs."""

    cuda: str = None  # that torch is built for, '' for CPU only, None where torch cannot be imported
    driver_cuda: str = ""  # the newest that the driver runs
    gpus: list = field(default_factory=list)
    problem: str = ""  # why torch sees none, in its words
    warned: list = field(default_factory=list)  # by torch, as of a GPU that it has no code for
    smi: tuple = (None, "")  # exit code and output of nvidia-smi


def find_gpus(facts: Any) -> None:
    """Fill in the facts of GPUs."""
    facts.smi = output_of("nvidia-smi")
    facts.driver_cuda = "".join(re.findall(r"CUDA\D*Version: (\d+\.\d+)", facts.smi[1])[:1])
    import torch

    facts.cuda = torch.version.cuda or ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        mark, _, facts.problem = attempt("GPUs", torch.cuda.init)
        for number in range(torch.cuda.device_count() if mark == OK else 0):
            gpu = torch.cuda.get_device_properties(number)
            is_free, _, free = attempt("free", torch.cuda.mem_get_info, number)  # fails on a GPU that others fill
            free = free[0] if is_free == OK else 0
            facts.gpus.append(GPU(gpu.name, gpu.total_memory, free, (gpu.major, gpu.minor)))
    facts.warned = [" ".join(str(warning.message).split()) for warning in warned]


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held: on its GPU, or its resident memory on a CPU. Bytes."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PACKAGES = ("torch", "transformers", "deepspeed", "peft")


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """{package: its installed version}."""
    return {name: importlib.metadata.version(name) for name in names}


def machine() -> dict:
    """What the comparison runs on, and the versions."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        names = re.findall(r"^model name\s*: (.*)$", file.read(), re.M)
    code, gpus = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {
        "system": platform.platform(),
        "cpu": f"{len(os.sched_getaffinity(0))} x {names[0] if names else platform.machine()}",
        "memory_bytes": memory()[0],
        "gpus": gpus.splitlines() if code == 0 else [],
        "versions": {"python": platform.python_version(), **versions()},
    }
