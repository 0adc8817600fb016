"""Reads a checkpoint and verifies every byte of it on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from orchestrator.backends.storage import Storage, UnsafePath
from orchestrator.checkpoints import tensorfile
from orchestrator.checkpoints.manifest import MANIFEST, FileEntry, Manifest
from orchestrator.checkpoints.state import GROUPS, Snapshot
from orchestrator.checkpoints.tree import from_inline, unpack
from orchestrator.checkpoints.writer import STATE, rank_file
from orchestrator.errors import CheckpointCorrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checkpoint in memory."""

    manifest: Manifest
    snapshot: Snapshot
    progress: Mapping[str, Any]
    rank: Mapping[str, Any]
    """What this rank wrote; what rank 0 wrote, if the number of workers is another."""


def read_manifest(storage: Storage) -> Manifest:
    """Raises FileNotFoundError when this is no checkpoint, CheckpointCorrupt when it is a damaged one."""
    return Manifest.decode(storage.read_bytes(MANIFEST), storage.uri())


def read(storage: Storage, manifest: Manifest, *, rank: int, world_size: int) -> Stored:
    """Raises CheckpointCorrupt naming the file. Nothing that fails to verify is given out."""
    check_sizes(storage, manifest)
    mine = rank_file(rank if world_size == manifest.world_size else 0)
    tensors: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    texts = {}
    for file in manifest.files:
        group = file.path.split("/")[0]
        if file.tensors and group in tensors:
            tensors[group].update(_read_tensors(storage, file))
        elif file.path in (STATE, mine) or group in tensors:
            texts[file.path] = _read_text(storage, file)
    for needed in (STATE, mine):
        if needed not in texts:
            raise CheckpointCorrupt(storage.uri(), MANIFEST, f"an entry for {needed}", "none")
    shared = json.loads(texts[STATE])
    return Stored(
        manifest=manifest,
        snapshot=Snapshot(tensors=tensors, tree=shared["tree"]),
        progress=shared["progress"],
        rank=unpack(json.loads(texts[mine]), from_inline),
    )


def check_sizes(storage: Storage, manifest: Manifest) -> None:
    """Raises CheckpointCorrupt for a missing, shortened or lengthened file, without reading any."""
    for file in manifest.files:
        found = _present(storage, file, storage.size_bytes)
        if found != file.size_bytes:
            raise CheckpointCorrupt(storage.uri(), file.path, f"{file.size_bytes} bytes", f"{found} bytes")


def verify(storage: Storage, manifest: Manifest) -> None:
    """Reads all files, those of all ranks too. Raises CheckpointCorrupt."""
    check_sizes(storage, manifest)
    for file in manifest.files:
        if file.tensors:
            _read_tensors(storage, file)
        else:
            _read_text(storage, file)


def _read_tensors(storage: Storage, file: FileEntry) -> dict[str, Any]:
    def load(path: str) -> dict[str, Any]:
        with storage.open_input(path) as source:
            return tensorfile.read(source, file, storage.uri())

    return _present(storage, file, load)


def _read_text(storage: Storage, file: FileEntry) -> bytes:
    data: bytes = _present(storage, file, storage.read_bytes)
    found = xxhash.xxh3_128_hexdigest(data)
    if found != file.head_xxh3:
        raise CheckpointCorrupt(storage.uri(), file.path, file.head_xxh3, found)
    return data


def _present(storage: Storage, file: FileEntry, action: Any) -> Any:
    try:
        return action(file.path)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(storage.uri(), file.path, f"{file.size_bytes} bytes", "no file") from error
    except UnsafePath as error:
        raise CheckpointCorrupt(storage.uri(), MANIFEST, "names inside the checkpoint", file.path) from error
