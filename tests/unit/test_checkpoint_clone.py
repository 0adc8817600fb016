"""A run that begins with another one's checkpoint, and settings of its own that reach its optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs as arrow_fs
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from orchestrator.backends import storage as storages
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.clone import clone, is_clone, keep, taken_before
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.reader import verify
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import ManualClock
from orchestrator.errors import CheckpointCorrupt
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.judging import judge
from orchestrator.training.run import Run

torch.set_num_threads(1)


class Recorder:
    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...
    def fact(self, fact: Fact) -> None:
        self.facts.append(fact)

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


def run_at(directory: Path, name: str, attempt: int, **settings: Any) -> tuple[Run, Recorder]:
    recorder = Recorder()
    ticket = RunTicket(run=name, name=name, experiment="e", attempt=attempt, directory=str(directory / name))
    settings = {"clock": ManualClock(), "seed": 1, "checkpoints": CheckpointPolicy(every_steps=1), **settings}
    return Run(ticket, recorder, **settings), recorder


def trained(run: Run, steps: int, *, lr: float = 0.1) -> nn.Linear:
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer)
    while run.step < steps:
        loss = model(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report({"val/loss": loss.item()}, state=state)
    return model


def checkpoints(directory: Path, name: str) -> Storage:
    return Storage(str(directory / name / "checkpoints"))


@pytest.fixture
def donor(tmp_path: Path) -> tuple[Path, nn.Linear]:
    run, _ = run_at(tmp_path, "donor", 1)
    return tmp_path, trained(run, 3)


def cloned(directory: Path, attempt: int, **how: Any) -> Any:
    source, target = checkpoints(directory, "donor"), checkpoints(directory, "member")
    arguments = {"run": "member", "attempt": attempt, "now": 5.0, **how}
    return clone(source, "step_00000003-a1", target, **arguments)


def test_it_is_the_members_newest_checkpoint_and_outlives_the_donor(donor: tuple[Path, nn.Linear]) -> None:
    directory, model = donor
    other, _ = run_at(directory, "member", 1)
    trained(other, 9)
    manifest = cloned(directory, 2)
    assert (manifest.id, manifest.step, manifest.reasons) == ("member/step_00000003-a2", 3, ("cloned",))
    assert (manifest.metrics, manifest.is_best, manifest.created) == ({}, False, 5.0)
    inside = checkpoints(directory, "member").join(manifest.name)
    tensors = next(file.path for file in manifest.files if file.path.endswith(".safetensors"))
    here, there = (Path(checkpoints(directory, name).uri(at), tensors) for name, at in (
        ("member", manifest.name), ("donor", "step_00000003-a1")
    ))  # fmt: skip
    assert here.stat().st_ino == there.stat().st_ino
    shutil.rmtree(directory / "donor")
    assert verify(inside, manifest) == []
    assert not list(directory.rglob("*.partial"))
    member, recorder = run_at(directory, "member", 2)
    restored = trained(member, 3)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))
    told = [fact.data["id"] for fact in recorder.facts if fact.kind is FactKind.checkpoint]
    assert told[-1] == manifest.id


def test_it_is_made_once_per_job_and_the_next_attempt_goes_on_from_what_came_of_it(
    donor: tuple[Path, nn.Linear],
) -> None:
    directory, _ = donor
    first = cloned(directory, 2, job="7")
    assert cloned(directory, 2, job="7") == first
    member, _ = run_at(directory, "member", 2)
    trained(member, 5)
    assert cloned(directory, 3, job="7") == first
    again, _ = run_at(directory, "member", 3)
    again.state(model=(model := nn.Linear(3, 2)), optimizer=SGD(model.parameters(), lr=0.1))
    assert again.step == 5
    later = cloned(directory, 4, job="8")
    assert later.name == "step_00000003-a4"
    fresh, _ = run_at(directory, "member", 4)
    fresh.state(model=(model := nn.Linear(3, 2)), optimizer=SGD(model.parameters(), lr=0.1))
    assert fresh.step == 3


def test_what_was_trained_since_is_found_when_clone_and_donor_are_gone(donor: tuple[Path, nn.Linear]) -> None:
    directory, _ = donor
    sha256 = catalog.read_manifest(checkpoints(directory, "donor").join("step_00000003-a1")).digest

    def taken(job: str = "7", since: int = 2) -> Any:
        member = checkpoints(directory, "member")
        return taken_before(member, "step_00000003-a1", run="member", sha256=sha256, job=job, since=since)

    earlier, _ = run_at(directory, "member", 1)
    trained(earlier, 4)
    assert taken() is None, "its own past is none of it"
    first = cloned(directory, 2, job="7", sha256=sha256)
    assert taken() == first
    assert taken("8") is None
    member, _ = run_at(directory, "member", 2, checkpoints=CheckpointPolicy(every_steps=1, keep_last=1, keep_best=0))
    trained(member, 6)
    shutil.rmtree(directory / "donor")
    assert not checkpoints(directory, "member").exists(f"{first.name}/MANIFEST.json"), "retention took it"
    found = taken()
    assert (found.step, found.attempt) == (6, 2)
    assert taken("8", since=3) is None, "that was another job's"


def test_what_is_gone_cannot_be_kept_for_somebody(donor: tuple[Path, nn.Linear]) -> None:
    directory, _ = donor
    storage, name = checkpoints(directory, "donor"), "step_00000003-a1"
    assert keep(storage, name, until=100.0, token="sweep-7")
    assert catalog.holds(storage, name, now=99.0) == {catalog.Hold.in_use}
    assert catalog.holds(storage, name, now=101.0) == set()
    catalog.remove(storage, name)
    assert not keep(storage, name, until=100.0, token="sweep-7")
    assert not (directory / "donor" / "checkpoints" / name).exists()


def test_a_save_at_the_step_of_the_clone_takes_another_name(donor: tuple[Path, nn.Linear]) -> None:
    directory, _ = donor
    cloned(directory, 1)
    member, _ = run_at(directory, "member", 1)
    model = nn.Linear(3, 2)
    info = member.save(member.state(model=model, optimizer=SGD(model.parameters(), lr=0.1)))
    assert info.id == "member/step_00000003-a1.2"


def test_what_an_attempt_left_that_died_while_cloning_is_no_obstacle(donor: tuple[Path, nn.Linear]) -> None:
    directory, _ = donor
    half = directory / "member" / "checkpoints" / "step_00000003-a2" / "model"
    half.mkdir(parents=True)
    (half / "left-behind").write_bytes(b"x")
    manifest = cloned(directory, 2)
    assert verify(checkpoints(directory, "member").join(manifest.name), manifest) == []
    assert not (half / "left-behind").exists()


def test_another_or_a_damaged_checkpoint_is_refused(donor: tuple[Path, nn.Linear]) -> None:
    directory, _ = donor
    with pytest.raises(CheckpointCorrupt, match=r"MANIFEST\.json"):
        cloned(directory, 2, sha256="0" * 64)
    (directory / "donor" / "checkpoints" / "step_00000003-a1" / "state.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"state\.json"):
        cloned(directory, 2)
    shutil.rmtree(directory / "donor" / "checkpoints" / "step_00000003-a1")
    with pytest.raises(FileNotFoundError):
        cloned(directory, 2)
    assert catalog.scan(checkpoints(directory, "member")).committed == ()


@pytest.mark.parametrize("is_one_store", [True, False])
def test_where_files_cannot_have_two_names_they_are_copied(
    donor: tuple[Path, nn.Linear], is_one_store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = donor

    def at(name: str) -> Storage:
        found = Storage(str(directory / name / "checkpoints"))
        found._files = storages._RemoteFiles(arrow_fs.LocalFileSystem())  # an object store's way of doing things
        return found

    if not is_one_store:
        monkeypatch.setattr(storages._RemoteFiles, "copy", lambda *_: False)
    manifest = clone(at("donor"), "step_00000003-a1", at("member"), run="member", attempt=1, now=0.0)
    assert verify(checkpoints(directory, "member").join(manifest.name), manifest) == []


def test_the_judge_of_a_clone_counts_on_and_forgets_the_donors_scores(tmp_path: Path) -> None:
    spec = {"objectives": [["val/loss", "min"]], "unit": "report"}
    run, _ = run_at(tmp_path, "donor", 1, judge=judge(spec))
    trained(run, 3)
    cloned(tmp_path, 1)
    member, _ = run_at(tmp_path, "member", 1, judge=judge(spec))
    trained(member, 4)
    tally = member.tally()
    assert (tally["resource"], len(tally["reports"]), tally["n_reports"]) == (4.0, 1, 4)


# -- settings ----------------------------------------------------------------------------------------------


def sgd(model: nn.Module, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr=lr, momentum=0.8 + lr, weight_decay=lr / 10)


def adamw(model: nn.Module, lr: float) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, betas=(0.7 + lr, 0.99), weight_decay=lr / 10)


SCHEDULES: dict[str, Callable[[Optimizer, float], Any]] = {
    "none": lambda optimizer, lr: None,
    "step": lambda optimizer, lr: StepLR(optimizer, 3, 0.5),
    "cosine": lambda optimizer, lr: CosineAnnealingLR(optimizer, 20, eta_min=0.001),
    "cosine of another length": lambda optimizer, lr: CosineAnnealingLR(optimizer, 20 if lr < 0.1 else 30),
    "exponential": lambda optimizer, lr: ExponentialLR(optimizer, 0.9 if lr < 0.1 else 0.8),
    "lambda": lambda optimizer, lr: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "one cycle": lambda optimizer, lr: OneCycleLR(optimizer, max_lr=lr * 10, total_steps=20),
    "sequence": lambda optimizer, lr: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, 1.0, 3), StepLR(optimizer, 2, 0.5)], [3]
    ),
}


def made(make: Callable[[nn.Module, float], Optimizer], schedule: str, lr: float) -> tuple[Any, Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model, lr)
    return model, optimizer, SCHEDULES[schedule](optimizer, lr)


def stepped(model: nn.Module, optimizer: Optimizer, schedule: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def taken_over(mine: tuple[Any, Optimizer, Any], theirs: tuple[Any, Optimizer, Any], *, keeps: bool = True) -> None:
    def state(of: tuple[Any, Optimizer, Any]) -> TrainState:
        return TrainState(model=of[0], optimizer=of[1], scheduler=of[2])

    state(mine).apply(state(theirs).capture(), keeps_settings=keeps)


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [sgd, adamw])
def test_settings_of_ones_own_reach_the_optimizer_where_the_schedule_stands(
    make: Callable[[nn.Module, float], Optimizer], schedule: str
) -> None:
    """As if the member had come here with them: the same learning rates from here on."""
    theirs, mine, alone = (made(make, schedule, lr) for lr in (0.05, 0.2, 0.2))
    stepped(*theirs, 5)
    rates = stepped(*alone, 12)
    fresh = settings(mine[1])
    taken_over(mine, theirs)
    assert torch.equal(mine[0].weight, theirs[0].weight)
    moments = [optimizer.state_dict()["state"][0] for optimizer in (mine[1], theirs[1])]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    if schedule != "one cycle":  # which moves the momentum, too
        assert settings(mine[1]) == fresh
    assert float(mine[1].param_groups[0]["lr"]) == pytest.approx(rates[4], rel=1e-6)
    assert stepped(*mine, 7) == pytest.approx(rates[5:], rel=1e-6)
    if schedule == "one cycle":
        assert settings(mine[1]) == settings(alone[1])


@pytest.mark.parametrize("schedule", ["none", "one cycle"])
def test_with_the_same_settings_nothing_differs_from_a_plain_load(schedule: str) -> None:
    theirs, kept, plain = (made(adamw, schedule, 0.05) for _ in range(3))
    stepped(*theirs, 5)
    theirs[1].param_groups[0]["lr"] *= 0.7  # by hand: it is how far the donor has come
    taken_over(kept, theirs)
    taken_over(plain, theirs, keeps=False)
    rate = kept[1].param_groups[0]["lr"]
    assert rate == (plain[1].param_groups[0]["lr"] if schedule == "one cycle" else 0.05)
    assert settings(kept[1]) == settings(plain[1])


def test_a_plateau_keeps_its_patience_and_takes_what_it_has_seen() -> None:
    def of(lr: float, patience: int) -> tuple[Any, Optimizer, Any]:
        torch.manual_seed(0)
        optimizer = sgd(model := nn.Linear(3, 2), lr)
        return model, optimizer, ReduceLROnPlateau(optimizer, factor=0.1, patience=patience)

    theirs, mine = of(0.05, 2), of(0.2, 9)
    for loss in (1.0, 2.0, 2.0):
        theirs[2].step(loss)
    taken_over(mine, theirs)
    assert (mine[2].patience, mine[2].best, mine[2].num_bad_epochs) == (9, 1.0, 2)
    assert mine[1].param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_learning_rate_that_is_a_tensor_stays_one() -> None:
    def of(lr: float) -> tuple[Any, Optimizer, Any]:
        torch.manual_seed(0)
        optimizer = AdamW((model := nn.Linear(3, 2)).parameters(), lr=torch.tensor(lr), foreach=False)
        return model, optimizer, ExponentialLR(optimizer, 0.5)

    theirs, mine = of(0.05), of(0.2)
    stepped(*theirs, 2)
    taken_over(mine, theirs)
    rate = mine[1].param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert rate.item() == pytest.approx(0.05)


def test_optimizers_anywhere_in_the_state_keep_their_settings() -> None:
    def of(lr: float) -> tuple[TrainState, Optimizer, Optimizer]:
        torch.manual_seed(0)
        models = {name: nn.Linear(2, 2) for name in ("g", "d")}
        one, two = sgd(models["g"], lr), sgd(models["d"], lr * 2)
        return TrainState(model=models, optimizer={"g": one}, extra={"d": two}), one, two

    theirs, (mine, one, two) = of(0.05)[0], of(0.2)
    mine.apply(theirs.capture(), keeps_settings=True)
    assert (one.param_groups[0]["lr"], two.param_groups[0]["lr"]) == (0.2, 0.4)


def test_an_ordinary_checkpoint_brings_its_own_settings_back(tmp_path: Path) -> None:
    run, _ = run_at(tmp_path, "donor", 1)
    trained(run, 2, lr=0.1)
    for name, attempt, expected in (("donor", 2, 0.1), ("member", 1, 0.5)):
        if name == "member":
            manifest = clone(
                checkpoints(tmp_path, "donor"), "step_00000002-a1", checkpoints(tmp_path, name), run=name, attempt=1,
                now=0.0,
            )  # fmt: skip
            assert is_clone(manifest)
        again, _ = run_at(tmp_path, name, attempt)
        model = nn.Linear(3, 2)
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
        again.state(model=model, optimizer=optimizer)
        assert optimizer.param_groups[0]["lr"] == expected
