"""Which rank writes what: a plan that every rank computes alike, and the files that follow from it.

Tensors that are the same on all ranks are divided: each rank writes about 1/N of their bytes. Of a split tensor every
rank writes its part, or, if several have the same part, one of them. Everything else is rank 0's. Pure: no torch, no
storage.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence

from orchestrator.checkpoints.image import Image, TensorSpec, image, raw_image
from orchestrator.checkpoints.job import Layout

OWN = "rank"
"""Group of the tensors that a rank has otherwise than the others."""
SIDE = "side"
"""Folder of the side files."""
NOBODY = -1
"""The rank of what nobody writes."""

Groups = Mapping[str, Sequence[TensorSpec]]
"""Group ("model", "optim") -> its tensors."""


def owners(groups: Groups, world_size: int, *, own_bytes: int | None = None) -> dict[str, int]:
    """`group/name` -> the rank that writes it. The largest first, to whoever has least so far; rank 0 begins with
    `own_bytes`, by default the bytes of what is its alone. Of a part of a split tensor: the rank that writes this part,
    NOBODY if it is empty.

    The ranks differ by no more than the largest tensor, unless what is rank 0's alone is more than its share. What all
    ranks have of split tensors is about the same, and does not count.
    """
    every = _every(groups)
    plan = {key: 0 for key, spec in every if _is_alone(spec)}
    begin = sum(spec.size_bytes for _, spec in every if _is_alone(spec)) if own_bytes is None else own_bytes
    loads = [(begin, 0), *((0, rank) for rank in range(1, world_size))]
    heapq.heapify(loads)
    copies: dict[int, list[tuple[int, int]]] = {}
    """Of tensors that exist so many times: bytes that each copy's holders write, and its number."""
    for key, spec in sorted(every, key=lambda item: (-item[1].full_bytes, item[0])):
        if spec.is_shared:
            plan[key] = _least(loads, spec.full_bytes)
        elif not _is_alone(spec):
            copy = _least(
                copies.setdefault(len(spec.holders), [(0, i) for i in range(len(spec.holders))]), spec.full_bytes
            )
            plan[key] = spec.holders[copy] if spec.size_bytes else NOBODY
    return plan


def _least(loads: list[tuple[int, int]], more_bytes: int) -> int:
    """Whoever has least, who then has more."""
    load, number = loads[0]
    heapq.heapreplace(loads, (load + more_bytes, number))
    return number


def own_bytes(groups: Groups) -> int:
    """Bytes of what is rank 0's alone."""
    return sum(spec.size_bytes for _, spec in _every(groups) if _is_alone(spec))


def size_bytes(groups: Groups) -> int:
    """Bytes of everything, on all ranks together."""
    return sum(spec.full_bytes for _, spec in _every(groups))


def plan_sha256(groups: Groups, world_size: int) -> str:
    """Equal on two ranks if, and only if, they divide the same tensors."""
    content = [world_size, *([key, *_described(spec)] for key, spec in _divided(groups))]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The first divided tensor, by name, that two ranks describe differently, as each of them does ("absent" where
    it has none). Both are what `described` gave."""
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            return key, one.get(key, "absent"), other.get(key, "absent")
    return None


def described(groups: Groups) -> dict[str, str]:
    """Every divided tensor in words. Example: {"model/weight": "F32 [2, 3]"}."""
    return {
        key: f"{spec.dtype} {list(_whole(spec))}" + (" in parts" if spec.full_shape is not None else "")
        for key, spec in _divided(groups)
    }


def layout(
    groups: Groups,
    owners: Mapping[str, int],
    rank: int,
    world_size: int,
    *,
    files: Mapping[str, int] | None = None,
) -> tuple[Layout, tuple[bytes, ...]]:
    """The files of one rank and their heads. `files`: name -> bytes of the side files, which rank 0 writes.

    A rank that has no tensors of a group writes no file for it.
    """
    images: list[Image] = []
    heads: list[bytes] = []
    for group, specs in groups.items():
        mine = [spec for spec in specs if owners[f"{group}/{spec.name}"] == rank]
        if mine:
            made, head = image(tensor_file(group, rank, world_size), mine)
            images.append(made)
            heads.append(head)
    for name, size_bytes in sorted((files or {}).items()) if rank == 0 else ():
        images.append(raw_image(f"{SIDE}/{name}", size_bytes))
        heads.append(b"")
    return Layout.of(tuple(images)), tuple(heads)


def tensor_file(group: str, rank: int, world_size: int) -> str:
    """Example: tensor_file("model", 0, 2) == "model/model-00001-of-00002.safetensors"."""
    return f"{group}/{group}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def _every(groups: Groups) -> list[tuple[str, TensorSpec]]:
    """By name."""
    found = ((f"{group}/{spec.name}", spec) for group, specs in groups.items() for spec in specs)
    return sorted(found, key=lambda item: item[0])


def _divided(groups: Groups) -> list[tuple[str, TensorSpec]]:
    return [(key, spec) for key, spec in _every(groups) if not _is_alone(spec)]


def _is_alone(spec: TensorSpec) -> bool:
    """Rank 0's."""
    return not spec.is_shared and spec.full_shape is None


def _whole(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape if spec.full_shape is None else spec.full_shape


def _described(spec: TensorSpec) -> list[object]:
    """The same on every rank that has the same tensor or another part of it."""
    parts = [] if spec.full_shape is None else [len(spec.holders)]
    return [spec.dtype, list(_whole(spec)), spec.full_bytes, *parts]
