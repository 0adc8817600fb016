"""Two ranks are killed at a random step, without a word; the next attempt ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.run import Run

WORLD, STEPS = 2, 12


class Recorder:
    """Keeps what one rank records; kills its process at a step."""

    def __init__(self, kill_at: int | None) -> None:
        self.points: list[list[Any]] = []
        self.resumed: list[dict[str, Any]] = []
        self._kill_at = kill_at

    def log(self, metrics: Any, step: int | None = None) -> None:
        if step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.points += [[step, key, float(value)] for key, value in metrics.items()]

    def fact(self, fact: Fact) -> None:
        if fact.kind is FactKind.event and fact.data["kind"] == "resumed":
            self.resumed.append(fact.data["details"])

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


def train(directory: Path, meeting: Path, rank: int, attempt: int, kill_at: int | None) -> None:
    """Three epochs of four steps, with shuffling, dropout and momentum; a checkpoint every second step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    recorder = Recorder(kill_at)
    ticket = RunTicket(run="r1", name="n", experiment="e", attempt=attempt, directory=str(directory))
    policy = CheckpointPolicy(every_steps=2, every_epochs=0)
    run = Run(ticket, recorder, rank=rank, world_size=WORLD, local_rank=rank, seed=7, checkpoints=policy)
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    model, loader = run.prepare(model, DataLoader(data, batch_size=5, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(3):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()})
            run.report(state=state)
    run.finish()
    values = torch.cat([value.flatten().double() for value in model.state_dict().values()]).tolist()
    result = {"weights": values, "points": recorder.points, "resumed": recorder.resumed}
    (directory / f"attempt-{attempt}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def play(directory: Path, attempt: int, kill_at: int | None = None) -> list[int | None]:
    """All ranks in processes of their own, forked because torch is loaded here; gives their exit codes."""
    directory.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    meeting = directory / f"meeting-{attempt}"
    ranks = [
        context.Process(target=train, args=(directory, meeting, rank, attempt, kill_at)) for rank in range(WORLD)
    ]  # fmt: skip
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


def results(directory: Path, attempt: int) -> list[dict[str, Any]]:
    return [json.loads((directory / f"attempt-{attempt}-{rank}.json").read_text()) for rank in range(WORLD)]


def test_a_killed_training_ends_bit_equal_to_one_that_was_not(tmp_path: Path) -> None:
    kill_at = random.randint(3, STEPS)
    assert play(tmp_path / "whole", 1) == [0, 0]
    assert play(tmp_path / "parts", 1, kill_at) == [-signal.SIGKILL, -signal.SIGKILL], "the fault happened"
    assert play(tmp_path / "parts", 2) == [0, 0]
    for whole, rest in zip(results(tmp_path / "whole", 1), results(tmp_path / "parts", 2), strict=True):
        assert rest["weights"] == whole["weights"], f"killed at step {kill_at}"
        assert rest["points"] == whole["points"][-len(rest["points"]) :]
        assert len(rest["points"]) == STEPS - (kill_at - 1) // 2 * 2
    (details,) = results(tmp_path / "parts", 2)[0]["resumed"]
    assert details["is_exact"]


@pytest.mark.parametrize("kill_at", [1, 2])
def test_before_the_first_checkpoint_it_begins_anew(tmp_path: Path, kill_at: int) -> None:
    assert play(tmp_path, 1, kill_at) == [-signal.SIGKILL, -signal.SIGKILL]
    assert play(tmp_path, 2) == [0, 0]
    assert [len(each["points"]) for each in results(tmp_path, 2)] == [STEPS, STEPS]
