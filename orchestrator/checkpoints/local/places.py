"""Where writers and trainers of one machine meet: the slab root, on tmpfs where there is one."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from orchestrator.tracking.spool_root import file_system_of

MAX_SOCKET_BYTES = 100
"""The kernel takes 107."""
_MEMORY = Path("/dev/shm")
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "glusterfs", "ceph", "beegfs"})


def slab_root(home: str = "") -> Path:
    """The slab root of a data directory; without one, that of all who use checkpoints alone."""
    place = _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    return place / f"orc-{os.geteuid()}-{_digest(Path(home)) if home else 'alone'}"


def slabs(root: Path) -> Path:
    return root / "slabs"


def members(root: Path) -> Path:
    return root / "members"


def serving_lock(root: Path) -> Path:
    """Held by the member that answers requests and gives out memory."""
    return root / "serving.lock"


def start_lock(root: Path) -> Path:
    """Held by whoever starts a writer."""
    return root / "start.lock"


def output(root: Path) -> Path:
    """What a writer that we started says."""
    return root / "writer.log"


def request_socket(root: Path) -> Path:
    return sockets(root) / "socket"


def bell(root: Path, member: int) -> Path:
    return sockets(root) / f"{member}.bell"


def bells(root: Path) -> list[Path]:
    """Those of all members that there are, or that were killed."""
    try:
        with os.scandir(sockets(root)) as found:
            return [Path(entry.path) for entry in found if entry.name.endswith(".bell")]
    except FileNotFoundError:
        return []


def prepare(root: Path) -> None:
    """Makes the directories, for nobody but us. Raises PermissionError when somebody else was there first, OSError for
    a network file system, where mapped memory is not shared between hosts."""
    private_directory(root)
    kind = file_system_of(root)
    if kind in _NETWORK:
        raise OSError(95, f"staging memory cannot be on a network file system ({kind})", str(root))
    for directory in (slabs(root), members(root), sockets(root)):
        private_directory(directory)


def private_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 or directory.is_symlink():
        raise PermissionError(13, "is not ours alone (owner, mode 0700)", str(directory))


def sockets(root: Path) -> Path:
    """In the root; where that path is too long for a socket, a directory of ours in /tmp (not in TMPDIR, which may
    differ between those who have to meet there)."""
    near = root / "members"
    if len(os.fsencode(near / "100.bell")) <= MAX_SOCKET_BYTES:
        return near
    return Path("/tmp") / f"orc-slab-{os.geteuid()}-{_digest(root)}"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]
