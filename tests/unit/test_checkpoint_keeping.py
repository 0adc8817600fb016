"""What the engine does about checkpoints that somebody else deletes, and what it tells of a quota."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, engine, load, reader
from orchestrator.checkpoints.catalog import Hold
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.load import DeletedMeanwhile, load_checkpoint
from orchestrator.checkpoints.manifest import CheckpointInfo, Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy, Mode
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import ManualClock
from orchestrator.training.group import Group

YOUNG, OLD = 1_000_000.0, 900_000.0


class Diary:
    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.events: dict[str, str] = {}

    def checkpoint(self, info: CheckpointInfo) -> None:
        self.states[info.id] = info.state.value

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self.events[kind] = message


class Saver:
    """A run of an experiment."""

    def __init__(self, experiment: Path, run: str, *, at: float = YOUNG, attempt: int = 1, **policy: Any) -> None:
        self.root = Storage(str(experiment / run / "checkpoints"))
        self.diary, self.state = Diary(), TrainState(model=torch.nn.Linear(4, 4))
        self.engine = CheckpointEngine(
            self.root, run=run, attempt=attempt, group=Group(), clock=ManualClock(at), diary=self.diary,
            policy=CheckpointPolicy(mode=Mode.direct, **{"keep_last": 0, **policy}),
        )  # fmt: skip

    def save(self, *steps: int) -> CheckpointInfo:
        for step in steps:
            info = self.engine.save(
                self.state, step=step, epoch=0, epoch_complete=True, metrics={}, is_best=False, reasons=("now",),
                progress={}, rank_state={}, data={},
            )  # fmt: skip
        assert info is not None
        return info

    def steps(self) -> list[int]:
        return sorted(each.step for each in catalog.scan(self.root).committed)


def test_a_save_keeps_the_experiment_within_its_quota_and_says_what_it_deleted(tmp_path: Path) -> None:
    old = Saver(tmp_path / "digits", "run-1", at=OLD)
    size = old.save(1, 2, 3).size_bytes
    new = Saver(tmp_path / "digits", "run-2", quota_gb=2.5 * size / 1e9)
    new.save(10)
    assert (old.steps(), new.steps()) == ([3], [10])
    assert "run-1/step_00000001-a1, run-1/step_00000002-a1" in new.diary.events["checkpoint-quota"]
    new.save(20)
    assert (old.steps(), new.steps()) == ([3], [20]), "the newest of each, though that is too much"
    assert new.diary.states == {"run-2/step_00000010-a1": "deleted", "run-2/step_00000020-a1": "committed"}
    again = Saver(tmp_path / "digits", "run-1", attempt=2)
    assert again.engine.restore(again.state) is not None
    assert again.diary.states == {
        "run-1/step_00000001-a1": "deleted", "run-1/step_00000002-a1": "deleted", "run-1/step_00000003-a1": "committed",
    }, "who goes on tells what others deleted meanwhile"  # fmt: skip


def test_a_run_tells_what_others_deleted_when_it_saves(tmp_path: Path) -> None:
    saver = Saver(tmp_path, "run-1")
    saver.save(1, 2)
    catalog.remove(saver.root, "step_00000001-a1")
    saver.save(3)
    assert saver.diary.states == {
        "run-1/step_00000001-a1": "deleted", "run-1/step_00000002-a1": "committed",
        "run-1/step_00000003-a1": "committed",
    }  # fmt: skip


def test_who_goes_on_holds_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, "run-1")
    name = saver.save(1).id.rpartition("/")[2]
    seen = []

    def looking(*given: Any, **more: Any) -> Any:
        seen.append(catalog.holds(saver.root, name, now=YOUNG))
        return reader.read(*given, **more)

    monkeypatch.setattr(engine, "read", looking)
    assert saver.engine.restore(saver.state) is not None
    assert seen == [{Hold.in_use}]
    assert catalog.holds(saver.root, name, now=YOUNG) == frozenset()


@pytest.mark.parametrize("when", ["before it is held", "while it is read"])
def test_what_is_deleted_under_a_run_that_goes_on_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The next older one is used, and nothing of the deleted one comes back."""
    saver = Saver(tmp_path, "run-1")
    saver.save(1, 2)
    name = "step_00000002-a1"
    if when == "before it is held":
        real = saver.engine._candidates

        def candidates(which: str) -> str:
            found = real(which)
            catalog.remove(saver.root, name)
            return found

        monkeypatch.setattr(saver.engine, "_candidates", candidates)
    else:

        def deleted(inside: Storage, manifest: Manifest, **more: Any) -> Any:
            if manifest.name == name:
                catalog.remove(saver.root, name)  # by force
            return reader.read(inside, manifest, **more)

        monkeypatch.setattr(engine, "read", deleted)
    stored = saver.engine.restore(saver.state)
    assert stored is not None
    assert stored.manifest.step == 1
    assert "checkpoint-gone" in saver.diary.events
    assert "checkpoint-quarantined" not in saver.diary.events
    assert not saver.root.exists(name)


def test_loading_looks_again_where_a_run_deleted_all_that_was_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, "run-1")
    saver.save(1, 2)
    listings = []

    def scan(storage: Storage) -> catalog.Scan:
        found = catalog.scan(storage)
        listings.append([manifest.step for manifest in found.committed])
        if len(listings) == 1:
            saver.save(3)
            for step in (1, 2):
                catalog.remove(saver.root, f"step_{step:08d}-a1")
        return found

    monkeypatch.setattr(load, "catalog", SimpleNamespace(**{**vars(catalog), "scan": scan}))
    assert load_checkpoint(saver.root.uri()).step == 3
    assert listings == [[2, 1], [3]]
    assert catalog.holds(saver.root, "step_00000003-a1") == frozenset(), "nobody reads it any more"


def test_loading_passes_over_what_is_deleted_meanwhile_and_a_named_one_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, "run-1")
    saver.save(1, 2, 3)

    def deleted(inside: Storage, manifest: Manifest, **more: Any) -> Any:
        if manifest.step > 1:
            catalog.remove(saver.root, manifest.name)
        return reader.read(inside, manifest, **more)

    monkeypatch.setattr(load, "read", deleted)
    with pytest.raises(DeletedMeanwhile, match="was deleted while it was read"):
        load_checkpoint(saver.root.uri("step_00000002-a1"))
    loaded = load_checkpoint(saver.root.uri())
    assert loaded.step == 1
    assert loaded.skipped[0].startswith("step_00000003-a1")
    assert "was deleted while it was read" in loaded.skipped[0]
    assert [path for path, _ in saver.root.files() if path.startswith("step_00000003")] == []
