"""Ships the spools of one node to the tracker: those of living producers as they grow, those of dead ones to the end.

Run by the node agent, which outlives the trainers. Two nodes may share a machine, and then its spool directory: one of
their agents ships, the others stand by.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.clock import Clock, SystemClock
from orchestrator.records import POINT, Ack, Batch, Stream
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.spool import (
    DEFAULT_BYTES,
    SEGMENT_POINTS,
    SpoolReader,
    SpoolUnusable,
    prepare_root,
    remove_leftovers,
    spools,
)
from orchestrator.tracking.spool_root import Node

logger = logging.getLogger(__name__)

K = TypeVar("K")


class Tracker(Protocol):
    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        """Gives encoded batches; returns when they are accepted. Raises ConnectionError or TimeoutError."""
        ...

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        """Where the tracker stands with (producer, run, attempt), without sending anything."""
        ...


_NOT_READ = -1
"""A cursor of what was not looked at in this round."""


class _Spool:
    """What the shipper knows of one producer besides its reader."""

    __slots__ = ("cursor", "due", "held_bytes", "pause", "reader", "used_at")

    def __init__(self, reader: SpoolReader) -> None:
        self.reader = reader
        self.cursor = dict.fromkeys(Stream, 0)
        """Up to where it was read in this round."""
        self.pause = self.due = 0.0
        """Seconds between two attempts, and when the next one is due: after pushes that moved nothing."""
        self.held_bytes = 0
        """On the disk, as it was counted last."""
        self.used_at = 0.0
        """When it last had something new."""

    @property
    def attempt(self) -> tuple[str, int]:
        return self.reader.owner.run, self.reader.owner.attempt

    def waits_for_commits(self) -> bool:
        return any(self.reader.accepted(stream) > self.reader.committed(stream) for stream in Stream)


def _leave(groups: dict[K, dict[str, _Spool]], key: K, name: str) -> None:
    """A group without members is none."""
    groups[key].pop(name, None)
    if not groups[key]:
        del groups[key]


class Turn:
    """Whose turn it is to ship a spool directory: one process on this machine has it, until it dies.

    A lock on a file in the directory, so the next one takes over at once, whatever became of the node, the cluster or
    the head under which the one before it ran. One per process and directory: closing any other descriptor of the file
    in the same process would give the lock up.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / ".turn"
        self._fd = -1

    def is_mine(self) -> bool:
        """Takes the turn if it is free. Raises OSError where nobody can have it.

        Whoever removes the directory or the file ends the turn: on what comes in its place another one may have a lock.
        """
        if self._fd >= 0:
            if self._is_there():
                return True
            self.end()
            return False
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False  # the directory is gone; producers make it again
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise  # no locks here: standing by for ever would ship nothing and say nothing
        self._fd = fd
        return True

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def end(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Shipper:
    """One per node. `step` sends what is new once; `run` repeats it.

    A batch is sent again until it is acknowledged; the tracker drops what it has. A spool is removed when its producer
    is dead and everything in it is committed. Several on one directory do no harm: one ships, and when it dies another
    goes on, with the spools of producers that are dead, too.

    Whoever has something new rings its bell (spool_root.py), and is looked at in the next round; the others are visited
    now and then, a few per round, so that dead ones are found and nothing depends on a bell.
    """

    PAUSE, PAUSE_WATCHED = 1.0, 0.1
    """Seconds between two rounds. Each costs the tracker an fsync and the machine, which trains, a millisecond or two:
    they are rare while nobody looks. Who waits (facts, a flush) is in a hurry and not kept waiting."""
    TICK = 0.05
    """Seconds between two looks whether somebody is in a hurry."""
    WATCHED = 5.0
    """Seconds of quicker rounds after the tracker told that a run is watched."""
    AT_ONCE_BYTES = 256 << 10
    """After a round that moved so much there is probably more, and the next one comes without a pause."""
    STANDBY = 0.5
    """Seconds between looks whether it is this one's turn."""
    ROUND_BYTES = 8 << 20
    """In one push, shared fairly among those who have something."""
    LEAST_TURN = 2048
    """Points that one producer sends at a time, at least, if it has them."""
    ASK = 0.1
    """Seconds, at least, between two questions to the tracker about producers that have nothing new to send, and
    between two rounds of visits."""
    VISITS = 600
    """Per second."""
    WAITING_ASKED, IDLE_ASKED = 10_000, 3_000
    """Producers that wait for commits, and attempts that may be told to stop, in the questions of a second."""
    SHARE = 1.0
    """At most so many seconds' worth of visits and questions come in one round."""
    MOST_AWAKE = 256
    """Spools whose counters stay mapped; each takes a descriptor."""
    REST = 10.0
    """Seconds after which a spool with nothing new is given up in memory."""
    MOST_PAUSE = 2.0
    """Seconds between two attempts to send what the tracker does not take."""

    def __init__(
        self,
        root: Path,
        tracker: Tracker,
        clock: Clock | None = None,
        *,
        budget_bytes: int = DEFAULT_BYTES,
        circuits: Circuits | None = None,
    ) -> None:
        prepare_root(root)
        self._root, self._tracker, self._clock = root, tracker, clock or SystemClock()
        self._link = (circuits or Circuits(clock=self._clock)).link(
            "tracker", lost="the tracker does not answer, spools are kept and sent later",
            back="the tracker answers again", breaker=CircuitBreaker(threshold=1),
        )  # fmt: skip
        self._budget_bytes = budget_bytes
        """What all spools of the node may hold. Beyond half of it, what is accepted is released before it is committed.
        """
        self._turn = Turn(root)
        self.is_shipping = False
        """It is this one's turn; False: another process on this machine ships the directory."""
        self._node: Node | None = None
        self._spools: dict[str, _Spool] = {}
        self._spools_lock = threading.Lock()
        """`backlog` is asked from other threads while `step` adds and removes spools."""
        self._by_bell: dict[int, dict[str, _Spool]] = {}
        self._by_attempt: dict[tuple[str, int], dict[str, _Spool]] = {}
        self._ready: dict[str, _Spool] = {}
        """May have something to send, in the order of their turns."""
        self._waiting: dict[str, _Spool] = {}
        """Have entries that are accepted and not yet committed."""
        self._awake: dict[str, _Spool] = {}
        """In the order of their last use."""
        self._visits: deque[str] = deque()
        self._idle: deque[tuple[str, int]] = deque()
        """Attempts, in the order in which the tracker is asked about them."""
        self._listed = (-1, 0.0)
        """Modification time of the directory when it was read, and when that was."""
        self._unusable: set[str] = set()
        self._unreadable: set[str] = set()
        """Spools whose last reading failed; said once, tried again."""
        self._stop = threading.Event()
        self._asked = -1.0
        self._held_bytes = 0
        """By all spools."""
        self._is_disk_full = False
        self._watched_until = -1.0
        self._sent_bytes = 0
        """In the last round."""
        self.failures = 0
        """Pushes in a row that failed."""
        self.shipped = 0

    def run(self) -> None:
        troubles = 0
        while not self._stop.is_set():
            try:
                moved = self.step()
                troubles = 0
            except Exception:
                # The loop is the last line: a defect in one round must not end shipping for the node.
                troubles += 1
                if troubles == 1 or troubles % 100 == 0:
                    logger.exception("shipping failed %d times in a row; trying again", troubles)
                moved = False
            if not (moved and self._sent_bytes >= self.AT_ONCE_BYTES):
                self._wait(max(self._pause(), min(0.1 * troubles, 5.0)), is_patient=bool(troubles or self.failures))
        self._turn.end()

    def stop(self) -> None:
        self._stop.set()

    def _pause(self) -> float:
        if not self.is_shipping:
            return self.STANDBY
        if self.failures:
            return min(0.2 * 2 ** min(self.failures, 5), 5.0)
        if any(spool.pause for spool in self._ready.values()):
            return self.TICK  # what was not taken is offered again when it is due
        return self.PAUSE_WATCHED if self._clock.monotonic() < self._watched_until else self.PAUSE

    def _wait(self, seconds: float, *, is_patient: bool) -> None:
        """Until then, or, unless there is trouble, until somebody is in a hurry."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stop.wait(min(left, self.TICK)):
            if not is_patient and self._node is not None and self._node.is_hurried():
                break

    def step(self) -> bool:
        """One round. True if something was taken, so that there may be more to send at once."""
        if not self._is_my_turn():
            return False
        now = self._clock.monotonic()
        self._discover(now)
        self._listen(now)
        since = self.SHARE if self._asked < 0 else now - self._asked
        share = min(since, self.SHARE) if since >= self.ASK else 0.0
        if share:
            self._asked = now
            self._visit(now, share)
        batches = self._collect(now)
        self._sent_bytes = sum(len(batch.payload) for batch in batches)
        try:
            acks = self._tracker.push([batch.encode() for batch in batches]) if batches else []
            if share:
                acks = [*acks, *self._ask(share)]
        except (ConnectionError, TimeoutError) as error:
            self.failures += 1
            self._link.failed(error, self._clock.monotonic())
            return False
        if acks:
            self._link.succeeded(self._clock.monotonic())
        self.failures = 0
        self.shipped += sum(batch.count for batch in batches)
        before = {key: self._accepted(*key) for key in {(batch.producer, batch.stream) for batch in batches}}
        self._apply(acks)
        moved = {name for (name, stream), seq in before.items() if self._accepted(name, stream) != seq}
        self._take_turns({name for name, _ in before}, moved, now)
        self._remove_finished({ack.producer for ack in acks})
        return bool(moved)

    def backlog(self) -> dict[str, int]:
        """Entries logged on this node that are not yet accepted or committed, as they were in the last round."""
        with self._spools_lock:
            readers = [spool.reader for spool in self._spools.values()]
        return {
            "producers": len(readers),
            "not_accepted": sum(max(r.seen(s) - r.accepted(s), 0) for r in readers for s in Stream),
            "not_committed": sum(max(r.seen(s) - r.committed(s), 0) for r in readers for s in Stream),
        }

    def _is_my_turn(self) -> bool:
        mine = self._turn.is_mine()
        if self.is_shipping and not mine:
            logger.warning("%s was removed; what is logged from now on is looked for there", self._root)
        if mine and not self.is_shipping:
            logger.info("shipping %s", self._root)
            remove_leftovers(self._root)
            self._node = Node(self._root)
        self.is_shipping = mine
        return mine

    # -- who there is, and who has something

    def _discover(self, now: float) -> None:
        """Reads the directory when it changed; once more when the change was too near for its clock to tell, and now
        and then in any case.
        """
        changed = os.stat(self._root).st_mtime_ns
        seen, at = self._listed
        if changed == seen and now - at < 5.0:
            return
        is_settled = time.time_ns() - changed > 50_000_000
        self._listed = (changed if is_settled else -1, now)
        there: set[str] = set()
        for directory in spools(self._root):
            there.add(directory.name)
            if directory.name in self._spools or directory.name in self._unusable:
                continue
            try:
                self._add(_Spool(SpoolReader(directory)))
            except SpoolUnusable as error:
                if directory.exists():
                    self._unusable.add(directory.name)
                    logger.error("%s", error)
            except OSError as error:  # too many open files, perhaps: it is tried again
                if directory.name not in self._unreadable and directory.exists():
                    self._unreadable.add(directory.name)
                    logger.error("the spool %s cannot be read now: %s", directory, error)
            else:
                self._unreadable.discard(directory.name)
        self._unusable &= there
        self._unreadable &= there
        for name in self._spools.keys() - there:
            self._spools[name].reader.rest()
            self._forget(self._spools[name])

    def _add(self, spool: _Spool) -> None:
        name = spool.reader.producer
        with self._spools_lock:
            self._spools[name] = spool
        self._by_bell.setdefault(Node.bell_of(name), {})[name] = spool
        if spool.attempt not in self._by_attempt:
            self._idle.append(spool.attempt)
        self._by_attempt.setdefault(spool.attempt, {})[name] = spool
        self._visits.append(name)
        self._ready[name] = spool

    def _forget(self, spool: _Spool) -> None:
        name = spool.reader.producer
        self._count_held(spool, 0)
        with self._spools_lock:
            del self._spools[name]
        _leave(self._by_bell, Node.bell_of(name), name)
        _leave(self._by_attempt, spool.attempt, name)
        for index in (self._ready, self._waiting, self._awake):
            index.pop(name, None)
        self._unreadable.discard(name)

    def _listen(self, now: float) -> None:
        assert self._node is not None
        for bell in self._node.rung():
            for name, spool in self._by_bell.get(bell, {}).items():
                self._ready.setdefault(name, spool)

    def _visit(self, now: float, share: float) -> None:
        """Some of the spools, each in its turn: is there something new, is the producer dead, may it rest?"""
        for _ in range(min(math.ceil(self.VISITS * share), len(self._visits))):
            name = self._visits.popleft()
            spool = self._spools.get(name)
            if spool is None:
                continue
            self._visits.append(name)
            reader = spool.reader
            try:
                self._look_after(spool, now)
            except Exception:
                self._say_unreadable(reader)
        self._keep_within_budget()

    def _look_after(self, spool: _Spool, now: float) -> None:
        reader = spool.reader
        if reader.is_done():
            self._remove(spool)
            return
        if reader.has_news():
            self._ready.setdefault(reader.producer, spool)
        elif spool.waits_for_commits():
            self._waiting.setdefault(reader.producer, spool)
        elif now - spool.used_at > self.REST:
            self._rest(spool)
        self._count_held(spool, reader.held_bytes)

    def _rest(self, spool: _Spool) -> None:
        spool.reader.rest()
        self._awake.pop(spool.reader.producer, None)

    def _keep_awake(self, spool: _Spool) -> None:
        """This one, and those that were used last."""
        name = spool.reader.producer
        self._awake.pop(name, None)
        self._awake[name] = spool
        if len(self._awake) > self.MOST_AWAKE:
            self._rest(next(iter(self._awake.values())))

    def _count_held(self, spool: _Spool, held_bytes: int) -> None:
        self._held_bytes += held_bytes - spool.held_bytes
        spool.held_bytes = held_bytes

    def _keep_within_budget(self) -> None:
        """Tells producers how much the node holds. Beyond half of the budget, the largest spools release what is
        accepted but not yet committed.
        """
        assert self._node is not None
        if self._held_bytes > self._budget_bytes // 2:
            for spool in sorted(self._spools.values(), key=lambda spool: spool.held_bytes, reverse=True):
                spool.reader.release(spool.reader.accepted(Stream.points))
                self._count_held(spool, spool.reader.held_bytes)
                if self._held_bytes <= self._budget_bytes // 2:
                    break
        self._node.tell(self._held_bytes, self._budget_bytes)

    # -- sending

    def _collect(self, now: float) -> list[Batch]:
        """What fits into one push: every spool in its turn, until all are read or the push is full."""
        # Less to a tracker that did not answer: what is much may be why, and every try may lie in its queue.
        round_bytes = self.ROUND_BYTES >> min(self.failures, 5)
        batches: list[Batch] = []
        size_bytes = 0
        # Facts of all before points of anybody: who reads that a run has ended finds everything that was logged before,
        # by whichever of its producers. (And parameters are there before the curves.)
        looked_at: set[str] = set()
        for spool in self._due(now):
            if size_bytes < round_bytes:
                looked_at.add(spool.reader.producer)
                spool.cursor[Stream.facts] = spool.reader.accepted(Stream.facts)
                if batch := self._next_batch(spool, Stream.facts, self.LEAST_TURN, now):
                    batches.append(batch)
                    size_bytes += len(batch.payload)
        self._listen(now)
        turns = deque(self._due(now))
        for spool in turns:
            spool.cursor[Stream.points] = spool.reader.accepted(Stream.points)
            if spool.reader.producer not in looked_at:
                spool.cursor[Stream.facts] = _NOT_READ
        share = round_bytes // POINT.itemsize // max(len(turns), 1)
        limit = min(max(share, self.LEAST_TURN), SEGMENT_POINTS)
        while turns and size_bytes < round_bytes:
            spool = turns.popleft()
            if batch := self._next_batch(spool, Stream.points, limit, now):
                batches.append(batch)
                size_bytes += len(batch.payload)
                turns.append(spool)
            elif all(spool.cursor[stream] == spool.reader.accepted(stream) for stream in Stream):
                self._ready.pop(spool.reader.producer, None)
        return batches

    def _due(self, now: float) -> list[_Spool]:
        return [spool for spool in self._ready.values() if spool.due <= now]

    def _next_batch(self, spool: _Spool, stream: Stream, limit: int, now: float) -> Batch | None:
        reader = spool.reader
        try:
            batch = reader.next_batch(stream, spool.cursor[stream], limit)
            if batch is not None:
                self._reserve_ahead(reader)
        except Exception:
            # A spool that cannot be read must not hold up those of the other producers.
            self._say_unreadable(reader)
            return None
        self._unreadable.discard(reader.producer)
        self._count_held(spool, reader.held_bytes)
        if batch is not None:
            spool.cursor[stream] = batch.last
            spool.used_at = now
        return batch

    def _say_unreadable(self, reader: SpoolReader) -> None:
        if reader.producer not in self._unreadable and reader.directory.exists():
            self._unreadable.add(reader.producer)
            logger.exception("the spool %s cannot be read; it is left where it is", reader.directory)

    def _reserve_ahead(self, reader: SpoolReader) -> None:
        try:
            reader.reserve_ahead()
        except OSError as error:
            if not self._is_disk_full:
                logger.error("no room for the next points of %s: %s", reader.directory, error)
            self._is_disk_full = True
        else:
            self._is_disk_full = False

    def _take_turns(self, sent: Iterable[str], moved: set[str], now: float) -> None:
        """Who was served goes to the end; what the tracker does not take is offered less and less often."""
        for name in sent:
            spool = self._spools.get(name)
            if spool is None:
                continue
            spool.due = now if name in moved else now + spool.pause
            spool.pause = 0.0 if name in moved else min(max(2 * spool.pause, 0.03), self.MOST_PAUSE)
            self._ready.pop(name, None)
            self._ready[name] = spool

    def _ask(self, share: float) -> list[Ack]:
        """Where producers stand that wait for commits; and, one producer for each, whether attempts shall stop."""
        asked: dict[str, _Spool] = {}
        for name in list(self._waiting)[: math.ceil(self.WAITING_ASKED * share)]:
            asked[name] = self._waiting[name] = self._waiting.pop(name)
        for _ in range(min(math.ceil(self.IDLE_ASKED * share), len(self._idle))):
            attempt = self._idle.popleft()
            if members := self._by_attempt.get(attempt):
                self._idle.append(attempt)
                name, spool = next(iter(members.items()))
                asked[name] = spool
        return self._tracker.acknowledged([(name, *spool.attempt) for name, spool in asked.items()]) if asked else []

    def _apply(self, acks: Sequence[Ack]) -> None:
        for ack in acks:
            spool = self._spools.get(ack.producer)
            if spool is None:
                continue
            if ack.watched:
                self._watched_until = self._clock.monotonic() + self.WATCHED
            try:
                spool.reader.acknowledge(ack.stream, ack.accepted, ack.committed)
                if ack.stop:
                    for other in self._by_attempt[spool.attempt].values():
                        other.reader.request_stop()
                        self._keep_awake(other)
            except OSError:
                self._say_unreadable(spool.reader)  # most likely somebody removed it
                continue
            self._keep_awake(spool)
            self._count_held(spool, spool.reader.held_bytes)
            if spool.waits_for_commits():
                self._waiting[ack.producer] = spool
            else:
                self._waiting.pop(ack.producer, None)
            if ack.accepted < spool.reader.seen(ack.stream):
                self._ready.setdefault(ack.producer, spool)

    def _accepted(self, producer: str, stream: Stream) -> int:
        spool = self._spools.get(producer)
        return -1 if spool is None else spool.reader.accepted(stream)

    # -- the end of a spool

    def _remove_finished(self, names: Iterable[str]) -> None:
        """Of those the tracker told about, who cannot have more to come."""
        for name in names:
            spool = self._spools.get(name)
            if spool is None:
                continue
            reader = spool.reader
            if all(reader.committed(stream) >= reader.seen(stream) for stream in Stream) and reader.is_done():
                self._remove(spool)

    def _remove(self, spool: _Spool) -> None:
        self._forget(spool)
        spool.reader.remove()
