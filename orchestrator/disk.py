"""The calls by which the delivery path changes files: writes, fsyncs, renames, removals, reservations.

They are the operating system's own, in one place, so that a test can end the process before or after any one of them
(`watch`), or make one fail, and thereby see every state that a crash can leave behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

Watcher = Callable[[str, str], None]
"""Called with the name of the call (`write`, `fsync`, `rename`, `unlink`, `fallocate`, `truncate`) and the file, as far
as it is known, before the call. It may raise OSError in the call's place, or never come back."""

_watcher: Watcher | None = None


def watch(watcher: Watcher | None) -> None:
    """For tests: `watcher` sees every call of this process from now on."""
    global _watcher
    _watcher = watcher


def pwrite(fd: int, data: bytes | memoryview, offset: int, path: str = "") -> int:
    if _watcher is not None:
        _watcher("write", path)
    return os.pwrite(fd, data, offset)


def pwritev(fd: int, pieces: Sequence[bytes | memoryview], offset: int, path: str = "") -> int:
    if _watcher is not None:
        _watcher("write", path)
    return os.pwritev(fd, pieces, offset)


def write(fd: int, data: bytes | memoryview, path: str = "") -> int:
    if _watcher is not None:
        _watcher("write", path)
    return os.write(fd, data)


def fsync(fd: int, path: str = "") -> None:
    """Raises OSError; then the state of the file's pages is unknown, and it must not be tried again."""
    if _watcher is not None:
        _watcher("fsync", path)
    os.fsync(fd)


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd, str(path))
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    if _watcher is not None:
        _watcher("rename", str(target))
    os.rename(source, target)


def unlink(path: Path) -> None:
    """A file that is not there is fine."""
    if _watcher is not None:
        _watcher("unlink", str(path))
    path.unlink(missing_ok=True)


def truncate(fd: int, size: int, path: str = "") -> None:
    if _watcher is not None:
        _watcher("truncate", path)
    os.ftruncate(fd, size)


def reserve(fd: int, size: int, path: str = "") -> None:
    """Gives the file its blocks: a full disk is an error here, not a SIGBUS at a later store into a mapping."""
    if _watcher is not None:
        _watcher("fallocate", path)
    os.posix_fallocate(fd, 0, size)
