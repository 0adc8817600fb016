"""The local tracker as a process: `python -m orchestrator.tracking.local.process --home DIR`.

TrackerService, Shipper, SystemSampler, DirectoryService and Mirrors (MLflow and other sinks): the classes that run on a
cluster. All state is in files and PostgreSQL, so it may be killed at any time and the next one goes on: it adopts
spools and log. While a producer of an attempt holds the lock of its spool, its process lives and the attempt's lease is
kept; training scripts need no thread for that.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.directory.service import DirectoryService
from orchestrator.errors import UserError
from orchestrator.monitoring.sampler import SystemSampler
from orchestrator.stack import Stack
from orchestrator.store import open_store
from orchestrator.sweep_records import SweepSpec, sweep_step_from, to_json
from orchestrator.tracking.circuits import Circuits, directory_of
from orchestrator.tracking.leases import AttemptId
from orchestrator.tracking.local.places import Places, places, private_directory, settings
from orchestrator.tracking.local.protocol import (
    Request,
    Response,
    failure,
    is_same_user,
    receive_request,
    send,
    spec_from,
)
from orchestrator.tracking.merging import MergeService
from orchestrator.tracking.mirrors import Mirrors
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import SAMPLER, SpoolReader, SpoolUnusable, spools

logger = logging.getLogger(__name__)

IDLE = 60.0
"""Seconds without work after which the process ends."""
PATIENCE = 900.0
"""The same when something is left that cannot be moved now, because a database or MLflow is away."""
TAKE_OVER = 20.0
"""Seconds to wait for the process before this one to let go."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the process has to do at one moment."""

    is_used: bool
    """Runs are going on, or somebody asked something."""
    left: int = 0
    """Producers, bytes of the log and runs to mirror that are not done."""
    position: tuple[int, ...] = ()
    """Changes with everything that is done."""


class Rest:
    """When to end. Pure: work and time in. Example: Rest(idle=60, patience=900).is_over(work, now=0.0) is False."""

    def __init__(self, *, idle: float, patience: float) -> None:
        self._idle, self._patience = idle, patience
        self._since: float | None = None
        self._position: tuple[int, ...] = ()

    def is_over(self, work: Work, now: float) -> bool:
        if work.is_used or work.position != self._position or self._since is None:
            self._since, self._position = now, work.position
            return False
        return now - self._since >= (self._patience if work.left else self._idle)


class Producers:
    """Which attempts have a living producer, by the locks of the spools."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._readers: dict[str, SpoolReader] = {}

    def living(self) -> set[AttemptId]:
        there = {directory.name: directory for directory in spools(self._root)}
        for name in self._readers.keys() - there.keys():
            self._readers.pop(name).close()
        for name in there.keys() - self._readers.keys():
            with contextlib.suppress(SpoolUnusable, OSError):
                self._readers[name] = SpoolReader(there[name])
        members = [reader for reader in self._readers.values() if reader.owner.role != SAMPLER]
        return {(r.owner.run, r.owner.attempt) for r in members if r.is_owned()}


class LocalTrackerProcess:
    """Opens everything in `__init__`; `run` serves until `stop`, or until there is nothing to do."""

    def __init__(self, stack: Stack, where: Places, *, idle: float = IDLE, patience: float = PATIENCE) -> None:
        self._stack, self._where = stack, where
        self._stopped = threading.Event()
        self._rest = Rest(idle=idle, patience=patience)
        self._requests = self._requests_seen = 0
        circuits = Circuits("local-tracker", directory_of(stack.home))
        self._tracker = TrackerService(
            where.log, stack.database_url, spool_directory=str(where.spools), log_wait=TAKE_OVER,
            redis_url=stack.redis_url, circuits=circuits,
        )  # fmt: skip
        self._shipper = Shipper(where.spools, self._tracker)
        self._sampler: SystemSampler | None = None
        if stack.monitoring:
            self._sampler = SystemSampler(
                where.spools, interval=stack.monitoring, is_my_turn=lambda: self._shipper.is_shipping
            )
        self._producers = Producers(where.spools)
        self._directories = DirectoryService(open_store(stack.database_url), circuits=circuits)
        self._mirrors = Mirrors(lambda: open_store(stack.database_url), stack.sinks(), circuits=circuits)
        self._merging = MergeService(open_store(stack.database_url), circuits=circuits)
        self._server = _listening(where.socket)

    def run(self) -> None:
        self._tracker.start()
        threads = [threading.Thread(target=self._shipper.run, name="shipper", daemon=True)]
        threads.append(threading.Thread(target=self._accept, name="requests", daemon=True))
        # These may wait for a storage or for MLflow: they are not joined.
        threading.Thread(target=self._directories.run, name="directories", daemon=True).start()
        self._mirrors.start()
        threading.Thread(target=self._merging.run, name="merging", daemon=True).start()
        if self._sampler is not None:
            threading.Thread(target=self._sampler.run, name="sampler", daemon=True).start()
        for thread in threads:
            thread.start()
        while not self._stopped.wait(1.0):
            try:
                if self._step(time.monotonic()):
                    logger.info("nothing is left to do")
                    break
            except Exception:
                logger.exception("looking after the runs failed; trying again")
        # First nobody can come in any more; who is turned away starts the next one.
        self._where.socket.unlink(missing_ok=True)
        self._server.close()
        if self._sampler is not None:
            self._sampler.stop()
        self._shipper.stop()
        self._directories.stop()
        self._mirrors.stop()
        self._merging.stop()
        threads[0].join(timeout=10)
        self._tracker.stop()

    def stop(self) -> None:
        self._stopped.set()

    def _step(self, now: float) -> bool:
        """Keeps the leases of living producers. True when it is time to end."""
        living = self._producers.living()
        self._tracker.heartbeats(sorted(living))
        if not self._where.socket.exists():
            logger.warning("%s was removed", self._where.socket)
            return True
        return self._rest.is_over(self._work(bool(living)), now)

    def _work(self, has_producers: bool) -> Work:
        health = self._tracker.health()
        is_asked, self._requests_seen = self._requests_seen != self._requests, self._requests
        if has_producers or is_asked or health["running"] > 0:
            return Work(is_used=True)
        left = self._shipper.backlog()["producers"] + health["lag_bytes"] + self._behind()
        position = health["position"]
        return Work(is_used=False, left=left, position=(left, position["segment"], position["offset"]))

    def _behind(self) -> int:
        """Runs of which not everything is copied to their directories and to the sinks, and what is still to be
        told."""
        return self._directories.health()["waiting"] + self._mirrors.behind() + self._tracker.alerts.left()

    # -- requests

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), name="request", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(30)
            try:
                if not is_same_user(connection):
                    return
                request = receive_request(connection)
                self._requests += 1
                send(connection, self._answer(request))
            except (OSError, ValueError, TypeError) as error:
                logger.debug("a request was cut short: %s", error)

    def _answer(self, request: Request) -> Response:
        try:
            return Response(value=self._value(request.method, request.arguments))
        except UserError as error:
            return failure(error)
        except Exception as error:
            logger.exception("%s failed", request.method)
            return failure(error)

    def _value(self, method: str, given: Mapping[str, Any]) -> Any:
        tracker = self._tracker
        match method:
            case "open_run":
                return asdict(tracker.open_run(spec_from(given["spec"])))
            case "open_runs":
                return [asdict(ticket) for ticket in tracker.open_runs([spec_from(spec) for spec in given["specs"]])]
            case "heartbeat":
                return tracker.heartbeat(given["run"], given["attempt"])
            case "heartbeats":
                return tracker.heartbeats([(run, attempt) for run, attempt in given["attempts"]])
            case "cancel":
                return tracker.cancel(given["run"], given["user"])
            case "halt":
                return tracker.halt(given["run"], given["attempt"])
            case "live":
                return tracker.live(given["run"])
            case "open_sweep":
                return to_json(tracker.open_sweep(SweepSpec(**given["spec"]), given["driver"]))
            case "sweep_step":
                tickets = tracker.sweep_step(sweep_step_from(given["step"]))
                return {str(job): asdict(ticket) for job, ticket in tickets.items()}
            case "sweep_poll":
                return to_json(tracker.sweep_poll(given["sweep"], given["driver"]))
            case "ask_sweep":
                return tracker.ask_sweep(given["sweep"], given["kind"], given["details"], given["user"])
            case "describe":
                return {**tracker.describe(), "settings": settings(self._stack)}
            case "health":
                return {
                    **tracker.health(), "spools": self._shipper.backlog(), "sinks": self._mirrors.health(),
                    "merging": self._merging.health(),
                }  # fmt: skip
            case "stop":
                return self.stop()
        raise ConnectionError(f"there is no method {method}")


def _listening(path: Path) -> socket.socket:
    private_directory(path.parent)
    path.unlink(missing_ok=True)  # of a process that was killed: we hold the lock
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    path.chmod(0o600)
    server.listen(64)
    return server


def _only_one(where: Places) -> int:
    """The lock of this data directory; -1 if another process has it and keeps it."""
    fd = os.open(where.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + TAKE_OVER
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            if time.monotonic() > deadline:
                os.close(fd)
                return -1
            time.sleep(0.02)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="orchestrator.tracking.local.process", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--idle", type=float, default=IDLE)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stack = Stack.load(arguments.home)
    where = places(stack)
    private_directory(where.directory)
    if _only_one(where) < 0:
        logger.error("another local tracker has %s", where.directory)
        return 1
    process = LocalTrackerProcess(stack, where, idle=arguments.idle)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    logger.info("serving %s", where.socket)
    process.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
