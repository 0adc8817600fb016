"""Which rank writes what: a plan that every rank computes alike, and the files that follow from it.

Tensors that are the same on all ranks are divided: each rank writes about 1/N of their bytes. Everything else is
rank 0's. Pure: no torch, no storage.
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

Groups = Mapping[str, Sequence[TensorSpec]]
"""Group ("model", "optim") -> its tensors."""


def owners(groups: Groups, world_size: int, *, own_bytes: int | None = None) -> dict[str, int]:
    """`group/name` -> the rank that writes it. The largest first, to whoever has least so far; rank 0 begins with
    `own_bytes`, by default the bytes of what is its alone.

    The ranks differ by no more than the largest tensor, unless what is rank 0's alone is more than its share.
    """
    alone = _sorted(groups, is_shared=False)
    loads = [(0, rank) for rank in range(1, world_size)]
    loads.append((sum(spec.size_bytes for _, spec in alone) if own_bytes is None else own_bytes, 0))
    heapq.heapify(loads)
    plan = {key: 0 for key, _ in alone}
    for key, spec in sorted(_sorted(groups, is_shared=True), key=lambda item: (-item[1].size_bytes, item[0])):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + spec.size_bytes, rank))
        plan[key] = rank
    return plan


def own_bytes(groups: Groups) -> int:
    """Bytes of what is rank 0's alone."""
    return sum(spec.size_bytes for specs in groups.values() for spec in specs if not spec.is_shared)


def plan_sha256(groups: Groups, world_size: int) -> str:
    """Equal on two ranks if, and only if, they divide the same tensors."""
    content = [world_size, *([key, *_described(spec)] for key, spec in _sorted(groups, is_shared=True))]
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
    return {key: f"{spec.dtype} {list(spec.shape)}" for key, spec in _sorted(groups, is_shared=True)}


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


def _sorted(groups: Groups, *, is_shared: bool) -> list[tuple[str, TensorSpec]]:
    found = ((f"{group}/{spec.name}", spec) for group, specs in groups.items() for spec in specs)
    return sorted((item for item in found if item[1].is_shared == is_shared), key=lambda item: item[0])


def _described(spec: TensorSpec) -> list[object]:
    return [spec.dtype, list(spec.shape), spec.size_bytes]
