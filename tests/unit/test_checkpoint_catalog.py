"""What lies under a run's checkpoints: holds, leftovers of crashes, removal, and the pointers beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, pointers
from orchestrator.checkpoints.catalog import Hold
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.keeping import Keeping
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointState, Manifest, directory_name
from orchestrator.checkpoints.policy import Direction

HOUR = 3600.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints"))


def manifest(step: int, attempt: int = 1, **changes: Any) -> Manifest:
    plain: dict[str, Any] = {
        "run": "r", "name": directory_name(step, attempt), "attempt": attempt, "step": step, "epoch": 0,
        "epoch_complete": True, "world_size": 1, "seed": 0, "config_hash": "", "created": 0.0, "duration": 0.5,
        "files": (),
    }  # fmt: skip
    return Manifest(**{**plain, **changes})


def saved(storage: Storage, step: int, attempt: int = 1, **changes: Any) -> Manifest:
    made = manifest(step, attempt, **changes)
    storage.write_bytes(f"{made.name}/{MANIFEST}", made.encode())
    return made


def left_behind(storage: Storage, step: int, attempt: int, *, modified: float) -> str:
    """What a crash leaves: a receipt, a tensor file, one still being written, and no manifest."""
    name = directory_name(step, attempt)
    storage.write_bytes(f"{name}/rank-0001.json", b"{}")
    storage.write_bytes(f"{name}/model/a.safetensors", b"x")
    storage.write_bytes(f"{name}/model/b.safetensors.1-ff.partial", b"x")
    touch_all(storage, name, modified)
    return name


def touch_all(storage: Storage, name: str, modified: float) -> None:
    top = Path(storage.uri(name))
    for path in (*top.rglob("*"), top):
        os.utime(path, (modified, modified))


# -- holds ---------------------------------------------------------------------------------------------------


def test_holds_are_seen_until_they_are_released_or_over(storage: Storage) -> None:
    name = saved(storage, 1).name
    catalog.hold(storage, name, Hold.pinned)
    catalog.hold(storage, name, Hold.registered)
    catalog.hold(storage, name, Hold.in_use, until=100.0, token="reader-1")
    catalog.hold(storage, name, Hold.in_use, until=200.0, token="reader-2")
    assert catalog.holds(storage, name, now=99.0) == {Hold.pinned, Hold.registered, Hold.in_use}
    assert catalog.holds(storage, name, now=201.0) == {Hold.pinned, Hold.registered}
    for _ in range(2):
        catalog.release(storage, name, Hold.in_use, token="reader-2")
        catalog.release(storage, name, Hold.pinned)
    assert catalog.holds(storage, name, now=101.0) == {Hold.registered}
    (found,) = catalog.scan(storage, with_holds=True, now=101.0).found
    assert found.holds == {Hold.registered}


def test_a_hold_that_nobody_can_read_holds(storage: Storage) -> None:
    name = saved(storage, 1).name
    storage.write_bytes(f"{name}/IN-USE-x", b"{")
    assert catalog.holds(storage, name, now=1e12) == {Hold.in_use}


@pytest.mark.parametrize(
    "arguments",
    [{"hold": Hold.in_use, "token": "a"}, {"hold": Hold.in_use, "until": 1.0}, {"hold": Hold.pinned, "until": 1.0},
     {"hold": Hold.in_use, "until": 1.0, "token": "../x"}],
)  # fmt: skip
def test_a_hold_without_holder_or_end_is_refused(storage: Storage, arguments: dict[str, Any]) -> None:
    name = saved(storage, 1).name
    with pytest.raises(ValueError, match="in_use|token"):
        catalog.hold(storage, name, **arguments)


def test_a_reader_holds_what_it_reads_and_lets_go(storage: Storage) -> None:
    name = saved(storage, 1).name
    with catalog.in_use(storage, name, now=100.0, seconds=50.0) as is_held:
        assert is_held
        with catalog.in_use(storage, name, now=100.0):
            assert catalog.holds(storage, name, now=151.0) == {Hold.in_use}, "each reader has its own"
        assert catalog.holds(storage, name, now=149.0) == {Hold.in_use}
        assert catalog.holds(storage, name, now=151.0) == frozenset(), "a reader that died holds nothing for ever"
    assert catalog.holds(storage, name) == frozenset()
    assert [path for path, _ in storage.files()] == [f"{name}/{MANIFEST}"]


def test_what_is_deleted_while_a_reader_comes_is_gone(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(storage, 1).name
    real = catalog.hold

    def too_late(*given: Any, **more: Any) -> None:
        real(*given, **more)
        storage.delete(f"{name}/{MANIFEST}")

    monkeypatch.setattr(catalog, "hold", too_late)
    with pytest.raises(FileNotFoundError), catalog.in_use(storage, name, now=1.0):
        pytest.fail("nothing is there to read")
    assert catalog.scan(storage).incomplete == (), "no directory comes back by being held"


def test_who_cannot_write_reads_all_the_same(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(storage, 1).name

    def refuse(self: Storage, path: str, data: bytes) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Storage, "write_bytes", refuse)
    with catalog.in_use(storage, name, now=1.0) as is_held:
        assert not is_held


def test_what_does_not_exist_cannot_be_held(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        catalog.hold(storage, directory_name(1, 1), Hold.pinned)
    assert not storage.exists()


# -- what is there -------------------------------------------------------------------------------------------


def test_a_scan_tells_whole_ones_from_leftovers_and_damage(storage: Storage) -> None:
    whole = [saved(storage, 1), saved(storage, 2), saved(storage, 1, attempt=2)]
    unfinished = left_behind(storage, 3, 1, modified=5000.0)
    saved(storage, 4)
    storage.write_bytes(f"{directory_name(4, 1)}/{MANIFEST}", b"{}")
    put_aside = saved(storage, 5).name
    catalog.quarantine(storage, put_aside, "bits", now=1.0)
    storage.write_bytes("latest.json", b"{}")
    storage.write_bytes("notes/mine.txt", b"")
    scan = catalog.scan(storage, with_holds=True)
    assert scan.committed == (whole[2], whole[1], whole[0])
    assert [found.manifest for found in scan.found] == list(scan.committed)
    assert scan.incomplete == (unfinished,)
    assert [(one.name, one.modified, one.receipts) for one in scan.unfinished] == [(unfinished, 5000.0, 1)]
    assert [name for name, _ in scan.corrupt] == [directory_name(4, 1)]


def test_removal_takes_the_manifest_first_and_the_receipt_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = saved(storage, 1).name
    storage.write_bytes(f"{name}/rank-0000.json", b"{}")
    gone: list[str] = []
    for method in ("delete", "delete_dir"):
        monkeypatch.setattr(Storage, method, lambda self, path: gone.append(path))
    catalog.remove(storage, name)
    assert gone == [f"{name}/MANIFEST.json", f"{name}/rank-0000.json", name]


def test_what_was_deleted_stays_known_by_a_note(storage: Storage) -> None:
    made, other = saved(storage, 1, label="v0.1", metrics={"loss": float("inf")}), saved(storage, 2)
    catalog.remove(storage, made.name, manifest=made, why="no rule keeps it", now=7.0)
    catalog.remove(storage, other.name)
    assert catalog.deleted_names(storage) == [made.name]
    note = catalog.deletion(storage, made.name)
    assert note is not None
    assert note == {
        **catalog.row(made, storage.uri(made.name), CheckpointState.deleted), "reasons": [], "at": 7.0,
        "why": "no rule keeps it",
    }  # fmt: skip
    assert catalog.scan(storage).committed == ()
    saved(storage, 1)
    assert catalog.deleted_names(storage) == [], "it is there again: what was said of it is over"
    storage.write_bytes(f"deleted/{other.name}.json", b"[]")
    assert catalog.deletion(storage, other.name) is None
    assert catalog.deletion(storage, directory_name(9, 9)) is None


def test_what_was_deleted_cannot_be_found_damaged(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that misses files of what is being deleted takes it for damaged; no directory comes back by that."""
    name = saved(storage, 1).name
    catalog.remove(storage, name)
    assert not catalog.quarantine(storage, name, "files are missing", now=1.0)
    assert list(storage.files()) == []
    made = saved(storage, 2).name
    real = Storage.write_bytes

    def deleted_meanwhile(self: Storage, path: str, data: bytes) -> None:
        catalog.remove(storage, made)
        real(self, path, data)

    monkeypatch.setattr(Storage, "write_bytes", deleted_meanwhile)
    assert not catalog.quarantine(storage, made, "files are missing", now=1.0)
    assert [entry.name for entry in storage.entries()] == []


def test_a_quarantine_that_was_interrupted_is_ended(storage: Storage) -> None:
    name = saved(storage, 1).name
    storage.write_bytes(f"{name}/{catalog.QUARANTINE_NOTE}", b"{}")
    storage.write_bytes(f"{name}/{catalog.QUARANTINED}", b"half")
    assert catalog.quarantine(storage, name, "bits", now=1.0)
    assert catalog.quarantine(storage, name, "bits again", now=2.0)
    assert manifest(1).encode() == storage.read_bytes(f"{name}/{catalog.QUARANTINED}")
    assert not storage.exists(f"{name}/{MANIFEST}")


# -- sweeping ------------------------------------------------------------------------------------------------


def test_old_leftovers_of_older_attempts_are_swept(storage: Storage) -> None:
    doomed = left_behind(storage, 1, 1, modified=1000.0)
    kept = [
        saved(storage, 2).name,
        left_behind(storage, 3, 2, modified=1000.0),  # of this attempt
        left_behind(storage, 4, 3, modified=1000.0),  # of a newer one
    ]
    assert catalog.sweep(storage, attempt=2, now=1000.0 + HOUR - 1) == []
    assert catalog.sweep(storage, attempt=2, now=1000.0 + HOUR) == [doomed]
    assert [entry.name for entry in storage.entries()] == sorted(kept)


@pytest.mark.parametrize(
    "path", ["", "rank-0001.json", "model", "model/a.safetensors", "model/b.safetensors.1-ff.partial"]
)
def test_what_anything_touched_lately_stays(storage: Storage, path: str) -> None:
    """Even a file that is still being written counts: a writer may finish what a dead trainer sealed."""
    name = left_behind(storage, 1, 1, modified=1000.0)
    os.utime(Path(storage.uri(name)) / path, (3000.0, 3000.0))
    assert catalog.sweep(storage, attempt=2, now=1000.0 + HOUR) == []
    assert catalog.sweep(storage, attempt=2, now=3000.0 + HOUR) == [name]


def test_what_is_held_or_put_aside_is_not_swept(storage: Storage) -> None:
    pinned, put_aside = left_behind(storage, 1, 1, modified=0.0), saved(storage, 2).name
    storage.write_bytes(f"{pinned}/PINNED", b"")
    catalog.quarantine(storage, put_aside, "bits", now=1.0)
    for name in (pinned, put_aside):
        touch_all(storage, name, 1000.0)
    assert catalog.sweep(storage, attempt=2, now=1e9) == []


def test_leftovers_of_unknown_age_stay(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind(storage, 1, 1, modified=1000.0)
    monkeypatch.setattr(Storage, "modified", lambda self, path: 0.0)
    assert catalog.sweep(storage, attempt=2, now=1e12) == []


def test_half_written_files_of_the_killed_are_swept_wherever_they_lie(storage: Storage) -> None:
    name = saved(storage, 1).name
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    old = [
        f"{name}/model/a.safetensors.{int(dead.stdout)}-0123abcd.partial", f"latest.json.{int(dead.stdout)}-ff.partial",
    ]  # fmt: skip
    kept = [
        f"{name}/model/b.safetensors.{os.getpid()}-0123abcd.partial",  # of a process that lives
        f"{name}/notes.partial",  # not ours
    ]
    young = f"{name}/model/c.safetensors.{int(dead.stdout)}-0123abcd.partial"
    for path in (*old, *kept, young):
        storage.write_bytes(path, b"x")
        os.utime(storage.uri(path), (1000.0, 1000.0))
    os.utime(storage.uri(young), (1001.0, 1001.0))
    assert catalog.sweep_partial(storage, now=1000.0 + HOUR) == []
    assert catalog.sweep_partial(storage, now=1000.5 + HOUR) == sorted(old)
    left = [path for path in (*old, *kept, young) if Path(storage.uri(path)).exists()]
    assert left == [*kept, young]


def test_half_written_files_are_swept_after_a_commit(storage: Storage) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    first = saved(storage, 1)
    path = f"{first.name}/model/a.safetensors.{int(dead.stdout)}-0123abcd.partial"
    storage.write_bytes(path, b"x")
    Keeping(storage, KeepRules(), attempt=1).after_commit(saved(storage, 2), now=time.time() + 2 * HOUR)
    assert not Path(storage.uri(path)).exists()
    assert [each.step for each in catalog.scan(storage).committed] == [2, 1]


# -- pointers ------------------------------------------------------------------------------------------------

RULES = KeepRules(best=(BestRule(metric="loss", direction=Direction.min), BestRule(metric="acc")))


def test_pointers_name_the_newest_and_the_best(storage: Storage) -> None:
    made = [
        manifest(1, metrics={"loss": 0.5, "acc": 0.9}),
        manifest(3, metrics={"loss": 0.25, "acc": float("nan")}),
        manifest(2, attempt=2, metrics={"loss": 0.75, "acc": 0.9}),
    ]
    pointers.update(storage, made, RULES, now=9.0)
    assert pointers.read(storage, "latest") == made[2].name
    assert pointers.read(storage, "best") == made[1].name
    assert pointers.read(storage, "best-2") == made[2].name, "of equal ones the newer"
    assert json.loads(storage.read_bytes("best.json")) == {
        "protocol": 2, "name": made[1].name, "step": 3, "metric": "loss", "value": 0.25,
        "manifest_sha256": made[1].digest, "direction": "min", "at": 9.0,
    }  # fmt: skip


def test_the_best_that_is_the_last_is_stored_once(storage: Storage) -> None:
    """The pointers name one directory; nothing is written twice."""
    made = saved(storage, 5, metrics={"loss": 0.1, "acc": 0.9})
    pointers.update(storage, [made], RULES, now=9.0)
    assert {pointers.read(storage, which) for which in ("latest", "best", "best-2")} == {made.name}
    assert [entry.name for entry in storage.entries() if entry.is_dir] == [made.name]


@pytest.mark.parametrize("what", ["killed before the pointers moved", "deleted", "found damaged", "no pointer yet"])
def test_what_a_pointer_names_is_not_believed(storage: Storage, what: str) -> None:
    made = [saved(storage, step, metrics={"loss": 1.0 / step}, is_best=True) for step in (1, 2, 3)]
    pointers.update(storage, made, RULES, now=9.0)
    best = made[2]
    if what == "killed before the pointers moved":
        best = saved(storage, 4, metrics={"loss": 0.0})
    elif what == "deleted":
        catalog.remove(storage, made[2].name)
        best = made[1]
    elif what == "found damaged":
        assert catalog.quarantine(storage, made[2].name, "bits", now=1.0)
        best = made[1]
    else:
        storage.delete("best.json")
    newest_first = catalog.scan(storage).committed
    assert newest_first[0] == best
    assert pointers.best_first(storage, "best", newest_first)[0] == best
    assert pointers.best_first(storage, "best-3", newest_first) == []
    pointers.update(storage, newest_first, RULES, now=10.0)
    assert pointers.read(storage, "best") == pointers.read(storage, "latest") == best.name


def test_pointers_of_saves_with_best_true_and_of_endless_metrics(storage: Storage) -> None:
    rules = KeepRules(best=(BestRule(), BestRule(metric="acc")))
    made = [manifest(1, is_best=True), manifest(2, is_best=True, metrics={"acc": float("inf")}), manifest(3)]
    pointers.update(storage, made, rules, now=9.0)
    assert pointers.read(storage, "best") == made[1].name
    assert json.loads(storage.read_bytes("best-2.json"))["value"] == "inf"


def test_a_pointer_that_is_right_is_not_written_again(storage: Storage) -> None:
    made = [manifest(1, metrics={"loss": 0.5})]
    pointers.update(storage, made, RULES, now=1.0)
    pointers.update(storage, made, RULES, now=2.0)
    assert json.loads(storage.read_bytes("latest.json"))["at"] == 1.0
    pointers.update(storage, [], RULES, now=3.0)
    assert not storage.exists("latest.json")
    assert not storage.exists("best.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"name": 1}', b'{"name": "../../etc"}'])
def test_a_pointer_that_makes_no_sense_points_nowhere(storage: Storage, content: bytes) -> None:
    storage.write_bytes("latest.json", content)
    assert pointers.read(storage, "latest") is None
    assert pointers.read(storage, "best") is None
    assert pointers.read(storage, "../latest") is None


def test_a_storage_that_fails_costs_only_a_warning(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Storage, path: str, data: bytes, is_durable: bool = True) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(Storage, "write_bytes", refuse)
    pointers.update(storage, [manifest(1)], RULES, now=1.0)
    assert "pointers not updated" in caplog.text
