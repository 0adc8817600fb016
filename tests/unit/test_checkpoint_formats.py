"""The files of a checkpoint, opened by other programs' own readers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from orchestrator.backends.storage import Storage
from tests.plugins import checkpoint_files

torch.set_num_threads(1)

GROUPS = ("model", "optim")
WORLDS = (1, 2, 3)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.fixture(params=WORLDS, ids=[f"{n} ranks" for n in WORLDS])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = Storage(str(tmp_path))
    manifest = checkpoint_files.write(root, checkpoint_files.random_tensors(), world_size=request.param)
    return tmp_path / manifest.name


@pytest.mark.parametrize("group", GROUPS)
def test_safetensors_opens_every_file(directory: Path, group: str) -> None:
    found: dict[str, torch.Tensor] = {}
    for path in (directory / group).glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys(), "no tensor is in two files"
        found |= tensors
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert_equal(found, checkpoint_files.random_tensors()[group])


def test_tensors_are_aligned_and_no_byte_is_left_over(directory: Path) -> None:
    for path in directory.rglob("*.safetensors"):
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        header = json.loads(path.read_bytes()[8 : 8 + length])
        places = sorted(tuple(each["data_offsets"]) for name, each in header.items() if name != "__metadata__")
        assert (8 + length) % 4096 == 0
        assert places[0][0] == 0
        assert all(one[1] == other[0] for one, other in zip(places, places[1:], strict=False))
        assert 8 + length + places[-1][1] == path.stat().st_size
        for name, each in header.items():
            width = {"F32": 4, "I64": 8, "BF16": 2}.get(each.get("dtype", ""), 1)
            assert name == "__metadata__" or each["data_offsets"][0] % width == 0, name


@pytest.mark.parametrize("group", GROUPS)
def test_the_walk_of_hugging_faces_loaders_finds_every_tensor_once(directory: Path, group: str) -> None:
    """What transformers and accelerate do with a sharded checkpoint: the index, then every file that it names."""
    index = json.loads((directory / group / f"{group}.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert all((directory / group / shard).is_file() for shard in shards)
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(directory / group / shard, framework="pt") as file:
            assert file.metadata()["format"] == "pt", "transformers refuses a file that does not say so"
            names = list(file.keys())
            assert set(names) == {name for name, place in index["weight_map"].items() if place == shard}
            found |= {name: file.get_tensor(name) for name in names}
    wanted = checkpoint_files.random_tensors()[group]
    assert_equal(found, wanted)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_torchs_distributed_checkpoint_reads_the_files_as_they_are(directory: Path, group: str) -> None:
    wanted = checkpoint_files.random_tensors()[group]
    state = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(directory / group)), no_dist=True)
    assert_equal(state, wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_torchs_distributed_checkpoint_puts_split_tensors_together(tmp_path: Path) -> None:
    wanted = checkpoint_files.random_tensors(rows=7)
    split = ("model/fc.weight", "model/fc.bias")
    manifest = checkpoint_files.write(Storage(str(tmp_path)), wanted, world_size=3, split=split)
    assert not (tmp_path / manifest.name / "model" / "model.safetensors.index.json").exists()
    assert (tmp_path / manifest.name / "optim" / "optim.safetensors.index.json").exists()
    state = {name: torch.zeros_like(tensor) for name, tensor in wanted["model"].items()}
    reader = HuggingFaceStorageReader(str(tmp_path / manifest.name / "model"))
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert_equal(state, wanted["model"])
