"""The process group: begun, ended, and what all ranks do together."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from runtime.exits import UserError
from runtime.ranks import is_main, world_size


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now.

    It is none of those that the system gives to outgoing connections, one of which may take it before it is used.
    """
    import socket

    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def stop_distributed(engine: Any = None) -> None:
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


def sum_over_ranks(*values: Any, group: Any = None) -> list:
    """Sums of numbers over all processes, as floats. Collective, and waits for the GPU."""
    import torch
    import torch.distributed as dist

    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def on_main(function: Callable) -> Any:
    """Call a function on the first process; every rank gets what it returns. Collective, where there are ranks.

    Its UserError is raised on every rank, and an OSError as a UserError.
    """
    dist = sys.modules.get("torch.distributed")  # without it there are no ranks, and no need to import it
    result: list[Any] = [None, None]
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


def barrier() -> None:
    """Wait for all ranks, where there are several."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The values of all ranks, a list. Collective."""
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
