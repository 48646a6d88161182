"""Encoded rows: made once by all cores of a host, kept on disk, mapped into memory by every process and later run."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import sys
import threading
import time
from dataclasses import asdict

from rows.checks import Notes
from rows.encoding import COUNTS, MIN_POOL_BATCHES, Encoding, encode_batch, encode_in_pool, read_batches
from rows.reading import data_files, files_left, no_row, open_rows, place_of
from runtime.distributed import barrier
from runtime.exits import UserError
from runtime.folders import MANIFEST, scratch_folder, seal, verify
from runtime.ranks import is_main, print_rank_0
from runtime.streams import progress_bar
from utils import printable

ENCODING_VERSION = 5  # part of the cache key: raise it when the same row would give other ids, or other files
BEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS = 5, 120, 0.2  # of the process that encodes and of those that wait
NUMBERS = ("ids", "offsets", "num_unlabelled", "places")  # files that are mapped
BAD_ROWS = "bad_rows.txt"  # a line for each: the number of its file, a space, what is wrong without the file's path


def cache_key(files, tokenizer, settings):
    """SHA-256 over the rows' bytes, the tokenizer's files and everything that decides the ids."""
    digest = hashlib.sha256(json.dumps([ENCODING_VERSION, settings], sort_keys=True).encode())
    for path in [*files, tokenizer.vocab_file]:
        content = hashlib.sha256()  # of its own, because it matters where one file ends and the next begins
        with open_rows(path) as file:
            while block := file.read(1 << 20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()[:32]


def cache_folder():
    """Where encoded rows are kept: beside the caches of the Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    parent = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return os.path.join(os.path.expanduser(parent), "chatglm-rows")


class EncodedRows:
    """Encoded rows in their folder, mapped into memory: what is touched is read, once for all processes of a host.

    rows[n] is {"input_ids": integers (L,), a view of the file, "num_unlabelled": int}. files: the paths of the rows,
    which may be others than those that they were encoded from. bad_rows: a message about each row that was left out
    because it was not right. key: the same for the same rows with the same tokenizer and settings.
    """

    def __init__(self, folder, files):
        import numpy

        self.key, self.files = os.path.basename(folder), files

        def numbers(name, dtype):
            # A plain view: slices of a memmap take ten times longer.
            return numpy.memmap(os.path.join(folder, f"{name}.bin"), dtype, mode="r").view(numpy.ndarray)

        try:
            with open(os.path.join(folder, "counts.json"), encoding="utf-8") as file:
                self.counts = json.load(file)
            self.ids = numbers("ids", self.counts["id_type"])
            self.offsets = numbers("offsets", "int64")  # row n is ids[offsets[n]:offsets[n + 1]]
            self.num_unlabelled = numbers("num_unlabelled", "int32")
            self.places = numbers("places", "int64")
            self.file_ends = numpy.cumsum([file["rows"] for file in self.counts["files"]])
            self.bad_rows = read_bad_rows(folder, files)
            is_whole = (
                len(self.offsets) == len(self) + 1
                and self.offsets[-1] == len(self.ids)
                and len(self) == len(self.places) == self.file_ends[-1]
                and len(self.bad_rows) == self.counts["bad_rows"]
            )
            self.counts["first_bad_row"] = next(iter(self.bad_rows), None)
        except (OSError, ValueError):
            is_whole = False
        if not is_whole:  # changed since the process of this host that encodes has looked at them
            raise UserError(f"{folder}: encoded rows are damaged: start again, they will be encoded again")

    def __len__(self):
        return len(self.num_unlabelled)

    def __getitem__(self, n):
        n = range(len(self))[n]  # IndexError outside; from the end where negative
        ids = self.ids[self.offsets[n] : self.offsets[n + 1]]
        return {"input_ids": ids, "num_unlabelled": int(self.num_unlabelled[n])}

    def place(self, n):
        """Where row n stands, as messages about rows say it: file:line, or file:row of an array."""
        n = range(len(self))[n]
        file = int(self.file_ends.searchsorted(n, side="right"))
        return place_of(self.files[file], self.counts["files"][file]["is_array"], int(self.places[n]))

    @property
    def lengths(self):
        """Tokens of each row: int64 (N,)."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def num_labels(self):
        """Supervised tokens of each row: int64 (N,)."""
        return self.lengths - self.num_unlabelled


def load_rows(
    paths, columns, tokenizer, mode, max_len, max_src_len, is_skip, num_proc=0, encodes=True, skip_bad_rows=False
):
    """(EncodedRows, dict of counts) of the training set, from the cache where it is there.

    Otherwise it is encoded by `num_proc` processes (0: all cores) if this process is the one that `encodes`, and
    waited for in the others. That one also compares what is there with its SHA-256, and encodes it again where it is
    not as it was. Collective, where there are ranks. skip_bad_rows: leave out the rows that are not right; else the
    first one is an error.
    """
    encoding = Encoding(columns, tokenizer, mode, max_len, max_src_len, is_skip, skip_bad_rows)
    settings = [mode.name, columns.prompt, columns.response, max_len, max_src_len, is_skip, skip_bad_rows]
    files = data_files(paths)
    folder = os.path.join(cache_folder(), cache_key(files, tokenizer, settings))
    if not encodes:
        wait_for_rows(folder)
    elif problem := kept_problem(folder):
        if os.path.isdir(folder):
            print(f"encoded rows are damaged, they are encoded again ({problem})", flush=True)
        encode_to_folder(folder, paths, encoding, num_proc)
    barrier()  # a damaged folder has been replaced before another process opens it
    rows = EncodedRows(folder, files)
    rows.counts["files_left"] = files_left(paths)
    return rows, rows.counts


def kept_problem(folder):
    """What is wrong with kept rows, as a line; None where they are as they were written."""
    if not os.path.isfile(os.path.join(folder, MANIFEST)):
        return f"{folder}: has no {MANIFEST}"
    return next(iter(verify(folder)), "").removesuffix(": copy the folder again") or None


def encode_to_folder(folder, paths, encoding, num_proc):
    """Encode all rows into `folder`, which appears whole or not at all; a damaged one is replaced."""
    parent = os.path.dirname(folder)
    try:
        os.makedirs(parent, exist_ok=True)
        remove_silent_hearts(parent)
        with heartbeat(f"{folder}.encoding"), scratch_folder(parent, "encoding") as scratch:
            whole, damaged = os.path.join(scratch, "whole"), os.path.join(scratch, "damaged")
            os.mkdir(whole)
            write_rows(whole, paths, encoding, num_proc)
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


def write_rows(folder, paths, encoding, num_proc):
    """Encode all rows into the files that `EncodedRows` reads."""
    import numpy

    started = time.monotonic()
    files = data_files(paths)
    batches = read_batches(files)
    head = list(itertools.islice(batches, MIN_POOL_BATCHES))
    num_proc = 1 if len(head) < MIN_POOL_BATCHES else num_proc or len(os.sched_getaffinity(0))
    batches = itertools.chain(head, batches)
    if num_proc == 1:
        results = (encode_batch(batch, encoding) for batch in batches)
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
        numpy.zeros(1, "int64").tofile(arrays["offsets"])
        for found in results:
            found.ids.tofile(arrays["ids"])
            (counts["tokens"] + found.lengths.cumsum()).tofile(arrays["offsets"])
            found.num_unlabelled.tofile(arrays["num_unlabelled"])
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


def read_bad_rows(folder, files):
    """Messages about the rows that were left out of encoded rows, with the paths that the files have in this run."""
    with open(os.path.join(folder, BAD_ROWS), encoding="utf-8") as file:
        lines = [line.rstrip("\n").partition(" ") for line in file]
    return [printable(files[int(number)]) + message for number, _, message in lines]


@contextlib.contextmanager
def heartbeat(path):
    """Touch a file every few seconds while the block runs; remove it afterwards, also where the block fails."""
    is_over = threading.Event()

    def beat():
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


def remove_silent_hearts(parent):
    """Remove what killed processes have left of `heartbeat`; one that lives makes its file again."""
    for path in pathlib.Path(parent).glob("*.encoding"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > SILENT_SECONDS:
                path.unlink()


def wait_for_rows(folder):
    """Wait until another process has made the folder; UserError where its heart has stopped.

    A heart beats where the file's time changes while this process looks: clocks of hosts may differ, and the file of
    a killed run may lie there. A process that failed with an error is silent, too: the launcher ends this one then.
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
