"""The database's list of checkpoints, made anew from what lies in storage, which is the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.catalog import DIRECTORY, Found, Hold
from orchestrator.checkpoints.commit import QUARANTINE_NOTE, QUARANTINED
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointState, Manifest, UnknownFormat
from orchestrator.errors import CheckpointCorrupt
from orchestrator.status import RunStatus
from orchestrator.store.names import is_run_id
from orchestrator.store.views import CheckpointRow, RunRow

EVERY_RUN = 1_000_000_000

Progress = Callable[[str, int, int], None]
"""Told which run is looked at, how many were before it and how many there are."""


class Index(Protocol):
    """The store, as far as it is needed here."""

    def runs(self, *, limit: int) -> Sequence[RunRow]: ...
    def whereabouts(self, runs: Sequence[str]) -> Mapping[str, tuple[RunStatus, str]]: ...
    def checkpoints(self, run: str) -> Sequence[CheckpointRow]: ...
    def put_checkpoints(self, run: str, rows: Sequence[Mapping[str, Any]], *, user: str, now: float) -> int: ...
    def mark_checkpoints(self, run: str, ids: Sequence[str], state: str, *, user: str, now: float) -> int: ...


@dataclass(slots=True, kw_only=True)
class Rebuilt:
    """What was found, and what the list had wrong."""

    runs: int = 0
    """Looked at."""
    checkpoints: int = 0
    """Committed ones in storage."""
    changed: int = 0
    """Rows that were missing or different."""
    gone: list[str] = field(default_factory=list)
    """Ids that were listed as there, and are not; they are now `deleted`."""
    unknown: list[str] = field(default_factory=list)
    """Directories with checkpoints of runs that the database does not know. Runs are not invented."""
    missing: list[str] = field(default_factory=list)
    """Directories of runs that are not there at all (on another host, not mounted): their rows were left alone."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Where something cannot be read, and why."""


def rebuild(
    store: Index, storage_url: str, *, user: str, now: float, run: str = "", progress: Progress | None = None
) -> Rebuilt:
    """Makes the rows of one run, or of all, say what its storage says; adds none for runs that are unknown.

    Safe while runs save: what they tell meanwhile counts. `now`: seconds since 1970. Trouble with one run is told in
    the answer and does not end the others. Raises NotFound for a run that is removed meanwhile.
    """
    done = Rebuilt()
    wanted = [run] if run else [row.run for row in store.runs(limit=EVERY_RUN)]
    places = store.whereabouts(wanted)
    for run_id in wanted:
        if progress is not None:
            progress(run_id, done.runs, len(wanted))
        done.runs += 1
        directory = places.get(run_id, (None, ""))[1]
        if directory:
            try:
                _rebuild_run(store, run_id, directory, done, user=user, now=now)
            except (OSError, UnknownFormat) as error:
                done.damaged.append((Storage(directory).uri(), str(error)))
    if not run and storage_url:
        storage = Storage(storage_url)
        try:
            done.unknown = list(_strangers(storage, places))
        except OSError as error:
            done.damaged.append((storage.uri(), str(error)))
    return done


def row_of(found: Found, uri: str, state: CheckpointState = CheckpointState.committed) -> dict[str, Any]:
    """What the database keeps of a checkpoint."""
    if found.is_bad and state is CheckpointState.committed:
        state = CheckpointState.bad
    return {**catalog.row(found.manifest, uri, state), "is_pinned": Hold.pinned in found.holds}


def _rebuild_run(store: Index, run: str, directory: str, done: Rebuilt, *, user: str, now: float) -> None:
    listed = store.checkpoints(run)  # before looking, so that what is committed meanwhile is not called gone
    place = Storage(directory)
    if not place.exists():
        done.missing.append(place.uri())
        return
    root = place.join(DIRECTORY)
    scan = catalog.scan(root, with_holds=True, now=now)
    rows, aside = [], []
    for found in scan.found:
        if found.manifest.run != run:
            done.damaged.append((root.uri(found.manifest.name), f"it belongs to run {found.manifest.run}"))
            continue
        rows.append(row_of(found, root.uri(found.manifest.name)))
        done.checkpoints += 1
    for name, error in scan.corrupt:
        done.damaged.append((root.uri(name), str(error)))
        aside.append(f"{run}/{name}")
    ids = {row.id for row in listed}
    rows += [_bare_row(run, root, name) for name, _ in scan.corrupt if f"{run}/{name}" not in ids]
    for name in _set_aside(root, scan):
        aside.append(f"{run}/{name}")
        if (manifest := _manifest_set_aside(root, name)) is not None and manifest.run == run:
            found = Found(manifest=manifest, holds=frozenset())
            rows.append(row_of(found, root.uri(name), CheckpointState.quarantined))
        elif f"{run}/{name}" not in ids:
            rows.append(_bare_row(run, root, name))
    there = {row["id"] for row in rows} | set(aside)
    gone = [row.id for row in listed if row.id not in there and row.state != CheckpointState.deleted]
    known = {row.id for row in listed if row.state == CheckpointState.deleted}
    noted = [name for name in catalog.deleted_names(root) if f"{run}/{name}" not in there | known]
    rows += filter(None, _all(lambda name: catalog.deletion(root, name), noted))
    if rows:
        done.changed += store.put_checkpoints(run, rows, user=user, now=now)
    if aside:
        done.changed += store.mark_checkpoints(run, aside, CheckpointState.quarantined, user=user, now=now)
    if gone:
        done.changed += store.mark_checkpoints(run, gone, CheckpointState.deleted, user=user, now=now)
        done.gone += gone


def _all(read: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    """Several at once: a run may have deleted thousands, and an object store takes its time for each."""
    if len(names) < 2:
        return [read(name) for name in names]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(read, names))


def _set_aside(root: Storage, scan: catalog.Scan) -> Iterator[str]:
    """Found damaged before. What was not there when `scan` looked is not meant."""
    others = {manifest.name for manifest in scan.committed} | {name for name, _ in scan.corrupt} | set(scan.incomplete)
    for entry in root.entries():
        if entry.is_dir and catalog.is_name(entry.name) and entry.name not in others:
            inside = root.join(entry.name)
            if not inside.exists(MANIFEST) and (inside.exists(QUARANTINED) or inside.exists(QUARANTINE_NOTE)):
                yield entry.name


def _manifest_set_aside(root: Storage, name: str) -> Manifest | None:
    """None when it is the manifest itself that is damaged."""
    try:
        return Manifest.decode(root.read_bytes(f"{name}/{QUARANTINED}"), root.uri(name))
    except (CheckpointCorrupt, UnknownFormat, OSError):
        return None


def _bare_row(run: str, root: Storage, name: str) -> dict[str, Any]:
    """Of a checkpoint whose manifest is what is damaged: no more than its name says."""
    attempt, step, _ = catalog.age_key(name)
    modified = root.modified(name)
    return {
        "id": f"{run}/{name}", "uri": root.uri(name), "attempt": attempt, "step": step,
        "state": CheckpointState.quarantined.value, "created": modified,
    }  # fmt: skip


def _strangers(storage: Storage, known: Mapping[str, object]) -> Iterator[str]:
    """Directories of runs with checkpoints that nobody knows."""
    for experiment in storage.entries():
        if not experiment.is_dir or experiment.name.startswith("."):
            continue
        for entry in storage.entries(experiment.name):
            if not entry.is_dir or entry.name in known or not is_run_id(entry.name):
                continue
            path = f"{experiment.name}/{entry.name}"
            if any(inside.is_dir for inside in storage.entries(f"{path}/{DIRECTORY}")):
                yield storage.uri(path)
