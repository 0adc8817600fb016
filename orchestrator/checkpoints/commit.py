"""From the receipts of all ranks to one checkpoint.

Every rank writes its files and then its receipt, `rank-0000.json`; rank 0's holds the draft of the manifest. Whoever
sees the receipts of all ranks may commit, depending on nothing but the storage: two that do it at the same time write
the same bytes, and one that dies halfway leaves the work to the next. There is no clock in here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.manifest import MANIFEST, PROTOCOL, FileEntry, Manifest, rank_file
from orchestrator.errors import CheckpointCorrupt, CheckpointError

QUARANTINED = "MANIFEST.quarantined.json"
"""What the manifest of a damaged checkpoint is renamed to: it is no checkpoint any more, and its bytes stay for
inspection."""
QUARANTINE_NOTE = "QUARANTINED.json"
"""Says why and when; written before the manifest is renamed."""

_RECEIPT = re.compile(r"rank-(\d{4,})\.json")
_FAILED = re.compile(r"rank-(\d{4,})\.failed\.json")
_TENSORS = re.compile(r"([^/]+)/\1-\d{5,}-of-\d{5,}\.safetensors")
_PER_RANK = "rank"
"""The group whose names repeat from rank to rank, so that no index can list them."""
_OF_THE_COMMITTER = ("files", "duration", "timings", "size_logical")


class CommitRefused(CheckpointError):
    """The receipts of a save can never become a checkpoint."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"{self.uri} cannot be committed: {self.why}. The previous checkpoint is unharmed."


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one rank wrote; its last file."""

    save: str
    """Token of the save."""
    rank: int
    world_size: int
    files: tuple[FileEntry, ...]
    content: Any
    """What is this rank's own: generators, position in the data; packed (see tree.py)."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """copy, write."""
    sealed_at: float = 0.0
    """Seconds since 1970 when the last byte was there to be written."""
    draft: Mapping[str, Any] | None = None
    """Rank 0: all fields of the Manifest but `files`, `duration`, `timings` and `size_logical`, as JSON."""

    def encode(self) -> bytes:
        raw = {
            "protocol": PROTOCOL, "save": self.save, "rank": self.rank, "world_size": self.world_size,
            "files": [file.to_json() for file in self.files], "content": self.content,
            "sealed_at": self.sealed_at, "seconds": dict(self.seconds),
        }  # fmt: skip
        if self.draft is not None:
            raw["draft"] = dict(self.draft)
        return json.dumps(raw, allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, uri: str) -> Receipt:
        """`uri` is for the message only. Raises CheckpointCorrupt."""
        try:
            raw = json.loads(data)
            if raw["protocol"] != PROTOCOL:
                raise ValueError(f"protocol {raw['protocol']}, this version knows {PROTOCOL}")
            return cls(
                save=str(raw["save"]), rank=int(raw["rank"]), world_size=int(raw["world_size"]),
                files=tuple(FileEntry.from_json(file) for file in raw["files"]), content=raw["content"],
                seconds={key: float(value) for key, value in raw["seconds"].items()},
                sealed_at=float(raw["sealed_at"]), draft=raw.get("draft"),
            )  # fmt: skip
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointCorrupt(uri, "a receipt", "JSON with what a rank wrote", repr(error)) from error


def draft_of(manifest: Manifest) -> dict[str, Any]:
    """The draft for rank 0's receipt, from a manifest without files."""
    fields = manifest.fields()
    return {key: fields[key] for key in fields if key not in ("format", "protocol", *_OF_THE_COMMITTER)}


def write_receipt(inside: Storage, receipt: Receipt) -> None:
    """After everything that it lists is durable. `inside` is the checkpoint's own directory."""
    inside.write_bytes(rank_file(receipt.rank), receipt.encode())


def write_failure(inside: Storage, *, save: str, rank: int, why: str) -> None:
    """Tells the committer not to wait for this rank."""
    inside.write_bytes(f"rank-{rank:04d}.failed.json", json.dumps({"save": save, "why": why}).encode())


def receipts(inside: Storage) -> dict[int, Receipt]:
    """By rank: those of the save of rank 0, or of the only token; others are left out."""
    return {receipt.rank: receipt for receipt, _ in _seen(inside).receipts}


def finish(inside: Storage) -> Manifest | None:
    """Commits if every rank's receipt is there and every listed file has its size; None while a receipt is missing.

    `inside` is the checkpoint's own directory. May be called again and by several at once: what is committed already is
    returned (`Manifest.save` says of which save it is). Raises CommitRefused when it never can: a rank said that it
    failed, two sizes of the group, a file gone or of another size, quarantined; CheckpointCorrupt for a damaged
    receipt; OSError when the storage does not answer.
    """
    seen = _seen(inside)
    if QUARANTINED in seen.names or QUARANTINE_NOTE in seen.names:
        raise CommitRefused(inside.uri(), "it was found damaged and put aside")
    if MANIFEST in seen.names and (committed := _committed(inside)):
        return committed
    if seen.failures:
        raise CommitRefused(inside.uri(), "; ".join(seen.failures))
    worlds = {receipt.world_size for receipt, _ in seen.receipts}
    if len(worlds) > 1:
        raise CommitRefused(inside.uri(), f"its ranks speak of groups of {sorted(worlds)}")
    ranks = [receipt.rank for receipt, _ in seen.receipts]
    if not worlds or ranks != list(range(worlds.pop())):
        return None
    return _commit(inside, seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What lies in a checkpoint's directory, of one save."""

    names: frozenset[str]
    receipts: tuple[tuple[Receipt, FileEntry], ...]
    """By rank."""
    failures: tuple[str, ...]


def _seen(inside: Storage) -> _Seen:
    names = sorted(entry.name for entry in inside.entries() if not entry.is_dir)
    found: list[tuple[Receipt, FileEntry]] = []
    failed: list[tuple[int, str, str]] = []
    for name in names:
        receipt_of, failure_of = _RECEIPT.fullmatch(name), _FAILED.fullmatch(name)
        if not (receipt_of or failure_of):
            continue
        try:
            data = inside.read_bytes(name)
        except FileNotFoundError:  # it is being removed
            continue
        if receipt_of:
            receipt = Receipt.decode(data, inside.uri(name))
            if receipt.rank != int(receipt_of[1]):
                wanted = f"the receipt of rank {int(receipt_of[1])}"
                raise CheckpointCorrupt(inside.uri(), name, wanted, f"{receipt.rank}")
            found.append((receipt, _text_entry(name, data)))
        elif failure_of:
            failed.append((int(failure_of[1]), *_failure(data)))
    found.sort(key=lambda pair: pair[0].rank)
    tokens = {receipt.save for receipt, _ in found} | {save for _, save, _ in failed}
    if found and found[0][0].rank == 0:
        tokens = {found[0][0].save}
    token = tokens.pop() if len(tokens) == 1 else ""
    return _Seen(
        names=frozenset(names),
        receipts=tuple(pair for pair in found if pair[0].save == token),
        failures=tuple(f"rank {rank} says: {why}" for rank, save, why in failed if save == token),
    )


def _failure(data: bytes) -> tuple[str, str]:
    """Token and reason; a marker that cannot be read speaks for no save."""
    try:
        raw = json.loads(data)
        return str(raw["save"]), str(raw["why"])
    except (ValueError, KeyError, TypeError):
        return "", ""


def _committed(inside: Storage) -> Manifest | None:
    """None for what is no manifest: an object store may keep the half of one whose writer died, and ours mends it."""
    try:
        return Manifest.decode(inside.read_bytes(MANIFEST), inside.uri())
    except (CheckpointCorrupt, FileNotFoundError):
        return None


def _commit(inside: Storage, seen: _Seen) -> Manifest:
    files = [file for receipt, entry in seen.receipts for file in (*receipt.files, entry)]
    for path, data in _indexes(files):
        inside.write_bytes(path, data)
        files.append(_text_entry(path, data))
    files.sort(key=lambda file: file.path)
    manifest = _manifest(inside, [receipt for receipt, _ in seen.receipts], files)
    _check_files(inside, files)  # last: a sweep of another attempt may have run in between
    inside.write_bytes(MANIFEST, manifest.encode())
    return manifest


def _manifest(inside: Storage, receipts: Sequence[Receipt], files: Sequence[FileEntry]) -> Manifest:
    draft = receipts[0].draft
    if draft is None:
        raise CheckpointCorrupt(inside.uri(), rank_file(0), "the draft of a manifest", "none")
    copy, write = (max(receipt.seconds.get(key, 0.0) for receipt in receipts) for key in ("copy", "write"))
    timings = {"copy": copy, "write": write}
    if write > 0:
        timings["write_bytes_per_second"] = sum(file.size_bytes for file in files) / write
    ends = max(receipt.sealed_at + receipt.seconds.get("write", 0.0) for receipt in receipts)
    try:
        created = float(draft["created"])
        fields = {
            **draft, "save": receipts[0].save, "world_size": receipts[0].world_size, "files": tuple(files),
            "duration": max(0.0, ends - created), "timings": timings,
            "size_logical": sum(tensor.size_bytes for file in files for tensor in file.tensors),
        }  # fmt: skip
        manifest = Manifest.from_fields(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointCorrupt(inside.uri(), rank_file(0), "the draft of a manifest", repr(error)) from error
    if not math.isfinite(manifest.duration):
        raise CheckpointCorrupt(inside.uri(), rank_file(0), "times in seconds", f"{manifest.duration}")
    return manifest


def _indexes(files: Sequence[FileEntry]) -> list[tuple[str, bytes]]:
    """Path and bytes of each group's index, as the HF format has it. A group with split tensors has none: its names
    stand in several files."""
    groups: dict[str, list[FileEntry]] = {}
    for file in files:
        if (match := _TENSORS.fullmatch(file.path)) and match[1] != _PER_RANK:
            groups.setdefault(match[1], []).append(file)
    indexes = []
    for group, members in sorted(groups.items()):
        tensors = [(tensor, file.path.split("/")[-1]) for file in members for tensor in file.tensors]
        if any(tensor.offsets is not None for tensor, _ in tensors):
            continue
        total = sum(tensor.size_bytes for tensor, _ in tensors)
        places = {tensor.name: file for tensor, file in sorted(tensors, key=lambda pair: pair[0].name)}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        indexes.append((f"{group}/{group}.safetensors.index.json", json.dumps(index).encode()))
    return indexes


def _check_files(inside: Storage, files: Sequence[FileEntry]) -> None:
    written = Counter(file.path for file in files)
    if twice := sorted(path for path, count in written.items() if count > 1):
        raise CommitRefused(inside.uri(), f"two ranks wrote {', '.join(twice)}")
    sizes = dict(inside.files())
    for file in files:
        size = sizes.get(file.path)
        if size != file.size_bytes:  # a listing may be older than the file, on NFS
            size = inside.size_bytes(file.path) if inside.exists(file.path) else None
        if size is None:
            raise CommitRefused(inside.uri(), f"{file.path} is gone")
        if size != file.size_bytes:
            raise CommitRefused(inside.uri(), f"{file.path} has {size} bytes instead of {file.size_bytes}")


def _text_entry(path: str, data: bytes) -> FileEntry:
    return FileEntry(path=path, size_bytes=len(data), head_bytes=len(data), head_xxh3=xxhash.xxh3_128_hexdigest(data))
