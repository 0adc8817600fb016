"""Saves as trainers seal them, without torch: layouts, jobs, and bytes that can be told again."""

from __future__ import annotations

import random
from pathlib import Path

from orchestrator.checkpoints.commit import draft_of
from orchestrator.checkpoints.image import TensorSpec
from orchestrator.checkpoints.job import KeepRules, Layout, SaveJob
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.plan import layout, owners
from orchestrator.checkpoints.slab import Slot

Heads = tuple[bytes, ...]


def plan(rank: int = 0, world_size: int = 1, *, count: int = 7, size: int = 1500) -> tuple[Layout, Heads]:
    """`count` tensors of about `size` bytes in two groups."""
    groups = {
        group: [TensorSpec(f"{group}.{n}", "U8", (size + 13 * n,), size + 13 * n, is_shared=True) for n in range(count)]
        for group in ("model", "optim")
    }
    return layout(groups, owners(groups, world_size), rank, world_size)


def content(name: str, size: int, seed: int = 0) -> bytes:
    """The bytes of one tensor."""
    return random.Random(f"{seed}/{name}").randbytes(size)


def job(
    storage: Path | str, step: int = 1, *, attempt: int = 1, rank: int = 0, world_size: int = 1,
    keep: KeepRules | None = None, spools: str = "", wait_for_ranks: float = 300.0, run: str = "r1",
) -> SaveJob:  # fmt: skip
    name = f"step_{step:08d}-a{attempt}"
    draft = None
    if rank == 0:
        manifest = Manifest(
            run=run, name=name, attempt=attempt, step=step, epoch=0, epoch_complete=False, world_size=world_size,
            seed=0, config_hash="", created=1000.0 + step, duration=0.0, files=(), metrics={"accuracy": step / 100},
        )  # fmt: skip
        draft = draft_of(manifest)
    return SaveJob(
        save=f"{step:032x}", storage_url=str(storage), name=name, run=run, attempt=attempt,
        rank=rank, world_size=world_size, content={"rank": rank}, texts={"state.json": "{}"} if rank == 0 else {},
        draft=draft, keep=keep or KeepRules(last=0), sealed_at=1000.5 + step, spool_directory=spools,
        wait_for_ranks=wait_for_ranks,
    )  # fmt: skip


def put(slot: Slot, what: tuple[Layout, Heads], seed: int = 0) -> int:
    """Begins and fills; gives the generation."""
    layout, heads = what
    generation = slot.begin()
    slot.write_layout(layout, heads)
    space = slot.space(layout)
    for image, start in zip(layout.images, layout.starts, strict=True):
        for piece in image.pieces:
            at = start + piece.start
            space[at : at + piece.size_bytes] = content(piece.name, piece.size_bytes, seed)
    return generation


def is_whole(directory: Path, what: tuple[Layout, Heads], seed: int = 0) -> bool:
    """Whether a checkpoint's files of one rank hold what `put` filled in."""
    layout, heads = what
    for image, head in zip(layout.images, heads, strict=True):
        expected = head + b"".join(content(piece.name, piece.size_bytes, seed) for piece in image.pieces)
        if (directory / image.path).read_bytes() != expected:
            return False
    return True
