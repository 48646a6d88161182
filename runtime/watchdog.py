"""What ends a run from outside: a request to leave, a process that died, a step that stalls.

A thread in each process looks every second. Between the processes it keeps lifelines: one connection from each to the
first one. The system closes them where a process dies, however it dies and whatever the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from runtime.entry import listen, listen_as_before, prepare_streams
from runtime.exits import EXIT_LEFT, EXIT_STALLED, NotStartedError, ending, fail
from runtime.holding import release_all
from runtime.hosts import TOKEN_BYTES, describe_missing, find_place, join_lifeline, leave_word, open_lifelines
from runtime.ranks import is_main, rank, world_size
from runtime.streams import TolerantStream

LOOK_SECONDS = 1.0
CONNECT_SECONDS = 60
CLOSING, CLOSING_SECONDS = "closing", 30  # name of the thread that closes a state; how long it is waited for
SAID = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the terminal has gone (SIGHUP)"}  # of signals; others by their names
# Seconds without a sign of life after which the system takes another host for dead.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Watch:
    """The watch of one process. `asked` says why the run should leave, or is None."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.is_training = False
        self.step_timeout = 0.0
        self.lines = {}  # {connection: rank at its other end}
        self.work: tuple | None = None  # (time when it began, step, EncodedRows, numbers of its rows)
        self.thread: threading.Thread | None = None
        self.is_over = threading.Event()

    def start(self, output_dir: str, step_timeout: float) -> None:
        """Watch from now on; the process group must be there. step_timeout: seconds, 0 is off. Collective."""
        self.output_dir, self.step_timeout = output_dir, step_timeout
        self.launchers = launchers()
        if world_size() > 1:
            self.connect()
        self.thread = threading.Thread(target=self.run, daemon=True, name="watch")
        self.thread.start()

    def connect(self) -> None:
        """Make the lifelines. Collective."""
        import torch.distributed as dist

        place: list[Any] = [None]
        problem: str | None = None
        if is_main():
            found = find_place()
            listener = socket.create_server((found.own, 0), family=found.family, backlog=1024)
            place = [(listener.getsockname()[:2], secrets.token_bytes(TOKEN_BYTES))]
        dist.broadcast_object_list(place, src=0)
        address, token = place[0]
        if is_main():
            with listener:
                self.lines = open_lifelines(listener, token, CONNECT_SECONDS)
            if missing := set(range(1, world_size())) - set(self.lines.values()):
                problem = f"{describe_missing(missing)} did not connect to port {address[1]}"
        else:
            try:
                self.lines = {join_lifeline(tuple(address), token, CONNECT_SECONDS + 10): 0}
            except OSError as error:
                problem = f"{address[0]} port {address[1]}: {error}"
        for line in self.lines:
            keep_alive(line)
        if problem:  # a wall between the hosts: the run works, but the death of a process shows late
            print(f"note: no connection to watch the processes of other hosts: {problem}", file=sys.stderr, flush=True)

    def on_signal(self, number: Any, frame: Any) -> None:
        """Leave when the step is done. More signals change nothing: launchers send several."""
        is_news, name = self.asked is None, SAID.get(number) or signal.Signals(number).name
        self.asked = self.asked or name
        if is_news and is_main():
            what = "leaving after this step" if self.is_training else "left before the training began"
            print(f"\n{name}: {what}", file=sys.stderr, flush=True)
        if is_news and not self.is_training:
            sys.exit(EXIT_LEFT)

    def begin(self, step: int, rows: Any, row_numbers: list[int]) -> None:
        """A micro-batch of a step begins, of these rows of `rows`: `--step_timeout` counts from here."""
        self.is_training = True
        self.work = (time.monotonic(), step, rows, row_numbers)

    def pause(self) -> None:
        """No step is being worked on; what follows (a save) may take its time."""
        self.work = None

    def run(self) -> None:
        """The thread. Where it fails the run ends: the death of a process would go unnoticed from then on."""
        try:
            self.poll()
        except Exception as error:
            self.leave_at_once(1, f"the watch over the processes failed: {error!r}")

    def poll(self) -> None:
        """Wait for news from the other processes, and look at the clock and the launcher."""
        selector = selectors.DefaultSelector()
        for line in self.lines:
            selector.register(line, selectors.EVENT_READ)
        while not self.is_over.wait(0 if self.lines else LOOK_SECONDS):
            for key, _ in selector.select(LOOK_SECONDS) if self.lines else []:
                self.receive(key.fileobj, selector)
            if self.asked is None and self.launchers != launchers(len(self.launchers)):
                self.asked = "the launcher has gone"
            work = self.work  # the main thread may take it away meanwhile
            if work and self.step_timeout and time.monotonic() - work[0] > self.step_timeout:
                self.stalled()

    def receive(self, line: Any, selector: Any) -> None:
        """News from another process: it ends, it stalls, or it is dead (and the connection at its end)."""
        try:
            words = line.recv(100).decode().split()
        except OSError:
            words = []
        if self.is_over.is_set():
            return
        if "stalled" in words:
            self.stalled()
        if "end" not in words:
            self.send("end 1")
            self.leave_at_once(1, f"the process of rank {self.lines[line]} has died: the others end too")
        code = int((words[words.index("end") + 1 :] or ["1"])[0])
        selector.unregister(line)
        del self.lines[line]
        if code not in (0, EXIT_LEFT):  # with these, all come to the end together
            self.send(f"end {code}")
            self.leave_at_once(code)

    def send(self, message: str) -> None:
        """Send a message over all lifelines."""
        for line in list(self.lines):
            with contextlib.suppress(OSError):
                line.sendall(f"{message}\n".encode())

    def end(self, code: int) -> None:
        """This process ends now with this exit code: no longer watch, and let the others know."""
        self.is_over.set()
        self.send(f"end {code}")

    def leave_at_once(self, code: int, message: str | None = None) -> NoReturn:
        """End the process although its main thread waits for something that will never come."""
        if message:
            print(f"\ntrain.py: error: {message}", file=sys.stderr)
        finish_closing()
        release_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def stalled(self) -> NoReturn:
        """Write down what every process was doing, then end."""
        self.send("stalled")
        path = os.path.join(self.output_dir, f"stalled-rank-{rank()}.txt")
        began, step, rows, numbers = self.work or (time.monotonic(), None, None, [])
        what = f"step {step}, rows {', '.join(map(rows.place, numbers)) or 'none'}" if step else "no step"
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(f"{what}; for {time.monotonic() - began:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(2 * LOOK_SECONDS)  # the others hear of it and write theirs
        self.send(f"end {EXIT_STALLED}")
        self.leave_at_once(
            EXIT_STALLED, f"--step_timeout {self.step_timeout:g}: {what} did not end in time: see {path}"
        )


def finish_closing() -> None:
    """Let the thread that closes a state come to its end: all ranks have written theirs, it must not be lost."""
    for thread in threading.enumerate():
        if thread.name == CLOSING:
            thread.join(CLOSING_SECONDS)


def keep_alive(line: Any) -> Any:
    """Let the system notice a host that is gone."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def launchers(number: Any = 2) -> list:
    """Process ids of the DeepSpeed launcher's processes above this one, at most `number`.

    `deepspeed` starts a second process, which starts the ranks; a signal to the first one alone does not reach them.
    """
    found, process = [], os.getpid()
    while len(found) < number:
        try:
            with open(f"/proc/{process}/stat", encoding="utf-8") as file:
                process = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{process}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except (OSError, ValueError):
            break
        if not any(word == b"deepspeed.launcher.launch" or word.endswith(b"bin/deepspeed") for word in words):
            break
        found.append(process)
    return found


@contextlib.contextmanager
def together() -> Iterator[Any]:
    """Run a command whose processes end together, with one exit code; what the user can fix is one line (`ending`).

    Yields the watch, to be started when the process group is there.
    """
    prepare_streams()
    sys.stdout, sys.stderr = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
    watch = Watch()
    before = listen(watch.on_signal)
    code, is_told = 0, False
    try:
        yield watch
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        raise
    except BaseException as error:
        line, code = ending(error) or (None, 1)
        if line:
            is_told = isinstance(error, NotStartedError)
            fail(line, code=code)
        if watch.lines:  # if another process has died, the watch says so, and a failed collective is no news
            time.sleep(2 * LOOK_SECONDS)
        raise
    finally:
        watch.end(code)
        release_all()
        if code and watch.thread is None and not is_told:
            leave_word(code)
        end_process_group(code)
        listen_as_before(before)


def end_process_group(code: int) -> None:
    """Leave at once where the process group is still there: its threads may abort an interpreter that ends (gloo)."""
    if "torch" not in sys.modules:  # --help, or a wrong flag
        return
    import torch.distributed as dist

    if dist.is_initialized():
        if isinstance(sys.exc_info()[1], Exception):
            traceback.print_exc()
        finish_closing()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
