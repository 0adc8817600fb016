"""Merges the small rows that commits leave into large ones, in the background; what is merged how is in store/merge.py.

`MergeService` notices who committed, and merges a run when enough has come together or when the run is over. All it
knows is in memory and is learned again from the database, so it may die at any time. Several at once would do no harm;
a lock lets one work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import UserError
from orchestrator.store.merge import MANY_POINTS, MANY_ROWS, Changes, Merged, Unmerged
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits

logger = logging.getLogger(__name__)

LOCK = "merging"


class Source(Protocol):
    """What is merged; `Store` is one. All methods raise `UserError` when it is away."""

    def try_lock(self, sink: str) -> bool: ...
    def unlock(self, sink: str) -> None: ...
    def unmerged(self) -> Sequence[Unmerged]: ...
    def committed_since(self, after: int) -> Changes: ...
    def merge(self, numbers: Sequence[int]) -> Merged: ...
    def settle(self, numbers: Sequence[int]) -> frozenset[int]: ...
    def tidy(self) -> Sequence[str]: ...


@dataclass(kw_only=True)
class MergeConfig:
    head_start: float = 10.0
    """Given to readers when `run` begins: whoever was away for a day says first that it lives, and is waited for."""
    interval: float = 5.0
    """Pause between steps when nothing is due."""
    budget: float = 2.0
    """A step begins no further transaction after so many seconds."""
    runs_at_once: int = 200
    """Most runs in one transaction."""
    again: float = 5.0
    """Pause before a run is tried again that had to wait, for a reader that is behind for example; doubles up to five
    minutes."""
    after_end: float = 1.0
    """How long a run that ended is left alone: its last points and its readers come first."""
    tidy_every: float = 20.0


@dataclass(slots=True)
class _Pending:
    """What a producer committed since its run was merged."""

    run: int
    points: int
    """Its watermark when its run was merged, as far as that is known."""
    rows: int = 0
    new: int = 0


class MergeService:
    """One thread calls `step` or `run`; `stop` and `health` may be called from any. A crash costs nothing."""

    def __init__(
        self,
        source: Source,
        *,
        config: MergeConfig | None = None,
        clock: Clock | None = None,
        circuits: Circuits | None = None,
    ) -> None:
        self._source = source
        self._config = config or MergeConfig()
        self._clock = clock or SystemClock()
        self._breaker = (circuits or Circuits(clock=self._clock)).link(
            "postgres", lost="points are not merged for now, nothing else waits for it", back="points are merged again",
            breaker=CircuitBreaker(threshold=1),
        )  # fmt: skip
        self._cursor: int | None = None  # None: what there is was not read yet
        self._producers: dict[int, _Pending] = {}
        self._of_run: dict[int, set[int]] = {}
        self._due: dict[int, float] = {}  # run -> when
        self._over: set[int] = set()
        self._pauses: dict[int, float] = {}
        self._tidied = float("-inf")
        self._points = self._rows = 0
        self._is_working = False
        self._last_error = ""
        self._stopped = threading.Event()

    def run(self) -> None:
        """Repeats `step` until `stop`; then lets go of the lock."""
        self._stopped.wait(self._config.head_start)
        while not self._stopped.is_set():
            more = self.step(self._clock.monotonic())
            self._stopped.wait(0 if more else self._config.interval)
        try:
            self._source.unlock(LOCK)
        except UserError as error:
            logger.debug("the lock of merging is not given back: %s", error)

    def stop(self) -> None:
        self._stopped.set()

    def step(self, now: float) -> bool:
        """Merges what is due, for about `budget` seconds. True when more is due at once. `now` is monotonic."""
        if not self._breaker.allows(now):
            return False
        try:
            more = self._step(now)
        except UserError as error:
            self._last_error, self._cursor = str(error), None
            self._breaker.failed(error, now)
            return False
        except Exception as error:  # a defect must not end the thread: rows that are not merged are only larger
            self._last_error, self._cursor = str(error), None
            self._breaker.breaker.failed(now)
            logger.exception("points cannot be merged")
            return False
        self._last_error = ""
        self._breaker.succeeded(now)
        return more

    def _step(self, now: float) -> bool:
        self._is_working = self._source.try_lock(LOCK)
        if not self._is_working:
            self._cursor = None  # the other one merges; what we know of it would be stale
            return False
        self._notice(now)
        while ready := sorted(run for run, at in self._due.items() if at <= now)[: self._config.runs_at_once]:
            self._merge(ready, now)
            if self._clock.monotonic() >= now + self._config.budget:
                break
        if now >= self._tidied + self._config.tidy_every:
            self._tidied = now
            self._source.tidy()
        return any(at <= now for at in self._due.values())

    # -- what is due

    def _notice(self, now: float) -> None:
        if self._cursor is None:
            self._producers, self._of_run, self._due, self._over, self._pauses = {}, {}, {}, set(), {}
            # In this order: what is committed in between is seen twice, which does no harm.
            self._cursor = self._source.committed_since(1 << 62).cursor
            for one in self._source.unmerged():
                self._add(one, one.rows, one.points, now)
            return
        changes = self._source.committed_since(self._cursor)
        for one in changes.producers:
            before = self._producers.get(one.producer)
            new = one.points - (before.points if before is not None else 0)
            if new or one.is_over:  # else it told facts
                self._add(one, 1, new, now)
                self._producers[one.producer].points = one.points
        for run in changes.ended:
            self._end(run, now)
        self._cursor = changes.cursor

    def _add(self, one: Unmerged, rows: int, points: int, now: float) -> None:
        pending = self._producers.get(one.producer)
        if pending is None:
            pending = self._producers[one.producer] = _Pending(run=one.run, points=one.points)
            self._of_run.setdefault(one.run, set()).add(one.producer)
        pending.rows += rows
        pending.new += points
        if one.is_over:
            self._end(one.run, now)
        elif pending.rows >= MANY_ROWS or pending.new >= MANY_POINTS:
            self._due.setdefault(one.run, now)

    def _end(self, run: int, now: float) -> None:
        self._over.add(run)
        self._due.setdefault(run, now + self._config.after_end)

    # -- doing it

    def _merge(self, runs: Sequence[int], now: float) -> None:
        done = self._source.merge(runs)
        self._points += done.points
        self._rows += done.rows
        for run in runs:
            if run in done.more:
                continue
            if run in done.waiting:
                self._wait(run, now)
                continue
            self._due.pop(run)
            self._pauses.pop(run, None)
            for producer in self._of_run.get(run, ()):
                pending = self._producers[producer]
                pending.rows = pending.new = 0
        self._settle([run for run in runs if run in self._over and run not in self._due], now)

    def _settle(self, over: Sequence[int], now: float) -> None:
        if not over:
            return
        done = self._source.settle(over)
        for run in over:
            if run in done:
                self._forget(run)
            else:  # somebody writes to it just now
                self._over.add(run)
                self._wait(run, now)

    def _wait(self, run: int, now: float) -> None:
        pause = min(300.0, 2 * self._pauses.get(run, self._config.again / 2))
        self._due[run], self._pauses[run] = now + pause, pause

    def _forget(self, run: int) -> None:
        self._over.discard(run)
        self._pauses.pop(run, None)
        for producer in self._of_run.pop(run, ()):
            self._producers.pop(producer, None)

    # -- how it stands

    def health(self) -> dict[str, Any]:
        """Small and plain. Never raises. `behind_runs`: those with enough to merge."""
        return {
            "working": self._is_working,
            "merged_points": self._points,
            "merged_rows": self._rows,
            "behind_runs": len(self._due),
            "last_error": self._last_error,
        }
