"""What all hosts of a run must have: the output folder that they share, the same rows."""

from __future__ import annotations

import os
import time
from typing import Any

from runtime.distributed import gather, on_main
from runtime.exits import UserError
from runtime.hosts import POLL_SECONDS, host_name, is_one_host
from runtime.ranks import is_local_main

SHARE_SECONDS = 10  # a network file system may show a new file to other hosts late


def check_shared(folder: str) -> None:
    """UserError where a host does not see what the first process writes into this folder. Collective.

    The states of a run have files of every process, and lie in one folder.
    """

    if is_one_host():
        return

    def write() -> str:
        os.makedirs(folder, exist_ok=True)
        name = os.path.join(folder, f".shared-{os.urandom(8).hex()}")
        with open(name, "x", encoding="utf-8"):
            return name

    name = on_main(write)
    end, problem = time.monotonic() + SHARE_SECONDS, None
    while is_local_main() and not os.path.exists(name):
        if time.monotonic() > end:
            problem = host_name()
            break
        time.sleep(POLL_SECONDS)
    found = gather(problem)
    on_main(lambda: os.remove(name))
    if blind := sorted(filter(None, found)):
        raise UserError(
            f"--output_dir {folder}: {', '.join(blind)} does not see what the first host writes there: give a folder"
            " that all hosts share"
        )


def check_same(what: str, value: Any) -> None:
    """UserError where a value, such as the hash of a file, is not that of the first process. Collective."""

    if is_one_host():
        return
    found = gather((host_name(), value))
    others = sorted({host for host, other in found if other != found[0][1]})
    if others:
        raise UserError(f"{what}: {', '.join(others)} has other ones than {found[0][0]}: copy the first host's files")
