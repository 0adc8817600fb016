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

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.engine import SaveFailed, StateRefused, Unreadable
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.group import Group
from orchestrator.training.run import Run, RunStopped
from tests.plugins.delayed_stager import DelayedStager

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
            patch.setattr("orchestrator.checkpoints.writer.write_job", no_space)
        try:
            run.save(state)
            error = ""
        except SaveFailed as failed:
            error = str(failed)
    dist.barrier()
    names = sorted(path.name for path in (directory / "failing" / "checkpoints").glob("step_*"))
    return {"error": error, "names": names}


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def shares(directory: Path, rank: int) -> dict[str, Any]:
    """Each rank writes its half, and buffers that differ are each rank's own."""
    run, _ = new_run(directory / "shares", rank)
    bare = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.BatchNorm1d(30))
    model = DistributedDataParallel(bare, broadcast_buffers=False)
    optimizer = torch.optim.Adam(model.parameters())
    torch.manual_seed(rank)
    model(torch.randn(8, 30)).square().mean().backward()
    optimizer.step()
    state = run.state(model=model, optimizer=optimizer, files={"words": b"abc"})
    info = run.save(state)
    mean = bare[2].running_mean.tolist()
    with torch.no_grad():
        for tensor in [*bare.parameters(), *bare.buffers()]:
            tensor.zero_()
    again, recorder = new_run(directory / "shares", rank, attempt=2)
    restored = again.state(model=model, optimizer=optimizer)
    return {
        "uri": info.uri,
        "sizes": {path.name: path.stat().st_size for path in Path(info.uri).rglob("*.safetensors")},
        "mean": mean,
        "mean_restored": bare[2].running_mean.tolist(),
        "weights_sum": weights(bare[0])[0],
        "files": sorted(restored.files),
    }


def different_models(directory: Path, rank: int) -> dict[str, Any]:
    """What is not the same on all ranks cannot be divided among them."""
    run, _ = new_run(directory / "different", rank)
    try:
        run.save(run.state(model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2 + rank))))
    except StateRefused as error:
        return {"error": str(error)}
    return {"error": ""}


def no_room_on_one_rank(directory: Path, rank: int) -> dict[str, Any]:
    """Rank 1 still writes its first save: none may take part in a second one."""
    stager = DelayedStager(Storage(str(directory / "room" / "checkpoints")), slots=2 - rank)
    policy = CheckpointPolicy(every_steps=1, every_epochs=0)
    run, recorder = new_run(directory / "room", rank, stager=stager, checkpoints=policy, perf=True)
    state = run.state(model=nn.Linear(1, 1))
    states = []
    for _ in range(3):
        run.log({"a": 1.0})
        info = run.report(state=state)
        states.append(info.state.value if info else None)
    if rank == 1:
        stager.write()
    dist.barrier()
    stager.writes_while_waited_for = True
    if rank == 0:
        stager.write()
    run.log({"a": 1.0})
    info = run.report(state=state)
    run.finish()
    return {
        "states": states,
        "abandoned": stager.abandoned,
        "after": info.state.value if info else None,
        "events": recorder.events(),
        "committed": [fact.data["step"] for fact in recorder.told if fact.kind is FactKind.checkpoint],
        "skipped": [value for _, key, value in recorder.points if key == "perf/checkpoints_skipped"],
    }


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


SCENES = (
    words, resume, failing_save, shares, different_models, no_room_on_one_rank, damaged_on_one_rank,
    unreadable_on_one_rank, preparing, accumulating,
)  # fmt: skip


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


def test_each_rank_writes_half_of_what_is_the_same(played: list[dict[str, Any]]) -> None:
    one, two = (each["shares"] for each in played)
    sizes = one["sizes"]
    assert sizes.keys() >= {f"{group}-0000{n}-of-00002.safetensors" for group in ("model", "optim") for n in (1, 2)}
    written = [sum(size for name, size in sizes.items() if f"-{n}-of" in name) for n in ("00001", "00002")]
    assert abs(written[0] - written[1]) < 8192
    index = json.loads((Path(one["uri"]) / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert one["weights_sum"] == two["weights_sum"] != 0.0
    assert one["files"] == two["files"] == ["words"]


def test_buffers_that_differ_come_back_to_each_rank(played: list[dict[str, Any]]) -> None:
    one, two = (each["shares"] for each in played)
    assert one["mean"] != two["mean"]
    assert [each["shares"]["mean_restored"] for each in played] == [one["mean"], two["mean"]]


def test_models_that_differ_are_named_on_all_ranks(played: list[dict[str, Any]]) -> None:
    for each in played:
        assert "model/1.bias is F32 [2] on rank 0 and F32 [3] on rank 1" in each["different_models"]["error"]


def test_a_rank_without_room_makes_all_skip(played: list[dict[str, Any]]) -> None:
    one, two = (each["no_room_on_one_rank"] for each in played)
    assert one["states"] == two["states"] == ["staged", None, None]
    assert (one["abandoned"], two["abandoned"]) == (2, 0), "rank 0 had room and gave it back"
    assert one["after"] == two["after"] == "staged"
    assert (one["events"], two["events"]) == (["checkpoint-skipped"], [])
    assert one["skipped"] == two["skipped"] == [1.0, 2.0]
    assert one["committed"] == [1, 4]


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
