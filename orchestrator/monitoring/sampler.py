"""Records what the machine does as `system/…` of the runs on it. A thread of whoever ships the machine's spools."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.backends.nvml import GpuReading, Gpus, open_gpus
from orchestrator.clock import Clock, SystemClock
from orchestrator.monitoring.host import Host
from orchestrator.monitoring.samples import Reading, energy, gpu_values, gpus_of, unit, values
from orchestrator.records import Fact, FactKind, Stream, WhenFull
from orchestrator.tracking.spool import (
    MEMBER,
    SAMPLER,
    Owner,
    SpoolReader,
    SpoolUnusable,
    SpoolWriter,
    spools,
)
from orchestrator.tracking.spool_layout import PAGE_POINTS, segment_of, segment_start

logger = logging.getLogger(__name__)

AttemptId = tuple[str, int]

INTERVAL = 10.0
"""Seconds between two samples."""
LOOK = 1.0
"""Seconds between two looks at who is there; also from the appearance of a run to its first sample."""
MOST_RUNS = 64
"""Runs that are sampled at once; each of their ranks here gets a spool for it."""
_SPOOL_BYTES = 64 << 20
_LAST_POINTS = 64
"""Points of a rank among which its step is looked for: an epoch's summary may stand at a step of its own."""
_UNSURE = 100_000_000
"""Nanoseconds in which a directory may change again without showing it."""


@dataclass(slots=True)
class _Producer:
    """A process of a run, by its spool."""

    spool: SpoolReader
    made: int
    """Nanoseconds since 1970."""
    is_dead: bool = False
    """The lock of its spool is free: nobody takes it again."""

    @property
    def owner(self) -> Owner:
        return self.spool.owner

    def is_alive(self) -> bool:
        self.is_dead = self.is_dead or not self.spool.is_owned()
        return not self.is_dead

    def last_step(self) -> int | None:
        """The highest of the points that it logged last; None if there is none, or it cannot be read."""
        with contextlib.suppress(OSError, SpoolUnusable):
            count = self.spool.logged(Stream.points)
            # Not from before the newest segment: what is there may be committed and removed, which reads as damage.
            segment = segment_of(max(count - 1, 0) // PAGE_POINTS)
            after = max(count - _LAST_POINTS, segment_start(segment) * PAGE_POINTS)
            batch = self.spool.next_batch(Stream.points, after, _LAST_POINTS)
            self.spool.rest()
            return None if batch is None else int(batch.points()["step"].max())
        return None


@dataclass(slots=True)
class _Attempt:
    """What is sampled: one attempt of a run, as far as it is on this machine."""

    producers: list[_Producer] = field(default_factory=list)
    node_rank: int = 1 << 30
    """The lowest rank here, which has the values of the machine."""
    step: int | None = None
    """The highest that was seen."""
    gpus: frozenset[int] = frozenset()
    """Those that it was last seen on."""
    joules: dict[int, float] = field(default_factory=dict)
    """Of each GPU, used and not recorded yet."""
    writers: dict[int, SpoolWriter] = field(default_factory=dict)
    is_given_up: bool = False
    """There was no room for its spool."""

    def is_alive(self) -> bool:
        self.producers = [producer for producer in self.producers if producer.is_alive()]
        return bool(self.producers)

    def processes(self) -> dict[int, int]:
        """rank -> pid. A rank's forked children log, too: its first spool is its own."""
        found: dict[int, int] = {}
        for producer in sorted(self.producers, key=lambda each: each.made):
            found.setdefault(producer.owner.rank, producer.owner.pid)
        return found


class SystemSampler:
    """Samples the machine while runs are on it, every `interval` seconds; a run's first sample comes a second after it.

    Promises: for each attempt with a living rank here, and only so long, there is one producer per rank in the same
    spool directory, marked as a sampler's, so that nobody takes it for a sign of life. Its points stand at the step
    that the run was at, 0 before its first; of a later attempt nothing is recorded before it logs: it may go on at any
    step, and points at 0 would take the place of all that the attempts before it have. What a GPU uses is divided
    equally among the attempts that are on it, from look to look until they leave: together they have what it used. Only
    while `is_my_turn`: one process samples a machine. After a crash the next one goes on. One thread calls `step` or
    `run`.
    """

    def __init__(
        self,
        root: Path,
        *,
        interval: float = INTERVAL,
        is_my_turn: Callable[[], bool] = lambda: True,
        clock: Clock | None = None,
        host: Host | None = None,
        gpus: Callable[[], Gpus | None] = open_gpus,
    ) -> None:
        self._root, self._interval, self._is_my_turn = root, interval, is_my_turn
        self._clock = clock or SystemClock()
        self._host = host or Host(root)
        self._open_gpus = gpus
        self._gpus: Gpus | None = None
        self._has_asked_for_gpus = False
        self._made: dict[str, int] = {}
        """Names of spools, and when they were made."""
        self._others: set[str] = set()
        """Of those that are dead, or nobody to sample."""
        self._opened: dict[str, _Producer] = {}
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._seen_at = 0
        """The root's time of change at the last look that saw everything."""
        self._look_at = self._sample_at = 0.0
        self._before: Reading | None = None
        self._processes_before: dict[int, Reading] = {}
        self._gpus_read: dict[int, GpuReading] = {}
        self._charged_at = -1.0
        self._declared: set[str] = set()
        self._has_said_most = self._has_failed = False
        self._stop = threading.Event()

    def run(self) -> None:
        while not self._stop.wait(LOOK):
            try:
                self.step(self._clock.monotonic())
            except Exception:
                # Training does not depend on it: said once, tried again.
                if not self._has_failed:
                    logger.exception("this machine cannot be sampled now; trying again")
                self._has_failed = True
        self._leave(list(self._attempts))

    def stop(self) -> None:
        self._stop.set()

    def step(self, now: float) -> None:
        """One look at who is there, and a sample if one is due. `now` is monotonic."""
        if not self._is_my_turn():
            self._leave(list(self._attempts))
            self._seen_at = 0
            return
        self._look(now)
        self._leave([attempt for attempt, known in self._attempts.items() if not known.is_alive()])
        if not self._attempts:
            self._before = None
            return
        if self._before is None:
            self._before = self._host.read(now)  # rates need a beginning
        if now >= self._sample_at:
            self._sample(now)
            self._sample_at = now + self._interval

    # -- who is there

    def _look(self, now: float) -> None:
        changed = self._root.stat().st_mtime_ns
        if now < self._look_at or changed == self._seen_at:
            return
        began, looked_at = time.perf_counter(), time.time_ns()
        there = {path.name for path in spools(self._root)}
        self._made = {name: made for name, made in self._made.items() if name in there}
        self._others &= there
        for name in there - self._made.keys() - self._others:
            with contextlib.suppress(OSError):
                self._made[name] = (self._root / name / "owner").stat().st_mtime_ns
        self._choose(now)
        self._seen_at = changed if looked_at - changed > _UNSURE else 0
        # With very many producers a look takes time: at most a twentieth of one CPU.
        self._look_at = now + 20 * (time.perf_counter() - began)

    def _choose(self, now: float) -> None:
        """The newest attempts with a living rank. Only of these the spools are opened."""
        opened: dict[str, _Producer] = {}
        chosen: dict[AttemptId, list[_Producer]] = {}
        for name in sorted(self._made, key=self._made.__getitem__, reverse=True):
            producer = self._opened.get(name) or _producer(self._root / name, self._made[name])
            if producer is None or not producer.is_alive():
                del self._made[name]
                self._others.add(name)
                continue
            attempt = (producer.owner.run, producer.owner.attempt)
            if attempt not in chosen and len(chosen) == MOST_RUNS:
                if not self._has_said_most:
                    logger.info("more than %d runs are on this machine: the newest are sampled", MOST_RUNS)
                self._has_said_most = True
                break
            opened[name] = producer
            chosen.setdefault(attempt, []).append(producer)
        self._opened = opened
        self._leave(self._attempts.keys() - chosen.keys())
        for attempt, producers in chosen.items():
            if attempt in self._attempts:
                self._attempts[attempt].producers = producers
            else:
                self._meet(attempt, producers, now)

    def _meet(self, attempt: AttemptId, producers: list[_Producer], now: float) -> None:
        self._sample_at = min(self._sample_at, now + LOOK) if self._attempts else now + LOOK
        self._charge(now)
        known = self._attempts[attempt] = _Attempt(producers=producers)
        processes = known.processes()
        known.node_rank = min(processes)
        for pid in processes.values():
            reading = self._host.process(pid, now)
            if reading is not None:
                self._processes_before.setdefault(pid, reading)

    def _leave(self, attempts: Iterable[AttemptId]) -> None:
        leaving = list(attempts)
        if leaving:
            self._charge(self._clock.monotonic())
        for attempt in leaving:
            known = self._attempts.pop(attempt)
            self._record_rest(attempt, known)
            for writer in known.writers.values():
                writer.close()

    # -- what is recorded

    def _sample(self, now: float) -> None:
        host = self._host.read(now)
        self._charge(now)
        of_host = values(host, self._before)
        of_process = self._of_processes(now)
        for (run, attempt), known in self._attempts.items():
            processes = known.processes()
            known.node_rank = min(known.node_rank, *processes)
            steps = [step for producer in known.producers if (step := producer.last_step()) is not None]
            if known.step is not None:
                steps.append(known.step)
            if not steps and attempt > 1:
                continue
            known.step = max(steps, default=None)
            recorded = {rank: dict(of_process.get(pid, {})) for rank, pid in processes.items()}
            of_gpus: dict[str, float] = {}
            for index in sorted(known.gpus & self._gpus_read.keys()):
                of_gpus |= gpu_values(self._gpus_read[index], known.joules.pop(index, None))
            recorded[known.node_rank] = {**of_host, **of_gpus, **recorded.get(known.node_rank, {})}
            for rank, points in recorded.items():
                if points and not known.is_given_up:
                    self._record_safely(known, Owner(run=run, attempt=attempt, rank=rank), points)
        self._before = host

    def _charge(self, now: float) -> None:
        """Divides what the GPUs used since the last time among the attempts that were there, before one comes or
        goes."""
        if now == self._charged_at:
            return
        self._charged_at = now
        before, self._gpus_read = self._gpus_read, self._read_gpus(now)
        on: dict[int, list[_Attempt]] = {}
        for known in self._attempts.values():
            pids = known.processes().values() if known.is_alive() else ()
            if pids or not known.gpus:  # whose processes are gone was where it was
                known.gpus = frozenset(gpu.index for gpu in gpus_of(list(self._gpus_read.values()), pids))
            for index in known.gpus:
                on.setdefault(index, []).append(known)
        for index, gpu in self._gpus_read.items():
            joules = energy(gpu, before[index]) if index in before else None
            if joules is None:
                continue
            for known in on.get(index, ()):
                known.joules[index] = known.joules.get(index, 0.0) + joules / len(on[index])

    def _record_rest(self, attempt: AttemptId, known: _Attempt) -> None:
        """What it used since its last values. An attempt shorter than the first sample has nothing else."""
        run, number = attempt
        rest = {f"system/gpu_{index}/energy_joules": joules for index, joules in sorted(known.joules.items())}
        if rest and not known.is_given_up and (known.step is not None or number == 1):
            self._record_safely(known, Owner(run=run, attempt=number, rank=known.node_rank), rest)

    def _of_processes(self, now: float) -> dict[int, dict[str, float]]:
        """By pid. One that logs for several ranks (a callback of a trainer, say) is no rank's process."""
        ranks = {
            (attempt, rank): pid
            for attempt, known in self._attempts.items()
            for rank, pid in known.processes().items()
        }  # fmt: skip
        alone = [pid for pid, count in Counter(ranks.values()).items() if count == 1]
        readings = {pid: reading for pid in alone if (reading := self._host.process(pid, now)) is not None}
        found = {pid: values(reading, self._processes_before.get(pid)) for pid, reading in readings.items()}
        self._processes_before = readings
        self._host.forget_others(readings)
        return found

    def _record_safely(self, known: _Attempt, owner: Owner, points: Mapping[str, float]) -> None:
        try:
            self._record(known, owner, points)
        except (OSError, SpoolUnusable) as error:
            known.is_given_up = True
            logger.warning("run %s is not sampled any more: %s", owner.run, error)

    def _record(self, known: _Attempt, owner: Owner, points: Mapping[str, float]) -> None:
        writer = known.writers.get(owner.rank)
        if writer is None:
            own = Owner(
                run=owner.run, attempt=owner.attempt, rank=owner.rank, pid=os.getpid(), host=socket.gethostname(),
                role=SAMPLER,
            )  # fmt: skip
            writer = known.writers[owner.rank] = SpoolWriter(
                self._root, own, max_bytes=_SPOOL_BYTES, when_full=WhenFull.gap
            )
        at = self._clock.now()
        for key, value in points.items():
            if key not in self._declared:
                self._declared.add(key)
                writer.append_fact(Fact(kind=FactKind.metric, at=at, data={"name": key, "unit": unit(key)}))
            if key in writer.keys or writer.add_key(key, known.step or 0):
                writer.append(writer.keys[key], known.step or 0, at, value)

    def _read_gpus(self, now: float) -> dict[int, GpuReading]:
        if not self._has_asked_for_gpus:
            self._has_asked_for_gpus = True
            self._gpus = self._open_gpus()
        return {gpu.index: gpu for gpu in self._gpus.read(now)} if self._gpus is not None else {}


def _producer(path: Path, made: int) -> _Producer | None:
    """None for what is not to be sampled: a driver, who records for others or samples itself, or no spool at all."""
    with contextlib.suppress(OSError, SpoolUnusable):
        spool = SpoolReader(path)
        if spool.owner.role == MEMBER and spool.owner.rank >= 0:
            return _Producer(spool=spool, made=made)
    return None
