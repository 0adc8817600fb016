"""Copying until the next step: what is saved is what was there at the return, or nothing is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, slab_stager
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.manifest import CheckpointInfo
from orchestrator.checkpoints.policy import CheckpointPolicy, Mode
from orchestrator.checkpoints.slab import Owner
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import SystemClock
from orchestrator.training.group import Group
from tests.plugins.slab_saves import job
from tests.plugins.thread_writer import ThreadWriter, slab_root
from tests.unit.test_slab_stager import planned

torch.set_num_threads(1)


class Diary:
    def checkpoint(self, info: CheckpointInfo) -> None:
        return

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        return


class Gate:
    """Late copies do not begin before somebody waits for them, or it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_open = threading.Event()
        self.held = 0
        real = slab_stager._copy

        def copy(places: Any, tensors: Any, **how: Any) -> None:
            if threading.current_thread().name == "staging copy":
                self.held += 1
                assert self._is_open.wait(20)
            real(places, tensors, **how)

        def join(thread: threading.Thread, timeout: float | None = None) -> None:
            if thread.name == "staging copy":
                self.open()
            real_join(thread, timeout)

        real_join = threading.Thread.join
        monkeypatch.setattr(threading.Thread, "join", join)
        monkeypatch.setattr(slab_stager, "_copy", copy)

    def open(self) -> None:
        self._is_open.set()

    def is_open(self) -> bool:
        return self._is_open.is_set()


class Saving:
    """An engine over a slab in this process."""

    def __init__(self, storage: Path, writer: ThreadWriter, *, attempt: int = 1) -> None:
        self.storage, self.said = Storage(str(storage)), list[tuple[str, str]]()
        self.stager = SlabStager(
            writer,  # type: ignore[arg-type]
            owner=Owner(run="r1", attempt=attempt, rank=0, pid=0), fallback=DirectStager(self.storage),
            tell=lambda event, why: self.said.append((event, why)), mode=Mode.overlap,
        )  # fmt: skip
        self.engine = engine(self.storage, self.stager, attempt)

    def save(self, state: TrainState, step: int) -> None:
        info = self.engine.save(
            state, step=step, epoch=0, epoch_complete=False, metrics={}, is_best=False, reasons=("now",), progress={},
            rank_state={}, data={}, must=True, waits=False,
        )  # fmt: skip
        assert info is not None

    def ended(self) -> list[str]:
        assert self.engine.drain(20)
        return [each.why for each in self.engine.poll()]


def engine(storage: Storage, stager: SlabStager | None, attempt: int = 1) -> CheckpointEngine:
    return CheckpointEngine(
        storage, run="r1", attempt=attempt, group=Group(), policy=CheckpointPolicy(keep_last=0), clock=SystemClock(),
        diary=Diary(), stager=stager,
    )  # fmt: skip


@pytest.fixture(scope="module")
def writer() -> Iterator[ThreadWriter]:
    with slab_root() as root:
        writer = ThreadWriter(root)
        writer.start()
        yield writer
        writer.close()


@pytest.fixture
def saving(tmp_path: Path, writer: ThreadWriter) -> Iterator[Saving]:
    saving = Saving(tmp_path, writer)
    yield saving
    saving.engine.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif hasattr(value, "state_dict"):
        yield from tensors_of(value.state_dict())


def everything(state: TrainState) -> list[torch.Tensor]:
    return [*tensors_of(dict(state.parts)), *tensors_of(state.extra)]


def bits(state: TrainState) -> list[bytes]:
    return [each.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for each in everything(state)]


@torch.no_grad()
def spoil(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.add_(1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_changes_after_the_return_and_in_the_step_is_not_saved(
    kind: str, saving: Saving, gate: Gate, tmp_path: Path
) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    ema = torch.optim.swa_utils.AveragedModel(model)
    state = TrainState(model=model, optimizer=optimizer, ema=ema, seen=torch.zeros(7))
    learn(model, optimizer)
    ema.update_parameters(model)
    begun: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: begun.append(gate.is_open()))  # before the fence
    saving.save(state, 1)
    before = bits(state)

    late = {id(parameter) for parameter in model.parameters()}
    late |= {id(each) for held in optimizer.state.values() for each in held.values() if each.dim()}
    spoil(everything(TrainState(extra=state.extra)))
    spoil(list(model.buffers()))
    spoil([each for held in optimizer.state.values() for each in tensors_of(held) if id(each) not in late])
    learn(model, optimizer)  # forward and backward while the copy waits, and a step that waits for it
    ema.update_parameters(model)

    assert begun == [False], "the copy had not begun when the step did"
    assert gate.is_open()
    assert saving.ended() == [""]
    assert saving.said == []
    assert saving.engine.stalled() > 0
    assert saving.engine.stalled() == 0
    after = bits(state)
    assert engine(Storage(str(tmp_path)), None, 2).restore(state) is not None
    assert bits(state) == before
    assert all(now != was for now, was in zip(after, before, strict=True)), "every one was changed"


def weight_norm(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index]


def old_weight_norm(model: nn.Module) -> None:
    torch.nn.utils.weight_norm(model[0])  # type: ignore[index]


def spectral_norm(model: nn.Module) -> None:
    torch.nn.utils.spectral_norm(model[0])  # type: ignore[index]


def step_in_backward(model: nn.Module) -> None:
    next(model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)


def nothing(model: nn.Module) -> None:
    return


class Wrapped:
    """An optimizer of another library."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("why", "change", "optimizer", "extra"),
    [
        ("no optimizer", nothing, None, None),
        ("LBFGS", nothing, torch.optim.LBFGS, None),
        ("Wrapped", nothing, Wrapped, None),
        ("computed", weight_norm, torch.optim.AdamW, None),
        ("computed", old_weight_norm, torch.optim.AdamW, None),
        ("computed", spectral_norm, torch.optim.AdamW, None),
        ("backward", step_in_backward, torch.optim.AdamW, None),
        ("shares memory", nothing, torch.optim.AdamW, lambda model: model[0].weight.detach()[1:]),
        ("shares memory", nothing, torch.optim.AdamW, lambda model: model[0].weight),
    ],
)
def test_what_cannot_wait_is_copied_at_once(
    why: str,
    change: Callable[[nn.Module], None],
    optimizer: Any,
    extra: Any,
    saving: Saving,
    gate: Gate,
    tmp_path: Path,
) -> None:
    model = network()
    change(model)
    made = optimizer and optimizer(model.parameters())
    state = TrainState(model=model, optimizer=made, extra={"more": extra(model) if extra else 1})
    for step in (1, 2):
        saving.save(state, step)
        before = bits(state)
        spoil(list({id(each): each for each in everything(state)}.values()))
    assert gate.held == 0
    assert [event for event, _ in saving.said] == ["overlap-refused"]
    assert why in saving.said[0][1]
    assert saving.ended() == ["", ""]
    assert engine(Storage(str(tmp_path)), None, 2).restore(state) is not None
    assert bits(state) == before


def test_another_model_over_the_same_memory_is_refused(saving: Saving) -> None:
    model, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.weight = nn.Parameter(model.weight.detach().view(3, 3)[1:])
    state = TrainState(model={"one": model, "two": twin}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    saving.save(state, 1)
    assert [event for event, _ in saving.said] == ["overlap-refused"]


def test_parameters_without_an_optimizer_are_copied_at_once(saving: Saving, gate: Gate, tmp_path: Path) -> None:
    """A teacher that follows the student, say: nobody knows when it changes."""
    student, teacher = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    state = TrainState(model={"student": student, "teacher": teacher}, optimizer=optimizer)
    saving.save(state, 1)
    before = bits(state)
    spoil(list(teacher.parameters()))
    assert saving.ended() == [""]
    assert gate.held == 1
    spoil(list(student.parameters()))
    assert engine(Storage(str(tmp_path)), None, 2).restore(state) is not None
    assert bits(state) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: spoil([model[2].bias]),
        lambda model: model.load_state_dict(network().state_dict()),
        lambda model: nn.init.zeros_(model[0].weight),
        lambda model: model[0].weight.detach()[0, 0].fill_(3),
    ],
)
def test_a_change_before_the_step_spoils_that_save_alone(
    change: Callable[[Any], object], saving: Saving, gate: Gate, tmp_path: Path
) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    learn(model, optimizer)
    saving.save(state, 1)
    change(model)
    [why] = saving.ended()
    assert "changed while they were copied" in why
    assert [event for event, _ in saving.said] == ["checkpoint-torn"]
    assert catalog.scan(Storage(str(tmp_path))).committed == ()
    saving.save(state, 2)
    before = bits(state)
    spoil(everything(state))
    assert saving.ended() == [""]
    assert gate.held == 1, "from then on all is copied at once"
    assert engine(Storage(str(tmp_path)), None, 2).restore(state) is not None
    assert bits(state) == before


def test_a_rank_whose_save_was_spoiled_tells_whoever_commits(writer: ThreadWriter, gate: Gate, tmp_path: Path) -> None:
    saving = Saving(tmp_path, writer)
    parameter = nn.Parameter(torch.ones(10))
    saving.stager.attach(TrainState(optimizer=torch.optim.SGD([parameter], lr=0.1)))
    layout, heads, tensors = planned([parameter])
    reservation = saving.stager.reserve(layout, heads, patience=10)
    assert reservation is not None
    reservation.fill(tensors, late=[True])
    reservation.seal(job(tmp_path, 1, rank=1, world_size=2))
    spoil([parameter])
    assert "changed" in saving.stager.wait(f"{1:032x}", 10).why
    told = json.loads((tmp_path / "step_00000001-a1/rank-0001.failed.json").read_text())
    assert "changed" in told["why"]
    saving.stager.close()


@pytest.mark.parametrize("what", ["save", "drain", "restore", "close", "another state"])
def test_what_comes_before_a_step_waits_for_the_copy(what: str, saving: Saving, gate: Gate, tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model=model, optimizer=optimizer)
    saving.save(state, 1)
    before = bits(state)
    match what:
        case "save":
            saving.save(state, 2)
        case "drain":
            assert saving.engine.drain(20)
        case "restore":
            saving.engine.restore(state)
        case "another state":
            other = nn.Linear(2, 2)
            saving.engine.expect(TrainState(model=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1)))
        case "close":
            saving.engine.close()
            deadline = time.monotonic() + 20
            while not catalog.scan(Storage(str(tmp_path))).committed:
                assert time.monotonic() < deadline
                time.sleep(0.005)
    assert gate.is_open()
    if what != "save":
        spoil(everything(state))
    if what != "close":
        assert set(saving.ended()) == {""}
    if what != "save":
        assert engine(Storage(str(tmp_path)), None, 2).restore(state) is not None
        assert bits(state) == before
    assert saving.said == []


def test_without_overlap_no_step_is_held_up(tmp_path: Path, writer: ThreadWriter) -> None:
    saving = Saving(tmp_path, writer)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saving.stager.attach(TrainState(model=model, optimizer=optimizer))
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    saving.stager.close()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["eager", "overlap"])
def test_from_a_gpu_the_bits_are_those_of_before(mode: str, tmp_path: Path, writer: ThreadWriter) -> None:
    saving = Saving(tmp_path, writer)
    if mode == "eager":
        saving.stager._overlap = None
    model = nn.Sequential(nn.Linear(8, 2048), nn.BatchNorm1d(2048), nn.Linear(2048, 2)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    for step in range(1, 4):
        model(torch.randn(4, 8, device="cuda")).square().mean().backward()
        optimizer.step()
        saving.save(state, step)
        before = [tensor.cpu() for tensor in everything(state)]
    optimizer.step()
    spoil(everything(state))
    assert saving.ended() == ["", "", ""]
    assert engine(Storage(str(tmp_path)), None, 2).restore(state) is not None
    assert all(torch.equal(one.cpu(), other) for one, other in zip(everything(state), before, strict=True))
    saving.stager.close()
