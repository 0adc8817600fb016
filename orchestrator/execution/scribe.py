"""Records runs on behalf of callbacks, which must neither raise nor wait: everything happens in a thread of its own.

What a callback tells is put into a queue; the thread opens runs at the tracker (again and again, while that is away),
writes points and facts into spools, and gives signs of life. Knows no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import RunExists, RunIsActive, ServiceUnavailable, UserError
from orchestrator.execution.place import Tracker
from orchestrator.records import Fact, FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import WITNESS

logger = logging.getLogger(__name__)

HEARTBEAT = 2.0
MOST_WAITING = 100_000
"""What is told while no tracker answers; then the newest is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """A run, or its next attempt, begins. `parent`: the key of its parent."""

    key: str
    spec: RunSpec
    parent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    key: str
    rank: int
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A fact about the run."""

    key: str
    fact: Fact


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """The attempt ended."""

    key: str
    status: RunStatus
    reason: str = ""
    error: Mapping[str, Any] | None = None


Message = Open | Points | Said | Over


@dataclass
class _Recorded:
    """An open attempt."""

    ticket: RunTicket
    spools: Path
    loggers: dict[int, Logger] = field(default_factory=dict)

    def logger(self, rank: int) -> Logger:
        if rank not in self.loggers:
            ticket = self.ticket
            self.loggers[rank] = Logger(self.spools, run=ticket.run, attempt=ticket.attempt, rank=rank, role=WITNESS)
        return self.loggers[rank]


class Scribe:
    """`tell` returns at once and never raises. `drain` waits until everything told is in spools, from where it arrives
    even when this process dies. `find_tracker` may raise what its calls raise, and is then asked again.
    """

    def __init__(self, find_tracker: Callable[[], Tracker], *, on_open: Callable[[RunTicket], None] | None = None):
        self._find_tracker, self._on_open = find_tracker, on_open
        self._tracker: Tracker | None = None
        self._messages: queue.Queue[Message] = queue.Queue(MOST_WAITING)
        self._open: dict[str, _Recorded] = {}
        self.tickets: dict[str, RunTicket] = {}
        """The newest attempt of each key."""
        self._lost: set[str] = set()
        """Keys whose run could not be opened: what is told about them is left out."""
        self._is_full = False
        self._beat_at = 0.0
        self._thread = threading.Thread(target=self._run, name="orchestrator-scribe", daemon=True)
        self._thread.start()

    def tell(self, message: Message) -> None:
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            if not self._is_full:
                self._is_full = True
                logger.error("no tracker answers, and %d messages wait: further ones are lost", MOST_WAITING)

    def drain(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while self._messages.unfinished_tasks:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _run(self) -> None:
        while True:
            try:
                message = self._messages.get(timeout=HEARTBEAT)
            except queue.Empty:
                self._beat()
                continue
            try:
                self._write(message)
            except Exception:
                # The border: a defect or a full disk must not end the recording of the others.
                logger.exception("%s could not be recorded", type(message).__name__)
            self._messages.task_done()
            self._beat()

    def _write(self, message: Message) -> None:
        if isinstance(message, Open):
            self._begin(message)
            return
        recorded = self._open.get(message.key)
        if recorded is None:
            return
        match message:
            case Points():
                recorded.logger(message.rank).log(message.values, message.step)
            case Said():
                recorded.logger(-1).fact(message.fact)
            case Over():
                data = {"status": message.status.value, "reason": message.reason, "error": message.error}
                recorded.logger(-1).fact(Fact(kind=FactKind.status, at=time.time(), data=data))
                self._close(message.key)

    # -- opening and closing

    def _begin(self, message: Open) -> None:
        self._close(message.key)
        self._lost.discard(message.key)
        spec = message.spec
        if message.parent:
            parent = self.tickets.get(message.parent)
            spec = replace(spec, parent=parent.run if parent else "", sweep=parent.run if parent else "")
        warned = False
        while True:
            try:
                ticket, spools = self._opened(spec)
                break
            except RunExists:
                spec = replace(spec, run=spec.new_run, new_run="")
                continue
            except (ConnectionError, TimeoutError, ServiceUnavailable, RunIsActive) as error:
                # A run that is still called active is one whose process died a moment ago: its lease will end.
                self._tracker = None if not isinstance(error, RunIsActive) else self._tracker
                if not warned:
                    logger.warning("the run cannot be recorded yet: %s Trying again.", error)
                warned = True
                time.sleep(1.0)
            except UserError:
                logger.exception("the run %r cannot be recorded", message.key)
                self._lost.add(message.key)
                return
        self.tickets[message.key] = ticket
        recorded = self._open[message.key] = _Recorded(ticket, spools)
        recorded.logger(-1)  # its lock is a sign of life, too
        if self._on_open is not None:
            with contextlib.suppress(Exception):
                self._on_open(ticket)

    def _opened(self, spec: RunSpec) -> tuple[RunTicket, Path]:
        if self._tracker is None:
            self._tracker = self._find_tracker()
        spools = Path(self._tracker.describe()["spool_directory"])
        return self._tracker.open_run(spec), spools

    def _close(self, key: str) -> None:
        recorded = self._open.pop(key, None)
        for each in recorded.loggers.values() if recorded else ():
            each.close()

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._beat_at or self._tracker is None:
            return
        self._beat_at = now + HEARTBEAT
        for recorded in list(self._open.values()):
            try:
                self._tracker.heartbeat(recorded.ticket.run, recorded.ticket.attempt)
            except Exception:
                logger.debug("no heartbeat", exc_info=True)
                return
