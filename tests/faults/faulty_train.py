"""train.py with a fault: started by the launcher in its place; the FAULT variable says what goes wrong.

FAULT="kill RANK NUMBER POINT"   SIGKILL to itself when a save of this rank comes to this point for the NUMBER-th time
FAULT="full NUMBER"              every write of a state or checkpoint after the NUMBER-th file finds the disk full
FAULT="hang RANK STEP"           this rank does not come back from the micro-batch of this step
FAULT="nan STEP"                 the loss of this step is not finite
"""

import errno
import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import folders  # noqa: E402
import train  # noqa: E402
import watch  # noqa: E402

POINTS = ("before a file", "after a file", "before the manifest", "before the rename", "after the rename")


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
    whole = folders.HashingFile.write

    def write(self, data):
        nonlocal opened
        opened += self.file.tell() == 0
        if opened > int(number):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, data)

    folders.HashingFile.write = write


def hang(rank, step):
    """One rank stops in a step."""
    begin = watch.Watch.begin

    def stop(self, now, *rows):
        begin(self, now, *rows)
        if os.environ["RANK"] == rank and now == int(step):
            time.sleep(10_000)

    watch.Watch.begin = stop


def nan(step):
    """The loss is not finite in a step: a weight is not."""
    begin = watch.Watch.begin
    load_base = train.load_base
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

    train.load_base, watch.Watch.begin = loaded, spoil


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        name, *words = os.environ["FAULT"].split()
        {"kill": kill, "full": full, "hang": hang, "nan": nan}[name](*words)
    with watch.together() as watched:
        train.main(sys.argv[1:], watched)
