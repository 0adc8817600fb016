"""When a checkpoint is saved, which is newest, which are deleted: pure rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoints.catalog import Found, Hold, age_key, newest_valid
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.manifest import FileEntry, Manifest, directory_name
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction
from orchestrator.checkpoints.retention import doomed, kept, over_quota
from orchestrator.checkpoints.triggers import Moment, reasons_to_save

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
        ({"full_every_epochs": 2}, Moment(epochs_done=4), Moment(epochs_done=3), ("full_every_epochs",)),
        ({"full_every_epochs": 2}, Moment(epochs_done=5), Moment(epochs_done=4), ()),
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


def checkpoint(
    step: int,
    *,
    attempt: int = 1,
    is_best: bool = False,
    created: float = 0.0,
    size_bytes: int = 0,
    resumable: bool = True,
    **metrics: float,
) -> Manifest:
    files = (FileEntry(path="state.json", size_bytes=size_bytes, head_bytes=size_bytes, head_xxh3=""),)
    return Manifest(
        run="r", name=directory_name(step, attempt), attempt=attempt, step=step, epoch=0, epoch_complete=True,
        world_size=1, seed=0, config_hash="", created=created, duration=0.0, files=files, metrics=metrics,
        is_best=is_best, resumable=resumable,
    )  # fmt: skip


def found(*checkpoints: Manifest, **holds: list[Hold]) -> list[Found]:
    """As a scan finds them, newest first; `holds` by step: s10=[Hold.pinned]."""
    by_age = sorted(checkpoints, key=lambda c: age_key(c.name), reverse=True)
    return [Found(manifest=each, holds=frozenset(holds.get(f"s{each.step}", []))) for each in by_age]


def steps_doomed(
    rules: KeepRules, checkpoints: list[Found], *, now: float = 0.0, attempt: int = 99, newest: str = ""
) -> list[int]:
    newest = newest or checkpoints[0].manifest.name
    return [each.step for each in doomed(checkpoints, rules, now=now, attempt=attempt, newest=newest)]


def test_the_last_ones_are_kept() -> None:
    assert steps_doomed(KeepRules(last=2), found(*map(checkpoint, range(5)))) == [0, 1, 2]


def test_zero_keeps_all() -> None:
    assert steps_doomed(KeepRules(last=0), found(*map(checkpoint, range(5)))) == []


def test_the_best_are_kept_besides_by_each_metric() -> None:
    values = [0.1, 0.9, 0.9, math.nan, 0.2, 0.3]
    saved = found(*(checkpoint(i, accuracy=value, loss=i % 3) for i, value in enumerate(values)), checkpoint(6))
    highest, lowest = BestRule(metric="accuracy"), BestRule(metric="accuracy", direction=Direction.min, count=2)
    assert steps_doomed(KeepRules(last=1, best=(highest,)), saved) == [0, 1, 3, 4, 5]
    assert steps_doomed(KeepRules(last=1, best=(lowest,)), saved) == [1, 2, 3, 5]
    both = KeepRules(last=1, best=(highest, BestRule(metric="loss", direction=Direction.min)))
    assert steps_doomed(both, saved) == [0, 1, 4, 5]
    assert steps_doomed(KeepRules(last=1, best=(BestRule(metric="accuracy", count=0),)), saved) == [0, 1, 2, 3, 4, 5]


def test_those_called_best_by_the_user_are_kept() -> None:
    saved = found(checkpoint(0, is_best=True), checkpoint(1, is_best=True), checkpoint(2), checkpoint(3))
    assert steps_doomed(KeepRules(last=1, best=(BestRule(),)), saved) == [0, 2]


def test_one_at_every_so_many_steps_is_kept_even_if_no_save_falls_on_them() -> None:
    saved = found(*map(checkpoint, (30, 90, 130, 170, 200, 260, 410)))
    assert steps_doomed(KeepRules(last=1, every_steps=100), saved) == [30, 90, 170, 260]


def test_young_ones_are_kept() -> None:
    saved = found(*(checkpoint(i, created=i * 3600.0) for i in range(6)))
    assert steps_doomed(KeepRules(last=1, for_seconds=2 * 3600), saved, now=5 * 3600.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("hold", Hold)
def test_held_ones_are_kept_whatever_the_rules_say(hold: Hold) -> None:
    saved = found(*(checkpoint(i, size_bytes=10) for i in range(4)), s1=[hold])
    assert steps_doomed(KeepRules(last=1), saved) == [0, 2]
    assert steps_doomed(KeepRules(last=0, quota_bytes=1), saved) == [0, 2]


def test_each_one_that_stays_has_its_reasons() -> None:
    saved = found(
        checkpoint(10, loss=0.1, is_best=True), checkpoint(20, loss=0.5), checkpoint(30, loss=0.3), checkpoint(40),
        s10=[Hold.pinned], s40=[Hold.in_use],
    )  # fmt: skip
    rules = KeepRules(
        last=1, best=(BestRule(), BestRule(metric="loss", direction=Direction.min)), every_steps=30, for_seconds=1800
    )
    assert kept(saved, rules, now=10_000.0) == {
        "step_00000010-a1": ("best", "best loss", "pinned"),
        "step_00000030-a1": ("every 30 steps",),
        "step_00000040-a1": ("last", "in use"),
    }
    assert set(kept(saved, KeepRules(last=0), now=0.0).values()) == {
        ("all are kept",), ("all are kept", "pinned"), ("all are kept", "in use"),
    }  # fmt: skip
    assert kept(saved, KeepRules(for_seconds=5400), now=10.0)["step_00000020-a1"] == ("last", "younger than 1.5 h")


def test_weights_alone_do_not_push_out_what_training_can_continue_from() -> None:
    saved = found(checkpoint(1), checkpoint(2), checkpoint(3, resumable=False), checkpoint(4, resumable=False))
    assert steps_doomed(KeepRules(last=1), saved) == [1, 3]


def test_the_one_just_committed_and_those_of_later_attempts_are_never_deleted() -> None:
    saved = found(checkpoint(10), checkpoint(20), checkpoint(5, attempt=2), checkpoint(6, attempt=2))
    late = directory_name(10, 1)  # a writer of attempt 1 finishes while attempt 2 runs
    assert steps_doomed(KeepRules(last=1), saved, attempt=1, newest=late) == [20]
    assert steps_doomed(KeepRules(last=1), saved, attempt=2) == [10, 20, 5]


def test_a_quota_takes_the_oldest_and_the_best_last() -> None:
    saved = found(*(checkpoint(i, size_bytes=10, loss=i) for i in range(5)))
    rules = KeepRules(last=0, best=(BestRule(metric="loss", direction=Direction.min),), quota_bytes=25)
    assert steps_doomed(rules, saved) == [1, 2, 3]
    assert steps_doomed(replace(rules, quota_bytes=50), saved) == []
    assert steps_doomed(replace(rules, quota_bytes=1), saved) == [0, 1, 2, 3], "the newest stays, whatever it weighs"


def test_a_quota_of_several_runs_takes_the_oldest_of_any_and_leaves_each_its_newest() -> None:
    runs = {
        "a": found(*(checkpoint(i, size_bytes=10, created=i * 2.0) for i in range(3))),
        "b": found(*(checkpoint(i, size_bytes=10, created=i * 2.0 + 1) for i in range(3)), s0=[Hold.pinned]),
        "c": found(checkpoint(0, size_bytes=10), checkpoint(1, size_bytes=10, resumable=False)),
    }
    gone = [(run, manifest.step) for run, manifest in over_quota(runs, 60)]
    assert gone == [("a", 0), ("a", 1)]
    assert [(run, manifest.step) for run, manifest in over_quota(runs, 1)] == [("a", 0), ("a", 1), ("b", 1)]
    assert over_quota(runs, 80) == []
    assert over_quota(runs, 0) == [], "no quota"


CHECKPOINTS = st.lists(
    st.builds(
        lambda step, attempt, **rest: checkpoint(step, attempt=attempt, **rest),
        step=st.integers(0, 60), attempt=st.integers(1, 3), is_best=st.booleans(), created=st.floats(0, 100),
        size_bytes=st.integers(0, 20), resumable=st.booleans(), loss=st.sampled_from([0.1, 0.2, math.nan, math.inf]),
    ),
    min_size=1, max_size=12, unique_by=lambda each: each.name,
)  # fmt: skip
RULES = st.builds(
    KeepRules, last=st.integers(0, 3), every_steps=st.sampled_from([0, 7, 20]),
    for_seconds=st.sampled_from([0.0, 50.0]),
    best=st.sampled_from([(), (BestRule(metric="loss", count=2),), (BestRule(), BestRule(metric="loss"))]),
    quota_bytes=st.sampled_from([0, 30]),
)  # fmt: skip


@given(CHECKPOINTS, RULES)
@settings(max_examples=150, deadline=None)
def test_deleting_is_final_and_leaves_something_to_continue_from(checkpoints: list[Manifest], rules: KeepRules) -> None:
    saved = found(*checkpoints)
    newest = saved[0].manifest.name
    gone = {each.name for each in doomed(saved, rules, now=100.0, attempt=99, newest=newest)}
    stay = [each for each in saved if each.manifest.name not in gone]
    assert newest not in gone
    assert doomed(stay, rules, now=100.0, attempt=99, newest=newest) == []
    if not rules.quota_bytes:
        assert {each.manifest.name for each in stay} == set(kept(saved, rules, now=100.0)) | {newest}
    if any(each.manifest.resumable for each in saved):
        assert any(each.manifest.resumable for each in stay)


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
