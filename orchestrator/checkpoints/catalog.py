"""Which checkpoints a run has. The storage is the truth: this module only looks there."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestrator.backends.storage import Entry, Storage
from orchestrator.checkpoints import goodness
from orchestrator.checkpoints.commit import QUARANTINE_NOTE, QUARANTINED
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointInfo, CheckpointState, Manifest, rank_file
from orchestrator.errors import CheckpointCorrupt

_NAME = re.compile(r"step_(\d{8,})-a(\d+)(?:\.(\d+))?")
_RECEIPT = re.compile(r"rank-\d{4,}\.json")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
DIRECTORY = "checkpoints"
"""Of a run's directory: all that is told of here lies in it."""
DELETED = "deleted"
"""Beside the checkpoints: `<name>.json` for each one that was deleted, what it was, when and why. So the database's
list can be made anew with those that are gone."""
LEASE = 3600.0
"""Seconds for which a reader keeps a checkpoint from being deleted, unless it says otherwise."""


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
    is_bad: bool = False
    """The training had gone wrong by then, see goodness.py: nobody goes on from it, and no rule keeps it."""


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
    """Newest first, also those that are no good."""
    corrupt: tuple[tuple[str, CheckpointCorrupt], ...]
    """Name and reason of those whose manifest itself is damaged."""
    incomplete: tuple[str, ...]
    """Without a manifest: being written, or left behind by a crash."""
    found: tuple[Found, ...] = ()
    """The committed ones with what holds them; no holds unless they were asked for."""
    unfinished: tuple[Incomplete, ...] = ()
    """The incomplete ones, described; only if holds were asked for."""

    @property
    def good(self) -> tuple[Manifest, ...]:
        """The committed ones of trainings that went well, newest first."""
        return tuple(one.manifest for one in self.found if not one.is_bad)


def read_manifest(inside: Storage) -> Manifest:
    """Raises FileNotFoundError when this is no checkpoint, CheckpointCorrupt when it is a damaged one, UnknownFormat
    for one of another version."""
    return Manifest.decode(inside.read_bytes(MANIFEST), inside.uri())


def scan(storage: Storage, *, with_holds: bool = False, now: float = 0.0) -> Scan:
    """Reads the manifests, and with `with_holds` lists the directories too; holds that ended before `now` do not count.
    Raises UnknownFormat for a manifest of another version, OSError when the storage does not answer."""
    found, corrupt, incomplete, unfinished = [], [], [], []
    entries = storage.entries()
    marks = goodness.marks(storage) if any(entry.name == goodness.DIRECTORY for entry in entries) else ()
    for entry in entries:
        if not entry.is_dir or not _NAME.fullmatch(entry.name):
            continue
        inside = storage.join(entry.name)
        try:
            manifest = read_manifest(inside)
            if manifest.name != entry.name:
                raise CheckpointCorrupt(inside.uri(), MANIFEST, f"name {entry.name}", manifest.name)
            holds = _holds(inside, inside.entries(), now) if with_holds else frozenset()
            found.append(Found(manifest=manifest, holds=holds, is_bad=bool(goodness.why_bad(manifest, marks))))
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


@contextmanager
def in_use(storage: Storage, name: str, *, now: float, seconds: float = LEASE) -> Iterator[bool]:
    """Keeps a checkpoint from being deleted while it is read, for at most `seconds` should the reader die.

    False where nothing can be written: then it may go at any time, and the reader finds that files are missing. Raises
    FileNotFoundError when there is no such checkpoint (any more).
    """
    token = secrets.token_hex(8)
    is_held = True
    try:
        hold(storage, name, Hold.in_use, until=now + seconds, token=token)
    except FileNotFoundError:
        raise
    except OSError:
        is_held = False
    try:
        if is_held and not storage.exists(f"{name}/{MANIFEST}"):  # deleted while it was being held
            _forget(storage, name)
            raise FileNotFoundError(storage.uri(name))
        yield is_held
    finally:
        if is_held:
            with suppress(OSError):
                release(storage, name, Hold.in_use, token=token)


def holds(storage: Storage, name: str, *, now: float = 0.0) -> frozenset[Hold]:
    """What holds a checkpoint; what ended before `now` does not count."""
    inside = storage.join(name)
    return _holds(inside, inside.entries(), now)


def quarantine(storage: Storage, name: str, why: str, *, now: float) -> bool:
    """Makes a damaged checkpoint invisible and keeps its bytes; False if it has been deleted, which is no damage."""
    inside = storage.join(name)
    if not inside.exists(MANIFEST) and not _is_set_aside(inside):
        return False
    inside.write_bytes(QUARANTINE_NOTE, json.dumps({"why": why, "at": now}).encode())
    try:
        inside.write_bytes(QUARANTINED, inside.read_bytes(MANIFEST))
    except FileNotFoundError:
        if not inside.exists(QUARANTINED):  # deleted meanwhile: our note must not look like a damaged checkpoint
            _forget(storage, name)
            return False
    inside.delete(MANIFEST)
    return True


def remove(storage: Storage, name: str, *, manifest: Manifest | None = None, why: str = "", now: float = 0.0) -> None:
    """The manifest first, so that what is half deleted is no checkpoint; then rank 0's receipt, so that nobody makes it
    one again. With `manifest`, that of a checkpoint, a note stays in `deleted/` that says what it was, and why and when
    (seconds since 1970) it went."""
    if manifest is not None:
        note = {**row(manifest, "", CheckpointState.deleted), "why": why, "at": now}
        del note["uri"]
        storage.write_bytes(f"{DELETED}/{name}.json", json.dumps(note, allow_nan=False).encode())
    storage.delete(f"{name}/{MANIFEST}")
    storage.delete(f"{name}/{rank_file(0)}")
    storage.delete_dir(name)


def deleted_names(storage: Storage, *, since: float = 0.0) -> list[str]:
    """Those that have a note, and are no checkpoints; with `since` (seconds since 1970) those deleted later. A storage
    that does not say when tells of none then."""
    entries = [entry for entry in storage.entries(DELETED) if since <= 0 or entry.modified >= since]
    names = [entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json")]
    there = {entry.name for entry in storage.entries() if entry.is_dir} if names else set()
    return [
        name
        for name in names
        if is_name(name) and not (name in there and storage.exists(f"{name}/{MANIFEST}"))
    ]  # fmt: skip


def deletion(storage: Storage, name: str) -> dict[str, Any] | None:
    """What the note of a deleted checkpoint says: what `row` gives, `why` and `at`. None if it makes no sense."""
    try:
        raw = json.loads(storage.read_bytes(f"{DELETED}/{name}.json"))
        note = {**raw, "uri": storage.uri(name), "state": CheckpointState.deleted.value}
        return note if CheckpointInfo.from_json(note).id.rpartition("/")[2] == name else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def row(manifest: Manifest, uri: str, state: CheckpointState = CheckpointState.committed) -> dict[str, Any]:
    """What the database keeps of a checkpoint, as JSON."""
    return {**CheckpointInfo.of(manifest, uri, state).to_json(), "created": manifest.created + manifest.duration}


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


def sweep_partial(storage: Storage, *, now: float, grace: float = 3600.0) -> list[str]:
    """Removes files that whoever was killed had not written to their ends, anywhere under `storage`, and gives their
    paths. One that grew in the last `grace` seconds stays, and so does one of a process of this host that lives.

    Object stores have none: there a file appears when it is complete. What was sent of it before the sender died is
    kept by the store, unseen, until the bucket's lifecycle rule for incomplete multipart uploads takes it.
    """
    swept = []
    for path in storage.partial_files(older_than=now - grace):
        storage.delete(path)
        swept.append(path)
    return swept


def _forget(storage: Storage, name: str) -> None:
    """Takes away a directory that we made anew by writing into one that was being deleted."""
    with suppress(OSError):
        if not storage.exists(f"{name}/{MANIFEST}"):
            storage.delete_dir(name)


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
