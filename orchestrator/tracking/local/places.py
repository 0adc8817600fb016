"""Where the local tracker of a data directory has its files. Beside those of the tracker on Ray, never the same."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator import application
from orchestrator.stack import Stack
from orchestrator.tracking.local.protocol import PROTOCOL

MAX_SOCKET_BYTES = 100
"""The kernel takes 107."""


@dataclass(frozen=True, kw_only=True)
class Places:
    directory: Path
    log: Path
    """The write-ahead log."""
    spools: Path
    socket: Path
    lock: Path
    """Held by the process while it lives."""
    start_lock: Path
    """Held by whoever starts one."""
    output: Path
    """What the process says."""


def places(stack: Stack) -> Places:
    home = Path(stack.home)
    directory = home / "local"
    told = stack.external.get("tracking.spool_dir", "")
    return Places(
        directory=directory,
        log=directory / "wal",
        spools=Path(told) / f"local-{_digest(home)}" if told else directory / "spools",
        socket=socket_path(home),
        lock=directory / "lock",
        start_lock=directory / "start.lock",
        output=home / "logs" / "local-tracker.log",
    )


def settings(stack: Stack) -> str:
    """What a local tracker is started with, as a fingerprint: one that has another serves another stack, or is of
    another version."""
    served = (stack.database_url, stack.sinks(), stack.redis_url, stack.monitoring)
    words = " ".join(map(str, (*served, PROTOCOL, application.version())))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def socket_path(home: Path) -> Path:
    """In the data directory; where that path is too long for a socket, in a directory of ours in /tmp (not in TMPDIR,
    which may differ between those who have to meet there)."""
    near = home / "local" / "socket"
    if len(os.fsencode(near)) <= MAX_SOCKET_BYTES:
        return near
    return Path("/tmp") / f"orc-local-{os.geteuid()}" / f"{_digest(home)}.socket"


def private_directory(directory: Path) -> None:
    """Makes it, for nobody but us. Raises PermissionError when somebody else was there first."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 or directory.is_symlink():
        raise PermissionError(13, "is not ours alone (owner, mode 0700)", str(directory))


def _digest(home: Path) -> str:
    return hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
