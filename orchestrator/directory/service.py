"""Keeps record.json and metrics.csv in every run's directory up to date, never on the training path.

`DirectoryService` reads from a `Feed` (the store) and writes where each run's directory is. What it promises:

* **A copy, the database is the truth.** Both files are written as a whole, from one moment of the database, and
  appear under their names when they are complete. So whatever dies anywhere, the next time writes the same again.
* **In time.** The record within seconds of the run's end and at most once a minute before, first when the run is some
  seconds old: of a short trial it is written once. The points at the end, and while a run is small every few minutes.
  What is committed after the end makes both be written again.
* **Patient.** A storage that fails is left alone for growing pauses, one warning when that begins and one line
  when it is over; runs elsewhere go on.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.backends.storage import Storage
from orchestrator.clock import Clock, SystemClock
from orchestrator.config.redaction import redact_url
from orchestrator.directory import files
from orchestrator.errors import ConfigError, NotFound, UserError
from orchestrator.records import RunStatus
from orchestrator.store.views import ChangedRuns, ChunkRow, SinkCursor
from orchestrator.tracking.backlog import Backlog
from orchestrator.tracking.breaker import BreakerState, CircuitBreaker
from orchestrator.tracking.circuits import Circuits, Link

logger = logging.getLogger(__name__)

SINK = "directory"
"""Names its cursors."""


class Snapshot(Protocol):
    """One run at one moment."""

    record: dict[str, Any]
    points: int

    def chunks(self) -> Iterator[ChunkRow]: ...


class Feed(Protocol):
    """What is read, and where the cursor is kept. `Store` is one. All methods raise `UserError` when it is away."""

    def try_lock(self, sink: str) -> bool: ...
    def unlock(self, sink: str) -> None: ...
    def changed_runs(self, after: int = 0) -> ChangedRuns: ...
    def whereabouts(self, runs: Iterable[str]) -> dict[str, tuple[RunStatus, str]]: ...
    def snapshot(self, run: str) -> AbstractContextManager[Snapshot]: ...
    def cursor(self, sink: str, run: str = "") -> SinkCursor: ...
    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None: ...


@dataclass(kw_only=True)
class DirectoryConfig:
    interval: float = 2.0
    """Pause between steps."""
    first_after: float = 10.0
    """The first record of a run that goes on is due so long after it was noticed."""
    settling: float = 1.5
    """So long after its end was noticed the record of a run is due: what was on its way then is in it."""
    while_running: float = 60.0
    """Least time between two records of a run that goes on."""
    after_end: float = 5.0
    """Least time between two of a run that has ended, when even more of it arrives."""
    metrics_every: float = 300.0
    """Least time between two metrics.csv of a run that goes on."""
    cheap_points: int = 200_000
    """A run that goes on and has more of them gets its metrics.csv at its end."""
    budget: float = 5.0
    """A step begins no further run after so many seconds."""
    aside: float = 5.0
    """Pause before a run whose directory could not be written is tried again; doubles up to ten minutes."""


@dataclass(slots=True)
class _Written:
    """What this process wrote of a run. After a restart it is not known, and all is written again when it changes."""

    at: float
    metrics_at: float
    is_final: bool
    points: int = 0
    """In its metrics.csv."""
    last_ms: int = 0
    """Time of the newest of them."""


@dataclass(slots=True)
class _Aside:
    until: float
    pause: float


class DirectoryService:
    """One thread calls `step` or `run`; `stop` and `health` may be called from any. A crash costs nothing."""

    def __init__(
        self,
        feed: Feed,
        *,
        open_storage: Callable[[str], Storage] = Storage,
        config: DirectoryConfig | None = None,
        clock: Clock | None = None,
        circuits: Circuits | None = None,
    ) -> None:
        self._feed, self._open = feed, open_storage
        self._config = config or DirectoryConfig()
        self._clock = clock or SystemClock()
        self._circuits = circuits or Circuits(clock=self._clock)
        self._feed_breaker = self._circuits.link(
            "postgres", lost="run directories wait for the database", back="run directories have the database back",
            breaker=CircuitBreaker(threshold=1),
        )  # fmt: skip
        self._roots: dict[str, Link] = {}
        self._backlog = Backlog(feed, SINK)
        self._written: dict[str, _Written] = {}
        self._noticed: dict[tuple[str, bool], float] = {}
        """(run, whether it had ended) -> when that was noticed, of what was not written yet."""
        self._aside: dict[str, _Aside] = {}
        self._count = 0
        self._last_error = ""
        self._stopped = threading.Event()

    def run(self) -> None:
        """Repeats `step` until `stop`; then lets go of the lock."""
        while not self._stopped.is_set():
            more = self.step(self._clock.monotonic())
            self._stopped.wait(0 if more else self._config.interval)
        try:
            self._feed.unlock(SINK)
        except UserError as error:
            logger.debug("the lock of the directories is not given back: %s", error)

    def stop(self) -> None:
        self._stopped.set()

    def step(self, now: float) -> bool:
        """Writes what is due, for about `budget` seconds. True when more is due at once. `now` is monotonic."""
        if not self._feed_breaker.allows(now):
            return False
        try:
            more = self._step(now)
        except UserError as error:
            self._backlog.forget()
            self._feed_breaker.failed(error, now)
            return False
        except Exception as error:
            # A defect must not end the thread: what is not written is tried again.
            self._last_error = str(error)
            self._feed_breaker.breaker.failed(now)
            logger.exception("run directories cannot be written")
            return False
        self._feed_breaker.succeeded(now)
        return more

    def _step(self, now: float) -> bool:
        if not self._feed.try_lock(SINK):
            self._backlog.forget()  # the other one moves the cursor; ours would be stale
            return False
        dirty = self._backlog.noticed()
        found = self._feed.whereabouts(dirty) if dirty else {}
        late = now + self._config.budget
        for run in list(dirty):
            status, directory = found.get(run, (RunStatus.created, ""))
            if not directory:  # removed, or kept in the database only
                self._forget(run, dirty)
            elif self._is_due(run, status, directory, now):
                self._write_safely(run, status, directory, dirty)
                if self._clock.monotonic() >= late:
                    break
        self._save(dirty, now)
        now = self._clock.monotonic()
        return any(run in dirty and self._is_due(run, *place, now) for run, place in found.items() if place[1])

    # -- when

    def _is_due(self, run: str, status: RunStatus, directory: str, now: float) -> bool:
        aside = self._aside.get(run)
        if (aside is not None and now < aside.until) or not self._root(directory).allows(now):
            return False
        written = self._written.get(run)
        if written is None or (status.is_terminal and not written.is_final):
            pause = self._config.settling if status.is_terminal else self._config.first_after
            return now >= self._noticed.setdefault((run, status.is_terminal), now) + pause
        return now >= written.at + (self._config.after_end if status.is_terminal else self._config.while_running)

    def _wants_metrics(self, run: str, status: RunStatus, points: int, now: float) -> bool:
        if status.is_terminal:
            return True
        written = self._written.get(run)
        since = now - written.metrics_at if written else 0.0
        return points <= self._config.cheap_points and since >= self._config.metrics_every

    # -- what

    def _write_safely(self, run: str, status: RunStatus, directory: str, dirty: OrderedDict[str, None]) -> None:
        root = self._root(directory)
        try:
            self._write(run, directory)
        except NotFound as error:
            # Is being removed, or that is waited for: only when it is done, `whereabouts` does not know the run.
            self._put_aside(run, error, dirty)
            return
        except (OSError, ConfigError) as error:
            self._put_aside(run, error, dirty)
            root.failed(error, self._clock.monotonic())
            return
        except UserError:
            raise
        except Exception as error:  # a defect of ours that one run triggers must not stop all others
            self._put_aside(run, error, dirty)
            logger.exception("the directory of a run cannot be written", extra={"run": run})
            return
        root.succeeded(self._clock.monotonic())
        self._aside.pop(run, None)
        self._drop_notices(run)
        dirty.pop(run, None)
        self._count += 1

    def _write(self, run: str, directory: str) -> None:
        began = self._clock.monotonic()
        before = self._written.get(run)
        metrics_at = before.metrics_at if before else began
        points, last_ms = (before.points, before.last_ms) if before else (0, 0)
        with self._feed.snapshot(run) as snapshot:
            status = RunStatus(snapshot.record["run"]["status"])
            storage = self._open(directory)
            files.write_record(storage, snapshot.record)
            if self._wants_metrics(run, status, snapshot.points, began):
                files.write_metrics(storage, snapshot.chunks())
                metrics_at, points = began, snapshot.points
                last_ms = max((row["last_time_ms"] for row in snapshot.record["summaries"]), default=0)
        self._written[run] = _Written(began, metrics_at, status.is_terminal, points, last_ms)

    def _put_aside(self, run: str, error: Exception, dirty: OrderedDict[str, None]) -> None:
        before = self._aside.get(run)
        pause = self._config.aside if before is None else min(600.0, before.pause * 2)
        self._aside[run] = _Aside(self._clock.monotonic() + pause, pause)
        self._last_error = str(error)
        dirty.move_to_end(run)  # perhaps only this one's directory is broken: the next try is another's

    def _forget(self, run: str, dirty: OrderedDict[str, None]) -> None:
        dirty.pop(run, None)
        self._written.pop(run, None)
        self._drop_notices(run)
        self._aside.pop(run, None)

    def _drop_notices(self, run: str) -> None:
        for has_ended in (False, True):
            self._noticed.pop((run, has_ended), None)

    def _root(self, directory: str) -> Link:
        root = directory.rsplit("/", 2)[0]
        if root not in self._roots:
            self._roots[root] = self._circuits.link(
                SINK, lost=f"run directories in {redact_url(root)} cannot be written, training goes on",
                back=f"run directories in {redact_url(root)} can be written again",
                breaker=CircuitBreaker(threshold=1, first_pause=5.0, longest_pause=300.0),
            )  # fmt: skip
        return self._roots[root]

    # -- which runs

    def _save(self, dirty: Iterable[str], now: float) -> None:
        """What changed and is not written stands beside the cursor, so that no crash forgets it; and how it is, for
        those who ask the database how far the directories are behind.
        """
        runs = tuple(sorted(dirty))
        written = {run: [one.points, one.last_ms] for run in runs if (one := self._written.get(run)) is not None}
        failing = [run for run in runs if run in self._aside]
        is_well = all(root.state(now) is BreakerState.closed for root in self._roots.values())
        state = BreakerState.closed if is_well else BreakerState.open
        error = self._last_error if failing else ""
        self._backlog.save(runs, now, state=state.value, error=error, written=written)
        for run in [run for run, written in self._written.items() if written.is_final and run not in runs]:
            if self._clock.monotonic() > self._written[run].at + self._config.metrics_every:
                del self._written[run]

    def health(self) -> dict[str, Any]:
        """Small and plain. Never raises."""
        return {
            "sink": SINK,
            "written": self._count,
            "waiting": len(self._backlog),
            "aside": sorted(self._aside),
            "last_error": self._last_error,
        }
