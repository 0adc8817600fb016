"""A checkpoint of N ranks, read by M: bit for bit, whole or in parts, and no more than what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.reader import read, read_slices, shapes
from orchestrator.checkpoints.state import TrainState
from orchestrator.errors import CheckpointCorrupt
from tests.plugins import checkpoint_files

torch.set_num_threads(1)


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert torch.equal(found[name].float(), tensor.float()), name


SPLITS = {"whole tensors": (), "rows of some": ("model/fc.weight", "model/fc.bias", "optim/optimizer.state.0.exp_avg")}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(("written_by", "read_by"), [(2, 1), (1, 2), (2, 3), (3, 2), (4, 4)])
def test_every_rank_gets_every_tensor(tmp_path: Path, written_by: int, read_by: int, split: tuple[str, ...]) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=7)
    manifest = checkpoint_files.write(root, tensors, world_size=written_by, split=split, progress={"step": 5})
    inside = root.join(manifest.name)
    for rank in range(read_by):
        stored = read(inside, manifest, rank=rank, world_size=read_by)
        for group, wanted in tensors.items():
            assert_equal(dict(stored.snapshot.tensors[group]), wanted)
        assert stored.progress == {"step": 5}
        assert stored.rank == {"rank": rank if read_by == written_by else 0}
        assert stored.why == ()


@pytest.mark.parametrize(("written_by", "read_by"), [(2, 1), (1, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_rank_reads_its_own_rows(tmp_path: Path, written_by: int, read_by: int, split: tuple[str, ...]) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=11)
    manifest = checkpoint_files.write(root, tensors, world_size=written_by, split=split)
    whole = tensors["model"]["fc.weight"]
    rows = [part.shape[0] for part in whole.tensor_split(read_by)]
    found = []
    for rank in range(read_by):
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        wanted = {"model/fc.weight": (mine,), "model/norm.count": (), "model/empty": ()}
        slices = read_slices(root.join(manifest.name), manifest, wanted)
        assert torch.equal(slices["model/norm.count"], tensors["model"]["norm.count"])
        assert slices["model/empty"].shape == (0, 4)
        found.append(slices["model/fc.weight"])
    assert torch.equal(torch.cat(found), whole)


def test_columns_and_corners_may_be_asked_for_too(tmp_path: Path) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=10)
    manifest = checkpoint_files.write(root, tensors, world_size=3, split=["model/fc.weight"])
    wanted = {"model/fc.weight": (slice(2, 9), slice(5, 6)), "model/fc.bias": (slice(-3, None),)}
    found = read_slices(root.join(manifest.name), manifest, wanted)
    assert torch.equal(found["model/fc.weight"], tensors["model"]["fc.weight"][2:9, 5:6])
    assert torch.equal(found["model/fc.bias"], tensors["model"]["fc.bias"][-3:])
    with pytest.raises(KeyError, match="nothing"):
        read_slices(root.join(manifest.name), manifest, {"model/nothing": ()})


def test_a_part_is_given_out_only_if_the_piece_it_is_cut_from_is_right(tmp_path: Path) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=8)
    manifest = checkpoint_files.write(root, tensors, world_size=2, split=["model/fc.weight"])
    inside = root.join(manifest.name)
    file = manifest.file("model/model-00002-of-00002.safetensors")
    assert file is not None
    at = file.head_bytes
    for entry in file.tensors:
        if entry.name == "fc.weight":
            break
        at += entry.size_bytes
    path = tmp_path / manifest.name / file.path
    data = bytearray(path.read_bytes())
    data[at + entry.size_bytes - 1] ^= 1  # the last row
    path.write_bytes(data)
    assert torch.equal(
        read_slices(inside, manifest, {"model/fc.weight": (slice(0, 4),)})["model/fc.weight"],
        tensors["model"]["fc.weight"][:4],
    )
    with pytest.raises(CheckpointCorrupt, match=r"fc\.weight"):
        read_slices(inside, manifest, {"model/fc.weight": (slice(4, 5),)})


def boxes_of(rank: int, world_size: int, tensors: dict, names: Sequence[str]) -> dict:
    """Rows of some tensors, as FSDP2 spreads them."""
    found = {}
    for key in names:
        shape = tensors[key.partition("/")[0]][key.partition("/")[2]].shape
        step = -(-shape[0] // world_size)
        begin, end = (min(at * step, shape[0]) for at in (rank, rank + 1))
        found[key] = ((begin, end), *((0, size) for size in shape[1:]))
    return found


SPREAD = ("model/fc.weight", "model/fc.bias", "optim/optimizer.state.0.exp_avg", "model/flags")


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(("written_by", "read_by"), [(2, 1), (1, 2), (2, 3), (2, 5)])
def test_a_checkpoint_is_read_as_the_parts_that_a_rank_holds(
    tmp_path: Path, written_by: int, read_by: int, split: tuple[str, ...]
) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=7)
    manifest = checkpoint_files.write(root, tensors, world_size=written_by, split=split)
    for rank in range(read_by):
        boxes = boxes_of(rank, read_by, tensors, SPREAD)
        found = read(root.join(manifest.name), manifest, rank=rank, world_size=read_by, boxes=boxes).snapshot
        assert found.parts == {key: tuple(shapes(manifest)[key]) for key in boxes}
        wanted = {group: dict(named) for group, named in tensors.items()}
        for key, ((begin, end), *_) in boxes.items():
            group, _, name = key.partition("/")
            wanted[group][name] = wanted[group][name][begin:end]
        for group, named in wanted.items():
            assert_equal(dict(found.tensors[group]), named)


def test_parts_of_others_are_not_read_and_together_the_ranks_notice_every_damage(tmp_path: Path) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=64)
    split = ("model/fc.weight", "optim/optimizer.state.0.exp_avg")
    manifest = checkpoint_files.write(root, tensors, world_size=2, split=split)
    inside = root.join(manifest.name)
    outcomes, named = set(), set()
    for file in manifest.files:
        path = tmp_path / manifest.name / file.path
        good = path.read_bytes()
        for at in [*range(0, len(good), 1021), len(good) - 1] if file.tensors else ():
            path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            noticed = []
            for rank in range(2):
                try:
                    read(inside, manifest, rank=rank, world_size=2, boxes=boxes_of(rank, 2, tensors, split))
                except CheckpointCorrupt as error:
                    noticed.append(rank)
                    named.add(error.file.partition(":")[0] == file.path)
            assert noticed, (file.path, at)
            outcomes.add(tuple(noticed))
        path.write_bytes(good)
    assert outcomes == {(0,), (1,), (0, 1)}, "what belongs to one rank is read by that one, the rest by both"
    assert named == {True}


def test_rows_that_nobody_wrote_are_damage(tmp_path: Path) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors(rows=8)
    manifest = checkpoint_files.write(root, tensors, world_size=2, split=("model/fc.weight",))
    files = tuple(
        replace(file, tensors=tuple(each for each in file.tensors if each.offsets != (4, 0))) for file in manifest.files
    )
    with pytest.raises(CheckpointCorrupt, match=r"fc\.weight.*160 elements|fc\.weight.*160"):
        read(root.join(manifest.name), replace(manifest, files=files), rank=0, world_size=2)


def test_buffers_that_differ_come_back_on_their_rank_and_a_changed_world_is_told(tmp_path: Path) -> None:
    root, tensors = Storage(str(tmp_path)), checkpoint_files.random_tensors()
    own = {1: {"norm.count": torch.tensor(70)}}
    manifest = checkpoint_files.write(root, tensors, world_size=2, own=own)
    inside = root.join(manifest.name)
    counts = [
        read(inside, manifest, rank=rank, world_size=2).snapshot.tensors["model"]["norm.count"] for rank in (0, 1)
    ]
    assert [int(count) for count in counts] == [7, 70]
    other = read(inside, manifest, rank=1, world_size=3)
    assert int(other.snapshot.tensors["model"]["norm.count"]) == 7
    assert other.why, "training on is not exact, and it is said why"


def test_a_model_and_its_optimizer_go_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    root = Storage(str(tmp_path))
    manifest = checkpoint_files.write_state(root, TrainState(model=model, optimizer=optimizer), world_size=3)
    assert len([file for file in manifest.files if file.path.endswith(".safetensors")]) > 3, "all of them wrote"
    twin = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    twins = torch.optim.Adam(twin.parameters())
    stored = read(root.join(manifest.name), manifest, rank=1, world_size=2)
    TrainState(model=twin, optimizer=twins).apply(stored.snapshot)
    assert_equal(dict(twin.state_dict()), dict(model.state_dict()))
    for key, state in optimizer.state_dict()["state"].items():
        assert_equal(twins.state_dict()["state"][key], state)
