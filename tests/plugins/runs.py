"""A whole stack of its own for the tests that need Ray: PostgreSQL, MLflow, a Ray head with a token, our services."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.stack import Stack
from orchestrator.store.store import Store
from tests.plugins.own_stack import OwnStack

PROJECT = Path(__file__).parents[1] / "ray" / "project"


@dataclass(frozen=True)
class Orc:
    """The command line, run as a user would, against the stack of the tests."""

    own: OwnStack

    @property
    def home(self) -> Path:
        return self.own.home

    def start(self, *words: str, cwd: Path = PROJECT, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "orchestrator.cli.main", *words]
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**self.own.environment, "OMP_NUM_THREADS": "1", **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *words: str, code: int | None = 0, cwd: Path = PROJECT, timeout: float = 150, **more: str
    ) -> str:
        process = self.start(*words, cwd=cwd, **more)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"orc {words} took longer than {timeout} s\n{out}\n{err}") from None
        if code is not None:
            assert process.returncode == code, f"orc {' '.join(words)} -> {process.returncode}\n{out}\n{err}"
        return out if code in (0, None) else out + err

    def json(self, *words: str, **kwargs: Any) -> Any:
        return json.loads(self(*words, "--json", **kwargs))

    def dashboard(self, path: str) -> Any:
        """What the Ray dashboard answers."""
        token = Path(self.stack.ray_token_path).read_text()
        request = urllib.request.Request(self.stack.ray_dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    @property
    def stack(self) -> Stack:
        return Stack.load(self.home)

    def store(self) -> Store:
        return Store(self.stack.database_url)


@pytest.fixture(scope="session")
def orc() -> Iterator[Orc]:
    """`orc up` once for the session; `orc down` at the end."""
    with OwnStack() as own:
        own.orc("up", "ray.num_cpus=2")
        yield Orc(own)


def wait_until(what: Callable[[], Any], timeout: float, why: str) -> Any:
    """The first true answer of `what`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout} s: {why}")


@dataclass
class Going:
    """A run that was started and is logging."""

    process: subprocess.Popen[str]
    run: str
    journal: Path
    store: Store

    def counted(self, rank: int) -> int:
        """How many points the rank says it logged."""
        path = self.journal / f"rank-{rank}"
        text = path.read_text() if path.exists() else ""
        return int(text or 0)

    def status(self) -> str:
        return self.store.run(self.run).status.value

    def stored(self, rank: int) -> list[int]:
        return [int(v) for v in self.store.points(self.run, "count", rank=rank).values]


@pytest.fixture
def going(orc: Orc, tmp_path: Path) -> Iterator[Callable[..., Going]]:
    """Starts `slow` and waits until both ranks log."""
    started: list[Going] = []

    def start(*overrides: str) -> Going:
        store = orc.store()
        known = {row.run for row in store.runs(limit=1000)}
        journal = tmp_path / "journal"
        journal.mkdir(exist_ok=True)
        process = orc.start("run", "train=trains:slow", f"journal={journal}", *overrides)
        going = Going(process, "", journal, store)
        started.append(going)
        fresh = wait_until(
            lambda: [row.run for row in store.runs(limit=1000) if row.run not in known] or _ended(process),
            60,
            "a new run",
        )
        going.run = fresh[0]
        wait_until(
            lambda: (going.counted(0) > 20 and going.counted(1) > 20) or _ended(process), 60, "both ranks logging"
        )
        return going

    yield start
    for going in started:
        if going.process.poll() is None:
            going.process.send_signal(signal.SIGKILL)
            going.process.wait()
        going.store.close()


def _ended(process: subprocess.Popen[str]) -> bool:
    if process.poll() is None:
        return False
    out, err = process.communicate()
    raise AssertionError(f"the command ended with {process.returncode}:\n{out}\n{err}")
