"""Many agents, many runs: simulated producers, many per process, that speak the real protocol to the real tracker.

Each simulating process is a Ray client that makes the calls a node agent makes (`push` with encoded batches,
`acknowledged`); it keeps to a timetable, and how late the tracker's answers are is the lag.
"""

from __future__ import annotations

import heapq
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from environment import BenchStack, Usage, child, tell
from rows import Row, at_most, printed

from orchestrator.records import POINT, Batch, Stream

KEYS = tuple(f"train/metric_{number}" for number in range(10))
PROCESSES = 2
IN_FLIGHT = 8
"""Pushes of each process at once."""
LEASE, BEAT = 120.0, 30.0
"""Seconds that a run may be silent, and between two signs of life of all of them."""
BOUND = 5.0
"""Seconds of lag beyond which a tracker does not keep up."""


def agents(stack: BenchStack, count: int = 1000, points: int = 1000, seconds: int = 60) -> Iterator[Row]:
    """`count` agents push `points` points each per second, one batch each."""
    tickets = _opened(stack, "agents", count)
    yield from _played(stack, tickets, f"{count:,} agents x {points:,} points/s", points, period=1.0, seconds=seconds)


def runs(stack: BenchStack, count: int = 100_000, seconds: int = 300) -> Iterator[Row]:
    """`count` open runs, ten keys each, a new point of each key every 30 s, all of one node."""
    began = time.monotonic()
    tickets = _opened(stack, "many", count)
    yield printed(f"{count:,} runs: opened per second", count / (time.monotonic() - began), "1/s")
    yield from _played(
        stack, tickets, f"{count:,} open runs", points=len(KEYS), period=30.0, seconds=seconds, group=100
    )


def _opened(stack: BenchStack, name: str, count: int) -> list[tuple[str, int]]:
    from orchestrator.records import RunSpec

    specs = [RunSpec(experiment=f"{stack.experiment}-{name}", name=f"{name}-{i}", lease=LEASE) for i in range(count)]
    found: list[tuple[str, int]] = []
    beaten = time.monotonic()
    for start in range(0, count, 500):
        found += [(one.run, one.attempt) for one in stack.tracker.open_runs(specs[start : start + 500])]
        if time.monotonic() - beaten > BEAT:
            beaten = time.monotonic()
            _beat(stack.tracker, found)
        tell(f"{len(found):,} of {count:,} runs opened")
    return found


def _beat(tracker: Any, attempts: list[tuple[str, int]]) -> None:
    for start in range(0, len(attempts), 5000):
        assert not any(tracker.heartbeats(attempts[start : start + 5000])), "a run was asked to stop"


def _played(
    stack: BenchStack, tickets: list[tuple[str, int]], what: str, points: int, period: float, seconds: int,
    group: int = 1,
) -> Iterator[Row]:  # fmt: skip
    usage = Usage(stack.service_processes())
    processes = []
    for number in range(PROCESSES):
        file = stack.directory / f"tickets-{number}.json"
        file.write_text(json.dumps(tickets[number::PROCESSES]))
        command = [sys.executable, __file__, str(stack.home), file, points, period, seconds, group]
        processes.append(
            subprocess.Popen(
                [str(word) for word in command], env=child(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        process.stdout.readline()  # type: ignore[union-attr]
    for process in processes:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    lags = []
    beaten = -BEAT
    while any(process.poll() is None for process in processes):
        usage.look()
        if time.monotonic() - beaten > BEAT:
            beaten = time.monotonic()
            _beat(stack.tracker, tickets)
        lags.append(stack.tracker.health()["lag_bytes"])
        tell(f"{what}: {lags[-1] / 1e6:,.0f} MB to commit")
        time.sleep(2)
    files = (stack.directory / f"tickets-{number}.found" for number in range(PROCESSES))
    found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    cores = usage.cores()
    drained = stack.wait_idle(900)
    sent = sum(one["points"] for one in found)
    late = np.concatenate([one["lags"] for one in found])
    yield printed(f"{what}: points per second sent", sent / max(one["seconds"] for one in found), "1/s")
    yield at_most(f"{what}: points lost or doubled", abs(sent - _stored(stack, tickets)), 0)
    yield at_most(f"{what}: lag until accepted, p99 (bounded)", float(np.quantile(late, 0.99)), BOUND, "s")
    yield printed(f"{what}: lag until accepted, median", float(np.median(late)), "s")
    yield printed(f"{what}: lag until accepted, at the end", max(one["lags"][-1] for one in found), "s")
    yield printed(f"{what}: not committed, highest", max(lags, default=0) / 1e6, "MB")
    yield printed(f"{what}: all committed after the last was sent", drained, "s")
    for name in cores:
        yield printed(f"{what}: {name}, highest memory", usage.peak_mb[name], "MB")
        yield printed(f"{what}: {name}, CPU", cores[name], "cores")


def _stored(stack: BenchStack, tickets: list[tuple[str, int]]) -> int:
    import psycopg

    from orchestrator.backends.postgres import conninfo

    query = (
        "SELECT coalesce(sum(n), 0) FROM metric_chunks JOIN runs ON runs.number = run_number WHERE runs.id = ANY(%s)"
    )
    with psycopg.connect(conninfo(stack.stack.database_url)) as connection:
        return connection.execute(query, [[run for run, _ in tickets]]).fetchone()[0]  # type: ignore[index]


# -- in a simulating process


class Agent:
    """What one agent finds in its spools: some producers, each with `points` new points per period. One push at a time;
    what comes meanwhile goes with the next, as a shipper does it."""

    def __init__(self, runs: list[tuple[str, int]], points: int, period: float, first_due: float) -> None:
        self.producers = [(uuid.uuid4().hex, run, attempt) for run, attempt in runs]
        self.points, self.period, self.first_due = points, period, first_due
        self.pushed = 0
        """Periods."""

    def due(self) -> float:
        return self.first_due + self.pushed * self.period

    def frames(self, payload: np.ndarray, now: float, last: int) -> tuple[list[bytes], int]:
        """Everything that is due, at most 32 periods, and how many periods that is."""
        periods = min(int((now - self.due()) / self.period) + 1, last - self.pushed, 32)
        count = periods * self.points
        mine = np.tile(payload, periods)
        mine["step"] = self.pushed * self.points // len(KEYS) + np.arange(count) // len(KEYS)
        mine["time"] = time.time()
        data, first = mine.tobytes(), self.pushed * self.points + 1
        return [
            Batch(
                producer=producer, run=run, attempt=attempt, rank=0, stream=Stream.points, first=first, count=count,
                keys=KEYS, payload=data,
            ).encode()
            for producer, run, attempt in self.producers
        ], periods  # fmt: skip


def _simulate(home: str, file: str, points: int, period: float, seconds: int, group: int) -> None:
    """Every agent has `group` producers."""
    from orchestrator.execution.connection import connect
    from orchestrator.stack import Stack

    tracker = connect(Stack.load(Path(home)))
    runs = [(run, attempt) for run, attempt in json.loads(Path(file).read_text())]
    payload = np.zeros(points, POINT)
    payload["key"] = np.arange(points) % len(KEYS)
    payload["value"] = np.random.default_rng(7).standard_normal(points)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    rounds = max(round(seconds / period), 1)
    starts = range(0, len(runs), group)
    waiting = [
        (began + start / len(runs) * period, number, Agent(runs[start : start + group], points, period, 0.0))
        for number, start in enumerate(starts)
    ]
    for due, _, agent in waiting:
        agent.first_due = due
    heapq.heapify(waiting)
    lock, lags = threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                due, number, agent = heapq.heappop(waiting)
            time.sleep(max(due - time.monotonic(), 0.0))
            frames, periods = agent.frames(payload, time.monotonic(), rounds)
            _push(tracker, frames, [producer for producer, _, _ in agent.producers], (agent.pushed + periods) * points)
            lags.append(time.monotonic() - due)
            agent.pushed += periods
            if agent.pushed < rounds:
                with lock:
                    heapq.heappush(waiting, (agent.due(), number, agent))

    threads = [threading.Thread(target=work) for _ in range(IN_FLIGHT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {"points": rounds * points * len(runs), "seconds": time.monotonic() - began, "lags": lags}
    Path(file).with_suffix(".found").write_text(json.dumps(found))


def _push(tracker: Any, frames: list[bytes], producers: list[str], seq: int) -> None:
    """Until everything is accepted; what fails is tried again, as an agent does, and shows as lag."""
    while True:
        try:
            told = {ack.producer: ack.accepted for ack in tracker.push(frames)}
        except (ConnectionError, TimeoutError):
            continue
        if all(told.get(producer, -1) >= seq for producer in producers):
            return


if __name__ == "__main__":
    _simulate(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
