"""The state of a training as named tensors and a JSON tree, and back. No pickle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.checkpoints.tree import pack, unpack
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
    """A state at one moment. Its tensors share memory with the living ones: write it before training goes on."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """Group -> name -> tensor. The model's names are those of its `state_dict`."""
    tree: Mapping[str, Any]
    """Part -> JSON; tensors are named in it."""


class TrainState:
    """What a checkpoint holds: `model`, `optimizer`, `scheduler`, `scaler`, `loader`, and anything else by name.

    Each may be an object with `state_dict()` and `load_state_dict()`, or a dict of such objects (two models, say).
    Extras may also be tensors, restored in place, or plain values: keep those in `state.extra`, where the restored
    value appears. The state of model, optimizer, scheduler, scaler and extras is taken to be the same on every rank:
    rank 0's is saved.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        **extra: Any,
    ) -> None:
        named = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        self._parts = {part: value for part, value in named.items() if value is not None}
        self.loader = loader
        self.extra: dict[str, Any] = extra

    def capture(self) -> Snapshot:
        """Raises NotStorable naming a value that would need pickle."""
        tensors: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
        tree = {}
        for part, value in {**self._parts, "extra": self.extra}.items():
            into = tensors["model" if part == "model" else "optim"]
            tree[part] = pack(_content(value), _Collector(into), "" if part == "model" else part)
        return Snapshot(tensors=tensors, tree=tree)

    def apply(self, snapshot: Snapshot) -> None:
        """Puts a snapshot's values into the living objects. Raises CheckpointMismatch."""
        parts = {**self._parts, "extra": self.extra}
        _same_names("state", parts, snapshot.tree)
        _same_names("extra", self.extra, snapshot.tree["extra"], both=False)
        for part, value in parts.items():
            tensors = snapshot.tensors["model" if part == "model" else "optim"]
            _load(value, unpack(snapshot.tree[part], tensors.__getitem__), part)

    def loader_state(self) -> Any:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None


class _Collector:
    """A Put that gathers tensors under unique names."""

    def __init__(self, into: dict[str, torch.Tensor]) -> None:
        self._into = into

    def __call__(self, path: str, tensor: torch.Tensor) -> str:
        name, n = path, 2
        while name in self._into:
            name, n = f"{path}~{n}", n + 1
        self._into[name] = tensor
        return name


def _content(value: Any) -> Any:
    """The value with `state_dict()` in place of every object that has one."""
    if hasattr(value, "state_dict"):
        return _bare(value).state_dict()
    if isinstance(value, Mapping):
        return {key: _content(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_content(item) for item in value)
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
