"""The local tracker as everybody else sees it: the methods of TrackerService, over a socket.

Every call has a connection of its own, so nothing is shared between threads or with forked children. A tracker that is
not there is started, and whatever the one before it left is adopted by the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.errors import ServiceUnavailable
from orchestrator.records import RunSpec, RunTicket
from orchestrator.stack import Stack
from orchestrator.sweep_records import (
    SweepPoll,
    SweepRecord,
    SweepSpec,
    SweepStep,
    sweep_poll_from,
    sweep_record_from,
    tickets_from,
    to_json,
)
from orchestrator.tracking.local.places import Places, places, private_directory, settings
from orchestrator.tracking.local.protocol import (
    Request,
    is_same_user,
    receive_response,
    send,
    ticket_from,
    value_of,
)

START_TIMEOUT = 60.0
AGAIN = 5.0
"""Seconds in which a call is repeated when the tracker dies under it."""
ONCE = ("open_run", "open_runs", "ask_sweep")
"""Calls of which it is not known, when the tracker dies under them, whether they were carried out: not repeated."""
_LOG_LIMIT_BYTES = 8 << 20
_children: list[subprocess.Popen[bytes]] = []
"""Trackers started by this process: asked now and then, so that one that ended does not stay as a zombie."""


class LocalTracker:
    """Implements `execution.place.Tracker`. Every method may raise ConnectionError or TimeoutError, and the errors of
    TrackerService; ServiceUnavailable when no tracker can be started.
    """

    def __init__(self, stack: Stack, timeout: float = 10.0) -> None:
        self._stack, self._timeout = stack, timeout
        self._places = places(stack)

    def open_run(self, spec: RunSpec) -> RunTicket:
        return ticket_from(self._call("open_run", timeout=30.0, spec=asdict(spec)))

    def open_runs(self, specs: Sequence[RunSpec]) -> list[RunTicket]:
        found = self._call("open_runs", timeout=60.0, specs=[asdict(spec) for spec in specs])
        return [ticket_from(ticket) for ticket in found]

    def heartbeat(self, run: str, attempt: int) -> bool:
        return self._call("heartbeat", run=run, attempt=attempt)

    def heartbeats(self, attempts: Sequence[tuple[str, int]]) -> list[bool]:
        return self._call("heartbeats", attempts=list(attempts))

    def cancel(self, run: str, user: str = "") -> None:
        self._call("cancel", run=run, user=user)

    def halt(self, run: str, attempt: int) -> None:
        self._call("halt", run=run, attempt=attempt)

    def live(self, run: str) -> dict[str, Any]:
        return self._call("live", run=run)

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        return sweep_record_from(self._call("open_sweep", timeout=60.0, spec=to_json(spec), driver=driver))

    def sweep_step(self, step: SweepStep) -> dict[int, RunTicket]:
        return tickets_from(self._call("sweep_step", timeout=30.0, step=to_json(step)))

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        return sweep_poll_from(self._call("sweep_poll", sweep=sweep, driver=driver))

    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        return self._call("ask_sweep", sweep=sweep, kind=kind, details=dict(details), user=user)

    def describe(self) -> dict[str, Any]:
        return self._call("describe", timeout=30.0)

    def health(self) -> Mapping[str, Any]:
        return self._call("health")

    def ensure(self) -> None:
        """Starts the tracker if there is none, or if the one there serves another stack. Waits until it answers."""
        if self.describe()["settings"] != settings(self._stack):
            self.stop()
            self.describe()

    def stop(self, timeout: float = 20.0) -> None:
        """Ends the tracker, if there is one. What it has not committed stays for the next one."""
        with contextlib.suppress(FileNotFoundError, ConnectionError):
            self._ask("stop", {}, timeout)
        deadline = time.monotonic() + timeout
        with _opened(self._places.lock) as fd:
            while not _is_free(fd):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the local tracker of {self._stack.home} does not end")
                time.sleep(0.02)

    def _call(self, method: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        deadline = time.monotonic() + AGAIN
        while True:
            try:
                return self._ask(method, arguments, timeout or self._timeout)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(f"the local tracker of {self._stack.home} is not there: {error}") from error
                self._start()
            except ConnectionError:
                # It is about to die, and its socket is still there.
                if method in ONCE or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _ask(self, method: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self._places.socket))
            if not is_same_user(connection):
                raise ConnectionError(f"{self._places.socket} belongs to another user")
            send(connection, Request(method=method, arguments=arguments))
            return value_of(receive_response(connection))

    # -- starting it

    def _start(self) -> None:
        _reap()
        private_directory(self._places.directory)
        with _opened(self._places.start_lock) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)  # two callers at once start one
            if not self._answers():
                self._start_process()

    def _start_process(self) -> None:
        output = self._places.output
        output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if output.exists() and output.stat().st_size > _LOG_LIMIT_BYTES:
            output.replace(output.with_suffix(".log.old"))
        command = [sys.executable, "-P", "-m", "orchestrator.tracking.local.process", "--home", self._stack.home]
        environment = {**os.environ, **self._stack.client_environment()}
        with output.open("ab") as said:
            start = said.tell()
            process = subprocess.Popen(
                command, env=environment, cwd=self._stack.home, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
        _children.append(process)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServiceUnavailable(
                    "the local tracker", self._stack.home, f"it does not start. {_last_words(output, start)}",
                    f"All of it: {output}",
                )  # fmt: skip
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            self._ask("describe", {}, self._timeout)
        except (FileNotFoundError, ConnectionError, TimeoutError):
            return False
        return True


def stop_local_tracker(home: Path) -> bool:
    """Ends the local tracker of a data directory. False if there was none."""
    stack = Stack.find(home)
    if stack is None or not is_running(places(stack)):
        return False
    LocalTracker(stack).stop()
    return True


def is_running(where: Places) -> bool:
    if not where.lock.exists():
        return False
    with _opened(where.lock) as fd:
        return not _is_free(fd)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_free(fd: int) -> bool:
    """Nobody holds the flock of this file. Takes it for a moment."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _reap() -> None:
    _children[:] = [child for child in _children if child.poll() is None]


def _last_words(output: Path, start: int) -> str:
    with output.open("rb") as content:
        content.seek(start)
        lines = content.read().decode(errors="replace").strip().splitlines()
    return f"Last words: {lines[-1]}" if lines else "It said nothing."
