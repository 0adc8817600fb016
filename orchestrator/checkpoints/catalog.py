"""Which checkpoints a run has. The storage is the truth: this module only looks there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.manifest import MANIFEST, Manifest
from orchestrator.checkpoints.reader import read_manifest
from orchestrator.errors import CheckpointCorrupt

QUARANTINED = "MANIFEST.quarantined.json"
"""What the manifest of a damaged checkpoint is renamed to: it is no checkpoint any more, and its bytes stay for
inspection."""
PINNED = "PINNED"
"""A file of this name in a checkpoint's directory keeps it from being deleted."""

_NAME = re.compile(r"step_(\d{8,})-a(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What lies under a run's `checkpoints/`. Directories with other names are not ours and not looked at."""

    committed: tuple[Manifest, ...]
    """Newest first."""
    corrupt: tuple[tuple[str, CheckpointCorrupt], ...]
    """Name and reason of those whose manifest itself is damaged."""
    incomplete: tuple[str, ...]
    """Without a manifest: being written, or left behind by a crash."""


def scan(storage: Storage) -> Scan:
    """Reads the manifests only. Raises UnknownFormat for one of a newer version."""
    committed, corrupt, incomplete = [], [], []
    for entry in storage.entries():
        if not entry.is_dir or not _NAME.fullmatch(entry.name):
            continue
        inside = storage.join(entry.name)
        try:
            manifest = read_manifest(inside)
            if manifest.name != entry.name:
                raise CheckpointCorrupt(inside.uri(), MANIFEST, f"name {entry.name}", manifest.name)
            committed.append(manifest)
        except FileNotFoundError:
            if not inside.exists(QUARANTINED):
                incomplete.append(entry.name)
        except CheckpointCorrupt as error:
            corrupt.append((entry.name, error))
    committed.sort(key=lambda manifest: age_key(manifest.name), reverse=True)
    return Scan(committed=tuple(committed), corrupt=tuple(corrupt), incomplete=tuple(incomplete))


def newest_valid(checkpoints: Sequence[Manifest], is_valid: Callable[[Manifest], bool]) -> Manifest | None:
    """The most recent checkpoint that can be loaded, or None if there is none."""
    by_age = sorted(checkpoints, key=lambda manifest: age_key(manifest.name), reverse=True)
    return next((manifest for manifest in by_age if is_valid(manifest)), None)


def age_key(name: str) -> tuple[int, int, int]:
    """Sorts names of one run from old to new. A later attempt's checkpoint is newer at any step: it may have gone
    back."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no checkpoint's name")
    step, attempt, again = found.groups()
    return int(attempt), int(step), int(again or 1)


def quarantine(storage: Storage, name: str, why: str, *, now: float) -> None:
    """Makes a damaged checkpoint invisible and keeps its bytes."""
    inside = storage.join(name)
    inside.write_bytes("QUARANTINED.json", json.dumps({"why": why, "at": now}).encode())
    if inside.exists(MANIFEST):
        inside.write_bytes(QUARANTINED, inside.read_bytes(MANIFEST))
        inside.delete(MANIFEST)


def remove(storage: Storage, name: str) -> None:
    """The manifest first, so that what is half deleted is no checkpoint."""
    storage.delete(f"{name}/{MANIFEST}")
    storage.delete_dir(name)
