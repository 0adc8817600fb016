"""Which TCP ports on loopback our servers take."""

from __future__ import annotations

import socket

import psutil

from orchestrator.errors import ConfigError

LOOPBACK = "127.0.0.1"
ATTEMPTS = 200
"""How far from the preferred port a free one is looked for, so that addresses stay easy to recognise."""


def is_free(port: int) -> bool:
    """Whether a server could listen there now. Ports that only wait for late packets count as free, as for servers."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def answers(port: int, host: str = LOOPBACK, timeout: float = 2) -> bool:
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def owner(port: int) -> str:
    """Who listens there, for people. Example: "redis-server (pid 812)"."""
    try:
        listening = [
            c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        ]
    except psutil.Error:
        listening = []
    pids = [connection.pid for connection in listening if connection.pid]
    if not pids:
        return "a process of another user" if listening or not is_free(port) else ""
    try:
        process = psutil.Process(pids[0])
        words = process.cmdline()
        return f"{process.name()} (pid {process.pid}{': ' + ' '.join(words)[:80] if words else ''})"
    except psutil.Error:
        return f"pid {pids[0]}"


def of(pids: set[int]) -> set[int]:
    """The ports on which these processes listen."""
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids]
    except psutil.Error:
        return set()
    return {connection.laddr.port for connection in listening}


def choose(key: str, wanted: int, preferred: int, taken: set[int]) -> int:
    """The port of the setting `key`, or when that is 0, the preferred one or the next free one. Adds it to `taken`.

    Raises ConfigError, naming the owner, when the wanted port is not free.
    """
    if wanted:
        require_free(key, wanted, taken)
        taken.add(wanted)
        return wanted
    for port in range(preferred, min(preferred + ATTEMPTS, 65536)):
        if port not in taken and is_free(port):
            taken.add(port)
            return port
    return anywhere(taken)


def require_free(key: str, port: int, taken: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    if port in taken:
        raise ConfigError(key, port, "is given to another part of this stack.", "Choose another one, or auto.")
    if not is_free(port):
        raise ConfigError(
            key, port, f"this port is taken by {owner(port)}.", "Choose another one, or auto for a free one."
        )


def anywhere(taken: set[int]) -> int:
    """Any free port. Adds it to `taken`."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            taken.add(port)
            return port
