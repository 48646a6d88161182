"""Folders that appear whole or not at all: written beside their name, flushed, closed by a manifest, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runtime.exits import UserError
from runtime.plain_files import open_plain, parse_json, read_json_text
from runtime.streams import size_text

MANIFEST = "manifest.json"
PARTIAL, REPLACED = ".partial", ".replaced"  # endings of a folder that is being written, and of one on its way out
HASH_THREADS = 4
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


def reached(point: str) -> None:
    """Called at the named points of a save. Does nothing; tests put a function here that ends the process."""


def new_file(path: Any) -> Any:
    """A new file to write bytes to. Tests put one on a full disk in its place."""
    return open(path, "wb")


def flush_path(path: Any) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_entry(path: Any) -> dict:
    """{"bytes", "sha256"} of a file."""
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def files_in(folder: str) -> list:
    """Paths of all files below a folder, relative to it, sorted; without the manifest."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    return sorted(name for name in found if name != MANIFEST)


def seal(scratch: str, sizes: dict | None = None) -> None:
    """Flush what lies in `scratch` and close it with a manifest.

    sizes: {relative path: bytes} that must be there. OSError where they are not.
    """
    names = files_in(scratch)
    for name, size in (sizes or {}).items():
        if name not in names or os.path.getsize(os.path.join(scratch, name)) != size:
            raise OSError(0, f"{name} is not as it was written")
    paths = [os.path.join(scratch, name) for name in names]
    with ThreadPoolExecutor(HASH_THREADS) as threads:  # reading what was written goes on while the disk writes
        flushed = threads.map(flush_path, paths)
        entries = dict(zip(names, threads.map(file_entry, paths)))
        list(flushed)
    for parent, _, files in os.walk(scratch):
        for name in files:
            # safetensors makes files that only their owner may read
            os.chmod(os.path.join(parent, name), 0o666 & ~UMASK)
        flush_path(parent)
    reached("before the manifest")
    manifest = os.path.join(scratch, MANIFEST)
    with new_file(manifest) as file:
        file.write(json.dumps({"files": entries}, indent=1, sort_keys=True).encode())
    flush_path(manifest)
    flush_path(scratch)


def close_folder(scratch: str, folder: str, sizes: dict | None = None) -> None:
    """`seal` what lies in `scratch`, and give it its name. A folder that has the name goes."""
    seal(scratch, sizes)
    reached("before the rename")
    if os.path.exists(folder):
        os.rename(folder, folder + REPLACED)
        reached("between the renames")
    os.rename(scratch, folder)
    flush_path(os.path.dirname(os.path.abspath(folder)))
    reached("after the rename")
    shutil.rmtree(folder + REPLACED, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """A folder to write in that gets its name when all is there and on the disk: whole or absent.

    The folder that it lies in must be there. Where that goes meanwhile, it stays away: OSError.
    """
    folder = os.path.normpath(folder)
    scratch, parent = folder + PARTIAL, os.path.dirname(folder) or "."
    shutil.rmtree(scratch, ignore_errors=True)
    os.mkdir(scratch)
    handles = {path: os.open(path, os.O_RDONLY) for path in (scratch, parent)}
    try:
        yield scratch
        if not all(is_still(path, handle) for path, handle in handles.items()):
            raise OSError(errno.ENOENT, "was removed while it was written", folder)
        close_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not is_still(parent, handles[parent]):  # a library that writes a file makes its folders
            with contextlib.suppress(OSError):
                os.rmdir(parent)
        for handle in handles.values():
            os.close(handle)


def is_still(path: Any, handle: Any) -> bool:
    """Is an open file or folder the one that has this path now?"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


@contextlib.contextmanager
def whole_file(path: Any, **how: Any) -> Iterator[Any]:
    """A file to write text to that gets its name when all is in it: what was there before stays until then.

    how: more arguments of `open`. Nothing is left of it where the block fails.
    """
    scratch = os.fspath(path) + PARTIAL
    try:
        with open(scratch, "w", encoding="utf-8", **how) as file:
            yield file
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(scratch)


def read_manifest(folder: str) -> dict | None:
    """{relative path: (bytes, SHA-256)} of a closed folder; None where its manifest is none, or names nothing."""
    path = os.path.join(folder, MANIFEST)
    try:
        if path_problem(folder, MANIFEST):
            return None
        entries = parse_json(read_json_text(path))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        is_good = all(type(size) is int and type(digest) is str for size, digest in expected.values())
        return expected if expected and is_good else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def path_problem(folder: str, name: str) -> str | None:
    """Why `name` is no regular file inside a folder, or None: a link leads anywhere, a pipe or a device has no end."""
    parts = name.split(os.sep)
    if os.path.isabs(name) or os.path.normpath(name) != name or ".." in parts:
        return "leaves the folder"
    for number in range(1, len(parts) + 1):
        mode = os.lstat(os.path.join(folder, *parts[:number])).st_mode
        if stat.S_ISLNK(mode):
            return "is a link" if number == len(parts) else f"lies behind a link, {os.path.join(*parts[:number])}"
        if not (stat.S_ISREG(mode) if number == len(parts) else stat.S_ISDIR(mode)):
            return "is no regular file"
    return None


def verify(folder: str, full: bool = True) -> list[str]:
    """What is wrong with the files of a closed folder, one line each; nothing for a folder without a manifest.

    full: compare SHA-256 too; otherwise sizes only. Only regular files inside the folder are read.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.lexists(path):
        return []
    expected = read_manifest(folder)
    if expected is None:
        return [f"{path}: not a manifest: copy the folder again"]

    def problem(name: str) -> str | None:
        target = os.path.join(folder, name)
        try:
            if said := path_problem(folder, name):
                return f"{target}: {said}"
            if os.path.getsize(target) != expected[name][0]:
                return f"{target}: has {os.path.getsize(target):,} bytes, it was saved with {expected[name][0]:,}"
            if full and file_entry(target)["sha256"] != expected[name][1]:
                return f"{target}: its bytes are not those that were saved (SHA-256)"
        except (OSError, ValueError) as error:  # a name that no file can have
            return f"{target}: cannot be read ({getattr(error, 'strerror', error)})"
        return None

    with ThreadPoolExecutor(HASH_THREADS) as threads:
        return [f"{line}: copy the folder again" for line in threads.map(problem, sorted(expected)) if line]


def is_whole(folder: str, full: bool = True) -> bool:
    """Was the folder closed, and are its files as they were then?"""
    return os.path.lexists(os.path.join(folder, MANIFEST)) and not verify(folder, full)


def try_lock(path: Any) -> int | None:
    """A handle with the lock of a folder, None where a living process has it. OSError on file systems without locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        raise


@contextlib.contextmanager
def scratch_folder(parent: str, purpose: str) -> Iterator[str]:
    """A new folder in `parent` for this process alone; it goes at the end, and with it those that the dead have left.

    A process holds the lock of its folder as long as it lives. Locks are not seen from other hosts everywhere, so a
    folder says which host it is of, and those of others stay. purpose: begins its name.
    """
    start = f"{purpose}-{re.sub(r'[^A-Za-z0-9]', '_', platform.node())}-"
    parent_handle = os.open(parent, os.O_RDONLY)
    handle = None
    try:
        with contextlib.suppress(OSError):
            # Held between the making of a folder and its lock, so that nobody takes it for one that was left.
            fcntl.flock(parent_handle, fcntl.LOCK_EX)
            for name in filter(lambda name: name.startswith(start), os.listdir(parent)):
                with contextlib.suppress(OSError):  # of another user
                    if (left := try_lock(os.path.join(parent, name))) is not None:
                        shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
                        os.close(left)
        scratch = tempfile.mkdtemp(prefix=start, dir=parent)
        with contextlib.suppress(OSError):
            handle = try_lock(scratch)
    finally:
        os.close(parent_handle)  # and with it its lock
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def last_named(path: str) -> str:
    """A path whose last part is a name: `.` and `..` get those of the folders that they are."""
    path = os.path.normpath(path)
    return os.path.abspath(path) if os.path.basename(path) in (".", "..") else path


def numbered(parent: str, pattern: str) -> list[str]:
    """Names of the folders in `parent` that match a pattern with one group, the number; newest (highest) first."""
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        return []
    found = [(int(match[1]), name) for name in names if (match := re.fullmatch(pattern, name))]
    return [name for _, name in sorted(found, reverse=True) if os.path.isdir(os.path.join(parent, name))]


def remove_leftovers(parent: str, pattern: str) -> None:
    """Remove what a killed process has left of folders of these names, half written or half removed.

    A folder that was being replaced gets its name back where the new one did not get it.
    """
    for name in os.listdir(parent) if os.path.isdir(parent) else []:
        path = os.path.join(parent, name)
        if re.fullmatch(pattern + re.escape(PARTIAL), name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(pattern + re.escape(REPLACED), name):
            if os.path.exists(path.removesuffix(REPLACED)):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, path.removesuffix(REPLACED))


def keep_newest(saved: str, pattern: str, limit: int) -> None:
    """Remove the folders of a kind beside `saved`, which is whole, but for it and the newest before it: `limit` in all.

    0: keep all. Those with a higher number, of a run that went back since, do not count and stay.
    """
    parent, newest = os.path.split(os.path.normpath(saved))
    names = numbered(parent, pattern)
    for name in names[names.index(newest) :][limit:] if limit and newest in names else []:
        path = os.path.join(parent, name)
        try:
            os.rename(path, path + PARTIAL)  # a process that is killed meanwhile leaves no half folder under its name
            shutil.rmtree(path + PARTIAL, ignore_errors=True)
        except OSError as error:
            print(f"\n{path} was not removed: {error.strerror}", file=sys.stderr, flush=True)


def require_space(path: Any, num_bytes: int, what: str) -> None:
    """UserError where `num_bytes` more do not fit on the disk of `path`, which need not exist yet."""
    place = os.path.abspath(path)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        need, have = size_text(num_bytes), size_text(free)
        raise UserError(f"{path}: {what} takes about {need}, {have} are free: make room or use another disk")
