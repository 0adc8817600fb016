"""The tracker's log: what is *accepted* stands here, fsynced, until PostgreSQL has it.

Segments `00000001.log` … hold frames: magic, length, CRC-32 of the payload, payload (an encoded `Batch`). The
committer reads the same files behind the writer, so an outage of the database costs disk, not memory. A torn tail is
cut off at start; damage in the middle is skipped to the next intact frame and reported (the producers, who keep what
is not committed, are asked again).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator import disk
from orchestrator.errors import OrchestratorError

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
PACE = 0.002
"""Seconds between two fsyncs. Each costs a fifth of a millisecond of CPU, and who comes meanwhile shares the next."""
_FRAME = struct.Struct("<4sII")
_FRAME_MAGIC = b"ORCF"
_HEADER = b"ORCLOG\x01\x00"
_SEGMENT = re.compile(r"(\d{8,})\.log")
_CURSOR_BYTES = 200
"""More than a cursor ever has."""


class LogInUse(OrchestratorError):
    """Another process has the log open."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.directory = directory

    def __str__(self) -> str:
        return f"The tracker's log {self.directory} is in use by another tracker."


class SyncFailed(OSError):
    """The disk could not make the log durable. The state of its pages is unknown: the process must end."""


@dataclass(frozen=True, order=True, slots=True)
class Position:
    """A place between two frames."""

    segment: int
    offset: int


class WriteAheadLog:
    """Append-only. One process at a time (lockf). `append` from one thread at a time; `sync` and `read` from any.

    `wait`: seconds to wait for a process before this one that still holds the log. Raises LogInUse.
    """

    def __init__(self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES, wait: float = 0.0) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + wait
        while not _is_locked(self._lock_fd):
            if time.monotonic() >= deadline:
                os.close(self._lock_fd)
                raise LogInUse(str(directory))
            time.sleep(0.05)
        self._damaged: dict[Position, int] = {}
        """Unreadable bytes in the middle of segments that are still kept: where, how many."""
        self._damaged_before = 0
        self._syncing = threading.Lock()
        """Held during an fsync, and while the newest segment changes."""
        self._failed = False
        self._sync_at = 0.0
        numbers = self._segments()
        if not numbers:
            self._start_segment(1)
        else:
            self._number = numbers[-1]
            self._name = str(self._path(self._number))
            self._fd = os.open(self._name, os.O_RDWR)
            self._end = Position(self._number, self._cut_torn_tail())
        self._synced = self._end

    def append(self, payload: bytes) -> None:
        """Writes one frame. It counts as accepted only after `sync`.

        An OSError (a full disk) leaves no partial frame behind and does nothing to the frames before. Raises SyncFailed
        when the end of a full segment cannot be made durable.
        """
        size = _FRAME.size + len(payload)
        if self._end.offset + size > self._segment_bytes and self._end.offset > len(_HEADER):
            self._rotate()
        path = self._name
        frame = [_FRAME.pack(_FRAME_MAGIC, len(payload), zlib.crc32(payload)), payload]
        try:
            written = disk.pwritev(self._fd, frame, self._end.offset, path)
            while written < size:
                rest = memoryview(b"".join(frame))[written:]
                written += disk.pwrite(self._fd, rest, self._end.offset + written, path)
        except OSError:
            disk.truncate(self._fd, self._end.offset, path)
            raise
        self._end = Position(self._number, self._end.offset + size)

    def sync(self) -> None:
        """Returns when everything that was appended before the call is durable. Calls at the same time share an fsync:
        whoever comes first does it for all, and who waited for one that began too early does the next.

        Raises SyncFailed, from then on always: what a failed fsync left behind is unknown, and trying again would hide
        it.
        """
        wanted = self._end
        with self._syncing:
            if self._synced < wanted:
                time.sleep(max(self._sync_at - time.monotonic(), 0.0))
                self._sync()

    def _sync(self) -> None:
        reached = self._end  # what is appended from here on may miss this one
        if self._failed:
            raise SyncFailed("an earlier fsync of the tracker's log failed")
        try:
            disk.fsync(self._fd, self._name)
        except OSError as error:
            self._failed = True
            raise SyncFailed(*error.args) from error
        self._synced = reached
        self._sync_at = time.monotonic() + PACE

    @property
    def synced(self) -> Position:
        return self._synced

    @property
    def damaged_bytes(self) -> int:
        """Bytes in the middle of segments that were found unreadable."""
        return self._damaged_before + sum(list(self._damaged.values()))

    def start(self) -> Position:
        """Before the first frame that is still kept."""
        return Position(self._segments()[0], len(_HEADER))

    def read(self, position: Position, limit_bytes: int) -> Iterator[tuple[Position, bytes]]:
        """Intact, synced frames from `position` on, with the position behind each; about `limit_bytes` of them."""
        end = self._synced
        if position == end:
            return
        total = 0
        for number in self._segments():
            if number < position.segment:
                continue
            offset = position.offset if number == position.segment else len(_HEADER)
            with self._path(number).open("rb") as file:
                stop = end.offset if number == end.segment else os.fstat(file.fileno()).st_size
                for after, payload in self._frames(number, file, offset, stop):
                    yield Position(number, after), payload
                    total += len(payload)
                    if total >= limit_bytes:
                        return
            if number == end.segment:
                return

    def remove_before(self, position: Position) -> None:
        """Removes segments that lie wholly before `position`."""
        for number in self._segments():
            if number < position.segment:
                disk.unlink(self._path(number))
        for place in [place for place in self._damaged if place.segment < position.segment]:
            self._damaged_before += self._damaged.pop(place)

    def load_cursor(self) -> Position:
        """Where the committer had arrived; the start of the log when that is not known."""
        start = self.start()
        try:
            with (self.directory / "cursor.json").open("rb") as file:
                raw = json.loads(file.read(_CURSOR_BYTES))
            cursor = Position(int(raw["segment"]), int(raw["offset"]))
        except (OSError, ValueError, ArithmeticError, LookupError, TypeError):
            return start
        if cursor > self._synced or cursor.offset < len(_HEADER):
            # Of a log that was lost or cut since: waiting there would pass over what is written now.
            return start
        return max(cursor, start)

    def save_cursor(self, position: Position) -> None:
        """Not fsynced: a cursor that is too old only makes the committer look at what the database already has."""
        temporary = self.directory / "cursor.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            text = json.dumps({"segment": position.segment, "offset": position.offset})
            disk.write(fd, text.encode(), str(temporary))
        finally:
            os.close(fd)
        disk.rename(temporary, self.directory / "cursor.json")

    def size_bytes(self) -> int:
        total = 0
        for number in self._segments():
            with contextlib.suppress(FileNotFoundError):  # the committer has just removed it
                total += self._path(number).stat().st_size
        return total

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._lock_fd)

    def _rotate(self) -> None:
        with self._syncing:
            self._sync()
            full = self._fd
            self._start_segment(self._number + 1)
            self._synced = self._end
        os.close(full)

    def _start_segment(self, number: int) -> None:
        """Makes a segment and goes on in it. When that fails (a full disk), the log stays in the one it has."""
        path = self._path(number)
        # What may be there is left over from an attempt that failed: the newest segment was another one.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            disk.pwrite(fd, _HEADER, 0, str(path))
            disk.fsync(fd, str(path))
            disk.fsync_directory(self.directory)
        except OSError:
            os.close(fd)
            disk.unlink(path)
            raise
        self._fd, self._number, self._name = fd, number, str(path)
        self._end = Position(number, len(_HEADER))

    def _cut_torn_tail(self) -> int:
        path = self._name
        size, end = os.fstat(self._fd).st_size, len(_HEADER)
        if size < end:
            disk.truncate(self._fd, 0, path)
            disk.pwrite(self._fd, _HEADER, 0, path)
        with open(path, "rb") as file:
            for after, _ in self._frames(self._number, file, end, max(size, end), is_tail=True):
                end = after
        if size > end:
            logger.warning("the tracker's log had %d unfinished bytes at its end; cut off", size - end)
            disk.truncate(self._fd, end, path)
        disk.fsync(self._fd, path)
        return end

    def _frames(
        self, number: int, file: BinaryIO, offset: int, stop: int, *, is_tail: bool = False
    ) -> Iterator[tuple[int, bytes]]:
        """Up to `stop`. `is_tail`: what is not whole at the end was never finished, it is not damage."""
        file.seek(offset)
        while offset + _FRAME.size <= stop:
            magic, length, crc = _FRAME.unpack(file.read(_FRAME.size))
            payload = file.read(length) if magic == _FRAME_MAGIC and offset + _FRAME.size + length <= stop else b""
            if magic == _FRAME_MAGIC and len(payload) == length and zlib.crc32(payload) == crc:
                offset += _FRAME.size + length
                yield offset, payload
                continue
            following = self._next_magic(file, offset + 1, stop)
            if following is None:
                break
            self._note_damage(Position(number, offset), following - offset)
            offset = following
            file.seek(offset)
        if offset < stop and not is_tail:
            self._note_damage(Position(number, offset), stop - offset)

    def _note_damage(self, place: Position, size: int) -> None:
        if place not in self._damaged:
            self._damaged[place] = size
            logger.error("the tracker's log is damaged at byte %d of segment %d: %d bytes are skipped, and asked for "
                         "again", place.offset, place.segment, size)  # fmt: skip

    @staticmethod
    def _next_magic(file: BinaryIO, offset: int, stop: int) -> int | None:
        file.seek(offset)
        found = file.read(stop - offset).find(_FRAME_MAGIC)
        return None if found < 0 else offset + found

    def _segments(self) -> list[int]:
        found = (_SEGMENT.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match[1]) for match in found if match)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:08d}.log"


class LogView(WriteAheadLog):
    """A log as it stands on the disk, whoever writes it: without the lock, and without touching anything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._damaged = {}
        self._damaged_before = 0

    def is_owned(self) -> bool:
        """A tracker has it. Not for the process that has it itself."""
        try:
            fd = os.open(self.directory / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not _is_locked(fd)
        finally:
            os.close(fd)

    def frames(self) -> Iterator[bytes]:
        """All that are intact; what is not finished at the very end is no damage."""
        numbers = self._segments()
        for number in numbers:
            with contextlib.suppress(FileNotFoundError), self._path(number).open("rb") as file:
                stop = os.fstat(file.fileno()).st_size
                for _, payload in self._frames(number, file, len(_HEADER), stop, is_tail=number == numbers[-1]):
                    yield payload

    def _note_damage(self, place: Position, size: int) -> None:
        self._damaged[place] = size


def _is_locked(fd: int) -> bool:
    """Takes the lock of this process, unless another one has it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
