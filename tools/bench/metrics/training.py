"""Digits training with 20 metrics a step, tracked against untracked: the same script, with and without a run.

Two DDP processes, as `torchrun --nproc-per-node 2` starts them. Only the training loop counts: epochs of forward,
backward, step (and 20 times a metric); the pairs take turns, and which of a pair is first alternates.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from environment import BenchStack, child, progress
from rows import Row, at_most, printed

if TYPE_CHECKING:
    from orchestrator import Run

EPOCHS = 40
WORKERS = 2
BAR_PERCENT = 0.5


def measure(stack: BenchStack, rounds: int) -> Iterator[Row]:
    pairs, cpu = [], []
    for number in progress("digits, tracked and untracked", range(rounds + 1)):
        order = ("tracked", "untracked") if number % 2 else ("untracked", "tracked")
        found = {kind: _run(stack, kind) for kind in order}
        if number:  # the first pair warms the file cache
            pairs.append({kind: one["seconds"] for kind, one in found.items()})
            cpu.append({kind: one["cpu"] for kind, one in found.items()})
    longer = statistics.median(100 * (pair["tracked"] / pair["untracked"] - 1) for pair in pairs)
    yield at_most("digits training, 20 metrics a step: % longer when tracked", longer, BAR_PERCENT, "%")
    spread = sorted(pair["untracked"] for pair in pairs)
    yield printed("digits training, untracked", statistics.median(spread), "s")
    yield printed("digits training, untracked: slowest against fastest", 100 * (spread[-1] / spread[0] - 1), "%")
    more = statistics.median(100 * (pair["tracked"] / pair["untracked"] - 1) for pair in cpu)
    yield printed("digits training, 20 metrics a step: % more CPU time in the training processes", more, "%")


def _run(stack: BenchStack, kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    environment = child() | {"ORC_HOME": str(stack.home), "BENCH_RESULT": str(stack.directory / "result.json")}
    subprocess.run(
        [*command, __file__, kind], env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return json.loads((stack.directory / "result.json").read_text())


def _train(kind: str) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    from orchestrator.examples.digits import DigitsConfig, datasets, network

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    config = DigitsConfig()
    training, _ = datasets(config.test_share)
    sampler: DistributedSampler = DistributedSampler(training)
    loader = DataLoader(training, config.batch_size, sampler=sampler)
    model = DistributedDataParallel(network(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    names = [f"train/metric_{number}" for number in range(19)]

    def epoch(number: int, run: Run | None) -> None:
        sampler.set_epoch(number)
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if run is not None:
                run.log({"train/loss": loss} | dict.fromkeys(names, 0.5))

    import orchestrator

    tracked = orchestrator.start_run(experiment="bench-digits") if kind == "tracked" else nullcontext()
    with tracked as run:
        for number in range(3):
            epoch(number, run)
        torch.distributed.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        for number in range(3, 3 + EPOCHS):
            epoch(number, run)
        torch.distributed.barrier()
        found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    if torch.distributed.get_rank() == 0:
        with open(os.environ["BENCH_RESULT"], "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _train(sys.argv[1])
