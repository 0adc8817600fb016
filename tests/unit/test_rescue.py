"""What becomes of a training's state when its function raises, or somebody says that it goes wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.engine import Closed
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training import seeds
from orchestrator.training.run import Run
from tests.plugins.delayed_stager import DelayedStager

torch.set_num_threads(1)


class Recorder:
    def __init__(self) -> None:
        self.points: list[tuple[int | None, dict[str, float]]] = []
        self.events: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.points.append((step, {key: float(value) for key, value in metrics.items()}))

    def fact(self, fact: Fact) -> None:
        if fact.kind is FactKind.event:
            self.events.append(fact.data)

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


class Broken(Exception):
    pass


Fault = Callable[[str, int, nn.Module], None]
"""Called at each place of each step; may raise."""


def at(place: str, step: int) -> Fault:
    def fault(here: str, now: int, model: nn.Module) -> None:
        if (here, now) == (place, step):
            raise Broken(place)

    return fault


def no_fault(place: str, step: int, model: nn.Module) -> None:
    return


class Training:
    """Three epochs of four steps, reported at each, with all that makes a resume differ when it is forgotten."""

    def __init__(self, directory: Path, attempt: int = 1, *, stager: Any = None, **policy: Any) -> None:
        self.recorder = Recorder()
        ticket = RunTicket(run="r1", name="n", experiment="e", attempt=attempt, directory=str(directory))
        settings = CheckpointPolicy(**{"every_epochs": 0, "at_end": False, **policy})
        self.run = Run(ticket, self.recorder, seed=3, checkpoints=settings, stager=stager)
        self.model: nn.Module = nn.Identity()

    def train(self, fault: Fault = no_fault, wrapped: Callable[[Any], Any] = iter) -> Training:
        run = self.run
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
        model, loader = run.prepare(
            nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), DataLoader(data, 8, shuffle=True)
        )
        self.model = model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model[2].weight.register_hook(lambda grad: fault("backward", run.step + 1, model))
        optimizer.register_step_pre_hook(lambda *_: fault("optimizer", run.step + 1, model))
        state = run.state(model=model, optimizer=optimizer, loader=loader)
        # After ours: as if it were within the step.
        optimizer.register_step_pre_hook(lambda *_: fault("within", run.step + 1, model))
        for _ in run.epochs(3):
            for inputs, targets in wrapped(loader):
                loss = (model(inputs) - targets).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                fault("after", run.step + 1, model)
                run.log({"loss": loss.item()})
                run.report(state=state)
                fault("reported", run.step, model)
        run.finish()
        return self

    def broken(self, fault: Fault, wrapped: Callable[[Any], Any] = iter) -> Training:
        """As the launcher plays it."""
        with pytest.raises(Broken) as raised:
            self.train(fault, wrapped)
        self.run.rescue(raised.value)
        self.run.close()
        return self

    def weights(self) -> list[float]:
        return torch.cat([value.flatten() for value in self.model.state_dict().values()]).tolist()


def committed(directory: Path) -> list[Manifest]:
    return list(catalog.scan(Storage(str(directory)).join("checkpoints")).committed)


def around(loader: Any) -> Iterator[Any]:
    """As progress bars wrap a loader."""
    yield from loader


@pytest.mark.parametrize("wrapped", [iter, around, lambda loader: (item for item in around(loader))])
@pytest.mark.parametrize("step", [5, 8])
def test_one_that_breaks_between_two_steps_goes_on_bit_for_bit(
    tmp_path: Path, wrapped: Callable[[Any], Any], step: int
) -> None:
    whole = Training(tmp_path / "whole").train()
    first = Training(tmp_path / "parts").broken(at("reported", step), wrapped)
    (saved,) = committed(tmp_path / "parts")
    assert (saved.step, saved.reasons, saved.resumable) == (step, ("exception",), True)
    assert saved.epoch_complete is False, "its loop was still going on, though the last batch may have been given"
    assert first.recorder.kinds() == ["checkpoint-rescued"]
    again = Training(tmp_path / "parts", attempt=2).train()
    assert again.weights() == whole.weights()
    assert again.recorder.points == whole.recorder.points[step:]
    (resumed,) = again.recorder.events
    assert resumed["details"]["is_exact"]


@pytest.mark.parametrize("place", ["backward", "optimizer", "after"])
def test_one_that_breaks_in_a_step_goes_on_and_says_that_it_is_not_exact(tmp_path: Path, place: str) -> None:
    Training(tmp_path, every_steps=2).broken(at(place, 6))
    newest, before, _ = committed(tmp_path)
    assert (newest.step, newest.reasons) == (5, ("exception",))
    assert before.step == 4
    again = Training(tmp_path, attempt=2).train()
    (resumed,) = again.recorder.events
    assert resumed["details"]["why"] == ["it was saved when something went wrong, in the middle of a step"]
    assert len(again.recorder.points) == 6, "the batch that broke is not given again"


def test_what_is_half_new_is_not_saved(tmp_path: Path) -> None:
    training = Training(tmp_path, every_steps=2).broken(at("within", 6))
    assert [manifest.step for manifest in committed(tmp_path)] == [4, 2]
    (event,) = training.recorder.events
    assert event["kind"] == "checkpoint-not-rescued"
    assert "step was under way" in event["message"]


def test_what_is_not_a_number_is_not_saved(tmp_path: Path) -> None:
    def poison(place: str, step: int, model: nn.Module) -> None:
        if (place, step) == ("after", 6):
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("nan")
            raise Broken

    training = Training(tmp_path, every_steps=2).broken(poison)
    assert [manifest.step for manifest in committed(tmp_path)] == [4, 2]
    (event,) = training.recorder.events
    assert "0.weight holds nan or inf" in event["message"]


def test_where_nothing_changed_since_the_newest_one_nothing_is_saved(tmp_path: Path) -> None:
    training = Training(tmp_path, every_steps=2).broken(at("reported", 6))
    assert [manifest.step for manifest in committed(tmp_path)] == [6, 4, 2]
    assert training.recorder.events == []


def test_where_one_failed_the_state_is_saved_after_all(tmp_path: Path) -> None:
    class Failing(DelayedStager):
        def wait(self, save: str, timeout: float) -> Any:
            if self.sealed and len(self.sealed[0][1].name) == len("step_00000006-a1"):
                self.fail("the disk is on fire")
            return super().wait(save, timeout)

    stager = Failing(Storage(str(tmp_path)).join("checkpoints"))
    training = Training(tmp_path, stager=stager, every_steps=6).broken(at("reported", 6))
    assert [manifest.reasons for manifest in committed(tmp_path)] == [("exception",)]
    assert training.recorder.kinds() == ["checkpoint-failed", "degraded", "checkpoint-rescued"]


def test_all_room_being_taken_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.checkpoints.engine.RESCUE_ROOM", 0.0)
    stager = DelayedStager(Storage(str(tmp_path)).join("checkpoints"))
    stager.writes_while_waited_for = False
    Training(tmp_path, stager=stager, every_steps=2).broken(at("after", 5))
    assert [manifest.reasons for manifest in committed(tmp_path)] == [("exception",)]
    assert len(stager.sealed) == 2


def test_who_does_not_want_it_gets_none(tmp_path: Path) -> None:
    training = Training(tmp_path, on_exception=False).broken(at("after", 6))
    assert committed(tmp_path) == []
    assert training.recorder.events == []


def test_an_alarm_saves_and_training_may_go_on(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole").train()
    alarmed = Training(tmp_path / "alarmed")
    infos: list[Any] = []

    def alarm(place: str, step: int, model: nn.Module) -> None:
        if place == "reported" and step in (5, 6):
            infos.append(alarmed.run.rescue("loss is strange"))
            infos.append(alarmed.run.rescue("loss is strange"))

    alarmed.train(alarm)
    assert [info and info.step for info in infos] == [5, None, 6, None], "at the second call nothing had changed"
    assert alarmed.weights() == whole.weights()
    assert [(each.step, each.reasons) for each in committed(tmp_path / "alarmed")] == [(6, ("alarm",)), (5, ("alarm",))]
    assert "after loss is strange" in alarmed.recorder.events[0]["message"]


def test_it_never_takes_the_place_of_another_save(tmp_path: Path) -> None:
    training = Training(tmp_path)
    names: list[str] = []

    def fault(place: str, step: int, model: nn.Module) -> None:
        if place == "after" and step == 3:
            info = training.run.rescue("strange")
            assert info is not None
            names.append(info.uri)
        if place == "reported" and step == 2:
            info = training.run.save(training.run._state)  # type: ignore[arg-type]
            names.append(info.uri)

    training.train(fault)
    assert len(set(names)) == 2
    assert [manifest.step for manifest in committed(tmp_path)] == [2, 2]
    assert committed(tmp_path)[0].reasons == ("alarm",), "it is the newer one of that step"


def test_what_goes_wrong_in_it_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    training = Training(tmp_path)
    monkeypatch.setattr("orchestrator.checkpoints.writer.write_job", no_space)
    training.broken(at("after", 6))
    (event,) = training.recorder.events
    assert event["kind"] == "checkpoint-not-rescued"
    assert "No space left" in event["message"]
    assert committed(tmp_path) == []


def test_a_loop_that_was_left_on_purpose_counts_as_over(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def train() -> None:
        run = training.run
        loader = run.prepare(DataLoader(TensorDataset(torch.arange(8.0)), 2, shuffle=True))
        state = run.state(model=nn.Linear(1, 1), loader=loader)
        for _ in run.epochs(2):
            for _ in itertools.islice(loader, 2):
                run.log({"loss": 1.0})
            for _ in loader:
                break
            run.report({"a": 1.0}, state=state)
            run.log({"b": 1.0})
            raise Broken

    with pytest.raises(Broken) as raised:
        train()
    training.run.rescue(raised.value)
    (saved,) = committed(tmp_path)
    assert saved.epoch_complete


def test_an_error_made_of_another_one_still_knows_where_it_was(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def train() -> None:
        try:
            training.train(at("reported", 6))
        except Broken as error:
            raise ValueError("told otherwise") from error

    with pytest.raises(ValueError, match="otherwise") as raised:
        train()
    training.run.rescue(raised.value)
    (saved,) = committed(tmp_path)
    assert saved.epoch_complete is False


def test_after_the_end_a_save_is_refused_in_words(tmp_path: Path) -> None:
    training = Training(tmp_path).train()
    training.run.close()
    with pytest.raises(Closed, match="the training has ended"):
        training.run.save(training.run._state)  # type: ignore[arg-type]
    assert training.run.rescue("late") is None
    assert committed(tmp_path) == []
    assert "the training has ended" in training.recorder.events[-1]["message"]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1), np.random.randn])
def test_every_number_that_is_drawn_is_noticed(draw: Callable[[], Any]) -> None:
    seeds.seed_everything(3, 0)
    before, states = seeds.drawn(), seeds.capture()
    assert seeds.drawn() == before
    draw()
    assert seeds.drawn() != before
    seeds.restore(states)
    assert seeds.drawn() == before
