"""Which of a key's points make its curve. Pure; works on the arrays of `Points`, whole or piece by piece.

**The canonical curve** has the newest attempt from the step at which it went on, and before that step what earlier
attempts logged: all of a later attempt, and of an earlier one the steps below the lowest step of every later one. It is
of one rank, or reduced over ranks: points belong together when they are their ranks' first (second, …) at one step.
Of each attempt the ranks are reduced first. The mirror draws the same curve as points arrive (tracking/curves.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from orchestrator.errors import UserError
from orchestrator.store.views import Curve, Points, SummaryRow
from orchestrator.tracking.curves import KINDS_ON_READ, aligned, numbered, over_ranks

ALL = "all"
"""Instead of a rank or an attempt."""

REDUCED = -1
"""The rank of a point that is made of several ranks' points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which points of a key are meant. The default is its canonical curve. Raises UserError for what makes no sense."""

    rank: int | str | None = None
    """One rank, `all` (each rank's own points), or None: reduced over ranks, if `reduce` or the metric's declaration
    says how, else the lowest rank that has the key."""
    attempt: int | str | None = None
    """One attempt, `all` (also what later attempts did again), or None: the canonical curve."""
    reduce: str = ""
    """One of KINDS_ON_READ; empty: as declared."""
    start: int | None = None
    stop: int | None = None
    """Only steps from `start` to `stop`, both included."""
    every: int = 1
    """Of what is left, each N-th point of a curve, beginning with its first. `all` ranks (attempts) are as many
    curves."""

    def __post_init__(self) -> None:
        for name, value, least in (("rank", self.rank, 0), ("attempt", self.attempt, 1)):
            if value is not None and value != ALL and (not _is_number(value) or int(value) < least):
                raise UserError(f"{name}={value!r}: give a number from {least} up, or {ALL!r}.")
        if self.reduce and self.reduce not in KINDS_ON_READ:
            raise UserError(f"reduce={self.reduce!r}: there are {', '.join(KINDS_ON_READ)}.")
        if self.reduce and self.rank is not None:
            raise UserError(f"rank={self.rank!r} and reduce={self.reduce!r}: one rank's curve, or one of all ranks.")
        for name, step in (("start", self.start), ("stop", self.stop)):
            if step is not None and not (isinstance(step, int | np.integer) and -(2**63) < step < 2**63):
                raise UserError(f"{name}={step!r}: a step is meant, a whole number of 64 bits.")
        if not _is_number(self.every) or self.every < 1:
            raise UserError(f"every={self.every!r}: give a number from 1 up.")


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a key's curve is made of."""

    key: str
    unit: str
    direction: str
    rank: int | None
    """None: of all ranks."""
    reduce: str
    """Empty: as logged."""
    attempts: int
    """The newest attempt that has the key."""
    most: int
    """No more points than this are read for it, as far as was known when it was asked for."""


def source(key: str, rows: Sequence[SummaryRow], choice: Choice) -> Source:
    """`rows` are the key's summaries, one of each rank; at least one."""
    rank, reduce = choice.rank, ""
    if rank is None:
        reduce = choice.reduce or rows[0].reduction
        rank = ALL if reduce else min(row.rank for row in rows)
    of_ranks = [row for row in rows if rank in (ALL, row.rank)]
    return Source(
        key=key, unit=rows[0].unit, direction=rows[0].direction, rank=None if rank == ALL else int(rank), reduce=reduce,
        attempts=max((row.last_attempt for row in of_ranks), default=0), most=sum(row.count for row in of_ranks),
    )  # fmt: skip


# -- pieces of points --------------------------------------------------------------------------------------------------


def take(points: Points, chosen: np.ndarray | slice) -> Points:
    """Some of the points: a mask, places, or a slice."""
    return Points(**{each.name: getattr(points, each.name)[chosen] for each in fields(Points)})


def joined(pieces: Iterable[Points]) -> Points:
    """All points in one; empty for none."""
    parts = [piece for piece in pieces if len(piece)]
    if not parts:
        ints = np.empty(0, np.int32)
        floats = np.empty(0, np.float64)
        return Points(steps=np.empty(0, np.int64), times=floats, values=floats, ranks=ints, attempts=ints)
    if len(parts) == 1:
        return parts[0]
    return Points(**{each.name: np.concatenate([getattr(p, each.name) for p in parts]) for each in fields(Points)})


def by_attempt(pieces: Iterable[Points]) -> Iterator[Points]:
    """All points of one attempt after the other, of pieces in their order."""
    waiting: list[Points] = []
    for piece in pieces:
        for start, end in _stretches(piece.attempts):
            part = take(piece, slice(start, end))
            if waiting and waiting[0].attempts[0] != part.attempts[0]:
                whole, waiting = joined(waiting), []  # held once while it is worked on
                yield whole
            waiting.append(part)
    if waiting:
        whole, waiting = joined(waiting), []
        yield whole


def by_series(points: Points) -> Iterator[Points]:
    """Stretches of one attempt and rank."""
    for start, end in _stretches(points.attempts, points.ranks):
        yield take(points, slice(start, end))


def _stretches(*columns: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where neighbours are equal in all columns: from, to."""
    if not len(columns[0]):
        return
    differs = np.zeros(len(columns[0]) - 1, bool)
    for column in columns:
        differs |= column[1:] != column[:-1]
    edges = [0, *(np.flatnonzero(differs) + 1).tolist(), len(columns[0])]
    yield from zip(edges[:-1], edges[1:], strict=True)


# -- attempts ----------------------------------------------------------------------------------------------------------


def first_steps(pieces: Iterable[Points]) -> dict[int, int]:
    """The lowest step of each attempt."""
    lowest: dict[int, int] = {}
    for piece in pieces:
        for start, end in _stretches(piece.attempts):
            attempt, step = int(piece.attempts[start]), int(piece.steps[start:end].min())
            lowest[attempt] = min(step, lowest.get(attempt, step))
    return lowest


def is_current(points: Points, lowest: Mapping[int, int]) -> np.ndarray:
    """A mask: what no attempt in `lowest` did again, and no attempt newer than those."""
    stays = np.zeros(len(points), bool)
    for start, end in _stretches(points.attempts):
        attempt = int(points.attempts[start])
        if attempt in lowest:
            later = [step for other, step in lowest.items() if other > attempt]
            stays[start:end] = points.steps[start:end] < min(later) if later else True
    return stays


# -- ranks -------------------------------------------------------------------------------------------------------------


def reduced(points: Points, kind: str) -> Points:
    """One curve of all ranks of one attempt, ordered by step (by lap, where a program counts its steps anew), each
    point at the time of its latest. NaN, and ranks that miss a step: see `over_ranks`."""
    if not len(points):
        return points
    ranks = [slice(start, end) for start, end in _stretches(points.ranks)]
    steps = points.steps[ranks[0]]
    if all(np.array_equal(points.steps[rank], steps) for rank in ranks[1:]) and (np.diff(steps) > 0).all():
        order, first = _side_by_side(points, len(ranks), kind)
    else:
        laps, turns = (np.concatenate(part) for part in zip(*(numbered(points.steps[r]) for r in ranks), strict=True))
        then = (points.times,) if kind == "last" else ()  # the ranks come in their order already
        order, first = aligned(laps, points.steps, turns, *then)
    return Points(
        steps=points.steps[order[first]],
        times=np.maximum.reduceat(points.times[order], first),
        values=over_ranks(kind, points.values[order], first),
        ranks=np.full(len(first), REDUCED, np.int32),
        attempts=points.attempts[: len(first)],
    )


def _side_by_side(points: Points, ranks: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What `aligned` gives, without sorting, where all ranks logged at the same rising steps."""
    places = np.arange(len(points)).reshape(ranks, -1).T
    if kind == "last":
        places = np.take_along_axis(places, np.argsort(points.times[places], axis=1, kind="stable"), axis=1)
    return places.reshape(-1), np.arange(0, len(points), ranks)


# -- thinning ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Thinning:
    """Steps and `every` of a choice, applied to one piece after the other."""

    choice: Choice
    _seen: dict[tuple[int, int], int] = field(default_factory=dict)
    """Points so far, by curve."""

    def keep(self, points: Points) -> Points:
        choice = self.choice
        if choice.start is not None or choice.stop is not None:
            is_in = np.ones(len(points), bool)
            if choice.start is not None:
                is_in &= points.steps >= choice.start
            if choice.stop is not None:
                is_in &= points.steps <= choice.stop
            points = take(points, is_in)
        if choice.every == 1:
            return points
        kept = []
        for start, end in _stretches(points.attempts, points.ranks):
            curve = (
                int(points.attempts[start]) if choice.attempt == ALL else 0,
                int(points.ranks[start]) if choice.rank == ALL else 0,
            )
            seen = self._seen.get(curve, 0)
            kept.append(np.arange(start + -seen % choice.every, end, choice.every))
            self._seen[curve] = seen + end - start
        return take(points, np.concatenate(kept)) if kept else points


def windows(points: Points, most: int) -> Curve:
    """The points, of one attempt and rank, in at most `most` windows of neighbours."""
    n = len(points)
    edges = np.arange(n) if n <= most else np.linspace(0, n, most, endpoint=False).astype(np.int64)
    counts = np.diff(edges, append=n)
    values, is_nan = points.values, np.isnan(points.values)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        total = _added(np.where(finite, values, 0.0), edges)
        mean = total / _added(finite.astype(np.float64), edges)
    return Curve(
        attempt=int(points.attempts[0]) if n else 0, rank=int(points.ranks[0]) if n else 0,
        steps=points.steps[edges], times=points.times[edges], counts=counts,
        nans=_added(is_nan.astype(np.int64), edges), first=values[edges],
        minimum=np.fmin.reduceat(values, edges) if n else values,
        maximum=np.fmax.reduceat(values, edges) if n else values,
        mean=mean, last=values[edges + counts - 1], is_exact=n <= most,
    )  # fmt: skip


def _added(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, edges) if len(edges) else values


# -- epochs ------------------------------------------------------------------------------------------------------------

EPOCH = "epoch"
"""The key whose value is the epoch."""


class Epochs:
    """Which epoch a step belongs to: the run's metric `epoch` at that step or the nearest one before it, on the curve
    as it was in the point's attempt. Whole numbers; unknown before the first, and where it is NaN or infinite."""

    def __init__(self, pieces: Iterable[Points] = ()) -> None:
        """`pieces` are the key's points of one rank. Of neighbours with one value only the first is remembered."""
        self._points = joined(_changes(piece) for piece in pieces)
        self._lowest = first_steps([self._points])
        self._curves: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """For each point its epoch (int64) and whether it is known."""
        parts = [
            self.of(points.steps[start:end], int(points.attempts[start])) for start, end in _stretches(points.attempts)
        ]
        if len(parts) == 1:
            return parts[0]
        epochs, known = ([part[column] for part in parts] for column in (0, 1))
        return np.concatenate([np.empty(0, np.int64), *epochs]), np.concatenate([np.empty(0, bool), *known])

    def of(self, steps: np.ndarray, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for steps of one attempt."""
        logged_at, epochs = self._curve(attempt)
        place = np.searchsorted(logged_at, steps, side="right") - 1
        found = np.where(place >= 0, epochs[place], np.nan) if len(epochs) else np.full(len(steps), np.nan)
        is_known = np.isfinite(found) & (np.abs(found) < 2.0**63)
        return np.floor(np.where(is_known, found, 0.0)).astype(np.int64), is_known

    def _curve(self, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps in order, and the epochs, of the canonical curve when this was the newest attempt."""
        if attempt not in self._curves:
            known = {number: step for number, step in self._lowest.items() if number <= attempt}
            chosen = take(self._points, is_current(self._points, known))
            order = np.argsort(chosen.steps, kind="stable")
            self._curves[attempt] = chosen.steps[order], chosen.values[order]
        return self._curves[attempt]


def _changes(points: Points) -> Points:
    """The points at which a value or attempt begins, or steps go back."""
    if not len(points):
        return points
    begins = np.ones(len(points), bool)
    begins[1:] = (
        (points.values[1:] != points.values[:-1])
        | (points.attempts[1:] != points.attempts[:-1])
        | (points.steps[1:] < points.steps[:-1])
    )
    return take(points, begins)
