"""The MLflow server of one data directory: one worker on loopback, its store a database beside ours."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import psutil

from cluster import environment, ports, processes, web
from orchestrator.errors import ServiceUnavailable
from orchestrator.priority import Niceness

PREFERRED_PORT = 5000
START_TIMEOUT = 90
"""Seconds; the first start creates some sixty tables."""


def is_installed() -> bool:
    return importlib.util.find_spec("mlflow") is not None


def uri(port: int) -> str:
    return f"http://{ports.LOOPBACK}:{port}"


def is_healthy(port: int, timeout: float = 3) -> bool:
    return web.get(f"{uri(port)}/health", timeout=timeout).ok


def leftovers(home: Path) -> list[psutil.Process]:
    """Every process of this data directory's MLflow, recorded or not."""
    return processes.marked(environment.mark(home, "mlflow"))


def start(home: Path, store: str, port: int) -> psutil.Process:
    """Starts the server and waits until it answers. `store` is the SQLAlchemy URL of its database.

    Raises ServiceUnavailable, with the end of its log, if it does not come up.
    """
    log = home / "logs" / "mlflow.log"
    artifacts = home / "mlflow" / "artifacts"
    artifacts.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", ports.LOOPBACK, "--port", str(port)]
    command += ["--workers", "1", "--serve-artifacts", "--artifacts-destination", str(artifacts)]
    variables = environment.of_mlflow_server(home, store)
    process = processes.start_detached(command, variables, log, home / "mlflow", niceness=Niceness.copies)
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and processes.is_alive(process):
        if is_healthy(port, timeout=5) and processes.is_alive(process):
            return process
        time.sleep(0.1)
    why = "it ended" if not processes.is_alive(process) else f"no answer within {START_TIMEOUT} s"
    processes.stop(leftovers(home), grace=3)
    raise ServiceUnavailable(
        "mlflow", uri(port), f"{why}. Its last words:\n{processes.tail(log, mark)}\n", f"All of it: {log}"
    )
