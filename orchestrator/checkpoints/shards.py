"""Tensors that are spread over several ranks: torch's DTensor, as `fully_shard` and tensor parallelism make them.

Importing this takes half a second: who has such a tensor has paid for it already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from orchestrator.checkpoints.tree import NotStorable

Box = tuple[tuple[int, int], ...]
"""Where a part lies in the whole: begin and end in each dimension."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank's part of a tensor lies."""

    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    is_split: bool
    """Else every rank has all of it."""
    holders: tuple[int, ...]
    """The ranks that have this part, in an order that is the same for all parts of a tensor."""
    mesh: DeviceMesh
    placements: tuple[Any, ...]

    @property
    def box(self) -> Box:
        return tuple((begin, begin + size) for begin, size in zip(self.offsets, self.shape, strict=True))

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part, in memory of its own."""
        return whole[tuple(slice(begin, end) for begin, end in self.box)].clone()

    def spread(self, part: torch.Tensor) -> DTensor:
        """The whole, of which `part` is this rank's. Sends nothing."""
        shape = torch.Size(self.full_shape)
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=shape, stride=_strides(self.full_shape)
        )


def is_spread(tensor: object) -> bool:
    return isinstance(tensor, DTensor)


def is_everywhere(tensor: DTensor) -> bool:
    """Every rank that has some of it has all of it."""
    return all(type(kind) is Replicate for kind in tensor.placements)


def local(tensor: DTensor) -> torch.Tensor:
    """This rank's part, the living one; all of what has no elements."""
    with torch.no_grad():
        return tensor.to_local() if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)


def whole(tensor: DTensor) -> torch.Tensor:
    """All of it, put together. Collective."""
    with torch.no_grad():
        return tensor.full_tensor()


def place_of(tensor: DTensor, name: str) -> Place:
    """Raises NotStorable for one whose part is no box, that is a sum still to be made, or that some ranks do not
    have."""
    return place(tuple(tensor.shape), tensor.device_mesh, tensor.placements, name)


def place(full_shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Any], name: str) -> Place:
    """The place of this rank's part in a tensor of that shape, spread that way. Raises as `place_of` does."""
    kinds = tuple(placements)
    for kind in kinds:
        if type(kind) not in (Shard, Replicate):
            raise NotStorable(name, "DTensor", f"it is spread as {kind}, and only Shard and Replicate can be stored")
    if dist.is_initialized() and mesh.size() != dist.get_world_size():
        why = f"it lies on {mesh.size()} of {dist.get_world_size()} ranks, and every rank must have a part of it"
        raise NotStorable(name, "DTensor", why)
    return _place(full_shape, mesh, kinds)


@functools.lru_cache(maxsize=1 << 14)
def _place(full_shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...]) -> Place:
    shape, offsets = compute_local_shape_and_global_offset(full_shape, mesh, placements)
    if math.prod(shape) == 0:  # torch says one past the end of another dimension's part, now and then
        offsets = (0,) * len(full_shape)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every rank is in the mesh
    splits = [type(kind) is Shard and mesh.size(i) > 1 for i, kind in enumerate(placements)]
    index = tuple(at if is_split else slice(None) for at, is_split in zip(coordinate, splits, strict=True))
    holders = mesh.mesh[index].flatten().tolist()
    return Place(
        full_shape=full_shape, shape=tuple(shape), offsets=tuple(offsets),
        is_split=any(splits) and math.prod(full_shape) > 0,
        holders=tuple(map(int, holders)), mesh=mesh, placements=placements,
    )  # fmt: skip


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
