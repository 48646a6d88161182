"""Rows into ids: one row, a batch of rows, and many batches by all cores."""

import collections
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from typing import NamedTuple

from modeling.family import Family
from rows.checks import Columns, Notes
from rows.reading import Part, check_items, read_file
from runtime.exits import UserError
from utils import printable


def encode_row(query, answer, tokenizer, prompt, max_len, max_src_len):
    """One training row as ids, with what was cut.

    Returns input_ids (at most max_len), num_unlabelled (positions before the first label), and the numbers of
    source and answer ids that found no room. The id that ends the answer is never cut. `prompt` is the family's
    prompt module.
    """
    prompt_ids, source_cut = prompt.encode_prompt(tokenizer, query, max_src_len=max_src_len)
    answer_ids = prompt.encode_answer(tokenizer, answer)
    room = max_len - len(prompt_ids) - 1
    answer_cut = max(0, len(answer_ids) - room)
    input_ids = prompt_ids + answer_ids[: len(answer_ids) - answer_cut] + prompt.stop_ids(tokenizer)[:1]
    return {
        "input_ids": input_ids,
        "num_unlabelled": len(prompt_ids) - prompt.SUPERVISED_PROMPT_IDS,
        "source_cut": source_cut,
        "answer_cut": answer_cut,
    }


def show_row(row, tokenizer, texts=None):
    """The first row as the model sees it: `【` before the supervised part and `】` behind it.

    texts: the row before it was encoded; where it has an instruction and an input, `⏐` stands where they meet.
    """
    ids, start = [int(token_id) for token_id in row["input_ids"]], row["num_unlabelled"]
    prompt, supervised = (text_with_control_tokens(part, tokenizer) for part in (ids[:start], ids[start:]))
    if texts and texts["joint"]:
        query, joint = texts["query"], texts["joint"]
        before, behind = query[max(0, joint - 20) : joint], query[joint : joint + 20]
        prompt = prompt.replace(before + behind, f"{before}⏐{behind}", 1)
    return f"first row ({len(ids)} tokens): {prompt}【{supervised}】"


def text_with_control_tokens(ids, tokenizer):
    """Decoded text in which control tokens stand by name; decoding alone drops some of them, such as `</s>`."""
    text, run = "", []
    for token_id in ids:
        name = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in tokenizer.control_ids and tokenizer.piece_text(name) == name:  # and not white space
            text += tokenizer.decode(run) + name
            run = []
        else:
            run.append(token_id)
    return text + tokenizer.decode(run)


BATCH_ROWS, BATCH_BYTES = 1000, 1 << 20  # what a process encodes at a time: the first limit that is reached
BATCHES_IN_FLIGHT = 3  # for each process, being encoded or waiting; this bounds the memory
MIN_POOL_BATCHES = 20  # fewer are encoded by one process before several have started


@dataclass(frozen=True)
class Encoding:
    """Everything that decides the ids of a row."""

    columns: Columns
    tokenizer: object
    mode: Family
    max_len: int
    max_src_len: int
    is_skip: bool
    skip_bad_rows: bool = False

    @property
    def id_type(self):
        """Name of the smallest type that holds every id."""
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "int32"


class Encoded(NamedTuple):
    """The encoded rows of a batch as numpy arrays, and what there is to say about them."""

    ids: object  # of all rows one after another
    lengths: object  # tokens of each row
    num_unlabelled: object  # of each row
    places: object  # of each row: number of its line, or of its value in an array
    files: list  # (number of a file, is it an array, rows of it)
    bad_rows: list  # lines of BAD_ROWS
    counts: dict
    notes: Notes


COUNTS = "rows bad_rows skipped rows_cut source_tokens_cut answer_tokens_cut longest tokens labels".split()


def encode_batch(batch, encoding):
    """Encode the rows of [(number of the file, Part of it), ...]: Encoded."""
    import numpy

    counts, ids, lengths, num_unlabelled, places = dict.fromkeys(COUNTS, 0), [], [], [], []
    files, bad_rows, notes = [], [], Notes()
    prompt = encoding.mode.prompt
    for file, part in batch:
        messages = [] if encoding.skip_bad_rows else None
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
            counts["labels"] += length - item["num_unlabelled"]
            ids += item["input_ids"]
            lengths.append(length)
            num_unlabelled.append(item["num_unlabelled"])
            places.append(number)
        files.append((file, part.is_array, len(lengths) - num_before))
        bad_rows += [f"{file} {printable(message.removeprefix(part.path))}\n" for message in messages or ()]
    counts["bad_rows"] = len(bad_rows)
    return Encoded(
        numpy.array(ids, encoding.id_type),
        numpy.array(lengths, "int64"),
        numpy.array(num_unlabelled, "int32"),
        numpy.array(places, "int64"),
        files,
        bad_rows,
        counts,
        notes,
    )


def read_batches(files):
    """Yield the items of all files in batches for `encode_batch`; small files share one.

    Where reading fails, the error is the last item: rows before it, which other processes check, may have faults of
    their own, and the first fault is the one to report.
    """
    batch, num_items, num_bytes = [], 0, 0
    for file, path in enumerate(files):
        try:
            whole = read_file(path)
            items = []
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


def encode_in_pool(batches, encoding, num_proc):
    """Yield `encode_batch` of each batch, in their order, from `num_proc` processes."""
    # Fresh interpreters: a fork would copy locks of torch, gloo and CUDA, but not the threads that would free them.
    # They import the tokenizer's module and no torch. The executor, unlike multiprocessing.Pool, notices a death.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (encoding,))
    results = collections.deque()
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


def start_worker(encoding):
    """Prepare a process of the pool."""
    global worker_encoding
    worker_encoding = encoding  # sent once and not with each batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A parent that is killed cannot end the pool; without it a worker would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(batch):
    """`encode_batch` in a process of the pool."""
    return encode_batch(batch, worker_encoding)
