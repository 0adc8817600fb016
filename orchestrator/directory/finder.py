"""Finds runs by their directories alone, where the database does not answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.backends.storage import Storage
from orchestrator.directory import identity, layout, record
from orchestrator.errors import AmbiguousName, UserError
from orchestrator.records import RunStatus
from orchestrator.store.errors import BadRecord
from orchestrator.store.names import is_run_id

LAST = "last"


class NoSuchDirectory(UserError):
    """No run's directory answers to what was asked for."""

    def __init__(self, reference: str, storage: str, nearest: tuple[str, ...] = ()) -> None:
        super().__init__(reference, storage, nearest)
        self.reference, self.storage, self.nearest = reference, storage, nearest

    def __str__(self) -> str:
        near = f" Did you mean {', '.join(self.nearest)}?" if self.nearest else ""
        return (
            f"{self.storage} has no directory of a run {self.reference!r}.{near} With the database up it can be asked."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A run as its directory tells of it."""

    run: str
    name: str
    experiment: str
    """The directory's: a name that no path can have is changed in it."""
    directory: str
    attempt: int
    is_over: bool


def find(storage: Storage, reference: str) -> FoundRun:
    """By id, unique beginning of an id, name, or `last`. Raises NoSuchDirectory and AmbiguousName."""
    places = sorted(_places(storage), reverse=True)  # ids sort by time: newest first
    if reference == LAST:
        chosen = places[:1]
    else:
        chosen = [place for place in places if place[0] == reference]
        chosen = chosen or [place for place in places if look(storage, place).name == reference]
        chosen = chosen or [place for place in places if reference and place[0].startswith(reference)]
    if len(chosen) > 1:
        raise AmbiguousName("run", reference, tuple(run for run, _ in chosen[:5]))
    if not chosen:
        raise NoSuchDirectory(reference, storage.uri(), _nearest(storage, reference, places))
    return look(storage, chosen[0])


def look(storage: Storage, place: tuple[str, str]) -> FoundRun:
    """What the directory `(run, experiment)` says of itself; a directory without a word is a run without a name."""
    run, experiment = place
    directory = storage.join(experiment, run)
    said = [found for found in (_said_by_driver(directory), _said_by_service(directory)) if found is not None]
    attempt = max((found.attempt for found in said), default=0)
    newest = [found for found in said if found.attempt == attempt]
    return FoundRun(
        run=run,
        name=next((found.name for found in said if found.name), run),
        experiment=experiment,
        directory=directory.url,
        attempt=attempt,
        # The driver's word and the verdict of a tracker: whichever knows of an end is right.
        is_over=any(found.status.is_terminal for found in newest),
    )


def _places(storage: Storage) -> Iterator[tuple[str, str]]:
    for experiment in storage.entries():
        if experiment.is_dir and not experiment.name.startswith("."):
            entries = storage.entries(experiment.name)
            yield from ((entry.name, experiment.name) for entry in entries if entry.is_dir and is_run_id(entry.name))


def _said_by_driver(directory: Storage) -> identity.Identity | None:
    try:
        return identity.decode(directory.read_bytes(layout.IDENTITY))
    except FileNotFoundError:
        return None


def _said_by_service(directory: Storage) -> identity.Identity | None:
    try:
        run = record.decode(directory.read_bytes(layout.RECORD))["run"]
        return identity.Identity(
            run=run["id"], name=run["name"], experiment=run["experiment"], attempt=run["attempt"],
            status=RunStatus(run["status"]), reason=run["reason"],
        )  # fmt: skip
    except (FileNotFoundError, BadRecord, KeyError, ValueError):
        return None


def _nearest(storage: Storage, reference: str, places: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    known = [word for place in places[:200] for word in (look(storage, place).name, place[0])]
    return tuple(dict.fromkeys(difflib.get_close_matches(reference, known, n=3, cutoff=0.6)))
