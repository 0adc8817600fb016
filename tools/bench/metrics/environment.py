"""Where the benchmark runs: a stack of its own, the peers' environment, child processes that find our code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil

from orchestrator.records import RunSpec, RunTicket
from orchestrator.stack import Stack

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
ORC = str(Path(sys.executable).with_name("orc"))
T = TypeVar("T")


class BenchStack:
    """The real thing in a data directory of its own: `orc up`, Ray's head with the tracker and a node agent, embedded
    PostgreSQL and Redis. MLflow is left out: it would compete for the two cores. Gone at the end.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="orcb-"))  # short: sockets live in it
        self.directory.chmod(0o711)  # as root PostgreSQL runs as `nobody`, who must pass through
        self.home = self.directory / "home"
        self.experiment = f"bench-{uuid.uuid4().hex[:6]}"

    def orc(self, *words: str, timeout: float = 300) -> str:
        command = [ORC, "--home", str(self.home), *words]
        return subprocess.run(
            command, env=child(), check=True, stdout=subprocess.PIPE, text=True, timeout=timeout
        ).stdout

    def __enter__(self) -> BenchStack:
        self.orc("up", "mlflow.enabled=false", "api.enabled=true", "ray.num_cpus=4")
        self.stack = Stack.load(self.home)
        from orchestrator.execution.connection import connect

        self.tracker = connect(self.stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from orchestrator.execution.connection import disconnect, is_connected

        if is_connected():
            disconnect()
        try:
            self.orc("down")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def spools(self) -> Path:
        return Path(self.stack.spool_directory)

    def open_run(self, name: str, lease: float = 3600.0) -> RunTicket:
        return self.tracker.open_run(RunSpec(experiment=self.experiment, name=name, lease=lease))

    def wait_idle(self, patience: float = 300.0) -> float:
        """Seconds until everything accepted is committed."""
        began = time.monotonic()
        while self.tracker.health()["lag_bytes"] > 0:
            if time.monotonic() - began > patience:
                raise TimeoutError(f"the tracker still has {self.tracker.health()['lag_bytes']} bytes to commit")
            time.sleep(0.05)
        return time.monotonic() - began

    def service_processes(self) -> dict[str, psutil.Process]:
        """The tracker and this machine's node agent."""
        from orchestrator.execution.handles import NODE_AGENTS, Remote, RemoteAgents

        (agent,) = RemoteAgents(object, {}, NODE_AGENTS).present()
        agents = {"agent": Remote(agent).call("describe")["pid"]}
        return {name: psutil.Process(pid) for name, pid in {"tracker": self.tracker.health()["pid"], **agents}.items()}


class Usage:
    """Highest memory and CPU time of some processes between two looks. `look()` now and then."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._cpu = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
        self._began = time.monotonic()
        self.peak_mb = dict.fromkeys(processes, 0.0)

    def look(self) -> None:
        for name, process in self._processes.items():
            self.peak_mb[name] = max(self.peak_mb[name], process.memory_info().rss / 1e6)

    def cores(self) -> dict[str, float]:
        """CPU seconds per second since the beginning."""
        seconds = time.monotonic() - self._began
        return {
            name: (sum(process.cpu_times()[:2]) - self._cpu[name]) / seconds
            for name, process in self._processes.items()
        }


class Peers:
    """Other trackers, in an environment that is made on the first use."""

    def __init__(self, place: Path) -> None:
        self.python = place / "bin" / "python"
        if not self.python.exists():
            print(f"installing the peers into {place} (minutes)", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
        wanted = HERE / "peers.txt"
        mark = place / "peers.txt"
        if not mark.exists() or mark.read_text() != wanted.read_text():
            subprocess.run([self.python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
            mark.write_text(wanted.read_text())

    def ask(self, *words: str) -> Any:
        done = subprocess.run(
            [self.python, HERE / "peers.py", *words], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "GIT_PYTHON_REFRESH": "quiet"},
        )  # fmt: skip
        return json.loads(done.stdout.strip().splitlines()[-1])


def child() -> dict[str, str]:
    """The environment of child processes: our code, and nothing of a stack that is not the benchmark's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORC_", "RAY_"))}
    paths = [str(ROOT), str(HERE), str(HERE.parent)]
    return inherited | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def progress(what: str, items: Iterable[T]) -> Iterator[T]:
    found = list(items)
    for number, item in enumerate(found, 1):
        tell(f"{what}: {number} of {len(found)}")
        yield item
    if sys.stderr.isatty():
        print(file=sys.stderr)


def tell(what: str) -> None:
    """One line that is written over, for people who wait."""
    if sys.stderr.isatty():
        print(f"\r{what}   ", end="", file=sys.stderr, flush=True)
