"""The API server of one data directory (orchestrator/api): who has its token may read what is recorded."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil

from cluster import environment, ports, processes, web
from orchestrator.api.tokens import FILE as TOKEN_FILE
from orchestrator.catalog import wire
from orchestrator.errors import ServiceUnavailable

PREFERRED_PORT = 8600
START_TIMEOUT = 30


def uri(host: str, port: int) -> str:
    """Where a client on this host asks; a server on every address is asked on loopback."""
    near = {"0.0.0.0": ports.LOOPBACK, "::": "::1"}.get(host, host)
    return f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"


def is_healthy(url: str, timeout: float = 3) -> bool:
    return web.get(f"{url}/api/v{wire.VERSION}/health", timeout=timeout).ok


def ask(url: str, token_path: str) -> web.Answer:
    """Who it is, asked with the token in that file."""
    try:
        token = Path(token_path).read_text().strip()
    except OSError:
        token = ""
    return web.get(f"{url}/api/v{wire.VERSION}/server", token=token)


def settings(database_url: str, host: str, debug: str, redis_url: str = "") -> str:
    """What a server was started with; one with something else is old."""
    try:
        version = metadata.version("ray-orchestrator")
    except metadata.PackageNotFoundError:
        version = ""
    told = [database_url, host, debug, redis_url, version, wire.protocol()]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]


def leftovers(home: Path) -> list[psutil.Process]:
    """Every process of this data directory's API server, recorded or not."""
    return processes.marked(environment.mark(home, "api"))


def ensure_token(home: Path) -> Path:
    """The token file, from its first byte on for its owner only; kept over restarts, so that clients stay valid."""
    path = home / TOKEN_FILE
    if not (path.exists() and path.read_text().strip()):
        fresh = path.with_name(f".{TOKEN_FILE}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        fresh.rename(path)
    if stat.S_IMODE(path.stat().st_mode) != 0o600:
        path.chmod(0o600)
    return path


def start(home: Path, host: str, port: int) -> psutil.Process:
    """Starts the server and waits until it answers; the database's address is in stack.json by now.

    Raises ServiceUnavailable, with the end of its log, if it does not come up.
    """
    log = home / "logs" / "api.log"
    mark = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-P", "-m", "orchestrator.api", "--home", str(home), "--host", host, "--port", str(port)]
    process = processes.start_detached(command, environment.of_api_server(home), log, home)
    url = uri(host, port)
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and processes.is_alive(process):
        # Asked in this order: another server on that port answers, too, while ours has not found it taken yet.
        if processes.listens(process, port) and is_healthy(url):
            return process
        time.sleep(0.05)
    why = "it ended" if not processes.is_alive(process) else f"no answer within {START_TIMEOUT} s"
    processes.stop(leftovers(home), grace=3)
    raise ServiceUnavailable("api", url, f"{why}. Its last words:\n{processes.tail(log, mark)}\n", f"All of it: {log}")
