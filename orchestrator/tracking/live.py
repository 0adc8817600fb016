"""The newest values of the runs that are going on, for watchers: kept in memory, published to Redis. Nothing depends
on it.

`LiveValues.take` is called in the tracker's way of every batch: it keeps the newest value per key and rank and returns.
`LivePublisher`, a thread of its own, writes what changed since its last look. When Redis is killed, frozen, full or
flushed, what is in memory is written again as soon as it can be.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from orchestrator.live_records import LiveCheckpoint, LiveState
from orchestrator.records import LOST, Batch, FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits

logger = logging.getLogger(__name__)

MAX_RUNS = 10_000
MAX_SERIES = 2_000
"""Of one run; a series is a key on a rank."""
MAX_ALL_SERIES = 200_000
CHECKPOINTS = 5
"""The newest ones that are kept of a run."""
RATE_OVER = 5.0
"""Seconds; a rate is taken over one to two of them."""
SAMPLED = "system/"
"""What the sampler of a machine records."""
PER_RANK = ("perf/step_time", "perf/data_wait", "system/process/", "system/gpu_")
"""Beginnings of the keys that are told rank by rank."""
FEW = 64
"""Points that are quicker looked at one by one than as an array."""

PAUSE = 0.05
SHARE = 6
"""After a publication that took t seconds of a core there is a pause of at least SHARE × t, so that watchers cost at
most a seventh of it."""
LONGEST_PAUSE = 2.0
AT_ONCE = 5_000
"""Values in one publication; the rest waits, and what is newer by then replaces it."""
WATCHED = 5.0
"""Seconds for which a run counts as followed after somebody was seen to follow it."""
LOOK = 1.0
"""Seconds between two looks whether Redis lost everything, when there is nothing to write."""

Series = tuple[int, str]
"""Rank and key."""
Newest = tuple[int, float, float]
"""Step, time, value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveChange:
    """What is new of one run since the last look."""

    run: str
    state: LiveState
    values: Sequence[tuple[str, int, int, float, float]]
    """key, rank, step, time, value"""
    checkpoints: Sequence[LiveCheckpoint] | None
    """None: as before."""


class LiveSink(Protocol):
    """Where changes go; `backends.redis.LiveRedis` is one. Whatever goes wrong is raised."""

    def write(self, changes: Sequence[LiveChange], token: str) -> bool:
        """False when it lost what it was given before under this token: all of it is to be written again."""
        ...

    def recall(self, runs: Sequence[str]) -> Mapping[str, LiveState]:
        """What was written of them before, by this tracker or another one."""
        ...

    def watched(self, runs: Sequence[str]) -> Collection[str]:
        """Those that somebody follows now."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Run:
    attempt: int = 0
    is_planned: bool = False
    """What stands in the spec (sweep, steps, epochs) is known, or was asked for."""
    status: RunStatus = RunStatus.running
    sweep: str = ""
    steps: int = 0
    epochs: int = 0
    step: int = 0
    points: int = 0
    time: float = 0.0
    since: tuple[float, int, int] = (0.0, 0, 0)
    """Monotonic time, points and step at the beginning of the span over which rates are taken."""
    next_since: tuple[float, int, int] = (0.0, 0, 0)


class LiveValues:
    """Newest value per key and rank of each run; of the newest attempt. May be used from many threads; never waits for
    anybody but them. Bounded: runs and series of which nothing came for longest are dropped.
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._values: dict[str, dict[Series, Newest]] = {}
        self._checkpoints: dict[str, list[LiveCheckpoint]] = {}
        self._series = 0
        self._changed: dict[str, set[Series] | None] = {}
        """What is to be published, oldest first; None: everything of the run."""
        self._watched: dict[str, float] = {}
        self._lock = threading.Lock()

    # -- what comes in

    def opened(self, ticket: RunTicket, spec: RunSpec) -> None:
        """A run, or its next attempt, begins."""
        totals = planned(spec.params)
        with self._lock:
            run = self._at_attempt(ticket.run, ticket.attempt)
            run.status, run.sweep, run.steps, run.epochs = RunStatus.running, spec.sweep, *totals
            run.is_planned = True
            self._changed[ticket.run] = None

    def ended(self, name: str, attempt: int, status: RunStatus) -> None:
        with self._lock:
            run = self._runs.get(name)
            if run is not None and attempt >= run.attempt:
                run.status, run.time = status, time.time()
                self._changed.setdefault(name, set())

    def take(self, batch: Batch) -> None:
        """Points, and facts about checkpoints and the status; what cannot be read is left out."""
        if batch.stream is Stream.facts:
            self._take_facts(batch)
            return
        newest, step, count = newest_points(batch)
        if not newest:
            return
        rank, now = batch.rank, time.monotonic()
        with self._lock:
            run = self._at_attempt(batch.run, batch.attempt)
            if batch.attempt < run.attempt:
                return  # left over from an attempt that is over
            if now - run.next_since[0] >= RATE_OVER or not run.step:  # what comes before the first step tells no rate
                run.since = run.next_since if run.step and run.next_since[0] else (now, run.points, step)
                run.next_since = (now, run.points, run.step or step)
            run.points += count
            run.step = max(run.step, step)
            run.time = time.time()
            values = self._values[batch.run]
            changed = self._changed.setdefault(batch.run, set())
            for key, point in newest.items():
                series = (rank, key)
                if series not in values:
                    if len(values) >= MAX_SERIES:
                        continue
                    self._series += 1
                values[series] = point
                if changed is not None:
                    changed.add(series)
            self._bound()

    def _take_facts(self, batch: Batch) -> None:
        # Most facts are none of ours, and to parse them costs more than to look for a word.
        if b'"checkpoint"' not in batch.payload and b'"status"' not in batch.payload:
            return
        try:
            facts = [f for f in batch.facts() if f.kind in (FactKind.checkpoint, FactKind.status)]
            checkpoints = [_checkpoint(f.data, f.at) for f in facts if f.kind is FactKind.checkpoint]
            said = [RunStatus(f.data["status"]) for f in facts if f.kind is FactKind.status]
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # the database's to refuse
        with self._lock:
            run = self._at_attempt(batch.run, batch.attempt)
            if batch.attempt < run.attempt or not facts:
                return
            run.time = time.time()
            if said:
                run.status = said[-1]
            if checkpoints:
                again = {checkpoint.id for checkpoint in checkpoints}
                before = [known for known in self._checkpoints.get(batch.run, []) if known.id not in again]
                self._checkpoints[batch.run] = [*reversed(checkpoints), *before][:CHECKPOINTS]
                self._changed[batch.run] = None
            else:
                self._changed.setdefault(batch.run, set())
            self._bound()

    def _at_attempt(self, name: str, attempt: int) -> _Run:
        run = self._runs.get(name)
        if run is None:
            run = self._runs[name] = _Run(attempt=attempt, time=time.time())
            self._values[name] = {}
        else:
            self._runs.move_to_end(name)
        if attempt > run.attempt:
            run.attempt, run.step, run.status = attempt, 0, RunStatus.running
            run.since = run.next_since = (0.0, 0, 0)
        return run

    def _bound(self) -> None:
        while len(self._runs) > MAX_RUNS or (self._series > MAX_ALL_SERIES and len(self._runs) > 1):
            name, _ = self._runs.popitem(last=False)
            self._series -= len(self._values.pop(name))
            self._checkpoints.pop(name, None)
            self._changed.pop(name, None)

    # -- what goes out

    def changes(self, at_most: int) -> list[LiveChange]:
        """What is to be published, at most so many values; it is not given again. Nothing of `unplanned` runs: it would
        take the place of the plan that the sink has of them."""
        now = time.monotonic()
        found: list[LiveChange] = []
        with self._lock:
            while self._changed and at_most > 0:
                name = next(iter(self._changed))
                if not self._runs[name].is_planned:
                    break  # it came since somebody asked for those
                series = self._changed.pop(name)
                is_whole, values = series is None, self._values[name]
                waiting = list(values) if series is None else [s for s in series if s in values]
                if len(waiting) > at_most:
                    self._changed[name] = set(waiting[at_most:])
                chosen = waiting[:at_most]
                at_most -= len(chosen) + 1
                found.append(
                    LiveChange(
                        run=name,
                        state=_state(self._runs[name], now),
                        values=[(key, rank, *values[rank, key]) for rank, key in chosen],
                        checkpoints=tuple(self._checkpoints.get(name, ())) if is_whole else None,
                    )
                )
        return found

    def is_watched(self, run: str) -> bool:
        """Somebody follows it: what is new should come soon."""
        return self._watched.get(run, 0.0) > time.monotonic()

    def watch(self, runs: Collection[str]) -> None:
        """These are followed now."""
        now = time.monotonic()
        still = {run: until for run, until in self._watched.items() if until > now}
        self._watched = still | dict.fromkeys(runs, now + WATCHED)

    def has_changes(self) -> bool:
        return bool(self._changed)

    def unplanned(self, at_most: int = 500) -> list[str]:
        """Runs to be published that were opened by the tracker before this one."""
        with self._lock:
            return [name for name in islice(self._changed, at_most) if not self._runs[name].is_planned]

    def recalled(self, runs: Sequence[str], states: Mapping[str, LiveState]) -> None:
        """The answer to `unplanned`."""
        with self._lock:
            for name in runs:
                run, state = self._runs.get(name), states.get(name)
                if run is None or run.is_planned:
                    continue
                run.is_planned = True
                if state is not None:
                    run.sweep, run.steps, run.epochs = state.sweep, state.steps, state.epochs

    def again(self) -> None:
        """Everything is to be published again."""
        with self._lock:
            self._changed = dict.fromkeys(reversed(self._runs))  # what is alive first

    def of(self, run: str) -> dict[str, Any]:
        """{"points", "step", "rate" (points per second), "metrics": {key: {"step", "value", "rank"}}, "ranks"}; {} for
        an unknown run. Of each key the lowest rank's. "ranks": [{"rank", "step", "time": of its newest own point, 0.0
        for none, "values": {key: (time, value)}, only of PER_RANK}].
        """
        with self._lock:
            known = self._runs.get(run)
            if known is None:
                return {}
            state, values = _state(known, time.monotonic()), dict(self._values[run])
        metrics = {
            key: {"rank": rank, "step": values[rank, key][0], "value": values[rank, key][2]}
            for rank, key in sorted(values, reverse=True)
        }
        return {
            "points": state.points, "step": state.step, "rate": state.points_per_second, "metrics": metrics,
            "ranks": _ranks(values),
        }  # fmt: skip


def _ranks(values: Mapping[Series, Newest]) -> list[dict[str, Any]]:
    """Rank by rank what tells whether it gets on, and how."""
    found: dict[int, dict[str, Any]] = {}
    for (rank, key), (step, at, value) in values.items():
        known = found.setdefault(rank, {"rank": rank, "step": 0, "time": 0.0, "values": {}})
        if not key.startswith(SAMPLED):  # the sampler goes on whatever the training does
            known["step"], known["time"] = max(known["step"], step), max(known["time"], at)
        if key.startswith(PER_RANK):
            known["values"][key] = (at, value)
    return [found[rank] for rank in sorted(found)]


def _state(run: _Run, now: float) -> LiveState:
    began, points, step = run.since
    seconds = now - began if began else 0.0
    is_known = seconds >= 0.5
    return LiveState(
        status=run.status, attempt=run.attempt, step=run.step, points=run.points, steps=run.steps, epochs=run.epochs,
        sweep=run.sweep, time=run.time,
        points_per_second=(run.points - points) / seconds if is_known else 0.0,
        steps_per_second=max(run.step - step, 0) / seconds if is_known else 0.0,
    )  # fmt: skip


def newest_points(batch: Batch) -> tuple[dict[str, Newest], int, int]:
    """The last point of each key in a batch, the highest step, and how many points there are; those that were lost
    count for nothing."""
    points = batch.points()
    if points["flags"].any():
        points = points[(points["flags"] & LOST) == 0]
    names, size = batch.keys, len(points)
    if not size:
        return {}, 0, 0
    if size <= FEW:
        rows = points.tolist()
        found = {names[row[0]]: (row[2], row[3], row[4]) for row in rows if row[0] < len(names)}
        return found, max(row[2] for row in rows), size
    keys = points["key"]
    if int(keys.max()) >= len(names):
        points = points[keys < len(names)]
        keys = points["key"]
    if len(names) <= 4 * size:
        last = np.full(len(names), -1)
        last[keys] = np.arange(len(keys))  # the last one of equal indices stays
        places = last[last >= 0]
    else:
        _, back = np.unique(keys[::-1], return_index=True)
        places = len(keys) - 1 - back
    if not len(places):
        return {}, 0, 0
    rows = points[places].tolist()
    return {names[row[0]]: (row[2], row[3], row[4]) for row in rows}, int(points["step"].max()), size


STEPS = ("steps", "max_steps", "total_steps", "num_steps")
EPOCHS = ("epochs", "max_epochs", "num_epochs")


def planned(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many steps and epochs there will be, by the usual names in a config; 0 for what it does not say. Of several
    the least nested counts."""

    def total(names: Sequence[str]) -> int:
        found = [
            (key.count("."), names.index(key.rsplit(".", 1)[-1]), value)
            for key, value in params.items()
            if key.rsplit(".", 1)[-1] in names and type(value) is int and value > 0
        ]
        return min(found)[2] if found else 0

    return total(STEPS), total(EPOCHS)


def _checkpoint(data: Mapping[str, Any], at: float) -> LiveCheckpoint:
    def number(name: str) -> int | None:
        return None if data.get(name) is None else int(data[name])

    return LiveCheckpoint(
        id=str(data["id"]), uri=str(data.get("uri", "")), state=str(data.get("state", "")),
        label=str(data.get("label") or ""), step=number("step"), epoch=number("epoch"),
        size_bytes=number("size_bytes"), is_best=bool(data.get("is_best")), time=float(at),
    )  # fmt: skip


class LivePublisher:
    """Writes what changed to a sink, at most every `PAUSE` seconds. `run` in a thread; `step` for tests.

    Whatever the sink does, memory stays bounded and nobody waits: what it did not take coalesces.
    """

    def __init__(
        self, live: LiveValues, open_sink: Callable[[], LiveSink], *, circuits: Circuits | None = None
    ) -> None:
        self._live, self._open = live, open_sink
        self._sink: LiveSink | None = None
        self._breaker = (circuits or Circuits()).link(
            "redis", lost="Redis does not take live values, watchers ask the database meanwhile",
            back="Redis takes live values again",
            breaker=CircuitBreaker(threshold=1, first_pause=0.5, longest_pause=10.0),
        )  # fmt: skip
        self._token = uuid.uuid4().hex
        """A key of this name in Redis tells whether Redis still has what we wrote."""
        self._looked = 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self.step(time.monotonic())):
            pass
        self.step(time.monotonic())  # the ends of runs
        if self._sink is not None:
            self._sink.close()

    def stop(self) -> None:
        self._stopped.set()

    def step(self, now: float) -> float:
        """One publication, if there is something to write. Gives the seconds to pause."""
        if not self._breaker.allows(now):
            return PAUSE
        if not self._live.has_changes() and now - self._looked < LOOK:
            return PAUSE
        self._looked = now
        began = time.thread_time()
        try:
            if self._sink is None:
                self._sink = self._open()
            if unplanned := self._live.unplanned():
                self._live.recalled(unplanned, self._sink.recall(unplanned))
            changes = self._live.changes(AT_ONCE)
            is_whole = self._sink.write(changes, self._token)
            self._live.watch(self._sink.watched([change.run for change in changes]))
        except Exception as error:  # whatever it is, watchers must not end the thread
            self._breaker.failed(error, now)
            self._live.again()
            return PAUSE
        self._breaker.succeeded(now)
        if not is_whole:
            self._live.again()
        return min(max(PAUSE, SHARE * (time.thread_time() - began)), LONGEST_PAUSE)
