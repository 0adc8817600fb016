"""Sustained points per second, from the first `log()` until accepted and until committed, beside the peers.

Two producer processes log rows of ten metrics as fast as they can; the node agent, the tracker and PostgreSQL share the
machine with them. The clock stops when the slower producer sees its last point accepted (committed).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from environment import BenchStack, Peers, Usage, child, progress
from rows import Row, at_least, printed

PRODUCERS = 2
POINTS = 5_000_000
"""Of each producer."""
ACCEPTED, COMMITTED = 1_000_000.0, 500_000.0
KEYS = 20


def measure(stack: BenchStack, peers: Peers, rounds: int, points: int = POINTS) -> Iterator[Row]:
    accepted, committed, others = [], [], {tool: [] for tool in ("mlflow", "wandb", "tensorboardX", "aim")}
    usage = Usage(stack.service_processes())
    logged = []
    for number in progress("sustained points", range(rounds)):
        found = _ours(stack, number, points, usage)
        total = PRODUCERS * points
        accepted.append(total / max(one["accepted"] for one in found))
        committed.append(total / max(one["committed"] for one in found))
        logged.append(total / max(one["logged"] for one in found))
        for tool, rates in others.items():
            answer = peers.ask("sustained", tool)
            rates.append(answer["points"] / answer["seconds"])
    yield printed("sustained points per second, 2 producers, logged", statistics.median(logged), "1/s")
    yield at_least("sustained points per second, 2 producers, accepted", statistics.median(accepted), ACCEPTED, "1/s")
    yield at_least(
        "sustained points per second, 2 producers, committed", statistics.median(committed), COMMITTED, "1/s"
    )
    for tool, rates in others.items():
        yield printed(f"{tool}: sustained points per second until durable", statistics.median(rates), "1/s")
    for word, ours in (("accepted", accepted), ("committed", committed)):
        against = [our / their for our, their in zip(ours, others["mlflow"], strict=True)]
        yield at_least(f"times MLflow log_batch, until durable ({word})", statistics.median(against), 100, "x")
        best = [our / max(others[tool][i] for tool in others if tool != "mlflow") for i, our in enumerate(ours)]
        yield at_least(f"times the best other peer, until durable ({word})", statistics.median(best), 10, "x")
    for name, cores in usage.cores().items():
        yield printed(f"sustained: {name}, highest memory", usage.peak_mb[name], "MB")
        yield printed(f"sustained: {name}, CPU (pauses for peers included)", cores, "cores")


def _ours(stack: BenchStack, number: int, points: int, usage: Usage) -> list[dict[str, float]]:
    ticket = stack.open_run(f"sustained-{number}")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(stack.spools), ticket.run, str(ticket.attempt), str(rank), str(points)],
            env=child(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(PRODUCERS)
    ]  # fmt: skip
    for process in processes:
        _line(process)  # it is ready
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    while any(process.poll() is None for process in processes):
        usage.look()
        time.sleep(0.5)
    return [json.loads(_line(process)) for process in processes]


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _produce(spools: str, run: str, attempt: int, rank: int, points: int) -> None:
    from pathlib import Path

    from orchestrator.tracking.logger import Logger

    logger = Logger(Path(spools), run=run, attempt=attempt, rank=rank)
    names = [f"train/metric_{number}" for number in range(KEYS)]
    rows: list[dict[str, Any]] = [
        {name: (step + place) / 7 for place, name in enumerate(names[start : start + 10])}
        for step in range(50)
        for start in range(0, KEYS, 10)
    ]
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    calls = points // 10
    log = logger.log
    for call in range(calls):
        log(rows[call % 100], call // 2)
    logged = time.perf_counter() - began
    assert logger.flush(600)
    accepted = time.perf_counter() - began
    assert logger.wait_committed(600)
    committed = time.perf_counter() - began
    logger.close()
    print(json.dumps({"logged": logged, "accepted": accepted, "committed": committed}))


if __name__ == "__main__":
    _produce(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
