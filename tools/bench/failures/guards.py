"""What the guards cost a training: the same loop with and without them, in turns, in one process.

Two loops: the digits network on 32 images (about 3 ms a step on one thread), and a step of 1 ms of CPU time that does
nothing, with an optimizer of a few small tensors. Each reports its loss every 10 steps; the guards look at the
gradients every 50, but not more than five times a second.

The bar is on what is spent inside the guards' own calls, each timed where the training makes it: the median of each
kind of call, times how often it comes, of the median step without guards. A few microseconds are less than what steps
of several milliseconds differ by among themselves, so the difference of the loops, blocks with and without by lot, is
told beside it with its interval: what the guards might cost elsewhere would show there.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.examples.digits import DigitsConfig, network
from orchestrator.records import Fact, RunTicket
from orchestrator.training.gradients import GradientNorms
from orchestrator.training.run import Run
from orchestrator.training.watching import Watch

BAR_PERCENT = 0.3
REPETITIONS = 20
REPORT_EVERY = 10
WATCH = Watch(
    warns=("memory",), fails=("finite", "divergence", "gradients"), rolls=("finite", "divergence", "gradients")
)
"""All of them, as `failures.nan=rollback` and `failures.divergence=rollback` have it."""

Step = Callable[[], float]


class Recorder:
    """Takes what a run tells, and keeps nothing: the record's cost is another benchmark's."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...

    def fact(self, fact: Fact) -> None: ...

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


def rows(repetitions: int = REPETITIONS) -> list[dict[str, Any]]:
    """As `rows.Row` takes them, by name: bar, measured, required, holds, unit."""
    torch.set_num_threads(1)
    return [row for name, made, steps in LOOPS for row in _compared(name, made, steps, repetitions)]


def digits(run: Run) -> Step:
    data = TensorDataset(torch.randn(1440, 1, 8, 8), torch.randint(0, 10, (1440,)))
    model, loader = run.prepare(network(DigitsConfig()), DataLoader(data, 32, shuffle=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    run.state(model=model, optimizer=optimizer, loader=loader)
    batches = (batch for epoch in run.epochs(1 << 30) for batch in loader)

    def step() -> float:
        images, labels = next(batches)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log({"train/loss": loss.detach()})
        return float(loss.detach())

    return step


def empty(run: Run) -> Step:
    weights = [nn.Parameter(torch.ones(8)) for _ in range(8)]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    run.state(model=nn.ParameterList(weights), optimizer=optimizer)
    for weight in weights:
        weight.grad = torch.ones(8)

    def step() -> float:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        optimizer.step()
        run.log({"train/loss": 1.0})
        return 1.0

    return step


LOOPS: tuple[tuple[str, Callable[[Run], Step], int], ...] = (
    ("digits, 3 ms a step", digits, 200),
    ("1 ms a step", empty, 400),
)
"""Name, what makes the step, steps of a block."""


class Loop:
    """A training with or without guards, and how long its parts took, in seconds."""

    def __init__(self, made: Callable[[Run], Step], directory: Path, *, is_guarded: bool) -> None:
        self.steps: list[float] = []
        self.hooks: list[float] = []
        """Looks included."""
        self.looks: list[float] = []
        self.reports: list[float] = []
        ticket = RunTicket(run="r", name="n", experiment="e", attempt=1, directory=str(directory))
        never = CheckpointPolicy(every_steps=0, every_epochs=0, every_minutes=0.0)
        self._run = Run(ticket, Recorder(), checkpoints=never, watch=WATCH if is_guarded else None)
        if is_guarded:
            watching: Any = self._run._watching
            watching.reported = _timed(watching.reported, self.reports)
            norms: GradientNorms = watching._norms
            hook = norms._hook
            norms._hook = lambda: _timed(hook(), self.hooks)  # type: ignore[method-assign]
            norms._look = _timed(norms._look, self.looks)  # type: ignore[method-assign]
        self._step = made(self._run)

    def block(self, steps: int) -> float:
        """CPU seconds per step."""
        began = time.thread_time()
        for number in range(steps):
            at = time.perf_counter()
            loss = self._step()
            self.steps.append(time.perf_counter() - at)
            if number % REPORT_EVERY == 0:
                self._run.report({"train/loss": loss})
        return (time.thread_time() - began) / steps

    def guards(self) -> float:
        """Seconds per step inside the guards."""
        median = statistics.median
        looks_per_step = len(self.looks) / len(self.hooks)
        return median(self.hooks) + median(self.looks) * looks_per_step + median(self.reports) / REPORT_EVERY


def _timed(function: Callable[..., Any], durations: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **more: Any) -> Any:
        began = time.perf_counter()
        answer = function(*given, **more)
        durations.append(time.perf_counter() - began)
        return answer

    return timed


def _compared(name: str, made: Callable[[Run], Step], steps: int, repetitions: int) -> Iterator[dict[str, Any]]:
    by_lot = random.Random(0)
    found = []
    with tempfile.TemporaryDirectory() as directory:
        loops = {kind: Loop(made, Path(directory) / kind, is_guarded=kind == "with") for kind in ("with", "without")}
        for number in range(repetitions + 1):
            pair = {kind: loops[kind].block(steps) for kind in by_lot.sample(sorted(loops), 2)}
            if number:  # the first one warms
                found.append(pair)
    step = statistics.median(loops["without"].steps)
    share = 100 * loops["with"].guards() / step
    yield {
        "bar": f"guards, {name}: % of a step", "measured": share, "required": BAR_PERCENT,
        "holds": share <= BAR_PERCENT, "unit": "%",
    }  # fmt: skip
    ratios = [100 * (pair["with"] / pair["without"] - 1) for pair in found]
    spread = 1.96 * 1.2533 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    yield {"bar": f"guards, {name}: % longer with them", "measured": statistics.median(ratios), "unit": "%"}
    yield {"bar": f"guards, {name}: % longer, +- (95 %)", "measured": spread, "unit": "%"}
    yield {"bar": f"guards, {name}: a step without", "measured": 1e3 * step, "unit": "ms"}


if __name__ == "__main__":
    for row in rows():
        print(row)
