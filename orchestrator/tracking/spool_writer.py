"""The producer's side of a spool: a point is a few stores into mapped memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import time as clock
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator import disk
from orchestrator.records import Fact, FactKind, Stream, WhenFull
from orchestrator.tracking import spool_layout as layout
from orchestrator.tracking.spool_layout import PAGE_BYTES, PAGE_DATA_BYTES, Owner
from orchestrator.tracking.spool_root import Bell, map_file, own_producers, prepare_root, reserve_file, room_left

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 1 << 30


@dataclass(slots=True)
class _Dropped:
    """Points that a full spool did not take."""

    since: float
    first_step: int
    last_step: int
    count: int = 0


class SpoolWriter:
    """The producer's side. One per (process, thread): it takes no lock.

    After a fork the child must not use it (`Logger` sees to that). When `max_bytes` of points wait to be committed, the
    node's budget is used up or the disk is full, `next_page` blocks, or (`WhenFull.gap`) points are dropped, counted
    and told of in an event. `Logger.log` does what `append` does without the call: the fields that have no underscore
    are there for it.
    """

    __slots__ = (
        "_base_page", "_closed", "_control", "_dropped", "_facts_fd", "_facts_logged", "_facts_waiting",
        "_is_writing_facts", "_key_count", "_keys_bytes", "_keys_fd", "_map", "_max_bytes", "_number", "_owner_fd",
        "_retry_at", "_root", "_salt", "_when_full", "base", "bell", "bell_words", "directory", "keys", "limit",
        "offset", "producer", "segment", "words",
    )  # fmt: skip

    def __init__(
        self,
        root: Path,
        owner: Owner,
        *,
        max_bytes: int = DEFAULT_BYTES,
        when_full: WhenFull = WhenFull.block,
        producer: str | None = None,
    ) -> None:
        prepare_root(root)
        self.producer = producer or uuid.uuid4().hex
        self.directory = root / self.producer
        self._root, self._max_bytes, self._when_full = root, max_bytes, when_full
        self._salt = layout.salt_of(self.producer)
        self.bell = Bell(root, self.producer)
        making = root / f".{self.producer}"
        making.mkdir(mode=0o700)
        identity = layout.identity_entry({**asdict(owner), "max_bytes": max_bytes}, self._salt)
        control = bytearray(PAGE_BYTES)
        control[layout.IDENTITY_OFFSET : layout.IDENTITY_OFFSET + len(identity)] = identity
        reserve_file(making / "control", PAGE_BYTES)
        _write_whole(making / "control", bytes(control[:PAGE_BYTES]))
        _write_whole(making / "keys", identity)
        reserve_file(making / "points-000000", layout.segment_pages(0) * PAGE_BYTES, is_new=True)
        self._owner_fd = os.open(making / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._owner_fd, fcntl.LOCK_EX)
        # The agent looks only at directories without a leading dot: it never sees one that is half made.
        disk.rename(making, self.directory)
        self._control = map_file(self.directory / "control")
        self.words = memoryview(self._control).cast("Q")
        self._keys_fd = os.open(self.directory / "keys", os.O_WRONLY | os.O_CLOEXEC)
        self._key_count, self._keys_bytes = 0, len(identity)
        self.keys: dict[str, int] = {}
        """Numbers of the keys that are written down."""
        self._facts_fd = -1
        self._facts_logged = 0
        self._facts_waiting: list[Fact] = []
        self._is_writing_facts = False
        self._dropped: _Dropped | None = None
        self._retry_at = 0.0
        self._closed = False
        self.bell_words = self.bell.words
        self._number = -1
        self.base = 0
        """Position of the segment's first byte."""
        self.offset = 0
        """Where the next record goes, in the segment."""
        self.limit = 0
        """Where the page's records end."""
        self._use_segment(0, map_file(self.directory / "points-000000"))
        self.words[layout.FACTS + 1] = layout.inverted(0)
        own_producers.add(self.producer)

    def _use_segment(self, number: int, mapped: mmap.mmap) -> None:
        segment, base_page = memoryview(mapped), layout.segment_start(number)
        if self._number >= number:
            return  # a signal handler was faster
        # No calls from here on: a signal handler sees either the old segment or the new one.
        self._map, self.segment, self._number = mapped, segment, number
        self._base_page, self.base = base_page, base_page * PAGE_BYTES
        self.offset, self.limit = 0, PAGE_DATA_BYTES

    # -- points

    def add_key(self, key: str, step: int) -> bool:
        """Writes a new key down, so that no point ever names an unknown one. False: there is no room, and the point of
        this step was counted as dropped.
        """
        told = False
        while not (self._is_due() and self._write_key(key)):
            if self._when_full is WhenFull.gap:
                self._drop(step)
                return False
            if not told:
                logger.warning("metrics wait: %s", _FULL)
                told = True
            clock.sleep(0.02)
        self._say_dropped()
        return True

    def append(self, key_index: int, step: int, time: float, value: float) -> None:
        """Logs one point. step: int64; time: seconds since 1970."""
        while True:
            offset = self.offset
            if offset == self.limit:
                if not self.next_page(step):
                    return
                continue
            layout.RECORD_STRUCT.pack_into(self.segment, offset, step, time, value, key_index, offset + 32)
            if self.offset == offset:  # else a signal handler logged just now and took the place
                self.offset = offset + 32
                break
        # The position moves after the record is whole: the agent reads up to it.
        self.words[layout.POSITION] = self.base + self.offset
        self.bell_words[0] = 1

    def next_page(self, step: int) -> bool:
        """Seals the page that is full and begins the next one. False: there is no room, and the point of this step was
        counted as dropped.
        """
        offset = self.offset
        if offset != self.limit:
            return True  # a signal handler was faster; so below
        start = offset - PAGE_DATA_BYTES
        page = self._base_page + start // PAGE_BYTES
        is_last = start // PAGE_BYTES + 1 == layout.segment_pages(self._number)
        with self.segment[start:offset] as records:
            sealed = layout.checksum(records, page, self._salt)
        if self.offset != offset:
            return True
        layout.SEAL.pack_into(self.segment, offset, page, 0, 0, 0, sealed)
        if self.offset != offset:
            return True
        self.words[layout.POSITION] = self.base + offset
        self.words[layout.PAGES] = page + 1
        if is_last:
            return self._next_segment(step)
        self.offset = offset + layout.RECORD_BYTES
        self.limit = offset + PAGE_BYTES
        return True

    def _next_segment(self, step: int) -> bool:
        number, told = self._number + 1, False
        self.bell.hurry()  # a segment is much: it is shipped now, or there is no room soon
        while True:
            mapped = self._new_segment(number) if self._is_due() else None
            if self._number >= number:
                return True
            if mapped is not None:
                break
            if self._when_full is WhenFull.gap:
                self._drop(step)
                return False
            if not told:
                logger.warning("metrics wait: %s", _FULL)
                told = True
            clock.sleep(0.02)
        self._say_dropped()
        full, full_map = self.segment, self._map
        self._use_segment(number, mapped)
        if self.segment is not full and self._map is mapped:
            full.release()
            with contextlib.suppress(BufferError):  # a signal handler came while the page was summed up
                full_map.close()
        return True

    def _is_due(self) -> bool:
        """A spool that drops looks for room now and then, not for each point."""
        return self._dropped is None or clock.monotonic() >= self._retry_at

    def _new_segment(self, number: int) -> mmap.mmap | None:
        """The next segment, reserved; None if there is no room for it. Raises OSError for other troubles; nothing has
        changed then, and the next point tries again.
        """
        size = layout.segment_pages(number) * PAGE_BYTES
        if not self._may_hold(layout.segment_start(number) * PAGE_BYTES + size, size):
            return None
        path = self.directory / f"points-{number:06d}"
        try:
            disk.rename(self.directory / f"next-{number:06d}", path)
        except FileNotFoundError:
            # The agent did not come in time, or there is none.
            try:
                reserve_file(path, size)
            except OSError as error:
                if error.errno not in disk.NO_ROOM:
                    raise
                disk.unlink(path)
                return None
        return map_file(path)

    def _may_hold(self, end: int, size: int) -> bool:
        """Whether the spool may reach up to position `end`, by its own bound and by the node's."""
        if self.committed >= self.logged:
            return True  # whatever others hold: a node that is full must not shut out who holds nothing
        if end - self._said(layout.RELEASED) > max(self._max_bytes, 2 * size):
            return False
        left = room_left(self._root)
        return left is None or left >= size

    def _drop(self, step: int) -> None:
        if self._dropped is None:
            self._dropped = _Dropped(clock.time(), step, step)
            logger.warning("metrics are dropped: %s", _FULL)
            message = f"from step {step} on points are dropped: {_FULL}"
            self._try_fact("spool_full", message, {"first_step": step})
        self._dropped.count += 1
        self._dropped.last_step = step
        if clock.monotonic() >= self._retry_at:
            self._retry_at = clock.monotonic() + 0.02

    def _say_dropped(self) -> None:
        """What was dropped, as a fact; where even that has no room, the next time says it."""
        dropped = self._dropped
        if dropped is None:
            return
        seconds = max(clock.time() - dropped.since, 0.0)
        details = {"count": dropped.count, "seconds": seconds,
                   "first_step": dropped.first_step, "last_step": dropped.last_step}  # fmt: skip
        message = f"{dropped.count} points of steps {dropped.first_step} to {dropped.last_step} were dropped: {_FULL}"
        if self._try_fact("dropped_points", message, details):
            self._dropped = None

    def _try_fact(self, kind: str, message: str, details: Mapping[str, Any]) -> bool:
        data = {"kind": kind, "message": message, "level": "warning", "details": details}
        try:
            self.append_fact(Fact(kind=FactKind.event, at=clock.time(), data=data))
        except OSError:
            return False
        return True

    def _write_key(self, key: str) -> bool:
        """False on a full disk. What was begun stays behind; a reader looks for the next name that is whole."""
        name = key.encode()
        size = layout.entry_bytes(name)
        # A signal handler may log, too; it comes only after calls, and there is none in these two lines.
        index, start = self._key_count, self._keys_bytes
        self._key_count, self._keys_bytes = index + 1, start + size
        raw = layout.entry(index, name, self._salt)
        try:
            while raw:
                written = disk.pwrite(self._keys_fd, raw, start, "keys")
                raw, start = raw[written:], start + written
        except OSError as error:
            if error.errno not in disk.NO_ROOM:
                raise
            return False
        self.keys[key] = index
        return True

    # -- facts

    def append_fact(self, fact: Fact) -> None:
        """Logs one fact: the line, then the counter. Raises OSError on a full disk, and nothing has changed.

        A signal handler that comes in the middle leaves its fact to the call that it interrupted: two would take the
        same number.
        """
        self._facts_waiting.append(fact)
        if self._is_writing_facts:
            return
        self._is_writing_facts = True
        try:
            while self._facts_waiting:
                self._write_fact(self._facts_waiting.pop(0))
        finally:
            self._is_writing_facts = False

    def _write_fact(self, fact: Fact) -> None:
        path = str(self.directory / "facts")
        if self._facts_fd < 0:
            self._facts_fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        number = self._facts_logged + 1
        line = layout.fact_line(number, json.dumps(fact.to_json(), separators=(",", ":")).encode(), self._salt)
        before = os.fstat(self._facts_fd).st_size
        try:
            written = 0
            while written < len(line):
                written += disk.write(self._facts_fd, line[written:], path)
        except OSError:
            # Most likely a full disk. Half a line would spoil the facts behind it.
            disk.truncate(self._facts_fd, before, path)
            raise
        self._facts_logged = number
        self.words[layout.FACTS] = number
        self.words[layout.FACTS + 1] = layout.inverted(number)
        self.bell.hurry()

    # -- what the agent says back

    @property
    def logged(self) -> int:
        return layout.points_before(self.base + self.offset)

    @property
    def committed(self) -> int:
        return self._said(layout.WATERMARKS[Stream.points][1])

    def _said(self, at: int) -> int:
        """A number of the agent's; 0 while it is being written, or damaged."""
        return layout.confirmed(self.words[at], self.words[at + 1]) or 0

    @property
    def stop_requested(self) -> bool:
        return self.words[layout.STOP] == layout.STOP_MARK

    def hurry(self) -> None:
        """Somebody waits for what was logged: the agent is to look at once."""
        self.bell.hurry()

    def is_accepted(self) -> bool:
        """Everything logged so far is fsynced in the tracker's log."""
        return self._reached(0)

    def is_committed(self) -> bool:
        """Everything logged so far is in a PostgreSQL commit."""
        return self._reached(1)

    def _reached(self, which: int) -> bool:
        logged = {Stream.points: self.logged, Stream.facts: self._facts_logged}
        return all(self._said(layout.WATERMARKS[stream][which]) >= logged[stream] for stream in Stream)

    def close(self) -> None:
        """Gives the spool up; the agent ships the rest and removes it."""
        if self._closed:
            return
        self._closed = True
        self._say_dropped()
        self.words[layout.POSITION] = self.base + self.offset
        self._seal_rest()
        self.bell.hurry()
        self.segment.release()
        self.words.release()
        for mapped in (self._map, self._control, self.bell):
            mapped.close()
        for fd in (self._keys_fd, self._facts_fd, self._owner_fd):
            if fd >= 0:
                os.close(fd)
        own_producers.discard(self.producer)

    def _seal_rest(self) -> None:
        """The checksum of the page that is not full goes into `control`."""
        start = self.offset - self.offset % PAGE_BYTES
        if start == self.offset:
            return  # nothing is on this page; the one before has its seal
        with self.segment[start : self.offset] as records:
            rest = layout.checksum(records, self._base_page + start // PAGE_BYTES, self._salt)
        self.words[layout.CLOSED + 1] = rest
        self.words[layout.CLOSED] = layout.CLOSED_MARK

    def abandon_after_fork(self) -> None:
        """In a forked child: drop the mappings without touching the parent's counters or lock."""
        self._closed = True
        # The lock is the parent's alone (locks are not inherited), so the child may ask for it like anybody else.
        own_producers.discard(self.producer)


_FULL = "the spool is full and nothing is being committed; is PostgreSQL down, or the disk full? (`orc status`)"


def _write_whole(path: Path, raw: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while raw:
            raw = raw[disk.write(fd, raw, str(path)) :]
    finally:
        os.close(fd)
