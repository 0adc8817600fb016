"""Runs of an experiment share a quota: what goes after a commit, of which run, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, quota
from orchestrator.checkpoints.catalog import Hold
from orchestrator.checkpoints.job import BestRule, KeepRules, Outcome, SlotResult
from orchestrator.checkpoints.keeping import Keeping, Tidied
from orchestrator.checkpoints.manifest import MANIFEST, FileEntry, Manifest, directory_name
from orchestrator.checkpoints.policy import Direction

NOW = 1_000_000.0
LONG_AGO = NOW - 100_000.0
MINE, OTHER = "20260102-000000-aaaaaaaa", "20260101-000000-bbbbbbbb"
LOSS = (BestRule(metric="loss", direction=Direction.min),)


@pytest.fixture(params=["local", "object store"])
def experiment(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage("mock://runs/digits" if request.param == "object store" else str(tmp_path / "runs" / "digits"))


def root_of(experiment: Storage, run: str) -> Storage:
    return experiment.join(run, "checkpoints")


def saved(experiment: Storage, run: str, step: int, *, created: float = LONG_AGO, **changes: Any) -> Manifest:
    """A checkpoint of 10 bytes."""
    file = FileEntry(path="state.json", size_bytes=10, head_bytes=10, head_xxh3="")
    attempt = changes.pop("attempt", 1)
    made = Manifest(
        run=run, name=directory_name(step, attempt), attempt=attempt, step=step, epoch=0, epoch_complete=True,
        world_size=1, seed=0, config_hash="", created=created + step, duration=0.0, files=(file,), **changes,
    )  # fmt: skip
    inside = root_of(experiment, run).join(made.name)
    inside.write_bytes("state.json", b"0123456789")
    inside.write_bytes(MANIFEST, made.encode())
    return made


def steps(experiment: Storage, run: str) -> list[int]:
    return sorted(each.step for each in catalog.scan(root_of(experiment, run)).committed)


def keeping(experiment: Storage, quota_bytes: int, *, run: str = MINE, **rules: Any) -> Keeping:
    given = KeepRules(**{"last": 0, "quota_bytes": quota_bytes, **rules})
    return Keeping(root_of(experiment, run), given, attempt=1)


def test_the_oldest_of_any_run_goes_and_each_keeps_its_newest(experiment: Storage) -> None:
    for step in (1, 2, 3):
        saved(experiment, OTHER, step)
    for step in (10, 20):
        saved(experiment, MINE, step)
    newest = saved(experiment, MINE, 30)
    tidied = keeping(experiment, 40).after_commit(newest, now=NOW)
    assert (steps(experiment, OTHER), steps(experiment, MINE)) == ([3], [10, 20, 30])
    assert tidied.deleted == ()
    assert tidied.why == ""
    assert tidied.for_quota == (
        "2 checkpoints (2e-08 GB) deleted because experiment digits may have 4e-08 GB (checkpoints.quota_gb), oldest "
        f"first: {OTHER}/step_00000001-a1, {OTHER}/step_00000002-a1"
    )
    tidied = keeping(experiment, 1).after_commit(newest, now=NOW)
    assert (steps(experiment, OTHER), steps(experiment, MINE)) == ([3], [30])
    assert [each.step for each in tidied.deleted] == [10, 20]


def test_without_a_quota_nobody_looks_at_neighbours(experiment: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(experiment, OTHER, 1)
    monkeypatch.setattr(quota, "Quota", None)
    assert keeping(experiment, 0).after_commit(saved(experiment, MINE, 1), now=NOW) == Tidied()


def test_what_is_held_or_best_or_may_be_in_use_by_an_active_run_stays(experiment: Storage) -> None:
    for step in (1, 2, 3, 4):
        saved(experiment, OTHER, step, metrics={"loss": abs(step - 3.0)})
    catalog.hold(root_of(experiment, OTHER), directory_name(1, 1), Hold.pinned)
    active = "20260101-000000-cccccccc"
    for step in (1, 2):
        saved(experiment, active, step, created=NOW - 600)
    keeper = keeping(experiment, 60, best=LOSS)
    keeper.after_commit(saved(experiment, MINE, 5, created=NOW), now=NOW)
    assert steps(experiment, OTHER) == [1, 3, 4], "pinned, the best, the newest"
    assert steps(experiment, active) == [1, 2]
    keeping(experiment, 1, best=LOSS).after_commit(saved(experiment, MINE, 6, created=NOW), now=NOW)
    assert steps(experiment, OTHER) == [1, 4], "the best goes when nothing else can"
    assert steps(experiment, active) == [1, 2], "it saves, and keeps to the quota itself"
    assert steps(experiment, MINE) == [6]


def test_a_neighbour_notices_what_was_deleted_when_it_saves(experiment: Storage) -> None:
    gone = [saved(experiment, OTHER, step) for step in (1, 2)]
    theirs = keeping(experiment, 0, run=OTHER)
    assert theirs.after_commit(saved(experiment, OTHER, 3), now=NOW) == Tidied()
    keeping(experiment, 20).after_commit(saved(experiment, MINE, 1), now=NOW)
    assert steps(experiment, OTHER) == [3]
    assert theirs.after_commit(saved(experiment, OTHER, 4), now=NOW).deleted == tuple(gone)


def test_what_was_deleted_is_noted_where_it_lay(experiment: Storage) -> None:
    gone = saved(experiment, OTHER, 1, label="v0.1", metrics={"loss": float("nan")})
    saved(experiment, OTHER, 2)
    keeping(experiment, 20).after_commit(saved(experiment, MINE, 1), now=NOW)
    root = root_of(experiment, OTHER)
    assert catalog.deleted_names(root) == [gone.name]
    note = catalog.deletion(root, gone.name)
    assert note is not None
    assert note["why"] == f"the quota of experiment digits, when run {MINE} saved"
    assert (note["id"], note["state"], note["at"], note["size_bytes"]) == (gone.id, "deleted", NOW, 10)
    assert (note["label"], note["metrics"], note["manifest_sha256"]) == ("v0.1", {"loss": "nan"}, gone.digest)
    assert note["uri"] == root.uri(gone.name)


def test_a_neighbour_whose_newer_ones_were_deleted_meanwhile_keeps_what_is_left(
    experiment: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        saved(experiment, OTHER, step)
    real = quota.Quota.over

    def over(self: quota.Quota, *given: Any, **more: Any) -> Any:
        chosen = real(self, *given, **more)
        catalog.remove(root_of(experiment, OTHER), directory_name(2, 1))  # a person, right after the look
        return chosen

    monkeypatch.setattr(quota.Quota, "over", over)
    assert keeping(experiment, 20).after_commit(saved(experiment, MINE, 1), now=NOW).for_quota == ""
    assert steps(experiment, OTHER) == [1]


def test_neighbours_are_looked_at_seldom_while_there_is_room(
    experiment: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(experiment, OTHER, 1)
    looks = []
    real = quota.Quota._look
    monkeypatch.setattr(quota.Quota, "_look", lambda self: looks.append(1) or real(self))
    keeper = keeping(experiment, 10_000)
    for step in range(1, quota.LOOK_EVERY + 1):
        keeper.after_commit(saved(experiment, MINE, step), now=NOW)
    assert len(looks) == 1
    keeper.after_commit(saved(experiment, MINE, 100), now=NOW)
    assert len(looks) == 2


def test_a_look_that_takes_too_long_goes_on_with_the_next_commit(
    experiment: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"20260101-000000-0000000{number}" for number in range(3)]
    for name in names:
        for step in (1, 2):
            saved(experiment, name, step)
    real = quota.Quota._seen
    seen = []

    def one_at_a_time(self: quota.Quota, run: str, known: Any) -> Any:
        seen.append(run)
        return real(self, run, known)

    monkeypatch.setattr(quota.Quota, "_seen", one_at_a_time)
    now = [0.0]
    monkeypatch.setattr(quota.time, "monotonic", lambda: now.append(now[-1] + 1.0) or now[-1])
    monkeypatch.setattr(quota, "LOOK_SECONDS", 1.5)  # the clock goes on by a second each time somebody looks at it
    keeper = keeping(experiment, 30, last=1)
    for step in range(1, 4):
        keeper.after_commit(saved(experiment, MINE, step, created=NOW), now=NOW)
    assert seen[:3] == names
    assert [steps(experiment, name) for name in names] == [[2], [2], [2]]


def test_a_store_without_a_run_around_it_has_no_neighbours(tmp_path: Path) -> None:
    """`orchestrator.Checkpoints(url)`: its parent directory is nobody's experiment."""
    outside = Storage(str(tmp_path / "work"))
    saved(outside, "neighbour", 1)
    saved(outside, "neighbour", 2)
    root = Storage(str(tmp_path / "work" / "alone" / "model"))
    made = [saved(Storage(str(tmp_path / "elsewhere")), "alone", step) for step in (1, 2)]
    for each in made:
        root.write_bytes(f"{each.name}/{MANIFEST}", each.encode())
    tidied = Keeping(root, KeepRules(last=0, quota_bytes=10), attempt=1).after_commit(made[1], now=NOW)
    assert tidied.deleted == (made[0],)
    assert "because this run may have" in tidied.for_quota
    assert steps(outside, "neighbour") == [1, 2]


def test_of_a_later_attempt_nothing_goes_for_the_writer_of_an_earlier_one(experiment: Storage) -> None:
    saved(experiment, OTHER, 1)
    late = saved(experiment, MINE, 10)
    for step in (5, 6):
        saved(experiment, MINE, step, attempt=2)
    keeping(experiment, 10).after_commit(late, now=NOW)
    assert steps(experiment, MINE) == [5, 6, 10]


def test_a_storage_that_fails_halfway_tells_what_is_gone(experiment: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        saved(experiment, OTHER, step)
    real = catalog.remove

    def remove(storage: Storage, name: str, **more: Any) -> None:
        if name == directory_name(2, 1):
            raise OSError(5, "the disk is gone")
        real(storage, name, **more)

    monkeypatch.setattr(catalog, "remove", remove)
    tidied = keeping(experiment, 20).after_commit(saved(experiment, MINE, 1), now=NOW)
    assert "the disk is gone" in tidied.why
    assert tidied.for_quota.endswith(f"{OTHER}/{directory_name(1, 1)}")
    assert steps(experiment, OTHER) == [2, 3, 4]


def test_one_found_damaged_is_not_deleted_though_no_rule_keeps_it(experiment: Storage) -> None:
    keeper = keeping(experiment, 0, last=1)
    saved(experiment, MINE, 1)
    root = root_of(experiment, MINE)
    keeper._look(saved(experiment, MINE, 2))
    catalog.quarantine(root, directory_name(1, 1), "a bit", now=NOW)
    assert keeper.after_commit(saved(experiment, MINE, 3), now=NOW).deleted[0].step == 2
    assert root.exists(f"{directory_name(1, 1)}/{catalog.QUARANTINED}")


def test_an_outcome_says_what_went_for_the_quota_and_fits() -> None:
    outcome = Outcome(save="a" * 32, name="n", result=SlotResult.committed, for_quota="ü" * 3000, why="x" * 3000)
    assert len(outcome.encode()) <= 3072
    assert json.loads(outcome.encode())["for_quota"].startswith("ü")
    assert Outcome.decode(Outcome(save="", name="", result=SlotResult.failed, for_quota="f").encode()).for_quota == "f"


def test_nothing_is_deleted_by_what_was_seen_long_ago(experiment: Storage) -> None:
    """Somebody made room since the last look."""
    for step in (1, 2, 3, 4):
        saved(experiment, OTHER, step)
    keeper = keeping(experiment, 60)
    keeper.after_commit(saved(experiment, MINE, 1), now=NOW)
    for step in (1, 2, 3):
        catalog.remove(root_of(experiment, OTHER), directory_name(step, 1))
    for step in (2, 3, 4, 5):
        assert keeper.after_commit(saved(experiment, MINE, step), now=NOW) == Tidied()
    assert steps(experiment, MINE) == [1, 2, 3, 4, 5]
