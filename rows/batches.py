"""Rows put into updates, micro-batches and tensors.

An update takes `sequences_per_update` sequences: rows, or with packing several rows each. Which rows make an update
depends on the seed alone, not on how the update is split over processes, micro-batches and accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from rows.encoding import NO_END

if TYPE_CHECKING:
    import torch

IGNORE = -100  # label of a position that carries no loss
BLOCK = 4  # rows of similar length that stay together when the order is drawn; an update mixes several blocks
WINDOW = 32  # updates whose rows are sorted by length before they are cut into blocks


class Split(NamedTuple):
    """How an update is shared out: rows (or packed sequences) of a micro-batch, micro-batches, processes."""

    batch_size: int
    accumulation: int
    world_size: int


@dataclass
class Update:
    """One optimizer update: row numbers of this rank's micro-batches, and of the whole update its rows' numbers and
    its supervised tokens."""

    micro_batches: list[list[int]]
    rows: list[int]
    num_labels: int


class Updates:
    """Splits each epoch into optimizer updates, the same for every rank.

    lengths, num_labels: tokens and supervised tokens of every row. rank: the process whose micro-batches are given.
    pack_to: tokens of a packed sequence, or None.

    A new order every epoch, the same for the same seed. Rows of similar length come together, so that little is
    padded; packed sequences are put together once. All ranks run equally many micro-batches; where rows run out in
    the last, short update, a rank gets an empty micro-batch (`collate` makes one that carries no label).
    """

    def __init__(
        self,
        lengths: Sequence[int] | numpy.ndarray,
        num_labels: Sequence[int] | numpy.ndarray,
        split: Split,
        rank: int,
        seed: int,
        pack_to: int | None = None,
    ) -> None:
        self.lengths = numpy.asarray(lengths, dtype=numpy.int64)
        self.num_labels = numpy.asarray(num_labels, dtype=numpy.int64)
        self.batch_size, self.world_size = split.batch_size, split.world_size
        self.rank = rank
        self.seed = seed
        self.sequences_per_update = math.prod(split)
        self.packs: list[list[int]] | None = None
        if pack_to is not None:
            self.packs = pack(self.lengths, pack_to, numpy.random.default_rng([seed, 0]))
        self.num_sequences = len(self.lengths) if self.packs is None else len(self.packs)

    def __len__(self) -> int:
        """Updates in an epoch."""
        return -(-self.num_sequences // self.sequences_per_update)

    def order(self, epoch: int) -> numpy.ndarray:
        """Sequences of an epoch in their order, (updates, sequences_per_update); -1 fills the last update."""
        random = numpy.random.default_rng([self.seed, epoch + 1])
        order = random.permutation(self.num_sequences)
        if self.packs is None:
            order = group_by_length(order, self.lengths, self.sequences_per_update, random)
        plan = numpy.full((len(self), self.sequences_per_update), -1)
        plan.flat[: len(order)] = order
        if self.packs is None:  # similar rows meet in a micro-batch; the filling stays at the end
            keys = numpy.where(plan < 0, 1, -self.lengths[plan])
            plan = numpy.take_along_axis(plan, keys.argsort(axis=1, kind="stable"), axis=1)
        return plan

    def since(self, step: int, num_epochs: int) -> Iterator[tuple[int, Update]]:
        """Yield (epoch, update) of all updates after the first `step` of a run of so many epochs."""
        for epoch in range(step // len(self), num_epochs):
            for update in self.epoch(epoch, first=step % len(self) if epoch == step // len(self) else 0):
                yield epoch, update

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Update]:
        """Yield the updates of an epoch (counted from 0), from its `first` one on."""
        for sequences in self.order(epoch)[first:]:
            sequences = sequences[sequences >= 0]
            most = -(-len(sequences) // self.world_size)  # sequences of the fullest rank
            mine = sequences[self.rank :: self.world_size]
            micro_batches = [self.rows(mine[i : i + self.batch_size]) for i in range(0, most, self.batch_size)]
            rows = self.rows(sequences)
            yield Update(micro_batches, rows, int(self.num_labels[rows].sum()))

    def rows(self, sequences: numpy.ndarray) -> list[int]:
        """Numbers of the rows in these sequences."""
        if self.packs is None:
            return sequences.tolist()
        return [row for sequence in sequences for row in self.packs[sequence]]

    def waste(self) -> float:
        """Share of the first epoch's positions that are padding; packed rows have none."""
        if self.packs is not None:
            return 0.0
        plan = self.order(0)
        lengths = numpy.where(plan < 0, 0, self.lengths[plan])
        micro_batches = lengths.reshape(len(self), -1, self.batch_size, self.world_size)
        positions = (micro_batches.max(axis=2) * (micro_batches > 0).sum(axis=2)).sum()
        return 1.0 - lengths.sum() / positions

    def describe(self) -> str:
        """What a run says once about its batches."""
        if self.packs is None:
            return f"batches: rows of similar length together, {self.waste():.1%} of the positions are padding"
        return (
            f"batches: {len(self.lengths):,} rows packed into {self.num_sequences:,} sequences,"
            f" {self.lengths.sum() / self.num_sequences:,.0f} tokens in each on average, no padding"
        )


def group_by_length(
    order: numpy.ndarray, lengths: numpy.ndarray, rows_per_update: int, random: numpy.random.Generator
) -> numpy.ndarray:
    """A random order in which rows of similar length stand together.

    Windows of the given random order (a quarter of the rows at most, so that each epoch groups other rows) are
    sorted by length and cut into blocks; the blocks are put into random order. Rows that make no whole block come
    last; they are a random choice.
    """
    block = min(BLOCK, rows_per_update)
    num_whole = len(order) // block * block
    order, rest = order[:num_whole], order[num_whole:]
    window = max(block, min(WINDOW * max(BLOCK, rows_per_update), num_whole // 4) // block * block)
    windows = [order[start : start + window] for start in range(0, num_whole, window)]
    ordered = [part[lengths[part].argsort(kind="stable")] for part in windows]
    blocks = numpy.concatenate([*ordered, order[:0]]).reshape(-1, block)
    return numpy.concatenate([random.permutation(blocks).flatten(), rest])


def pack(lengths: numpy.ndarray, pack_to: int, random: numpy.random.Generator) -> list[list[int]]:
    """Rows put into sequences of at most `pack_to` tokens: a list of lists of row numbers.

    Best fit decreasing: the longest row first, each into the fullest sequence that still has room. The random order
    decides among rows of one length.
    """
    order = random.permutation(len(lengths))
    order = order[(-lengths[order]).argsort(kind="stable")]
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(pack_to + 1)]  # sequences by the tokens that they have room for
    open_rooms = 0  # bit r is set where by_room[r] is not empty
    for row, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
            packs[number].append(row)
        else:
            room, number = pack_to, len(packs)
            packs.append([row])
        by_room[room - length].append(number)
        open_rooms |= 1 << (room - length)
    return packs


def collate(rows: Sequence[dict], pad_token_id: int, packed: bool = False) -> dict:
    """Rows -> a batch for the model's forward, as CPU tensors.

    input_ids and labels, labels -100 on prompt and padding: (B, longest), padded on the right, or with `packed`
    (1, all tokens) with row_lengths (a list) beside them. label_positions (M,): where the next token has a label.

    Without rows: one padding token without label, so that every rank runs forward and backward equally often.
    """
    import torch

    from modeling.loss import label_positions

    lengths = [len(row["input_ids"]) for row in rows] or [1]
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    starts = numpy.cumsum([0, *lengths]) if packed else numpy.arange(len(lengths)) * shape[1]
    for row, start in zip(rows, starts.tolist()):
        ids = torch.as_tensor(numpy.asarray(row["input_ids"], dtype=numpy.int64))
        input_ids.view(-1)[start : start + len(ids)] = ids
        row_labels = labels.view(-1)[start : start + len(ids)]
        for first, end, end_id in numpy.asarray(row["runs"]).tolist():
            row_labels[first:end] = ids[first:end]
            if end_id != NO_END:
                row_labels[end] = end_id
        row_labels[0] = IGNORE  # never predicted: what stands before it is another row
    batch = {"input_ids": input_ids, "labels": labels, "label_positions": label_positions(labels)}
    return {**batch, "row_lengths": lengths} if packed else batch


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch on the device; to a GPU it is copied while the GPU works (pinned memory, no waiting)."""
    import torch

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or device.type == "cpu":
            return value
        return value.pin_memory().to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}
