"""Digits training with 20 metrics a step, tracked against untracked: the same script, with and without a run.

Two DDP processes each, as `torchrun --nproc-per-node 2` starts them. Both jobs stay up and take turns: a block of
epochs each, the first of a pair by lot, so that a pair meets the same machine; the other job waits in a read meanwhile.
A tracked block opens a run and closes it. Only the training loop counts (forward, backward, step, and 20 times a
metric), and of that not the first seconds of a block: in them the tracker comes to its steady pace, and in an untracked
block it ends what the tracked one left to it.
"""

from __future__ import annotations

import json
import os
import random
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

LEAD, EPOCHS = 5, 10
"""Of a block: what does not count, and what does; about one and two seconds."""
WORKERS = 2
BAR_PERCENT = 0.5


def measure(stack: BenchStack, pairs: int) -> Iterator[Row]:
    jobs = {kind: Job(stack, kind) for kind in ("tracked", "untracked")}
    found: list[dict[str, dict[str, float]]] = []
    by_lot = random.Random(0)
    for number in progress("digits, tracked and untracked", range(pairs + 1)):
        pair = {kind: jobs[kind].train() for kind in by_lot.sample(sorted(jobs), 2)}
        if number:  # the first one warms
            found.append(pair)
    for job in jobs.values():
        job.end()
    ratios = [100 * (pair["tracked"]["seconds"] / pair["untracked"]["seconds"] - 1) for pair in found]
    yield at_most(
        "digits training, 20 metrics a step: % longer when tracked", statistics.median(ratios), BAR_PERCENT, "%"
    )
    low, high = _interval(ratios)
    yield printed("digits training: % longer when tracked, median is at least (95 %)", low, "%")
    yield printed("digits training: % longer when tracked, median is at most (95 %)", high, "%")
    seconds = sorted(pair["untracked"]["seconds"] for pair in found)
    yield printed("digits training, a block untracked", statistics.median(seconds), "s")
    yield printed("digits training, untracked: slowest against fastest", 100 * (seconds[-1] / seconds[0] - 1), "%")
    cpu = [100 * (pair["tracked"]["cpu"] / pair["untracked"]["cpu"] - 1) for pair in found]
    yield printed("digits training: % more CPU time in the training processes", statistics.median(cpu), "%")


def _interval(values: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence, whatever the distribution: by the ranks of the ordered values
    (Conover, Practical Nonparametric Statistics, 3.2)."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(ordered) / 2 - half), int(len(ordered) / 2 + half)
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]


class Job:
    """A training job that trains a block when it is told to."""

    def __init__(self, stack: BenchStack, kind: str) -> None:
        orders, answers = (stack.directory / f"{kind}.{end}" for end in ("orders", "answers"))
        for fifo in (orders, answers):
            os.mkfifo(fifo)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
        self._process = subprocess.Popen(
            [*command, __file__, kind, str(orders), str(answers)], env=child() | {"ORC_HOME": str(stack.home)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._orders, self._answers = orders.open("w"), answers.open()

    def train(self) -> dict[str, float]:
        """One block: wall-clock seconds, and CPU seconds of rank 0."""
        print("train", file=self._orders, flush=True)
        return json.loads(self._answers.readline())

    def end(self) -> None:
        self._orders.close()
        if self._process.wait(timeout=60):
            raise RuntimeError("the training job failed")


def _job(kind: str, orders: str, answers: str) -> None:
    """One rank of a job."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    import orchestrator
    from orchestrator.examples.digits import DigitsConfig, datasets, network

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    config = DigitsConfig()
    training, _ = datasets(config.test_share)
    sampler: DistributedSampler = DistributedSampler(training)
    loader = DataLoader(training, config.batch_size, sampler=sampler)
    model = DistributedDataParallel(network(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    others = dict.fromkeys((f"train/metric_{number}" for number in range(19)), 0.5)
    is_first = torch.distributed.get_rank() == 0
    ordered = open(orders) if is_first else None  # noqa: SIM115 (open until the process ends)
    answer = open(answers, "w") if is_first else None  # noqa: SIM115

    def epochs(count: int, run: Run | None) -> None:
        for number in range(count):
            sampler.set_epoch(number)
            for images, labels in loader:
                loss = cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if run is not None:
                    run.log({"train/loss": loss, **others})
        torch.distributed.barrier()

    def is_wanted() -> bool:
        order = torch.tensor(float(bool(ordered.readline()) if ordered is not None else False))
        torch.distributed.broadcast(order, 0)
        return bool(order)

    while is_wanted():
        with orchestrator.start_run(experiment="bench-digits") if kind == "tracked" else nullcontext() as run:
            epochs(LEAD, run)
            began, cpu = time.perf_counter(), time.process_time()
            epochs(EPOCHS, run)
            found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        if answer is not None:
            print(json.dumps(found), file=answer, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _job(*sys.argv[1:])
