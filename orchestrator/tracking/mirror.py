"""Copies committed runs to a sink (MLflow first), never on the training path.

`MirrorService` reads from a `Feed` (the store) and writes to a `Sink`. What it promises:

* **Complete.** Every committed point of the canonical curve arrives with its own step and timestamp, up to `complete`
  points per key; beyond that the minimum, maximum and last of each window (`decimation.py`).
* **Nothing doubled.** A run's cursor moves after the sink has answered. A crash in between sends the same points
  again: the sink knows them by (key, step, time, value), or goes back to the place that was stored with the cursor
  (`mark`, `rewind`). So any process may die anywhere; `Feed.try_lock` keeps two mirrors apart.
* **In turn.** Runs are visited round and round (`turns.py`): one with much to copy uses its part of the time and goes
  on at its next turn; of many with little each waits until there is something worth a request. What is held in memory
  is bounded; a run that is dropped from it is read again from its cursor.
* **Patient.** A sink that fails or hangs is left alone for growing pauses (`breaker.py`): one warning when that
  begins, one line when it is over (`circuits.py`). A run that the sink refuses is put aside, the others go on. `step`
  takes at most about ten seconds.

The canonical curve of a key is its declared reduction over ranks (`curves.py`), else rank 0's. A key that rank 0 does
not log takes the lowest rank that does, once `grace` seconds have passed (or the run has ended), because chunks of
several ranks arrive in any order. Of a run with more than one attempt each attempt is a copy of its own, below the
run's; it reads the feed from the beginning with a cursor of its own. `copies.py` decides what of it goes where. A
sweep's parent run is there before those of its trials, which have no copies of attempts: each promotion is one.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from orchestrator.backends.sinks import (
    DatasetFacts,
    File,
    RunFacts,
    Series,
    SinkGone,
    SinkRefused,
    SinkUnavailable,
    Target,
)
from orchestrator.clock import Clock, SystemClock
from orchestrator.config.redaction import redact_url
from orchestrator.errors import NotFound, UserError
from orchestrator.records import RunStatus
from orchestrator.store.views import (
    ChangedRuns,
    ChunkRow,
    FactChanges,
    FeedPosition,
    SinkCursor,
    SinkLag,
    SummaryRow,
)
from orchestrator.tracking.backlog import Backlog
from orchestrator.tracking.breaker import BreakerState, CircuitBreaker
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.copies import (
    Copy,
    Rules,
    Wishes,
    attempt_facts,
    drop,
    facts_of,
    head,
    prefixed,
)
from orchestrator.tracking.turns import Turns

logger = logging.getLogger(__name__)

FEWEST_POINTS = 50
"""A request that is too slow is tried again with half the points, down to this many."""

STUMBLES = 5
"""After so many server errors in a row a run is put aside, so that it does not keep the others waiting."""

MOST_COPIES = 3000
MOST_HELD = 3_000_000
"""Points (24 bytes each, and what is kept per curve counts as ten) of all runs together that are held in memory."""

PART = 4
"""Where several runs have something to copy, each gets this part of a step's time."""

FILE_TRIES = 3
"""Of a file that the sink does not take while it takes other things; then only its link stays until the run changes."""


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

    def whereabouts(self, runs: Iterable[str]) -> Mapping[str, tuple[RunStatus, str]]:
        """Status and directory of each that is there."""
        ...

    def facts_after(self, run: str, cursor: int = 0) -> FactChanges: ...

    def has_facts_after(self, run: str, cursor: int) -> bool:
        """Whether `facts_after` would give anything new; much cheaper. Raises NotFound."""
        ...

    def chunks_after(self, run: str, position: FeedPosition, *, limit: int = 1000) -> list[ChunkRow]:
        """The next chunks in commit order; none that an older, still open transaction could overtake."""
        ...

    def summaries(self, run: str) -> list[SummaryRow]: ...

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        """How far each sink is behind, by their cursors."""
        ...

    def cursor(self, sink: str, run: str = "") -> SinkCursor: ...

    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None: ...

    def set_link(self, run: str, name: str, value: Any) -> None:
        """Note where the run is found in the sink."""
        ...


class Sink(Protocol):
    """What receives copies. Every method returns or raises `SinkUnavailable`, `SinkRefused` or `SinkGone` within about
    8 seconds, and is called from one thread. What was not confirmed by a cursor is sent again: a sink knows it and
    takes it without effect, or takes back in `rewind` what came after its `mark`.
    """

    name: str
    """Names its cursors: `mlflow`. Also the section of a run's configuration that may switch it off."""
    max_points: int
    """Most points in one `log_metrics`."""
    complete: int
    """Points per key that are copied one by one; later ones are decimated."""
    clips_infinity: bool
    """It cannot keep ±inf: they are listed in tags besides."""

    def name_for(self, name: str) -> str:
        """The nearest name the sink accepts; different names stay different."""
        ...

    def tags(self, run: RunFacts) -> Mapping[str, str]: ...

    def params(self, run: RunFacts) -> Mapping[str, str]: ...

    def ensure_run(self, run: RunFacts) -> Target:
        """Find the run by its id (an attempt by its run and number), or create it."""
        ...

    def rewind(self, target: Target, mark: Any) -> bool:
        """Go back to where `mark` was given, or to the beginning (None). False: that place is not there any more, so
        everything has to be sent from the start. A sink that knows what it has need not do anything.
        """
        ...

    def mark(self, target: Target) -> Any:
        """A place to go back to, as JSON; what came before is durable. None: not needed."""
        ...

    def set_tags(self, target: Target, tags: Mapping[str, str]) -> None:
        """Those of `tags(run)` that changed, and remarks about single curves."""
        ...

    def log_params(self, target: Target, params: Mapping[str, str]) -> None:
        """Those of `params(run)` that changed."""
        ...

    def log_metrics(self, target: Target, series: Sequence[Series]) -> None: ...

    def log_datasets(self, target: Target, datasets: Sequence[DatasetFacts]) -> None: ...

    def files(self, run: RunFacts) -> Sequence[File]:
        """Small files that a target which takes files should have."""
        ...

    def upload(self, target: Target, file: File) -> None: ...

    def set_status(self, target: Target, status: RunStatus, end_ms: int | None) -> None: ...

    def ping(self) -> None: ...

    def close(self) -> None:
        """Let go of everything, because another mirror writes from now on. It may be used again later."""
        ...


@dataclass(kw_only=True)
class MirrorConfig:
    interval: float = 1.0
    """Pause between steps when there is nothing left to copy."""
    budget: float = 2.0
    """A step begins no new request after so many seconds."""
    complete: int | None = None
    """Instead of the sink's own."""
    other_ranks: bool = False
    """Also copy the other ranks' curves, as `key/rank_k`, of every run and not only of those that ask for it."""
    grace: float = 10.0
    """How long to wait for a lower rank before a higher one becomes the canonical curve of a key, and for a rank that
    is silent, or whose attempt is over, before a reduction goes on without it."""
    aside: float = 60.0
    """Pause before a run that the sink refused is tried again; doubles up to one hour."""
    linger: float = 10.0
    """How long a run with few new points waits at most for more of them, where there are many such runs."""


class Progress(Enum):
    """What one visit to a run came to."""

    done = "done"
    more = "more"
    """The time was up first."""
    waiting = "waiting"
    """For points that may come yet, or for a time."""


class MirrorService:
    """Keeps one sink up to date. One thread calls `step` or `run`; `stop`, `lag` and `health` may be called from any.

    On a crash nothing is lost: progress is in the feed's cursors, and what was sent but not yet noted is sent again.
    """

    def __init__(
        self,
        feed: Feed,
        sink: Sink,
        *,
        config: MirrorConfig | None = None,
        clock: Clock | None = None,
        circuits: Circuits | None = None,
    ) -> None:
        self._feed = feed
        self._sink = sink
        self._config = config or MirrorConfig()
        self._clock = clock or SystemClock()
        circuits = circuits or Circuits(clock=self._clock)
        self._breaker = circuits.link(
            sink.name, lost=f"mirror {sink.name} is behind from now on, training is not affected",
            back=f"mirror {sink.name} works again and catches up",
        )  # fmt: skip
        self._feed_breaker = circuits.link(
            "postgres", lost=f"mirror {sink.name} waits for its source", back=f"mirror {sink.name} has its source back",
            breaker=CircuitBreaker(threshold=1),
        )  # fmt: skip
        self._rules = Rules(
            name_for=sink.name_for,
            complete=sink.complete if self._config.complete is None else self._config.complete,
            grace=self._config.grace,
            clips_infinity=sink.clips_infinity,
        )
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._held: dict[str, int] = {}  # points in memory, by run
        self._no_files_until = 0.0
        self._backlog = Backlog(feed, sink.name)
        self._turns = Turns(linger=self._config.linger, aside=self._config.aside)
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
        if not self._feed_breaker.allows(now):
            return False
        try:
            more = self._step(now)
        except UserError as error:
            self._forget()
            self._feed_breaker.failed(error, now)
            return False
        self._feed_breaker.succeeded(now)
        return more

    def _step(self, now: float) -> bool:
        self._is_writer = self._feed.try_lock(self._sink.name)
        if not self._is_writer:
            self._forget()  # the other mirror moves the cursors; ours would be stale
            self._sink.close()
            return False
        dirty = self._backlog.noticed()
        if self._backlog.is_fresh:  # a sink may hang in its first request
            self._save_backlog(dirty, now)
        if self._breaker.allows(now) and (self._breaker.state(now) is BreakerState.closed or self._probe()):
            self._copy_in_turn(dirty, now)
        self._save_backlog(dirty, now)
        now = self._clock.monotonic()
        return self._breaker.allows(now) and self._turns.is_any_ready(dirty, now)

    def _copy_in_turn(self, dirty: OrderedDict[str, None], now: float) -> None:
        deadline = now + self._config.budget
        due = self._turns.due(dirty, now)
        if resting := self._turns.resting(dirty, now):
            found = self._feed.whereabouts(resting)
            self._turns.ended([run for run, (status, _) in found.items() if status.is_terminal], now)
        part = self._config.budget if len(due) == 1 else self._config.budget / PART
        for run in due:
            until = min(deadline, self._clock.monotonic() + part)
            if not self._copy_safely(run, now, until, dirty) or self._is_late(deadline):
                break
        if not dirty:  # nothing left to prove it with, and the probe was answered
            self._succeeded()

    def _save_backlog(self, dirty: OrderedDict[str, None], now: float) -> None:
        self._backlog.save(dirty, now, state=self._breaker.state(now).value, error=self._trouble())

    def _trouble(self) -> str:
        """Why something is not copied, for those who only see the database."""
        is_well = self._breaker.state(self._clock.monotonic()) is BreakerState.closed and not self._turns.aside
        return "" if is_well else redact_url(self._last_error)

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
        begun, copied = self._clock.monotonic(), self._copied
        try:
            progress = self._copy(run, now, deadline)
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
            self._drop(run)
            if error.deleted:
                self._put_aside(run, error, now)
            return True
        except SinkRefused as error:
            self._drop(run)
            self._put_aside(run, error, now)
            return True
        except NotFound:  # removed from the store since it was noticed
            self._drop(run)
            self._turns.forget(run)
            dirty.pop(run, None)
            return True
        except UserError:
            raise
        except Exception as error:  # a defect of ours that one run triggers must not stop the copies of all others
            self._drop(run)
            logger.exception("mirror %s cannot copy a run", self._sink.name, extra={"run": run})
            self._put_aside(run, error, now)
            return True
        self._stumbles.pop(run, None)
        ended = self._clock.monotonic()
        is_small = progress is not Progress.more and self._copied - copied < self._points_per_request
        waits = progress is Progress.waiting
        self._turns.visited(run, ended, seconds=ended - begun, is_small=is_small, waits=waits)
        if progress is Progress.done:
            dirty.pop(run, None)
        else:
            dirty.move_to_end(run)
        return True

    def _failed(self, error: Exception) -> None:
        self._last_error = str(error)
        self._breaker.failed(error, self._clock.monotonic())

    def _succeeded(self) -> None:
        self._breaker.succeeded(self._clock.monotonic())

    def _put_aside(self, run: str, error: Exception, now: float) -> None:
        self._last_error = str(error)
        if self._turns.put_aside(run, now):
            logger.warning("mirror %s puts a run aside: %s", self._sink.name, error, extra={"run": run})

    # -- what is held in memory -------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._copies.clear()
        self._held.clear()
        self._turns.forget_waiting()
        self._backlog.forget()

    def _drop(self, run: str) -> None:
        self._copies.pop(run, None)
        self._held.pop(run, None)

    def _hold(self, run: str) -> None:
        """Keep within the bounds: runs that were looked at longest ago are opened again when their turn comes. Not
        those of which something is on its way: it would be read and sent again and again.
        """
        self._held[run] = self._copies[run].held
        if len(self._copies) <= MOST_COPIES and not self._is_full():
            return
        aside = {run for run in self._turns.aside if run in self._copies}
        idle = [name for name, copy in self._copies.items() if name in aside or not copy.is_sending]
        for other in idle:
            if other != run:
                self._drop(other)
            if len(self._copies) <= MOST_COPIES and not self._is_full():
                return

    def _is_full(self, without: str = "") -> bool:
        return sum(self._held.values()) - self._held.get(without, 0) > MOST_HELD

    # -- one run ----------------------------------------------------------------------------------------------------

    def _copy(self, run: str, now: float, deadline: float) -> Progress:
        """Copy what a run has, then what each of its attempts has, until the time is up."""
        copy = self._refreshed(run)
        if copy is None:
            return Progress.done
        try:
            return self._copy_all(run, copy, now, deadline)
        finally:
            self._hold(run)

    def _copy_all(self, run: str, copy: Copy, now: float, deadline: float) -> Progress:
        progress = self._bring_up(run, copy, now, deadline)
        copy.children_due |= copy.seen_attempts if copy.shows_attempts else set()
        copy.seen_attempts.clear()
        for attempt in sorted(copy.children_due & copy.attempts.keys() - copy.children_refused):
            if self._is_late(deadline):
                return Progress.more
            of_attempt = self._copy_attempt(run, copy, attempt, now, deadline)
            if of_attempt is Progress.done:
                copy.children_due.discard(attempt)
            elif progress is not Progress.more:
                progress = of_attempt
        return progress

    def _copy_attempt(self, run: str, copy: Copy, attempt: int, now: float, deadline: float) -> Progress:
        """What the sink refuses of an attempt does not hold up the run."""
        try:
            if attempt not in copy.children:
                copy.children[attempt] = self._opened_attempt(run, copy, attempt)
            child = copy.children[attempt]
            child.facts = attempt_facts(copy.facts, copy.attempts[attempt])
            return self._bring_up(run, child, now, deadline)
        except SinkGone as error:
            if not error.deleted:
                raise  # another database, perhaps: look for the run, too
            copy.children.pop(attempt, None)
            self._refuse_attempt(run, copy, attempt, error)
        except SinkRefused as error:
            self._refuse_attempt(run, copy, attempt, error)
        return Progress.done

    def _refuse_attempt(self, run: str, copy: Copy, attempt: int, error: Exception) -> None:
        copy.children_refused.add(attempt)
        self._last_error = str(error)
        logger.warning("mirror %s leaves out attempt %d: %s", self._sink.name, attempt, error, extra={"run": run})

    def _bring_up(self, run: str, copy: Copy, now: float, deadline: float) -> Progress:
        """Facts first, then points, at last the end: a run that is over in the sink has everything there."""
        is_over = copy.facts.status.is_terminal
        if self._is_late(deadline):
            return Progress.more
        if not is_over:
            self._set_status(copy)
        if not self._send_facts(copy, deadline):
            return Progress.more
        copy.take_decided()  # a process before this one may have decided and not acted
        is_read = False
        while True:
            if not self._send_pending(copy, deadline):
                return Progress.more
            if is_read:
                break
            if self._is_full(without=run):  # what others have read is sent first
                return Progress.more
            chunks, is_read = self._read(run, copy)
            placed, decided = copy.decide(chunks, lambda: self._feed.summaries(run), now)
            if decided:
                self._save(copy)
            copy.take(placed)
            if len(placed) < len(chunks):
                return Progress.waiting if self._send_pending(copy, deadline) else Progress.more
        if copy.decide_on_silence(now):
            self._save(copy)
            copy.take_decided()
            if not self._send_pending(copy, deadline):
                return Progress.more
        if copy.silence:
            return Progress.waiting
        if is_over:
            copy.flush()
            if not self._send_pending(copy, deadline):
                return Progress.more
            self._set_status(copy)
        return self._send_files(copy, deadline)

    def _is_late(self, deadline: float) -> bool:
        return self._clock.monotonic() >= deadline

    def _wishes(self, changes: FactChanges) -> Wishes:
        return Wishes.of(changes.run.config, self._sink.name, other_ranks=self._config.other_ranks)

    def _refreshed(self, run: str) -> Copy | None:
        """The copy with all facts; None of a run that declines the sink."""
        copy = self._copies.get(run)
        if copy is None:
            changes = self._feed.facts_after(run)
            if not self._wishes(changes).enabled:
                return None
            copy = self._opened(run, changes)
            self._copies[run] = copy
        elif self._feed.has_facts_after(run, copy.facts_cursor):
            self._update(copy, self._feed.facts_after(run, copy.facts_cursor))
        self._copies.move_to_end(run)
        return copy

    def _update(self, copy: Copy, changes: FactChanges) -> None:
        copy.wishes = self._wishes(changes)
        for child in copy.children.values():
            child.wishes = copy.wishes
        copy.facts = prefixed(facts_of(changes, copy.facts), copy.wishes)
        copy.facts_cursor = changes.cursor
        was_one = len(copy.attempts) < 2
        copy.attempts.update({row.attempt: row for row in changes.attempts})
        if copy.shows_attempts:
            copy.children_due |= copy.attempts.keys() if was_one else {row.attempt for row in changes.attempts}

    def _opened(self, run: str, changes: FactChanges) -> Copy:
        wishes = self._wishes(changes)
        facts = prefixed(facts_of(changes), wishes)
        attempts = {row.attempt: row for row in changes.attempts}
        if facts.parent and facts.parent not in self._copies:
            self._open_parent(facts.parent)
        copy = self._placed(run, facts, attempts, None)
        copy.wishes, copy.facts_cursor, copy.is_trial = wishes, changes.cursor, bool(changes.run.sweep)
        copy.children_due = set(attempts) if copy.shows_attempts else set()
        link = {"run_id": copy.target.id, "url": copy.target.url}
        if changes.run.links.get(self._sink.name) != link:
            self._feed.set_link(run, self._sink.name, link)
        return copy

    def _open_parent(self, parent: str) -> None:
        """A sink can only put a run below one that it has. What is wrong with the parent does not hold up its child."""
        try:
            changes = self._feed.facts_after(parent)
            if self._wishes(changes).enabled:
                self._copies[parent] = self._opened(parent, changes)
                self._held[parent] = 0
        except (NotFound, SinkGone, SinkRefused) as error:
            logger.info("mirror %s has no copy of a parent: %s", self._sink.name, error, extra={"run": parent})

    def _opened_attempt(self, run: str, copy: Copy, attempt: int) -> Copy:
        facts = attempt_facts(copy.facts, copy.attempts[attempt])
        child = self._placed(f"{run}/attempt-{attempt}", facts, copy.attempts, attempt)
        child.wishes = copy.wishes
        return child

    def _placed(self, cursor_id: str, facts: RunFacts, attempts: dict[int, Any], attempt: int | None) -> Copy:
        """A copy at its place in the sink, as far as its cursor says."""
        target = self._sink.ensure_run(facts)
        cursor = self._feed.cursor(self._sink.name, cursor_id)
        if target.created or cursor.state.get("target", target.id) != target.id:
            cursor = SinkCursor()  # a new copy: everything goes there from the start
        if not self._sink.rewind(target, cursor.state.get("mark")):
            cursor = SinkCursor()
            self._sink.rewind(target, None)
        copy = Copy(
            cursor_id=cursor_id, attempt=attempt, target=target, facts=facts, rules=self._rules, attempts=attempts
        )
        copy.restore(cursor.position, cursor.state)
        if not cursor.position.xid:
            self._save(copy)  # before anything is read: chunks that a reader has not passed are not merged
        return copy

    def _save(self, copy: Copy, position: FeedPosition | None = None) -> None:
        copy.position = position or copy.position
        copy.mark = self._sink.mark(copy.target)
        cursor = SinkCursor(position=copy.position, facts=copy.facts_cursor, state=copy.state())
        self._feed.save_cursor(self._sink.name, copy.cursor_id, cursor)

    def _set_status(self, copy: Copy) -> None:
        status = copy.facts.status
        wanted = (status, copy.facts.end_ms if status.is_terminal else None)
        if copy.status != wanted:
            self._sink.set_status(copy.target, *wanted)
            self._succeeded()
            copy.status = wanted

    def _send_facts(self, copy: Copy, deadline: float) -> bool:
        """Send the parameters, tags and datasets that the sink does not have yet. False when the time is up first."""
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
        return self._send_datasets(copy, deadline)

    def _send_datasets(self, copy: Copy, deadline: float) -> bool:
        fresh = [dataset for dataset in copy.facts.datasets if dataset not in copy.sent_datasets]
        if not fresh:
            return True
        if self._is_late(deadline):
            return False
        try:
            # All of them: those of equal content are one there, with the splits of each.
            self._sink.log_datasets(copy.target, copy.facts.datasets)
            self._succeeded()
        except SinkRefused as error:
            self._last_error = str(error)
            logger.warning("mirror %s leaves out datasets: %s", self._sink.name, error, extra={"run": copy.facts.id})
        copy.sent_datasets.update(fresh)
        return True

    def _send_files(self, copy: Copy, deadline: float) -> Progress:
        """Send the files that the sink does not have, one by one. Last of all: no point or end waits for a file."""
        if not copy.target.takes_files or copy.attempt is not None:
            return Progress.done
        progress, before = Progress.done, dict(copy.files)
        for file in self._sink.files(copy.facts):
            if file.mark in (copy.files.get(file.path), copy.failed_files.get(file.path)):
                continue
            if self._clock.monotonic() < self._no_files_until:
                progress = Progress.waiting
                break
            if self._is_late(deadline):
                progress = Progress.more
                break
            if not self._send_file(copy, file):
                progress = Progress.waiting
                break
        if copy.files != before:
            self._save(copy)
        return progress

    def _send_file(self, copy: Copy, file: File) -> bool:
        """False when it is to be tried again after a pause: the sink takes other things, but not this now. A sink that
        takes nothing raises SinkUnavailable.
        """
        try:
            self._sink.upload(copy.target, file)
        except SinkRefused as error:
            why = error.why
        except SinkUnavailable as error:
            self._sink.ping()
            self._no_files_until = self._clock.monotonic() + self._config.aside
            copy.file_troubles += 1
            if copy.file_troubles % FILE_TRIES:
                return False
            why = error.why
        else:
            self._succeeded()
            copy.files[file.path] = file.mark
            return True
        copy.failed_files[file.path] = file.mark
        self._last_error = f"{file.path}: {why}"
        logger.info(
            "mirror %s has no copy of %s, only a link: %s", self._sink.name, file.path, why,
            extra={"run": copy.facts.id},
        )  # fmt: skip
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

    def _read(self, run: str, copy: Copy) -> tuple[list[ChunkRow], bool]:
        """The next chunks, enough for some requests of few keys and many steps; and whether these are all."""
        limit = self._chunks_per_read
        chunks = self._feed.chunks_after(run, copy.position, limit=limit)
        points, is_all = sum(len(chunk.steps) for chunk in chunks), len(chunks) < limit
        if points > 20_000:
            self._chunks_per_read = max(1, limit // 2)
        elif points < 5_000 and not is_all:
            self._chunks_per_read = min(4096, limit * 2)
        return chunks, is_all

    def _send_pending(self, copy: Copy, deadline: float) -> bool:
        """Send what is chosen and move the cursor. False when the time is up first."""
        while copy.pending:
            if self._is_late(deadline):
                return False
            part = head(copy.pending, self._points_per_request)
            self._send(copy, part)
            drop(copy.pending, sum(map(len, part)))
        if copy.pending_position is None:
            return True
        if copy.tags_due and not self._send_facts(copy, deadline):
            return False
        self._save(copy, copy.pending_position)
        copy.pending_position = None
        return not self._is_late(deadline)

    def _send(self, copy: Copy, series: Sequence[Series]) -> None:
        """One request. What the sink refuses is cut in halves until the bad point is alone; it is left out and
        tagged.
        """
        count = sum(map(len, series))
        try:
            self._sink.log_metrics(copy.target, series)
        except SinkRefused as error:
            if count > 1:
                rest = deque(series)
                self._send(copy, head(rest, count // 2))
                drop(rest, count // 2)
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

    def lag(self) -> SinkLag:
        """How far the sink is behind. Reads the feed: raises `UserError` when that is not there."""
        return lag_of(self._feed, self._sink.name)

    def health(self) -> dict[str, Any]:
        """Small and plain, for `orc status`. Never raises."""
        now = self._clock.monotonic()
        try:
            lag: SinkLag | None = self.lag()
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
            "aside": self._turns.aside,
            "last_error": self._last_error,
        }


def lag_of(feed: Feed, sink: str) -> SinkLag:
    """How far a sink is behind, from the feed alone: any process may ask. One that never ran has all to copy."""
    found = next((lag for lag in feed.sink_lags() if lag.sink == sink), None)
    if found is not None:
        return found
    runs = len(feed.changed_runs().runs)
    return SinkLag(sink=sink, points=0, seconds=0.0, runs=runs, state="", error="", updated=0.0)


# -- pure parts -------------------------------------------------------------------------------------------------------


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


def _changes(wanted: Mapping[str, str], sent: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if sent.get(name) != value}
