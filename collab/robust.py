"""Statistics of what strangers report: a few of them cannot move the result far."""

import math
import statistics
from collections.abc import Sequence

WIDTH = 3.0
"""In median absolute deviations. With 3, one value in 20 of a normal distribution is pulled in, by little."""
FLOOR = 0.02
"""The least deviation that counts, as a share of the median: values that happen to be equal are not the only true."""


def winsorized(values: Sequence[float]) -> list[float]:
    """The same values, each pulled in to within `WIDTH` median absolute deviations of the median (Hampel's rule).

    Fewer than half of the values, whatever they are, cannot bring any of the results further than `WIDTH` times the
    honest values' range (or `FLOOR` of the largest) outside of it. Of two values nobody knows which one is false: both
    stay as they are.
    """
    if len(values) < 3:
        return list(values)
    middle = statistics.median(values)
    deviation = max(statistics.median(abs(value - middle) for value in values), FLOOR * abs(middle))
    return [min(max(value, middle - WIDTH * deviation), middle + WIDTH * deviation) for value in values]


def leveled(values: Sequence[float], total: float) -> list[float]:
    """The same values with the largest ones lowered to one level, so that their sum is `total` at most.

    Who claims more than all of it gets what the level gives, and not more than the largest of the others could.
    """
    if sum(values) <= total:
        return list(values)
    left, level = max(total, 0.0), 0.0
    ordered = sorted(values)
    for index, value in enumerate(ordered):
        level = left / (len(ordered) - index)
        if value >= level:
            break
        left -= value
    return [min(value, level) for value in values]


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """NaN if all weights are zero."""
    total = math.fsum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else math.nan
