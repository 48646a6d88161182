"""Rows put into updates, micro-batches and tensors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import Updates, collate

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


def epoch_of_all_ranks(num_rows, batch_size, accumulation, world, seed=1, epoch=0):
    num_labels = [3 * n + 1 for n in range(num_rows)]
    return [list(Updates(num_labels, batch_size, accumulation, r, world, seed).epoch(epoch)) for r in range(world)]


def check_epoch(num_rows, batch_size, accumulation, world, **kwargs):
    """Every row once, equally many micro-batches everywhere, the labels of the whole update."""
    ranks = epoch_of_all_ranks(num_rows, batch_size, accumulation, world, **kwargs)
    updates = Updates([1] * num_rows, batch_size, accumulation, 0, world, 1)
    assert {len(rank) for rank in ranks} == {len(updates)}
    seen = []
    for number, update_of_ranks in enumerate(zip(*ranks)):
        rows = [row for update in update_of_ranks for batch in update.micro_batches for row in batch]
        seen += rows
        assert {update.num_labels for update in update_of_ranks} == {sum(3 * row + 1 for row in rows)}
        assert {update.num_rows for update in update_of_ranks} == {len(rows)}
        num_batches = {len(update.micro_batches) for update in update_of_ranks}
        assert len(num_batches) == 1 and 1 <= num_batches.pop() <= accumulation
        assert all(len(batch) <= batch_size for update in update_of_ranks for batch in update.micro_batches)
        if number < len(updates) - 1:
            assert len(rows) == batch_size * accumulation * world == updates.rows_per_update
            assert all(len(batch) == batch_size for update in update_of_ranks for batch in update.micro_batches)
    assert sorted(seen) == list(range(num_rows))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_row_once_in_an_epoch(split):
    check_epoch(*split)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_every_row_once_in_any_epoch(num_rows, batch_size, accumulation, world, epoch):
    check_epoch(num_rows, batch_size, accumulation, world, epoch=epoch)


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


# ---------------------------------------------------------------- batches


def test_collate_pads_on_the_right():
    batch = collate(
        [{"input_ids": [5, 6, 7], "num_unlabelled": 1}, {"input_ids": [8, 9, 10, 11, 12], "num_unlabelled": 3}], 3
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3, 3], [8, 9, 10, 11, 12]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, -100, -100, 11, 12]]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_collate_labels_a_pad_id_inside_a_row():
    """Padding is told by place, not by id: the id of padding may be the text's unknown token."""
    batch = collate([{"input_ids": [5, 0, 0, 2], "num_unlabelled": 1}], 0)
    assert batch["labels"].tolist() == [[-100, 0, 0, 2]]


def test_collate_without_rows_has_nothing_to_learn():
    batch = collate([], 3)
    assert batch["input_ids"].tolist() == [[3]]
    assert batch["labels"].tolist() == [[-100]]
