"""What a state is captured as: names, who may write each tensor, and values of all kinds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.checkpoints.state import TrainState, specs
from orchestrator.checkpoints.tree import NotStorable, dense
from orchestrator.errors import UserError

torch.set_num_threads(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.two(self.one(x)))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def test_a_capture_is_of_the_living_tensors_and_says_what_all_ranks_have() -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer)
    ema = copy.deepcopy(model)
    snapshot = TrainState(model=model, optimizer=optimizer, extra={"ema": ema}).capture()
    tensors = snapshot.tensors["model"]
    assert list(tensors) == list(model.state_dict())
    assert all(tensors[name].data_ptr() == value.data_ptr() for name, value in model.state_dict().items())
    assert not any(tensor.requires_grad for tensor in tensors.values())
    parameters = {f"model/{name}" for name in tensors if name.endswith(("weight", "bias"))}
    state = {f"optim/{name}" for name in snapshot.tensors["optim"] if name.startswith("optimizer.")}
    assert len(state) == 3 * 5
    assert snapshot.shared == parameters | state, "buffers and extras are rank 0's"
    assert {"one.weight", "two.weight"} <= tensors.keys(), "both names of tied weights are stored"


def test_captured_twice_the_same_tensors_are_described_alike() -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer)
    first, second = state.capture(), state.capture()
    assert specs(first) == specs(second)
    assert first.tree == second.tree
    for group in first.tensors:
        pairs = zip(first.tensors[group].values(), second.tensors[group].values(), strict=True)
        assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)


def test_a_hook_that_gives_copies_makes_them_rank_0s() -> None:
    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({key: value.detach() * 2 for key, value in state.items()})
    )
    snapshot = TrainState(model=model).capture()
    assert snapshot.shared == frozenset()
    assert torch.equal(snapshot.tensors["model"]["weight"], model.weight.detach() * 2)


def test_weights_only_takes_the_model_and_nothing_else() -> None:
    model = nn.Linear(2, 2)
    state = TrainState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1, momentum=1),
        ema=torch.ones(2),
        files={"a": b""},
    )
    snapshot = state.capture(weights_only=True)
    assert list(snapshot.tree) == ["model"]
    assert snapshot.tensors["optim"] == {}
    assert snapshot.files == {}


KINDS = {
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.ones(2, dtype=torch.complex64) * 1j,
    "conjugate": (torch.ones(2, dtype=torch.complex64) * 1j).conj(),
    "bool": torch.tensor([True, False]),
    "0-d": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "expanded": torch.ones(1).expand(5),
    "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_all_kinds_are_described_by_the_bytes_they_will_have(kind: str) -> None:
    snapshot = TrainState(value=KINDS[kind]).capture()
    (spec,) = specs(snapshot)["optim"]
    (tensor,) = snapshot.tensors["optim"].values()
    assert spec.shape == tuple(tensor.shape)
    assert spec.size_bytes == dense(tensor).numel() * tensor.element_size()
    assert not spec.is_shared


def test_what_no_file_can_hold_is_named() -> None:
    with pytest.raises(NotStorable, match=r"extra\.double.*complex128"):
        specs(TrainState(double=torch.ones(1, dtype=torch.complex128)).capture())
    with pytest.raises(NotStorable, match=r"extra\.sparse"):
        TrainState(sparse=torch.eye(2).to_sparse()).capture()
    with pytest.raises(NotStorable, match=r"extra\.words"):
        TrainState(words=np.array(["a"])).capture()


def test_extras_are_given_in_one_way_each() -> None:
    state = TrainState(extra={"a": 1}, b=2)
    assert state.extra == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="a is given"):
        TrainState(extra={"a": 1}, a=2)


@pytest.mark.parametrize("files", [{"../up": b""}, {"a/b": b""}, {"a": "text"}, {".hidden": b""}, {"": b""}])
def test_side_files_are_bytes_under_plain_names(files: dict) -> None:
    with pytest.raises(UserError, match="files"):
        TrainState(files=files)


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_buffers_that_differ_between_ranks_are_each_ranks_own() -> None:
    bare = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    alike, own = (DistributedDataParallel(copy.deepcopy(bare), broadcast_buffers=each) for each in (True, False))
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert TrainState(model=alike).capture().own == {}
    assert TrainState(model=own).capture().own.keys() == buffers
    several = TrainState(model={"g": bare, "d": own}).capture()
    assert several.own.keys() == {f"d.{name}" for name in buffers}
    assert several.tensors["model"].keys() >= several.own.keys(), (
        "rank 0's are what another number of ranks goes on with"
    )
