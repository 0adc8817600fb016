"""Values that cross a process border. They are frozen, show themselves, and import nothing of ours but
status.py.

A *point* is 32 bytes (`POINT`), the same in the spool, on the wire and in the tracker's log. A *fact* is anything else
a producer says about its run (a parameter, a tag, an event, a checkpoint, an end); facts are JSON. Both are numbered
per producer, 1, 2, 3 …, in two streams of their own, and travel in `Batch`es that carry everything needed to store
them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np

from orchestrator.status import TERMINAL as TERMINAL
from orchestrator.status import TRANSITIONS as TRANSITIONS
from orchestrator.status import RunStatus as RunStatus

PROTOCOL = 1
"""Version of every message and file format below. A reader refuses what it does not know."""

POINT = np.dtype([("key", "<u4"), ("flags", "<u4"), ("step", "<i8"), ("time", "<f8"), ("value", "<f8")])
"""One metric point: index into the producer's key table, flags, step, seconds since 1970, value. 32 bytes."""

LOST = 1
"""A flag: this record could not be read any more (a damaged disk). It keeps its number, so that what follows can be
accepted; it is committed as a counted loss (`producers.lost`), never as a point."""

MAX_KEY_BYTES = 512


class WhenFull(StrEnum):
    """What `log` does when the spool has no room left."""

    block = "block"
    """It waits until there is room."""
    gap = "gap"
    """It drops the point; how many were dropped is recorded as an event."""


class Stream(IntEnum):
    """The two numbered streams of a producer."""

    points = 0
    facts = 1


class FactKind(StrEnum):
    """What a fact says; `Fact.data` has the keys named here."""

    param = "param"  # name, value (any JSON value)
    tag = "tag"  # name, value (str)
    note = "note"  # text
    event = "event"  # kind, message, level (debug|info|warning|error), step?, details (dict)
    metric = "metric"  # name, unit?, direction? (min|max), reduction? (mean|min|max|sum|last)
    artifact = "artifact"  # name, uri, size_bytes, sha256, media_type, step?
    checkpoint = "checkpoint"
    # id, uri, step, epoch, size_bytes, state, metrics (dict), manifest_sha256, label, is_best, duration
    status = "status"  # status (RunStatus), reason (str), error (dict: type, message, rank, traceback)?
    provenance = "provenance"  # anything about where the attempt runs: git, command, packages, hosts …


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something a producer says about its attempt. Example: Fact(kind=FactKind.tag, at=0.0, data={"name": "team",
    "value": "a"}).
    """

    kind: FactKind
    at: float
    """Seconds since 1970, by the producer's clock."""
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind.value, "at": self.at, "data": dict(self.data)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Fact:
        return cls(kind=FactKind(raw["kind"]), at=float(raw["at"]), data=raw["data"])


class BadFrame(ValueError):
    """Bytes that are no batch: wrong magic, protocol, length or checksum."""

    def __init__(self, why: str) -> None:
        super().__init__(why)


_HEAD = struct.Struct("<4sHBBI16sIIQII")
_MAGIC = b"ORCB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Consecutive points (or facts) of one producer, complete in itself.

    Example: Batch(producer="6f…", run="r1", attempt=1, rank=0, stream=Stream.points, first=41, count=2,
    keys=("loss",), payload=b"…").
    """

    producer: str
    """32 hex digits, one per process (and thread) that logs."""
    run: str
    attempt: int
    rank: int
    """-1 for the driver."""
    stream: Stream
    first: int
    """Sequence number of the first entry; the rest follow without gaps."""
    count: int
    keys: tuple[str, ...] = ()
    """Names of the metric keys; `key` in the payload's points is an index into this tuple."""
    payload: bytes = field(default=b"", repr=False)
    """`count` POINT records, or a JSON list of `count` facts."""

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def points(self) -> np.ndarray:
        """A read-only view, dtype POINT, shape (count,)."""
        return np.frombuffer(self.payload, dtype=POINT)

    def facts(self) -> list[Fact]:
        return [Fact.from_json(raw) for raw in json.loads(self.payload)]

    def after(self, seq: int) -> Batch | None:
        """This batch without the entries numbered <= seq; None if nothing is left."""
        drop = seq - self.first + 1
        if drop <= 0:
            return self
        if drop >= self.count:
            return None
        if self.stream is Stream.points:
            payload = self.payload[drop * POINT.itemsize :]
        else:
            payload = json.dumps(json.loads(self.payload)[drop:]).encode()
        return Batch(
            producer=self.producer, run=self.run, attempt=self.attempt, rank=self.rank, stream=self.stream,
            first=seq + 1, count=self.count - drop, keys=self.keys, payload=payload,
        )  # fmt: skip

    def encode(self) -> bytes:
        """The one binary form: on the wire and in the tracker's log."""
        names = json.dumps([self.run, *self.keys]).encode()
        head = _HEAD.pack(
            _MAGIC, PROTOCOL, int(self.stream), 0, 0, bytes.fromhex(self.producer), self.attempt, self.rank &
            0xFFFFFFFF,
            self.first, self.count, len(names),
        )  # fmt: skip
        crc = zlib.crc32(self.payload, zlib.crc32(names, zlib.crc32(head)))
        return head[:8] + struct.pack("<I", crc) + head[12:] + names + self.payload

    @classmethod
    def decode(cls, frame: bytes) -> Batch:
        """Raises BadFrame."""
        if len(frame) < _HEAD.size:
            raise BadFrame(f"{len(frame)} bytes are too short for a batch")
        magic, protocol, stream, _, crc, producer, attempt, rank, first, count, names_bytes = _HEAD.unpack_from(frame)
        if magic != _MAGIC:
            raise BadFrame(f"magic is {magic!r}, not {_MAGIC!r}")
        if protocol != PROTOCOL:
            raise BadFrame(f"protocol {protocol}, this code speaks {PROTOCOL}")
        start = _HEAD.size + names_bytes
        head = frame[:8] + b"\0\0\0\0" + frame[12 : _HEAD.size]
        if zlib.crc32(frame[_HEAD.size :], zlib.crc32(head)) != crc:
            raise BadFrame("checksum does not match")
        if stream == Stream.points and len(frame) - start != count * POINT.itemsize:
            raise BadFrame(f"{len(frame) - start} bytes are not {count} points")
        run, *keys = json.loads(frame[_HEAD.size : start])
        return cls(
            producer=producer.hex(), run=run, attempt=attempt, rank=rank - (1 << 32) if rank >= 1 << 31 else rank,
            stream=Stream(stream), first=first, count=count, keys=tuple(keys), payload=frame[start:],
        )  # fmt: skip


def facts_payload(facts: Iterable[Fact]) -> bytes:
    return json.dumps([fact.to_json() for fact in facts]).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The tracker's answer for one stream of one producer."""

    producer: str
    stream: Stream
    accepted: int
    """Everything up to here is fsynced in the tracker's log."""
    committed: int
    """Everything up to here is in a PostgreSQL commit."""
    stop: bool = False
    """The run was asked to stop (`orc cancel`)."""
    watched: bool = False
    """Somebody looks at the run's newest values now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What the tracker needs to create a run, or the next attempt of one."""

    experiment: str
    project: str = "default"
    user: str = ""
    run: str = ""
    """An existing run's id: this is its next attempt. Empty: a new run, unless `resume` finds one."""
    new_run: str = ""
    """The id that a new run shall have: who submits a job knows it before the job starts. Where a run has it already
    and did not finish, this is its next attempt."""
    after_attempt: int = 0
    """The attempt of `run` that is known to be over; 0: the run must have ended."""
    resume: bool = False
    """Continue the newest run of the same experiment and config that did not finish, if there is one."""
    name: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    """The searchable flat form of the user's part of the config, `optim.lr` -> 0.01."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole resolved config, secrets redacted."""
    config_hash: str = ""
    storage_url: str = ""
    """Where run directories live; the run's own is `<storage_url>/<experiment>/<run>`."""
    workers: int = 1
    seed: int = 0
    lease: float = 15.0
    """Seconds without a sign of life from the driver after which the attempt is called CRASHED."""
    job: str = ""
    """Ray submission id or job id, if any."""
    model: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""
    sweep: str = ""
    is_sweep: bool = False
    """It is a sweep itself: known as one from its first moment, so that it can be resumed whenever its driver dies."""
    alerts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Rules, and whom to tell, see alerts/plan.py; {}: the default rules, told in the log. Holds addresses, which are
    secrets, until the tracker has put them away; the database never gets them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTicket:
    """The tracker's answer to a RunSpec: the identity under which everything of this attempt is recorded."""

    run: str
    name: str
    experiment: str
    attempt: int
    directory: str
    """The run's directory, a URL or absolute path."""
    seconds: float = field(default=0.0, compare=False)
    """That the attempts before this one took together."""
    earlier: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, hash=False)
    """The attempts of the run that failed or finished before, oldest first, the newest 50: {"attempt", "status",
    "error"}. Only for the driver, which goes on where the one before it was."""
