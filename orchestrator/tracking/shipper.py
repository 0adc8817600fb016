"""Ships the spools of one node to the tracker: those of living producers as they grow, those of dead ones to the end.

Run by the node agent, which outlives the trainers. Two nodes may share a machine, and then its spool directory: one of
their agents ships, the others stand by.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from orchestrator.clock import Clock, SystemClock
from orchestrator.records import Ack, Batch, Stream
from orchestrator.tracking.spool import SpoolReader, SpoolUnusable, prepare_root, spools

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        """Gives encoded batches; returns when they are accepted. Raises ConnectionError or TimeoutError."""
        ...

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        """Where the tracker stands with (producer, run, attempt), without sending anything."""
        ...


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
        """Takes the turn if it is free. Raises OSError where nobody can have it."""
        if self._fd >= 0:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise  # no locks here: standing by for ever would ship nothing and say nothing
        self._fd = fd
        return True

    def end(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Shipper:
    """One per node. `step` sends what is new once; `run` repeats it.

    A batch is sent again until it is acknowledged; the tracker drops what it has. A spool is removed when its producer
    is dead and everything in it is committed. Several on one directory do no harm: one ships, and when it dies another
    goes on, with the spools of producers that are dead, too.
    """

    PAUSE = 0.05
    """Seconds between looks at the spools."""
    STANDBY = 0.5
    """Seconds between looks whether it is this one's turn."""
    ROUND_BYTES = 8 << 20

    def __init__(self, root: Path, tracker: Tracker, clock: Clock | None = None) -> None:
        prepare_root(root)
        self._root, self._tracker, self._clock = root, tracker, clock or SystemClock()
        self._turn = Turn(root)
        self.is_shipping = False
        """It is this one's turn; False: another process on this machine ships the directory."""
        self._readers: dict[str, SpoolReader] = {}
        self._readers_lock = threading.Lock()
        """`backlog` is asked from other threads while `step` adds and removes readers."""
        self._unusable: set[str] = set()
        self._unreadable: set[str] = set()
        """Spools whose last reading failed; said once, tried again in each round."""
        self._stop = threading.Event()
        self._asked = 0.0
        self.failures = 0
        """Pushes in a row that failed."""
        self.shipped = 0

    def run(self) -> None:
        while not self._stop.is_set():
            try:
                moved = self.step()
            except Exception:
                # The loop is the last line: a defect in one round must not end shipping for the node.
                logger.exception("shipping failed; trying again")
                moved = False
            if not moved:
                self._stop.wait(self._pause())
        self._turn.end()

    def stop(self) -> None:
        self._stop.set()

    def _pause(self) -> float:
        if not self.is_shipping:
            return self.STANDBY
        return self.PAUSE if self.failures == 0 else min(0.2 * 2 ** min(self.failures, 5), 5.0)

    def step(self) -> bool:
        """One round. True if something was taken, so that there may be more to send at once."""
        if not self._is_my_turn():
            return False
        self._discover()
        batches = self._collect()
        try:
            acks = self._tracker.push([batch.encode() for batch in batches]) if batches else []
            acks += self._ask_for_commits(now=self._clock.monotonic())
        except (ConnectionError, TimeoutError) as error:
            self.failures += 1
            if self.failures in (1, 20):
                logger.warning("the tracker does not answer (%s); spools are kept and sent later", error)
            return False
        if self.failures:
            logger.info("the tracker answers again")
        self.failures = 0
        before = [self._readers[batch.producer].accepted(batch.stream) for batch in batches]
        self._apply(acks)
        after = [self._readers[batch.producer].accepted(batch.stream) for batch in batches]
        self._remove_finished()
        self.shipped += sum(batch.count for batch in batches)
        return before != after

    def backlog(self) -> dict[str, int]:
        """Entries logged on this node that are not yet accepted or committed."""
        with self._readers_lock:
            readers = self._readers.values()
            return {
                "producers": len(self._readers),
                "not_accepted": sum(r.logged(s) - r.accepted(s) for r in readers for s in Stream),
                "not_committed": sum(r.logged(s) - r.committed(s) for r in readers for s in Stream),
            }

    def _is_my_turn(self) -> bool:
        mine = self._turn.is_mine()
        if mine and not self.is_shipping:
            logger.info("shipping %s", self._root)
        self.is_shipping = mine
        return mine

    def _discover(self) -> None:
        for directory in spools(self._root):
            name = directory.name
            if name in self._readers or name in self._unusable:
                continue
            try:
                reader = SpoolReader(directory)
            except SpoolUnusable as error:
                self._unusable.add(name)
                logger.error("%s; it is left where it is", error)
                continue
            with self._readers_lock:
                self._readers[name] = reader

    def _collect(self) -> list[Batch]:
        batches: list[Batch] = []
        size_bytes = 0
        for reader in self._readers.values():
            found = self._batches_of(reader)
            batches += found
            size_bytes += sum(len(batch.payload) for batch in found)
            if size_bytes > self.ROUND_BYTES:
                break
        return batches

    def _batches_of(self, reader: SpoolReader) -> list[Batch]:
        try:
            # Facts first: a run's parameters should be there before its curves.
            found = [reader.next_batch(stream, reader.accepted(stream)) for stream in (Stream.facts, Stream.points)]
        except Exception:
            # A damaged spool must not hold up those of the other producers.
            if reader.producer not in self._unreadable:
                self._unreadable.add(reader.producer)
                logger.exception("the spool %s cannot be read; it is left where it is", reader.directory)
            return []
        self._unreadable.discard(reader.producer)
        return [batch for batch in found if batch is not None]

    def _ask_for_commits(self, now: float) -> list[Ack]:
        """Producers with nothing new to send still wait for their commits, and for a word to stop."""
        if now - self._asked < 0.1:
            return []
        self._asked = now
        waiting = [(r.producer, r.owner.run, r.owner.attempt) for r in self._readers.values()]
        return self._tracker.acknowledged(waiting) if waiting else []

    def _apply(self, acks: Sequence[Ack]) -> None:
        for ack in acks:
            reader = self._readers.get(ack.producer)
            if reader is None:
                continue
            reader.acknowledge(ack.stream, ack.accepted, ack.committed)
            if ack.stop:
                reader.request_stop()

    def _remove_finished(self) -> None:
        for name, reader in list(self._readers.items()):
            if reader.is_done():
                with self._readers_lock:
                    del self._readers[name]
                reader.remove()
