"""The calls by which delivery and checkpoints change files: writes, fsyncs, renames, removals, reservations.

They are the operating system's own, in one place, so that a test can end the process before or after any one of them
(`watch`), or make one fail, and thereby see every state that a crash can leave behind.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

Watcher = Callable[[str, str], None]
"""Called with the name of the call (`write`, `fsync`, `rename`, `replace`, `unlink`, `rmtree`, `mkdir`, `fallocate`,
`truncate`) and the file, as far as it is known, before the call. It may raise OSError in the call's place, or never
come back."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk, or a quota that is used up, says."""

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


def fdatasync(fd: int, path: str = "") -> None:
    """As `fsync`, without the times; the file's length is durable too."""
    if _watcher is not None:
        _watcher("fsync", path)
    os.fdatasync(fd)


def fsync_directory(path: Path | str) -> None:
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


def replace(source: str, target: str) -> None:
    """Gives a file its name; what had the name is gone."""
    if _watcher is not None:
        _watcher("replace", target)
    os.replace(source, target)


def mkdir(path: str) -> None:
    if _watcher is not None:
        _watcher("mkdir", path)
    os.mkdir(path)


def remove_tree(path: str) -> None:
    if _watcher is not None:
        _watcher("rmtree", path)
    shutil.rmtree(path)


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
