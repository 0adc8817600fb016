"""Who takes part, and how much is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OURS = ("ours eager", "ours overlap")
FSYNC = ("torch.save + fsync", "dcp.save", "dcp.async_save THREAD", "dcp.async_save PROCESS")
PAGE_CACHE = ("torch_checkpointing", "Lightning AsyncCheckpointIO")
ON_RAY = ("Ray Train SYNC", "Ray Train ASYNC", "Ray Train ASYNC + async_save")
OURS_ON_RAY = "ours eager in Ray Train"
"""Beside Ray's own, in the same workers: these are compared with it."""
EVERYONE = (*OURS, *FSYNC, *PAGE_CACHE, *ON_RAY)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    python: Path
    directory: Path
    size_mib: int
    rounds: int
    saves: int
    """Of ours and of the floor, in each round."""
    peer_rounds: int
    """Rounds in which the others take part."""
    peer_saves: int
    lost_rounds: int
    contenders: Sequence[str]
    """Those that are asked for, ours included."""


def ranks_of(world_size: int) -> str:
    return f"{world_size} rank{'s' * (world_size > 1)}"
