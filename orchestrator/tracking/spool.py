"""The spool: where a producer's points and facts are *logged*, on the producer's own node.

One directory per producer, named by its id:

    meta.json       who: run, attempt, rank, pid, host
    control         4 KiB, memory-mapped by producer and agent: counters, one writer per field
    keys            metric key names, in the order of their first use
    points-000000   segments of fixed 32-byte records (`records.POINT`); point n stands in segment (n-1) //
    SEGMENT_POINTS
    facts.jsonl     one JSON fact per line
    owner           locked with lockf by the living producer

The producer writes a record and then moves the `logged` counter; the agent reads up to the counter. Both are plain
stores into shared memory, so what was logged survives SIGKILL of the producer. `fcntl.lockf`, not `flock`: a forked
DataLoader worker that outlives its killed parent would keep a flock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import shutil
import struct
import time as clock
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import OrchestratorError
from orchestrator.records import POINT, PROTOCOL, Batch, Fact, Stream

logger = logging.getLogger(__name__)

SEGMENT_POINTS = 32_768
"""Points per segment file: 1 MiB."""
_SEGMENT_BYTES = SEGMENT_POINTS * POINT.itemsize
_KEYS_STEP_BYTES = 1 << 18
_CONTROL_BYTES = 4096
_MAGIC = b"ORCSPOOL"

_U64 = struct.Struct("<Q")
_KEY_HEAD = struct.Struct("<H")
_RECORD = struct.Struct("<IIqdd")

# Offsets in `control`. Each is a cache line of its own, written by one side only.
_LOGGED, _FACTS_LOGGED, _KEYS_BYTES, _CLOSED = 64, 128, 192, 256  # by the producer
_ACCEPTED, _COMMITTED, _FACTS_ACCEPTED, _FACTS_COMMITTED, _STOP = 512, 576, 640, 704, 768  # by the agent

_WATERMARKS = {Stream.points: (_ACCEPTED, _COMMITTED), Stream.facts: (_FACTS_ACCEPTED, _FACTS_COMMITTED)}

_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "glusterfs", "ceph", "beegfs", "fuse.sshfs"}
)


_own: set[str] = set()
"""Producers of this process that still log. Their locks must not be asked for from here: the kernel would grant a
second descriptor the lock, and closing that descriptor would give up the first one's.
"""


class SpoolUnusable(OrchestratorError):
    """The spool directory cannot be used: not writable, on a network file system, or made by another version."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        hint = "Name a directory on a local disk: `orc up tracking.spool_dir=DIR`."
        return f"The spool directory {self.path} cannot be used: {self.why}. {hint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose points these are. Example: Owner(run="r1", attempt=1, rank=0)."""

    run: str
    attempt: int
    rank: int
    pid: int = 0
    host: str = ""


def file_system_of(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds `path`, as /proc/mounts names it; '' where that is unknown."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return ""
    best, kind = "", ""
    real = str(path.resolve())
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def prepare_root(root: Path, mounts: str | None = None) -> None:
    """Makes the spool directory. Raises SpoolUnusable on network file systems, where mapped memory is not shared
    between hosts.
    """
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SpoolUnusable(str(root), error.strerror or str(error)) from error
    kind = file_system_of(root, mounts)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise SpoolUnusable(str(root), f"it is on a network file system ({kind})")


class SpoolWriter:
    """The producer's side. One per (process, thread): it takes no lock.

    After a fork the child must not use it (`Logger` sees to that). Blocks in `append` only when `max_bytes` of points
    wait to be committed.
    """

    def __init__(self, root: Path, owner: Owner, *, max_bytes: int = 1 << 30, producer: str | None = None) -> None:
        prepare_root(root)
        self.producer = producer or uuid.uuid4().hex
        self.directory = root / self.producer
        self._max_points = max(max_bytes // POINT.itemsize, 2 * SEGMENT_POINTS)
        making = root / f".{self.producer}"
        making.mkdir(mode=0o700)
        (making / "facts.jsonl").touch()
        (making / "meta.json").write_text(
            json.dumps({"protocol": PROTOCOL, "producer": self.producer, **asdict(owner)})
        )
        control = bytearray(_CONTROL_BYTES)
        control[:8] = _MAGIC
        struct.pack_into("<I", control, 8, PROTOCOL)
        (making / "control").write_bytes(control)
        _reserve(making / "keys", _KEYS_STEP_BYTES)
        _reserve(making / "points-000000", _SEGMENT_BYTES)
        self._owner_fd = os.open(making / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.lockf(self._owner_fd, fcntl.LOCK_EX)
        # The agent looks only at directories without a leading dot: it never sees one that is half made.
        making.rename(self.directory)
        self._control = _map(self.directory / "control")
        self._keys_map = _map(self.directory / "keys")
        self._keys: dict[str, int] = {}
        self._key_count = 0
        self._keys_bytes = 0
        self._segment = _map(self.directory / "points-000000")
        self._segment_number = 0
        self._offset = 0
        self._logged = 0
        self._facts_fd = os.open(self.directory / "facts.jsonl", os.O_WRONLY | os.O_APPEND)
        self._facts_logged = 0
        self._closed = False
        _own.add(self.producer)

    # -- points

    def key_index(self, key: str) -> int:
        """The key's number; a new key is written first, so that no point ever names an unknown one."""
        index = self._keys.get(key)
        if index is None:
            index = self._add_key(key)
        return index

    def append(self, key_index: int, step: int, time: float, value: float) -> None:
        """Logs one point. step: int64; time: seconds since 1970."""
        offset = self._offset
        if offset == _SEGMENT_BYTES:
            self._next_segment()
            offset = self._offset
        _RECORD.pack_into(self._segment, offset, key_index, 0, step, time, value)
        if self._offset != offset:
            return self.append(key_index, step, time, value)  # a signal handler logged just now and took the place
        self._offset = offset + 32
        self._logged += 1
        # The counter moves after the record is whole: the agent reads up to it.
        _U64.pack_into(self._control, _LOGGED, self._logged)

    def _add_key(self, key: str) -> int:
        name = key.encode()
        entry = _KEY_HEAD.pack(len(name)) + name
        if self._keys_bytes + len(entry) > len(self._keys_map):
            _reserve(self.directory / "keys", len(self._keys_map) + max(_KEYS_STEP_BYTES, len(entry)))
            small, self._keys_map = self._keys_map, _map(self.directory / "keys")
            small.close()
        size_bytes = len(entry)
        # A signal handler may log, too; it comes only after calls, and there is none from here to the counter.
        index, start = self._key_count, self._keys_bytes
        end = start + size_bytes
        self._keys_map[start:end] = entry
        self._key_count, self._keys_bytes, self._keys[key] = index + 1, end, index
        _U64.pack_into(self._control, _KEYS_BYTES, end)
        return index

    def _next_segment(self) -> None:
        self._wait_for_room()
        number = self._segment_number + 1
        if self._offset != _SEGMENT_BYTES:
            return  # a signal handler logged just now and was faster; so below
        path = self.directory / f"points-{number:06d}"
        _reserve(path, _SEGMENT_BYTES)  # raises on a full disk: nothing has changed, the next point tries again
        segment = _map(path)
        if self._segment_number >= number:
            return
        full = self._segment
        self._segment, self._segment_number, self._offset = segment, number, 0
        full.close()

    def _wait_for_room(self) -> None:
        warned = False
        while self._logged - self.committed > self._max_points:
            if not warned:
                logger.warning(
                    "metrics wait: the spool is full and nothing is being committed; is PostgreSQL down? (`orc status`)"
                )
                warned = True
            clock.sleep(0.02)

    # -- facts

    def append_fact(self, fact: Fact) -> None:
        """Logs one fact: the line, then the counter. Raises OSError on a full disk, and nothing has changed."""
        line = json.dumps(fact.to_json(), separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self._facts_fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._facts_fd, line[written:])
        except OSError:
            # Most likely a full disk. Half a line would spoil the facts behind it.
            os.ftruncate(self._facts_fd, before)
            raise
        self._facts_logged += 1
        _U64.pack_into(self._control, _FACTS_LOGGED, self._facts_logged)

    # -- what the agent says back

    @property
    def logged(self) -> int:
        return self._logged

    @property
    def committed(self) -> int:
        return _U64.unpack_from(self._control, _COMMITTED)[0]

    @property
    def stop_requested(self) -> bool:
        return self._control[_STOP] != 0

    def is_accepted(self) -> bool:
        """Everything logged so far is fsynced in the tracker's log."""
        return self._reached(_ACCEPTED, _FACTS_ACCEPTED)

    def is_committed(self) -> bool:
        """Everything logged so far is in a PostgreSQL commit."""
        return self._reached(_COMMITTED, _FACTS_COMMITTED)

    def _reached(self, points: int, facts: int) -> bool:
        return (
            _U64.unpack_from(self._control, points)[0] >= self._logged
            and _U64.unpack_from(self._control, facts)[0] >= self._facts_logged
        )

    def close(self) -> None:
        """Gives the spool up; the agent ships the rest and removes it."""
        if self._closed:
            return
        self._closed = True
        _U64.pack_into(self._control, _CLOSED, 1)
        for mapped in (self._segment, self._keys_map, self._control):
            mapped.close()
        os.close(self._facts_fd)
        os.close(self._owner_fd)
        _own.discard(self.producer)

    def abandon_after_fork(self) -> None:
        """In a forked child: drop the mappings without touching the parent's counters or lock."""
        self._closed = True
        # The lock is the parent's alone (locks are not inherited), so the child may ask for it like anybody else.
        _own.discard(self.producer)


class SpoolReader:
    """The agent's side of one producer's spool. Raises SpoolUnusable when the directory is no such spool."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.producer = directory.name
        try:
            meta: Mapping[str, Any] = json.loads((directory / "meta.json").read_text())
            self._control = _map(directory / "control")
        except (OSError, ValueError) as error:
            raise SpoolUnusable(str(directory), str(error)) from error
        if self._control[:8] != _MAGIC or struct.unpack_from("<I", self._control, 8)[0] != PROTOCOL:
            raise SpoolUnusable(str(directory), "it was written by another version")
        fields = Owner.__dataclass_fields__
        try:
            self.owner = Owner(**{name: meta[name] for name in fields})
        except (KeyError, TypeError) as error:
            raise SpoolUnusable(str(directory), f"its meta.json lacks {error}") from error
        self._keys: list[str] = []
        self._keys_read = 0
        self._facts_position = (0, 0)  # (facts read, byte offset behind them)
        self._removed_segments = 0

    def logged(self, stream: Stream) -> int:
        return self._get(_LOGGED if stream is Stream.points else _FACTS_LOGGED)

    def accepted(self, stream: Stream) -> int:
        return self._get(_WATERMARKS[stream][0])

    def committed(self, stream: Stream) -> int:
        return self._get(_WATERMARKS[stream][1])

    def acknowledge(self, stream: Stream, accepted: int, committed: int) -> None:
        """What the tracker answered. `accepted` may go back: a tracker that lost its log asks again."""
        for offset, seq in zip(_WATERMARKS[stream], (accepted, committed), strict=True):
            _U64.pack_into(self._control, offset, seq)
        if stream is Stream.points:
            self._remove_committed_segments(committed)

    def request_stop(self) -> None:
        _U64.pack_into(self._control, _STOP, 1)

    def next_batch(self, stream: Stream, after: int, limit: int = SEGMENT_POINTS) -> Batch | None:
        """The entries behind number `after`, at most `limit` and to the end of a segment; None if there are none."""
        count = min(self.logged(stream) - after, limit)
        if count <= 0:
            return None
        return self._points(after, count) if stream is Stream.points else self._facts(after, count)

    def is_owned(self) -> bool:
        """The producer still lives."""
        if self.producer in _own:
            return True
        try:
            fd = os.open(self.directory / "owner", os.O_RDWR)
        except FileNotFoundError:
            return False  # somebody removed the directory
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def is_done(self) -> bool:
        """Everything that will ever be here is committed, or somebody removed the directory."""
        # Asked twice: the producer may log its last points between the first look and its death.
        is_done = self._all_committed() and not self.is_owned() and self._all_committed()
        return is_done or not self.directory.exists()

    def _all_committed(self) -> bool:
        return all(self.committed(s) >= self.logged(s) for s in Stream)

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self._control.close()

    def _points(self, after: int, count: int) -> Batch:
        number, index = divmod(after, SEGMENT_POINTS)
        count = min(count, SEGMENT_POINTS - index)
        path = self.directory / f"points-{number:06d}"
        records = np.fromfile(path, dtype=POINT, count=count, offset=index * POINT.itemsize)
        if len(records) < count:
            raise SpoolUnusable(str(self.directory), f"{path.name} is shorter than what was logged into it")
        used, local = np.unique(records["key"], return_inverse=True)
        names = self._key_names()
        records["key"] = local
        return self._batch(Stream.points, after, count, tuple(names[i] for i in used), records.tobytes())

    def _facts(self, after: int, count: int) -> Batch:
        read, offset = self._facts_position
        if after < read:
            read, offset = 0, 0
        with (self.directory / "facts.jsonl").open("rb") as file:
            file.seek(offset)
            while read < after:
                offset += len(file.readline())
                read += 1
            self._facts_position = (read, offset)
            lines = [file.readline().rstrip(b"\n") for _ in range(min(count, 1000))]
        return self._batch(Stream.facts, after, len(lines), (), b"[" + b",".join(lines) + b"]")

    def _batch(self, stream: Stream, after: int, count: int, keys: tuple[str, ...], payload: bytes) -> Batch:
        return Batch(
            producer=self.producer, run=self.owner.run, attempt=self.owner.attempt, rank=self.owner.rank,
            stream=stream, first=after + 1, count=count, keys=keys, payload=payload,
        )  # fmt: skip

    def _key_names(self) -> list[str]:
        end = self._get(_KEYS_BYTES)
        if end > self._keys_read:
            with (self.directory / "keys").open("rb") as file:
                file.seek(self._keys_read)
                raw = file.read(end - self._keys_read)
            position = 0
            while position < len(raw):
                (length,) = _KEY_HEAD.unpack_from(raw, position)
                position += _KEY_HEAD.size
                self._keys.append(raw[position : position + length].decode())
                position += length
            self._keys_read = end
        return self._keys

    def _remove_committed_segments(self, committed: int) -> None:
        # The newest segment stays: the producer may be writing into it.
        whole = min(committed // SEGMENT_POINTS, (self.logged(Stream.points) - 1) // SEGMENT_POINTS)
        for number in range(self._removed_segments, whole):
            (self.directory / f"points-{number:06d}").unlink(missing_ok=True)
        self._removed_segments = max(self._removed_segments, whole)

    def _get(self, offset: int) -> int:
        return _U64.unpack_from(self._control, offset)[0]


def spools(root: Path) -> Iterator[Path]:
    """Directories of all producers under `root`."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield Path(entry.path)


def _reserve(path: Path, size: int) -> None:
    """Makes a file of `size` bytes whose blocks exist: a full disk is an error here, not a SIGBUS at a later store."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)
