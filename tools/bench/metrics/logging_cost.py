"""What `log()` costs in the training process, beside the peers. The stack of the benchmark ships what is logged."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from environment import BenchStack, Peers, child, progress
from rows import Row, at_least, at_most, printed

CALLS = 200_000
KINDS = ("one", "ten", "twenty", "numpy", "tensor", "ten tensors")
BARS_US = {"one": 1.5, "ten": 5.0}
TIMES_CHEAPER = {"wandb": 50.0, "tensorboardX": 50.0, "aim": 50.0, "mlflow": 1000.0}


def measure(stack: BenchStack, peers: Peers, rounds: int) -> Iterator[Row]:
    ours: list[dict[str, Any]] = []
    others: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TIMES_CHEAPER}
    for number in progress("log()", range(rounds)):
        ours.append(_ours(stack, number))
        for tool, found in others.items():
            found.append(peers.ask("log", tool))
    for kind in KINDS:
        median = statistics.median(found[kind]["median"] for found in ours)
        name = f"log() of {kind}: µs, median"
        yield at_most(name, median, BARS_US[kind], "µs") if kind in BARS_US else printed(name, median, "µs")
        yield printed(f"log() of {kind}: µs, p99.9", statistics.median(found[kind]["p999"] for found in ours), "µs")
    for tool, required in TIMES_CHEAPER.items():
        for kind in ("one", "ten"):
            theirs = [found[kind]["median"] for found in others[tool]]
            yield printed(f"{tool}, log of {kind}: µs, median", statistics.median(theirs), "µs")
            ratios = [their / our[kind]["median"] for their, our in zip(theirs, ours, strict=True)]
            yield at_least(f"log() of {kind}: times cheaper than {tool}", statistics.median(ratios), required, "x")


def _ours(stack: BenchStack, number: int) -> dict[str, Any]:
    ticket = stack.open_run(f"log-cost-{number}")
    command = [sys.executable, __file__, str(stack.spools), ticket.run, str(ticket.attempt)]
    return json.loads(subprocess.run(command, env=child(), check=True, stdout=subprocess.PIPE, text=True).stdout)


def _in_training_process(spools: str, run: str, attempt: int) -> None:
    from pathlib import Path

    import numpy as np
    import torch
    from peers import ONE, TEN, cost

    from orchestrator.tracking.logger import Logger

    logger = Logger(Path(spools), run=run, attempt=attempt, rank=0)
    tensors = {key: torch.tensor(value) for key, value in TEN.items()}
    metrics: dict[str, dict[str, Any]] = {
        "one": ONE, "ten": TEN, "twenty": TEN | {f"val/{key}": value for key, value in TEN.items()},
        "numpy": {"train/loss": np.float32(0.5)}, "tensor": {"train/loss": torch.tensor(0.5)}, "ten tensors": tensors,
    }  # fmt: skip
    found = {
        kind: cost(lambda step, given=given: logger.log(given, step), CALLS // len(given), block=100)
        for kind, given in metrics.items()
    }
    logger.close()
    print(json.dumps(found))


if __name__ == "__main__":
    _in_training_process(sys.argv[1], sys.argv[2], int(sys.argv[3]))
