"""The tracker: takes numbered batches, makes them durable, acknowledges, commits; knows which runs are alive.

A plain class that one process runs (`actors/tracker.py` in a cluster). All state that matters is in its log and in
PostgreSQL: it may be killed and started again at any time.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.alerts.service import AlertService
from orchestrator.backends import open_live
from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.records import Ack, BadFrame, Batch, FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.store import open_store
from orchestrator.store.errors import Gap
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep
from orchestrator.tracking.admission import Admission, Mark
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.committer import Committer, Piece, Watermarks
from orchestrator.tracking.leases import AttemptId, Leases
from orchestrator.tracking.live import LivePublisher, LiveValues
from orchestrator.tracking.progress import Progress
from orchestrator.tracking.wal import SyncFailed, WriteAheadLog

logger = logging.getLogger(__name__)

VOUCH = 5.0
"""Seconds between two words to other trackers on the same database that our attempts are looked after."""
STOOD_STILL = 5.0
"""A pause of a loop that is longer than asked for by so many seconds was none of ours."""
SWITCH = 0.0005
"""Seconds after which a thread of the process may take its turn."""
TIDY = 60.0
"""Seconds between two looks for producers that need not be remembered."""
TOLD = 0.05
"""Seconds for which a push waits for what another thread asks the database."""
COLLECT = 1.0
"""Seconds between two small commits while points trickle in: a transaction costs about the same for few as for many,
and the machine has something better to do. Facts do not wait, nor does much."""
COLLECT_POINTS = 1 << 15
FIND = 10.0
"""Seconds between two looks for attempts that nobody here has heard of."""


class TrackerService:
    """Methods may be called from many threads; none but those that open or cancel a run, or are of a sweep, needs
    PostgreSQL to be up.

    `start` runs the committer and the leases in threads of their own; without it, call `commit_step` and `lease_step`.
    `circuits` are those of the process, see circuits.py.
    """

    def __init__(
        self,
        log_directory: str | os.PathLike[str],
        database_url: str,
        *,
        spool_directory: str = "",
        lease: float = 15.0,
        log_wait: float = 0.0,
        redis_url: str = "",
        circuits: Circuits | None = None,
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
        self._told = threading.Condition()
        self._wanted: set[str] = set()
        """Producers about which it is to be asked."""
        self._admission = Admission()
        self._progress = Progress()
        self._leases = Leases(lease)
        self._name = uuid.uuid4().hex
        """Under which this process vouches for attempts."""
        self._others: dict[AttemptId, int] = {}
        """Attempts whose driver has not spoken to this process, with the signs of life that their tracker had given:
        left by the one before us, or looked after by another one on the same database."""
        self._claims: set[AttemptId] = set()
        """Attempts that are looked after here since a moment, and the database does not know it yet."""
        self._ended: set[AttemptId] = set()
        """Their end is accepted and perhaps not committed yet."""
        self._find_at = self._vouch_at = self._tidy_at = -math.inf
        self._stopping: set[str] = set()
        self._halting: set[AttemptId] = set()
        self._begun: set[str] = set()
        """Runs whose attempts began since stop requests were last asked for."""
        self._live = LiveValues()
        self.circuits = circuits or Circuits("tracker", clock=self._clock)
        lost = "PostgreSQL does not answer, the tracker's log keeps everything until it does"
        self._commits, self._verdicts = (
            self.circuits.link(
                "postgres", lost=lost, back="PostgreSQL answers again", breaker=CircuitBreaker(threshold=1)
            )
            for _ in range(2)
        )
        self._publisher: LivePublisher | None = None
        if redis_url:
            self._publisher = LivePublisher(self._live, lambda: open_live(redis_url), circuits=self.circuits)
        log = Path(log_directory)
        self.alerts = AlertService(open_store(database_url), log.with_name(f"{log.name}-addresses.json"), self._clock)
        self._committer = Committer(self._log, self._store, self._on_commit, self._on_gap, self._on_piece)
        self._stopped = threading.Event()
        self._arrived, self._hurries = threading.Event(), threading.Event()
        """Something is accepted; and it should be committed at once."""
        self._threads: list[threading.Thread] = []
        self._refused = self._damaged = 0
        self._is_doubtful = False
        """The log told of more than the database has; see `_mend`."""
        self._full = ""
        """Why the log cannot be written."""
        self._recover()

    # -- life

    def start(self) -> None:
        # The committer computes. Who waits for an acknowledgement must not wait 5 ms for the interpreter each time.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH))
        loops = {
            "committer": self._commit_loop, "leases": self._lease_loop, "alerts": self.alerts.run,
            "outbox": self.alerts.run_outbox,
        }  # fmt: skip
        if self._publisher is not None:
            loops["live"] = self._publisher.run
        for name, loop in loops.items():
            thread = threading.Thread(target=loop, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._stopped.set()
        self._hurries.set()
        self._arrived.set()
        if self._publisher is not None:
            self._publisher.stop()
        self.alerts.stop()
        for thread in self._threads:
            thread.join(timeout=10)
        self._log.close()
        self._store.close()
        self.alerts.close()

    def _commit_loop(self) -> None:
        """Commits what arrives: at once what came after a second of silence, every second what trickles in."""
        while not self._stopped.is_set():
            self._arrived.clear()
            self._hurries.clear()
            began = self._clock.monotonic()
            if self._safely("committer", self.commit_step):
                if self._progress.lag_points() < COLLECT_POINTS:
                    self._hurries.wait(max(began + COLLECT - self._clock.monotonic(), 0.0))
            elif self._committer.is_done:
                self._arrived.wait(COLLECT)
            else:
                self._stopped.wait(0.5)  # the database is away

    def _lease_loop(self) -> None:
        while not self._stopped.is_set():
            self._safely("leases", self.lease_step)
            self._pause(1.0)

    def _safely(self, name: str, step: Callable[[], bool]) -> bool:
        """What `step` gives. A defect must not end the loop: what is accepted stays in the log and is tried again."""
        try:
            return step()
        except Exception:
            logger.exception("the tracker's %s failed; trying again", name)
            self._stopped.wait(1.0)
            return False

    def _pause(self, seconds: float) -> None:
        """A pause that took far too long says that this process or its host stood still. Nobody could be heard
        meanwhile, so all leases begin anew."""
        before = self._clock.monotonic()
        self._stopped.wait(seconds)
        now = self._clock.monotonic()
        if now - before > seconds + STOOD_STILL:
            self._leases.renew_all(now)

    def _recover(self) -> None:
        """Everything still in the log counts as accepted."""
        now, waiting = self._clock.monotonic(), 0
        for position, frame in self._log.read(self._log.start(), 1 << 62):
            try:
                batch = Batch.decode(frame)
            except BadFrame:
                continue
            self._admission.recovered(batch, now)
            if batch.stream is Stream.facts and _tells_the_end(batch):
                self._ended.add((batch.run, batch.attempt))
            if position > self._committer.position:
                self.alerts.take(batch)
                waiting += batch.count if batch.stream is Stream.points else 0
        self._progress.accepted(waiting, self._log.synced, now)
        self._is_doubtful = len(self._admission) > 0  # what was committed once may be more than the database has now

    # -- batches

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        """Takes encoded batches. When it returns, everything acknowledged as accepted is fsynced; calls at the same
        time share an fsync.

        A batch that leaves a gap is refused: the ack's `accepted` tells from where to send again. Bytes that are no
        batch are counted and left out. A disk that cannot sync ends the process: its pages' state is unknown.
        """
        sent = self._decoded(frames)
        batches = [batch for batch, _ in sent]
        self._learn([batch.producer for batch in batches])
        with self._ingest_lock:
            taken = self._append(sent)
            # Also what others have written and not synced yet, if it was sent again.
            marks = self._admission.marks(batches)
        if marks:
            self._sync(taken, marks)
        for batch in taken:
            self._watch(batch)
        return self._acks([(batch.producer, batch.stream, (batch.run, batch.attempt)) for batch in batches])

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        """Where each (producer, run, attempt) stands, both streams."""
        names = [producer for producer, _, _ in producers]
        self._learn(names)
        self._admission.heard(names, self._clock.monotonic())
        return self._acks([(name, stream, (run, attempt)) for name, run, attempt in producers for stream in Stream])

    def _decoded(self, frames: Sequence[bytes]) -> list[tuple[Batch, bytes]]:
        sent = []
        for frame in frames:
            try:
                sent.append((Batch.decode(frame), frame))
            except BadFrame as error:
                self._refused += 1
                logger.error("refused a batch: %s", error)
        return sent

    def _append(self, sent: Sequence[tuple[Batch, bytes]]) -> list[Batch]:
        """Writes what is new to the log, under the ingest lock. What does not fit on the disk any more is left out: its
        producers keep it and come again."""
        taken, now = [], self._clock.monotonic()
        try:
            for batch, frame in sent:
                decision = self._admission.decide(batch, now)
                new = decision.batch if decision is not None else None
                if new is None:
                    continue
                self._log.append(frame if new is batch else new.encode())
                self._admission.written(new)
                taken.append(new)
        except SyncFailed as error:
            self._end(error)
        except OSError as error:
            if not self._full:
                logger.error("the tracker's log cannot be written (%s); nothing is accepted until it can", error)
            self._full = str(error)
            return taken
        if taken and self._full:
            logger.info("the tracker's log can be written again")
            self._full = ""
        return taken

    def _sync(self, taken: Sequence[Batch], marks: Sequence[Mark]) -> None:
        try:
            self._log.sync()
        except OSError as error:
            self._end(error)
        points = sum(batch.count for batch in taken if batch.stream is Stream.points)
        with self._ingest_lock:
            self._admission.accepted(marks)
            self._progress.accepted(points, self._log.synced, self._clock.monotonic())
        if self._progress.lag_points() >= COLLECT_POINTS or any(batch.stream is Stream.facts for batch in taken):
            self._hurries.set()
        self._arrived.set()

    def _end(self, error: OSError) -> NoReturn:
        logger.critical("the tracker's log cannot be synced (%s); exiting", error)
        self._exit(1)
        raise error

    def _learn(self, producers: Sequence[str]) -> None:
        """Asks the database about producers of which this process knows nothing (new ones, all after a restart, those
        that were quiet for long).

        Never under the ingest lock, and by one thread at a time: a database that hangs must not hold up what needs
        none. Who finds another thread asking leaves it to that one, and waits for a moment where nothing else is to be
        done; else it goes on without, and the agent comes again.
        """
        unknown = self._admission.unknown(producers)
        if not unknown:
            return
        with self._ingest_lock:
            self._wanted.update(unknown)
        if not self._ask() and len(unknown) == len(set(producers)):
            with self._told:
                self._told.wait_for(lambda: not self._admission.unknown(unknown), timeout=TOLD)

    def _ask(self) -> bool:
        """Until nothing more is wanted. False: another thread is at it."""
        is_asking = False
        while self._learning.acquire(blocking=False):
            is_asking = True
            try:
                with self._ingest_lock:
                    wanted, self._wanted = self._wanted, set()
                    self._admission.asking(wanted)
                if not wanted:
                    break
                stored = self._store.watermarks(wanted)
                with self._ingest_lock:
                    self._is_doubtful |= self._admission.learned(stored, self._clock.monotonic())
            except UserError:
                break
            finally:
                self._learning.release()
            with self._told:
                self._told.notify_all()
        return is_asking

    def _acks(self, asked: Iterable[tuple[str, Stream, AttemptId]]) -> list[Ack]:
        found = (
            self._admission.ack(
                producer,
                stream,
                stop=attempt in self._halting or self._should_stop(attempt),
                watched=self._live.is_watched(attempt[0]),
            )  # fmt: skip
            for producer, stream, attempt in asked
        )
        return [ack for ack in found if ack is not None]

    def _should_stop(self, attempt: AttemptId) -> bool:
        """The run was asked to stop, or a later attempt took this one's place: two must not train at once."""
        return attempt[0] in self._stopping or self._leases.is_superseded(attempt)

    def _watch(self, batch: Batch) -> None:
        self._live.take(batch)
        self.alerts.take(batch)
        if batch.stream is Stream.facts and _tells_the_end(batch):
            attempt = (batch.run, batch.attempt)
            self._ended.add(attempt)
            self._claim(attempt)
            self._forget(attempt)

    def _on_commit(self, watermarks: Watermarks) -> None:
        with self._ingest_lock:
            self._admission.committed(watermarks)

    def _on_gap(self, gaps: Sequence[Gap]) -> None:
        # Nothing of these producers was committed, of the other stream neither: the database says where both stand.
        with self._ingest_lock:
            self._admission.forget({gap.producer for gap in gaps})

    def _on_piece(self, piece: Piece) -> None:
        self._progress.committed(piece.points, piece.position)

    def commit_step(self) -> bool:
        """Moves the next piece of the log into PostgreSQL. False if there is nothing to do, or no database."""
        now = self._clock.monotonic()
        if self._committer.is_done:
            self._progress.empty(now)
            self._mend()
            return False
        is_moved = self._committer.step()
        if self._committer.failure:
            self._commits.failed(self._committer.failure, self._clock.monotonic())
        elif is_moved:
            self._commits.succeeded(self._clock.monotonic())
        return is_moved

    def _mend(self) -> None:
        """Everything in the log is committed, so what is accepted and not committed was damaged there, or the database
        is an older one: it says from where to send again."""
        damaged = self._log.damaged_bytes
        if damaged != self._damaged or self._is_doubtful:
            with self._ingest_lock:
                self._damaged, self._is_doubtful = damaged, False
                self._admission.forget(self._admission.unsettled())

    def _tidy(self, now: float) -> None:
        """Forgets producers that are done, so that memory does not grow with all that ever were."""
        if now < self._tidy_at:
            return
        self._tidy_at = now + TIDY
        quiet = self._admission.quiet(now, self._progress.empty_at)
        with self._ingest_lock:
            self._admission.forget(quiet)

    # -- runs

    def open_run(self, spec: RunSpec) -> RunTicket:
        """Creates the run, or its next attempt. Raises ServiceUnavailable, NotFound, IllegalTransition."""
        spec = self.alerts.prepared(spec)
        ticket = self._store.open_attempt(spec, now=self._clock.now(), lease_seconds=spec.lease)
        self._begin(ticket, spec)
        return ticket

    def open_runs(self, specs: Sequence[RunSpec]) -> list[RunTicket]:
        """`open_run` for many at once: all of them, or none."""
        specs = [self.alerts.prepared(spec) for spec in specs]
        tickets = self._store.open_attempts(specs, now=self._clock.now())
        for ticket, spec in zip(tickets, specs, strict=True):
            self._begin(ticket, spec)
        return tickets

    def _begin(self, ticket: RunTicket, spec: RunSpec) -> None:
        attempt = (ticket.run, ticket.attempt)
        self._begun.add(ticket.run)
        self._stopping.discard(ticket.run)
        self._halting = {each for each in self._halting if each[0] != ticket.run}
        self._leases.begin(attempt, self._clock.monotonic(), spec.lease)
        self._claim(attempt)
        self._live.opened(ticket, spec)
        self.alerts.opened(ticket, spec)

    def heartbeat(self, run: str, attempt: int) -> bool:
        """The attempt's driver is alive. True if the run should stop."""
        (should_stop,) = self.heartbeats([(run, attempt)])
        return should_stop

    def heartbeats(self, attempts: Sequence[AttemptId]) -> list[bool]:
        """`heartbeat` of many drivers at once."""
        now = self._clock.monotonic()
        for attempt in attempts:
            if self._leases.renew(attempt, now) and attempt in self._others:
                self._claim(attempt)
        return [self._should_stop(attempt) for attempt in attempts]

    def cancel(self, run: str, user: str = "") -> None:
        """Asks a run to stop: its ranks learn of it with the next acknowledgement, the driver with its heartbeat."""
        self._stopping = {*self._stopping, run}
        self._store.request_cancel(run, user=user, now=self._clock.now())

    def halt(self, run: str, attempt: int) -> None:
        """Asks the ranks of one attempt to save and return, because its driver has something else in mind for the run.
        Nobody else hears of it, nothing remembers it: the driver asks again until they have returned."""
        self._halting = {*(each for each in self._halting if each[0] != run), (run, attempt)}

    # -- sweeps

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        """Makes `driver` the sweep's only one and gives all that was decided. Raises ServiceUnavailable, NotFound."""
        return self._store.open_sweep(spec, driver)

    def sweep_step(self, step: SweepStep) -> dict[int, RunTicket]:
        """Stores what a sweep's driver decided. What it opens is looked after as what `open_run` opens is, until the
        step that closes it. Sent again it changes nothing. Raises ServiceUnavailable, SweepTaken, NotFound."""
        if any(spec.alerts for _, spec in step.opens):
            step = replace(step, opens=tuple((job, self.alerts.prepared(spec)) for job, spec in step.opens))
        tickets = self._store.sweep_step(step, now=self._clock.now())
        for end in step.closes:
            attempt = (end.run, end.attempt)
            self._forget(attempt)
            self._live.ended(end.run, end.attempt, RunStatus(end.status))
            self.alerts.ended(end.run, end.attempt, RunStatus(end.status), end.reason, end.error)
        for job, spec in step.opens:
            if job in tickets:
                self._begin(tickets[job], spec)
        return tickets

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        return self._store.sweep_poll(sweep, driver)

    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        """Asks a sweep's driver for something; gives the request's id. Raises ServiceUnavailable, NotFound."""
        return self._store.ask_sweep(sweep, kind, details, user)

    def lease_step(self) -> bool:
        """Ends attempts that gave no sign of life, looks for requests to stop. Always False: it pauses between."""
        now = self._clock.monotonic()
        self._progress.look(now)
        self._tidy(now)
        try:
            self._find(now)
            self._begun = set()
            asked = self._store.cancel_requested()
            self._stopping = asked - self._begun  # what began meanwhile is not what was asked to stop
            self._judge(now)
            self._vouch(now)
            self._verdicts.succeeded(self._clock.monotonic())
        except ServiceUnavailable as error:
            self._verdicts.failed(error, self._clock.monotonic())
            # Verdicts wait for the database; nothing else does. Nobody could vouch for an attempt meanwhile, so that
            # silence proves nothing.
            for attempt in list(self._others):
                self._leases.renew(attempt, now)
        finally:
            after = self._clock.monotonic()
            if after - now > STOOD_STILL:
                # The database hung, or this process. Other trackers could not vouch, calls may have waited in line.
                self._leases.renew_all(after)
        return False

    def _find(self, now: float) -> None:
        """Attempts that run and were opened elsewhere: their driver may come here, or some tracker vouches for them."""
        if now < self._find_at:
            return
        vouched = self._store.vouched(other_than=self._name)
        running = self._store.running_attempts(other_than=self._name)
        ended = set(self._ended)
        if ended:
            self._ended -= ended - self._store.still_running(ended)
        self._find_at = now + FIND
        for attempt, seconds in running.items():
            if not self._leases.holds(attempt) and attempt not in self._ended:
                self._others[attempt] = vouched.get(attempt, 0)
                self._leases.begin(attempt, now, max(seconds or 0.0, 3 * VOUCH))

    def _judge(self, now: float) -> None:
        expired = self._leases.expired(now)
        is_asked = any(attempt in self._others for attempt in expired)
        vouched = self._store.vouched(other_than=self._name) if is_asked else {}
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
        claims = set(self._claims)
        self._store.vouch(self._name, claims)
        self._claims -= claims
        self._vouch_at = now + VOUCH

    def _claim(self, attempt: AttemptId) -> None:
        """From now on this tracker looks after it."""
        self._others.pop(attempt, None)
        self._claims.add(attempt)

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
            self._live.ended(run, number, RunStatus.crashed)
            self.alerts.ended(run, number, RunStatus.crashed, reason)
        except ServiceUnavailable:
            raise
        except UserError as error:
            logger.info("run %s attempt %d had ended already: %s", run, number, error)
        self._forget(attempt)

    def live(self, run: str) -> dict[str, Any]:
        """Newest values of a run, see LiveValues.of, and `circuits`: how the services of the stack are; {} for an
        unknown run."""
        found = self._live.of(run)
        return {**found, "circuits": [asdict(state) for state in self.circuits.of_all()]} if found else {}

    # -- about itself

    def describe(self) -> dict[str, Any]:
        """What others need to know: where spools are, which process this is."""
        return {"pid": os.getpid(), "spool_directory": self._spool_directory}

    def health(self) -> Mapping[str, Any]:
        """`lag_*`: what is accepted and not committed. Rates are points per second of the last ten."""
        now = self._clock.monotonic()
        accepted, committed = self._progress.rates(now)
        return {
            "pid": os.getpid(),
            "running": len(self._leases) - len(self._others),
            "producers": len(self._admission),
            "log": self._full or "ok",
            "log_bytes": self._log.size_bytes(),
            "log_damaged_bytes": self._log.damaged_bytes,
            "position": asdict(self._log.synced),
            "lag_bytes": self._committer.lag_bytes,
            "lag_points": self._progress.lag_points(),
            "lag_seconds": self._progress.lag_seconds(now),
            "accepted_per_second": accepted,
            "committed_per_second": committed,
            "database": self._committer.failure or "ok",
            "refused_batches": self._refused,
            "alerts": self.alerts.health(),
            "circuits": self.circuits.describe(),
        }


def _tells_the_end(batch: Batch) -> bool:
    """Whether a batch of facts says that the attempt is over. What cannot be read is the database's to refuse."""
    try:
        return any(
            fact.kind is FactKind.status and RunStatus(fact.data["status"]).is_terminal for fact in batch.facts()
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
