"""Loads a checkpoint outside of a training: for evaluation, a notebook, another project's fine-tuning.

A damaged checkpoint is passed over and named, and stays where it is. All that is written is the word that one is being
read, so that its run does not delete it meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, pointers
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointInfo, Manifest
from orchestrator.checkpoints.reader import Stored, read, read_manifest
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.tree import unpack
from orchestrator.errors import CheckpointCorrupt, CheckpointError, NotFound, UserError

LISTINGS = 20
"""So often the list is made anew because one of it was deleted before it could be held."""


class NoCheckpoint(CheckpointError, UserError):
    """There is nothing to load. `skipped` says what lies there and why it cannot be used."""

    def __init__(self, uri: str, which: str, skipped: tuple[str, ...] = ()) -> None:
        super().__init__(uri, which, skipped)
        self.uri, self.which, self.skipped = uri, which, skipped

    def __str__(self) -> str:
        wanted = "" if self.which == "latest" else f" called {self.which!r}"
        found = f" Damaged: {'; '.join(self.skipped)}." if self.skipped else ""
        return (
            f"There is no checkpoint{wanted} in {self.uri}.{found} Give a checkpoint's directory or URL, the directory "
            "that holds them, or RUN, RUN@best, RUN@NAME; `orc checkpoint ls RUN` shows which there are."
        )


class DeletedMeanwhile(CheckpointError, UserError):
    """A checkpoint went while it was read. Nothing of it was used."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return (
            f"{self.uri} was deleted while it was read: by its run, which keeps the last few, or by a user. Choose "
            "another one, or keep those you need with `orc checkpoint pin RUN@NAME`."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """What a checkpoint holds, in memory of its own."""

    info: CheckpointInfo
    step: int
    epoch: int
    """Zero-based number of the epoch in which it was saved."""
    metrics: Mapping[str, float]
    model: dict[str, Any]
    """As `model.load_state_dict` takes it; of several models, one such dict for each by name."""
    optimizer: Any
    """As `optimizer.load_state_dict` takes it; None if there was none, or the checkpoint has weights only."""
    scheduler: Any
    scaler: Any
    extra: dict[str, Any]
    """What else `run.state(…)` was given, by name; the state of objects that have one."""
    files: Mapping[str, bytes]
    is_resumable: bool
    """Training can continue from it; else it has weights only."""
    skipped: tuple[str, ...]
    """Better ones that were asked for, but are damaged, each with its reason."""


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    device: torch.device | str = "cpu",
    which: str = "latest",
    home: str | os.PathLike[str] | None = None,
) -> LoadedCheckpoint:
    """Loads and verifies a checkpoint; puts it into `model` and `optimizer`, if these are given.

        loaded = orchestrator.load_checkpoint("clever-otter-7@best", model=model)

    `source` is a checkpoint's own directory or URL, one that holds checkpoints (a run's directory, too), or a run, as
    RUN, RUN@best, RUN@latest or RUN@NAME; `which` says the same for directories. `home` is the data directory of the
    stack that knows the run. The tensors that are returned lie on `device`; every rank of a group may call it alone.

    A damaged or just deleted checkpoint is passed over for the next older one, unless one was named: then
    CheckpointCorrupt or DeletedMeanwhile is raised.
    Raises NoCheckpoint, NotFound for an unknown run, CheckpointMismatch if it does not fit the model, OSError when the
    storage does not answer.
    """
    storage, which = _place(os.fspath(source), which, home)
    inside, stored, skipped = _first_valid(storage, which)
    _apply(stored, model=model, optimizer=optimizer)
    return _loaded(inside, stored, skipped, torch.device(device))


# -- where it is ---------------------------------------------------------------------------------------------


def _place(source: str, which: str, home: str | os.PathLike[str] | None) -> tuple[Storage, str]:
    """A directory and which of its checkpoints; or "" for a checkpoint's own directory."""
    if "://" in source or os.path.isdir(os.path.expanduser(source)):
        storage = Storage(source)
        if storage.exists(MANIFEST) or storage.exists(catalog.QUARANTINED):
            return storage, ""
        for root in (storage, storage.join("checkpoints")):
            if any(entry.is_dir and catalog.is_name(entry.name) for entry in root.entries()):
                return root, which
        if "://" in source or "/" in source:
            raise NoCheckpoint(storage.uri(), which)
    run, at, told = source.rpartition("@")
    directory = _directory_of(run if at else source, home)
    return Storage(directory).join("checkpoints"), told if at else which


def _directory_of(run: str, home: str | os.PathLike[str] | None) -> str:
    from orchestrator.catalog import open_catalog  # brings what talks to a server; paths and URLs need none

    if "/" in run:
        raise NotFound("directory", run)
    with open_catalog(None if home is None else Path(home)) as known:
        return known.run(run).directory


# -- which it is ---------------------------------------------------------------------------------------------


def _first_valid(storage: Storage, which: str) -> tuple[Storage, Stored, tuple[str, ...]]:
    """Its own directory, what it holds, and what was passed over for it."""
    if not which or catalog.is_name(which):
        inside = storage.join(which) if which else storage
        return inside, _named(inside), ()
    skipped: dict[str, str] = {}
    for _ in range(LISTINGS):
        found = catalog.scan(storage)
        skipped |= {name: f"{name}: {error}" for name, error in found.corrupt}
        is_outdated = False
        for manifest in _wanted(storage, found.good, which):
            if manifest.name in skipped:
                continue
            try:
                return storage.join(manifest.name), _read_held(storage, manifest), tuple(skipped.values())
            except CheckpointCorrupt as error:
                skipped[manifest.name] = f"{manifest.name}: {error}"
            except DeletedMeanwhile as error:
                skipped[manifest.name] = f"{manifest.name}: {error}"
                is_outdated = True  # a run that deletes has newer ones, and the older ones of this list go first
                break
        if not is_outdated:
            break
    raise NoCheckpoint(storage.uri(), which, tuple(skipped.values()))


def _read_held(storage: Storage, manifest: Manifest) -> Stored:
    """Reads one that its run may want to delete: not while it is read, where holding it is possible."""
    inside = storage.join(manifest.name)
    try:
        with catalog.in_use(storage, manifest.name, now=time.time()):
            return _read(inside, manifest)
    except FileNotFoundError as error:
        raise DeletedMeanwhile(inside.uri()) from error


def _named(inside: Storage) -> Stored:
    if inside.exists(catalog.QUARANTINED) and not inside.exists(MANIFEST):
        raise CheckpointCorrupt(inside.uri(), MANIFEST, "a checkpoint", "one that was found damaged and put aside")
    try:
        return _read(inside, read_manifest(inside))
    except FileNotFoundError as error:
        raise NoCheckpoint(inside.uri(), "latest") from error


def _wanted(storage: Storage, newest_first: Sequence[Manifest], which: str) -> list[Manifest]:
    """In the order in which they are tried."""
    if which == "latest":
        return list(newest_first)
    return pointers.best_first(storage, which, newest_first)


def _read(inside: Storage, manifest: Manifest) -> Stored:
    try:
        return read(inside, manifest, rank=0, world_size=manifest.world_size)
    except CheckpointCorrupt as error:
        if inside.exists(MANIFEST) or inside.exists(catalog.QUARANTINED):
            raise
        raise DeletedMeanwhile(inside.uri()) from error


# -- what it holds -------------------------------------------------------------------------------------------


def _apply(stored: Stored, **given: Any) -> None:
    """Puts parts of it into living objects; what is not given is left out."""
    parts = {part: value for part, value in given.items() if value is not None}
    if parts:
        kept = {part: value for part, value in stored.snapshot.tree.items() if part in parts}
        TrainState(**parts).apply(replace(stored.snapshot, tree={**kept, "extra": {}}))


def _loaded(inside: Storage, stored: Stored, skipped: tuple[str, ...], device: torch.device) -> LoadedCheckpoint:
    manifest, snapshot = stored.manifest, stored.snapshot

    def part(name: str, default: Any = None) -> Any:
        tensors = snapshot.tensors["model" if name == "model" else "optim"]
        return unpack(snapshot.tree[name], lambda key: tensors[key].to(device)) if name in snapshot.tree else default

    return LoadedCheckpoint(
        info=CheckpointInfo.of(manifest, inside.uri()), step=manifest.step, epoch=manifest.epoch,
        metrics=manifest.metrics, model=part("model", {}), optimizer=part("optimizer"), scheduler=part("scheduler"),
        scaler=part("scaler"), extra=part("extra", {}), files=snapshot.files, is_resumable=manifest.resumable,
        skipped=skipped,
    )  # fmt: skip
