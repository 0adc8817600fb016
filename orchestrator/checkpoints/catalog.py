"""Which checkpoints a run has. The storage is the truth: this module only looks there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.backends.storage import Entry, Storage
from orchestrator.checkpoints.commit import QUARANTINE_NOTE, QUARANTINED
from orchestrator.checkpoints.manifest import MANIFEST, Manifest, rank_file
from orchestrator.errors import CheckpointCorrupt

_NAME = re.compile(r"step_(\d{8,})-a(\d+)(?:\.(\d+))?")
_RECEIPT = re.compile(r"rank-\d{4,}\.json")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Hold(StrEnum):
    """What keeps a checkpoint from being deleted: a file of that name in its directory."""

    pinned = "PINNED"
    registered = "REGISTERED"
    in_use = "IN-USE"
    """`IN-USE-<token>`, one for each reader, with the time until which it counts."""


PINNED = Hold.pinned.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A committed checkpoint and what holds it."""

    manifest: Manifest
    holds: frozenset[Hold] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Incomplete:
    """A directory without a manifest: being written, or left behind by a crash."""

    name: str
    modified: float
    """Seconds since 1970 when anything in it changed last; 0: the storage does not say."""
    receipts: int
    """How many ranks were done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What lies under a run's `checkpoints/`. Directories with other names are not ours and not looked at."""

    committed: tuple[Manifest, ...]
    """Newest first."""
    corrupt: tuple[tuple[str, CheckpointCorrupt], ...]
    """Name and reason of those whose manifest itself is damaged."""
    incomplete: tuple[str, ...]
    """Without a manifest: being written, or left behind by a crash."""
    found: tuple[Found, ...] = ()
    """The committed ones with what holds them; no holds unless they were asked for."""
    unfinished: tuple[Incomplete, ...] = ()
    """The incomplete ones, described; only if holds were asked for."""


def read_manifest(inside: Storage) -> Manifest:
    """Raises FileNotFoundError when this is no checkpoint, CheckpointCorrupt when it is a damaged one, UnknownFormat
    for one of another version."""
    return Manifest.decode(inside.read_bytes(MANIFEST), inside.uri())


def scan(storage: Storage, *, with_holds: bool = False, now: float = 0.0) -> Scan:
    """Reads the manifests, and with `with_holds` lists the directories too; holds that ended before `now` do not count.
    Raises UnknownFormat for a manifest of another version, OSError when the storage does not answer."""
    found, corrupt, incomplete, unfinished = [], [], [], []
    for entry in storage.entries():
        if not entry.is_dir or not _NAME.fullmatch(entry.name):
            continue
        inside = storage.join(entry.name)
        try:
            manifest = read_manifest(inside)
            if manifest.name != entry.name:
                raise CheckpointCorrupt(inside.uri(), MANIFEST, f"name {entry.name}", manifest.name)
            holds = _holds(inside, inside.entries(), now) if with_holds else frozenset()
            found.append(Found(manifest=manifest, holds=holds))
        except FileNotFoundError:
            if _is_set_aside(inside):
                continue
            incomplete.append(entry.name)
            if with_holds:
                unfinished.append(_described(storage, entry.name))
        except CheckpointCorrupt as error:
            corrupt.append((entry.name, error))
    found.sort(key=lambda one: age_key(one.manifest.name), reverse=True)
    return Scan(
        committed=tuple(one.manifest for one in found), corrupt=tuple(corrupt), incomplete=tuple(incomplete),
        found=tuple(found), unfinished=tuple(unfinished),
    )  # fmt: skip


def newest_valid(checkpoints: Sequence[Manifest], is_valid: Callable[[Manifest], bool]) -> Manifest | None:
    """The most recent checkpoint that can be loaded, or None if there is none."""
    by_age = sorted(checkpoints, key=lambda manifest: age_key(manifest.name), reverse=True)
    return next((manifest for manifest in by_age if is_valid(manifest)), None)


def is_name(name: str) -> bool:
    """Whether a directory of this name is a checkpoint's."""
    return _NAME.fullmatch(name) is not None


def age_key(name: str) -> tuple[int, int, int]:
    """Attempt, step and count: sorts names of one run from old to new. A later attempt's checkpoint is newer at any
    step: it may have gone back."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no checkpoint's name")
    step, attempt, again = found.groups()
    return int(attempt), int(step), int(again or 1)


def hold(storage: Storage, name: str, hold: Hold, *, until: float | None = None, token: str = "") -> None:
    """Keeps a checkpoint from being deleted. An `in_use` hold needs a token of its holder and ends at `until` (seconds
    since 1970); the others last. Raises FileNotFoundError when there is no such checkpoint."""
    path = _hold_path(name, hold, token)
    if (until is None) == (hold is Hold.in_use):
        raise ValueError("in_use holds end, and only they do")
    if not storage.exists(f"{name}/{MANIFEST}"):
        raise FileNotFoundError(storage.uri(name))
    content: Mapping[str, float] = {} if until is None else {"until": until}
    storage.write_bytes(path, json.dumps(content).encode())


def release(storage: Storage, name: str, hold: Hold, *, token: str = "") -> None:
    """Does nothing if it is not held so."""
    storage.delete(_hold_path(name, hold, token))


def holds(storage: Storage, name: str, *, now: float = 0.0) -> frozenset[Hold]:
    """What holds a checkpoint; what ended before `now` does not count."""
    inside = storage.join(name)
    return _holds(inside, inside.entries(), now)


def quarantine(storage: Storage, name: str, why: str, *, now: float) -> None:
    """Makes a damaged checkpoint invisible and keeps its bytes."""
    inside = storage.join(name)
    inside.write_bytes(QUARANTINE_NOTE, json.dumps({"why": why, "at": now}).encode())
    if inside.exists(MANIFEST):
        inside.write_bytes(QUARANTINED, inside.read_bytes(MANIFEST))
        inside.delete(MANIFEST)


def remove(storage: Storage, name: str) -> None:
    """The manifest first, so that what is half deleted is no checkpoint; then rank 0's receipt, so that nobody makes it
    one again."""
    storage.delete(f"{name}/{MANIFEST}")
    storage.delete(f"{name}/{rank_file(0)}")
    storage.delete_dir(name)


def sweep(storage: Storage, *, attempt: int, now: float, grace: float = 3600.0) -> list[str]:
    """Removes what crashes left of attempts before `attempt`, and gives the names. A directory that anything touched in
    the last `grace` seconds stays, for a writer may still finish what a dead trainer sealed; so does one whose age the
    storage does not tell."""
    swept = []
    for entry in storage.entries():
        if not entry.is_dir or not is_name(entry.name) or age_key(entry.name)[0] >= attempt:
            continue
        inside = storage.join(entry.name)
        if inside.exists(MANIFEST) or _is_set_aside(inside):
            continue
        modified = storage.modified(entry.name)
        if not modified or now - modified < grace or _holds(inside, inside.entries(), now):
            continue
        if inside.exists(MANIFEST):  # committed while we looked
            continue
        remove(storage, entry.name)
        swept.append(entry.name)
    return swept


def _described(storage: Storage, name: str) -> Incomplete:
    receipts = sum(1 for entry in storage.entries(name) if _RECEIPT.fullmatch(entry.name))
    return Incomplete(name=name, modified=storage.modified(name), receipts=receipts)


def _is_set_aside(inside: Storage) -> bool:
    return inside.exists(QUARANTINED) or inside.exists(QUARANTINE_NOTE)


def _holds(inside: Storage, entries: Sequence[Entry], now: float) -> frozenset[Hold]:
    held = set()
    for entry in entries:
        if entry.name in (Hold.pinned, Hold.registered):
            held.add(Hold(entry.name))
        elif entry.name.startswith(f"{Hold.in_use}-") and _until(inside, entry.name) > now:
            held.add(Hold.in_use)
    return frozenset(held)


def _until(inside: Storage, name: str) -> float:
    """A hold that cannot be read counts: better a checkpoint too many."""
    try:
        return float(json.loads(inside.read_bytes(name))["until"])
    except FileNotFoundError:
        return 0.0
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _hold_path(name: str, hold: Hold, token: str) -> str:
    if hold is not Hold.in_use:
        return f"{name}/{hold.value}"
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"{token!r} is no token: letters, digits, '-' and '_'")
    return f"{name}/{hold.value}-{token}"
