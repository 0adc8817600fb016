"""A real MLflow server on SQLite: small, on loopback; it can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class MlflowServer:
    """`start` waits until it answers; `kill` is SIGKILL to all of its processes; the database stays."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{directory}/mlflow.db"

    def start(self) -> None:
        assert self._process is None
        self._directory.mkdir(parents=True, exist_ok=True)
        with open(self._directory / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
                    "--port", str(self.port), "--backend-store-uri", self.database,
                    "--artifacts-destination", str(self._directory / "artifacts"),
                ],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._await_answer()

    def _await_answer(self, patience: float = 90.0) -> None:
        begun = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self._process is not None
                late = time.monotonic() - begun > patience
                if late or self._process.poll() is not None:
                    raise AssertionError((self._directory / "server.log").read_text()[-2000:]) from None
                time.sleep(0.1)

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.wait() == -signal.SIGKILL
        self._process = None

    def restart(self) -> None:
        """Kill it if it runs, and start it again."""
        if self._process is not None:
            self.kill()
        self.start()
