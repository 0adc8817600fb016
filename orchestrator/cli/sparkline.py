"""A curve in one line of text. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVELS = "▁▂▃▄▅▆▇█"
ODD = "×"
"""For what has no height: NaN and ±inf."""


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` characters, the newest value at the right; each is the mean of its share of the values.

    Example: sparkline([0, 1, 2, 3], 4) == "▁▃▆█".
    """
    shown = [mean(part) for part in _parts(values, width)]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ODD * len(shown)
    low, high = min(finite), max(finite)
    return "".join(_level(value, low, high) if math.isfinite(value) else ODD for value in shown)


def _parts(values: Sequence[float], width: int) -> list[Sequence[float]]:
    count = min(width, len(values))
    edges = [len(values) * at // count for at in range(count + 1)] if count > 0 else [0]
    return [values[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]


def mean(values: Sequence[float]) -> float:
    """Of what is finite; NaN if nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(value / len(finite) for value in finite) if finite else math.nan


def _level(value: float, low: float, high: float) -> str:
    # Halved, so that the distance of two huge numbers stays finite.
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
    return LEVELS[min(len(LEVELS) - 1, int(share * len(LEVELS)))]
