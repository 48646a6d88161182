"""Encoded rows: made once by all cores of a host, kept on disk, mapped into memory by every process and later run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rows.checks import Notes
from rows.encoding import COUNTS, MIN_POOL_BATCHES, NO_END, Encoding, encode_batch, encode_in_pool, read_batches
from rows.reading import data_files, files_left, no_row, open_rows, place_of
from runtime.distributed import barrier
from runtime.exits import UserError
from runtime.folders import MANIFEST, scratch_folder, seal, verify
from runtime.ranks import is_main, print_rank_0
from runtime.streams import progress_bar
from utils import printable

if TYPE_CHECKING:
    import numpy

    from modeling.tokenizer import SentencePieceTokenizer

ENCODING_VERSION = 6  # part of the cache key: raise it when the same row would give other ids, or other files
BEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS = 5, 120, 0.2  # of the process that encodes and of those that wait
NUMBERS = ("ids", "offsets", "runs", "run_offsets", "places")  # files that are mapped
BAD_ROWS = "bad_rows.txt"  # a line for each: the number of its file, a space, what is wrong without the file's path


def cache_key(files: list[str], tokenizer: SentencePieceTokenizer, settings: list) -> str:
    """SHA-256 over the rows' bytes, the tokenizer's files and everything that decides the ids."""
    digest = hashlib.sha256(json.dumps([ENCODING_VERSION, settings], sort_keys=True).encode())
    for path in [*files, tokenizer.vocab_file]:
        content = hashlib.sha256()  # of its own, because it matters where one file ends and the next begins
        with open_rows(path) as file:
            while block := file.read(1 << 20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()[:32]


def cache_folder() -> str:
    """Where encoded rows are kept: beside the caches of the Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    parent = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return os.path.join(os.path.expanduser(parent), "chatglm-rows")


class EncodedRows:
    """Encoded rows in their folder, mapped into memory: what is touched is read, once for all processes of a host.

    rows[n] is {"input_ids": integers (L,), "runs": integers (R, 3)}, views of the files; `Run` says what a run is.
    files: the paths of the rows, which may be others than those that they were encoded from. bad_rows: a message about
    each row that was left out because it was not right. key: the same for the same rows with the same tokenizer and
    settings.
    """

    def __init__(self, folder: str, files: list[str]) -> None:
        import numpy

        self.key, self.files = os.path.basename(folder), files

        def numbers(name: str, dtype: str) -> numpy.ndarray:
            # A plain view: slices of a memmap take ten times longer.
            return numpy.memmap(os.path.join(folder, f"{name}.bin"), dtype, mode="r").view(numpy.ndarray)

        try:
            with open(os.path.join(folder, "counts.json"), encoding="utf-8") as file:
                self.counts = json.load(file)
            self.ids = numbers("ids", self.counts["id_type"])
            self.offsets = numbers("offsets", "int64")  # row n is ids[offsets[n]:offsets[n + 1]]
            self.runs = numbers("runs", "int32").reshape(-1, 3)
            self.run_offsets = numbers("run_offsets", "int64")  # row n has runs[run_offsets[n]:run_offsets[n + 1]]
            self.places = numbers("places", "int64")
            self.file_ends = numpy.cumsum([file["rows"] for file in self.counts["files"]])
            self.bad_rows = read_bad_rows(folder, files)
            is_whole = (
                len(self.offsets) == len(self.run_offsets) == len(self) + 1
                and self.offsets[-1] == len(self.ids)
                and self.run_offsets[-1] == len(self.runs)
                and len(self) == len(self.places) == self.file_ends[-1]
                and len(self.bad_rows) == self.counts["bad_rows"]
            )
            self.counts["first_bad_row"] = next(iter(self.bad_rows), None)
        except (OSError, ValueError):
            is_whole = False
        if not is_whole:  # changed since the process of this host that encodes has looked at them
            raise UserError(f"{folder}: encoded rows are damaged: start again, they will be encoded again")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int) -> dict:
        n = range(len(self))[n]  # IndexError outside; from the end where negative
        ids = self.ids[self.offsets[n] : self.offsets[n + 1]]
        return {"input_ids": ids, "runs": self.runs[self.run_offsets[n] : self.run_offsets[n + 1]]}

    def place(self, n: int) -> str:
        """Where row n stands, as messages about rows say it: file:line, or file:row of an array."""
        n = range(len(self))[n]
        file = int(self.file_ends.searchsorted(n, side="right"))
        return place_of(self.files[file], self.counts["files"][file]["is_array"], int(self.places[n]))

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each row: int64 (N,)."""
        return self.offsets[1:] - self.offsets[:-1]

    @functools.cached_property
    def num_labels(self) -> numpy.ndarray:
        """Supervised tokens of each row: int64 (N,)."""
        import numpy

        starts, ends, end_ids = self.runs.T.astype("int64")
        sums = numpy.concatenate([[0], (ends - starts + (end_ids != NO_END)).cumsum()])
        return sums[self.run_offsets[1:]] - sums[self.run_offsets[:-1]]


def load_rows(
    paths: list[str], encoding: Encoding, num_proc: int = 0, encodes: bool = True
) -> tuple[EncodedRows, dict]:
    """(EncodedRows, dict of counts) of the rows in these files and folders, from the cache where they are there.

    Otherwise it is encoded by `num_proc` processes (0: all cores) if this process is the one that `encodes`, and
    waited for in the others. That one also compares what is there with its SHA-256, and encodes it again where it is
    not as it was. Collective, where there are ranks.
    """
    files = data_files(paths)
    folder = os.path.join(cache_folder(), cache_key(files, encoding.tokenizer, encoding.settings))
    if not encodes:
        wait_for_rows(folder)
    elif problem := kept_problem(folder):
        if os.path.isdir(folder):
            print(f"encoded rows are damaged, they are encoded again ({problem})", flush=True)
        encode_to_folder(folder, paths, files, encoding, num_proc)
    barrier()  # a damaged folder has been replaced before another process opens it
    rows = EncodedRows(folder, files)
    rows.counts["files_left"] = files_left(paths)
    return rows, rows.counts


def kept_problem(folder: str) -> str | None:
    """What is wrong with kept rows, as a line; None where they are as they were written."""
    if not os.path.isfile(os.path.join(folder, MANIFEST)):
        return f"{folder}: has no {MANIFEST}"
    return next(iter(verify(folder)), "").removesuffix(": copy the folder again") or None


def encode_to_folder(folder: str, paths: list[str], files: list[str], encoding: Encoding, num_proc: int) -> None:
    """Encode all rows into `folder`, which appears whole or not at all; a damaged one is replaced."""
    parent = os.path.dirname(folder)
    try:
        os.makedirs(parent, exist_ok=True)
        remove_stale_heartbeats(parent)
        with heartbeat(f"{folder}.encoding"), scratch_folder(parent, "encoding") as scratch:
            whole, damaged = os.path.join(scratch, "whole"), os.path.join(scratch, "damaged")
            os.mkdir(whole)
            write_rows(whole, paths, files, encoding, num_proc)
            seal(whole)
            if os.path.isdir(folder) and kept_problem(folder):
                os.rename(folder, damaged)
            try:
                os.rename(whole, folder)
            except OSError:  # another run was faster and its folder holds the same
                if not os.path.isdir(folder):
                    raise
    except OSError as error:
        raise UserError(
            f"{parent}: encoded rows cannot be kept there ({error.strerror}):"
            " set HF_DATASETS_CACHE to a folder that you may write, with room"
        ) from None


def write_rows(folder: str, paths: list[str], files: list[str], encoding: Encoding, num_proc: int) -> None:
    """Encode all rows into the files that `EncodedRows` reads."""
    import numpy

    started = time.monotonic()
    batches = read_batches(files)
    head = list(itertools.islice(batches, MIN_POOL_BATCHES))
    num_proc = 1 if len(head) < MIN_POOL_BATCHES else num_proc or len(os.sched_getaffinity(0))
    batches = itertools.chain(head, batches)
    if num_proc == 1:
        results: Any = (encode_batch(batch, encoding) for batch in batches)
    else:
        results = encode_in_pool(batches, encoding, num_proc)

    counts, notes = dict.fromkeys(COUNTS, 0), Notes()
    of_files = [{"rows": 0, "is_array": False} for _ in files]
    is_shown = is_main() and sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(results))  # ends the pool, whatever happens here
        arrays = {name: stack.enter_context(open(os.path.join(folder, f"{name}.bin"), "wb")) for name in NUMBERS}
        bad_rows = stack.enter_context(open(os.path.join(folder, BAD_ROWS), "w", encoding="utf-8"))
        bar = stack.enter_context(progress_bar(desc="encoding", unit="row", unit_scale=True, disable=not is_shown))
        for name in ("offsets", "run_offsets"):
            numpy.zeros(1, "int64").tofile(arrays[name])
        num_runs = 0
        for found in results:
            found.ids.tofile(arrays["ids"])
            (counts["tokens"] + found.lengths.cumsum()).tofile(arrays["offsets"])
            found.runs.tofile(arrays["runs"])
            (num_runs + found.num_runs.cumsum()).tofile(arrays["run_offsets"])
            num_runs += len(found.runs)
            found.places.tofile(arrays["places"])
            bad_rows.writelines(found.bad_rows)
            notes.add(found.notes)
            for number, is_array, num_rows in found.files:
                of_files[number] = {"rows": of_files[number]["rows"] + num_rows, "is_array": is_array}
            longest = max(counts["longest"], found.counts["longest"])
            counts = {name: counts[name] + found.counts[name] for name in COUNTS} | {"longest": longest}
            bar.update(found.counts["rows"] + found.counts["skipped"])
    num_rows = counts["rows"] + counts["skipped"]
    if not num_rows and counts["bad_rows"]:
        first = read_bad_rows(folder, files)[0]
        left = f"--skip_bad_rows left no row of {counts['bad_rows']:,}"
        raise UserError(f"{' '.join(paths)}: {left}, the first of them is {first}")
    if not num_rows:
        raise no_row(paths)
    if not counts["rows"]:
        raise UserError(
            f"{' '.join(paths)}: --is_skip left no row of {counts['skipped']}: raise --max_len or --max_src_len"
        )
    with open(os.path.join(folder, "counts.json"), "w", encoding="utf-8") as file:
        json.dump({**counts, "id_type": encoding.id_type, "files": of_files, "notes": asdict(notes)}, file)
    if not is_shown:
        processes = "1 process" if num_proc == 1 else f"{num_proc} processes"
        print_rank_0(f"encoded {num_rows:,} rows in {time.monotonic() - started:.1f} s with {processes}")


def read_bad_rows(folder: str, files: list[str]) -> list[str]:
    """Messages about the rows that were left out of encoded rows, with the paths that the files have in this run."""
    with open(os.path.join(folder, BAD_ROWS), encoding="utf-8") as file:
        lines = [line.rstrip("\n").partition(" ") for line in file]
    return [printable(files[int(number)]) + message for number, _, message in lines]


@contextlib.contextmanager
def heartbeat(path: str) -> Iterator[None]:
    """Touch a file every few seconds while the block runs; remove it afterwards, also where the block fails."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # one beat may be missed
                pathlib.Path(path).touch()  # made again where another run, that encodes the same, has removed it

    pathlib.Path(path).touch()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        pathlib.Path(path).unlink(missing_ok=True)


def remove_stale_heartbeats(parent: str) -> None:
    """Remove what killed processes have left of `heartbeat`; one that lives makes its file again."""
    for path in pathlib.Path(parent).glob("*.encoding"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > SILENT_SECONDS:
                path.unlink()


def wait_for_rows(folder: str) -> None:
    """Wait until another process has made the folder; UserError where that one has ended.

    It lives as long as the file's time changes while this process looks: clocks of hosts may differ, and the file of a
    killed run may lie there. A process that failed with an error is silent, too: the launcher ends this one then.
    """
    path = pathlib.Path(f"{folder}.encoding")
    last_beat, last_change = None, time.monotonic()
    while not os.path.isdir(folder):
        try:
            beat = path.stat().st_mtime_ns
        except OSError:
            beat = None  # not begun, or over
        if beat != last_beat:
            last_beat, last_change = beat, time.monotonic()
        if time.monotonic() - last_change > SILENT_SECONDS:
            raise UserError(
                f"{path}: not touched for {SILENT_SECONDS} s: the process of this host that encodes the rows"
                " (LOCAL_RANK 0) has ended or hangs: look for its message and start again"
            )
        time.sleep(POLL_SECONDS)
