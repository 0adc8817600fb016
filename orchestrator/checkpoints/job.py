"""What travels between a trainer and whoever writes its checkpoints: plain values, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.checkpoints.image import Image, Piece, rounded_up
from orchestrator.checkpoints.policy import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of one rank and where each lies in a slot."""

    images: tuple[Image, ...]
    starts: tuple[int, ...]
    """Of each image in the slot's data area, in bytes: multiples of 4096."""
    size_bytes: int
    """Of the data area."""
    _encoded: bytes = field(default=b"", init=False, repr=False, compare=False)
    _signature: str = field(default="", init=False, repr=False, compare=False)

    @classmethod
    def of(cls, images: tuple[Image, ...]) -> Layout:
        """The images one after the other."""
        starts, at = [], 0
        for image in images:
            starts.append(at)
            at += image.room_bytes
        return cls(images=images, starts=tuple(starts), size_bytes=at)

    @property
    def signature(self) -> str:
        """SHA-256 of its JSON: equal for layouts that are equal."""
        if not self._signature:
            object.__setattr__(self, "_signature", hashlib.sha256(self.encode()).hexdigest())
        return self._signature

    def encode(self) -> bytes:
        """Canonical JSON."""
        if not self._encoded:
            raw = {
                "images": [
                    {
                        "path": image.path, "head_bytes": image.head_bytes, "size_bytes": image.size_bytes,
                        "pieces": [
                            [p.name, p.dtype, p.shape, p.start, p.size_bytes, p.offsets, p.full_shape]
                            for p in image.pieces
                        ],
                    }
                    for image in self.images
                ],
                "starts": self.starts, "size_bytes": self.size_bytes,
            }  # fmt: skip
            object.__setattr__(self, "_encoded", _canonical(raw))
        return self._encoded

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """Raises ValueError for what no `encode` made, or for places outside the slot or over each other."""
        raw = _decoded(data)
        try:
            images = tuple(
                Image(
                    path=str(image["path"]), head_bytes=int(image["head_bytes"]), size_bytes=int(image["size_bytes"]),
                    pieces=tuple(_piece(piece) for piece in image["pieces"]),
                )
                for image in raw["images"]
            )  # fmt: skip
            layout = cls(images=images, starts=tuple(map(int, raw["starts"])), size_bytes=int(raw["size_bytes"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a layout: {error!r}") from error
        layout._check()
        return layout

    def _check(self) -> None:
        at = 0
        for image, start in zip(self.images, self.starts, strict=True):
            if start < at or start % 4096:
                raise ValueError(f"{image.path} cannot begin at {start}")
            place = image.head_bytes
            for piece in image.pieces:
                if piece.start != place or piece.size_bytes < 0:
                    raise ValueError(f"{piece.name} in {image.path} cannot begin at {piece.start}")
                place += piece.size_bytes
            if place != image.size_bytes:
                raise ValueError(f"{image.path} has {place} bytes of tensors, not {image.size_bytes}")
            at = start + image.room_bytes
        if rounded_up(at) > self.size_bytes:
            raise ValueError(f"{at} bytes do not fit into {self.size_bytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BestRule:
    """Keep the `count` best by a metric; with `metric` "" those that were saved with `best=True`."""

    metric: str = ""
    direction: Direction = Direction.max
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """Which checkpoints of a run stay: the union of what each rule keeps. 0 switches a rule off, but `last` 0 keeps
    all."""

    last: int = 3
    best: tuple[BestRule, ...] = ()
    every_steps: int = 0
    for_seconds: float = 0.0
    quota_bytes: int = 0
    """What the checkpoints of all runs of the experiment may take together; the oldest go first."""
    vouched: int = -1
    """The newest step at which the training is known to have gone well, where that is known late; -1: nobody asks."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> KeepRules:
        best = tuple(BestRule(**{**rule, "direction": Direction(rule["direction"])}) for rule in raw["best"])
        return cls(**{**raw, "best": best})


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """One rank's part of one save, without its tensors. Lies in the slot beside them."""

    save: str
    """Token of the save, 32 hex digits, the same on all ranks. Files of two saves never make one checkpoint."""
    storage_url: str
    """Of the checkpoints' root, as Storage takes it. May hold a password: never to be shown."""
    name: str
    """The checkpoint's directory in it."""
    run: str
    attempt: int
    rank: int
    world_size: int
    content: Any
    """What is this rank's own, packed (see tree.py)."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Path to content of small files: state.json, from rank 0."""
    draft: Mapping[str, Any] | None = None
    """Rank 0: the manifest without what only the committer knows; see commit.Receipt."""
    keep: KeepRules = field(default_factory=KeepRules)
    sealed_at: float = 0.0
    """Seconds since 1970 when the last byte lay in the slot."""
    copy_seconds: float = 0.0
    spool_directory: str = ""
    """Where to tell the record of the commit if the trainer is gone; "": nobody is told."""
    wait_for_ranks: float = 300.0
    """Seconds that the committer waits for the ranks of other hosts."""
    protocol: int = 2

    def encode(self) -> bytes:
        raw = {name: getattr(self, name) for name in _JOB_FIELDS}
        keep = asdict(self.keep)
        if self.keep.vouched < 0:  # a writer that was started before there was this key goes on being of use
            del keep["vouched"]
        return _canonical({**raw, "texts": dict(self.texts), "keep": keep})

    @classmethod
    def decode(cls, data: bytes) -> SaveJob:
        """Raises ValueError for what no `encode` of this version made."""
        raw = _decoded(data)
        try:
            if raw["protocol"] != 2:
                raise ValueError(f"a save of protocol {raw['protocol']}, this version knows 2")
            return cls(**{**raw, "keep": KeepRules.from_json(raw["keep"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a save: {error!r}") from error


_JOB_FIELDS = tuple(SaveJob.__dataclass_fields__)


class SlotResult(StrEnum):
    """What became of a slot's save."""

    committed = "committed"
    """The checkpoint exists; told of rank 0's slot."""
    durable = "durable"
    """This rank's files are written; told of the other ranks' slots."""
    failed = "failed"
    abandoned = "abandoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the writer answers. Its JSON has at most 3 KiB."""

    save: str
    name: str
    result: SlotResult
    why: str = ""
    manifest_sha256: str = ""
    size_bytes: int = 0
    duration: float = 0.0
    deleted: tuple[str, ...] = ()
    """Names of the checkpoints that retention removed; the first 64."""
    for_quota: str = ""
    """What was deleted for the experiment's quota, of this run and of others, for people; "" if nothing was."""

    def encode(self, limit_bytes: int = 3072) -> bytes:
        """JSON that fits: names of deleted ones go first, then the end of `why` and of `for_quota`."""
        deleted, why, for_quota = self.deleted[:64], self.why, self.for_quota
        while True:
            raw = {
                "save": self.save, "name": self.name, "result": self.result.value, "why": why, "deleted": deleted,
                "manifest_sha256": self.manifest_sha256, "size_bytes": self.size_bytes, "duration": self.duration,
                "for_quota": for_quota,
            }  # fmt: skip
            data = _canonical(raw)
            if len(data) <= limit_bytes or not (deleted or why or for_quota):
                return data
            if deleted:
                deleted = deleted[: len(deleted) // 2]
            elif why:
                why = why[: len(why) // 2]
            else:
                for_quota = for_quota[: len(for_quota) // 2]

    @classmethod
    def decode(cls, data: bytes) -> Outcome:
        """Raises ValueError."""
        raw = _decoded(data)
        try:
            return cls(**{**raw, "result": SlotResult(raw["result"]), "deleted": tuple(raw["deleted"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an outcome: {error!r}") from error


def _piece(raw: list[Any]) -> Piece:
    name, dtype, shape, start, size_bytes, offsets, full_shape = raw
    return Piece(
        name=name, dtype=dtype, shape=tuple(shape), start=start, size_bytes=size_bytes,
        offsets=None if offsets is None else tuple(offsets),
        full_shape=None if full_shape is None else tuple(full_shape),
    )  # fmt: skip


def _canonical(raw: Mapping[str, Any]) -> bytes:
    return json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _decoded(data: bytes) -> dict[str, Any]:
    raw = json.loads(data)
    if not isinstance(raw, dict):
        raise ValueError(f"an object was expected, not {type(raw).__name__}")
    return raw
