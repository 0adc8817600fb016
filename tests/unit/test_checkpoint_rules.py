"""When a checkpoint is saved, which is newest, which are deleted: pure rules."""

from __future__ import annotations

import math

import pytest

from orchestrator.checkpoints.catalog import age_key, newest_valid
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction
from orchestrator.checkpoints.retention import to_delete
from orchestrator.checkpoints.triggers import Moment, reasons_to_save
from orchestrator.checkpoints.writer import directory_name

OFF = {"every_steps": 0, "every_epochs": 0, "every_minutes": 0}


@pytest.mark.parametrize(
    ("policy", "now", "last", "reasons"),
    [
        ({}, Moment(), Moment(), ()),
        ({"every_steps": 10}, Moment(step=9), Moment(), ()),
        ({"every_steps": 10}, Moment(step=10), Moment(step=9), ("every_steps",)),
        ({"every_steps": 10}, Moment(step=19), Moment(step=11), ()),
        ({"every_steps": 10}, Moment(step=25), Moment(step=9), ("every_steps",)),
        ({"every_epochs": 1}, Moment(epochs_done=1), Moment(), ("every_epochs",)),
        ({"every_epochs": 2}, Moment(epochs_done=1), Moment(), ()),
        ({"every_epochs": 1}, Moment(epochs_done=1), Moment(epochs_done=1), ()),
        ({"every_minutes": 1}, Moment(time=159), Moment(time=100), ()),
        ({"every_minutes": 1}, Moment(time=160), Moment(time=100), ("every_minutes",)),
        ({"best_metric": "a"}, Moment(metrics={"a": 0.5}), Moment(), ("improved",)),
        ({"best_metric": "a"}, Moment(metrics={"a": 0.5}, best=0.5), Moment(), ()),
        ({"best_metric": "a"}, Moment(metrics={"a": 0.6}, best=0.5), Moment(), ("improved",)),
        ({"best_metric": "a", "best_direction": Direction.min}, Moment(metrics={"a": 0.6}, best=0.5), Moment(), ()),
        ({"best_metric": "a"}, Moment(metrics={"a": math.nan}), Moment(), ()),
        ({"best_metric": "a"}, Moment(metrics={"b": 1.0}), Moment(), ()),
        (
            {"every_steps": 1, "every_epochs": 1},
            Moment(step=1, epochs_done=1),
            Moment(),
            ("every_steps", "every_epochs"),
        ),
    ],
)
def test_a_checkpoint_is_due(policy: dict, now: Moment, last: Moment, reasons: tuple[str, ...]) -> None:
    assert reasons_to_save(CheckpointPolicy(**{**OFF, **policy}), now, last) == reasons


def checkpoint(step: int, *, attempt: int = 1, is_best: bool = False, **metrics: float) -> Manifest:
    return Manifest(
        run="r", name=directory_name(step, attempt), attempt=attempt, step=step, epoch=0, epoch_complete=True,
        world_size=1, seed=0, config_hash="", created=0.0, duration=0.0, files=(), metrics=metrics, is_best=is_best,
    )  # fmt: skip


def steps_deleted(policy: CheckpointPolicy, *checkpoints: Manifest, pinned: tuple[str, ...] = ()) -> list[int]:
    newest_first = sorted(checkpoints, key=lambda c: age_key(c.name), reverse=True)
    return [each.step for each in to_delete(newest_first, policy, pinned)]


def test_the_last_ones_are_kept() -> None:
    assert steps_deleted(CheckpointPolicy(keep_last=2), *map(checkpoint, range(5))) == [0, 1, 2]


def test_the_best_are_kept_besides() -> None:
    saved = [checkpoint(i, accuracy=value) for i, value in enumerate([0.1, 0.9, 0.9, math.nan, 0.2, 0.3])]
    assert steps_deleted(CheckpointPolicy(keep_last=1, keep_best=1, best_metric="accuracy"), *saved) == [0, 1, 3, 4]
    lowest = CheckpointPolicy(keep_last=1, keep_best=2, best_metric="accuracy", best_direction=Direction.min)
    assert steps_deleted(lowest, *saved) == [1, 2, 3]


def test_those_called_best_by_the_user_are_kept() -> None:
    saved = [checkpoint(0, is_best=True), checkpoint(1, is_best=True), checkpoint(2), checkpoint(3)]
    assert steps_deleted(CheckpointPolicy(keep_last=1), *saved) == [0, 2]


def test_pinned_ones_are_kept() -> None:
    saved = list(map(checkpoint, range(3)))
    assert steps_deleted(CheckpointPolicy(keep_last=1), *saved, pinned=(saved[0].name,)) == [1]


def test_zero_keeps_all() -> None:
    assert steps_deleted(CheckpointPolicy(keep_last=0), *map(checkpoint, range(5))) == []


def test_newest_valid_is_the_newest_that_is_valid() -> None:
    saved = [checkpoint(10), checkpoint(30), checkpoint(20)]
    assert newest_valid(saved, lambda each: True).step == 30  # type: ignore[union-attr]
    assert newest_valid(saved, lambda each: each.step < 30).step == 20  # type: ignore[union-attr]
    assert newest_valid(saved, lambda each: False) is None


def test_a_later_attempt_is_newer_at_any_step() -> None:
    saved = [checkpoint(200, attempt=1), checkpoint(150, attempt=2), checkpoint(90, attempt=10)]
    assert newest_valid(saved, lambda each: True).attempt == 10  # type: ignore[union-attr]


def test_two_checkpoints_at_one_step_are_told_apart() -> None:
    names = [directory_name(5, 1), directory_name(5, 1, 2), directory_name(5, 1, 10), directory_name(6, 1)]
    assert names[:2] == ["step_00000005-a1", "step_00000005-a1.2"]
    assert sorted(names, key=age_key) == names
