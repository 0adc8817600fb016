"""The ranks of an attempt as processes of this host, without Ray: same worker, same tracker classes, same attempts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil

from orchestrator.checkpoints.local.places import slab_root
from orchestrator.config import (
    ClusterCapacity,
    NodeCapacity,
    ResourcesConfig,
    Settings,
    check_resources,
    redact_text,
)
from orchestrator.execution import network, stacks
from orchestrator.execution.connection import check_stack
from orchestrator.execution.place import Notice, Tracker
from orchestrator.execution.run_logs import LOG_LINES
from orchestrator.execution.sizing import Free, Room, room_for
from orchestrator.execution.stacks import Dump
from orchestrator.execution.worker import Plan, Returned
from orchestrator.failures.classify import Evidence, RanksFailed
from orchestrator.records import RunTicket
from orchestrator.stack import Stack
from orchestrator.tracking.local.client import LocalTracker
from orchestrator.tracking.local.places import places

logger = logging.getLogger(__name__)

ECHO = 5.0
"""Seconds that the other ranks have to tell what they know after the first one failed."""
EXIT = 10.0
"""Seconds between a rank's last word and the end of its process."""
_TAIL_BYTES = 4096


class Locally:
    """A Place. The tracker is started if it does not run. A killed driver takes its ranks with it."""

    name = "local"
    job = ""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._ranks: list[_Rank] = []
        self._closed = threading.Event()
        tracker = LocalTracker(stack)
        tracker.ensure()
        self.tracker: Tracker = tracker

    def check(self, settings: Settings) -> None:
        check_stack(settings, self._stack)
        check_resources(settings, host_capacity())

    def resources(self) -> Mapping[str, Any]:
        nodes = [{"host": socket.gethostname(), **asdict(node)} for node in host_capacity().nodes]
        return {"nodes": nodes}

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        memory = psutil.virtual_memory().total
        here = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(len(visible_gpus())), "memory": float(memory)}
        return room_for(wanted, [Free(node="", resources=here, total=here)])

    def notice(self) -> Notice | None:
        return None

    is_watched = True

    def stacks(self, ticket: RunTicket) -> Sequence[Dump]:
        running = {rank.number: rank.process.pid for rank in self._ranks if rank.process.poll() is None}
        return stacks.here(places(self._stack).spools, ticket.run, ticket.attempt, running)

    def end(self, ticket: RunTicket) -> None:
        _end(self._ranks)

    def network(self) -> str:
        return network.ONE_HOST

    def waits_for(self) -> str:
        return ""

    def fit(self, plan: Plan, settings: Settings) -> Returned:
        plan = replace(plan, slab_directory=slab_directory(self._stack), may_start_writer=True)
        # The thread that starts the ranks must stay until they end: the kernel takes its end for the parent's death.
        with tempfile.TemporaryDirectory(prefix="orc-ranks-") as directory:
            self._ranks = start_ranks(plan, settings, self._stack.client_environment(), Path(directory))
            try:
                return self._wait(plan.secrets)
            finally:
                _end(self._ranks)

    def close(self) -> None:
        self._closed.set()
        _end(self._ranks)

    def _wait(self, secrets: Sequence[str]) -> Returned:
        failed_at: float | None = None
        while True:
            endings = [rank.ending(secrets) for rank in self._ranks]
            evidence = [ending.evidence for ending in endings if ending and ending.evidence]
            if all(endings) and not evidence:
                self._let_them_exit()
                return next(ending.returned for ending in endings if ending and ending.returned)
            if evidence and failed_at is None:
                failed_at = time.monotonic()
            if evidence and failed_at is not None and (all(endings) or time.monotonic() - failed_at > ECHO):
                raise RanksFailed(evidence)
            if self._closed.wait(0.05):
                raise RanksFailed([Evidence(rank=-1, type="Closed", message="the ranks were ended")])

    def _let_them_exit(self) -> None:
        deadline = time.monotonic() + EXIT
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(deadline - time.monotonic(), 0.0))


@dataclass(frozen=True, kw_only=True)
class Ending:
    returned: Returned | None = None
    evidence: Evidence | None = None


class _Rank:
    """One process, what it says on stderr, and how it ended."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], result: Path) -> None:
        self.number, self.process, self._result = number, process, result
        self._ending: Ending | None = None
        self._tail = b""
        assert process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._reader.start()

    def ending(self, secrets: Sequence[str]) -> Ending | None:
        """How it ended; None while it runs. A rank that said its last word may still take a moment to exit."""
        if self._ending is None:
            code = self.process.poll()  # before the look for a result: it may come between the two
            if (said := self._said()) is not None:
                self._ending = said
            elif code is not None:
                self._ending = Ending(evidence=self._death(code, secrets))
        return self._ending

    def _said(self) -> Ending | None:
        try:
            raw = json.loads(self._result.read_text())
        except FileNotFoundError:
            return None
        failure = raw.get("failure")
        return Ending(evidence=Evidence(**failure)) if failure else Ending(returned=Returned(**raw["returned"]))

    def _death(self, code: int, secrets: Sequence[str]) -> Evidence:
        """Of a process that ended without a word. What others say about it are echoes, so its own time is now."""
        self._reader.join(timeout=1)
        words = redact_text(self._tail.decode(errors="replace"), secrets).strip()
        if words:
            logger.info("last words of rank %d:\n%s", self.number, words)
        if code < 0:
            # Named like Ray's, and without its last words, which may tell of a broken connection.
            what, kind = f"the worker process has died of {signal.Signals(-code).name}", "WorkerCrashed"
        else:
            last = words.splitlines()[-1] if words else "it said nothing"
            what, kind = f"the process ended with exit code {code}: {last}", "WorkerExited"
        return Evidence(
            rank=self.number, type=kind, message=what, host=socket.gethostname(), at=time.time(), exit_code=code,
            log="\n".join(words.splitlines()[-LOG_LINES:]),
        )  # fmt: skip

    def _read(self, stream: IO[bytes]) -> None:
        with stream, contextlib.suppress(OSError, ValueError):
            while piece := os.read(stream.fileno(), 1 << 16):
                self._tail = (self._tail + piece)[-_TAIL_BYTES:]


def start_ranks(plan: Plan, settings: Settings, environment: Mapping[str, str], directory: Path) -> list[_Rank]:
    """One process per rank. Rank 0 gets the listening socket of the rendezvous, so no port can be lost to others."""
    world = settings.resources.workers
    ranks: list[_Rank] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(world + 8)
        common = {
            **os.environ, **environment, **_loopback(),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]),
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(plan.threads)),
        }  # fmt: skip
        try:
            for number in range(world):
                result = directory / f"rank-{number}.json"
                fds = [listener.fileno()] if number == 0 else []
                gpu, backend, device = share_of_gpus(number, settings.resources.gpus_per_worker, visible_gpus())
                words = ["--parent", str(os.getpid()), "--result", str(result), "--backend", backend]
                words += ["--device", str(device), *(f"--listener={fd}" for fd in fds)]
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "orchestrator.execution.local_rank", *words],
                    env={**common, **gpu, "RANK": str(number), "LOCAL_RANK": str(number)},
                    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=fds,
                    start_new_session=True,  # ctrl-C is the driver's to hear
                )  # fmt: skip
                ranks.append(_Rank(number, process, result))
                # The plan holds secrets: neither the command line nor a file may show them.
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                    pipe.write(plan_to_json(plan).encode())
        except BaseException:
            _end(ranks)
            raise
    return ranks


def slab_directory(stack: Stack) -> str:
    """Where the checkpoints of a data directory are handed to their writers, on this host."""
    return stack.slab_directory or str(slab_root(stack.home))


def share_of_gpus(rank: int, each: float, visible: Sequence[str]) -> tuple[dict[str, str], str, int]:
    """The environment, the backend and the number of the first device of a rank. Pure.

    Whole GPUs go to one rank each, a fraction means that ranks share one; without any, none is seen.
    """
    if not each:
        return {"CUDA_VISIBLE_DEVICES": ""}, "gloo", rank
    if each == 1:
        return {"CUDA_VISIBLE_DEVICES": ",".join(visible)}, "nccl", rank
    if each > 1:
        first = rank * int(each)
        return {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + int(each)])}, "nccl", 0
    # NCCL refuses two ranks on one device.
    return {"CUDA_VISIBLE_DEVICES": visible[rank // int(1 / each)]}, "gloo", 0


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, else the driver's list."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [word.strip() for word in told.split(",") if word.strip() not in ("", "-1")]
    try:
        return [str(number) for number, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").iterdir()))]
    except OSError:
        return []


def host_capacity() -> ClusterCapacity:
    """This host as a cluster of one node."""
    memory_gb = psutil.virtual_memory().total / 1e9
    node = NodeCapacity(cpus=float(len(os.sched_getaffinity(0))), gpus=float(len(visible_gpus())), memory_gb=memory_gb)
    return ClusterCapacity(nodes=(node,))


def plan_to_json(plan: Plan) -> str:
    return json.dumps(asdict(plan))


def plan_from_json(text: str) -> Plan:
    raw: dict[str, Any] = json.loads(text)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    ticket = {**raw["ticket"], "earlier": tuple(raw["ticket"]["earlier"])}
    return Plan(**{**values, "ticket": RunTicket(**ticket)})


def _loopback() -> dict[str, str]:
    """The ranks talk among themselves on this host only, unless the user said otherwise."""
    return {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


def _end(ranks: Sequence[_Rank]) -> None:
    """Kills what is left, with what it started."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if rank.process.poll() is None:
                os.killpg(rank.process.pid, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
