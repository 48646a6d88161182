"""One writer at a time: what a command writes is locked until the command ends, and known again if it goes meanwhile.

The lock is a small file that the system locks (flock): `.lock` inside the folder of a training or a comparison,
`.NAME.lock` beside a file or folder NAME that is written as a whole. It says which process holds it and is removed with
the last word of the command. A lock goes with its process, however that ends: what a killed one leaves is a file that
holds nothing, and the next command takes it over. A file and not the folder itself, since network file systems lock
files that are open for writing only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from runtime.distributed import on_main
from runtime.exits import FolderGoneError, UserError
from runtime.streams import visible

ENDING = ".lock"
LONGEST = 200  # bytes of a name in that of its lock: the system's limit is 255
POLL_SECONDS = 0.2
MOST_GONE = 100  # tries where the folder goes each time; so often it is a link to nowhere
HOLDER = rb"process \d+ on [^\n]*\n"  # what a lock file holds
holds = {}  # {absolute path: Hold} of this process


class Hold:
    """A lock that this process has. directory, lock: handles of the folder that the lock file lies in, and of that."""

    def __init__(self, said: str, folder: str, name: str, made: Any, directory: int, lock: int) -> None:
        self.said, self.folder, self.name = said, folder, name
        self.made, self.directory, self.lock = made, directory, lock

    def is_there(self) -> bool:
        """Is the folder where it was, with the lock file in it?"""
        try:
            return is_same(os.stat(self.folder), os.fstat(self.directory)) and lies_there(
                self.name, self.directory, self.lock
            )
        except OSError:
            return False

    def end(self) -> None:
        """Let the lock go and remove its file, and folders that were made for it and are empty."""
        is_there = self.is_there()
        with contextlib.suppress(OSError):
            if lies_there(self.name, self.directory, self.lock):
                os.unlink(self.name, dir_fd=self.directory)
        os.close(self.lock)
        os.close(self.directory)
        remove_empty(self.made if is_there else [])


def is_same(one: Any, other: Any) -> bool:
    """Are two results of `stat` of one file?"""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def lies_there(name: str, directory: int, handle: int) -> bool:
    """Is an open file the one that has this name in the folder now?"""
    try:
        return is_same(os.stat(name, dir_fd=directory, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def place_of(path: str, is_inside: bool) -> tuple[str, str]:
    """(folder, name) of the lock file of a path."""
    if is_inside:
        return path, ENDING
    folder, name = os.path.split(os.path.normpath(path))
    if len(os.fsencode(name)) > LONGEST:  # two that begin alike keep each other waiting, which harms nobody
        name = os.fsencode(name)[:LONGEST].decode("utf-8", "ignore")
    return folder or ".", f".{name}{ENDING}"


def make_folders(folder: str) -> list:
    """Make a folder with its parents; returns those that were not there, the deepest first."""
    missing, place = [], os.path.normpath(folder)
    while place and not os.path.lexists(place):
        missing.append(place)
        place = os.path.dirname(place)
    made = []
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            try:
                os.mkdir(place)
            except OSError:
                remove_empty(made)
                raise
            made.insert(0, place)
    return made


def remove_empty(folders: Any) -> None:
    """Remove folders that nothing lies in."""
    for folder in folders:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def take(path: str, flag: str, is_inside: bool = False, seconds: float = 0) -> None:
    """Keep all other commands from writing to `path`, which need not be there, until `release` or the process's end.

    is_inside: `path` is a folder that this command works in: it is made, and the lock file lies in it; otherwise the
    file lies beside. seconds: how long another command is waited for. UserError where it goes on longer, or where no
    lock file can be written. For one process of a command.
    """
    if os.path.abspath(path) in holds:
        return
    (folder, name), end, is_told = place_of(path, is_inside), time.monotonic() + seconds, False
    place, num_gone = os.path.join(folder, name), 0
    while True:
        made, handles = [], []
        try:
            made = make_folders(folder)
            handles.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            handles.append(os.open(name, flags, 0o666, dir_fd=handles[0]))
            holder = holder_in(handles[1], place)
            is_free = lock(handles[1], place)
            if is_free and lies_there(name, *handles):
                write_holder(handles[1])
                holds[os.path.abspath(path)] = Hold(f"{flag} {path}", folder, name, made, *handles)
                return
        except OSError as error:
            close(handles, made)
            num_gone += error.errno == errno.ENOENT
            if error.errno == errno.ENOENT and num_gone < MOST_GONE:  # its holder, which had made it, has removed it
                continue
            raise UserError(f"{flag} {path}: {place} cannot be written ({error.strerror}): choose another") from None
        except UserError:
            close(handles, made)
            raise
        close(handles, made)
        if is_free:  # its holder has removed the file, and is gone
            continue
        if time.monotonic() >= end:
            into = " into" if is_inside else ""
            raise UserError(
                f"{flag} {path}: another process writes{into} it{holder}: wait until it has ended, or choose another"
            )
        if not is_told:
            print(f"{visible(path)}: waiting for the process that writes into it{holder}", flush=True)
        is_told = True
        time.sleep(POLL_SECONDS)


def holder_in(handle: int, place: str) -> str:
    """What a lock file says of its holder, ` (process 12 on HOST)`, or ''; UserError where it is none of ours."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise UserError(f"{place}: is no file, and the lock goes there: remove or rename it")
    text = os.pread(handle, 1000, 0)
    if text and not re.fullmatch(HOLDER, text):
        raise UserError(f"{place}: holds something else, and the lock goes there: remove or rename it")
    return f" ({text.decode('utf-8', 'replace').strip()})" if text else ""


def lock(handle: int, place: str) -> bool:
    """Lock an open file; is it ours now? On a file system that has no locks a line says so, and it is."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        reason = f"no locks on this file system ({error.strerror})"
        print(
            f"note: {visible(place)}: {reason}: start no second command on the same output", file=sys.stderr, flush=True
        )
    return True


def write_holder(handle: int) -> None:
    """Say who holds the lock; where the disk is full nobody does."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)


def close(handles: Any, made: Any) -> None:
    """Undo what has been opened and made."""
    for handle in handles:
        os.close(handle)
    remove_empty(made)


def release(path: str) -> None:
    """Let go what `take` took; nothing where it did not."""
    if hold := holds.pop(os.path.abspath(path), None):
        hold.end()


def release_all() -> None:
    """`release` everything: the process ends."""
    for path in list(holds):
        release(path)


def forget() -> None:
    """In a forked child: the locks are its parent's, and must go with it."""
    for hold in holds.values():
        os.close(hold.lock)
        os.close(hold.directory)
    holds.clear()


os.register_at_fork(after_in_child=forget)


@contextlib.contextmanager
def holding(
    path: str, flag: str = "--output_path", is_inside: bool = False, check: Callable | None = lambda: ()
) -> Iterator[None]:
    """`take` while the block runs. Collective where there are ranks: the first process holds it for all.

    check: called under the lock; what was true of the path before may not be any more. Returns problems, or raises
    UserError.
    """

    def begin() -> None:
        take(path, flag, is_inside)
        if problems := list(check()):
            raise UserError(problems[0])

    try:
        on_main(begin)
        yield
    finally:
        release(path)


def require_there(path: Any) -> None:
    """FolderGoneError where the folder has gone in which this process holds `path`; nothing where it holds none."""
    hold = holds.get(os.path.abspath(path))
    if hold and not hold.is_there():
        raise FolderGoneError(
            f"{hold.said}: {hold.folder} was removed, renamed or emptied while this command wrote there: nothing more"
            " is written; put it back and start again, or start anew"
        )


def place_now(path: str) -> str:
    """The folder that a held path's lock lies in, by a name that also works where it was renamed."""
    return f"/proc/self/fd/{holds[os.path.abspath(path)].directory}"
