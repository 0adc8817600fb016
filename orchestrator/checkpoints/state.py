"""The state of a training as named tensors and a JSON tree, and back. No pickle."""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from orchestrator.checkpoints.image import TensorSpec
from orchestrator.checkpoints.tensorfile import NAMES
from orchestrator.checkpoints.tree import NotStorable, pack, unpack
from orchestrator.errors import CheckpointError, UserError

GROUPS = ("model", "optim")
"""Folders of a checkpoint: the model's tensors, and everything else's."""


class CheckpointMismatch(CheckpointError, UserError):
    """A valid checkpoint that belongs to another model, optimizer or set of parts."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(part, why)
        self.part, self.why = part, why

    def __str__(self) -> str:
        return (
            f"The checkpoint does not fit this train function: {self.part}: {self.why} "
            "Start a new run, or go back to the code that wrote it."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state at one moment. Its tensors are the living ones: write it before training goes on."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """Group -> name -> tensor. The model's names are those of its `state_dict`."""
    tree: Mapping[str, Any]
    """Part -> JSON; tensors are named in it."""
    shared: frozenset[str] = frozenset()
    """`group/name` of parameters and of the optimizer's tensors: the same on every rank, so that any may write them."""
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of the model that may differ from rank to rank, besides: what rank 0 has is in `tensors`."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Side files by name."""


class TrainState:
    """What a checkpoint holds: `model`, `optimizer`, `scheduler`, `scaler`, `loader`, and anything else by name.

    Each may be an object with `state_dict()` and `load_state_dict()`, or a dict of such objects (two models, say).
    Extras may also be tensors, restored in place, or plain values: keep those in `state.extra`, where the restored
    value appears. `files` are bytes that the caller made, by name, stored as they are and found in `state.files` after
    a restore; what they mean is the caller's to know.

    Parameters and the optimizer's tensors are taken to be the same on every rank, which share the work of writing
    them; of buffers, scheduler, scaler, extras and files, rank 0's are saved.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        extra: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        **more: Any,
    ) -> None:
        """`extra` and further arguments are the same: anything else by name. Raises UserError for a name in both."""
        named = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        self._parts = {part: value for part, value in named.items() if value is not None}
        self.loader = loader
        if twice := sorted(set(extra or {}) & set(more)):
            raise UserError(f"run.state: {', '.join(twice)} is given in `extra` and as an argument.")
        self.extra: dict[str, Any] = {**(extra or {}), **more}
        self.files: dict[str, bytes] = _side_files(files or {})

    def capture(self, *, weights_only: bool = False) -> Snapshot:
        """`weights_only` takes the model and nothing else. Raises NotStorable naming a value that would need pickle."""
        tensors: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
        shared: set[str] = set()
        tree = {}
        for part, value in {**self._parts, "extra": self.extra}.items():
            if weights_only and part != "model":
                continue
            group = "model" if part == "model" else "optim"
            collect = _Collector(tensors[group], group, shared, is_shared=part == "optimizer")
            tree[part] = pack(
                _content(value, keeps_parameters=part == "model"), collect, "" if group == "model" else part
            )
        own = {
            name: tensors["model"][name] for name in _own_buffers(self._parts.get("model")) & tensors["model"].keys()
        }
        files = {} if weights_only else dict(self.files)
        return Snapshot(
            tensors=tensors, tree=tree, shared=frozenset(shared), own={} if weights_only else own, files=files
        )

    def apply(self, snapshot: Snapshot) -> None:
        """Puts a snapshot's values into the living objects. Raises CheckpointMismatch."""
        parts = {**self._parts, "extra": self.extra}
        _same_names("state", parts, snapshot.tree)
        _same_names("extra", self.extra, snapshot.tree["extra"], both=False)
        for part, value in parts.items():
            tensors = snapshot.tensors["model" if part == "model" else "optim"]
            _load(value, unpack(snapshot.tree[part], tensors.__getitem__), part)
        self.files = dict(snapshot.files)

    def loader_state(self) -> Any:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None


class _Collector:
    """A Put that gathers tensors under unique names, and notes which of them are the same on every rank."""

    def __init__(self, into: dict[str, torch.Tensor], group: str, shared: set[str], *, is_shared: bool) -> None:
        self._into, self._group, self._shared, self._is_shared = into, group, shared, is_shared

    def __call__(self, path: str, tensor: torch.Tensor) -> str:
        name, n = path, 2
        while name in self._into:
            name, n = f"{path}~{n}", n + 1
        # A hook may have put a copy in a parameter's place: that is saved too, by rank 0.
        if self._is_shared or (self._group == "model" and type(tensor) is torch.nn.Parameter):
            self._shared.add(f"{self._group}/{name}")
        self._into[name] = tensor.detach() if tensor.requires_grad else tensor
        return name


def specs(snapshot: Snapshot) -> dict[str, list[TensorSpec]]:
    """What the plan needs to know of each tensor. Raises NotStorable for a type that safetensors has not."""
    shared = snapshot.shared
    return {
        group: [
            _spec(name, tensor.dtype, tensor.shape, f"{group}/{name}" in shared) for name, tensor in tensors.items()
        ]
        for group, tensors in snapshot.tensors.items()
        if tensors
    }


@functools.lru_cache(maxsize=1 << 16)
def _spec(name: str, dtype: torch.dtype, shape: torch.Size, is_shared: bool) -> TensorSpec:
    """The same object for the same tensor at every save: to compare it costs nothing."""
    kind = NAMES.get(dtype)
    if kind is None:
        raise NotStorable(name, f"tensor of {dtype}", "safetensors has no such type")
    size_bytes = shape.numel() * dtype.itemsize
    return TensorSpec(name=name, dtype=kind, shape=tuple(shape), size_bytes=size_bytes, is_shared=is_shared)


def _own_buffers(model: Any, prefix: str = "") -> set[str]:
    """Names, in the group "model", of buffers that DistributedDataParallel was told not to copy from rank 0."""
    if isinstance(model, Mapping):
        return set().union(*(_own_buffers(each, f"{prefix}{name}.") for name, each in model.items()))
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel) or model.broadcast_buffers:
        return set()
    return {f"{prefix}{name}" for name, _ in _bare(model).named_buffers()}


def _side_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    for name, data in files.items():
        if not isinstance(data, bytes) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UserError(
                f"run.state(files=…): {name!r} must be a plain file name, and its content bytes. "
                "Checkpoints pickle nothing: make the bytes yourself, json.dumps(…).encode() for example."
            )
    return dict(files)


def _content(value: Any, *, keeps_parameters: bool = False) -> Any:
    """The value with `state_dict()` in place of every object that has one. `keeps_parameters`: a module's parameters
    are given themselves, so that they can be told from its buffers."""
    if hasattr(value, "state_dict"):
        bare = _bare(value)
        if keeps_parameters and isinstance(bare, torch.nn.Module):
            return bare.state_dict(keep_vars=True)
        return bare.state_dict()
    if isinstance(value, Mapping):
        return {key: _content(item, keeps_parameters=keeps_parameters) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_content(item, keeps_parameters=keeps_parameters) for item in value)
    return value


def _load(current: Any, stored: Any, path: str) -> Any:
    """Loads into `current` what can be changed in place; gives what should stand in its place."""
    if hasattr(current, "load_state_dict"):
        _load_object(_bare(current), stored, path)
        return current
    if isinstance(current, torch.Tensor):
        if not isinstance(stored, torch.Tensor) or stored.shape != current.shape:
            raise CheckpointMismatch(
                path, f"has shape {tuple(current.shape)} here, {_shown(stored)} in the checkpoint."
            )
        with torch.no_grad():
            current.copy_(stored)
        return current
    if isinstance(current, MutableMapping) and isinstance(stored, Mapping):
        _same_names(path, {k: v for k, v in current.items() if hasattr(v, "load_state_dict")}, stored, both=False)
        for key, item in stored.items():
            current[key] = _load(current.get(key), item, f"{path}.{key}")
        return current
    if type(current) in (list, tuple) and any(hasattr(item, "load_state_dict") for item in current):
        if not isinstance(stored, list | tuple) or len(stored) != len(current):
            raise CheckpointMismatch(path, f"has {len(current)} entries here, {_shown(stored)} in the checkpoint.")
        for i, (item, kept) in enumerate(zip(current, stored, strict=True)):
            _load(item, kept, f"{path}.{i}")
        return current
    return stored


def _load_object(target: Any, stored: Any, path: str) -> None:
    if isinstance(target, torch.nn.Module):
        # Versions of the modules' layouts: torch keeps them in an attribute, which no file format but its own carries.
        stored = OrderedDict(stored)
        stored._metadata = getattr(target.state_dict(), "_metadata", {})
    try:
        target.load_state_dict(stored)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointMismatch(path, f"{error}") from error


def _bare(value: Any) -> Any:
    """The module inside DistributedDataParallel and torch.compile, so that names do not depend on either."""
    while True:
        if isinstance(value, torch.nn.parallel.DistributedDataParallel):
            value = value.module
        elif isinstance(value, torch.nn.Module) and hasattr(value, "_orig_mod"):
            value = value._orig_mod
        else:
            return value


def _same_names(path: str, here: Mapping[str, Any], stored: Mapping[str, Any], *, both: bool = True) -> None:
    missing = sorted(set(here) - set(stored))
    if missing:
        known = ", ".join(sorted(stored))
        raise CheckpointMismatch(path, f"{', '.join(missing)} is not in the checkpoint, which has {known}.")
    unused = sorted(set(stored) - set(here))
    if both and unused:
        raise CheckpointMismatch(
            path, f"the checkpoint also has {', '.join(unused)}, which run.state(…) was not given."
        )


def _shown(stored: Any) -> str:
    return f"shape {tuple(stored.shape)}" if isinstance(stored, torch.Tensor) else type(stored).__name__
