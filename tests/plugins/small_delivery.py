"""Delivery in one process, step by step, with its journal: for tests that break one thing at a chosen moment."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.postgres import EmbeddedPostgres
from orchestrator.clock import ManualClock
from orchestrator.records import Ack, RunSpec, Stream
from orchestrator.store.store import Store
from orchestrator.tracking import fsck
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import SpoolReader, spools
from tests.plugins.journal import Comparison, Journal, compare, logged_in


class Exited(BaseException):
    """A tracker ended itself."""


def _exit(code: int) -> None:
    raise Exited(code)


class SmallDelivery:
    """A run, its producers (one per rank) and their journals, an agent, a tracker; `url` is what the tracker is given,
    `direct` the database itself. Use as a context."""

    def __init__(self, direct: str, url: str = "") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="orct-"))
        self.directory.chmod(0o711)
        self.direct, self.url = direct, url or direct
        self.clock = ManualClock()
        self.store = Store(direct)
        self.spools, self.log, self.journals = (self.directory / name for name in ("spools", "log", "journals"))
        self.journals.mkdir()
        self.run = new_run(self.store)
        self.tracker: TrackerService | None = None
        self.agent: Shipper | None = None
        self._loggers: dict[int, tuple[Journal, Logger]] = {}
        self._calls: dict[int, int] = {}
        self.frames: list[bytes] = []
        """All that the agent ever sent."""

    def __enter__(self) -> SmallDelivery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_loggers()
        self.stop_tracker()
        self.store.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log_calls(self, count: int, rank: int = 0) -> None:
        if rank not in self._loggers:
            made = Logger(self.spools, run=self.run, attempt=1, rank=rank)
            self._loggers[rank] = (Journal(self.journals, rank), made)
        journal, logger = self._loggers[rank]
        for _ in range(count):
            call = self._calls.get(rank, 0)
            journal.log_once(logger, call)
            self._calls[rank] = call + 1

    def close_loggers(self) -> None:
        for _, logger in self._loggers.values():
            logger.close()
        self._loggers.clear()

    def start_tracker(self, **more: Any) -> TrackerService:
        self.tracker = TrackerService(self.log, self.url, clock=self.clock, exit=_exit, **more)
        return self.tracker

    def stop_tracker(self) -> None:
        if self.tracker is not None:
            self.tracker.stop()
            self.tracker = None

    def ship(self) -> bool:
        if self.agent is None:
            self.agent = Shipper(self.spools, self, clock=self.clock)
        self.clock.advance(1.0)
        return self.agent.step()

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        self.frames += frames
        if self.tracker is None:
            raise ConnectionError("no tracker")
        return self.tracker.push(frames)

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        if self.tracker is None:
            raise ConnectionError("no tracker")
        return self.tracker.acknowledged(producers)

    def logged(self) -> int:
        """Points that came back from `log()`, of all producers."""
        return logged_in(self.journals)

    def accepted(self) -> int:
        return sum(SpoolReader(directory).accepted(Stream.points) for directory in spools(self.spools))

    def settle(self, patience: float = 30.0) -> Comparison:
        """Producers end; everything arrives; what the journals say is compared."""
        self.close_loggers()
        if self.tracker is None:
            self.start_tracker()
        assert self.tracker is not None
        deadline = time.monotonic() + patience
        while list(spools(self.spools)):
            moved = self.ship()
            moved |= self.tracker.commit_step()
            if not moved:
                time.sleep(0.002)
            assert time.monotonic() < deadline, f"{self.agent.backlog() if self.agent else ''} {self.tracker.health()}"
        return compare(self.store, self.run, self.journals)


def new_run(store: Store) -> str:
    spec = RunSpec(experiment="faults", storage_url="/tmp/runs", lease=1e6)
    return store.open_attempt(spec, now=time.time(), lease_seconds=1e6).run


def crash(server: EmbeddedPostgres) -> None:
    """As `pg_ctl stop -m immediate`: no checkpoint; the next start recovers from the server's own log."""
    process = psutil.Process(server.pid)
    process.send_signal(signal.SIGQUIT)
    gone, _ = psutil.wait_procs([process], timeout=30)
    assert gone
    assert not server.is_up()


def assert_sound(url: str) -> None:
    """`orc fsck` finds nothing wrong in the database."""
    store = Store(url)
    try:
        found = fsck.check(store)
    finally:
        store.close()
    assert not found.problems, [str(problem) for problem in found.problems]
    assert found.points
