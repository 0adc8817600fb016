"""What a checkpoint consists of. `MANIFEST.json` is written last: a directory without one is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.errors import CheckpointCorrupt, CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = "orc-checkpoint"
PROTOCOL = 1


class CheckpointState(StrEnum):
    """Where a checkpoint stands."""

    committed = "committed"
    quarantined = "quarantined"
    deleted = "deleted"


class UnknownFormat(CheckpointError):
    """A manifest of a newer version of this software."""

    def __init__(self, uri: str, found: str) -> None:
        super().__init__(uri, found)
        self.uri, self.found = uri, found

    def __str__(self) -> str:
        return f"{self.uri} has format {self.found}, this version reads {FORMAT} {PROTOCOL}. Upgrade this installation."


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor in a safetensors file; the file's tensors follow each other in this order without holes."""

    name: str
    dtype: str
    """As safetensors calls it: F32, BF16, I64 …"""
    shape: tuple[int, ...]
    size_bytes: int
    xxh3: str
    """XXH3-128 of its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file. The hash of its head and those of its tensors together cover every byte."""

    path: str
    size_bytes: int
    head_bytes: int
    """What comes before the tensors; the whole file if it holds none."""
    head_xxh3: str
    tensors: tuple[TensorEntry, ...] = ()

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> FileEntry:
        tensors = tuple(TensorEntry(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in raw["tensors"])
        return cls(**{**raw, "tensors": tensors})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its bytes."""

    run: str
    name: str
    """The directory's name, step_00001200-a1: unique within the run."""
    attempt: int
    step: int
    epoch: int
    """Zero-based number of the epoch in which it was saved."""
    epoch_complete: bool
    """The next epoch is to be begun; else this one is to be continued at `data`."""
    world_size: int
    seed: int
    config_hash: str
    created: float
    """Seconds since 1970."""
    duration: float
    """Seconds from the begin of the save until the manifest was written."""
    files: tuple[FileEntry, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False
    reasons: tuple[str, ...] = ()
    """Why it was saved: every_steps, improved, stop …"""
    label: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Position in the training data; see training/loader.py."""
    versions: Mapping[str, str] = field(default_factory=dict)
    resumable: bool = True
    cipher: str | None = None
    key_id: str | None = None

    @property
    def id(self) -> str:
        return f"{self.run}/{self.name}"

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all the rest of the file; also stored in the `checkpoint` fact."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def file(self, path: str) -> FileEntry | None:
        return next((file for file in self.files if file.path == path), None)

    def encode(self) -> bytes:
        content = {"digest": self.digest, **self._content()}
        return json.dumps(content, indent=1, allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, uri: str) -> Manifest:
        """Raises CheckpointCorrupt, or UnknownFormat for one of a newer version."""
        try:
            raw = json.loads(data)
            digest = raw.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointCorrupt(uri, MANIFEST, "JSON with a digest", repr(error)) from error
        found = hashlib.sha256(_canonical(raw)).hexdigest()
        if found != digest:
            raise CheckpointCorrupt(uri, MANIFEST, str(digest), found)
        kind = raw.pop("format", ""), raw.pop("protocol", "")
        if kind != (FORMAT, PROTOCOL):
            raise UnknownFormat(uri, f"{kind[0]} {kind[1]}")
        raw["files"] = tuple(FileEntry.from_json(file) for file in raw["files"])
        raw["reasons"] = tuple(raw["reasons"])
        raw["metrics"] = {key: float(value) for key, value in raw["metrics"].items()}
        return cls(**raw)

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "protocol": PROTOCOL, **asdict(self), "metrics": _finite(self.metrics)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What is told about a checkpoint: returned by `run.save`, recorded as a `checkpoint` fact."""

    id: str
    uri: str
    attempt: int
    step: int
    epoch: int
    size_bytes: int
    state: CheckpointState
    metrics: Mapping[str, float]
    manifest_sha256: str
    label: str
    is_best: bool
    duration: float

    @classmethod
    def of(cls, manifest: Manifest, uri: str, state: CheckpointState = CheckpointState.committed) -> CheckpointInfo:
        return cls(
            id=manifest.id, uri=uri, attempt=manifest.attempt, step=manifest.step, epoch=manifest.epoch,
            size_bytes=manifest.size_bytes, state=state, metrics=manifest.metrics, manifest_sha256=manifest.digest,
            label=manifest.label, is_best=manifest.is_best, duration=manifest.duration,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The data of its `checkpoint` fact."""
        return {**asdict(self), "state": self.state.value, "metrics": _finite(self.metrics)}


def _finite(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON, and PostgreSQL's jsonb, know no nan and inf: those become strings."""
    return {key: float(value) if math.isfinite(value) else str(value) for key, value in metrics.items()}


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
