"""Which points of several ranks and attempts make one curve. Pure and deterministic: the same points in the same order,
cut into any pieces, give the same curve, and everything that is open can be stored and taken up by another process.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

KINDS = ("mean", "min", "max", "sum", "last")
"""What a metric may declare."""

KINDS_ON_READ = (*KINDS, "p95", "skew")
"""What can be asked for, too: they tell of the ranks, not of the metric."""

MOST_OPEN = 50_000
"""Points of one key that wait for other ranks. Beyond it the rank that is furthest behind is not waited for."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Steps (int64), times in ms (int64), values (float64) of one length."""

NOTHING: Arrays = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))

_OPEN = np.dtype([("lap", "<i8"), ("step", "<i8"), ("turn", "<i8"), ("rank", "<i8"), ("time", "<i8"), ("value", "<f8")])


class Slot(NamedTuple):
    """What points of different ranks have in common when they belong together. A rank's slots only grow."""

    lap: int
    """How often the rank's steps went back: some programs count the steps of each epoch from 0."""
    step: int
    turn: int
    """0 for the first point at that step, 1 for the second …"""


@dataclass(slots=True)
class Reduction:
    """One key of one attempt, reduced over ranks per step: `add` takes what a rank logged, `take` gives out what is
    complete.

    A slot is complete when every rank has a point in it or is past it. A rank that is expected and silent holds
    everything back until `give_up`, a rank that stopped until `close`. What arrives for a slot that was given out is
    left out and counted, never given out again.
    """

    kind: str
    expected: set[int] = field(default_factory=set)
    late: int = 0
    """Points that came after their slot was given out."""
    is_closed: bool = False
    _reached: dict[int, Slot] = field(default_factory=dict)
    _given: Slot | None = None
    """Everything up to here is given out."""
    _open: np.ndarray = field(default_factory=lambda: np.empty(0, _OPEN))

    def __len__(self) -> int:
        """Points that wait for those of other ranks."""
        return len(self._open)

    @property
    def waits(self) -> bool:
        return len(self._open) > 0

    @property
    def silent(self) -> set[int]:
        """Ranks that never logged the key and are waited for."""
        return self.expected - self._reached.keys()

    def give_up(self, ranks: Iterable[int]) -> None:
        """These are not waited for any more. They take part again from the moment they log."""
        self.expected -= set(ranks)

    def close(self) -> None:
        """The next `take` gives out everything."""
        self.is_closed = True

    def add(self, rank: int, steps: np.ndarray, times_ms: np.ndarray, values: np.ndarray) -> None:
        if not len(steps):
            return
        fresh = np.empty(len(steps), _OPEN)
        fresh["lap"], fresh["turn"] = numbered(steps, self._reached.get(rank))
        fresh["step"], fresh["rank"], fresh["time"], fresh["value"] = steps, rank, times_ms, values
        self._reached[rank] = _slot(fresh[-1])
        if self._given is not None:
            is_late = _up_to(fresh, self._given)
            self.late += int(np.count_nonzero(is_late))
            fresh = fresh[~is_late]
        self._open = np.concatenate([self._open, fresh])

    def take(self) -> Arrays:
        """The slots that are complete now, in their order."""
        if not len(self._open):
            return NOTHING
        frontier = self._frontier()
        self.is_closed = False  # what comes later waits again for what may belong to it
        if frontier is None:
            return NOTHING
        is_ready = _up_to(self._open, frontier)
        ready, self._open = self._open[is_ready], self._open[~is_ready]
        self._given = frontier if self._given is None else max(self._given, frontier)
        return _reduced(ready, self.kind) if len(ready) else NOTHING

    def _frontier(self) -> Slot | None:
        if self.is_closed:
            return max(self._reached.values())
        complete = None if self.silent else min(self._reached.values())
        if len(self._open) <= MOST_OPEN:
            return complete
        ordered = np.sort(self._open, order=("lap", "step", "turn"))
        forced = _slot(ordered[len(ordered) - MOST_OPEN // 2])
        return forced if complete is None else max(complete, forced)

    def to_json(self) -> dict[str, Any]:
        opened = base64.b64encode(zlib.compress(self._open.tobytes(), 1)).decode() if len(self._open) else ""
        return {
            "kind": self.kind, "expected": sorted(self.expected), "late": self.late, "closed": self.is_closed,
            "reached": {str(rank): list(slot) for rank, slot in self._reached.items()},
            "given": None if self._given is None else list(self._given), "open": opened,
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Reduction:
        opened = zlib.decompress(base64.b64decode(raw["open"])) if raw["open"] else b""
        return cls(
            kind=raw["kind"], expected=set(raw["expected"]), late=raw["late"], is_closed=raw["closed"],
            _reached={int(rank): Slot(*slot) for rank, slot in raw["reached"].items()},
            _given=None if raw["given"] is None else Slot(*raw["given"]),
            _open=np.frombuffer(opened, _OPEN),
        )  # fmt: skip


@dataclass(slots=True)
class Lineage:
    """One curve over several attempts. MLflow cannot delete what it has, but what a later attempt has begun to repeat
    before it got there is left out."""

    starts: dict[int, int] = field(default_factory=dict)
    """First step of the curve in each attempt after the first."""
    left_out: int = 0

    def keep(self, attempt: int, points: Arrays) -> Arrays:
        steps = points[0]
        if not len(steps):
            return points
        if attempt > 1:
            self.starts[attempt] = min(int(steps.min()), self.starts.get(attempt, int(steps[0])))
        later = [first for other, first in self.starts.items() if other > attempt]
        if not later:
            return points
        stays = steps < min(later)
        self.left_out += int(np.count_nonzero(~stays))
        return steps[stays], points[1][stays], points[2][stays]

    def to_json(self) -> Any:
        return [self.left_out, {str(attempt): first for attempt, first in self.starts.items()}]

    @classmethod
    def from_json(cls, raw: Any) -> Lineage:
        return cls(left_out=raw[0], starts={int(attempt): first for attempt, first in raw[1].items()})


def joined(parts: Iterable[Arrays]) -> Arrays:
    steps, times_ms, values = zip(*parts, strict=True)
    return np.concatenate(steps), np.concatenate(times_ms), np.concatenate(values)


def numbered(steps: np.ndarray, before: Slot | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lap and turn of each of a rank's next points."""
    lap, step, turn = before or Slot(0, int(steps[0]), 0)
    change = np.diff(steps, prepend=step)
    if before is None:
        change[0] = 1
    index = np.arange(len(steps))
    begins = np.maximum.accumulate(np.where(change != 0, index, -1))
    return lap + np.cumsum(change < 0), np.where(begins < 0, turn + 1 + index, index - begins)


def _slot(point: np.void) -> Slot:
    return Slot(int(point["lap"]), int(point["step"]), int(point["turn"]))


def _up_to(points: np.ndarray, slot: Slot) -> np.ndarray:
    lap, step, turn = points["lap"], points["step"], points["turn"]
    in_lap = (step < slot.step) | ((step == slot.step) & (turn <= slot.turn))
    return (lap < slot.lap) | ((lap == slot.lap) & in_lap)


def aligned(lap: np.ndarray, step: np.ndarray, turn: np.ndarray, *then: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that brings the points of each slot together, and where in it each slot begins. Within a slot they are
    ordered by `then`, the last one first, else as they came."""
    order = np.lexsort((*then, turn, step, lap))
    differs = np.zeros(len(order), bool)
    differs[:1] = True
    for column in (lap, step, turn):
        arranged = column[order]
        differs[1:] |= arranged[1:] != arranged[:-1]
    return order, np.flatnonzero(differs)


def over_ranks(kind: str, values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """One value for each group: those from one of `first` up to the next. `kind` is one of KINDS_ON_READ.

    Ranks without a point in a group are not counted. NaN of any rank is NaN, except for `last`, which takes the last of
    the group. `p95` interpolates between the two nearest ranks, as numpy does. `skew` is (max - min) / |mean|, how far
    the ranks are apart as a share of what they have in common: 0 when all agree, whatever the unit, 0.1 when one of
    two ranks needs 10 % longer. (Skewness in the sense of statistics is always 0 for two ranks and says little of
    eight.)
    """
    counts = np.diff(first, append=len(values))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # inf - inf is NaN, sums overflow: it is shown
        match kind:
            case "last":
                return values[first + counts - 1]
            case "min":
                return np.minimum.reduceat(values, first)
            case "max":
                return np.maximum.reduceat(values, first)
            case "sum":
                return _added(values, first, counts)
            case "mean":
                return _added(values, first, counts) / counts
            case "p95":
                return _quantile(values, first, counts, 0.95)
            case "skew":
                spread = np.maximum.reduceat(values, first) - np.minimum.reduceat(values, first)
                mean = _added(values, first, counts) / counts
                return np.where(spread == 0, 0.0, spread / np.abs(mean))
    raise ValueError(f"{kind!r} is no reduction")


def _quantile(values: np.ndarray, first: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    if int(counts.min()) == int(counts.max()):
        ordered = np.sort(values.reshape(-1, int(counts[0])), axis=1).reshape(-1)
    else:
        ordered = values[np.lexsort((values, np.repeat(np.arange(len(first)), counts)))]
    place = share * (counts - 1)
    below = np.floor(place).astype(np.int64)
    low, high = ordered[first + below], ordered[first + np.ceil(place).astype(np.int64)]
    # Without the difference where there is none to take a share of: inf - inf and 0 * inf are NaN.
    between = np.where((low == high) | (place == below), low, low + (high - low) * (place - below))
    return np.where(np.isnan(ordered[first + counts - 1]), np.nan, between)  # NaN is sorted to the end


def _added(values: np.ndarray, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of the groups, one value after the other: numpy's own sums depend on how it groups them."""
    total = values[first]
    for more in range(1, int(counts.max())):
        has_more = counts > more
        total[has_more] += values[first[has_more] + more]
    return total


def _reduced(points: np.ndarray, kind: str) -> Arrays:
    """One point per slot, at the time of its latest."""
    then = (points["rank"], points["time"]) if kind == "last" else (points["rank"],)
    order, first = aligned(points["lap"], points["step"], points["turn"], *then)
    points = points[order]
    values = over_ranks(kind, points["value"].copy(), first)
    return points["step"][first].copy(), np.maximum.reduceat(points["time"], first), values
