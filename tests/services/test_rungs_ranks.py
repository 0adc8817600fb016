"""Two ranks that train in stretches, as a sweep's jobs do: paused, killed and taken up again they end where an
uninterrupted training ends, bit for bit, and what they say of it is the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import orchestrator
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.execution.worker import DONE, ENDED, PAUSED, Plan, train_rank
from orchestrator.records import Ack, Batch, Fact, FactKind, RunTicket, Stream
from orchestrator.tracking.shipper import Shipper
from orchestrator.training.run import Run  # noqa: F401 - as the optimizer below

WORLD = 2
TRAIN = """
from __future__ import annotations
import os, random, signal
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def train(run, cfg):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(48, 6), torch.randn(48, 2))
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))
    model, loader = run.prepare(model, DataLoader(data, batch_size=6, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
    state = run.state(model=model, optimizer=optimizer, scheduler=schedule)
    for epoch in run.epochs(cfg.epochs):
        model.train()
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean() * (1 + random.random())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.log({"loss": loss.item(), "lr": optimizer.param_groups[0]["lr"]})
            run.report(state=state)
            if run.step == cfg.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        model.eval()
        loss = (model(data.tensors[0]) - data.tensors[1]).square().mean()
        run.report({"val/loss": run.mean(loss.item())}, state=state)
    run.log({"after": 1.0})
"""
OBJECTIVES = [["val/loss", "min"]]


class Records:
    """A tracker that keeps everything."""

    def __init__(self) -> None:
        self.batches: dict[tuple[str, int, int], Batch] = {}

    def acknowledged(self, producers: object) -> list[Ack]:
        return []

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        for frame in frames:
            batch = Batch.decode(frame)
            self.batches[batch.producer, batch.stream, batch.first] = batch
        return []

    def facts(self, run: str) -> list[Fact]:
        return [
            fact for batch in self.batches.values() if batch.run == run
            for fact in (batch.facts() if batch.stream is Stream.facts else ())
        ]  # fmt: skip


def rank_of_two(rank: int, text: str, meeting: str, result: str) -> None:
    from orchestrator.execution.local import plan_from_json

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    returned = train_rank(plan_from_json(text), rank=rank, world_size=WORLD, local_rank=rank)
    Path(f"{result}-{rank}.json").write_text(json.dumps(asdict(returned)))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


RECORDS = Records()


class Trial:
    """Attempts of one run, each in two new processes."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name, self.attempts = directory, name, 0

    def attempt(
        self,
        *,
        kill_at: int = 0,
        lr: float = 0.05,
        epochs: int = 4,
        clone: Mapping[str, Any] | None = None,
        **judge: Any,
    ) -> dict[str, Any] | None:
        """What rank 0 returned; None where both ranks were killed."""
        from orchestrator.execution.local import plan_to_json

        self.attempts += 1
        ticket = RunTicket(
            run=self.name, name=self.name, experiment="e", attempt=self.attempts,
            directory=str(self.directory / self.name),
        )  # fmt: skip
        plan = Plan(
            ticket=ticket, train="rungs_project:train", user={"lr": lr, "epochs": epochs, "kill_at": kill_at},
            spool_directory=str(self.directory / "spools"), spool_bytes=16 << 20, flush_timeout=30.0, seed=7,
            checkpoints=asdict(CheckpointPolicy(every_steps=5, every_epochs=0, keep_last=1)), config_hash="h",
            code_paths=(str(self.directory),), judge=judge, clone=clone or {}, waits_for_record=False, perf=False,
        )  # fmt: skip
        meeting, result = (self.directory / f"{what}-{self.name}-{self.attempts}" for what in ("meeting", "result"))
        arguments = (plan_to_json(plan), str(meeting), str(result))
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=rank_of_two, args=(rank, *arguments)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        codes = {process.exitcode for process in ranks}
        if kill_at:
            assert -signal.SIGKILL in codes  # the other one may have noticed first
            return None
        assert codes == {0}
        others = json.loads(Path(f"{result}-1.json").read_text())
        returned: dict[str, Any] = json.loads(Path(f"{result}-0.json").read_text())
        assert (others["how"], others["tally"]) == (returned["how"], {})
        return returned

    def newest(self, returned: dict[str, Any]) -> Any:
        return orchestrator.load_checkpoint(
            str(self.directory / self.name / "checkpoints" / returned["tally"]["checkpoint"]["name"])
        )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rungs")
    (directory / "rungs_project.py").write_text(TRAIN)
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # imports much, which the processes forked from here then need not
    return directory


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def shipped(directory: Path) -> Records:
    """All that any rank has recorded. Nobody else ships here."""
    Shipper(directory / "spools", RECORDS).step()
    return RECORDS


def curve(directory: Path, run: str) -> dict[tuple[int, str, int], float]:
    """Every point of both ranks; what a later attempt did again must be the same."""
    points: dict[tuple[int, str, int], float] = {}
    for batch in shipped(directory).batches.values():
        if batch.run != run or batch.stream is Stream.facts:
            continue
        for point in batch.points():
            place = batch.rank, batch.keys[point["key"]], int(point["step"])
            assert points.setdefault(place, float(point["value"])) == float(point["value"])
    return points


def test_in_stretches_and_killed_is_as_in_one_go(directory: Path) -> None:
    whole, parts = Trial(directory, "whole"), Trial(directory, "parts")
    once = whole.attempt(until=None, objectives=OBJECTIVES, unit="auto")
    assert once is not None
    assert once["how"] == DONE

    first = parts.attempt(until=1.0, objectives=OBJECTIVES, unit="auto")
    assert first is not None
    assert (first["how"], first["tally"]["resource"]) == (PAUSED, 1.0)
    assert first["tally"]["checkpoint"]["name"] == "step_00000004-a1"
    assert parts.attempt(until=3.0, objectives=OBJECTIVES, unit="auto", kill_at=11) is None
    second = parts.attempt(until=3.0, objectives=OBJECTIVES, unit="auto")
    assert second is not None
    assert (second["how"], second["tally"]["resource"]) == (PAUSED, 3.0)
    again = parts.attempt(until=3.0, objectives=OBJECTIVES, unit="auto")  # its ending was lost
    assert again == second
    last = parts.attempt(until=None, objectives=OBJECTIVES, unit="auto")
    assert last is not None
    assert last["how"] == DONE

    assert {**last["tally"], "checkpoint": None} == {**once["tally"], "checkpoint": None}
    assert len(last["tally"]["reports"]) == 4
    one, other = whole.newest(once), parts.newest(last)
    assert same(one.model, other.model)
    assert same(one.optimizer, other.optimizer)
    points = curve(directory, "whole")
    assert len(points) == WORLD * (2 * 16 + 4 + 1)  # nobody waited for a record, and nothing of it is lost
    assert curve(directory, "parts") == points


def test_a_clone_goes_on_from_the_donor_with_its_own_learning_rate(directory: Path) -> None:
    donor, member = Trial(directory, "donor"), Trial(directory, "member")
    paused = donor.attempt(until=2.0, objectives=OBJECTIVES, unit="epoch")
    assert paused is not None
    told = {"directory": str(directory / "donor"), **paused["tally"]["checkpoint"], "job": 5}
    ended = member.attempt(lr=0.4, clone=told, epochs=3, objectives=OBJECTIVES, unit="epoch")
    assert ended is not None
    assert ended["how"] == DONE
    assert ended["tally"]["resource"] == 3.0
    assert [at for at, _ in ended["tally"]["reports"]] == [3.0]
    points = curve(directory, "member")
    # Two epochs of four steps are done, so the schedule has halved it once, and halves it again after the twelfth.
    assert [points[0, "lr", step] for step in (9, 10, 11, 12)] == [0.2, 0.2, 0.2, 0.1]
    events = [fact.data["kind"] for fact in shipped(directory).facts("member") if fact.kind is FactKind.event]
    assert events.count("cloned") == 1


def test_all_ranks_end_early_together_and_leave_their_loop_alike(directory: Path) -> None:
    stopping = {"metric": "val/loss", "direction": "max", "patience": 1, "min_delta": 9.0}
    returned = Trial(directory, "early").attempt(stopping=stopping)
    assert returned is not None
    assert returned["how"] == ENDED
    assert returned["tally"]["reason"].startswith("no better val/loss in 1 reports")
    assert [key[2] for key in curve(directory, "early") if key[1] == "after"] == [9, 9]
