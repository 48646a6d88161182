"""Rows chosen and joined: a part held out for evaluation, general rows mixed into those of the task."""

import numpy

from exits import UserError


class RowSet:
    """Rows of several EncodedRows, as one: parts is a list of (EncodedRows, numbers of its rows)."""

    def __init__(self, parts):
        self.parts = [(rows, numpy.asarray(numbers, dtype=numpy.int64)) for rows, numbers in parts]
        self.ends = numpy.cumsum([len(numbers) for _, numbers in self.parts])
        self.key = "+".join(rows.key for rows, _ in self.parts)
        self.bad_rows = [message for rows, _ in self.parts for message in rows.bad_rows]

    def __len__(self):
        return int(self.ends[-1])

    def find(self, n):
        """(EncodedRows, number in it) of row n."""
        n = range(len(self))[n]
        part = int(self.ends.searchsorted(n, side="right"))
        rows, numbers = self.parts[part]
        return rows, int(numbers[n - self.ends[part] + len(numbers)])

    def __getitem__(self, n):
        rows, number = self.find(n)
        return rows[number]

    def place(self, n):
        """Where row n stands: file:line."""
        rows, number = self.find(n)
        return rows.place(number)

    @property
    def lengths(self):
        """Tokens of each row: int64 (N,)."""
        return numpy.concatenate([rows.lengths[numbers] for rows, numbers in self.parts])

    @property
    def num_labels(self):
        """Supervised tokens of each row: int64 (N,)."""
        return numpy.concatenate([rows.num_labels[numbers] for rows, numbers in self.parts])


def hold_out(rows, ratio, seed):
    """(training rows, held-out rows): a seeded share of the rows, at least one; each part in the files' order."""
    order = numpy.random.default_rng([seed, 1]).permutation(len(rows))
    num_held_out = max(1, round(ratio * len(rows)))
    if num_held_out >= len(rows):
        raise UserError(f"--eval_ratio {ratio}: leaves none of {len(rows)} rows to train on: use a smaller one")
    held_out, kept = numpy.sort(order[:num_held_out]), numpy.sort(order[num_held_out:])
    return RowSet([(rows, kept)]), RowSet([(rows, held_out)])


def mix(rows, others, ratio, seed):
    """The rows with `ratio` times as many of the others, drawn with a seed; each at most as often as needed."""
    wanted = round(ratio * len(rows))
    random = numpy.random.default_rng([seed, 2])
    rounds = [random.permutation(len(others)) for _ in range(-(-wanted // len(others)))]
    chosen = numpy.concatenate([*rounds, numpy.zeros(0, "int64")])[:wanted]
    parts = rows.parts if isinstance(rows, RowSet) else [(rows, numpy.arange(len(rows)))]
    return RowSet([*parts, (others, numpy.sort(chosen))])
