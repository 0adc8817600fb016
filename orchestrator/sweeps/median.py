"""Median stopping, as in Vizier.

Golovin, Solnik, Moitra, Kochanski, Karro, Sculley: Google Vizier: A Service for Black-Box Optimization, KDD 2017,
section 3.2.2: a trial is stopped at resource s if its best score up to s is strictly worse than the median of the
others' running means of their scores up to s. Compared with are trials that have ended with at least one report at or
before s; whether by themselves or stopped makes no difference.

The comparison happens in the trial's own process, with a table that comes along with its job: a stop takes effect in
the report that causes it.
"""

from __future__ import annotations

import bisect
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.sweeps.fifo import begun_or_new
from orchestrator.sweeps.state import Choice, Direction, State, Status

MOST_ROWS = 256
"""Of a table. Where more resources were seen, every so-manieth of them is a row."""


class MedianStopping:
    """Whole trials, each of which ends itself where it falls behind."""

    name = "median"
    survives = "everything: the table is made of the ended trials' reports"

    def __init__(self) -> None:
        self._read: tuple[weakref.ref[State], Medians, int] | None = None
        """(state, its table, how many of its curves are in it)."""

    def next(self, state: State) -> Choice:
        return begun_or_new(state, {"by": self.name, "settings": state.settings.version}) or state.idle()

    def judge(self, state: State, trial: int) -> Mapping[str, Any]:
        """{"at": newest decision, "direction", "grace", "trials", "every", "means": [[resource, median, n], …]}."""
        own = state.trials.get(trial)
        if own is not None and own.curve and own.status in (Status.complete, Status.stopped):
            means = table([state.trials[number].curve for number in state.curves if number != trial])
        else:
            means = self._table(state)
        rule = state.settings.median
        return {
            "at": state.seq,
            "settings": state.settings.version,
            "direction": state.settings.direction.value,
            "grace": rule.grace,
            "trials": rule.trials,
            "every": rule.every,
            "means": means,
        }

    def _table(self, state: State) -> list[list[float]]:
        """Of all curves that ended. What was read of this state before is kept: only later ones are put in."""
        if self._read is None or self._read[0]() is not state:
            self._read = weakref.ref(state), Medians(), 0
        kept, medians, count = self._read
        for number in state.curves[count:]:
            medians.add(state.trials[number].curve)
        self._read = kept, medians, len(state.curves)
        return medians.rows()


class Medians:
    """The running means of all curves at every resource that one of them has, sorted. A curve that comes in costs one
    insertion per resource, however many there are."""

    def __init__(self) -> None:
        self._seen: list[float] = []
        self._means: list[list[float]] = []

    def add(self, curve: Sequence[tuple[float, float]]) -> None:
        resources, means = _running_means(curve)
        for at in resources:
            place = bisect.bisect_left(self._seen, at)
            if place == len(self._seen) or self._seen[place] != at:
                # Nobody else has reported since the row below: they are there with the same means.
                self._means.insert(place, list(self._means[place - 1]) if place else [])
                self._seen.insert(place, at)
        if not resources:
            return
        for place in range(bisect.bisect_left(self._seen, resources[0]), len(self._seen)):
            own = means[bisect.bisect_right(resources, self._seen[place]) - 1]
            bisect.insort(self._means[place], own)

    def rows(self) -> list[list[float]]:
        """[[resource, median, how many trials], …] by resource, at most MOST_ROWS."""
        step = math.ceil(len(self._seen) / MOST_ROWS) or 1
        return [
            [at, _middle(means), len(means)] for at, means in zip(self._seen[::step], self._means[::step], strict=True)
        ]


def _middle(ranked: Sequence[float]) -> float:
    half = len(ranked) // 2
    return ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2


def table(curves: Sequence[Sequence[tuple[float, float]]]) -> list[list[float]]:
    """[[resource, median of the running means up to it, how many trials], …] by resource, at most MOST_ROWS. Scores
    that are no finite number are left out of the means."""
    medians = Medians()
    for curve in curves:
        medians.add(curve)
    return medians.rows()


def _running_means(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    resources: list[float] = []
    means: list[float] = []
    total = 0.0
    for at, score in curve:
        if not math.isfinite(score):
            continue
        total += score
        resources.append(at)
        means.append(total / len(resources))
    return resources, means


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The numbers that a trial was compared with: all that its stop depended on."""

    resource: float
    best: float
    median: float
    n: int
    is_behind: bool

    def to_json(self) -> dict[str, Any]:
        best = self.best if math.isfinite(self.best) else str(self.best)
        return {
            "resource": self.resource, "best": best, "median": self.median, "n": self.n, "is_behind": self.is_behind
        }  # fmt: skip


def compare(judge: Mapping[str, Any], *, resource: float, best: float, before: float = -math.inf) -> Comparison | None:
    """How a trial stands whose best score so far is `best`, with the row at or just below its resource; None where
    nothing is compared: in its grace, between two comparisons (`before` is the resource of the report before), or
    against too few. A trial that has had no finite score at all (`best` is NaN) is behind."""
    grace, every = judge["grace"], judge["every"]
    if resource < grace:
        return None
    turn = math.floor((resource - grace) / every)
    if before >= grace and turn == math.floor((before - grace) / every):
        return None
    rows = judge["means"]
    place = bisect.bisect_right(rows, resource, key=lambda row: float(row[0]))
    if not place:
        return None
    _, median, n = rows[place - 1]
    if n < judge["trials"]:
        return None
    is_worse = best < median if judge["direction"] == Direction.max else best > median
    behind = is_worse or math.isnan(best)
    return Comparison(resource=resource, best=best, median=median, n=int(n), is_behind=behind)
