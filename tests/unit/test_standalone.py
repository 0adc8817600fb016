"""`orchestrator.Checkpoints` in one process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import orchestrator
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.job import Layout
from orchestrator.checkpoints.staging import DirectStager
from orchestrator.clock import ManualClock
from orchestrator.errors import UserError

torch.set_num_threads(1)


class Training:
    """A model with momentum, trained on random numbers."""

    def __init__(self, url: Path, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.checkpoints = orchestrator.Checkpoints(str(url), **{"clock": ManualClock(), "mode": "direct", **settings})
        self.state = self.checkpoints.state(model=self.model, optimizer=self.optimizer, extra={"seen": 0})

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.model(torch.randn(8, 4)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.state.extra["seen"] += 8

    def weights(self) -> list[float]:
        return torch.cat([value.flatten() for value in self.model.state_dict().values()]).tolist()


def names(url: Path) -> list[str]:
    return sorted(path.name for path in url.glob("step_*"))


def test_a_training_goes_on_bit_for_bit_after_a_new_start(tmp_path: Path) -> None:
    first = Training(tmp_path)
    assert first.checkpoints.load_latest(first.state) is None
    first.train(3)
    first.checkpoints.save(first.state, step=3, epoch=1, metrics={"loss": 0.5})
    first.train(2)
    second = Training(tmp_path)
    found = second.checkpoints.load_latest(second.state)
    assert found is not None
    assert (found.step, found.epoch, found.metrics, found.is_exact, found.why) == (3, 1, {"loss": 0.5}, True, ())
    assert second.state.extra["seen"] == 24
    torch.randn(3)
    random.random()
    found.restore_generators()
    second.train(2)
    assert second.weights() == first.weights()


def test_each_start_is_an_attempt_and_the_newest_attempt_counts(tmp_path: Path) -> None:
    for step in (5, 3):
        training = Training(tmp_path)
        training.checkpoints.save(training.state, step=step)
    assert names(tmp_path) == ["step_00000003-a2", "step_00000005-a1"]
    last = Training(tmp_path)
    found = last.checkpoints.load_latest(last.state)
    assert found is not None
    assert found.name == "step_00000003-a2"


def test_the_last_and_the_best_are_kept_and_pointed_to(tmp_path: Path) -> None:
    training = Training(tmp_path, keep_last=1, save_best="val/loss:min")
    infos = [
        training.checkpoints.save(training.state, step=step, metrics={"val/loss": loss})
        for step, loss in enumerate([0.5, 0.2, 0.4, 0.3], start=1)
    ]
    assert [info.is_best for info in infos if info] == [True, True, False, False]
    assert names(tmp_path) == ["step_00000002-a1", "step_00000004-a1"]
    pointed = {name: json.loads((tmp_path / f"{name}.json").read_text())["name"] for name in ("latest", "best")}
    assert pointed == {"latest": "step_00000004-a1", "best": "step_00000002-a1"}
    best = training.checkpoints.load_latest(training.state, which="best")
    assert best is not None
    assert best.step == 2
    named = training.checkpoints.load_latest(training.state, which="step_00000004-a1")
    assert named is not None
    assert named.step == 4
    assert training.checkpoints.load_latest(training.state, which="step_00000009-a1") is None


def test_the_best_so_far_is_known_after_a_new_start(tmp_path: Path) -> None:
    first = Training(tmp_path, save_best="accuracy")
    first.checkpoints.save(first.state, step=1, metrics={"accuracy": 0.9})
    first.checkpoints.save(first.state, step=2, metrics={"accuracy": 0.8})
    second = Training(tmp_path, save_best="accuracy")
    second.checkpoints.load_latest(second.state)
    info = second.checkpoints.save(second.state, step=3, metrics={"accuracy": 0.85})
    assert info is not None
    assert not info.is_best


def test_what_is_due_is_said_by_steps_minutes_and_a_better_metric(tmp_path: Path) -> None:
    clock = ManualClock()
    training = Training(tmp_path, every_steps=10, every_minutes=1, save_best="accuracy", clock=clock)
    assert not training.checkpoints.due(step=9)
    assert training.checkpoints.due(step=10)
    training.checkpoints.save(training.state, step=10, metrics={"accuracy": 0.5})
    assert not training.checkpoints.due(step=19, metrics={"accuracy": 0.5})
    assert training.checkpoints.due(step=11, metrics={"accuracy": 0.6})
    clock.advance(60)
    assert training.checkpoints.due(step=11)


def test_weights_only_is_for_others_and_no_training_continues_from_it(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train(1)
    training.checkpoints.save(training.state, step=1)
    info = training.checkpoints.save(training.state, step=2, weights_only=True)
    assert info is not None
    assert (info.kind, info.resumable) == ("weights", False)
    assert not (Path(info.uri) / "optim").exists()
    found = training.checkpoints.load_latest(training.state)
    assert found is not None
    assert found.step == 1
    loaded = orchestrator.load_checkpoint(info.uri)
    assert torch.equal(loaded.model["0.weight"], training.model.state_dict()["0.weight"])


def test_side_files_come_back_as_bytes(tmp_path: Path) -> None:
    training = Training(tmp_path)
    state = training.checkpoints.state(model=training.model, files={"words.json": b'["a"]', "empty": b""})
    training.checkpoints.save(state, step=1)
    again = training.checkpoints.state(model=training.model)
    training.checkpoints.load_latest(again)
    assert again.files == {"words.json": b'["a"]', "empty": b""}


def test_the_end_of_the_block_waits_and_ends(tmp_path: Path) -> None:
    with Training(tmp_path).checkpoints as checkpoints:
        state = checkpoints.state(model=nn.Linear(1, 1))
        info = checkpoints.save(state, step=1)
    assert info is not None
    assert Path(info.uri, "MANIFEST.json").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"save_best": "loss:low"}, "loss:low"),
        ({"label": "{thing}"}, "thing"),
        ({"also_best": ["a:min:0"]}, "a:min:0"),
        ({"keep_lats": 1}, "keep_lats"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        orchestrator.Checkpoints(str(tmp_path), **settings)


def test_a_mistyped_setting_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no setting 'keep_lastt'. Did you mean 'keep_last'\?"):
        orchestrator.Checkpoints(str(tmp_path), keep_lastt=3)
    assert list(tmp_path.iterdir()) == []


class Asked(DirectStager):
    """Notes for how many bytes it was asked to have room."""

    def __init__(self, url: Path) -> None:
        super().__init__(Storage(str(url)))
        self.sizes: list[int] = []

    def expect(self, layout: Layout, heads: Any) -> None:
        self.sizes.append(layout.size_bytes)


def test_room_is_asked_for_once_before_the_first_save(tmp_path: Path) -> None:
    stager = Asked(tmp_path)
    training = Training(tmp_path, stager=stager, every_steps=2)
    assert training.checkpoints.load_latest(training.state) is None
    assert stager.sizes == []  # the optimizer has no state yet
    for step in range(1, 4):
        training.train(1)
        if training.checkpoints.due(step=step):
            training.checkpoints.save(training.state, step=step)
    assert len(stager.sizes) == 1
    again = Asked(tmp_path)
    restored = Training(tmp_path, stager=again, every_steps=2)
    assert restored.checkpoints.load_latest(restored.state) is not None
    restored.checkpoints.due(step=3)
    assert again.sizes == stager.sizes
