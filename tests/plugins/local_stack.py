"""A stack without Ray for tests of local mode: a data directory of its own on the session's PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.local.ending import stop_writer
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from orchestrator.tracking.local.client import LocalTracker, stop_local_tracker
from tests.plugins.own_stack import SETTINGS_OF_OTHERS


@dataclass(frozen=True)
class LocalStack:
    home: Path
    store: Store

    @classmethod
    def make(cls, database_url: str, **settings: Any) -> LocalStack:
        home = Path(tempfile.mkdtemp(prefix="orct-"))  # short: a socket lives in it
        Stack(home=str(home), database_url=database_url, storage_url=str(home / "runs"), **settings).save()
        return cls(home, Store(database_url))

    def remove(self) -> None:
        stop_local_tracker(self.home)
        stop_writer(self.home)
        self.store.close()
        shutil.rmtree(self.home)

    @property
    def stack(self) -> Stack:
        return Stack.load(self.home)

    def tracker(self) -> LocalTracker:
        tracker = LocalTracker(self.stack)
        tracker.ensure()
        return tracker

    def start(self, *words: str, cwd: Path, **more: str) -> subprocess.Popen[str]:
        """`python <words>` in the environment of this stack."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_OTHERS)}
        return subprocess.Popen(
            [sys.executable, *words], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**inherited, "ORC_HOME": str(self.home), "OMP_NUM_THREADS": "1", **more},
        )  # fmt: skip

    def run(self, *words: str, cwd: Path, code: int = 0, timeout: float = 90, **more: str) -> tuple[str, str]:
        """What it prints on stdout and stderr; another exit code than `code` fails the test with all of it."""
        process = self.start(*words, cwd=cwd, **more)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == code, f"{words} -> {process.returncode}\n{out}\n{err}"
        return out, err

    def points(self, run: str, key: str, rank: int = 0) -> list[Any]:
        return self.store.points(run, key, rank=rank).values.tolist()
