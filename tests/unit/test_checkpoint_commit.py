"""Receipts of all ranks become one checkpoint, whoever sees them and whatever dies on the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from orchestrator import disk
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit
from orchestrator.checkpoints.catalog import quarantine, remove
from orchestrator.checkpoints.commit import CommitRefused, Receipt
from orchestrator.checkpoints.image import TensorSpec, file_entry, image
from orchestrator.checkpoints.manifest import FileEntry, Manifest, TensorEntry
from orchestrator.errors import CheckpointCorrupt

NAME = "step_00000007-a1"
TOKEN, OTHER = "a" * 32, "b" * 32


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(params=["local", "mock"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints") if request.param == "local" else "mock:///checkpoints")


@pytest.fixture
def inside(root: Storage) -> Storage:
    return root.join(NAME)


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints")).join(NAME)


@pytest.fixture(autouse=True)
def _no_watcher() -> Iterator[None]:
    yield
    disk.watch(None)


def draft(**changes: Any) -> dict[str, Any]:
    manifest = Manifest(
        run="r1", name=NAME, attempt=1, step=7, epoch=0, epoch_complete=False, world_size=2, seed=3, config_hash="c",
        created=100.0, duration=0.0, files=(), metrics={"loss": 0.5}, reasons=("every_steps",), save=TOKEN,
        data={"position": {"3": 1}},
    )  # fmt: skip
    return {**commit.draft_of(manifest), **changes}


def rank_done(inside: Storage, rank: int, world_size: int = 2, **changes: Any) -> Receipt:
    """What a rank does in a save: a tensor file, rank 0 also state.json, then the receipt."""
    path = f"model/model-{rank + 1:05d}-of-{world_size:05d}.safetensors"
    made, head = image(
        path, [TensorSpec(f"{rank}.weight", "F32", (2,), 8, True), TensorSpec(f"{rank}.n", "I64", (), 8, True)]
    )
    data = bytes(range(16))
    with inside.open_image(path, made.size_bytes) as output:
        output.write(memoryview(head + data))
    hashes = [xxhash.xxh3_128_hexdigest(data[at : at + 8]) for at in (0, 8)]
    files = [file_entry(made, xxhash.xxh3_128_hexdigest(head), hashes)]
    if rank == 0:
        text = b'{"tree": {}, "progress": {}}'
        inside.write_bytes("state.json", text)
        files.append(
            FileEntry(path="state.json", size_bytes=28, head_bytes=28, head_xxh3=xxhash.xxh3_128_hexdigest(text))
        )
    fields: dict[str, Any] = {
        "save": TOKEN, "rank": rank, "world_size": world_size, "files": tuple(files), "content": {"n": rank},
        "seconds": {"copy": 0.25, "write": 1.0 + rank}, "sealed_at": 101.0, "draft": draft() if rank == 0 else None,
    }  # fmt: skip
    receipt = Receipt(**{**fields, **changes})
    commit.write_receipt(inside, receipt)
    return receipt


def committed(inside: Storage) -> Manifest:
    manifest = commit.finish(inside)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_receipt_makes_the_checkpoint_in_whatever_order_they_come(
    inside: Storage, order: tuple[int, ...]
) -> None:
    for rank in order:
        assert commit.finish(inside) is None
        rank_done(inside, rank, 3)
    manifest = committed(inside)
    assert Manifest.decode(inside.read_bytes("MANIFEST.json"), "here") == manifest
    assert [file.path for file in manifest.files] == [
        "model/model-00001-of-00003.safetensors", "model/model-00002-of-00003.safetensors",
        "model/model-00003-of-00003.safetensors", "model/model.safetensors.index.json", "rank-0000.json",
        "rank-0001.json", "rank-0002.json", "state.json",
    ]  # fmt: skip
    for file in manifest.files:
        data = inside.read_bytes(file.path)
        assert len(data) == file.size_bytes
        assert xxhash.xxh3_128_hexdigest(data[: file.head_bytes]) == file.head_xxh3


def test_the_manifest_says_what_the_draft_and_the_receipts_said(inside: Storage) -> None:
    for rank in (0, 1):
        rank_done(inside, rank)
    manifest = committed(inside)
    assert (manifest.run, manifest.step, manifest.metrics) == ("r1", 7, {"loss": 0.5})
    assert (manifest.save, manifest.world_size, manifest.size_logical) == (TOKEN, 2, 32)
    assert manifest.data == {"position": {"3": 1}}
    assert manifest.duration == 3.0, "until the slower rank's files were durable"
    assert manifest.timings["write"] == 2.0
    assert manifest.timings["copy"] == 0.25
    assert manifest.timings["write_bytes_per_second"] > 0


def test_the_index_lists_every_tensor_once(inside: Storage) -> None:
    for rank in (0, 1):
        rank_done(inside, rank)
    committed(inside)
    index = json.loads(inside.read_bytes("model/model.safetensors.index.json"))
    assert index["metadata"] == {"total_size": 32}
    assert index["weight_map"] == {
        "0.n": "model-00001-of-00002.safetensors", "0.weight": "model-00001-of-00002.safetensors",
        "1.n": "model-00002-of-00002.safetensors", "1.weight": "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_a_group_of_split_tensors_and_that_of_the_ranks_have_no_index(inside: Storage) -> None:
    for group in ("model", "rank"):
        tensor = TensorEntry(
            name="w", dtype="U8", shape=(0,), size_bytes=0, xxh3="", offsets=(0,) if group == "model" else None,
            full_shape=(2,) if group == "model" else None,
        )  # fmt: skip
        path = f"{group}/{group}-00001-of-00001.safetensors"
        entry = FileEntry(path=path, size_bytes=4, head_bytes=4, head_xxh3="", tensors=(tensor,))
        rank_done(inside, 0, 1, files=(entry,))
        inside.write_bytes(path, b"head")
        assert not [file.path for file in committed(inside).files if "index" in file.path]
        inside.delete("MANIFEST.json")


def test_who_commits_makes_no_difference(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        inside = Storage(str(tmp_path / name)).join(NAME)
        for rank in (0, 1) if name == "one" else (1, 0):
            rank_done(inside, rank)
        committed(inside)
        written.append({path: inside.read_bytes(path) for path, _ in inside.files()})
    assert written[0] == written[1]


def test_what_is_committed_stays_as_it_is(inside: Storage) -> None:
    for rank in (0, 1):
        rank_done(inside, rank)
    first = committed(inside)
    inside.delete("rank-0001.json")
    commit.write_failure(inside, save=TOKEN, rank=1, why="late word")
    assert commit.finish(inside) == first


def test_half_a_manifest_is_written_again(inside: Storage) -> None:
    for rank in (0, 1):
        rank_done(inside, rank)
    first = committed(inside)
    inside.write_bytes("MANIFEST.json", first.encode()[:100])
    assert commit.finish(inside) == first
    assert inside.read_bytes("MANIFEST.json") == first.encode()


def test_receipts_of_two_saves_never_make_one_checkpoint(inside: Storage) -> None:
    rank_done(inside, 0)
    rank_done(inside, 1, save=OTHER)
    assert commit.finish(inside) is None
    assert set(commit.receipts(inside)) == {0}
    rank_done(inside, 1)
    assert committed(inside).save == TOKEN


def test_without_rank_0_receipts_count_only_if_they_agree(inside: Storage) -> None:
    rank_done(inside, 1, 3)
    assert set(commit.receipts(inside)) == {1}
    rank_done(inside, 2, 3, save=OTHER)
    assert commit.receipts(inside) == {}
    assert commit.finish(inside) is None


def test_a_rank_that_failed_ends_the_waiting(inside: Storage) -> None:
    rank_done(inside, 0)
    commit.write_failure(inside, save=OTHER, rank=1, why="an older save")
    assert commit.finish(inside) is None
    commit.write_failure(inside, save=TOKEN, rank=1, why="disk full")
    with pytest.raises(CommitRefused, match="rank 1 says: disk full"):
        commit.finish(inside)


def test_a_marker_nobody_can_read_is_nobodys(inside: Storage) -> None:
    rank_done(inside, 0, 1)
    inside.write_bytes("rank-0001.failed.json", b"{")
    assert commit.finish(inside) is not None


def test_two_sizes_of_the_group_are_refused(inside: Storage) -> None:
    rank_done(inside, 0, 2)
    rank_done(inside, 1, 3)
    with pytest.raises(CommitRefused, match=r"groups of \[2, 3\]"):
        commit.finish(inside)


@pytest.mark.parametrize("path", ["model/model-00002-of-00002.safetensors", "state.json"])
def test_a_file_that_is_gone_or_of_another_size_is_refused(inside: Storage, path: str) -> None:
    for rank in (0, 1):
        rank_done(inside, rank)
    inside.write_bytes(path, b"short")
    with pytest.raises(CommitRefused, match=f"{path} has 5 bytes"):
        commit.finish(inside)
    inside.delete(path)
    with pytest.raises(CommitRefused, match=f"{path} is gone"):
        commit.finish(inside)
    assert not inside.exists("MANIFEST.json")


def test_two_ranks_that_wrote_one_file_are_refused(inside: Storage) -> None:
    files = rank_done(inside, 0).files
    rank_done(inside, 1, files=files[:1])
    with pytest.raises(CommitRefused, match="two ranks wrote"):
        commit.finish(inside)


def test_what_was_put_aside_or_removed_does_not_come_back(root: Storage, inside: Storage) -> None:
    for rank in (0, 1):
        rank_done(inside, rank)
    committed(inside)
    quarantine(root, NAME, "flipped bit", now=5.0)
    with pytest.raises(CommitRefused, match="damaged"):
        commit.finish(inside)
    remove(root, NAME)
    assert commit.finish(inside) is None
    assert not root.exists(NAME)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"protocol": 3}', b'{"protocol": 2, "save": "x"}'])
def test_a_receipt_that_is_none_is_told(inside: Storage, damage: bytes) -> None:
    rank_done(inside, 0)
    inside.write_bytes("rank-0001.json", damage)
    with pytest.raises(CheckpointCorrupt, match=r"rank-0001\.json"):
        commit.finish(inside)


@pytest.mark.parametrize("bad", [None, {"step": 1}, draft(created="x"), {**draft(), "unheard": 1}])
def test_a_draft_that_is_none_is_told(inside: Storage, bad: Any) -> None:
    rank_done(inside, 0, 1, draft=bad)
    with pytest.raises(CheckpointCorrupt, match="draft"):
        commit.finish(inside)
    assert not inside.exists("MANIFEST.json")


def test_a_receipt_comes_back_the_same(inside: Storage) -> None:
    receipt = rank_done(inside, 0)
    assert Receipt.decode(receipt.encode(), "here") == receipt


def test_killed_at_any_call_to_the_disk_another_one_commits_the_same(local: Storage) -> None:
    """After each death there is the whole checkpoint or none, and the next who comes finishes it."""
    for rank in (0, 1):
        rank_done(local, rank)
    expected = committed(local).encode()
    for number in range(1, 100):
        remove_commit(local)
        count = itertools.count(1)
        disk.watch(lambda call, path, count=count, number=number: die_at(number, count))
        try:
            commit.finish(local)
        except Killed:
            disk.watch(None)
            assert not local.exists("MANIFEST.json") or local.read_bytes("MANIFEST.json") == expected
            assert committed(local).encode() == expected
        else:
            assert number > 6, "the index and the manifest were each written, synced and named"
            return
    raise AssertionError("it never ended")


def test_killed_at_any_call_of_the_save_there_is_no_checkpoint_of_it(local: Storage) -> None:
    rank_done(local, 1)
    for number in range(1, 100):
        local.delete("rank-0000.json")
        count = itertools.count(1)
        disk.watch(lambda call, path, count=count, number=number: die_at(number, count))
        try:
            rank_done(local, 0)
        except Killed:
            disk.watch(None)
            if not local.exists("rank-0000.json"):
                assert commit.finish(local) is None
        else:
            disk.watch(None)
            assert committed(local).files
            return
    raise AssertionError("it never ended")


def die_at(number: int, count: Iterator[int]) -> None:
    if next(count) == number:
        raise Killed


def remove_commit(inside: Storage) -> None:
    inside.delete("MANIFEST.json")
    inside.delete("model/model.safetensors.index.json")
