"""A checkpoint in other formats: what torch and safetensors load from them is what was saved."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.export import TargetExists, to_dcp, to_pt, to_safetensors
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.state import TrainState
from orchestrator.errors import CheckpointCorrupt
from tests.plugins import checkpoint_files

torch.set_num_threads(1)

Saved = tuple[Storage, Manifest, nn.Module, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """What two ranks wrote, whose state has about everything that a state can have."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])  # keeps a Counter
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    extra = {"ema": torch.ones(3), "table": np.arange(6.0).reshape(2, 3), "note": "ä", "ids": (1, 2), "raw": b"\0x"}
    state = TrainState(
        model=model, optimizer=optimizer, scheduler=scheduler, dtype=torch.bfloat16, where=torch.device("cpu"), **extra
    )
    root = Storage(str(tmp_path_factory.mktemp("saved")))
    manifest = checkpoint_files.write_state(root, state, world_size=2, step=12, metrics={"loss": 0.5})
    return root.join(manifest.name), manifest, model, optimizer


def assert_same(one: Any, other: Any) -> None:
    assert isinstance(one, type(other)) or isinstance(other, type(one))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_torch_loads_a_pt_file_without_executing_anything(saved: Saved, tmp_path: Path) -> None:
    storage, manifest, model, optimizer = saved
    to_pt(storage, manifest, tmp_path / "new" / "c.pt")
    content = torch.load(tmp_path / "new" / "c.pt", weights_only=True)
    assert_same(content["model"], dict(model.state_dict()))
    assert_same(content["optimizer"], optimizer.state_dict())
    assert content["step"] == 12
    assert content["metrics"] == {"loss": 0.5}
    assert content["scheduler"]["milestones"] == Counter({2: 1, 4: 1})
    assert torch.equal(content["extra"]["table"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    assert content["extra"]["raw"] == b"\0x"
    assert content["extra"]["dtype"] == torch.bfloat16
    nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).load_state_dict(content["model"])


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_torchs_distributed_checkpoints_load_a_dcp_directory(saved: Saved, tmp_path: Path) -> None:
    storage, manifest, model, optimizer = saved
    to_dcp(storage, manifest, tmp_path / "c")
    state = {
        "model": {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {0: {"exp_avg": torch.empty(6, 4)}}},
        "step": 0,
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert_same(state["model"], dict(model.state_dict()))
    assert_same(state["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])  # type: ignore[index]
    assert state["step"] == 12


def test_one_safetensors_file_has_the_whole_model(saved: Saved, tmp_path: Path) -> None:
    storage, manifest, model, _ = saved
    to_safetensors(storage, manifest, tmp_path / "c.safetensors")
    assert_same(load_file(tmp_path / "c.safetensors"), dict(model.state_dict()))


@pytest.mark.parametrize("write", [to_pt, to_dcp, to_safetensors])
def test_an_export_replaces_nothing_and_leaves_nothing_half_done(saved: Saved, tmp_path: Path, write: Any) -> None:
    storage, manifest, *_ = saved
    (tmp_path / "there").write_text("mine")
    with pytest.raises(TargetExists):
        write(storage, manifest, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    damaged = Storage(str(tmp_path / "copy"))
    for path, _ in storage.files():
        damaged.write_bytes(path, storage.read_bytes(path))
    file = tmp_path / "copy" / "model" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x99")
    with pytest.raises(CheckpointCorrupt):
        write(damaged, manifest, tmp_path / "out" / "c")
    assert not (tmp_path / "out").exists()


def test_a_state_of_several_models_keeps_their_names(tmp_path: Path) -> None:
    models = {"g": nn.Linear(2, 2), "d": nn.Linear(1, 1)}
    root = Storage(str(tmp_path / "checkpoints"))
    manifest = checkpoint_files.write_state(root, TrainState(model=models))
    to_pt(root.join(manifest.name), manifest, tmp_path / "c.pt")
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert_same(OrderedDict(content["model"]["g"]), models["g"].state_dict())
    to_safetensors(root.join(manifest.name), manifest, tmp_path / "c.safetensors")
    assert set(load_file(tmp_path / "c.safetensors")) == {"g.weight", "g.bias", "d.weight", "d.bias"}
