"""What two ranks do together, on two real processes with gloo. They play all scenes once; each test looks at one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.checkpoints.engine import SaveFailed, Unreadable
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.group import Group
from orchestrator.training.run import Run, RunStopped

WORLD = 2


class Recorder:
    def __init__(self, stop_at: int | None = None) -> None:
        self.points: list[tuple[int, str, float]] = []
        self.told: list[Fact] = []
        self.stop_at = stop_at

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.points += [(step or 0, key, float(value)) for key, value in metrics.items()]

    def fact(self, fact: Fact) -> None:
        self.told.append(fact)

    def stop_requested(self) -> bool:
        return self.stop_at is not None and any(step >= self.stop_at for step, *_ in self.points)

    def flush(self, timeout: float) -> bool:
        return True

    def events(self) -> list[str]:
        return [fact.data["kind"] for fact in self.told if fact.kind is FactKind.event]


def new_run(
    directory: Path, rank: int, world_size: int = WORLD, attempt: int = 1, stop_at: int | None = None, **settings: Any
) -> tuple[Run, Recorder]:
    recorder = Recorder(stop_at)
    ticket = RunTicket(run="r1", name="n", experiment="e", attempt=attempt, directory=str(directory))
    return Run(ticket, recorder, rank=rank, world_size=world_size, local_rank=rank, seed=7, **settings), recorder


def train(run: Run) -> list[float]:
    """Four epochs with shuffling, dropout and momentum; gives the weights."""
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    torch.manual_seed(100 + run.rank)  # DDP must make the weights equal
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    model, loader = run.prepare(model, DataLoader(data, batch_size=5, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(4):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()})
            run.report(state=state)
    return weights(model)


def weights(model: nn.Module) -> list[float]:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()]).tolist()


# -- the scenes ----------------------------------------------------------------------------------------------


def words(directory: Path, rank: int) -> dict[str, Any]:
    group = Group(rank, WORLD)
    return {
        "short": group.share(f"from {rank}"),
        "long": len(group.share("é" * (5000 + rank))),
        "empty": group.share(""),
        "gathered": group.gather(f"rank {rank} " + "x" * rank),
        "sum": group.sum(torch.tensor([1, rank])).tolist(),
        "mean": group.mean(float(rank)),
    }


def resume(directory: Path, rank: int) -> dict[str, Any]:
    """An uninterrupted training, and one that is stopped in the middle of an epoch and continued."""
    policy = CheckpointPolicy(every_steps=5, every_epochs=0)
    whole, recorded = new_run(directory / "whole", rank, checkpoints=policy)
    want = train(whole)
    # Only rank 0 hears of the stop; both must end at the same step.
    first, before = new_run(directory / "parts", rank, checkpoints=policy, stop_at=6 if rank == 0 else None)
    stopped_at = None
    try:
        train(first)
    except RunStopped as stop:
        stopped_at = stop.step
    second, after = new_run(directory / "parts", rank, attempt=2, checkpoints=policy)
    got = train(second)
    return {
        "stopped_at": stopped_at,
        "want": want,
        "got": got,
        "curves_equal": before.points + after.points == recorded.points,
        "resumed": [fact.data["details"] for fact in after.told if fact.data.get("kind") == "resumed"],
        "ranks_differ": whole.mean(recorded.points[0][2]) != recorded.points[0][2],
    }


def failing_save(directory: Path, rank: int) -> dict[str, Any]:
    """Rank 1 cannot write: no rank may believe that there is a checkpoint."""
    run, recorder = new_run(directory / "failing", rank)
    state = run.state(model=nn.Linear(1, 1))
    run.save(state)
    run.log({"a": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("orchestrator.checkpoints.writer.write_rank", no_space)
        try:
            run.save(state)
            error = ""
        except SaveFailed as failed:
            error = str(failed)
    dist.barrier()
    names = sorted(path.name for path in (directory / "failing" / "checkpoints").iterdir())
    return {"error": error, "names": names}


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def damaged_on_one_rank(directory: Path, rank: int) -> dict[str, Any]:
    """Only rank 1's file is damaged: both must fall back to the same older checkpoint."""
    run, _ = new_run(directory / "damaged", rank)
    state = run.state(model=nn.Linear(1, 1))
    run.log({"a": 1.0})
    run.save(state)
    run.log({"a": 1.0})
    info = run.save(state)
    if rank == 1:
        path = Path(info.uri) / "rank-0001.json"
        path.write_bytes(path.read_bytes()[:-1] + b" ")
    dist.barrier()
    again, recorder = new_run(directory / "damaged", rank, attempt=2)
    again.state(model=nn.Linear(1, 1))
    return {"step": again.step, "events": recorder.events()}


def unreadable_on_one_rank(directory: Path, rank: int) -> dict[str, Any]:
    run, _ = new_run(directory / "damaged", rank, attempt=3)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("orchestrator.checkpoints.reader.check_sizes", no_space)
        try:
            run.state(model=nn.Linear(1, 1))
        except Unreadable as error:
            return {"error": str(error)}
    return {"error": ""}


def preparing(directory: Path, rank: int) -> dict[str, Any]:
    run, recorder = new_run(directory / "preparing", rank)
    torch.manual_seed(rank)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    trained, frozen, loader = run.prepare(nn.Linear(2, 1), frozen, DataLoader(TensorDataset(torch.arange(7)), 2))
    counted = run.prepare(DataLoader(TensorDataset(torch.arange(7)), 2), even=False)
    run.params({"a": 1})
    run.event("here", "on every rank")
    return {
        "is_ddp": [isinstance(each, DistributedDataParallel) for each in (trained, frozen)],
        "frozen": weights(frozen),
        "batches": len(list(loader)),
        "samples": sorted(int(value) for (batch,) in counted for value in batch),
        "facts": [fact.kind.value for fact in recorder.told],
        "artifact": run.artifact(b"x", "x.bin"),
    }


def accumulating(directory: Path, rank: int) -> dict[str, Any]:
    """Four micro-batches of 1 per rank against one batch of 4 per rank."""
    inputs = torch.arange(8.0).reshape(8, 1)
    gradients = []
    for batch_size, steps in ((4, 1), (1, 4)):
        run, _ = new_run(directory / "accumulating", rank, accumulation_steps=steps)
        model, loader = run.prepare(nn.Linear(1, 1), DataLoader(TensorDataset(inputs), batch_size))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        for (batch,) in loader:
            with run.accumulate(model):
                (model(batch).square().mean() / run.accumulation_steps).backward()
        gradients.append([parameter.grad.item() for parameter in model.parameters()])
    return {"gradients": gradients}


SCENES = (words, resume, failing_save, damaged_on_one_rank, unreadable_on_one_rank, preparing, accumulating)


def play(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=WORLD)
    results = {scene.__name__: scene(directory, rank) for scene in SCENES}
    (directory / f"results-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(play, (directory,), nprocs=WORLD)
    return directory


@pytest.fixture(scope="module")
def played(directory: Path) -> list[dict[str, Any]]:
    """Per rank, what each scene gave."""
    return [json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(WORLD)]


# -- the tests -----------------------------------------------------------------------------------------------


def test_all_ranks_get_the_same_words_and_sums(played: list[dict[str, Any]]) -> None:
    want = {
        "short": "from 0",
        "long": 5000,
        "empty": "",
        "gathered": ["rank 0 ", "rank 1 x"],
        "sum": [2, 1],
        "mean": 0.5,
    }
    assert [each["words"] for each in played] == [want, want]


def test_a_stop_that_only_rank_0_heard_ends_both_at_the_same_step(played: list[dict[str, Any]]) -> None:
    assert [each["resume"]["stopped_at"] for each in played] == [6, 6]


def test_a_resumed_training_of_two_workers_is_bit_equal(played: list[dict[str, Any]]) -> None:
    for each in played:
        assert each["resume"]["got"] == each["resume"]["want"]
        assert each["resume"]["curves_equal"]
        assert each["resume"]["ranks_differ"], "each rank has data of its own"
    assert played[0]["resume"]["resumed"][0]["is_exact"]


def test_another_number_of_workers_continues_and_says_relaxed(played: list[dict[str, Any]], directory: Path) -> None:
    run, recorder = new_run(directory / "parts", rank=0, world_size=1, attempt=3)
    train(run)
    (event,) = [fact.data for fact in recorder.told if fact.data.get("kind") == "resumed"]
    assert event["details"]["why"] == ["2 workers then, 1 now"]
    # Step 15 was two workers' third of four batches: 10 of 40 samples are left, two batches for one worker.
    assert [step for step, *_ in recorder.points] == [16, 17]


def test_a_rank_that_cannot_write_fails_the_save_for_all(played: list[dict[str, Any]]) -> None:
    for each in played:
        assert "rank 1" in each["failing_save"]["error"]
        assert each["failing_save"]["names"] == ["step_00000000-a1"]


def test_damage_that_one_rank_sees_makes_all_fall_back(played: list[dict[str, Any]]) -> None:
    assert [each["damaged_on_one_rank"]["step"] for each in played] == [1, 1]
    events = [each["damaged_on_one_rank"]["events"] for each in played]
    assert events == [["checkpoint-quarantined", "checkpoint-fallback", "resumed"], []]


def test_storage_that_one_rank_cannot_read_stops_all(played: list[dict[str, Any]]) -> None:
    for each in played:
        assert "rank 1" in each["unreadable_on_one_rank"]["error"]


def test_prepare_divides_data_and_makes_weights_equal(played: list[dict[str, Any]]) -> None:
    one, two = (each["preparing"] for each in played)
    assert one["is_ddp"] == two["is_ddp"] == [True, False]
    assert one["frozen"] == two["frozen"]
    assert one["batches"] == two["batches"] == 2
    assert sorted(one["samples"] + two["samples"]) == list(range(7))


def test_facts_are_told_once_and_events_by_every_rank(played: list[dict[str, Any]]) -> None:
    assert [each["preparing"]["facts"] for each in played] == [["param", "event"], ["event"]]
    assert played[0]["preparing"]["artifact"] == played[1]["preparing"]["artifact"]


def test_accumulated_gradients_are_those_of_the_whole_batch(played: list[dict[str, Any]]) -> None:
    for each in played:
        whole, accumulated = each["accumulating"]["gradients"]
        assert accumulated == pytest.approx(whole)
    assert played[0]["accumulating"] == played[1]["accumulating"]
