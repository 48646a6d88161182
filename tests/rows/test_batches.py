"""Rows put into updates, micro-batches and tensors."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rows.batches import Split, Updates, collate, pack

# ---------------------------------------------------------------- an epoch


SPLITS = [  # rows, batch size, accumulation, ranks
    (1, 1, 1, 1),
    (10, 1, 1, 1),
    (10, 2, 2, 1),
    (10, 1, 4, 2),
    (7, 2, 3, 3),
    (17, 4, 2, 4),
    (24, 2, 3, 4),
    (25, 2, 3, 4),
    (5, 8, 4, 4),
]


def lengths_of(num_rows, seed=0):
    return numpy.random.default_rng(seed).integers(1, 60, num_rows)


def updates_of(num_rows, batch_size, accumulation, rank, world, seed=1, pack_to=None):
    num_labels = [3 * n + 1 for n in range(num_rows)]
    return Updates(lengths_of(num_rows), num_labels, Split(batch_size, accumulation, world), rank, seed, pack_to)


def epoch_of_all_ranks(num_rows, batch_size, accumulation, world, seed=1, epoch=0, pack_to=None):
    return [
        list(updates_of(num_rows, batch_size, accumulation, rank, world, seed, pack_to).epoch(epoch))
        for rank in range(world)
    ]


def check_epoch(num_rows, batch_size, accumulation, world, **kwargs):
    """Every row once, equally many micro-batches everywhere, the labels of the whole update."""
    ranks = epoch_of_all_ranks(num_rows, batch_size, accumulation, world, **kwargs)
    updates = updates_of(num_rows, batch_size, accumulation, 0, world)
    assert {len(rank) for rank in ranks} == {len(updates)}
    seen = []
    for number, update_of_ranks in enumerate(zip(*ranks)):
        rows = [row for update in update_of_ranks for batch in update.micro_batches for row in batch]
        seen += rows
        assert {update.num_labels for update in update_of_ranks} == {sum(3 * row + 1 for row in rows)}
        assert all(sorted(update.rows) == sorted(rows) for update in update_of_ranks)
        num_batches = {len(update.micro_batches) for update in update_of_ranks}
        assert len(num_batches) == 1 and 1 <= num_batches.pop() <= accumulation
        assert all(len(batch) <= batch_size for update in update_of_ranks for batch in update.micro_batches)
        if number < len(updates) - 1:
            assert len(rows) == batch_size * accumulation * world == updates.sequences_per_update
            assert all(len(batch) == batch_size for update in update_of_ranks for batch in update.micro_batches)
    assert sorted(seen) == list(range(num_rows))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_row_once_in_an_epoch(split):
    check_epoch(*split)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_every_row_once_in_any_epoch(num_rows, batch_size, accumulation, world, epoch):
    check_epoch(num_rows, batch_size, accumulation, world, epoch=epoch)


def test_an_epoch_can_be_taken_up_in_the_middle():
    updates = updates_of(23, 2, 2, rank=1, world=2)
    assert list(updates.epoch(3, first=1)) == list(updates.epoch(3))[1:]
    assert list(updates.epoch(3, first=len(updates))) == []


def test_a_rank_without_rows_gets_an_empty_micro_batch():
    ranks = epoch_of_all_ranks(9, batch_size=1, accumulation=2, world=4)
    last = [rank[-1] for rank in ranks]
    assert sorted(len(update.micro_batches[0]) for update in last) == [0, 0, 0, 1]
    assert len({update.num_labels for update in last}) == 1


def order(seed, epoch, num_rows=50):
    return [row for update in epoch_of_all_ranks(num_rows, 4, 1, 1, seed, epoch)[0] for row in update.micro_batches[0]]


def test_a_new_order_each_epoch_and_the_same_for_the_same_seed():
    orders = [tuple(order(seed, epoch)) for seed in (1, 2, 1234) for epoch in range(4)]
    assert len(set(orders)) == len(orders) and tuple(range(50)) not in orders
    assert orders == [tuple(order(seed, epoch)) for seed in (1, 2, 1234) for epoch in range(4)]


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 10**30])
def test_any_seed_has_an_order(seed):
    assert sorted(order(seed, epoch=3)) == list(range(50))


def test_the_rows_of_an_update_do_not_depend_on_the_split():
    """8 rows of an update as 8 x 1, 2 x 4 and 1 x 2 x 4 ranks: the same rows."""
    as_sets = [
        [
            {row for update in update_of_ranks for batch in update.micro_batches for row in batch}
            for update_of_ranks in zip(*epoch_of_all_ranks(30, *split))
        ]
        for split in ((8, 1, 1), (2, 4, 1), (1, 2, 4))
    ]
    assert as_sets[0] == as_sets[1] == as_sets[2]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 80), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(60, 200))
def test_every_row_once_when_packed(num_rows, batch_size, accumulation, world, pack_to):
    ranks = epoch_of_all_ranks(num_rows, batch_size, accumulation, world, epoch=2, pack_to=pack_to)
    assert len({tuple(len(update.micro_batches) for update in rank) for rank in ranks}) == 1
    seen = []
    for updates in zip(*ranks):
        batches = [batch for update in updates for batch in update.micro_batches]
        rows = [row for batch in batches for row in batch]
        assert all(lengths_of(num_rows)[batch].sum() <= batch_size * pack_to for batch in batches)
        assert {update.num_labels for update in updates} == {sum(3 * row + 1 for row in rows)}
        assert all(sorted(update.rows) == sorted(rows) for update in updates)
        seen += rows
    assert sorted(seen) == list(range(num_rows))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 300), st.integers(0, 5))
def test_packs_hold_every_row_once_and_are_never_too_long(lengths, pack_to, seed):
    packs = pack(numpy.array(lengths, dtype=int), pack_to, numpy.random.default_rng(seed))
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in rows) for rows in packs]
    assert all(0 < total <= pack_to for total in sums)


def test_packs_are_full_where_rows_are_short():
    lengths = lengths_of(2000)
    packs = pack(lengths, 512, numpy.random.default_rng(0))
    assert lengths.sum() / (512 * len(packs)) > 0.99
    other = pack(lengths, 512, numpy.random.default_rng(1))
    assert packs != other and packs == pack(lengths, 512, numpy.random.default_rng(0))


def padding(updates, lengths):
    """Share of padded positions in an epoch, counted batch by batch."""
    batches = [batch for update in updates.epoch(0) for batch in update.micro_batches if batch]
    positions = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / positions


@pytest.mark.parametrize("split", [(4, 1, 1), (4, 4, 1), (8, 2, 1), (16, 1, 1), (3, 5, 1)], ids=str)
def test_similar_lengths_share_a_batch(split):
    lengths = lengths_of(1000)
    updates = Updates(lengths, lengths, Split(*split[:2], 1), rank=0, seed=1)
    assert updates.waste() == pytest.approx(padding(updates, lengths))
    order = numpy.random.default_rng(0).permutation(1000)[: 1000 // split[0] * split[0]].reshape(-1, split[0])
    random_order = 1 - lengths[order].sum() / (lengths[order].max(axis=1) * split[0]).sum()
    assert updates.waste() < random_order * (0.2 if split[0] == 4 else 0.85)


def test_micro_batches_are_drawn_anew_every_epoch():
    lengths = numpy.arange(640)
    updates = Updates(lengths, lengths, Split(4, 1, 1), rank=0, seed=1)
    together = [{tuple(sorted(u.micro_batches[0])) for u in updates.epoch(epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) < 16
    first = [updates.order(0)[i].min() for i in range(100)]
    assert first != sorted(first) and abs(numpy.corrcoef(first, range(100))[0, 1]) < 0.3  # no order by length


# ---------------------------------------------------------------- batches


def test_collate_pads_on_the_right():
    batch = collate(
        [{"input_ids": [5, 6, 7], "runs": [(1, 3, -1)]}, {"input_ids": [8, 9, 10, 11, 12], "runs": [(3, 5, -1)]}], 3
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3, 3], [8, 9, 10, 11, 12]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, -100, -100, 11, 12]]
    assert batch["label_positions"].tolist() == [0, 1, 7, 8]  # of 10 places; their next tokens have labels
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_collate_packs_rows_one_after_another():
    batch = collate(
        [{"input_ids": [5, 6, 7], "runs": [(1, 3, -1)]}, {"input_ids": [8, 9, 10], "runs": [(0, 3, -1)]}],
        3,
        packed=True,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, 10]]  # 8 is not predicted from 7
    assert batch["label_positions"].tolist() == [0, 1, 3, 4]
    assert batch["row_lengths"] == [3, 3]


def test_collate_labels_a_pad_id_inside_a_row():
    """Padding is told by place, not by id: the id of padding may be the text's unknown token."""
    batch = collate([{"input_ids": [5, 0, 0, 2], "runs": [(1, 4, -1)]}], 0)
    assert batch["labels"].tolist() == [[-100, 0, 0, 2]]


TURNS = [  # rows of several turns; the second one's first answer is ended by an id that is not in the row
    {"input_ids": [5, 6, 7, 8, 9, 10], "runs": [(2, 4, -1), (5, 6, -1)]},
    {"input_ids": [11, 12, 13, 14], "runs": [(1, 2, 2), (3, 4, -1)]},
]


def test_every_run_of_a_row_carries_loss():
    batch = collate(TURNS, 3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 3, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, 10], [-100, 12, 2, 14, -100, -100]]
    assert batch["label_positions"].tolist() == [1, 2, 4, 6, 7, 8]
    packed = collate(TURNS, 3, packed=True)
    assert packed["labels"].tolist() == [[-100, -100, 7, 8, -100, 10, -100, 12, 2, 14]]
    assert packed["row_lengths"] == [6, 4]


def test_collate_without_rows_has_nothing_to_learn():
    batch = collate([], 3)
    assert batch["input_ids"].tolist() == [[3]]
    assert batch["labels"].tolist() == [[-100]]


def test_packed_collate_without_rows_has_nothing_to_learn():
    batch = collate([], 3, packed=True)
    assert batch["input_ids"].tolist() == [[3]] and batch["row_lengths"] == [1]
    assert batch["label_positions"].tolist() == []


def best_fit(lengths, pack_to):
    """Tokens of the sequences of best fit decreasing, by looking at every sequence for every row."""
    totals = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, total in enumerate(totals) if total + length <= pack_to]
        if fitting:
            totals[max(fitting, key=lambda n: totals[n])] += length
        else:
            totals.append(length)
    return sorted(totals)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90), st.integers(0, 5))
def test_packs_are_those_of_best_fit(lengths, pack_to, seed):
    """Kind: a property that first fit and worst fit have as well."""
    packs = pack(numpy.array(lengths, dtype=int), pack_to, numpy.random.default_rng(seed))
    assert sorted(sum(lengths[row] for row in rows) for rows in packs) == best_fit(lengths, pack_to)


def test_best_fit_by_hand():
    """6, 5, 4, 3, 2 into 10: 6 + 4 is full, 5 + 3 + 2 too; worst fit would put the 4 beside the 5."""
    packs = pack(numpy.array([2, 3, 4, 5, 6]), 10, numpy.random.default_rng(0))
    assert sorted(map(sorted, packs)) == [[0, 1, 3], [2, 4]]


def test_updates_are_drawn_anew_where_there_are_few_rows():
    """A window is a quarter of the rows at most: of 64 rows sorted together, the same four would always meet."""
    lengths = numpy.arange(64)
    updates = Updates(lengths, lengths, Split(4, 1, 1), rank=0, seed=1)
    together = [{tuple(sorted(u.rows)) for u in updates.epoch(epoch)} for epoch in range(4)]
    assert len(set.union(*together)) > 48
    assert all(len(rows) == 4 for rows in set.union(*together))


def test_the_runs_updates_follow_one_another():
    """From any step on they are those of the whole run, with their epochs; after the last there is none."""
    updates = updates_of(10, 2, 2, rank=0, world=1)
    whole = list(updates.since(0, 3))
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for step in range(10):
        assert list(updates.since(step, 3)) == whole[step:]


def test_the_longest_rows_of_an_update_come_first():
    """Similar rows meet in a micro-batch, the filling stays at the end, and a lack of memory shows at once."""
    updates = updates_of(23, 2, 4, rank=0, world=1)
    for sequences in updates.order(0):
        kept = sequences[sequences >= 0]
        assert (sequences[len(kept) :] == -1).all()
        assert updates.lengths[kept].tolist() == sorted(updates.lengths[kept], reverse=True)


def test_what_a_run_says_of_its_batches():
    lengths = numpy.array([4, 1, 3, 2])
    padded = Updates(lengths, lengths, Split(2, 2, 1), rank=0, seed=1)
    assert padded.waste() == pytest.approx(1 - 10 / 12)  # 4 + 3 and 2 + 1: two positions of twelve
    assert padded.describe() == "batches: rows of similar length together, 16.7% of the positions are padding"
    packed = Updates(lengths, lengths, Split(2, 2, 1), rank=0, seed=1, pack_to=5)
    assert packed.waste() == 0 and packed.num_sequences == 2
    assert packed.describe() == "batches: 4 rows packed into 2 sequences, 5 tokens in each on average, no padding"


def test_rows_of_one_length_keep_their_order():
    """A stable order: which rows meet must not turn on how a processor sorts."""
    from rows.batches import group_by_length

    order = numpy.random.default_rng(5).permutation(4096)
    found = group_by_length(order, numpy.ones(4096, dtype=int), 4, numpy.random.default_rng(6))
    places = numpy.empty(4096, dtype=int)
    places[order] = numpy.arange(4096)
    blocks = places[found].reshape(-1, 4)
    assert (blocks == blocks[:, :1] + numpy.arange(4)).all() and (blocks[:, 0] % 4 == 0).all()
    mixed = numpy.arange(4096) % 3
    found = places[group_by_length(order, mixed, 4, numpy.random.default_rng(6))].reshape(-1, 4)
    for block in found:
        kinds = mixed[order[block]]
        assert (numpy.diff(kinds) >= 0).all()
        assert all((numpy.diff(block)[n] > 0) for n in range(3) if kinds[n] == kinds[n + 1])
