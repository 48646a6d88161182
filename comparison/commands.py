"""Commands that are run once: what is done already, from the same command and inputs, is not done again."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from runtime.distributed import free_port
from runtime.entry import listen, listen_as_before
from runtime.exits import EXIT_LEFT, UserError, fail
from runtime.folders import file_entry, verify, whole_file
from runtime.holding import require_there
from runtime.streams import visible


class StepError(SystemExit):
    """A command ended with another exit code than 0, which is also this program's unless it is caught."""


def run_words(words: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run a command and wait for it, also where this process is asked to leave: then it is asked to leave, too.

    Its process group is its own, so that Ctrl-C reaches it once, through this process. Returns (exit code, was this
    process asked to leave); the code is 127, as in a shell, where there is no such command.
    """
    asked: list[int] = []
    try:
        process = subprocess.Popen(words, env=environment, preexec_fn=os.setpgrp)
    except OSError as error:
        print(f"{visible(words[0])}: cannot be started ({error.strerror})", file=sys.stderr, flush=True)
        return 127, False

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    before = listen(pass_on)
    try:
        code = process.wait()
    finally:
        listen_as_before(before)
    return (code if code >= 0 else 128 - code), bool(asked)


RunWords = Callable[[list[str], dict[str, str]], tuple[int, bool]]


class Steps:
    """Runs commands once: each leaves a stamp with its command, a hash of it and its inputs, its seconds, and the hash
    of its result.

    folder: for the stamps, and for results that this program alone looks after. gpus: CUDA_VISIBLE_DEVICES of what the
    launcher starts. run_words: how a command is run; tests put another one here.
    """

    def __init__(self, folder: str, gpus: str = "0", run_words: RunWords = run_words) -> None:
        self.folder = Path(folder)
        self.run_words = run_words
        self.commands: list[str] = []
        self.seconds = 0.0
        self.digests: dict[str, str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        # `python` and `deepspeed` are those of this interpreter, also where its environment is not activated.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        # What a launch left in the shell means nothing to commands of one process, and the launcher gives its own.
        left = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self.environment = {**left, "PATH": path}
        self.gpus = gpus

    def stamp_path(self, name: str) -> Path:
        """Where the stamp of a step lies."""
        return self.folder / f"{name}.stamp.json"

    def stamp(self, name: str) -> dict:
        """The stamp of a step, {} without one. `seconds` is None while the step has not come to its end."""
        path = self.stamp_path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def key(self, command: str, inputs: list[str]) -> str:
        """SHA-256 over a command and the contents of its inputs."""
        key = hashlib.sha256(command.encode())
        for path in inputs:
            key.update(self.digest(path).encode())
        return key.hexdigest()

    def digest(self, path: str) -> str:
        """SHA-256 of a file, computed once."""
        path = str(path)
        if path not in self.digests:  # base weights are the input of many steps
            self.digests[path] = file_entry(path)["sha256"]
        return self.digests[path]

    def has_ended(self, name: str, result: str, key: str | None = None) -> bool:
        """Has a step come to its end, with this key, and is its result there?"""
        stamp = self.stamp(name)
        return stamp.get("seconds") is not None and Path(result).exists() and key in (None, stamp["key"])

    def is_done(self, name: str, result: str, key: str | None = None) -> bool:
        """Has a step come to its end, with this key, and is its result as it left it?"""
        return self.has_ended(name, result, key) and not self.changes(name, result)

    def changes(self, name: str, result: str) -> list[str]:
        """What was changed in the result of a step since its end, one line each."""
        if os.path.isfile(result):
            found = self.stamp(name).get("result")  # stamps of before this was kept have none
            return [f"{result}: is not what this step wrote"] * (found not in (None, self.digest(result)))
        folders = [Path(result), *sorted(path for path in Path(result).iterdir() if path.is_dir())]
        return [line for folder in folders for line in verify(str(folder), full=False)]

    def is_current(self, name: str, command: str, inputs: list[str], result: str) -> bool:
        """Is a step done, by this command from these inputs as they are now?"""
        if not self.is_done(name, result) or self.stamp(name)["command"] != command:
            return False
        return all(map(os.path.isfile, inputs)) and self.is_done(name, result, self.key(command, inputs))

    def is_own(self, result: str) -> bool:
        """Is a result inside the folder? What lies elsewhere serves others too, and looks after itself."""
        return self.folder.resolve() in Path(result).resolve().parents

    def conflict(self, name: str, key: str, result: str, goes_on: bool = False) -> str | None:
        """Why a folder cannot be the result of a step, or None: it is that of other settings, and is worth keeping, or
        was changed since."""
        stamp = self.stamp(name)
        is_kept = stamp and (goes_on or stamp["seconds"] is not None)
        if not is_kept or not self.is_own(result) or not Path(result).is_dir():
            return None
        if stamp["key"] != key:
            return f"{result}: is of other settings: remove or rename it"
        lines = self.changes(name, result) if stamp["seconds"] is not None else []
        return f"{lines[0]}, or remove or rename {result}, and it is made again" if lines else None

    def run(self, name: str, command: str, inputs: list[str], result: str, goes_on: bool = False) -> None:
        """Run a command line unless `result` is there from the same command and inputs.

        goes_on: where it was broken off the command finds its own place again; otherwise what it left is removed.
        """
        self.commands.append(command)
        key = self.key(command, inputs)
        if self.is_done(name, result, key):
            self.seconds += self.stamp(name)["seconds"]
            print(f"\n== {visible(name)}: as before, {visible(result)}", flush=True)
            return
        if problem := self.conflict(name, key, result, goes_on):
            fail(problem)
        if self.has_ended(name, result, key):
            print(f"\n{self.changes(name, result)[0]}: it is made again", flush=True)
        if self.is_own(result) and Path(result).is_dir() and not (goes_on and self.stamp(name)):
            shutil.rmtree(result)  # of a run that was broken off
        require_there(self.folder)
        self.write_stamp(name, key, command)
        print(f"\n== {visible(name)}\n$ {visible(command)}", flush=True)
        started = time.monotonic()
        words = shlex.split(command.replace("--master_port 29500", f"--master_port {free_port()}"))
        self.digests.pop(str(result), None)
        code, is_asked = self.run_words(words, self.command_environment(words))
        seconds = time.monotonic() - started
        require_there(self.folder)
        if code == 0:
            self.write_stamp(name, key, command, seconds, self.digest(result) if os.path.isfile(result) else None)
            self.seconds += seconds
        if is_asked or code == EXIT_LEFT:
            raise SystemExit(EXIT_LEFT)
        if code:
            raise StepError(code)

    def write_stamp(
        self, name: str, key: str, command: str, seconds: float | None = None, result: str | None = None
    ) -> None:
        """Note that a step has begun or, with its seconds and the hash of a result that is a file, come to its end."""
        path = self.stamp_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"key": key, "command": command, "seconds": seconds, "result": result}
        with whole_file(path) as file:
            json.dump(values, file, ensure_ascii=False)

    def command_environment(self, words: list[str]) -> dict[str, str]:
        """The launcher takes these GPUs alone; on a CPU, which has none, that is the number of processes."""
        return {**self.environment, "CUDA_VISIBLE_DEVICES": self.gpus} if "deepspeed" in words else self.environment


def newest_checkpoint(folder: str) -> str:
    """The checkpoint of the last step in a run's folder."""
    found = [path for path in Path(folder).glob("epoch-*-step-*") if (path / "run.json").exists()]
    if not found:
        raise UserError(f"{folder}: no checkpoint in it: remove the folder, and it is trained again")
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1])))
