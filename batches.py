"""Rows put into updates, micro-batches and tensors."""

from dataclasses import dataclass

IGNORE = -100  # label of a position that carries no loss


@dataclass
class Update:
    """One optimizer update on this rank: row numbers of its micro-batches, and the update's supervised tokens."""

    micro_batches: list
    num_labels: int
    num_rows: int


class Updates:
    """Splits each epoch into optimizer updates, the same for every rank.

    A new order every epoch, the same for the same seed. All ranks run equally many micro-batches; where rows run
    out in the last, short update, a rank gets an empty micro-batch (`collate` makes one that carries no label).
    """

    def __init__(self, num_labels, batch_size, accumulation, rank, world_size, seed):
        self.num_labels = num_labels
        self.batch_size = batch_size
        self.rows_per_update = batch_size * accumulation * world_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed

    def __len__(self):
        """Updates in an epoch."""
        return -(-len(self.num_labels) // self.rows_per_update)

    def epoch(self, epoch):
        """Yield the updates of an epoch (counted from 0)."""
        import torch

        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.num_labels), generator=generator).tolist()
        for start in range(0, len(order), self.rows_per_update):
            rows = order[start : start + self.rows_per_update]
            most = -(-len(rows) // self.world_size)  # rows of the fullest rank
            mine = rows[self.rank :: self.world_size]
            micro_batches = [mine[i : i + self.batch_size] for i in range(0, most, self.batch_size)]
            yield Update(micro_batches, sum(self.num_labels[i] for i in rows), len(rows))


def collate(rows, pad_token_id):
    """Rows -> {"input_ids", "labels"} of (B, longest), padded on the right, labels -100 on padding and prompt.

    Without rows: one padding row without labels, so that every rank runs forward and backward equally often.
    """
    import torch

    length = max((len(row["input_ids"]) for row in rows), default=1)
    input_ids = torch.full((max(1, len(rows)), length), pad_token_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        input_ids[i, : len(ids)] = ids
        labels[i, row["num_unlabelled"] : len(ids)] = ids[row["num_unlabelled"] :]
    return {"input_ids": input_ids, "labels": labels}
