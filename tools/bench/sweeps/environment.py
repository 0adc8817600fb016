"""Where the benchmark runs: a stack of its own, child processes that find our code, and what a sweep left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from orchestrator.stack import Stack
from orchestrator.store.names import run_id, trial_run_id
from orchestrator.store.store import Store

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
HANG = 180.0
"""Seconds without a line in its journal after which the other side has met its own deadlock."""
_BEGAN = time.monotonic()


def child(**more: str) -> dict[str, str]:
    """The environment of child processes: our code, one thread, and nothing of a stack that is not the benchmark's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORC_", "RAY_", "MLFLOW_"))}
    paths = os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent)])
    return inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", **more}


class BenchStack:
    """The real thing in a data directory of its own: `orc up` with everything that records, MLflow too."""

    def __init__(self, cpus: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="orcb-"))  # short: sockets live in it
        self.directory.chmod(0o711)  # as root PostgreSQL runs as `nobody`, who must pass through
        self.home, self._cpus = self.directory / "home", cpus

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator.cli.main", "--home", str(self.home), *words]

    def orc(self, *words: str, timeout: float = 3600) -> str:
        """What the verb prints. Its errors go where ours go."""
        with tempfile.TemporaryFile("w+") as out:  # servers that outlive the command keep a pipe open
            subprocess.run(
                self.command(*words), env=child(), cwd=HERE, check=True, stdout=out, stdin=subprocess.DEVNULL,
                timeout=timeout,
            )  # fmt: skip
            out.seek(0)
            return out.read()

    def __enter__(self) -> BenchStack:
        self.orc("up", f"ray.num_cpus={self._cpus}")
        self.stack = Stack.load(self.home)
        self.store = Store(self.stack.database_url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.store.close()
            self.orc("down")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def sweep(self, *words: str, trials: int, resumed: str = "", first: int = 0) -> Swept:
        """`orc sweep …`, or `orc sweep resume` of that one, and what its trials timed, from number `first` on."""
        sweep = resumed or run_id(time.time())
        own = ["resume", resumed] if resumed else [f"--run-id={sweep}"]
        began = time.time()
        process = subprocess.Popen(
            self.command("sweep", *own, *words), env=child(), cwd=HERE, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with Memory(process.pid) as memory:
            code = process.wait()
        if code:
            raise RuntimeError(f"orc sweep {' '.join(words)} ended with {code}")
        seconds = time.time() - began
        return Swept(
            sweep=sweep,
            began=began,
            seconds=seconds,
            driver_mb=memory.peak_mb,
            trials=self.timed(sweep, range(first, trials)),
        )

    def copied(self) -> None:
        """Waits until MLflow, too, has everything: copying is work of the same cores, and belongs to who caused it."""
        deadline = time.monotonic() + 300
        while any(sink.runs or sink.points for sink in self.store.sink_lags()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the copies are behind: {self.store.sink_lags()}")
            time.sleep(0.2)

    def timed(self, sweep: str, trials: range) -> list[Timed]:
        """In the order of their ends. What the agents still have is waited for."""
        found: list[Timed] = []
        deadline = time.monotonic() + 120
        for number in trials:
            run = trial_run_id(sweep, f"{number}.0")
            while not len(self.store.points(run, "bench/end", rank=0).values):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"trial {number} of {sweep} has recorded no end")
                time.sleep(0.1)
            read = {key: self.store.points(run, f"bench/{key}", rank=0).values for key in ("first_step", "pid", "end")}
            reports = self.store.points(run, "bench/report", rank=0).values.tolist()
            found.append(
                Timed(
                    first_step=float(read["first_step"][-1]),
                    pid=int(read["pid"][-1]),
                    end=float(read["end"][-1]),
                    reports=reports,
                )
            )
        return sorted(found, key=lambda trial: trial.end)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a trial recorded of itself: seconds since 1970 by the clock of its first worker, and that one's process."""

    first_step: float
    pid: int
    end: float
    reports: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Swept:
    sweep: str
    began: float
    seconds: float
    driver_mb: float
    trials: list[Timed]

    def gaps(self, since: float = 0.0) -> list[float]:
        """Between a trial's end and the first step of the next one in the same process; of ends from `since` on."""
        found: list[float] = []
        last: dict[int, float] = {}
        for trial in sorted(self.trials, key=lambda each: each.first_step):
            if trial.pid in last and last[trial.pid] >= since:
                found.append(trial.first_step - last[trial.pid])
            last[trial.pid] = trial.end
        return found

    @property
    def groups(self) -> int:
        """Groups of workers that were started, by their first workers."""
        return len({trial.pid for trial in self.trials})

    @property
    def all_began(self) -> float:
        """When the last group took its first step."""
        first: dict[int, float] = {}
        for trial in self.trials:
            first[trial.pid] = min(first.get(trial.pid, trial.first_step), trial.first_step)
        return max(first.values())

    @property
    def after_first(self) -> float:
        """Seconds from the first trial's end to the last one's."""
        return self.trials[-1].end - self.trials[0].end


class Memory:
    """The highest resident memory of a process, looked at twice a second."""

    def __init__(self, pid: int) -> None:
        self._process, self._is_over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak_mb = 0.0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.5):
            try:
                self.peak_mb = max(self.peak_mb, self._process.memory_info().rss / 1e6)
            except psutil.NoSuchProcess:
                return


def tell(what: str) -> None:
    """A line of progress: written over on a terminal, one below the other in a file."""
    is_terminal = sys.stderr.isatty()
    print(
        f"{chr(13) + chr(27) + '[K' if is_terminal else ''}[{time.monotonic() - _BEGAN:5.0f} s] {what}",
        end="" if is_terminal else "\n", file=sys.stderr, flush=True,
    )  # fmt: skip
