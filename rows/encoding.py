"""Rows into ids: one row, a batch of rows, and many batches by all cores."""

from __future__ import annotations

import collections
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from modeling.family import Family, Prompt
from rows.checks import Columns, Notes
from rows.reading import Part, check_items, read_file
from runtime.exits import UserError
from utils import printable

if TYPE_CHECKING:
    import numpy

    from modeling.tokenizer import SentencePieceTokenizer


NO_END = -1  # of a run whose last id is followed by no label of its own


class Run(NamedTuple):
    """Positions of a row that carry loss: `start` to before `end`, where the label is the row's own id. `start` is at
    least 1: nothing predicts the first id of a row.

    end_id: what is learned at `end`, where the row itself goes on with another id: how the model ends an answer that
    stands inside a conversation; NO_END where it is one of the run's ids, or is not learned.
    """

    start: int
    end: int
    end_id: int = NO_END

    @property
    def num_labels(self) -> int:
        """Supervised tokens."""
        return self.end - self.start + (self.end_id != NO_END)


def encode_row(
    query: str, answer: str, tokenizer: SentencePieceTokenizer, prompt: Prompt, max_len: int, max_src_len: int | None
) -> dict:
    """One training row as ids, with what was cut.

    Returns input_ids (at most max_len), runs (a list of `Run`, one here), and the numbers of source and answer ids
    that found no room. The id that ends the answer is never cut. `prompt` is the family's prompt module.
    """
    prompt_ids, source_cut = prompt.encode_prompt(tokenizer, query, max_src_len=max_src_len)
    answer_ids = prompt.encode_answer(tokenizer, answer)
    room = max_len - len(prompt_ids) - 1
    answer_cut = max(0, len(answer_ids) - room)
    input_ids = prompt_ids + answer_ids[: len(answer_ids) - answer_cut] + prompt.stop_ids(tokenizer)[:1]
    return {
        "input_ids": input_ids,
        "runs": [Run(len(prompt_ids) - prompt.SUPERVISED_PROMPT_IDS, len(input_ids))],
        "source_cut": source_cut,
        "answer_cut": answer_cut,
    }


def show_row(row: dict, tokenizer: SentencePieceTokenizer, texts: dict | None = None) -> str:
    """The first row as the model sees it: `【` before each supervised part and `】` behind it.

    texts: the row before it was encoded; where it has an instruction and an input, `⏐` stands where they meet.
    """
    ids, shown, position = [int(token_id) for token_id in row["input_ids"]], "", 0
    for start, end, end_id in row["runs"]:
        ending = [] if end_id == NO_END else [int(end_id)]
        shown += text_with_control_tokens(ids[position:start], tokenizer)
        shown += f"【{text_with_control_tokens(ids[start:end] + ending, tokenizer)}】"
        position = end
    shown += text_with_control_tokens(ids[position:], tokenizer)
    if texts and texts["joint"]:
        query, joint = texts["query"], texts["joint"]
        before, behind = query[max(0, joint - 20) : joint], query[joint : joint + 20]
        shown = shown.replace(before + behind, f"{before}⏐{behind}", 1)
    return f"first row ({len(ids)} tokens): {shown}"


def text_with_control_tokens(ids: list[int], tokenizer: SentencePieceTokenizer) -> str:
    """Decoded text in which control tokens stand by name; decoding alone drops some of them, such as `</s>`."""
    text = ""
    run: list[int] = []
    for token_id in ids:
        name = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in tokenizer.control_ids and tokenizer.piece_text(name) == name:  # and not white space
            text += str(tokenizer.decode(run)) + name
            run = []
        else:
            run.append(token_id)
    return text + str(tokenizer.decode(run))


BATCH_ROWS, BATCH_BYTES = 1000, 1 << 20  # what a process encodes at a time: the first limit that is reached
BATCHES_IN_FLIGHT = 3  # for each process, being encoded or waiting; this bounds the memory
MIN_POOL_BATCHES = 20  # fewer are encoded by one process before several have started


@dataclass(frozen=True)
class Encoding:
    """Everything that decides the ids of a row."""

    columns: Columns
    tokenizer: SentencePieceTokenizer
    mode: Family
    max_len: int
    max_src_len: int
    is_skip: bool  # leave out rows that do not fit; else they are cut
    skip_bad_rows: bool = False  # leave out rows that are not right; else the first one is an error

    @property
    def settings(self) -> list:
        """What decides the ids besides the rows and the tokenizer: part of the key of kept rows."""
        columns = [self.columns.prompt, self.columns.response]
        return [self.mode.name, *columns, self.max_len, self.max_src_len, self.is_skip, self.skip_bad_rows]

    @property
    def id_type(self) -> str:
        """Name of the smallest type that holds every id."""
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "int32"


class Encoded(NamedTuple):
    """The encoded rows of a batch as numpy arrays, and what there is to say about them."""

    ids: numpy.ndarray  # of all rows one after another
    lengths: numpy.ndarray  # tokens of each row
    runs: numpy.ndarray  # int32 (all runs, 3): start, end, end_id
    num_runs: numpy.ndarray  # of each row
    places: numpy.ndarray  # of each row: number of its line, or of its value in an array
    files: list[tuple[int, bool, int]]  # (number of a file, is it an array, rows of it)
    bad_rows: list[str]  # lines of BAD_ROWS
    counts: dict
    notes: Notes


COUNTS = "rows bad_rows skipped rows_cut source_tokens_cut answer_tokens_cut longest tokens labels".split()


def encode_batch(batch: list[tuple[int, Part]], encoding: Encoding) -> Encoded:
    """Encode the rows of [(number of the file, Part of it), ...]: Encoded."""
    import numpy

    counts, notes = dict.fromkeys(COUNTS, 0), Notes()
    ids: list[int] = []
    runs: list[Run] = []
    lengths: list[int] = []
    num_runs: list[int] = []
    places: list[int] = []
    files: list[tuple[int, bool, int]] = []
    bad_rows: list[str] = []
    prompt = encoding.mode.prompt
    for file, part in batch:
        messages: list[str] | None = [] if encoding.skip_bad_rows else None
        num_before = len(lengths)
        for number, row in check_items(part, encoding.columns, bad_rows=messages, notes=notes):
            item = encode_row(
                row["query"], row["answer"], encoding.tokenizer, prompt, encoding.max_len, encoding.max_src_len
            )
            length = len(item["input_ids"])
            counts["longest"] = max(counts["longest"], length + item["source_cut"] + item["answer_cut"])
            if item["source_cut"] or item["answer_cut"]:
                counts["rows_cut"] += 1
                counts["source_tokens_cut"] += item["source_cut"]
                counts["answer_tokens_cut"] += item["answer_cut"]
                if encoding.is_skip:
                    counts["skipped"] += 1
                    continue
            counts["rows"] += 1
            counts["tokens"] += length
            counts["labels"] += sum(run.num_labels for run in item["runs"])
            ids += item["input_ids"]
            assert all(1 <= run.start < run.end <= length for run in item["runs"]), item["runs"]
            runs += item["runs"]
            lengths.append(length)
            num_runs.append(len(item["runs"]))
            places.append(number)
        files.append((file, part.is_array, len(lengths) - num_before))
        bad_rows += [f"{file} {printable(message.removeprefix(part.path))}\n" for message in messages or ()]
    counts["bad_rows"] = len(bad_rows)
    return Encoded(
        numpy.array(ids, encoding.id_type),
        numpy.array(lengths, "int64"),
        numpy.array(runs, "int32").reshape(-1, 3),
        numpy.array(num_runs, "int64"),
        numpy.array(places, "int64"),
        files,
        bad_rows,
        counts,
        notes,
    )


def read_batches(files: list[str]) -> Iterator[list[tuple[int, Part]]]:
    """Yield the items of all files in batches for `encode_batch`; small files share one.

    Where reading fails, the error is the last item: rows before it, which other processes check, may have faults of
    their own, and the first fault is the one to report.
    """
    batch: list[tuple[int, Part]] = []
    num_items = num_bytes = 0
    for file, path in enumerate(files):
        try:
            whole = read_file(path)
            items: list = []
            batch.append((file, whole._replace(items=items)))
            for number, item in whole.items:
                items.append((number, item))
                num_items += 1
                num_bytes += len(item)
                if num_items == BATCH_ROWS or num_bytes >= BATCH_BYTES:
                    yield batch
                    items = []
                    batch = [(file, whole._replace(items=items))]
                    num_items, num_bytes = 0, 0
        except UserError as error:
            batch.append((file, Part(path, False, [(0, error)])))
            break
    if batch:
        yield batch


def encode_in_pool(batches: Iterable, encoding: Encoding, num_proc: int) -> Iterator[Encoded]:
    """Yield `encode_batch` of each batch, in their order, from `num_proc` processes."""
    # Fresh interpreters: a fork would copy locks of torch, gloo and CUDA, but not the threads that would free them.
    # They import the tokenizer's module and no torch. The executor, unlike multiprocessing.Pool, notices a death.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (encoding,))
    results: collections.deque = collections.deque()
    try:
        for batch in batches:
            results.append(pool.submit(encode_in_worker, batch))
            if len(results) > BATCHES_IN_FLIGHT * num_proc:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            f"--num_proc {num_proc}: a process that encoded rows was ended from outside, perhaps for want of memory:"
            " start again with fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


worker_encoding: Encoding  # of a process of the pool


def start_worker(encoding: Encoding) -> None:
    """Prepare a process of the pool."""
    global worker_encoding
    worker_encoding = encoding  # sent once and not with each batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A parent that is killed cannot end the pool; without it a worker would wait for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def encode_in_worker(batch: list[tuple[int, Part]]) -> Encoded:
    """`encode_batch` in a process of the pool."""
    return encode_batch(batch, worker_encoding)
