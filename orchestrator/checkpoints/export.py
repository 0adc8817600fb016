"""Checkpoints in other programs' formats. Each reads and verifies the whole checkpoint first; the target appears when
it is complete.

The files of a checkpoint are safetensors already: export when a single file is wanted, or a format that pickles.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.reader import Stored, read
from orchestrator.checkpoints.tree import unpack
from orchestrator.errors import UserError


class TargetExists(UserError):
    """An export never replaces anything."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target

    def __str__(self) -> str:
        return f"{self.target} exists already. Remove it, or choose another name."


def to_pt(storage: Storage, manifest: Manifest, target: Path) -> None:
    """One file for `torch.load(…, weights_only=True)`: {"model": state_dict, "optimizer": …, "step": …, …}.

    `storage` is the checkpoint's own directory, here and below. Arrays become tensors, as torch loads no others without
    executing code. Raises TargetExists, CheckpointCorrupt, OSError; so do the others.
    """
    content = _plain(_parts(_stored(storage, manifest), manifest))
    _write(target, lambda partial: torch.save(content, partial))


def to_dcp(storage: Storage, manifest: Manifest, target: Path) -> None:
    """A directory for `torch.distributed.checkpoint.load`, with the same names as `to_pt`."""
    content = _parts(_stored(storage, manifest), manifest)

    def write(partial: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # we know that we are one process
            dcp.save(content, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)

    _write(target, write)


def to_safetensors(storage: Storage, manifest: Manifest, target: Path) -> None:
    """One file with the model's tensors."""
    tensors = dict(_stored(storage, manifest).snapshot.tensors["model"])
    _write(target, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


def _stored(storage: Storage, manifest: Manifest) -> Stored:
    return read(storage, manifest, rank=0, world_size=manifest.world_size)


def _parts(stored: Stored, manifest: Manifest) -> dict[str, Any]:
    """The state dicts that the train function gave, and how far it was."""
    tensors = stored.snapshot.tensors
    parts = {
        part: unpack(content, tensors["model" if part == "model" else "optim"].__getitem__)
        for part, content in stored.snapshot.tree.items()
        if part != "extra" or content
    }
    return {**parts, "step": manifest.step, "epoch": manifest.epoch, "metrics": dict(manifest.metrics)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Mapping):
        return type(value)({key: _plain(item) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the target and renames, with everything on the disk before."""
    if target.exists():
        raise TargetExists(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        for path in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
            _sync(path)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
