"""Which points of a long curve a slow sink gets: the first `complete`, then the extremes and the last of each window.

Pure and deterministic: the same points in the same order, cut into any pieces, give the same selection, because the
open window is part of the state that is stored with the cursor. So a mirror that crashed sends exactly the same
points again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Point = tuple[int, int, int, float]
"""Index in the curve (0, 1, 2 …), step, time in ms, value."""


def window_length(index: int) -> int:
    """How many points share a window that starts at `index`. It grows: ten million points become about 30,000."""
    return max(10, index // 1000)


@dataclass(slots=True)
class Decimator:
    """One curve's state. `add` takes the next points and gives back those to send, `flush` what the open window
    holds.
    """

    complete: int = 10_000
    count: int = 0
    """Points seen so far."""
    _start: int = 0
    """Index at which the open window starts; meaningless when `_kept` is empty."""
    _kept: dict[str, Point] = field(default_factory=dict)
    """Of the open window: min, max, last, nan (the first NaN)."""

    @property
    def is_decimated(self) -> bool:
        return self.count > self.complete

    def add(
        self, steps: np.ndarray, times_ms: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = len(steps)
        whole = min(n, max(0, self.complete - self.count))
        first_index, self.count = self.count, self.count + n
        if whole == n:
            return steps, times_ms, values
        chosen: list[Point] = []
        position = whole
        while position < n:
            index = first_index + position
            if not self._kept:
                self._start = index
            end = self._start + window_length(self._start)
            stop = min(n, position + end - index)
            self._take(index, steps[position:stop], times_ms[position:stop], values[position:stop])
            if first_index + stop == end:
                chosen += self._close()
            position = stop
        return _joined((steps[:whole], times_ms[:whole], values[:whole]), chosen)

    def flush(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give out the open window as it is. Later points begin a new one."""
        return _joined((np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64)), self._close())

    def _take(self, index: int, steps: np.ndarray, times_ms: np.ndarray, values: np.ndarray) -> None:
        def point(offset: int) -> Point:
            return index + offset, int(steps[offset]), int(times_ms[offset]), float(values[offset])

        missing = np.isnan(values)
        if missing.any() and "nan" not in self._kept:
            self._kept["nan"] = point(int(np.argmax(missing)))
        if not missing.all():
            lowest, highest = point(int(np.nanargmin(values))), point(int(np.nanargmax(values)))
            if "min" not in self._kept or lowest[3] < self._kept["min"][3]:
                self._kept["min"] = lowest
            if "max" not in self._kept or highest[3] > self._kept["max"][3]:
                self._kept["max"] = highest
        self._kept["last"] = point(len(steps) - 1)

    def _close(self) -> list[Point]:
        points = sorted({point[0]: point for point in self._kept.values()}.values())
        self._kept = {}
        return points

    def to_json(self) -> Any:
        """A number until the curve is decimated; then also the open window. Values as text: JSON has no NaN."""
        if not self._kept:
            return self.count
        return [self.count, self._start, {k: [i, s, t, repr(v)] for k, (i, s, t, v) in self._kept.items()}]

    @classmethod
    def from_json(cls, raw: Any, complete: int) -> Decimator:
        if isinstance(raw, int):
            return cls(complete=complete, count=raw)
        count, start, kept = raw
        return cls(
            complete=complete, count=count, _start=start,
            _kept={k: (int(i), int(s), int(t), float(v)) for k, (i, s, t, v) in kept.items()},
        )  # fmt: skip


def _joined(
    head: tuple[np.ndarray, np.ndarray, np.ndarray], tail: list[Point]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not tail:
        return head
    _, steps, times_ms, values = zip(*tail, strict=True)
    return (
        np.concatenate([head[0], np.array(steps, np.int64)]),
        np.concatenate([head[1], np.array(times_ms, np.int64)]),
        np.concatenate([head[2], np.array(values, np.float64)]),
    )
