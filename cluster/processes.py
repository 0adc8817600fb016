"""Processes that outlive us: started detached, recognised later, and stopped only if they are ours.

A pid alone proves nothing, numbers are used again. A process is ours when pid and time of birth are the recorded ones,
or when its environment carries our mark, or when it descends from such a process.
"""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.environment import PART_VARIABLE
from orchestrator.priority import Niceness, give_way


def start_detached(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    directory: Path,
    *,
    niceness: Niceness | None = None,
) -> psutil.Process:
    """Starts a process in a session of its own, with nothing of our terminal; what it says is appended to `log`."""
    rotate(log)
    with log.open("ab") as out:
        started = subprocess.Popen(
            list(command), env=dict(environment), cwd=directory, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True, preexec_fn=None if niceness is None else functools.partial(give_way, niceness),
        )  # fmt: skip
    return psutil.Process(started.pid)


def rotate(log: Path, limit_bytes: int = 8 * 2**20) -> None:
    """Keeps one older log, so that a service that always complains does not fill the disk."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > limit_bytes:
        log.replace(log.with_suffix(log.suffix + ".old"))


def tail(log: Path, start: int = 0, lines: int = 12) -> str:
    """The last lines that were written since byte `start`."""
    try:
        with log.open("rb") as content:
            content.seek(max(start, log.stat().st_size - 64 * 1024))
            return "\n".join(content.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def record(process: psutil.Process, **more: Any) -> dict[str, Any]:
    """What stack.json keeps about a process."""
    return {"pid": process.pid, "started": process.create_time(), "command": " ".join(process.cmdline())[:400], **more}


def recorded(entry: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process that `record` described, if it still lives."""
    if not entry:
        return None
    try:
        process = psutil.Process(int(entry["pid"]))
        # The kernel's times of birth are relative to the boot, so they move a little when the clock is set.
        same = abs(process.create_time() - float(entry["started"])) < 2
        return process if same and is_alive(process) else None
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None


def listens(process: psutil.Process, port: int) -> bool:
    """Whether it is this process that answers on the TCP port."""
    try:
        found = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def marked(mark: str, *, words: Sequence[str] = ()) -> list[psutil.Process]:
    """All living processes with the mark in their environment, or one of `words` in their command line, and all their
    descendants. Never this process or one that it descends from."""
    me = psutil.Process()
    excluded = {me.pid, *(parent.pid for parent in me.parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in excluded or process.pid in found:
            continue
        try:
            ours = process.environ().get(PART_VARIABLE) == mark
            if not ours and words:
                line = " ".join(process.cmdline())
                ours = any(word in line for word in words)
            if ours:
                found[process.pid] = process
                found |= {child.pid: child for child in process.children(recursive=True) if child.pid not in excluded}
        except (psutil.Error, OSError):
            continue
    return [process for process in found.values() if is_alive(process)]


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to all of them; does not wait."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def stop(processes: Iterable[psutil.Process], grace: float) -> None:
    """SIGTERM, at most `grace` seconds of waiting, SIGKILL for what is left. Returns when all are gone."""
    waiting = list(processes)
    for process in waiting:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    waiting = _still_alive(waiting, grace)
    kill(waiting)
    _still_alive(waiting, 10)


def _still_alive(processes: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout
    while True:
        _reap()
        processes = [process for process in processes if is_alive(process)]
        if not processes or time.monotonic() > deadline:
            return processes
        time.sleep(0.05)


def _reap() -> None:
    """Children that ended while we still run would stay as zombies."""
    for child in psutil.Process().children():
        try:
            if child.status() == psutil.STATUS_ZOMBIE:
                child.wait(timeout=0)
        except (psutil.Error, OSError):
            continue
