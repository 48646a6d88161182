"""train.py with a fault: started by the launcher in its place; the FAULT variable says what goes wrong.

FAULT="kill RANK NUMBER POINT"   SIGKILL to itself when a save of this rank comes to this point for the NUMBER-th time
FAULT="full NUMBER"              every write of a state or checkpoint after the NUMBER-th file finds the disk full
FAULT="hang RANK STEP"           this rank does not come back from the micro-batch of this step
FAULT="nan STEP"                 the loss of this step is not finite
FAULT="ask STEP"                 the process is asked to leave while it works on this step
FAULT="time FILE"                FILE gets a line for each state saved: seconds of the save and of a plain write
"""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from checkpoints import states  # noqa: E402
from runtime import folders, watchdog  # noqa: E402
from training import setup  # noqa: E402

POINTS = ("before a file", "after a file", "before the manifest", "before the rename", "after the rename")
REPLACING = "between the renames"  # reached only where a folder of the name is there already


def kill(rank, number, *point):
    """End this rank at a named point of a save."""
    calls = 0

    def reached(name):
        nonlocal calls
        if name == " ".join(point) and os.environ["RANK"] == rank:
            calls += 1
            if calls == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    folders.reached = reached


def full(number):
    """The disk is full from a file on."""
    opened = 0
    whole = folders.new_file

    class FullDisk:
        """A file that takes half of what is written first."""

        def __init__(self, path):
            self.file = whole(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            self.file.flush()

    def new_file(path):
        nonlocal opened
        opened += 1
        return FullDisk(path) if opened > int(number) else whole(path)

    folders.new_file = new_file


def hang(rank, step):
    """One rank stops in a step."""
    begin = watchdog.Watch.begin

    def stop(self, now, *rows):
        begin(self, now, *rows)
        if os.environ["RANK"] == rank and now == int(step):
            time.sleep(10_000)

    watchdog.Watch.begin = stop


def nan(step):
    """The loss is not finite in a step: a weight is not."""
    begin = watchdog.Watch.begin
    load_base = setup.load_base
    models = []

    def loaded(*args, **kwargs):
        models.append(load_base(*args, **kwargs))
        return models[0]

    def spoil(self, now, *rows):
        begin(self, now, *rows)
        if now == int(step):
            import torch

            with torch.no_grad():
                parameter = next(p for n, p in models[0].named_parameters() if "layers.1.mlp.dense_4h_to_h" in n)
                parameter.view(-1)[0] = float("nan")

    setup.load_base, watchdog.Watch.begin = loaded, spoil


def inf(step):
    """The gradients are not finite from a step on."""
    begin, count_parameters = watchdog.Watch.begin, setup.count_parameters
    now = []

    def hooked(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad * float("inf") if now[-1] >= int(step) else grad)
        return count_parameters(model)

    def note(self, number, *rows):
        now.append(number)
        begin(self, number, *rows)

    setup.count_parameters, watchdog.Watch.begin = hooked, note


def ask(step):
    """SIGTERM in the middle of a step."""
    begin = watchdog.Watch.begin

    def asked(self, now, *rows):
        begin(self, now, *rows)
        if now == int(step):
            os.kill(os.getpid(), signal.SIGTERM)

    watchdog.Watch.begin = asked


def time_saves(path):
    """Time what the loop waits for when a state is saved, how long until it has its name, and a plain write of its
    bytes in the same place.

    Right before the save and before the plain write, the bytes are written and removed once: so both find memory and
    blocks that the system has at hand. The first save, whose bytes are not known before, is not counted.
    """
    state_files, begin = states.state_files, watchdog.Watch.begin
    begun = []  # (when, folder) of a save; the loop goes on where the next micro-batch begins
    contents = []  # of the files that this rank had in the last state

    def files(scratch):
        folder = pathlib.Path(scratch.removesuffix(folders.PARTIAL))
        plain_write(folder.parent, contents)
        begun.append((time.monotonic(), folder))
        return state_files(scratch)

    def compare(self, *rest):
        import torch.distributed as dist

        if begun:
            dist.barrier()
            start, folder = begun.pop()
            values = {"seconds": time.monotonic() - start}
            for thread in threading.enumerate():
                if thread.name == "closing":
                    thread.join()
            dist.barrier()
            values["named"] = time.monotonic() - start
            found = [file for file in folder.rglob("*") if file.is_file()]  # nothing where it was not saved
            is_counted = bool(contents and found)
            contents[:] = [file.read_bytes() for file in found if owner(file) == os.environ["RANK"]]
            plain_write(folder.parent, contents)
            values["plain"] = plain_write(folder.parent, contents)
            values["bytes"] = sum(file.stat().st_size for file in found)
            if is_counted and os.environ["RANK"] == "0":
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(values) + "\n")
        begin(self, *rest)

    states.state_files, watchdog.Watch.begin = files, compare


def plain_write(parent, contents):
    """Seconds in which all ranks write files of these contents and flush them; they are removed again. Collective."""
    import torch.distributed as dist

    place = parent / f"plain-{os.environ['RANK']}"
    place.mkdir()
    dist.barrier()
    start = time.monotonic()
    for number, content in enumerate(contents):
        with open(place / str(number), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    dist.barrier()
    seconds = time.monotonic() - start
    shutil.rmtree(place)
    dist.barrier()
    return seconds


def owner(file):
    """The rank, as text, that has written a file of a state."""
    found = re.search(r"pp_rank_(\d+)|^rank-(\d+)", file.name)
    return (found[1] or found[2]) if found else "0"


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        name, *words = os.environ["FAULT"].split()
        faults = {"kill": kill, "full": full, "hang": hang, "nan": nan, "inf": inf, "ask": ask, "time": time_saves}
        faults[name](*words)
    with watchdog.together() as watched:
        train.main(sys.argv[1:], watched)
