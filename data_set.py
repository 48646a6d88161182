"""The rows of a run: encoded, held out, mixed, shown."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy

from generation.lengths import columns_of
from rows.cache import load_rows
from rows.checks import Notes
from rows.encoding import Encoding, show_row
from rows.reading import read_row, read_rows
from runtime.exits import UserError
from runtime.ranks import is_local_main, print_rank_0, world_size
from runtime.shared_files import check_same

if TYPE_CHECKING:
    from modeling.family import Family
    from modeling.tokenizer import SentencePieceTokenizer
    from rows.cache import EncodedRows


def load_data(args: argparse.Namespace, tokenizer: SentencePieceTokenizer, mode: Family) -> tuple[Any, Any]:
    """(rows to train on, held-out rows or None), as the flags say; what was found is printed. Collective.

    The first process of a host encodes them where that was not done before, the others wait for it.
    """
    lengths = args.max_len, args.max_src_len
    encoding = Encoding(columns_of(args), tokenizer, mode, *lengths, args.is_skip, args.skip_bad_rows)

    def encoded(paths: list[str], what: str = "rows") -> EncodedRows:
        found, counts = load_rows(paths, encoding, args.num_proc, encodes=is_local_main())
        check_same(f"{what} (or the tokenizer)", found.key)
        print_rank_0(describe_counts(counts, args.max_len, args.max_src_len, args.is_skip, what))
        return found

    rows: EncodedRows | RowSet = encoded(args.train_path)
    held_out: EncodedRows | RowSet | None = encoded(args.eval_path, "held-out rows") if args.eval_path else None
    if args.eval_ratio:
        rows, held_out = hold_out(rows, args.eval_ratio, args.seed)
    if args.replay_path:
        rows = mix(rows, encoded(args.replay_path, "general rows"), args.replay_ratio, args.seed)
    if len(rows) < world_size():
        words = f"{len(rows)} rows for {world_size()} processes: give at least one row to each, or start fewer"
        raise UserError(f"--train_path: {words}")
    print_rank_0(show_row(rows[0], tokenizer, read_row(args.train_path, columns_of(args), rows.place(0))))
    return rows, held_out


def describe_counts(counts: dict, max_len: int, max_src_len: int, is_skip: bool, what: str = "rows") -> str:
    """What a run says once about its rows; what: which rows they are."""
    share = counts["labels"] / max(1, counts["tokens"])
    text = (
        f"{what}: {counts['rows']:,} with {counts['tokens']:,} tokens, {counts['labels']:,} of them supervised"
        f" ({share:.0%}); the longest has {counts['longest']:,}"
    )
    if counts["rows_cut"]:
        done = f"left out {counts['skipped']:,} rows" if is_skip else f"cut {counts['rows_cut']:,} rows"
        text += (
            f"\n{what}: {done} over --max_len {max_len} / --max_src_len {max_src_len}:"
            f" {counts['source_tokens_cut']:,} source and {counts['answer_tokens_cut']:,} answer tokens lost"
        )
    if counts["bad_rows"]:
        text += f"\n{what}: left out {counts['bad_rows']:,} bad rows, for example {counts['first_bad_row']}"
    files = [f"{what}: {left}" for left in counts["files_left"]]
    return "\n".join([text, *files, *Notes(**counts["notes"]).lines(what)])


def texts_of(rows: Any, args: argparse.Namespace) -> list[dict]:
    """The texts of encoded rows, {"query", "answer"}, in their order: read again from their files."""
    paths = args.eval_path or args.train_path
    bad_rows: list[str] | None = [] if args.skip_bad_rows else None
    by_place = {row["place"]: row for row in read_rows(paths, columns_of(args), bad_rows=bad_rows)}
    return [by_place[rows.place(n)] for n in range(len(rows))]


class RowSet:
    """Rows of several EncodedRows, as one: parts is a list of (EncodedRows, numbers of its rows)."""

    def __init__(self, parts: list) -> None:
        self.parts = [(rows, numpy.asarray(numbers, dtype=numpy.int64)) for rows, numbers in parts]
        self.ends = numpy.cumsum([len(numbers) for _, numbers in self.parts])
        self.key = "+".join(rows.key for rows, _ in self.parts)
        self.bad_rows = [message for rows, _ in self.parts for message in rows.bad_rows]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(self, n: int) -> tuple[EncodedRows, int]:
        """(EncodedRows, number in it) of row n."""
        n = range(len(self))[n]
        part = int(self.ends.searchsorted(n, side="right"))
        rows, numbers = self.parts[part]
        return rows, int(numbers[n - self.ends[part] + len(numbers)])

    def __getitem__(self, n: int) -> dict:
        rows, number = self.find(n)
        return rows[number]

    def place(self, n: int) -> str:
        """Where row n stands: file:line."""
        rows, number = self.find(n)
        return rows.place(number)

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each row: int64 (N,)."""
        return numpy.concatenate([rows.lengths[numbers] for rows, numbers in self.parts])

    @property
    def num_labels(self) -> numpy.ndarray:
        """Supervised tokens of each row: int64 (N,)."""
        return numpy.concatenate([rows.num_labels[numbers] for rows, numbers in self.parts])


def hold_out(rows: Any, ratio: float, seed: int) -> tuple[RowSet, RowSet]:
    """(training rows, held-out rows): a seeded share of the rows, at least one; each part in the files' order."""
    order = numpy.random.default_rng([seed, 1]).permutation(len(rows))
    num_held_out = max(1, round(ratio * len(rows)))
    if num_held_out >= len(rows):
        raise UserError(f"--eval_ratio {ratio}: leaves none of {len(rows)} rows to train on: use a smaller one")
    held_out, kept = numpy.sort(order[:num_held_out]), numpy.sort(order[num_held_out:])
    return RowSet([(rows, kept)]), RowSet([(rows, held_out)])


def mix(rows: Any, others: Any, ratio: float, seed: int) -> RowSet:
    """The rows with `ratio` times as many of the others, drawn with a seed; each at most as often as needed."""
    wanted = round(ratio * len(rows))
    random = numpy.random.default_rng([seed, 2])
    rounds = [random.permutation(len(others)) for _ in range(-(-wanted // len(others)))]
    chosen = numpy.concatenate([*rounds, numpy.zeros(0, "int64")])[:wanted]
    parts = rows.parts if isinstance(rows, RowSet) else [(rows, numpy.arange(len(rows)))]
    return RowSet([*parts, (others, numpy.sort(chosen))])
