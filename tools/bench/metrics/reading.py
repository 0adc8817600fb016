"""How soon and how fast what was logged is seen: in `orc watch`, in Redis, as a chart of a very long curve."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from environment import HERE, ORC, BenchStack, child, progress
from rows import Row, at_most, printed

from orchestrator.records import POINT, Batch, RunSpec, Stream
from orchestrator.stack import Stack
from orchestrator.store import migrate, open_store
from orchestrator.tracking.merging import MergeService

POINTS = 10_000_000
COLD_MS, WARM_MS = 100.0, 20.0
WATCH_MS, REDIS_MS = 250.0, 1.0
LOGGED = 200
KEY = "train/loss"


def chart(rounds: int) -> Iterator[Row]:
    """A curve of ten million points, after merging. Cold: PostgreSQL was restarted, the host's file cache dropped
    where we may, and the reader is a new process, whose start is not counted but whose first connection is."""
    from tempfile import TemporaryDirectory

    from cluster.postgres import EmbeddedPostgres

    with TemporaryDirectory(prefix="orcb-") as place:
        Path(place).chmod(0o711)
        server = EmbeddedPostgres(Path(place) / "pg")
        server.start()
        try:
            server.ensure_database("orc")
            migrate.upgrade(server.url("orc"))
            run = _long_curve(server.url("orc"))
            cold, warm = [], []
            for _ in progress("chart of 10 million points", range(rounds)):
                server.stop()
                dropped = _drop_file_cache()
                server.start()
                command = [sys.executable, __file__, "chart", server.url("orc"), run]
                taken = json.loads(subprocess.run(command, env=child(), check=True, stdout=subprocess.PIPE).stdout)
                cold.append(taken[0])
                warm.append(float(np.median(taken[1:])))
        finally:
            server.stop()
    how = "file cache dropped" if dropped else "file cache kept"
    yield at_most(f"chart of 10 million points, cold ({how})", float(np.median(cold)), COLD_MS, "ms")
    yield at_most("chart of 10 million points, warm", float(np.median(warm)), WARM_MS, "ms")


def _long_curve(database: str) -> str:
    store = open_store(database)
    ticket = store.open_attempt(RunSpec(experiment="chart"), now=time.time(), lease_seconds=600)
    merging = MergeService(store)
    random, producer, now = np.random.default_rng(7), uuid.uuid4().hex, time.time()
    size = 32_768
    for start in progress("10 million points into the database", range(0, POINTS, size)):
        points = np.zeros(min(size, POINTS - start), POINT)
        points["step"] = np.arange(start, start + len(points))
        points["time"] = now + points["step"] * 0.001
        points["value"] = np.exp(-points["step"] / POINTS) + 0.1 * random.standard_normal(len(points))
        batch = Batch(
            producer=producer, run=ticket.run, attempt=1, rank=0, stream=Stream.points, first=start + 1,
            count=len(points), keys=(KEY,), payload=points.tobytes(),
        )  # fmt: skip
        store.commit([batch])
    while merging.step(time.monotonic()):
        pass
    store.close()
    return ticket.run


def _drop_file_cache() -> bool:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def _read_chart(database: str, run: str) -> None:
    """Milliseconds of the first reading and of twenty more."""
    store = open_store(database)
    taken = []
    for _ in range(21):
        began = time.perf_counter()
        curve = store.curve(run, KEY, most=2000)
        taken.append((time.perf_counter() - began) * 1000)
        assert 500 <= len(curve.steps) <= 2000
        assert int(curve.counts.sum()) == POINTS
    print(json.dumps(taken))


def watch(stack: BenchStack) -> Iterator[Row]:
    """`log()` in one process, the value on a line of `orc watch --json` in another: the value is the time."""
    from orchestrator.tracking.logger import Logger

    ticket = stack.open_run("watched")
    logger = Logger(stack.spools, run=ticket.run, attempt=ticket.attempt, rank=0)
    logger.log({KEY: 0.0})
    assert logger.flush(30)
    for name, words in (("", ()), (" without Redis", ("--no-redis",))):
        command = [ORC, "--home", str(stack.home), "watch", ticket.run, "--json", *words]
        process = subprocess.Popen(command, env=child(), stdout=subprocess.PIPE, text=True)
        taken = []
        try:
            _line_with(process, 0.0)
            for _ in progress(f"orc watch{name}", range(LOGGED if not words else LOGGED // 5)):
                at = time.time()
                logger.log({KEY: at})
                _line_with(process, at)
                taken.append((time.time() - at) * 1000)
                time.sleep(np.random.default_rng(int(at * 1e3)).uniform(0, 0.1))
        finally:
            process.terminate()
            process.wait(10)
        found = float(np.quantile(taken, 0.95))
        what = f"log() to visible in orc watch{name}, p95"
        yield at_most(what, found, WATCH_MS, "ms") if not words else printed(what, found, "ms")
    yield from _live_values(stack, ticket.run)
    logger.close()


def _line_with(process: subprocess.Popen[str], value: float) -> None:
    """Waits for a line that has this value or a later one."""
    assert process.stdout is not None
    while line := process.stdout.readline():
        found = json.loads(line).get("metrics", {}).get(KEY)
        if found is not None and found["value"] >= value:
            return
    raise RuntimeError("orc watch ended")


def _live_values(stack: BenchStack, run: str) -> Iterator[Row]:
    command = [sys.executable, str(HERE / "reading.py"), "live", str(stack.home), run]
    answer = subprocess.run(command, env=child(), check=True, stdout=subprocess.PIPE)
    found = json.loads(answer.stdout)
    yield at_most("live values read from Redis, p99", float(np.quantile(found["redis"], 0.99)), REDIS_MS, "ms")
    yield printed("live values read without Redis, p99", float(np.quantile(found["database"], 0.99)), "ms")


def _read_live(home: str, run: str) -> None:
    """Milliseconds of readings of a run's newest values, in a process that does nothing else."""
    from orchestrator.backends import open_live
    from orchestrator.catalog.live import from_database

    stack = Stack.load(home)
    redis, store = open_live(stack.redis_url), open_store(stack.database_url)

    def taken(read: Callable[[], object], times: int) -> list[float]:
        found = []
        for _ in range(times):
            began = time.perf_counter()
            assert read() is not None
            found.append((time.perf_counter() - began) * 1000)
        return found

    taken(lambda: redis.read(run), 10)
    answer = {
        "redis": taken(lambda: redis.read(run), 2000),
        "database": taken(lambda: from_database(store, run), 200),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    if sys.argv[1] == "chart":
        _read_chart(sys.argv[2], sys.argv[3])
    elif sys.argv[1] == "live":
        _read_live(sys.argv[2], sys.argv[3])
