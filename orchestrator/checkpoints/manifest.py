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
STATE = "state.json"
"""Everything that is the same on all ranks and no tensor."""
FORMAT = "orc-checkpoint"
PROTOCOL = 2


class CheckpointState(StrEnum):
    """Where a checkpoint stands."""

    staged = "staged"
    """In memory, being written; it does not exist before it is committed."""
    committed = "committed"
    bad = "bad"
    """Committed when the training had gone wrong; see goodness.py."""
    quarantined = "quarantined"
    deleted = "deleted"


class UnknownFormat(CheckpointError):
    """A manifest of another version of this software."""

    def __init__(self, uri: str, found: str) -> None:
        super().__init__(uri, found)
        self.uri, self.found = uri, found

    def __str__(self) -> str:
        number = self.found.rpartition(" ")[2]
        if self.found.startswith(FORMAT) and number.isdecimal() and int(number) < PROTOCOL:
            hint = "It was written by an older version and is read with that one."
        else:
            hint = "Upgrade this installation."
        return f"{self.uri} has format {self.found}, this version reads {FORMAT} {PROTOCOL}. {hint}"


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
    offsets: tuple[int, ...] | None = None
    """Of a part of a split tensor: where it begins in each dimension of the whole."""
    full_shape: tuple[int, ...] | None = None
    """Of a part of a split tensor: the shape of the whole."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> TensorEntry:
        tuples = {key: tuple(raw[key]) for key in ("shape", "offsets", "full_shape") if raw.get(key) is not None}
        return cls(**{**raw, **tuples})

    def to_json(self) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "name": self.name, "dtype": self.dtype, "shape": list(self.shape), "size_bytes": self.size_bytes,
            "xxh3": self.xxh3,
        }  # fmt: skip
        if self.offsets is not None:
            raw["offsets"] = list(self.offsets)
        if self.full_shape is not None:
            raw["full_shape"] = list(self.full_shape)
        return raw


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
        return cls(**{**raw, "tensors": tuple(TensorEntry.from_json(tensor) for tensor in raw["tensors"])})

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "size_bytes": self.size_bytes, "head_bytes": self.head_bytes,
            "head_xxh3": self.head_xxh3, "tensors": [tensor.to_json() for tensor in self.tensors],
        }  # fmt: skip


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
    """Seconds from the begin of the save until the slowest rank's files were durable."""
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
    save: str = ""
    """Token of the save, 32 hex digits, the same in every rank's receipt."""
    kind: str = "sharded"
    """sharded, full, or weights (then it is not resumable)."""
    plan_sha256: str = ""
    """Of the plan that says which rank writes what."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """copy and write (seconds of the slowest rank), write_bytes_per_second."""
    size_logical: int = 0
    """Bytes of all tensors once, without heads."""

    @property
    def id(self) -> str:
        return f"{self.run}/{self.name}"

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all the rest of the file; also stored in the `checkpoint` fact."""
        return _digest(self.fields())

    def file(self, path: str) -> FileEntry | None:
        return next((file for file in self.files if file.path == path), None)

    def encode(self) -> bytes:
        """JSON with a line for each field and each file: `json.dumps` with an indent takes ten times as long."""
        content = self.fields()
        files = ",\n  ".join(json.dumps(file, allow_nan=False) for file in content["files"])
        texts = {key: json.dumps(value, allow_nan=False) for key, value in content.items() if key != "files"}
        lines = {"digest": f'"{_digest(content)}"', **texts, "files": f"[\n  {files}\n ]"}
        return ("{\n" + ",\n".join(f' "{key}": {text}' for key, text in lines.items()) + "\n}").encode()

    @classmethod
    def decode(cls, data: bytes, uri: str) -> Manifest:
        """Raises CheckpointCorrupt, or UnknownFormat for one of a newer version."""
        try:
            raw = json.loads(data)
            digest = raw.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointCorrupt(uri, MANIFEST, "JSON with a digest", repr(error)) from error
        found = _digest(raw)
        if found != digest:
            raise CheckpointCorrupt(uri, MANIFEST, str(digest), found)
        kind = raw.pop("format", ""), raw.pop("protocol", "")
        if kind != (FORMAT, PROTOCOL):
            raise UnknownFormat(uri, f"{kind[0]} {kind[1]}")
        raw["files"] = tuple(FileEntry.from_json(file) for file in raw["files"])
        return cls.from_fields(raw)

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any]) -> Manifest:
        """From plain JSON values, `files` apart. Raises TypeError or KeyError where they are not a manifest's."""
        metrics = {key: float(value) for key, value in raw["metrics"].items()}
        return cls(**{**raw, "metrics": metrics, "reasons": tuple(raw["reasons"])})

    def fields(self) -> dict[str, Any]:
        """All but the digest, as JSON."""
        content = {name: getattr(self, name) for name in _FIELDS}
        content["files"] = [file.to_json() for file in self.files]
        return {
            "format": FORMAT, "protocol": PROTOCOL, **content, "metrics": finite(self.metrics),
            "reasons": list(self.reasons), "data": dict(self.data), "versions": dict(self.versions),
            "timings": dict(self.timings),
        }  # fmt: skip


_FIELDS = tuple(Manifest.__dataclass_fields__)


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
    resumable: bool = True
    kind: str = "sharded"
    world_size: int | None = None
    reasons: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    cipher: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, uri: str, state: CheckpointState = CheckpointState.committed) -> CheckpointInfo:
        return cls(
            id=manifest.id, uri=uri, attempt=manifest.attempt, step=manifest.step, epoch=manifest.epoch,
            size_bytes=manifest.size_bytes, state=state, metrics=manifest.metrics, manifest_sha256=manifest.digest,
            label=manifest.label, is_best=manifest.is_best, duration=manifest.duration, resumable=manifest.resumable,
            kind=manifest.kind, world_size=manifest.world_size, reasons=manifest.reasons, timings=manifest.timings,
            cipher=manifest.cipher, key_id=manifest.key_id,
        )  # fmt: skip

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> CheckpointInfo:
        """From what `to_json` gave, and more. Raises KeyError, TypeError, ValueError."""
        metrics = {key: float(value) for key, value in raw["metrics"].items()}
        given = {name: raw[name] for name in cls.__dataclass_fields__}
        return cls(
            **{
                **given, "state": CheckpointState(raw["state"]), "metrics": metrics, "reasons": tuple(raw["reasons"])
            }
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The data of its `checkpoint` fact."""
        return {**asdict(self), "state": self.state.value, "metrics": finite(self.metrics)}


def finite(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON, and PostgreSQL's jsonb, know no nan and inf: those become strings."""
    return {key: float(value) if math.isfinite(value) else str(value) for key, value in metrics.items()}


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def directory_name(step: int, attempt: int, again: int = 1) -> str:
    """`again` counts checkpoints of one attempt at the same step. Example: directory_name(1200, 1) ==
    "step_00001200-a1"."""
    return f"step_{step:08d}-a{attempt}" + (f".{again}" if again > 1 else "")


def rank_file(rank: int) -> str:
    """Where a rank's receipt is, with what is the rank's own."""
    return f"rank-{rank:04d}.json"
