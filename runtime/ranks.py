"""Which process of a launch this one is, from the variables that launchers set."""

from __future__ import annotations

import os
from typing import Any


def launched_number(name: str, alone: int) -> int:
    """A number that the launcher gives each process; `alone` where there is one process, or no launcher.

    Variables that an earlier launch left in the shell name no rank: see `launcher_problem`.
    """
    is_launched = os.environ.get("RANK") and os.environ.get("MASTER_ADDR") and launcher_problem() is None
    return int(os.environ.get(name) or alone) if is_launched else alone


def launcher_problem() -> str | None:
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


def rank() -> int:
    """Number of this process over all hosts, 0 without a launcher."""
    return launched_number("RANK", 0)


def local_rank() -> int:
    """Number of this process on its host, 0 without a launcher."""
    return launched_number("LOCAL_RANK", 0)


def is_main() -> bool:
    """Is this the first process of all hosts? True without a launcher."""
    return rank() == 0


def is_local_main() -> bool:
    """Is this the first process of its host?"""
    return local_rank() == 0


def world_size() -> int:
    """Number of processes over all hosts, 1 without a launcher."""
    return launched_number("WORLD_SIZE", 1)


def print_rank_0(*values: Any, **kwargs: Any) -> None:
    """Print on the first process only."""
    if is_main():
        print(*values, **kwargs, flush=True)
