"""The state of a training as named tensors and a JSON tree, and back. No pickle."""

from __future__ import annotations

import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.checkpoints.hyper import Kept
from orchestrator.checkpoints.image import TensorSpec
from orchestrator.checkpoints.recipe import Changed, Step, recipe, text_of
from orchestrator.checkpoints.tensorfile import NAMES
from orchestrator.checkpoints.tree import PLAIN, NotStorable, Put, pack, unpack
from orchestrator.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from orchestrator.checkpoints.shards import Box, Place

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
    """Group -> name -> tensor: parameters among them. The model's names are those of its `state_dict`. Of a tensor that
    is spread over ranks, this rank's part."""
    tree: Mapping[str, Any]
    """Part -> JSON; tensors are named in it."""
    shared: frozenset[str] = frozenset()
    """`group/name` of parameters and of the optimizer's tensors: the same on every rank, so that any may write them."""
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of the model that may differ from rank to rank, besides: what rank 0 has is in `tensors`."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Side files by name."""
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """`group/name` of those in `tensors` that are a part of something -> the shape of the whole."""
    spread: Mapping[str, Any] = field(default_factory=dict)
    """`group/name` -> the DTensor that is to be put together before it is written: see `gathered`."""
    specs: Mapping[str, Sequence[TensorSpec]] | None = None
    """Group -> what the plan needs to know, if it is known already."""
    tree_text: str = ""
    """`tree` as JSON, if it is known already."""

    def gathered(self, mine: Collection[str]) -> dict[str, torch.Tensor]:
        """Puts together all that is `spread`, and keeps what is named: no more than one other tensor is in memory at a
        time. Collective, if there is any: with the same tensors on every rank."""
        kept = {}
        for key, tensor in self.spread.items():
            whole = _shards().whole(tensor)
            if key in mine:
                kept[key] = whole
        return kept


class TrainState:
    """What a checkpoint holds: `model`, `optimizer`, `scheduler`, `scaler`, `loader`, and anything else by name.

    Each may be an object with `state_dict()` and `load_state_dict()`, or a dict of such objects (two models, say).
    Extras may also be tensors, restored in place, or plain values: keep those in `state.extra`, where the restored
    value appears. `files` are bytes that the caller made, by name, stored as they are and found in `state.files` after
    a restore; what they mean is the caller's to know.

    Parameters and the optimizer's tensors are taken to be the same on every rank, which share the work of writing
    them; of buffers, scheduler, scaler, extras and files, rank 0's are saved. Of a DTensor every rank saves its part,
    and of a model that has some its own buffers.
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
        self._recipes: dict[tuple[bool, bool], _Recipe] = {}

    @property
    def parts(self) -> Mapping[str, Any]:
        """What was given as `model`, `optimizer`, `scheduler` and `scaler`."""
        return self._parts

    def capture(self, *, weights_only: bool = False, full: bool = False) -> Snapshot:
        """`weights_only` takes the model and nothing else; `full` takes tensors that are spread over ranks (DTensor) as
        wholes, which are put together later: see `Snapshot.gathered`.

        A second capture of the same tensors, whatever their values, takes a fraction of the first one's time. Raises
        NotStorable naming a value that would need pickle.
        """
        contents = {
            part: _content(value, keeps_parameters=part == "model")
            for part, value in {**self._parts, "extra": self.extra}.items()
            if part == "model" or not weights_only
        }
        key = weights_only, full
        known = self._recipes.pop(key, None)
        snapshot = _captured_again(contents, known) if known is not None else None
        if snapshot is None:
            snapshot, known = _captured(contents, is_full=full)
        if known is not None:
            self._recipes[key] = known
        if weights_only:
            return snapshot
        tensors = snapshot.tensors["model"]
        spread = [*snapshot.parts, *snapshot.spread]
        own = {name: tensors[name] for name in _own_buffers(self._parts.get("model"), spread) & tensors.keys()}
        return replace(snapshot, own=own, files=dict(self.files)) if own or self.files else snapshot

    def boxes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Box]:
        """What this rank needs of a checkpoint whose tensors (`group/name`) have these shapes: of those that are not
        named, the whole."""
        return {key: place.box for key, place in self._places(shapes).items() if place.is_split}

    def apply(self, snapshot: Snapshot, *, keeps_settings: bool = False) -> None:
        """Puts a snapshot's values into the living objects. Sends nothing. Raises CheckpointMismatch. `keeps_settings`:
        what optimizers and schedulers were made with stays as it is here, see hyper.py."""
        parts = {**self._parts, "extra": self.extra}
        kept = Kept.of(parts) if keeps_settings else None
        _same_names("state", parts, snapshot.tree)
        _same_names("extra", self.extra, snapshot.tree["extra"], both=False)
        shapes = {
            f"{group}/{name}": snapshot.parts.get(f"{group}/{name}", tuple(tensor.shape))
            for group, tensors in snapshot.tensors.items()
            for name, tensor in tensors.items()
        }
        places = self._places(shapes)
        for part, value in parts.items():
            group = "model" if part == "model" else "optim"
            get = functools.partial(_placed, snapshot, group, places)
            _load(value, unpack(snapshot.tree[part], get), part)
        if kept is not None:
            kept.restore()
        self.files = dict(snapshot.files)

    def _places(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
        """Of the tensors that are spread over ranks here, those that have the same shape there. The optimizer's, which
        may not exist yet, are spread as their parameters are."""
        if not _are_any_spread():
            return {}
        shards, found = _shards(), {}
        for part, value in {**self._parts, "extra": self.extra}.items():
            group, path = ("model", "") if part == "model" else ("optim", part)
            for name, tensor in _named(_content(value, keeps_parameters=part == "model"), path):
                key = f"{group}/{name}"
                if _is_spread(tensor) and shapes.get(key) == tuple(tensor.shape):
                    found[key] = shards.place_of(tensor, key)
            for prefix, parameter in _optimized(value, path):
                start = f"{group}/{prefix}."
                for key in [key for key in shapes if key.startswith(start) and key not in found]:
                    if shapes[key] == tuple(parameter.shape):
                        found[key] = shards.place_of(parameter, key)
                    elif shapes[key]:  # what was computed from one that is spread is spread as well
                        everywhere = [shards.Replicate()] * parameter.device_mesh.ndim
                        found[key] = shards.place(shapes[key], parameter.device_mesh, everywhere, key)
        return found

    def loader_state(self) -> Any:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None


def specs(snapshot: Snapshot) -> Mapping[str, Sequence[TensorSpec]]:
    """What the plan needs to know of each tensor. Raises NotStorable for a type that safetensors has not."""
    if snapshot.specs is not None:
        return snapshot.specs
    return {
        group: [
            _spec(name, tensor.dtype, tensor.shape, f"{group}/{name}" in snapshot.shared)
            for name, tensor in tensors.items()
        ]
        for group, tensors in snapshot.tensors.items()
        if tensors
    }


# -- capturing -----------------------------------------------------------------------------------------------


class _Collector:
    """Gathers tensors under unique names, with what is to be known of each. `of` gives a Put for one part."""

    def __init__(self, *, is_full: bool) -> None:
        self._is_full = is_full
        self.tensors: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
        self.specs: dict[str, list[TensorSpec]] = {group: [] for group in GROUPS}
        self.met: dict[str, list[torch.Tensor]] = {group: [] for group in GROUPS}
        """As they were found; `tensors` are what is to be written."""
        self.spread: dict[str, Any] = {}

    def of(self, part: str) -> Put:
        group = _group(part)

        def put(path: str, tensor: torch.Tensor) -> str:
            name, n = path, 2
            while name in self.tensors[group]:
                name, n = f"{path}~{n}", n + 1
            # A hook may have put a copy in a parameter's place: that is saved too, by rank 0.
            is_shared = part == "optimizer" or (part == "model" and type(tensor) is torch.nn.Parameter)
            self.met[group].append(tensor)
            self.tensors[group][name], spec = self._taken(f"{group}/{name}", name, tensor, is_shared)
            self.specs[group].append(spec)
            return name

        return put

    def _taken(self, key: str, name: str, tensor: torch.Tensor, is_shared: bool) -> tuple[torch.Tensor, TensorSpec]:
        if not _is_spread(tensor):
            return tensor, _spec(name, tensor.dtype, tensor.shape, is_shared)
        shards = _shards()
        if self._is_full and not shards.is_everywhere(tensor):
            self.spread[key] = tensor
            return tensor, _spec(name, tensor.dtype, tensor.shape, True)
        place = shards.place_of(tensor, name)
        part = shards.local(tensor)
        if not place.is_split:
            return part, _spec(name, part.dtype, part.shape, True)
        if tuple(part.shape) != place.shape:
            raise NotStorable(name, "DTensor", f"this rank has {tuple(part.shape)} of it where {place.shape} belong")
        return part, replace(
            _spec(name, part.dtype, part.shape, False), offsets=place.offsets, full_shape=place.full_shape,
            holders=place.holders,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """A capture that was made, for the next one to follow. It keeps no tensor."""

    steps: Mapping[str, Step]
    """By part."""
    names: Mapping[str, Sequence[str]]
    """Group -> names of its tensors, in the order in which they are met."""
    kinds: Mapping[str, Sequence[type]]
    looks: Mapping[str, Sequence[Any]]
    """What each of them must look like for the rest to be right."""
    spread: Mapping[tuple[str, int], tuple[Any, Any, bool]]
    """Group and number of those that are spread over ranks -> how, and whether they are put together."""
    specs: Mapping[str, Sequence[TensorSpec]]
    shared: frozenset[str]
    parts: Mapping[str, tuple[int, ...]]


def _captured(contents: Mapping[str, Any], *, is_full: bool) -> tuple[Snapshot, _Recipe | None]:
    """The careful way: looks at everything. Raises NotStorable."""
    collected = _Collector(is_full=is_full)
    tree = {
        part: pack(content, collected.of(part), "" if part == "model" else part) for part, content in contents.items()
    }
    all_of_them = [(f"{group}/{spec.name}", spec) for group, each in collected.specs.items() for spec in each]
    snapshot = Snapshot(
        tensors=collected.tensors, tree=tree, tree_text=text_of(tree), spread=collected.spread,
        specs={group: each for group, each in collected.specs.items() if each},
        shared=frozenset(key for key, spec in all_of_them if spec.is_shared),
        parts={key: spec.full_shape for key, spec in all_of_them if spec.full_shape is not None},
    )  # fmt: skip
    try:
        steps = {part: recipe(content, tree[part]) for part, content in contents.items()}
    except Changed:  # then every capture is made this way
        return snapshot, None
    spread = {
        (group, i): (tensor.device_mesh, tensor.placements, f"{group}/{name}" in collected.spread)  # type: ignore[attr-defined]
        for group, met in collected.met.items()
        for i, (name, tensor) in enumerate(zip(collected.tensors[group], met, strict=True))
        if _is_spread(tensor)
    }
    return snapshot, _Recipe(
        steps=steps, names={group: list(tensors) for group, tensors in collected.tensors.items()},
        kinds={group: list(map(type, met)) for group, met in collected.met.items()},
        looks={group: list(map(_LOOK, met)) for group, met in collected.met.items()},
        spread=spread, specs=snapshot.specs or {}, shared=snapshot.shared, parts=snapshot.parts,
    )  # fmt: skip


_LOOK = attrgetter("shape", "dtype", "layout")


def _captured_again(contents: Mapping[str, Any], known: _Recipe) -> Snapshot | None:
    """The quick way; None if anything but values is not as it was."""
    if contents.keys() != known.steps.keys():
        return None
    met: dict[str, list[Any]] = {group: [] for group in GROUPS}
    try:
        for part, step in known.steps.items():
            step.follow(contents[part], met[_group(part)])
    except (Changed, NotStorable):
        return None
    for group, tensors in met.items():
        if list(map(type, tensors)) != known.kinds[group] or list(map(_LOOK, tensors)) != known.looks[group]:
            return None
    spread = {}
    for (group, i), (mesh, placements, is_gathered) in known.spread.items():
        tensor = met[group][i]
        if (tensor.device_mesh, tensor.placements) != (mesh, placements):
            return None
        if is_gathered:
            spread[f"{group}/{known.names[group][i]}"] = tensor
        else:
            met[group][i] = _shards().local(tensor)
    return Snapshot(
        tensors={group: dict(zip(known.names[group], tensors, strict=True)) for group, tensors in met.items()},
        tree={part: step.packed for part, step in known.steps.items()},
        tree_text="{" + ", ".join(f"{text_of(part)}: {step.text}" for part, step in known.steps.items()) + "}",
        shared=known.shared, specs=known.specs, parts=known.parts, spread=spread,
    )  # fmt: skip


def _group(part: str) -> str:
    return "model" if part == "model" else "optim"


@functools.lru_cache(maxsize=1 << 16)
def _spec(name: str, dtype: torch.dtype, shape: torch.Size, is_shared: bool) -> TensorSpec:
    kind = NAMES.get(dtype)
    if kind is None:
        raise NotStorable(name, f"tensor of {dtype}", "safetensors has no such type")
    size_bytes = shape.numel() * dtype.itemsize
    return TensorSpec(name=name, dtype=kind, shape=tuple(shape), size_bytes=size_bytes, is_shared=is_shared)


# -- tensors that are spread over ranks ----------------------------------------------------------------------


def _are_any_spread() -> bool:
    """Whether there can be a DTensor in this process. To import what knows them takes half a second."""
    return "torch.distributed.tensor" in sys.modules


def _is_spread(tensor: Any) -> bool:
    return type(tensor) not in PLAIN and _are_any_spread() and _shards().is_spread(tensor)


def _shards() -> ModuleType:
    from orchestrator.checkpoints import shards

    return shards


def _placed(snapshot: Snapshot, group: str, places: Mapping[str, Place], name: str) -> torch.Tensor:
    """A stored tensor as it is to be loaded: spread over the ranks if it is here."""
    tensor, key = snapshot.tensors[group][name], f"{group}/{name}"
    if (place := places.get(key)) is None:
        return tensor
    return place.spread(tensor if key in snapshot.parts else place.cut(tensor))


def _named(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What is in dicts and lists, with the names that `pack` gives it."""
    if isinstance(value, Mapping):
        at = f"{path}." if path else ""
        for key, item in value.items():
            yield from _named(item, f"{at}{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            yield from _named(item, f"{path}.{i}")
    else:
        yield path, value


def _optimized(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Of every parameter that is spread over ranks: what the names of its optimizer's tensors begin with."""
    for name, optimizer in _named(value, path):
        numbers = dict.fromkeys(p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        for i, parameter in enumerate(numbers):
            if _is_spread(parameter):
                yield f"{name}.state.{i}", parameter


def _own_buffers(model: Any, spread: Collection[str], prefix: str = "") -> set[str]:
    """Names, in the group "model", of buffers that nobody makes the same on every rank: those of models whose
    parameters are `spread` (`group/name`), and of a DistributedDataParallel that was told not to copy rank 0's."""
    if isinstance(model, Mapping):
        return set().union(*(_own_buffers(each, spread, f"{prefix}{name}.") for name, each in model.items()))
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        is_own = not model.broadcast_buffers
    else:
        is_own = isinstance(model, torch.nn.Module) and any(key.startswith(f"model/{prefix}") for key in spread)
    if not is_own:
        return set()
    names = {f"{prefix}{name}" for name, _ in _bare(model).named_buffers()}
    return names.difference(key.removeprefix("model/") for key in spread)


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
