"""Batches that are divided, so that less memory is needed and the training stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.records import Fact, RunTicket
from orchestrator.training.loader import parts
from orchestrator.training.run import Run

torch.set_num_threads(1)


class Recorder:
    """Keeps the points."""

    def __init__(self) -> None:
        self.points: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.points.append(dict(metrics))

    def fact(self, fact: Fact) -> None: ...

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


class Training:
    """Two epochs of four steps of 8 samples; `saves` after each step."""

    def __init__(
        self, directory: Path, *, splits: int = 1, attempt: int = 1, own: int = 1, saves: bool = False
    ) -> None:
        self.recorder = Recorder()
        ticket = RunTicket(run="r1", name="n", experiment="e", attempt=attempt, directory=str(directory))
        policy = CheckpointPolicy(every_steps=int(saves), every_epochs=0, every_minutes=0, keep_last=0, at_end=False)
        self.run = Run(ticket, self.recorder, seed=3, checkpoints=policy, splits=splits, accumulation_steps=own)
        self.sizes: list[int] = []
        self.seen: list[list[float]] = []
        """The samples of each optimizer step."""
        self.weights = torch.zeros(0)

    def train(self, steps: int = 8, batch: int = 8) -> Training:
        run = self.run
        torch.manual_seed(1)
        inputs = torch.randn(32, 4, dtype=torch.float64)
        data = TensorDataset(torch.arange(32.0), inputs, inputs.sum(1, keepdim=True))
        model, loader = run.prepare(nn.Linear(4, 1).double(), DataLoader(data, batch, shuffle=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        state = run.state(model=model, optimizer=optimizer, loader=loader)
        step: list[float] = []
        try:
            for _ in run.epochs(2):
                for numbers, values, targets in loader:
                    self.sizes.append(len(numbers))
                    step += numbers.tolist()
                    with run.accumulate(model) as is_complete:
                        loss = (model(values) - targets).square().mean()
                        (loss / run.accumulation_steps).backward()
                    if is_complete:
                        optimizer.step()
                        optimizer.zero_grad()
                        self.seen.append(sorted(step))
                        step = []
                        run.report({"loss": loss.item()}, state=state)
                        if len(self.seen) == steps:
                            return self
        finally:
            run.close()
            self.weights = torch.cat([each.detach().flatten() for each in model.parameters()])
        return self


@pytest.mark.parametrize("splits", [2, 3])
def test_a_divided_batch_trains_the_same_samples_in_the_same_steps(tmp_path: Path, splits: int) -> None:
    whole = Training(tmp_path / "whole").train()
    divided = Training(tmp_path / "divided", splits=splits).train()
    assert set(whole.sizes) == {8}
    assert set(divided.sizes) == {2 if splits > 2 else 4}, "three does not divide eight, four does"
    assert divided.seen == whole.seen
    assert torch.allclose(divided.weights, whole.weights, rtol=0, atol=1e-12)


def test_an_attempt_with_smaller_micro_batches_goes_on_at_the_very_sample(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole").train()
    before = Training(tmp_path / "run", saves=True).train(steps=3)
    after = Training(tmp_path / "run", splits=4, attempt=2, saves=True).train()
    again = Training(tmp_path / "run", splits=2, attempt=3, saves=True).train()
    assert [*before.seen, *after.seen] == whole.seen
    assert torch.allclose(after.weights, whole.weights, rtol=0, atol=1e-12)
    assert again.seen == []


def test_what_the_user_accumulates_is_multiplied(tmp_path: Path) -> None:
    divided = Training(tmp_path, splits=2, own=2)
    assert divided.run.accumulation_steps == 2
    divided.train()
    assert divided.run.accumulation_steps == 4
    assert [len(step) for step in divided.seen] == [16, 16, 16, 16]
    divided.run.accumulation_steps = 1
    assert divided.run.accumulation_steps == 2
    ticket = divided.run._ticket
    alone = Run(ticket, divided.recorder, shares=2, resume=False)
    assert alone.accumulation_steps == 2, "of two workers, which would have shared the batch"


def test_the_size_of_a_micro_batch_is_recorded_once_where_batches_can_be_divided(tmp_path: Path) -> None:
    divided = Training(tmp_path / "a", splits=2).train()
    assert [point for point in divided.recorder.points if "perf/micro_batch" in point] == [{"perf/micro_batch": 4.0}]
    alone = Training(tmp_path / "b")
    for _ in alone.run.prepare(DataLoader(TensorDataset(torch.zeros(4)), 2)):
        with alone.run.accumulate():
            pass
    assert not alone.recorder.points


def test_batches_of_an_evaluation_stay_whole(tmp_path: Path) -> None:
    run = Training(tmp_path, splits=2).run
    loader = run.prepare(DataLoader(TensorDataset(torch.zeros(6)), 3), even=False)
    assert [len(batch[0]) for batch in loader] == [3, 3]
    assert run.accumulation_steps == 1


@pytest.mark.parametrize(
    ("size", "least", "expected"), [(8, 1, 1), (8, 2, 2), (8, 3, 4), (8, 8, 8), (8, 9, 8), (7, 2, 7), (1, 2, 1)]
)
def test_a_batch_is_divided_into_equal_parts(size: int, least: int, expected: int) -> None:
    assert parts(size, least) == expected
