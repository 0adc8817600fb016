"""What is said of a series of measurements."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

_RESAMPLES = 2000


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    return sorted(values)[round(0.95 * (len(values) - 1))]


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the ratio of two medians, by the bootstrap."""
    by_lot = random.Random(0)
    ratios = sorted(median(_again(over, by_lot)) / median(_again(under, by_lot)) for _ in range(_RESAMPLES))
    return ratios[round(0.025 * (_RESAMPLES - 1))], ratios[round(0.975 * (_RESAMPLES - 1))]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence, whatever the distribution: by the ranks of the ordered values
    (Conover, Practical Nonparametric Statistics, 3.2)."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(ordered) / 2 - half), int(len(ordered) / 2 + half)
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]


def _again(values: Sequence[float], by_lot: random.Random) -> list[float]:
    return by_lot.choices(values, k=len(values))
