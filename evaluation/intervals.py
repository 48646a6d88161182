"""How far a metric would move with other rows of the same kind: percentile bootstrap intervals (Efron 1979).

A resample draws as many rows as there are, with replacement, and the metric is computed again; the interval holds the
middle 95 % of these values. Two prediction sets over the same rows are compared on the same resamples, so what makes a
row easy or hard for both cancels out.
"""

from collections.abc import Sequence
from typing import Any

from evaluation.metrics import score_arrays, sums_of, values_of
from runtime.exits import UserError

LEVEL = 95  # per cent of the resamples inside an interval
SEED = 1234
MAX_CELLS = 2_000_000  # resamples x rows held at once: memory stays small for any number of rows

DEFINITION = (
    "Percentile bootstrap: {num_resamples} resamples of the rows with replacement (seed {seed}); the interval holds "
    "the middle {level} % of the metric's values. It says how far the number would move with other rows of the same "
    "kind, not with another training run. A difference is of the same resamples of both files, second minus first; it "
    "is inside the noise where its interval contains 0. null for a single row; where all rows score alike the interval "
    "has no width, which says that there are too few rows and not that the value is exact."
)


def resampled(rows: list[dict], names: Sequence[str], num_resamples: int, seed: int = SEED) -> dict:
    """{metric: array of its values, one for each resample}; NaN where a resample gives none.

    The same number of rows and the same seed give the same resamples.
    """
    import numpy

    rng, arrays, block = numpy.random.default_rng(seed), score_arrays(rows), max(1, MAX_CELLS // len(rows))
    parts = []
    for start in range(0, num_resamples, block):
        # How often each row occurs [B, N] is all that a metric needs to know of a resample.
        drawn = rng.integers(len(rows), size=(min(block, num_resamples - start), len(rows)))
        drawn += len(rows) * numpy.arange(len(drawn))[:, None]
        counts = numpy.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        parts.append(values_of(sums_of(arrays, counts.astype(float)), names))
    return {name: numpy.concatenate([part[name] for part in parts]) for name in names}


def middle(values: Any) -> list[float] | None:
    """The ends of the middle LEVEL per cent; None without values."""
    import numpy

    values = values[~numpy.isnan(values)]
    tail = (100 - LEVEL) / 2
    return numpy.percentile(values, [tail, 100 - tail]).tolist() if len(values) else None


def intervals(
    rows: list[dict], names: Sequence[str], num_resamples: int = 1000, seed: int = SEED
) -> dict[str, list[float] | None]:
    """{metric: [low, high]} of rows from `score_rows`; None for a metric without a value and for fewer than two rows.

    num_resamples: 0 switches off, and every interval is None.
    """
    if len(rows) < 2 or not num_resamples:
        return dict.fromkeys(names)
    return {name: middle(values) for name, values in resampled(rows, names, num_resamples, seed).items()}


def differences(
    rows_a: list[dict], rows_b: list[dict], names: Sequence[str], num_resamples: int = 1000, seed: int = SEED
) -> dict[str, tuple]:
    """{metric: (b - a, low, high)} of two predictions for the same rows, in the same order.

    None stands for what has no value; `intervals` says where.
    """
    if len(rows_a) != len(rows_b):
        raise UserError(
            f"rows_a and rows_b: {len(rows_a)} and {len(rows_b)}: a paired difference is of predictions for the same "
            "rows: pass two lists of the same length"
        )
    if not rows_a:
        return dict.fromkeys(names, (None, None, None))
    values = [values_of(sums_of(score_arrays(rows)), names) for rows in (rows_a, rows_b)]
    points = {name: (values[1][name] - values[0][name])[0].item() for name in names}
    ends: dict[str, list[float] | None] = dict.fromkeys(names)
    if len(rows_a) > 1 and num_resamples:
        samples = [resampled(rows, names, num_resamples, seed) for rows in (rows_a, rows_b)]
        ends = {name: middle(samples[1][name] - samples[0][name]) for name in names}
    return {
        name: (None if point != point else point, *(ends[name] or (None, None)))  # NaN alone is not itself
        for name, point in points.items()
    }


def difference(
    rows_a: list[dict], rows_b: list[dict], metric: str, num_resamples: int = 1000, seed: int = SEED
) -> tuple[float | None, float | None, float | None]:
    """(b - a, low, high) of one metric for two predictions of the same rows, in the same order."""
    return differences(rows_a, rows_b, (metric,), num_resamples, seed)[metric]


def weighted_mean(
    values: Sequence[float], weights: Sequence[float] | None = None, num_resamples: int = 1000, seed: int = SEED
) -> list:
    """[mean of the rows' values, low, high]; weights: what each row counts, left out: all alike.

    low and high are None for fewer than two rows.
    """
    import numpy

    factors = numpy.ones(len(values)) if weights is None else numpy.array(weights, dtype=float)
    sums = numpy.array(values, dtype=float) * factors
    mean = float(sums.sum() / factors.sum())
    if len(sums) < 2:
        return [mean, None, None]
    rng = numpy.random.default_rng(seed)
    drawn = (rng.integers(len(sums), size=len(sums)) for _ in range(num_resamples))
    return [mean, *(middle(numpy.array([sums[rows].sum() / factors[rows].sum() for rows in drawn])) or (None, None))]
