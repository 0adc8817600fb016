"""The directory with the spools of one node, and the page of words that its producers and its agent share.

`.node` is memory-mapped: how much the node's spools hold and may hold, written by the agent; and the *bells*, one word
for every so many producers. Who logs rings its bell with one store. So the agent finds the producers with something new
at the same small cost whether ten thousand others are idle or none.
"""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path

import numpy as np

from orchestrator import disk
from orchestrator.errors import OrchestratorError

_HEAD_BYTES = 4096
_BELLS = 1 << 16
_BELLS_BYTES = _BELLS * 8
_USED, _BUDGET, _HURRY = 0, 1, 2

_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "glusterfs", "ceph", "beegfs", "fuse.sshfs"}
)


class SpoolUnusable(OrchestratorError):
    """The spool directory cannot be used: not writable, on a network file system, or made by another version."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        hint = "Name a directory on a local disk: `orc up tracking.spool_dir=DIR`."
        return f"The spool directory {self.path} cannot be used: {self.why}. {hint}"


class SpoolForeign(SpoolUnusable):
    """A directory among the spools that this version cannot read."""

    def __str__(self) -> str:
        return (
            f"The spool {self.path} cannot be read by this version: {self.why}. It is left as it is; what is in it and"
            " not yet recorded is sent by the version that wrote it (start our services once more with that version)."
        )


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


_prepared: set[str] = set()
"""Directories that this process has looked at: what they lie on does not change under it."""


def prepare_root(root: Path, mounts: str | None = None) -> None:
    """Makes the spool directory. Raises SpoolUnusable on network file systems, where mapped memory is not shared
    between hosts.
    """
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SpoolUnusable(str(root), error.strerror or str(error)) from error
    if mounts is None and str(root) in _prepared:
        return
    kind = file_system_of(root, mounts)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise SpoolUnusable(str(root), f"it is on a network file system ({kind})")
    _prepared.add(str(root))


own_producers: set[str] = set()
"""Producers of this process that still log. Their locks must not be asked for from here: the kernel would grant a
second descriptor the lock, and closing that descriptor would give up the first one's.
"""


def map_file(path: Path, length: int = 0, offset: int = 0) -> mmap.mmap:
    """A file that exists, or `length` bytes of it from `offset` on, shared with all who map it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, length, offset=offset)
    finally:
        os.close(fd)


def reserve_file(path: Path, size: int, *, is_new: bool = False) -> None:
    """Makes a file of `size` bytes whose blocks exist: a full disk is an error here, not a SIGBUS at a later store.

    `is_new`: nobody else can have it yet, so zeros are written. Then a store finds its page in memory; without them
    each page's first one asks the file system, 60 µs in a training loop. (A producer's own segment is never written so:
    a signal handler may log into it before this comes back.)
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size < size:
            disk.reserve(fd, size, str(path))
            if is_new:
                disk.pwrite(fd, bytes(size), 0, str(path))
    finally:
        os.close(fd)


def _node_file(root: Path) -> Path:
    path = root / ".node"
    reserve_file(path, _HEAD_BYTES + _BELLS_BYTES)
    return path


def _bell_number(producer: str) -> int:
    return zlib.crc32(producer.encode()) % _BELLS


class Bell:
    """A producer's: `words[0] = 1` rings it. `hurry()`: and somebody waits, the agent is to come at once."""

    def __init__(self, root: Path, producer: str) -> None:
        path = _node_file(root)
        page, place = divmod(_HEAD_BYTES + 8 * _bell_number(producer), mmap.PAGESIZE)
        self._map = map_file(path, mmap.PAGESIZE, page * mmap.PAGESIZE)
        self.words = memoryview(self._map).cast("Q")[place // 8 : place // 8 + 1]
        self._head_map = map_file(path, mmap.PAGESIZE)
        self._head = memoryview(self._head_map).cast("Q")

    def hurry(self) -> None:
        self.words[0] = 1
        self._head[_HURRY] = 1

    def close(self) -> None:
        for words, mapped in ((self.words, self._map), (self._head, self._head_map)):
            words.release()
            mapped.close()


def room_left(root: Path) -> int | None:
    """Bytes that the node's spools may still take, as its agent said last; None if none has said."""
    try:
        with (root / ".node").open("rb") as file:
            used, budget = np.frombuffer(file.read(16), np.uint64).tolist()
    except (OSError, ValueError):
        return None
    return budget - used if budget else None


class Node:
    """The agent's side of `.node`."""

    def __init__(self, root: Path) -> None:
        self._map = map_file(_node_file(root), _HEAD_BYTES + _BELLS_BYTES)
        self._head = memoryview(self._map).cast("Q")
        self._bells = np.frombuffer(self._map, np.uint64, _BELLS, _HEAD_BYTES)

    @staticmethod
    def bell_of(producer: str) -> int:
        return _bell_number(producer)

    def rung(self) -> list[int]:
        """The bells that were rung since the last call. They are silenced before anybody looks at the producers, so
        that one that logs meanwhile is heard the next time."""
        numbers = np.flatnonzero(self._bells.copy())  # of a copy: numpy raises when they are rung while it looks
        self._bells[numbers] = 0
        return numbers.tolist()

    def is_hurried(self) -> bool:
        """Whether a producer waits to be looked at, since the last call."""
        if not self._head[_HURRY]:
            return False
        self._head[_HURRY] = 0
        return True

    def tell(self, used_bytes: int, budget_bytes: int) -> None:
        self._head[_USED], self._head[_BUDGET] = used_bytes, budget_bytes
