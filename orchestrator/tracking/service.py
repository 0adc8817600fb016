"""The tracker: takes numbered batches, makes them durable, acknowledges, commits; knows which runs are alive.

A plain class that one process runs (`actors/tracker.py` in a cluster). All state that matters is in its log and in
PostgreSQL: it may be killed and started again at any time.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.records import Ack, BadFrame, Batch, FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.store import open_store
from orchestrator.store.errors import Gap
from orchestrator.tracking.committer import Committer, Watermarks
from orchestrator.tracking.delivery import Verdict, admit
from orchestrator.tracking.leases import AttemptId, Leases
from orchestrator.tracking.live import LiveValues
from orchestrator.tracking.wal import WriteAheadLog

logger = logging.getLogger(__name__)

VOUCH = 5.0
"""Seconds between two words to other trackers on the same database that our attempts are looked after."""
STOOD_STILL = 5.0
"""A pause of a loop that is longer than asked for by so many seconds was none of ours."""
FIND = 10.0
"""Seconds between two looks for attempts that nobody here has heard of."""


class TrackerService:
    """Methods may be called from many threads; none but `open_run` and `cancel` needs PostgreSQL to be up.

    `start` runs the committer and the leases in threads of their own; without it, call `commit_step` and `lease_step`.
    """

    def __init__(
        self,
        log_directory: str | os.PathLike[str],
        database_url: str,
        *,
        spool_directory: str = "",
        lease: float = 15.0,
        log_wait: float = 0.0,
        clock: Clock | None = None,
        exit: Callable[[int], Any] = os._exit,
    ) -> None:
        self._clock = clock or SystemClock()
        self._exit = exit
        self._log = WriteAheadLog(Path(log_directory), wait=log_wait)
        self._store = open_store(database_url)
        self._spool_directory = spool_directory
        self._ingest_lock = threading.Lock()
        self._learning = threading.Lock()
        """Held by the one thread that asks the database about producers."""
        self._accepted: dict[tuple[str, Stream], int] = {}
        self._committed: dict[tuple[str, Stream], int] = {}
        self._leases = Leases(lease)
        self._others: dict[AttemptId, float] = {}
        """Attempts whose driver has not spoken to this process, with the time of the last word that some tracker gave
        for them: left by the one before us, or looked after by another one on the same database."""
        self._ended: set[AttemptId] = set()
        """Their end is accepted and perhaps not committed yet."""
        self._find_at = self._vouch_at = -math.inf
        self._stopping: set[str] = set()
        self._live = LiveValues()
        self._committer = Committer(self._log, self._store, self._on_commit, self._on_gap)
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._refused = 0
        self._recover()

    # -- life

    def start(self) -> None:
        for name, step, pause in (("committer", self.commit_step, 0.02), ("leases", self.lease_step, 1.0)):
            thread = threading.Thread(target=self._repeat, args=(name, step, pause), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=10)
        self._log.close()
        self._store.close()

    def _repeat(self, name: str, step: Callable[[], bool], pause: float) -> None:
        while not self._stopped.is_set():
            try:
                moved = step()
            except Exception:
                # A defect must not end the loop: what is accepted stays in the log and is tried again.
                logger.exception("the tracker's %s failed; trying again", name)
                moved, wait = False, 1.0
            else:
                wait = pause if not self._committer.failure else max(pause, 0.5)
            if not moved:
                self._pause(wait)

    def _pause(self, seconds: float) -> None:
        """A pause that took far too long says that this process or its host stood still. Nobody could be heard
        meanwhile, so all leases begin anew."""
        before = self._clock.monotonic()
        self._stopped.wait(seconds)
        now = self._clock.monotonic()
        if now - before > seconds + STOOD_STILL:
            for attempt in self._leases.remaining(now):
                self._leases.renew(attempt, now)

    def _recover(self) -> None:
        """Everything still in the log counts as accepted."""
        for _, frame in self._log.read(self._log.start(), 1 << 62):
            try:
                batch = Batch.decode(frame)
            except BadFrame:
                continue
            key = (batch.producer, batch.stream)
            known = self._accepted.get(key, batch.first - 1)
            # After a hole only what is before it counts: the producer sends the rest again.
            if batch.first <= known + 1:
                self._accepted[key] = max(known, batch.last)

    # -- batches

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        """Takes encoded batches. When it returns, everything acknowledged as accepted is fsynced.

        A batch that leaves a gap is refused: the ack's `accepted` tells from where to send again. Bytes that are no
        batch are counted and left out. A disk that cannot sync ends the process: its pages' state is unknown.
        """
        batches = []
        for frame in frames:
            try:
                batches.append(Batch.decode(frame))
            except BadFrame as error:
                self._refused += 1
                logger.error("refused a batch: %s", error)
        self._learn([batch.producer for batch in batches])
        with self._ingest_lock:
            taken = self._accept(batches)
        for batch in taken:
            self._watch(batch)
        acks = [self._ack(batch.producer, batch.stream, (batch.run, batch.attempt)) for batch in batches]
        return [ack for ack in acks if ack is not None]

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        """Where each (producer, run, attempt) stands, both streams."""
        self._learn([producer for producer, _, _ in producers])
        acks = [
            self._ack(producer, stream, (run, attempt)) for producer, run, attempt in producers for stream in Stream
        ]
        return [ack for ack in acks if ack is not None]

    def _accept(self, batches: Sequence[Batch]) -> list[Batch]:
        taken: list[Batch] = []
        # None: a new producer, of which the database has not told yet whether it has something of it.
        accepted = {(b.producer, b.stream): self._accepted.get((b.producer, b.stream)) for b in batches}
        try:
            for batch in batches:
                key = (batch.producer, batch.stream)
                known = accepted[key]
                if known is None:
                    continue
                decision = admit(batch, known)
                if decision.verdict is Verdict.accept and decision.batch is not None:
                    self._log.append(decision.batch.encode())
                    accepted[key] = decision.batch.last
                    taken.append(decision.batch)
        except OSError as error:
            # Most likely a full disk. Nothing of this call counts; the producers keep it and come again.
            logger.error("the tracker's log cannot be written (%s); nothing is acknowledged until it can", error)
            self._log.discard_unsynced()
            return []
        if taken:
            try:
                self._log.sync()
            except OSError as error:
                logger.critical("the tracker's log cannot be synced (%s); exiting", error)
                self._exit(1)
                raise
            self._accepted.update({key: seq for key, seq in accepted.items() if seq is not None})
        return taken

    def _learn(self, producers: Sequence[str]) -> None:
        """Asks the database about producers that this process has not seen commit yet (new ones, or all after a
        restart).

        Never under the ingest lock, and by one thread at a time: a database that hangs must not hold up what needs
        none. Who finds another thread asking goes on without; the agent comes again.
        """
        unknown = [producer for producer in producers if not self._knows(producer)]
        if not unknown or not self._learning.acquire(blocking=False):
            return
        try:
            stored = self._store.watermarks(unknown)
        except UserError:
            return
        finally:
            self._learning.release()
        with self._ingest_lock:
            for key in ((producer, stream) for producer in unknown for stream in Stream):
                self._committed[key] = max(self._committed.get(key, 0), stored.get(key, 0))
                # A log that was lost or cut counts for nothing against what is committed, and the other way round.
                self._accepted[key] = max(self._accepted.get(key, 0), self._committed[key])

    def _knows(self, producer: str) -> bool:
        # Of both streams: the log and a commit may tell of one alone.
        return all((producer, stream) in known for stream in Stream for known in (self._accepted, self._committed))

    def _ack(self, producer: str, stream: Stream, attempt: AttemptId) -> Ack | None:
        key = (producer, stream)
        accepted = self._accepted.get(key)
        if accepted is None:
            return None
        committed = min(self._committed.get(key, 0), accepted)
        stop = self._should_stop(attempt)
        return Ack(producer=producer, stream=stream, accepted=accepted, committed=committed, stop=stop)

    def _should_stop(self, attempt: AttemptId) -> bool:
        """The run was asked to stop, or a later attempt took this one's place: two must not train at once."""
        return attempt[0] in self._stopping or self._leases.is_superseded(attempt)

    def _watch(self, batch: Batch) -> None:
        if batch.stream is Stream.points:
            self._live.take(batch)
            return
        for fact in batch.facts():
            if fact.kind is FactKind.status and RunStatus(fact.data["status"]).is_terminal:
                self._ended.add((batch.run, batch.attempt))
                self._forget((batch.run, batch.attempt))

    def _on_commit(self, watermarks: Watermarks) -> None:
        self._committed.update(watermarks)

    def _on_gap(self, gaps: Sequence[Gap]) -> None:
        # Nothing of these producers was committed, of the other stream neither: the database says where both stand.
        with self._ingest_lock:
            for key in ((gap.producer, stream) for gap in gaps for stream in Stream):
                self._accepted.pop(key, None)
                self._committed.pop(key, None)

    def commit_step(self) -> bool:
        """Moves the next piece of the log into PostgreSQL. False if there is nothing to do, or no database."""
        return self._committer.step()

    # -- runs

    def open_run(self, spec: RunSpec) -> RunTicket:
        """Creates the run, or its next attempt. Raises ServiceUnavailable, NotFound, IllegalTransition."""
        ticket = self._store.open_attempt(spec, now=self._clock.now(), lease_seconds=spec.lease)
        self._stopping.discard(ticket.run)
        self._leases.begin((ticket.run, ticket.attempt), self._clock.monotonic(), spec.lease)
        self._others.pop((ticket.run, ticket.attempt), None)
        return ticket

    def heartbeat(self, run: str, attempt: int) -> bool:
        """The attempt's driver is alive. True if the run should stop."""
        if self._leases.holds((run, attempt)):
            self._others.pop((run, attempt), None)
            self._leases.renew((run, attempt), self._clock.monotonic())
        return self._should_stop((run, attempt))

    def cancel(self, run: str, user: str = "") -> None:
        """Asks a run to stop: its ranks learn of it with the next acknowledgement, the driver with its heartbeat."""
        self._stopping.add(run)
        self._store.request_cancel(run, user=user, now=self._clock.now())

    def lease_step(self) -> bool:
        """Ends attempts that gave no sign of life, looks for requests to stop. Always False: it pauses between."""
        now = self._clock.monotonic()
        try:
            self._find(now)
            running = {run for run, _ in self._leases.remaining(now)}
            if running:
                self._stopping |= self._store.cancel_requested(sorted(running))
            self._judge(now)
            self._vouch(now)
        except ServiceUnavailable:
            # Verdicts wait for the database; nothing else does. Nobody could vouch for an attempt meanwhile, so that
            # silence proves nothing.
            for attempt in list(self._others):
                self._leases.renew(attempt, now)
        return False

    def _find(self, now: float) -> None:
        """Attempts that run and were opened elsewhere: their driver may come here, or some tracker vouches for them."""
        if now < self._find_at:
            return
        vouched, running = self._store.vouched(), self._store.running_attempts()
        self._find_at = now + FIND
        self._ended &= running.keys()
        for attempt, seconds in running.items():
            if not self._leases.holds(attempt) and attempt not in self._ended:
                self._others[attempt] = vouched.get(attempt, 0.0)
                self._leases.begin(attempt, now, max(seconds or 0.0, 3 * VOUCH))

    def _judge(self, now: float) -> None:
        expired = self._leases.expired(now)
        vouched = self._store.vouched() if any(attempt in self._others for attempt in expired) else {}
        for attempt in expired:
            if attempt in self._others and attempt not in vouched:
                self._forget(attempt)  # it ended, and another tracker was told
            elif attempt in self._others and vouched[attempt] != self._others[attempt]:
                self._others[attempt] = vouched[attempt]
                self._leases.renew(attempt, now)
            else:
                self._crash(attempt)

    def _vouch(self, now: float) -> None:
        if now < self._vouch_at:
            return
        ours = [attempt for attempt in self._leases.remaining(now) if attempt not in self._others]
        if ours or self._ended:
            self._store.vouch([*ours, *self._ended], now=self._clock.now())
        self._vouch_at = now + VOUCH

    def _forget(self, attempt: AttemptId) -> None:
        self._leases.end(attempt)
        self._others.pop(attempt, None)

    def _crash(self, attempt: AttemptId) -> None:
        run, number = attempt
        reason = (
            f"no sign of life from its driver for {self._leases.length(attempt):.0f} s: the driver or its host is gone"
        )
        try:
            self._store.transition(run, number, RunStatus.crashed, reason=reason, now=self._clock.now())
            logger.warning("run %s attempt %d is CRASHED: %s", run, number, reason)
        except ServiceUnavailable:
            raise
        except UserError as error:
            logger.info("run %s attempt %d had ended already: %s", run, number, error)
        self._forget(attempt)

    def live(self, run: str) -> dict[str, Any]:
        """Newest values of a run; see LiveValues.of."""
        return self._live.of(run)

    # -- about itself

    def describe(self) -> dict[str, Any]:
        """What others need to know: where spools are, which process this is."""
        return {"pid": os.getpid(), "spool_directory": self._spool_directory}

    def health(self) -> Mapping[str, Any]:
        return {
            "pid": os.getpid(),
            "running": len(self._leases.remaining(0.0).keys() - self._others.keys()),
            "producers": len({producer for producer, _ in self._accepted}),
            "log_bytes": self._log.size_bytes(),
            "lag_bytes": self._committer.lag_bytes,
            "database": self._committer.failure or "ok",
            "refused_batches": self._refused,
            "log_damaged_bytes": self._log.damaged_bytes,
            "position": asdict(self._log.synced),
        }
