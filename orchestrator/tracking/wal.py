"""The tracker's log: what is *accepted* stands here, fsynced, until PostgreSQL has it.

Segments `00000001.log` … hold frames: magic, length, CRC-32 of the payload, payload (an encoded `Batch`). The
committer reads the same files behind the writer, so an outage of the database costs disk, not memory. A torn tail is
cut off at start; damage in the middle is skipped to the next intact frame and reported (the producers, who keep what
is not committed, are asked again).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import OrchestratorError

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
_FRAME = struct.Struct("<4sII")
_FRAME_MAGIC = b"ORCF"
_HEADER = b"ORCLOG\x01\x00"


class LogInUse(OrchestratorError):
    """Another process has the log open."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.directory = directory

    def __str__(self) -> str:
        return f"The tracker's log {self.directory} is in use by another tracker."


@dataclass(frozen=True, order=True, slots=True)
class Position:
    """A place between two frames."""

    segment: int
    offset: int


class WriteAheadLog:
    """Append-only. One process at a time (lockf); `append` and `sync` from one thread, `read` from any.

    After a failed fsync the pages' state is unknown, so it is never tried again: `sync` raises OSError and the owner
    must exit. `wait`: seconds to wait for a process before this one that still holds the log. Raises LogInUse.
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        fsync: Callable[[int], None] = os.fsync,
        wait: float = 0.0,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + wait
        while not _is_locked(self._lock_fd):
            if time.monotonic() >= deadline:
                os.close(self._lock_fd)
                raise LogInUse(str(directory))
            time.sleep(0.05)
        self.damaged_bytes = 0
        """Bytes in the middle of segments that were found unreadable."""
        numbers = self._segments()
        if not numbers:
            self._start_segment(1)
        else:
            self._number = numbers[-1]
            self._fd = os.open(self._path(self._number), os.O_RDWR)
            self._end = self._cut_torn_tail()
        self._synced = Position(self._number, self._end)

    def append(self, payload: bytes) -> None:
        """Writes one frame. It counts as accepted only after `sync`. A failed write leaves no partial frame behind."""
        frame = _FRAME.pack(_FRAME_MAGIC, len(payload), zlib.crc32(payload)) + payload
        if self._end + len(frame) > self._segment_bytes and self._end > len(_HEADER):
            self._rotate()
        try:
            written = 0
            while written < len(frame):
                written += os.pwrite(self._fd, frame[written:], self._end + written)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        self._end += len(frame)

    def sync(self) -> None:
        """Makes everything appended durable. Raises OSError when the disk says no."""
        self._fsync(self._fd)
        self._synced = Position(self._number, self._end)

    def discard_unsynced(self) -> None:
        """Forgets what was appended after the last `sync` in the newest segment."""
        if self._synced.segment == self._number:
            os.ftruncate(self._fd, self._synced.offset)
            self._end = self._synced.offset

    @property
    def synced(self) -> Position:
        return self._synced

    def start(self) -> Position:
        """Before the first frame that is still kept."""
        return Position(self._segments()[0], len(_HEADER))

    def read(self, position: Position, limit_bytes: int) -> Iterator[tuple[Position, bytes]]:
        """Intact, synced frames from `position` on, with the position behind each; about `limit_bytes` of them."""
        end = self._synced
        total = 0
        for number in self._segments():
            if number < position.segment:
                continue
            offset = position.offset if number == position.segment else len(_HEADER)
            stop = end.offset if number == end.segment else self._path(number).stat().st_size
            with self._path(number).open("rb") as file:
                for after, payload in self._frames(file, offset, stop):
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
                self._path(number).unlink(missing_ok=True)

    def load_cursor(self) -> Position:
        """Where the committer had arrived; the start of the log when that is not known."""
        try:
            raw = json.loads((self.directory / "cursor.json").read_text())
            cursor = Position(int(raw["segment"]), int(raw["offset"]))
        except (OSError, ValueError, KeyError, TypeError):
            return self.start()
        if cursor > self._synced:
            # Of a log that was lost or cut since: waiting there would pass over what is written now.
            return self.start()
        return max(cursor, self.start())

    def save_cursor(self, position: Position) -> None:
        """Not fsynced: a cursor that is too old only makes the committer look at what the database already has."""
        temporary = self.directory / "cursor.tmp"
        temporary.write_text(json.dumps({"segment": position.segment, "offset": position.offset}))
        temporary.rename(self.directory / "cursor.json")

    def size_bytes(self) -> int:
        return sum(self._path(number).stat().st_size for number in self._segments())

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._lock_fd)

    def _rotate(self) -> None:
        self._fsync(self._fd)
        full = self._fd
        self._start_segment(self._number + 1)
        os.close(full)

    def _start_segment(self, number: int) -> None:
        """Makes a segment and goes on in it. When that fails (a full disk), the log stays in the one it has."""
        path = self._path(number)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.pwrite(fd, _HEADER, 0)
            self._fsync(fd)
            directory_fd = os.open(self.directory, os.O_RDONLY)
            try:
                self._fsync(directory_fd)
            finally:
                os.close(directory_fd)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        self._fd, self._number, self._end = fd, number, len(_HEADER)

    def _cut_torn_tail(self) -> int:
        size = os.fstat(self._fd).st_size
        end = len(_HEADER)
        if size < end:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, _HEADER, 0)
        with self._path(self._number).open("rb") as file:
            for after, _ in self._frames(file, end, max(size, end)):
                end = after
        if size > end:
            logger.warning("the tracker's log had %d unfinished bytes at its end; cut off", size - end)
            os.ftruncate(self._fd, end)
        self._fsync(self._fd)
        return end

    def _frames(self, file, offset: int, stop: int) -> Iterator[tuple[int, bytes]]:  # type: ignore[no-untyped-def]
        while offset + _FRAME.size <= stop:
            file.seek(offset)
            magic, length, crc = _FRAME.unpack(file.read(_FRAME.size))
            payload = file.read(length) if magic == _FRAME_MAGIC and offset + _FRAME.size + length <= stop else b""
            if magic == _FRAME_MAGIC and len(payload) == length and zlib.crc32(payload) == crc:
                offset += _FRAME.size + length
                yield offset, payload
                continue
            following = self._next_magic(file, offset + 1, stop)
            if following is None:
                return
            self.damaged_bytes += following - offset
            logger.error("the tracker's log is damaged at byte %d of %s; skipped to %d", offset, file.name, following)
            offset = following

    @staticmethod
    def _next_magic(file, offset: int, stop: int) -> int | None:  # type: ignore[no-untyped-def]
        file.seek(offset)
        found = file.read(stop - offset).find(_FRAME_MAGIC)
        return None if found < 0 else offset + found

    def _segments(self) -> list[int]:
        return sorted(int(path.stem) for path in self.directory.glob("*.log"))

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:08d}.log"


def _is_locked(fd: int) -> bool:
    """Takes the lock of this process, unless another one has it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
