"""Writes the files of one checkpoint. Until `commit` nothing of it can be loaded.

step_00001200-a1/
  model/model-00001-of-00001.safetensors   model/model.safetensors.index.json
  optim/optim-00001-of-00001.safetensors   optim/optim.safetensors.index.json
  state.json        everything that is the same on all ranks and no tensor
  rank-0000.json …  what differs: random number generators, position in the data
  MANIFEST.json     last
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import tensorfile
from orchestrator.checkpoints.manifest import MANIFEST, FileEntry, Manifest
from orchestrator.checkpoints.state import Snapshot
from orchestrator.checkpoints.tree import inline, pack

STATE = "state.json"


def directory_name(step: int, attempt: int, again: int = 1) -> str:
    """`again` counts checkpoints of one attempt at the same step. Example: directory_name(1200, 1) ==
    "step_00001200-a1"."""
    return f"step_{step:08d}-a{attempt}" + (f".{again}" if again > 1 else "")


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.json"


def write_shared(storage: Storage, snapshot: Snapshot, progress: Mapping[str, Any]) -> list[FileEntry]:
    """What is the same on all ranks; called by rank 0."""
    files = []
    for group, tensors in snapshot.tensors.items():
        if tensors:
            files += _write_group(storage, group, tensors)
    files.append(_write_json(storage, STATE, {"tree": snapshot.tree, "progress": dict(progress)}))
    return files


def write_rank(storage: Storage, rank: int, content: Mapping[str, Any]) -> FileEntry:
    """What belongs to one rank; called by each."""
    return _write_json(storage, rank_file(rank), pack(content, inline, f"rank {rank}"))


def commit(storage: Storage, manifest: Manifest) -> None:
    """From here on the checkpoint exists."""
    storage.write_bytes(MANIFEST, manifest.encode())


def _write_group(storage: Storage, group: str, tensors: Mapping[str, torch.Tensor]) -> list[FileEntry]:
    file = f"{group}-00001-of-00001.safetensors"
    with storage.open_output(f"{group}/{file}") as output:
        entry = tensorfile.write(output, f"{group}/{file}", tensors)
    total = sum(tensor.size_bytes for tensor in entry.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {tensor.name: file for tensor in entry.tensors}}
    return [entry, _write_json(storage, f"{group}/{group}.safetensors.index.json", index)]


def _write_json(storage: Storage, path: str, content: Any) -> FileEntry:
    data = json.dumps(content, allow_nan=False).encode()
    storage.write_bytes(path, data)
    return FileEntry(path=path, size_bytes=len(data), head_bytes=len(data), head_xxh3=xxhash.xxh3_128_hexdigest(data))
