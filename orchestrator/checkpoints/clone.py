"""A checkpoint of one run as the beginning of another one's attempt.

The tensors are not written again: on one local disk they are the same files under a second name, so that a donor that
deletes its own takes nothing away. What says whose checkpoint it is, receipts and manifest, is written anew.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

import xxhash

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit
from orchestrator.checkpoints.catalog import Hold, age_key, deleted_names, deletion, hold, is_name, read_manifest
from orchestrator.checkpoints.commit import Receipt
from orchestrator.checkpoints.manifest import MANIFEST, FileEntry, Manifest, directory_name, rank_file
from orchestrator.errors import CheckpointCorrupt, CheckpointError, UserError

REASON = "cloned"
"""Among the reasons of a checkpoint that was not saved but taken over from another run."""
_RECEIPT = re.compile(r"rank-\d{4,}\.json")
_INDEX = re.compile(r"([^/]+)/\1\.safetensors\.index\.json")


class DonorGone(CheckpointError, UserError):
    """The checkpoint that a member was to go on from is not there any more."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return (
            f"{self.uri}, which this trial was to take over, was deleted after that had been decided: by a user, or by "
            "its run because the sweep rested for more than a day. In the next generation it takes over another one."
        )


def is_clone(manifest: Manifest) -> bool:
    return REASON in manifest.reasons


def clone(
    source: Storage, name: str, target: Storage, *, run: str, attempt: int, now: float, sha256: str = "", job: str = ""
) -> Manifest:
    """Makes the checkpoint `name` in `source` the newest one in `target`, as of attempt `attempt` of the run `run`.

    Both storages are those of runs' checkpoints. Once per `job`, whichever attempt asks: what is there already is given
    back; without a job, once per attempt. It holds no metrics: those were measured with another configuration. Raises
    FileNotFoundError where there is no such checkpoint, CheckpointCorrupt where it is not the one of digest `sha256` or
    files of it are damaged or gone, OSError when a storage does not answer. Whoever calls it keeps the checkpoint from
    being deleted meanwhile, see `catalog.in_use`.
    """
    donor, inside = read_manifest(source.join(name)), source.join(name)
    if sha256 and donor.digest != sha256:
        raise CheckpointCorrupt(inside.uri(), MANIFEST, sha256, donor.digest)
    save = _token(donor.digest, run, job or f"attempt {attempt}")
    if (there := _of_save(target, donor.step, save)) is not None:
        return there
    fresh = directory_name(donor.step, attempt)
    place = target.join(fresh)
    if place.entries():  # of an attempt that died here: nothing else saves before this is done
        target.delete_dir(fresh)
    receipts = [file for file in donor.files if _RECEIPT.fullmatch(file.path)]
    for file in donor.files:
        if file not in receipts and not _INDEX.fullmatch(file.path):
            _take(place, inside, file)
    read = [_receipt(inside, file) for file in receipts]
    for receipt in sorted(read, key=lambda each: each.rank, reverse=True):  # rank 0's last: it makes the others count
        draft = None
        if receipt.rank == 0:
            draft = _draft(donor, run=run, attempt=attempt, name=fresh, now=now, save=save)
        commit.write_receipt(place, replace(receipt, save=save, draft=draft, sealed_at=now, seconds={}))
    found = commit.finish(place)
    if found is None:
        raise CheckpointCorrupt(inside.uri(), rank_file(0), f"{donor.world_size} receipts", f"{len(receipts)}")
    return found


def taken_before(target: Storage, name: str, *, run: str, sha256: str, job: str, since: int = 0) -> Manifest | None:
    """What an earlier attempt has made of the checkpoint `name`, or has trained on from it; None if there is none. The
    donor's need not be there any more for this. `since` is the job's first attempt."""
    step = age_key(name)[1]
    if (there := _of_save(target, step, _token(sha256, run, job))) is not None:
        return there
    # The job saved nothing before it had cloned: a clone of this step that was deleted was this one.
    gone = [each for each in deleted_names(target) if age_key(each)[1] == step and age_key(each)[0] >= since]
    attempts = [age_key(each)[0] for each in gone if REASON in ((deletion(target, each) or {}).get("reasons") or ())]
    if not attempts:
        return None
    found = [entry.name for entry in target.entries() if entry.is_dir and is_name(entry.name)]
    later = (each for each in found if age_key(each)[0] >= max(attempts))
    for each in sorted(later, key=age_key, reverse=True):
        try:
            if (manifest := read_manifest(target.join(each))).resumable:
                return manifest
        except (FileNotFoundError, CheckpointError):
            continue
    return None


def keep(source: Storage, name: str, *, until: float, token: str) -> bool:
    """Keeps a checkpoint from being deleted until it was taken over, at most until `until` (seconds since 1970); False
    if it is gone. Raises OSError when the storage does not answer."""
    try:
        hold(source, name, Hold.in_use, until=until, token=token)
    except FileNotFoundError:
        return False
    if source.exists(f"{name}/{MANIFEST}"):
        return True
    source.delete_dir(name)  # deleted while it was being held: what we wrote has made the directory anew
    return False


def _token(digest: str, run: str, job: str) -> str:
    return hashlib.sha256(f"{digest} {run} {job}".encode()).hexdigest()[:32]


def _of_save(target: Storage, step: int, save: str) -> Manifest | None:
    """The checkpoint with this step and token, if it can be used."""
    for entry in target.entries():
        if not entry.is_dir or not is_name(entry.name) or age_key(entry.name)[1] != step:
            continue
        try:
            manifest = read_manifest(target.join(entry.name))
        except (FileNotFoundError, CheckpointError):
            continue
        if manifest.save == save:
            return manifest
    return None


def _take(place: Storage, inside: Storage, file: FileEntry) -> None:
    try:
        place.take(inside, file.path)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(inside.uri(), file.path, f"{file.size_bytes} bytes", "no file") from error


def _receipt(inside: Storage, file: FileEntry) -> Receipt:
    try:
        data = inside.read_bytes(file.path)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(inside.uri(), file.path, f"{file.size_bytes} bytes", "no file") from error
    if (found := xxhash.xxh3_128_hexdigest(data)) != file.head_xxh3:
        raise CheckpointCorrupt(inside.uri(), file.path, file.head_xxh3, found)
    return Receipt.decode(data, inside.uri())


def _draft(donor: Manifest, *, run: str, attempt: int, name: str, now: float, save: str) -> dict[str, Any]:
    mine = replace(
        donor, run=run, attempt=attempt, name=name, created=now, save=save, files=(), metrics={}, is_best=False,
        reasons=(REASON,), label="",
    )  # fmt: skip
    return commit.draft_of(mine)
