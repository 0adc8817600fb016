"""Checkpoints of FSDP2: saved in parts, read by any number of ranks, with and without FSDP, and by other programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.export import to_dcp, to_pt, to_safetensors
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.reader import read_manifest, verify

CASES = {"two_save": 2, "one": 1, "two_go_on_from_one": 2, "three": 3, "four_in_two_copies": 4}
FIRST = "step_00000001-a1"
BUFFERS = 2 * 4 * 7 + 8
"""Bytes of the running means, variances and count, which each rank has of its own."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases of tests/plugins/fsdp_ranks.py have been played."""
    place = tmp_path_factory.mktemp("fsdp")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    words = [sys.executable, "-m", "tests.plugins.fsdp_ranks", str(place), *CASES]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return place


def said(directory: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((directory / f"{case}-{rank}.json").read_text()) for rank in range(CASES[case])]


def group(directory: Path, name: str, folder: str) -> dict[str, torch.Tensor]:
    """What the ranks had, put together by FSDP itself."""
    content = load_file(directory / f"{name}.safetensors")
    return {key.partition("/")[2]: tensor for key, tensor in content.items() if key.startswith(f"{folder}/")}


def manifest_of(directory: Path, name: str) -> tuple[Storage, Manifest]:
    inside = Storage(str(directory / name / FIRST))
    return inside, read_manifest(inside)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_the_same_ranks_go_on_bit_for_bit(directory: Path) -> None:
    for each in said(directory, "two_save"):
        assert each["restored"] == []
        assert each["later"] == []
        assert each["note"] == "ä"
        assert each["ema"], "what was given as an extra is filled in place"
        assert each["parts"] > 10, "a rank reads its parts only"


@pytest.mark.parametrize("case", ["one", "two_go_on_from_one", "three"])
def test_any_number_of_ranks_reads_it_with_fsdp_and_without(directory: Path, case: str) -> None:
    for each in said(directory, case):
        assert {how: wrong for how, wrong in each.items() if wrong} == {}


def test_every_rank_writes_its_own_rows_and_each_row_is_written_once(directory: Path) -> None:
    _, manifest = manifest_of(directory, "two")
    entries = [(file.path, tensor) for file in manifest.files for tensor in file.tensors if tensor.name == "0.weight"]
    assert [(path, tensor.shape, tensor.offsets, tensor.full_shape) for path, tensor in entries] == [
        ("model/model-00001-of-00002.safetensors", (4, 6), (0, 0), (7, 6)),
        ("model/model-00002-of-00002.safetensors", (3, 6), (4, 0), (7, 6)),
    ]
    alone = [file.path for file in manifest.files for tensor in file.tensors if tensor.name == "3.weight"]
    assert alone == ["model/model-00001-of-00002.safetensors"], "the other rank's part is empty"
    wanted = sum(tensor.nbytes for tensor in load_file(directory / "after-2.safetensors").values())
    assert manifest.size_logical == wanted + 4 * 7 * 6 + BUFFERS, "and the extra, and the other rank's buffers"
    assert not manifest.file("model/model.safetensors.index.json")


def test_dcps_reader_finds_the_place_of_every_tensor_of_a_file_with_parts(directory: Path) -> None:
    for path in (directory / "two" / FIRST).glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            if (told := file.metadata().get("DCP_SHARDING_INFO")) is not None:
                assert json.loads(told).keys() == set(file.keys())


@pytest.mark.parametrize(("name", "reference"), [("two", "after-2"), ("hsdp", "hsdp")])
@pytest.mark.parametrize("folder", ["model", "optim"])
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_torchs_distributed_checkpoint_reads_it(directory: Path, name: str, reference: str, folder: str) -> None:
    wanted = group(directory, reference, folder)
    state = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(directory / name / FIRST / folder)), no_dist=True)
    assert_equal(state, wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_it_is_loaded_and_exported_whole(directory: Path, tmp_path: Path) -> None:
    wanted = group(directory, "after-2", "model")
    loaded = load_checkpoint(directory / "two", which=FIRST)
    assert_equal(loaded.model, wanted)
    state = {
        f"optimizer.state.{i}.{key}": t for i, each in loaded.optimizer["state"].items() for key, t in each.items()
    }
    assert_equal(state, group(directory, "after-2", "optim"))
    inside, manifest = manifest_of(directory, "two")
    assert verify(inside, manifest) == []
    to_pt(inside, manifest, tmp_path / "c.pt")
    assert_equal(torch.load(tmp_path / "c.pt", weights_only=True)["model"], wanted)
    to_safetensors(inside, manifest, tmp_path / "c.safetensors")
    assert_equal(load_file(tmp_path / "c.safetensors"), wanted)
    to_dcp(inside, manifest, tmp_path / "dcp")
    target = {"model": {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}}
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / "dcp"), no_dist=True)
    assert_equal(target["model"], wanted)


def test_a_full_one_is_plain_files_and_each_rank_keeps_what_it_writes(directory: Path) -> None:
    _, manifest = manifest_of(directory, "full")
    assert manifest.kind == "full"
    assert not any(tensor.offsets for file in manifest.files for tensor in file.tensors)
    index = json.loads((directory / "full" / FIRST / "model" / "model.safetensors.index.json").read_text())
    wanted = group(directory, "after-2", "model")
    files = {name: load_file(directory / "full" / FIRST / "model" / name) for name in index["weight_map"].values()}
    assert_equal({key: files[name][key] for key, name in index["weight_map"].items()}, wanted)
    kept = [sum(each["kept"]) for each in said(directory, "two_save")]
    gathered = [file for file in manifest.files if re.fullmatch(r"(model|optim)/.*\.safetensors", file.path)]
    assert len(gathered) == 4, "both ranks wrote of both groups"
    assert min(kept) > 0
    assert sum(kept) == len([key for key in load_file(directory / "after-2.safetensors") if is_split(key)]) + 1


def is_split(key: str) -> bool:
    """Of the model in tests/plugins/fsdp_ranks.py: all parameters but the one that FSDP was told to leave alone."""
    name = key.split(".")
    if key.startswith("model/"):
        return not name[0].endswith("/1") or name[1] == "bias"
    return name[3] != "step" and name[2] != "2"


def test_of_two_copies_one_is_written_and_both_copies_write(directory: Path) -> None:
    each = said(directory, "four_in_two_copies")
    assert all(rank["restored"] == [] and rank["grid"] for rank in each)
    wanted = load_file(directory / "hsdp.safetensors")
    _, manifest = manifest_of(directory, "hsdp")
    split = [tensor for file in manifest.files for tensor in file.tensors if tensor.offsets is not None]
    assert sum(rank["bytes"] for rank in each) == sum(tensor.size_bytes for tensor in split)
    assert manifest.size_logical == sum(tensor.nbytes for tensor in wanted.values()) + 4 * 7 * 6 + 3 * BUFFERS
    assert min(rank["bytes"] for rank in each) * 3 > max(rank["bytes"] for rank in each)


def test_what_cannot_be_stored_is_named(directory: Path) -> None:
    for each in said(directory, "four_in_two_copies"):
        sums, some_ranks = each["refused"]
        assert "extra.odd is a DTensor" in sums
        assert "2 of 4 ranks" in some_ranks
