"""What a state is captured as: names, who may write each tensor, and values of all kinds."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
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


def assert_captured_as_if_for_the_first_time(state: TrainState, *, is_quick: bool | None = None) -> None:
    """What a repeated capture gives equals what a first one gives. `is_quick`: whether nothing was looked at anew."""
    before = dict(state._recipes)
    found, fresh = state.capture(), TrainState(**state.parts, extra=state.extra, files=state.files).capture()
    if is_quick is not None:
        assert (state._recipes == before) is is_quick, "the other way was gone"
    assert json.loads(found.tree_text) == found.tree == fresh.tree
    assert found.tree_text == fresh.tree_text == json.dumps(fresh.tree)
    assert list(found.specs or ()) == list(fresh.specs or ())
    assert specs(found) == specs(fresh)
    assert (found.shared, found.files, found.parts) == (fresh.shared, fresh.files, fresh.parts)
    for one, other in [
        *((found.tensors[group], fresh.tensors[group]) for group in fresh.tensors),
        (found.own, fresh.own),
    ]:
        assert list(one) == list(other)
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor), name
            assert type(one[name]) is type(tensor), name
            assert one[name].shape == tensor.shape, name


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw with two groups": lambda parameters: torch.optim.AdamW(
        [{"params": each, "lr": 0.1 * (i + 1)} for i, each in enumerate(parameters)]
    ),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=2),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_repeated_capture_equals_a_first_one(make: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    extra = {
        "history": [1.0], "ema": {"w": torch.ones(2), "n": 0}, "mixed": [torch.zeros(1), (2, torch.ones(1), None)],
        "table": np.arange(3.0), "1": 1, "": float("nan"), "$": {1: torch.ones(1), "x": 3},
    }  # fmt: skip
    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler, extra=extra)
    state.capture()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = model(torch.randn(4, 3)).square().sum()
        found.backward()
        return found

    for i in range(3):  # the first step makes the optimizer's state
        optimizer.step(loss)
        scheduler.step()
        state.extra["history"].append(float(i))
        state.extra["ema"]["n"] = i
        assert_captured_as_if_for_the_first_time(state)
    if not isinstance(optimizer, torch.optim.LBFGS):  # that keeps lists which grow
        optimizer.param_groups[0]["lr"] = 7.0
        assert_captured_as_if_for_the_first_time(state, is_quick=True)


CHANGES: dict[str, Callable[[TrainState, nn.Module, torch.optim.Optimizer], object]] = {
    "a number becomes a truth": lambda state, *_: state.extra["d"].update(one=True),
    "a number becomes a tensor": lambda state, *_: state.extra["d"].update(one=torch.ones(1)),
    "a tensor becomes a number": lambda state, *_: state.extra["d"].update(w=1),
    "a tensor becomes an array": lambda state, *_: state.extra["d"].update(w=np.ones(2)),
    "an array of another shape": lambda state, *_: state.extra.update(table=np.arange(4.0)),
    "a key comes": lambda state, *_: state.extra.update(new=torch.ones(1)),
    "a key goes": lambda state, *_: state.extra.pop("d"),
    "another order": lambda state, *_: state.extra.update(d=state.extra.pop("d")),
    "another key": lambda state, *_: state.extra.update(d={"v": torch.ones(2), "one": 1}),
    "another kind of key": lambda state, *_: state.extra["by number"].update({1: state.extra["by number"].pop(True)}),
    "a list grows": lambda state, *_: state.extra["l"].append(torch.ones(1)),
    "a list becomes a tuple": lambda state, *_: state.extra.update(l=tuple(state.extra["l"])),
    "another type in place": lambda state, model, _: model.one.to(torch.float64),
    "another shape in place": lambda state, model, _: setattr(model.one.bias, "data", torch.ones(5)),
    "a hook that gives copies": lambda state, model, _: model.register_state_dict_post_hook(
        lambda module, content, prefix, __: content.update({key: value.detach() * 2 for key, value in content.items()})
    ),
    "a hook of the optimizer": lambda state, _, optimizer: optimizer.register_state_dict_post_hook(
        lambda __, content: {**content, "mine": torch.ones(3)}
    ),
    "a group of parameters more": lambda state, _, optimizer: optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(2))]}
    ),
    "a parameter becomes a buffer": lambda state, model, _: swap_for_buffer(model),
    "files": lambda state, *_: state.files.update(a=b"x"),
}


def swap_for_buffer(model: nn.Module) -> None:
    bias = model.two.bias
    del model.two.bias
    model.two.register_buffer("bias", bias.detach().clone())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_capture_notices_every_change(change: Callable[..., object]) -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer)
    extra = {
        "d": {"w": torch.ones(2), "one": 1}, "table": np.arange(3.0), "l": [torch.ones(1)],
        "by number": {True: torch.ones(1)},
    }  # fmt: skip
    state = TrainState(model=model, optimizer=optimizer, extra=extra)
    state.capture()
    assert_captured_as_if_for_the_first_time(state, is_quick=True)
    change(state, model, optimizer)
    assert_captured_as_if_for_the_first_time(state)
    assert_captured_as_if_for_the_first_time(state)


Values = st.recursive(
    st.sampled_from([None, True, 1, 1.0, "a", float("inf"), torch.float16])
    | st.integers(0, 2).map(torch.ones)
    | st.integers(0, 2).map(np.ones),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "$c", 0, 1, 2.5]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(Values, Values)
def test_any_value_after_any_other_is_captured_as_it_is(one: Any, other: Any) -> None:
    state = TrainState(extra={"value": one})
    state.capture()
    state.extra["value"] = other
    assert_captured_as_if_for_the_first_time(state)
    assert_captured_as_if_for_the_first_time(state)


def test_a_capture_keeps_no_tensor_alive() -> None:
    state = TrainState(extra={"w": torch.ones(3)})
    state.capture()
    gone = weakref.ref(state.extra["w"])
    state.extra["w"] = torch.zeros(3)
    assert gone() is None


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
