"""A seeded simulation of delivery: producers, an agent, trackers and the store, with every fault we could think of.

    python -m tests.plugins.simulation --seed 4711 --show          one schedule, with everything that happened
    python -m tests.plugins.simulation --schedules 1000000         many (CTRL-C ends it)
    python -m tests.plugins.simulation --mutant skip_dedup         what a broken variant does

What decides is the code that runs: `Shipper`, `TrackerService`, `Committer`, `delivery.admit` and
`transaction.missing`. What they stand on is virtual: a node's spools, a wire that loses, repeats and delays, a head's
log of which an unsynced end may vanish, a database that goes away, rolls back and swallows the answer to a COMMIT.
Any part dies before any of its steps on these. One schedule is a seed: 20 random actions, then everything is mended,
and what was promised must be there: every point once, in order, nothing acknowledged lost.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from orchestrator.clock import ManualClock
from orchestrator.errors import ServiceUnavailable
from orchestrator.records import _HEAD, LOST, POINT, Ack, Batch, Stream
from orchestrator.store import transaction
from orchestrator.store.errors import SequenceGap
from orchestrator.tracking import admission, committer, delivery, service, shipper
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import Owner
from orchestrator.tracking.wal import LogInUse, Position, SyncFailed

SEGMENT = 4
"""Points per segment of a virtual spool, frames per segment of a virtual log."""
_RECORDS = np.zeros(4096, POINT)
_RECORDS["value"] = _RECORDS["step"] = np.arange(1, 4097)
_BYTES = _RECORDS.tobytes()
"""Point n of every producer has the value n."""
_NO_RECORDS = np.zeros(4096, POINT)
_NO_RECORDS["flags"] = LOST
_LOST = _NO_RECORDS.tobytes()
"""What is shipped in the place of points whose segment is gone."""


class Crash(BaseException):
    """A process is gone in the middle of what it did."""


class Violation(AssertionError):
    """A promise was broken."""


# -- what the parts stand on -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Spool:
    """A producer's directory on its node. Survives the death of every process; goes with the node."""

    name: str
    logged: dict[Stream, int] = field(default_factory=lambda: dict.fromkeys(Stream, 0))
    accepted: dict[Stream, int] = field(default_factory=lambda: dict.fromkeys(Stream, 0))
    committed: dict[Stream, int] = field(default_factory=lambda: dict.fromkeys(Stream, 0))
    removed: int = 0
    """Points whose segments are gone."""
    is_owned: bool = True
    is_there: bool = True

    def exists(self) -> bool:
        return self.is_there


class Reader:
    """What `SpoolReader` is on a real directory."""

    def __init__(self, spool: Spool) -> None:
        self.spool = self.directory = spool
        self.producer, self.held_bytes = spool.name, 0
        self.owner = Owner(run="r", attempt=1, rank=0)

    def logged(self, stream: Stream) -> int:
        return self.spool.logged[stream]

    seen = logged

    def accepted(self, stream: Stream) -> int:
        return self.spool.accepted[stream]

    def committed(self, stream: Stream) -> int:
        return self.spool.committed[stream]

    def acknowledge(self, stream: Stream, accepted: int, committed: int) -> None:
        world().step("agent")
        self.spool.accepted[stream], self.spool.committed[stream] = accepted, committed
        if stream is Stream.points:
            whole = min(committed, self.spool.logged[stream] - 1) // SEGMENT * SEGMENT
            if whole > self.spool.removed:
                world().step("agent")
                self.spool.removed = whole

    def release(self, points: int) -> None:
        pass

    def reserve_ahead(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def request_stop(self) -> None:
        raise AssertionError("nobody asked to stop")

    def next_batch(self, stream: Stream, after: int, limit: int = SEGMENT) -> Batch | None:
        count = min(self.spool.logged[stream] - after, limit)
        if count <= 0:
            return None
        if stream is Stream.points:
            count = min(count, SEGMENT - after % SEGMENT)
            content = _LOST if after < self.spool.removed else _BYTES
            payload = content[after * 32 : (after + count) * 32]
        else:
            facts = [{"kind": "tag", "at": 0.0, "data": {"n": after + number + 1}} for number in range(count)]
            payload = json.dumps(facts).encode()
        return Batch(
            producer=self.producer, run="r", attempt=1, rank=0, stream=stream, first=after + 1, count=count,
            keys=("loss",), payload=payload,
        )  # fmt: skip

    def is_owned(self) -> bool:
        return self.spool.is_owned

    def is_done(self) -> bool:
        spool = self.spool
        is_committed = all(spool.committed[stream] >= spool.logged[stream] for stream in Stream)
        return (is_committed and not spool.is_owned) or not spool.is_there

    def remove(self) -> None:
        world().step("agent")
        self.spool.is_there = False
        world().spools.pop(self.producer, None)
        world().changes += 1


class Turn:
    """It is always this agent's turn: on one node the lock of the real one sees to that."""

    def __init__(self, root: Path) -> None:
        pass

    def is_mine(self) -> bool:
        return True

    def end(self) -> None:
        pass


class Node:
    """What producers and agent share: the bells."""

    def __init__(self, root: Path) -> None:
        pass

    @staticmethod
    def bell_of(producer: str) -> int:
        return int(producer, 16)

    def rung(self) -> list[int]:
        rung, world().rung = sorted(world().rung), set()
        return rung

    def tell(self, used_bytes: int, budget_bytes: int) -> None:
        pass


class Os:
    """Of the directory of spools: when it changed."""

    @staticmethod
    def stat(path: Path) -> Any:
        return SimpleNamespace(st_mtime_ns=world().changes)


@dataclass(eq=False)
class Disk:
    """A head's disk with the tracker's log on it. What is not synced may vanish with the power."""

    name: str
    frames: list[bytes | None] = field(default_factory=list)
    """None: cannot be read any more."""
    synced: int = 0
    removed: int = 0
    cursor: Position | None = None
    durable: dict[tuple[str, int], int] = field(default_factory=dict)
    """Up to where each producer and stream is in the synced frames, or was committed before."""
    holder: Log | None = None
    is_full: bool = False
    is_broken: bool = False

    def sync(self, end: int) -> None:
        for frame in self.frames[self.synced : end]:
            if frame is not None:
                _, _, stream, _, _, producer, _, _, first, count, _ = _HEAD.unpack_from(frame)
                key = (producer.hex(), Stream(stream))
                known = max(self.durable.get(key, 0), world().known(*key))
                if first <= known + 1:  # what is behind a hole cannot be committed
                    self.durable[key] = max(known, first + count - 1)
        self.synced = max(self.synced, end)

    def lose_power(self, kept: float) -> None:
        unsynced = len(self.frames) - self.synced
        del self.frames[self.synced + round(unsynced * kept) :]
        self.holder = None


def _position(index: int) -> Position:
    return Position(index // SEGMENT + 1, index % SEGMENT)


class Log:
    """What `WriteAheadLog` is on a real disk: offsets count frames."""

    def __init__(self, disk: Disk) -> None:
        if disk.holder is not None and world().mutant != "no_fence":
            raise LogInUse(disk.name)
        disk.holder, self._disk = self, disk
        self._end = self._synced = len(disk.frames)
        disk.sync(self._end)
        self._damaged: set[int] = set()

    @property
    def damaged_bytes(self) -> int:
        return 100 * len(self._damaged)

    def append(self, payload: bytes) -> None:
        world().step("tracker")
        if self._disk.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        frames = self._disk.frames
        frames += [None] * (self._end - len(frames))
        frames[self._end : self._end + 1] = [payload]
        self._end += 1

    def sync(self) -> None:
        world().step("tracker")
        if self._disk.is_broken:
            raise SyncFailed(errno.EIO, "Input/output error")
        if world().mutant != "ack_before_fsync":
            self._disk.sync(self._end)
        self._synced = self._end
        world().step("tracker")

    @property
    def synced(self) -> Position:
        return _position(self._synced)

    def start(self) -> Position:
        return _position(self._disk.removed)

    def read(self, position: Position, limit_bytes: int) -> Iterator[tuple[Position, bytes]]:
        total, index = 0, (position.segment - 1) * SEGMENT + position.offset
        for number in range(max(index, self._disk.removed), min(self._synced, len(self._disk.frames))):
            frame = self._disk.frames[number]
            if frame is None:
                self._damaged.add(number)
                continue
            yield _position(number + 1), frame
            total += len(frame)
            if total >= limit_bytes:
                return

    def remove_before(self, position: Position) -> None:
        world().step("tracker")
        self._disk.removed = max(self._disk.removed, (position.segment - 1) * SEGMENT)

    def load_cursor(self) -> Position:
        cursor = self._disk.cursor
        if cursor is None or cursor > self.synced:
            return self.start()
        return max(cursor, self.start())

    def save_cursor(self, position: Position) -> None:
        world().step("tracker")
        self._disk.cursor = position

    def size_bytes(self) -> int:
        return sum(len(frame or b"") for frame in self._disk.frames[self._disk.removed :])

    def close(self) -> None:
        if self._disk.holder is self:
            self._disk.holder = None


@dataclass(eq=False)
class Row:
    """What the database has of a producer."""

    marks: dict[Stream, int] = field(default_factory=lambda: dict.fromkeys(Stream, 0))
    entries: dict[Stream, list[int]] = field(default_factory=lambda: {stream: [] for stream in Stream})
    lost: int = 0

    def copy(self) -> Row:
        return Row(dict(self.marks), {stream: list(entries) for stream, entries in self.entries.items()}, self.lost)


def _entries(batch: Batch) -> list[int]:
    if batch.stream is Stream.points:
        return [int(point["value"]) for point in batch.points() if not point["flags"]]
    return [raw["data"]["n"] for raw in json.loads(batch.payload)]


class Database:
    """What `Store` is on a real one: a transaction is all or nothing, and its answer may be lost."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.is_away = False
        self.next = ""
        """What happens to the next transaction: rollback, lost_reply."""

    def _unavailable(self) -> ServiceUnavailable:
        return ServiceUnavailable("PostgreSQL", "here", "it is away", "wait")

    def watermarks(self, producers: Iterable[str]) -> dict[tuple[str, Stream], int]:
        world().step("tracker")
        if self.is_away:
            raise self._unavailable()
        known = [(producer, self.rows[producer]) for producer in producers if producer in self.rows]
        return {(producer, stream): mark for producer, row in known for stream, mark in row.marks.items()}

    def commit(self, batches: Sequence[Batch]) -> dict[tuple[str, Stream], int]:
        world().step("tracker")
        if self.is_away:
            raise self._unavailable()
        marks, gaps, new = {}, [], []
        for producer, sent in transaction.by_producer(batches).items():
            row = self.rows.get(producer) or Row()
            try:
                own = world().missing(sent, row.marks)
            except transaction._OutOfOrder as error:
                gaps.append(error.gap)
                continue
            marks |= {(producer, stream): mark for stream, mark in row.marks.items()}
            marks |= {(producer, batch.stream): batch.last for batch in own}
            new += own
        world().step("tracker")
        happens, self.next = self.next, ""
        if happens == "rollback":
            raise self._unavailable()
        for batch in new:
            row = self.rows.setdefault(batch.producer, Row())
            entries = _entries(batch)
            row.entries[batch.stream] += entries
            row.lost += batch.count - len(entries)
            if world().mutant == "watermark_apart":
                world().step("tracker")
            row.marks[batch.stream] = max(row.marks[batch.stream], batch.last)
        world().step("tracker")
        if happens == "lost_reply":
            raise self._unavailable()
        if gaps:
            raise SequenceGap(tuple(gaps), marks)
        return marks

    def close(self) -> None:
        pass


class Live:
    def take(self, batch: Batch) -> None:
        pass

    def is_watched(self, run: str) -> bool:
        return False


class VirtualTime:
    @staticmethod
    def monotonic() -> float:
        return world().clock.monotonic()


class Wire:
    """Between the agent and whichever tracker answers: the agent's `Tracker`."""

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        here = world()
        fault = here.wire_fault()
        if fault == "lost":
            raise ConnectionError("the request is lost")
        if fault in ("late", "twice"):
            here.late.append(list(frames))
        if fault == "late":
            raise TimeoutError("no answer yet")
        acks = here.ask(lambda tracker: tracker.push(frames))
        if fault == "no_answer":
            raise TimeoutError("the answer is lost")
        return here.received(acks)

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        here = world()
        fault = here.wire_fault()
        if fault in ("lost", "late"):
            raise ConnectionError("the request is lost")
        return here.received(here.ask(lambda tracker: tracker.acknowledged(producers)))


# -- a world and what happens in it ------------------------------------------------------------------------------------

MUTANTS = (
    "ack_before_fsync",  # the log says synced, and is not
    "skip_dedup",  # the transaction takes what it has already
    "unlink_first",  # a spool goes when it is accepted
    "watermark_apart",  # points first, the watermark in a transaction of its own
    "cursor_before_commit",  # the committer's place moves before the database has it
    "no_fence",  # two trackers write one log
    "accept_gaps",  # the tracker takes what does not follow
    "ignore_gaps",  # the committer passes over a hole
)

FAULTS = (
    "kill_agent", "kill_tracker", "power_loss", "second_tracker", "rival", "end_second", "producer_dies", "wire",
    "database_away", "database_back", "rollback", "lost_reply", "node_lost", "log_lost", "damage", "full_disk",
    "broken_disk", "late", "backup", "restore", "fuse_agent", "fuse_tracker", "clock",
)  # fmt: skip
WORK = ("log", "log", "log", "fact", "agent", "agent", "agent", "agent", "commit", "commit", "commit", "producer")
ACTIONS = 20

_current: list[World] = []


def world() -> World:
    return _current[-1]


class World:
    """One schedule. `history` tells what happened, for whoever looks into a failed one."""

    def __init__(self, seed: int, mutant: str = "") -> None:
        self.random = random.Random(seed)
        self.mutant = mutant
        self.history: list[str] = []
        self.clock = ManualClock()
        self.spools: dict[str, Spool] = {}
        self.producers: list[Spool] = []
        self.database = Database()
        self.disks = [Disk("first"), Disk("second")]
        self.trackers: list[TrackerService] = []
        self.agent: Shipper | None = None
        self.changes = 0
        """How often the directory of spools changed."""
        self.rung: set[int] = set()
        """Bells of producers with something new."""
        self.late: list[list[bytes]] = []
        self.fuses: dict[str, int] = {}
        self.wire_faults: tuple[str, ...] = ()
        self.promised: dict[tuple[str, Stream], int] = {}
        """What the agent was told is accepted."""
        self.lost: dict[str, dict[Stream, int]] = {}
        """Producers whose node is gone, and what must arrive all the same."""
        self.backup: dict[str, Row] = {}
        self.excused: dict[tuple[str, Stream], int] = {}
        """Up to where something may be missing: it was committed, its spool had gone, and an older database came."""
        self.is_damaged = False
        """A tracker may go on telling what it had accepted: only spools can make up for it."""
        self.is_healing = False
        self.names = itertools.count(1)
        self.missing = _all_of_them if mutant == "skip_dedup" else transaction.missing

    # -- the parts

    def step(self, part: str) -> None:
        """Before each step of a part on what it stands on: its fuse may burn down here."""
        left = self.fuses.get(part)
        if left is not None:
            if left == 0:
                del self.fuses[part]
                self.history.append(f"    the {part} dies here")
                raise Crash(part)
            self.fuses[part] = left - 1

    def start_tracker(self, disk: Disk) -> None:
        try:
            tracker = TrackerService(disk.name, "", clock=self.clock, exit=_exit)
        except LogInUse:
            if disk.holder is None:
                raise
            return
        except Crash:
            disk.holder = None
            return
        if self.mutant == "ignore_gaps":
            tracker._committer._on_gap = lambda gaps: None
        if self.mutant == "cursor_before_commit":
            _move_cursor_first(tracker)
        tracker.disk = disk  # type: ignore[attr-defined]
        self.trackers.append(tracker)

    def drop_tracker(self, tracker: TrackerService) -> None:
        self.trackers.remove(tracker)
        tracker._log.close()

    def ask(self, question: Callable[[TrackerService], Any]) -> Any:
        if not self.trackers:
            raise ConnectionError("no tracker")
        # Which of two has the name may change at any time, until everything is mended.
        tracker = self.trackers[0] if self.is_healing else self.random.choice(self.trackers)
        try:
            acks = question(tracker)
        except Crash as crash:
            if crash.args != ("tracker",):
                raise
            self.drop_tracker(tracker)
            raise ConnectionError("the tracker died") from crash
        self._check_durable(tracker, acks)
        return acks

    def _excuse(self, name: str, stream: Stream) -> int:
        return self.excused.get((name, stream), 0)

    def known(self, name: str, stream: Stream) -> int:
        """What the database has, or had before an older one came."""
        row = self.database.rows.get(name)
        return max(row.marks[stream] if row else 0, self._excuse(name, stream))

    def _check_durable(self, tracker: TrackerService, acks: Sequence[Ack]) -> None:
        """Accepted means: on disk, or in the database."""
        durable = tracker.disk.durable  # type: ignore[attr-defined]
        for ack in acks:
            stored = self.known(ack.producer, ack.stream)
            if ack.committed > stored:
                raise Violation(f"{ack} and only {stored} are committed")
            if ack.accepted > max(stored, durable.get((ack.producer, ack.stream), 0)):
                raise Violation(f"{ack} is not on disk")

    def received(self, acks: Sequence[Ack]) -> list[Ack]:
        for ack in acks:
            key = (ack.producer, ack.stream)
            self.promised[key] = max(self.promised.get(key, 0), ack.accepted)
        if self.mutant == "unlink_first":
            return [
                Ack(producer=ack.producer, stream=ack.stream, accepted=ack.accepted, committed=ack.accepted)
                for ack in acks
            ]
        return list(acks)

    def wire_fault(self) -> str:
        return self.random.choice(self.wire_faults) if self.wire_faults else ""

    def forget_promises(self) -> None:
        """A head's disk is gone or damaged: from now on spools must make up for it, and lost nodes cannot."""
        for key in self.promised:
            self.promised[key] = min(self.promised[key], self._committed(*key))
        for name, marks in self.lost.items():
            for stream in marks:
                marks[stream] = min(marks[stream], self._committed(name, stream))

    def _committed(self, name: str, stream: Stream) -> int:
        row = self.database.rows.get(name)
        return row.marks[stream] if row else 0

    # -- what may happen

    def act(self, action: str) -> None:
        self.history.append(action)
        self.clock.advance(0.2)
        getattr(self, f"_{action}")()

    def _producer(self) -> None:
        if len(self.producers) < 3:
            spool = Spool(f"{next(self.names):032x}")
            self.spools[spool.name] = spool
            self.producers.append(spool)
            self.changes += 1

    def _writing(self) -> Spool | None:
        living = [spool for spool in self.producers if spool.is_owned]
        return self.random.choice(living) if living else None

    def _log(self) -> None:
        if spool := self._writing():
            spool.logged[Stream.points] += self.random.randint(1, 6)
            self.rung.add(Node.bell_of(spool.name))

    def _fact(self) -> None:
        if spool := self._writing():
            spool.logged[Stream.facts] += 1
            self.rung.add(Node.bell_of(spool.name))

    def _producer_dies(self) -> None:
        if spool := self._writing():
            spool.is_owned = False

    def _agent(self) -> None:
        try:
            if self.agent is None:
                self.agent = Shipper(Path("spools"), Wire(), clock=self.clock)
            self.agent.step()
        except Crash:
            self.agent = None

    def _kill_agent(self) -> None:
        self.agent = None

    def _commit(self) -> None:
        if not self.trackers:
            self.start_tracker(self.disks[0])
        for tracker in self.random.sample(self.trackers, len(self.trackers)):
            try:
                tracker.commit_step()
            except Crash:
                self.drop_tracker(tracker)

    def _kill_tracker(self) -> None:
        if self.trackers:
            self.drop_tracker(self.random.choice(self.trackers))

    def _power_loss(self) -> None:
        """Of the first head."""
        disk = self.disks[0]
        for tracker in [tracker for tracker in self.trackers if tracker.disk is disk]:  # type: ignore[attr-defined]
            self.drop_tracker(tracker)
        disk.lose_power(self.random.random())

    def _second_tracker(self) -> None:
        self.start_tracker(self.disks[1])

    def _end_second(self) -> None:
        for tracker in [t for t in self.trackers if t.disk is self.disks[1]]:  # type: ignore[attr-defined]
            self.drop_tracker(tracker)

    def _rival(self) -> None:
        """Another tracker on the same log: only the lock is in its way."""
        self.start_tracker(self.disks[0])

    def _wire(self) -> None:
        everything = ("", "lost", "late", "twice", "no_answer")
        self.wire_faults = self.random.choice(((), everything, ("", "twice"), ("no_answer",), ("lost",)))

    def _late(self) -> None:
        """What was on its way arrives, in any order."""
        while self.late and self.trackers:
            frames = self.late.pop(self.random.randrange(len(self.late)))
            try:
                self.ask(lambda tracker, frames=frames: tracker.push(frames))
            except ConnectionError:
                return

    def _database_away(self) -> None:
        self.database.is_away = True

    def _database_back(self) -> None:
        self.database.is_away = False

    def _rollback(self) -> None:
        self.database.next = "rollback"

    def _lost_reply(self) -> None:
        self.database.next = "lost_reply"

    def _backup(self) -> None:
        self.backup = {name: row.copy() for name, row in self.database.rows.items()}

    def _restore(self) -> None:
        """An older database, under trackers and agents that knew the newer one."""
        for name, row in self.database.rows.items():
            for stream, mark in row.marks.items():
                self.excused[name, stream] = max(self._excuse(name, stream), mark)
        self.database.rows = {name: row.copy() for name, row in self.backup.items()}
        self.forget_promises()

    def _node_lost(self) -> None:
        for spool in self.producers:
            if spool.name not in self.lost:
                self.lost[spool.name] = {
                    stream: max(
                        0 if self.is_damaged else self.promised.get((spool.name, stream), 0),
                        self._committed(spool.name, stream),
                    )
                    for stream in Stream
                }
            spool.is_owned = spool.is_there = False
        self.spools.clear()
        self.rung.clear()
        self.changes += 1
        self.producers, self.agent = [], None

    def _log_lost(self) -> None:
        place = self.random.randrange(2)
        for tracker in [t for t in self.trackers if t.disk is self.disks[place]]:  # type: ignore[attr-defined]
            self.drop_tracker(tracker)
        self.disks[place] = Disk(self.disks[place].name)
        self.forget_promises()

    def _damage(self) -> None:
        disk = self.random.choice(self.disks)
        if disk.removed < disk.synced:
            disk.frames[self.random.randrange(disk.removed, disk.synced)] = None
            self.is_damaged = True
            self.forget_promises()

    def _full_disk(self) -> None:
        self.disks[0].is_full = not self.disks[0].is_full

    def _broken_disk(self) -> None:
        self.disks[0].is_broken = not self.disks[0].is_broken

    def _fuse_agent(self) -> None:
        self.fuses["agent"] = self.random.randrange(6)

    def _fuse_tracker(self) -> None:
        self.fuses["tracker"] = self.random.randrange(12)

    def _clock(self) -> None:
        self.clock._now += self.random.choice((-86_400.0, 86_400.0))

    # -- the end

    def heal(self) -> None:
        """Everything works again, and every process that died is there again."""
        self.history.append("heal")
        self.is_healing = True
        self.fuses.clear()
        self.wire_faults = ()
        self.late.clear()
        self.database.is_away, self.database.next = False, ""
        for disk in self.disks:
            disk.is_full = disk.is_broken = False
        for spool in self.producers:
            spool.is_owned = False
        for disk in self.disks:
            if disk.holder is None and (disk.frames or not self.trackers):
                self.start_tracker(disk)
        for _ in range(40):
            moved = False
            for tracker in self.trackers:
                while tracker.commit_step():
                    moved = True
            self.clock.advance(0.2)
            if not moved and not self.spools:
                return
            self._agent()
        left = {spool.name[-2:]: (spool.logged, spool.accepted, spool.committed) for spool in self.spools.values()}
        raise Violation(f"never settled: {left}, in the database {self._found()}")

    def _found(self) -> dict[str, Mapping[Stream, int]]:
        return {name[-2:]: row.marks for name, row in self.database.rows.items()}

    def check(self) -> int:
        """Every entry once and in order; how many there are."""
        total = 0
        for spool in self.producers:
            total += self._check(spool.name, spool.logged)
        for name, needed in self.lost.items():
            if self.excused:  # what came before it may be gone with the newer database, and nobody has it any more
                needed = dict.fromkeys(Stream, 0)
            total += self._check(name, needed, at_least=True)
        return total

    def _check(self, name: str, needed: Mapping[Stream, int], *, at_least: bool = False) -> int:
        row = self.database.rows.get(name) or Row()
        for stream, count in needed.items():
            entries, mark = row.entries[stream], row.marks[stream]
            excused = self._excuse(name, stream)
            if any(later <= earlier for earlier, later in itertools.pairwise(entries)):
                raise Violation(f"{stream.name} of {name[-2:]} are {entries}: doubled or out of order")
            if gone := [n for n in range(1, count + 1) if n > excused and n not in entries]:
                raise Violation(f"{stream.name} {gone} of {name[-2:]} are lost")
            if entries and entries[-1] > count and not at_least:
                raise Violation(f"{stream.name} of {name[-2:]} are {entries}, and only {count} were logged")
            if mark != len(entries) + (row.lost if stream is Stream.points else 0):
                raise Violation(f"the watermark of {name[-2:]} is {mark}: {entries}, {row.lost} lost")
        return len(row.entries[Stream.points])


def _all_of_them(batches: Sequence[Batch], committed: Mapping[Stream, int]) -> list[Batch]:
    return sorted(batches, key=lambda batch: (batch.stream, batch.first))


def _take_gaps(batch: Batch, accepted: int) -> delivery.Decision:
    if batch.first > accepted + 1:
        return delivery.Decision(verdict=delivery.Verdict.accept, expected=batch.last + 1, batch=batch)
    return delivery.admit(batch, accepted)


def _move_cursor_first(tracker: TrackerService) -> None:
    log, committer = tracker._log, tracker._committer
    commit = committer._commit

    def moved_first(batches: Sequence[Batch]) -> Any:
        log.save_cursor(log.synced)
        log.remove_before(log.synced)
        return commit(batches)

    committer._commit = moved_first  # type: ignore[method-assign]


def _exit(code: int) -> None:
    world().history.append("    the tracker ends itself")
    raise Crash("tracker")


def _log_of(directory: Path, **_: Any) -> Log:
    return Log(next(disk for disk in world().disks if disk.name == str(directory)))


@contextmanager
def virtual(mutant: str = "") -> Iterator[None]:
    """The modules of delivery stand on what is above. Messages are off: a schedule makes hundreds."""
    if mutant and mutant not in MUTANTS:
        raise ValueError(f"there is no mutant {mutant}: {', '.join(MUTANTS)}")
    replaced = [
        (service, "WriteAheadLog", _log_of),
        (committer, "time", VirtualTime),
        (service, "open_store", lambda url: world().database),
        (service, "LiveValues", Live),
        (admission, "admit", _take_gaps if mutant == "accept_gaps" else delivery.admit),
        (shipper, "spools", lambda root: list(world().spools.values())),
        (shipper, "SpoolReader", Reader),
        (shipper, "Turn", Turn),
        (shipper, "Node", Node),
        (shipper, "os", Os),
        (shipper, "prepare_root", lambda root: None),
        (shipper, "remove_leftovers", lambda root: None),
    ]
    patches = [mock.patch.object(module, name, value) for module, name, value in replaced]
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        logging.disable(before)


def run(seed: int, mutant: str = "") -> World:
    """One schedule, inside `virtual()`. Raises Violation; the world of a failed one is its `world`."""
    here = World(seed, mutant)
    _current.append(here)
    try:
        # Each schedule knows a few faults only: all of them at once would hide what two of them do.
        faults = here.random.sample(FAULTS, here.random.randint(1, 6))
        here._producer()
        for action in here.random.choices((*WORK, *faults), k=ACTIONS):
            here.act(action)
        here.heal()
        here.points = here.check()  # type: ignore[attr-defined]
    except Violation as error:
        error.world = here  # type: ignore[attr-defined]
        raise
    finally:
        _current.pop()
    return here


@dataclass(frozen=True, kw_only=True)
class Result:
    schedules: int
    points: int
    seconds: float
    """Of this process's CPU."""
    failed_seed: int | None = None
    why: str = ""
    history: Sequence[str] = ()


def search(first: int, count: int, mutant: str = "") -> Result:
    """Schedules from seed `first` on, until one fails."""
    begun, points = time.process_time(), 0
    with virtual(mutant):
        for seed in range(first, first + count):
            try:
                points += run(seed, mutant).points  # type: ignore[attr-defined]
            except Violation as error:
                return Result(
                    schedules=seed - first + 1, points=points, seconds=time.process_time() - begun, failed_seed=seed,
                    why=str(error), history=error.world.history,  # type: ignore[attr-defined]
                )  # fmt: skip
    return Result(schedules=count, points=points, seconds=time.process_time() - begun)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.simulation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--schedules", type=int, default=1)
    parser.add_argument("--mutant", default="", help=", ".join(MUTANTS))
    parser.add_argument("--show", action="store_true", help="what happened in the schedule")
    arguments = parser.parse_args(argv)
    result = search(arguments.seed, arguments.schedules, arguments.mutant)
    if result.failed_seed is not None:
        print("\n".join(result.history))
        print(f"seed {result.failed_seed} FAILED: {result.why}")
        return 1
    if arguments.show:
        with virtual(arguments.mutant):
            print("\n".join(run(arguments.seed, arguments.mutant).history))
    print(f"{result.schedules} schedules from seed {arguments.seed}: {result.points} points in {result.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
