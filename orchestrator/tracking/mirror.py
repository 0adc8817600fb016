"""Copies committed runs to a sink (MLflow first), never on the training path.

`MirrorService` reads from a `Feed` (the store) and writes to a `Sink`. What it promises:

* **Complete.** Every committed point of the canonical curve arrives with its own step and timestamp, up to `complete`
  points per key; beyond that the minimum, maximum and last of each window (`decimation.py`).
* **Nothing doubled.** A run's cursor moves after the sink has answered. A crash in between sends the same points
  again, and the sink knows them by (key, step, time, value). So any process may die anywhere, and two mirrors at once
  would do no harm; `Feed.try_lock` keeps them apart anyway.
* **Patient.** A sink that fails or hangs is left alone for growing pauses (`breaker.py`): one warning when that
  begins, one when it ends. A run that the sink refuses is put aside, the others go on. `step` takes at most about ten
  seconds.

The canonical curve of a key is rank 0's. A key that rank 0 does not log takes the lowest rank that does, once `grace`
seconds have passed (or the run has ended), because chunks of several ranks arrive in any order.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from orchestrator.backends.sinks import RunFacts, Series, SinkGone, SinkRefused, SinkUnavailable, Target
from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import NotFound, UserError
from orchestrator.records import RunStatus
from orchestrator.store.views import ChangedRuns, ChunkRow, FactChanges, FeedPosition, SinkCursor, SummaryRow
from orchestrator.tracking.breaker import BreakerState, CircuitBreaker
from orchestrator.tracking.decimation import Decimator

logger = logging.getLogger(__name__)

FEWEST_POINTS = 50
"""A request that is too slow is tried again with half the points, down to this many."""

STUMBLES = 5
"""After so many server errors in a row a run is put aside, so that it does not keep the others waiting."""

SAMPLES_OF_NONFINITE = 20
"""So many ±inf of a key are listed in its tag; their number is always exact."""


class Feed(Protocol):
    """What a mirror reads and where its cursors are kept. `Store` is one. All methods raise `UserError` when it is
    away.
    """

    def try_lock(self, sink: str) -> bool:
        """True when this feed object holds the sink's lock: taken now, or held since before and still ours.

        Asked at every step, because a lost connection gives the lock away.
        """
        ...

    def unlock(self, sink: str) -> None: ...

    def changed_runs(self, after: int = 0) -> ChangedRuns: ...

    def facts_after(self, run: str, cursor: int = 0) -> FactChanges: ...

    def chunks_after(self, run: str, position: FeedPosition, *, limit: int = 1000) -> list[ChunkRow]:
        """The next chunks in commit order; none that an older, still open transaction could overtake."""
        ...

    def summaries(self, run: str) -> list[SummaryRow]: ...

    def cursor(self, sink: str, run: str = "") -> SinkCursor: ...

    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None: ...

    def set_link(self, run: str, name: str, value: Any) -> None:
        """Note where the run is found in the sink."""
        ...


class Sink(Protocol):
    """What receives copies. Every method may be repeated with the same arguments without effect, returns or raises
    `SinkUnavailable`, `SinkRefused` or `SinkGone` within about 8 seconds, and is called from one thread."""

    name: str
    """Names its cursors: `mlflow`."""
    max_points: int
    """Most points in one `log_metrics`."""

    def name_for(self, name: str) -> str:
        """The nearest name the sink accepts; different names stay different."""
        ...

    def tags(self, run: RunFacts) -> Mapping[str, str]: ...

    def params(self, run: RunFacts) -> Mapping[str, str]: ...

    def ensure_run(self, run: RunFacts) -> Target:
        """Find the run by its id, or create it."""
        ...

    def set_tags(self, target: Target, tags: Mapping[str, str]) -> None: ...

    def log_params(self, target: Target, params: Mapping[str, str]) -> None: ...

    def log_metrics(self, target: Target, series: Sequence[Series]) -> None: ...

    def set_status(self, target: Target, status: RunStatus, end_ms: int | None) -> None: ...

    def ping(self) -> None: ...

    def close(self) -> None: ...


@dataclass(kw_only=True)
class MirrorConfig:
    interval: float = 1.0
    """Pause between steps when there is nothing left to copy."""
    budget: float = 2.0
    """A step begins no new request after so many seconds."""
    complete: int = 10_000
    """Points per key that are copied one by one; later ones are decimated."""
    other_ranks: bool = False
    """Also copy the other ranks' curves, as `key/rank_k`."""
    grace: float = 10.0
    """How long to wait for a lower rank before a higher one becomes the canonical curve of a key."""
    aside: float = 60.0
    """Pause before a run that the sink refused is tried again; doubles up to one hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How far a sink is behind what is committed."""

    points: int
    seconds: float
    """Between the newest committed point and the newest copied one, of the run that is furthest behind."""
    runs: int
    """Runs with something to copy."""


@dataclass(slots=True, kw_only=True)
class _Copy:
    """One run as far as it is copied. `state()` is what is stored with the cursor; the rest is learned again."""

    target: Target
    facts: RunFacts
    facts_cursor: int
    position: FeedPosition
    decimators: dict[str, Decimator] = field(default_factory=dict)
    """By the curve's name (the key, or `key/rank_k`)."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Canonical rank of a key, where it is not 0."""
    nonfinite: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> [how many ±inf, "step:inf", …]."""
    last_ms: int = 0
    """Time of the newest copied point."""
    status: tuple[RunStatus, int | None] | None = None
    """Status and end as the sink has them; None: not known in this process."""
    sent_tags: dict[str, str] = field(default_factory=dict)
    sent_params: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)
    """Key without a canonical rank -> since when we wait for a lower one."""
    pending: deque[Series] = field(default_factory=deque)
    """Read and chosen, not sent yet; the cursor moves to `pending_position` when it is empty."""
    pending_position: FeedPosition | None = None
    tags_due: dict[str, str] = field(default_factory=dict)
    """Tags that belong to points; set before the cursor moves."""

    def state(self) -> dict[str, Any]:
        return {
            "target": self.target.id,
            "curves": {name: decimator.to_json() for name, decimator in self.decimators.items()},
            "ranks": self.ranks,
            "nonfinite": self.nonfinite,
            "last_ms": self.last_ms,
        }


@dataclass(slots=True)
class _Aside:
    until: float
    pause: float


def is_declined(config: Mapping[str, Any], sink: str) -> bool:
    """Whether a run's config says `<sink>.enabled=false`: it is not copied there."""
    section = config.get(sink)
    return isinstance(section, Mapping) and str(section.get("enabled", "")).lower() == "false"


class MirrorService:
    """Keeps one sink up to date. One thread calls `step` or `run`; `stop`, `lag` and `health` may be called from any.

    On a crash nothing is lost: progress is in the feed's cursors, and what was sent but not yet noted is sent again.
    """

    def __init__(
        self, feed: Feed, sink: Sink, *, config: MirrorConfig | None = None, clock: Clock | None = None
    ) -> None:
        self._feed = feed
        self._sink = sink
        self._config = config or MirrorConfig()
        self._clock = clock or SystemClock()
        self._breaker = CircuitBreaker()
        self._feed_breaker = CircuitBreaker(threshold=1)
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._dirty: OrderedDict[str, None] | None = None  # runs with something to copy; None: not read yet
        self._seen = 0
        self._saved: tuple[str, ...] | None = None
        self._aside: dict[str, _Aside] = {}
        self._stumbles: dict[str, int] = {}  # server errors in a row, by run
        self._points_per_request = sink.max_points
        self._chunks_per_read = 64
        self._copied = 0
        self._is_writer = False
        self._last_error = ""
        self._stopped = threading.Event()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Repeat `step` until `stop`; then let go of the lock and the sink."""
        try:
            while not self._stopped.is_set():
                more = self.step(self._clock.monotonic())
                self._stopped.wait(0 if more else self._config.interval)
        finally:
            self.close()

    def stop(self) -> None:
        """Make `run` return after the step it is in."""
        self._stopped.set()

    def close(self) -> None:
        try:
            self._feed.unlock(self._sink.name)
        except UserError as error:
            logger.debug("lock of sink %s not given back: %s", self._sink.name, error)
        self._sink.close()

    def step(self, now: float) -> bool:
        """Copy for about `budget` seconds. True when there is more to do at once. `now` is monotonic."""
        if not self._feed_breaker.allows(now) or not self._breaker.allows(now):
            return False
        try:
            more = self._step(now)
        except UserError as error:
            self._forget()
            if self._feed_breaker.failed(now):
                logger.warning("mirror %s waits for its source: %s", self._sink.name, error)
            return False
        if self._feed_breaker.succeeded():
            logger.warning("mirror %s has its source back", self._sink.name)
        return more

    def _step(self, now: float) -> bool:
        self._is_writer = self._feed.try_lock(self._sink.name)
        if not self._is_writer:
            self._forget()  # the other mirror moves the cursors; ours would be stale
            return False
        if self._breaker.state(now) is BreakerState.half_open and not self._probe():
            return False
        dirty = self._notice_changes()
        deadline = now + self._config.budget
        for run in list(dirty):
            if (aside := self._aside.get(run)) is not None and now < aside.until:
                continue
            if not self._copy_safely(run, now, deadline, dirty):
                break
            if self._is_late(deadline):
                break
        self._save_dirty(dirty)
        if not dirty:  # nothing left to prove it with, and the probe was answered
            self._succeeded()
        return self._breaker.allows(self._clock.monotonic()) and any(self._is_ready(run, now) for run in dirty)

    def _is_ready(self, run: str, now: float) -> bool:
        if (aside := self._aside.get(run)) is not None and now < aside.until:
            return False
        copy = self._copies.get(run)
        return copy is None or bool(copy.pending) or not copy.waiting

    def _probe(self) -> bool:
        """Ask the sink whether it lives. Only something written ends the outage: a full disk still answers."""
        try:
            self._sink.ping()
        except (SinkUnavailable, SinkRefused) as error:
            self._failed(error)
            return False
        return True

    def _copy_safely(self, run: str, now: float, deadline: float, dirty: OrderedDict[str, None]) -> bool:
        """Copy what one run has. False when the sink should be left alone for now."""
        try:
            drained = self._copy(run, now, deadline)
        except SinkUnavailable as error:
            self._failed(error)
            dirty.move_to_end(run)  # perhaps only this run's data breaks the server: let the others have their turn
            if not error.answered:
                self._points_per_request = max(FEWEST_POINTS, self._points_per_request // 2)
                return False
            self._stumbles[run] = self._stumbles.get(run, 0) + 1
            if self._stumbles[run] >= STUMBLES:
                self._put_aside(run, error, now)
            return self._breaker.allows(self._clock.monotonic())
        except SinkGone as error:
            self._copies.pop(run, None)
            if error.deleted:
                self._put_aside(run, error, now)
            return True
        except SinkRefused as error:
            self._copies.pop(run, None)
            self._put_aside(run, error, now)
            return True
        except NotFound:  # removed from the store since it was noticed
            self._copies.pop(run, None)
            drained = True
        except UserError:
            raise
        except Exception as error:  # a defect of ours that one run triggers must not stop the copies of all others
            self._copies.pop(run, None)
            logger.exception("mirror %s cannot copy a run", self._sink.name, extra={"run": run})
            self._put_aside(run, error, now)
            return True
        self._stumbles.pop(run, None)
        self._aside.pop(run, None)
        if drained:
            dirty.pop(run, None)
        else:
            dirty.move_to_end(run)
        return True

    def _failed(self, error: Exception) -> None:
        self._last_error = str(error)
        if self._breaker.failed(self._clock.monotonic()):
            logger.warning("mirror %s is behind from now on, training is not affected: %s", self._sink.name, error)

    def _succeeded(self) -> None:
        if self._breaker.succeeded():
            logger.warning("mirror %s works again and catches up", self._sink.name)

    def _put_aside(self, run: str, error: Exception, now: float) -> None:
        before = self._aside.get(run)
        pause = self._config.aside if before is None else min(3600.0, before.pause * 2)
        self._aside[run] = _Aside(now + pause, pause)
        self._last_error = str(error)
        if before is None:
            logger.warning("mirror %s puts a run aside: %s", self._sink.name, error, extra={"run": run})

    # -- which runs -------------------------------------------------------------------------------------------------

    def _notice_changes(self) -> OrderedDict[str, None]:
        if self._dirty is None:
            cursor = self._feed.cursor(self._sink.name)
            self._seen = cursor.facts
            self._dirty = OrderedDict.fromkeys(cursor.state.get("runs", ()))
            self._saved = tuple(sorted(self._dirty))
        changed = self._feed.changed_runs(self._seen)
        if changed.runs:
            self._dirty.update(dict.fromkeys(changed.runs))
            self._saved = None  # the cursor alone moves with every transaction of anyone: not worth a write
        self._seen = changed.cursor
        return self._dirty

    def _save_dirty(self, dirty: Iterable[str]) -> None:
        """What is noticed but not copied is stored beside the cursor, so that no run that is stuck holds the cursor
        back.
        """
        runs = tuple(sorted(dirty))
        if runs != self._saved:
            self._feed.save_cursor(self._sink.name, "", SinkCursor(facts=self._seen, state={"runs": list(runs)}))
            self._saved = runs

    def _forget(self) -> None:
        self._copies.clear()
        self._dirty = None

    # -- one run ----------------------------------------------------------------------------------------------------

    def _copy(self, run: str, now: float, deadline: float) -> bool:
        """Copy until the run has nothing more (True) or the time is up or a lower rank is waited for (False)."""
        if run not in self._copies and is_declined(self._feed.facts_after(run).run.config, self._sink.name):
            return True
        copy = self._refreshed(run)
        wanted = copy.facts.status
        if self._is_late(deadline):
            return False
        if not wanted.is_terminal:
            self._set_status(copy)
        if not self._send_facts(copy, deadline):
            return False
        while True:
            if not self._send_pending(run, copy, deadline):
                return False
            chunks = self._read(run, copy)
            if not chunks:
                break
            if not self._choose(run, copy, chunks, now):
                return False
        if wanted.is_terminal:
            self._flush(copy)
            if not self._send_pending(run, copy, deadline):
                return False
            self._set_status(copy)
        return True

    def _is_late(self, deadline: float) -> bool:
        return self._clock.monotonic() >= deadline

    def _refreshed(self, run: str) -> _Copy:
        copy = self._copies.get(run)
        if copy is None:
            copy = self._opened(run)
            self._copies[run] = copy
            while len(self._copies) > 1000:
                self._copies.popitem(last=False)
        else:
            changes = self._feed.facts_after(run, copy.facts_cursor)
            copy.facts, copy.facts_cursor = facts_of(changes, copy.facts), changes.cursor
        self._copies.move_to_end(run)
        return copy

    def _opened(self, run: str) -> _Copy:
        changes = self._feed.facts_after(run)
        facts = facts_of(changes)
        target = self._sink.ensure_run(facts)
        cursor = self._feed.cursor(self._sink.name, run)
        if target.created or cursor.state.get("target", target.id) != target.id:
            cursor = SinkCursor()  # a new copy: everything goes there from the start
        link = {"run_id": target.id, "url": target.url}
        if changes.run.links.get(self._sink.name) != link:
            self._feed.set_link(run, self._sink.name, link)
        state = cursor.state
        return _Copy(
            target=target, facts=facts, facts_cursor=changes.cursor, position=cursor.position,
            decimators={n: Decimator.from_json(d, self._config.complete) for n, d in state.get("curves", {}).items()},
            ranks=dict(state.get("ranks", {})), nonfinite=dict(state.get("nonfinite", {})),
            last_ms=state.get("last_ms", 0),
        )  # fmt: skip

    def _set_status(self, copy: _Copy) -> None:
        status = copy.facts.status
        wanted = (status, copy.facts.end_ms if status.is_terminal else None)
        if copy.status != wanted:
            self._sink.set_status(copy.target, *wanted)
            self._succeeded()
            copy.status = wanted

    def _send_facts(self, copy: _Copy, deadline: float) -> bool:
        """Send the parameters and tags that the sink does not have yet. False when the time is up first."""
        params = _changes(self._sink.params(copy.facts), copy.sent_params)
        tags = _changes({**self._sink.tags(copy.facts), **copy.tags_due}, copy.sent_tags)
        for call, wanted, sent in (
            (self._sink.log_params, params, copy.sent_params),
            (self._sink.set_tags, tags, copy.sent_tags),
        ):
            for batch in text_batches(wanted):
                if self._is_late(deadline):
                    return False
                self._send_texts(call, copy.target, batch)
                sent.update(batch)
                self._succeeded()
        copy.tags_due.clear()
        return True

    def _send_texts(
        self, call: Callable[[Target, Mapping[str, str]], None], target: Target, texts: dict[str, str]
    ) -> None:
        """One request. What the sink refuses is cut in halves until the bad entry is alone; that one is left out."""
        try:
            call(target, texts)
        except SinkRefused as error:
            if len(texts) > 1:
                names = list(texts)
                for half in (names[: len(names) // 2], names[len(names) // 2 :]):
                    self._send_texts(call, target, {name: texts[name] for name in half})
                return
            self._last_error = str(error)
            logger.warning("mirror %s leaves out %s: %s", self._sink.name, next(iter(texts)), error.why)

    # -- points -----------------------------------------------------------------------------------------------------

    def _read(self, run: str, copy: _Copy) -> list[ChunkRow]:
        chunks = self._feed.chunks_after(run, copy.position, limit=self._chunks_per_read)
        points = sum(len(chunk.steps) for chunk in chunks)
        if points > 50_000:
            self._chunks_per_read = max(1, self._chunks_per_read // 2)
        elif points < 2_000 and len(chunks) == self._chunks_per_read:
            self._chunks_per_read = min(4096, self._chunks_per_read * 2)
        return chunks

    def _choose(self, run: str, copy: _Copy, chunks: Sequence[ChunkRow], now: float) -> bool:
        """Turn chunks into pending series. False when the first chunk has to wait."""
        first_ranks = self._first_ranks(run, copy, chunks, now)
        taken: dict[str, list[ChunkRow]] = {}
        position = None
        for chunk in chunks:
            rank = self._canonical(copy, chunk, first_ranks, now)
            if rank is None:
                break
            position = chunk.position
            if chunk.rank == rank:
                taken.setdefault(chunk.key, []).append(chunk)
            elif self._config.other_ranks:
                taken.setdefault(f"{chunk.key}/rank_{chunk.rank}", []).append(chunk)
        for name, parts in taken.items():
            self._append(copy, name, parts)
        copy.pending_position = position
        return position is not None

    def _first_ranks(self, run: str, copy: _Copy, chunks: Sequence[ChunkRow], now: float) -> Mapping[str, int]:
        """The preferred one of the ranks that have points of a key, by key. Read only when a chunk needs it.

        All keys that only higher ranks have begin to wait here, so that a thousand of them wait once and not in turn.
        """
        if all(chunk.rank == 0 or self._is_settled(copy, chunk.key) for chunk in chunks):
            return {}
        first: dict[str, int] = {}
        for row in self._feed.summaries(run):
            first[row.key] = min(first.get(row.key, row.rank), row.rank, key=_preference)
        for key, rank in first.items():
            if rank > 0 and not self._is_settled(copy, key):
                copy.waiting.setdefault(key, now)
        return first

    @staticmethod
    def _is_settled(copy: _Copy, key: str) -> bool:
        return key in copy.ranks or key in copy.decimators

    def _canonical(self, copy: _Copy, chunk: ChunkRow, first_ranks: Mapping[str, int], now: float) -> int | None:
        """The rank whose points are the plain curve of the chunk's key; None while that is open."""
        key = chunk.key
        is_settled = self._is_settled(copy, key)
        settled = copy.ranks.get(key, 0) if is_settled else chunk.rank
        best = min(settled, chunk.rank, first_ranks.get(key, chunk.rank), key=_preference)
        if best > 0 and not is_settled and not copy.facts.status.is_terminal:
            # Not the age of the points: after an outage old points of one rank arrive before those of another.
            waited = now - copy.waiting.setdefault(key, now)
            if waited < self._config.grace:
                return None
        copy.waiting.pop(key, None)
        copy.decimators.setdefault(key, Decimator(complete=self._config.complete))
        if best != 0:
            copy.ranks[key] = best
        else:
            copy.ranks.pop(key, None)
        return best

    def _append(self, copy: _Copy, name: str, chunks: Sequence[ChunkRow]) -> None:
        steps = np.concatenate([chunk.steps for chunk in chunks]).astype(np.int64)
        times = np.concatenate([chunk.times for chunk in chunks])
        times_ms = np.maximum(0, np.rint(times * 1000.0)).astype(np.int64)
        values = np.concatenate([chunk.values for chunk in chunks]).astype(np.float64)
        copy.last_ms = max(copy.last_ms, int(times_ms.max()))
        sent_as = self._sink.name_for(name)
        if sent_as != name:
            copy.tags_due[self._sink.name_for(f"orc.key.{sent_as}")] = name
        self._note_nonfinite(copy, name, steps, values)
        decimator = copy.decimators.setdefault(name, Decimator(complete=self._config.complete))
        chosen = Series(name=sent_as, **_arrays(decimator.add(steps, times_ms, values)))
        if decimator.is_decimated:
            text = f"complete up to {decimator.complete} points, then min, max and last of each window"
            copy.tags_due[self._sink.name_for(f"orc.decimated.{name}")] = text
        if len(chosen):
            copy.pending.append(chosen)

    def _note_nonfinite(self, copy: _Copy, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        infinite = np.flatnonzero(np.isinf(values))
        if not len(infinite):
            return
        noted = copy.nonfinite.setdefault(name, [0])
        noted[0] += len(infinite)
        room = max(0, SAMPLES_OF_NONFINITE - (len(noted) - 1))
        noted += [f"{steps[i]}:{'inf' if values[i] > 0 else '-inf'}" for i in infinite[:room]]
        more = noted[0] - (len(noted) - 1)
        text = ",".join(noted[1:]) + (f" and {more} more" if more else "")
        copy.tags_due[self._sink.name_for(f"orc.nonfinite.{name}")] = text

    def _flush(self, copy: _Copy) -> None:
        """Give out the open windows of a run that has ended, so that its last values are right in the sink."""
        for name, decimator in copy.decimators.items():
            rest = Series(name=self._sink.name_for(name), **_arrays(decimator.flush()))
            if len(rest):
                copy.pending.append(rest)
                copy.pending_position = copy.position

    def _send_pending(self, run: str, copy: _Copy, deadline: float) -> bool:
        """Send what is chosen and move the cursor. False when the time is up first."""
        while copy.pending:
            if self._is_late(deadline):
                return False
            part = _head(copy.pending, self._points_per_request)
            self._send(copy, part)
            _drop(copy.pending, sum(map(len, part)))
        if copy.pending_position is None:
            return True
        if copy.tags_due and not self._send_facts(copy, deadline):
            return False
        cursor = SinkCursor(position=copy.pending_position, facts=copy.facts_cursor, state=copy.state())
        self._feed.save_cursor(self._sink.name, run, cursor)
        copy.position, copy.pending_position = copy.pending_position, None
        return not self._is_late(deadline)

    def _send(self, copy: _Copy, series: Sequence[Series]) -> None:
        """One request. What the sink refuses is cut in halves until the bad point is alone; it is left out and
        tagged.
        """
        count = sum(map(len, series))
        try:
            self._sink.log_metrics(copy.target, series)
        except SinkRefused as error:
            if count > 1:
                rest = deque(series)
                self._send(copy, _head(rest, count // 2))
                _drop(rest, count // 2)
                self._send(copy, list(rest))
                return
            name, step = series[0].name, int(series[0].steps[0])
            copy.tags_due[self._sink.name_for(f"orc.refused.{name}")] = f"step {step}: {error.why}"[:500]
            self._last_error = str(error)
            logger.warning(
                "mirror %s leaves out a point of %s: %s", self._sink.name, name, error.why,
                extra={"run": copy.facts.id, "step": step},
            )  # fmt: skip
            return
        self._copied += count
        self._points_per_request = min(self._sink.max_points, self._points_per_request + FEWEST_POINTS)
        self._succeeded()

    # -- how it stands ----------------------------------------------------------------------------------------------

    def lag(self) -> Lag:
        """How far the sink is behind. Reads the feed: raises `UserError` when that is not there."""
        return lag_of(self._feed, self._sink.name)

    def health(self) -> dict[str, Any]:
        """Small and plain, for `orc status`. Never raises."""
        now = self._clock.monotonic()
        try:
            lag: Lag | None = self.lag()
        except UserError:
            lag = None
        return {
            "sink": self._sink.name,
            "state": self._breaker.state(now).value if self._feed_breaker.allows(now) else "no source",
            "writer": self._is_writer,
            "retry_in": round(self._breaker.retry_in(now), 1),
            "copied_points": self._copied,
            "behind_points": lag.points if lag else None,
            "behind_seconds": round(lag.seconds, 3) if lag else None,
            "behind_runs": lag.runs if lag else None,
            "aside": sorted(self._aside),
            "last_error": self._last_error,
        }


def lag_of(feed: Feed, sink: str) -> Lag:
    """How far a sink is behind, from the feed alone: any process may ask. Counts the points of the first 200 runs."""
    cursor = feed.cursor(sink)
    dirty = dict.fromkeys((*cursor.state.get("runs", ()), *feed.changed_runs(cursor.facts).runs))
    points, seconds = 0, 0.0
    for run in list(dirty)[:200]:
        behind, late = _lag_of_run(feed.summaries(run), feed.cursor(sink, run).state)
        points, seconds = points + behind, max(seconds, late)
    return Lag(points=points, seconds=seconds, runs=len(dirty))


# -- pure parts -------------------------------------------------------------------------------------------------------


def _lag_of_run(summaries: Iterable[SummaryRow], state: Mapping[str, Any]) -> tuple[int, float]:
    """Points and seconds that one run's canonical curves are behind."""
    curves, ranks = state.get("curves", {}), state.get("ranks", {})
    last = state.get("last_ms", 0) / 1000.0
    chosen: dict[str, SummaryRow] = {}
    for row in sorted(summaries, key=lambda row: (row.rank != ranks.get(row.key, 0), _preference(row.rank))):
        chosen.setdefault(row.key, row)
    behind = sum(max(0, row.count - _count(curves.get(key, 0))) for key, row in chosen.items())
    if not behind:
        return 0, 0.0
    newest, oldest = max(row.last_time for row in chosen.values()), min(row.first_time for row in chosen.values())
    return behind, max(0.0, newest - (last or oldest))


def text_batches(texts: Mapping[str, str], most: int = 100, most_bytes: int = 500_000) -> Iterator[dict[str, str]]:
    """Cut into requests of at most so many entries and bytes (as JSON, where one character may become twelve)."""
    batch: dict[str, str] = {}
    size = 0
    for name, text in texts.items():
        more = len(json.dumps(name)) + len(json.dumps(text)) + 20
        if batch and (len(batch) >= most or size + more > most_bytes):
            yield batch
            batch, size = {}, 0
        batch[name] = text
        size += more
    if batch:
        yield batch


def facts_of(changes: FactChanges, before: RunFacts | None = None) -> RunFacts:
    """A run's facts from all of its changes (`before` None), or from those since `before`."""
    run = changes.run
    source = run.config.get("train", "") if isinstance(run.config.get("train", ""), str) else ""
    git: Mapping[str, Any] = before.git if before else {}
    for attempt in changes.attempts:
        found = attempt.provenance.get("git")
        git = found if isinstance(found, Mapping) else git
    error = ""
    if run.error:
        rank = run.error.get("rank")
        error = ": ".join(str(run.error[k]) for k in ("type", "message") if run.error.get(k))
        error = f"rank {rank}: {error}" if rank is not None else error
    return RunFacts(
        id=run.run, experiment=run.experiment, name=run.name, project=run.project,
        parent=next((parent for parent, kind in run.parents.items() if kind == "parent"), ""),
        status=run.status, reason=run.reason, error=error, attempt=run.attempt,
        start_ms=_ms(run.created if run.started is None else run.started),
        end_ms=None if run.ended is None else _ms(run.ended),
        user=run.user, source=source, description=run.description,
        notes=tuple(dict.fromkeys((*(before.notes if before else ()), *(note.text for note in changes.notes)))),
        params={**(before.params if before else {}), **{row.name: row.value for row in changes.params}},
        tags={**(before.tags if before else {}), **changes.tags},
        artifacts={**(before.artifacts if before else {}), **{row.name: row.uri for row in changes.artifacts}},
        config_hash=run.config_hash, directory=run.directory, job=run.job, git=git, version=changes.cursor,
    )  # fmt: skip


def _preference(rank: int) -> int:
    """Rank 0 first, then the driver (-1) and services, then 1, 2, 3 …"""
    return 0 if rank == 0 else 1 if rank < 0 else rank + 1


def _changes(wanted: Mapping[str, str], sent: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if sent.get(name) != value}


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _count(raw: Any) -> int:
    return raw if isinstance(raw, int) else raw[0]


def _arrays(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    return {"steps": parts[0], "times_ms": parts[1], "values": parts[2]}


def _head(pending: Iterable[Series], limit: int) -> list[Series]:
    """The first `limit` points, key after key: few keys with many steps make the cheapest requests."""
    return list(_heads(pending, limit))


def _heads(pending: Iterable[Series], room: int) -> Iterator[Series]:
    for series in pending:
        if room <= 0:
            return
        part = series.part(0, room)
        room -= len(part)
        yield part


def _drop(pending: deque[Series], count: int) -> None:
    while count:
        first = pending.popleft()
        if len(first) > count:
            pending.appendleft(first.part(count))
            return
        count -= len(first)
