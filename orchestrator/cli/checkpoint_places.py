"""What RUN[@NAME] means: which directory of checkpoints, and which of them.

Instead of a run, a directory or URL may be given: of a checkpoint, of a run, or one that holds checkpoints. Then no
database is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.backends.storage import Storage
from orchestrator.catalog import open_store
from orchestrator.checkpoints import catalog, pointers
from orchestrator.checkpoints.catalog import DIRECTORY, Found, Scan
from orchestrator.checkpoints.commit import QUARANTINE_NOTE
from orchestrator.checkpoints.manifest import MANIFEST, UnknownFormat
from orchestrator.cli import text
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.store.store import Store
    from orchestrator.store.views import RunDetail

LATEST, BEST = "latest", "best"


class NoCheckpoint(UserError):
    """There is none of that name. `hint` says what to do."""

    def __init__(self, where: str, name: str, hint: str) -> None:
        super().__init__(where, name, hint)
        self.where, self.name, self.hint = where, name, hint

    def __str__(self) -> str:
        return f"{self.where} has no checkpoint{f' {self.name!r}' if self.name else ''}. {self.hint}"


class Unreachable(UserError):
    """A place of checkpoints that cannot be read or written."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"{self.uri}: {self.why}. Is this storage mounted here, and may you use it?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where checkpoints of one run lie; of no known run, if a directory was given."""

    storage: Storage
    """Of the directory that holds them."""
    title: str
    """For people: the run's name, or the directory."""
    reference: str
    """What to give `orc` to get here."""
    run: RunDetail | None = None

    def scan(self) -> Scan:
        """Raises Unreachable, or UserError for checkpoints of another version."""
        try:
            return catalog.scan(self.storage, with_holds=True, now=time.time())
        except UnknownFormat as error:
            raise UserError(str(error)) from error
        except OSError as error:
            raise Unreachable(self.storage.uri(), _words(error)) from error

    def chosen(self, scan: Scan, name: str) -> Found:
        """By its name, its label, its step, `latest` or `best`; without a name the latest. Raises NoCheckpoint."""
        found = {each.manifest.name: each for each in scan.found}
        newest_first = [found[manifest.name] for manifest in scan.committed]
        good = [each for each in newest_first if not each.is_bad]
        if name == BEST and (best := self._best(good)) is not None:
            return best
        if name in ("", LATEST) and good:
            return good[0]
        for each in newest_first:
            if name and name in (each.manifest.name, each.manifest.label, str(each.manifest.step)):
                return each
        raise NoCheckpoint(self.title, name, self._hint(scan, name))

    @contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """Nobody deletes it meanwhile, where we may say so. Raises NoCheckpoint if it has just been deleted."""
        with ExitStack() as held:
            try:
                held.enter_context(catalog.in_use(self.storage, name, now=time.time()))
            except FileNotFoundError as error:
                hint = "It was deleted just now: by its run, which keeps the last few, or by a user."
                raise NoCheckpoint(self.title, name, hint) from error
            yield

    def _best(self, newest_first: list[Found]) -> Found | None:
        best = pointers.best_first(self.storage, BEST, [each.manifest for each in newest_first])
        return next((each for each in newest_first if best and each.manifest.name == best[0].name), None)

    def _hint(self, scan: Scan, name: str) -> str:
        uri = self.storage.uri()
        if why := next((str(error) for damaged, error in scan.corrupt if damaged == name), ""):
            return f"It is damaged: {why}"
        if name and catalog.is_name(name) and self.storage.exists(f"{name}/{QUARANTINE_NOTE}"):
            return f"It was damaged and set aside; its files are in {self.storage.uri(name)}."
        if name in scan.incomplete:
            return "It is being written, or was left unfinished by a crash."
        if name == BEST and scan.committed:
            return f"None was called best; `orc checkpoint ls {self.reference}` lists what there is."
        if not scan.committed:
            left = len(scan.incomplete) + len(scan.corrupt)
            return f"None is in {uri}." + (f" {left} there are damaged or not finished." if left else "")
        near = text.did_you_mean(text.nearest(name, [manifest.name for manifest in scan.committed]))
        return f"{near} `orc checkpoint ls {self.reference}` lists what there is.".strip()


class Places:
    """Finds places; opens the database when the first run is asked for, and closes it at the end of the block."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._open = ExitStack()
        self._store: Store | None = None

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def store(self) -> Store:
        """Raises ServiceUnavailable, SchemaMismatch."""
        if self._store is None:
            self._store = self._open.enter_context(open_store(self._home))
        return self._store

    def find(self, reference: str) -> tuple[Place, str]:
        """The place and the NAME, empty if none was given. Raises NotFound, AmbiguousName, NoCheckpoint."""
        source, name = split(reference)
        if is_directory(source):
            return _directory(source, name)
        from orchestrator.catalog.database import DatabaseCatalog  # a second, which a directory need not pay

        return self.of(DatabaseCatalog(self.store).run(source)), name

    def of(self, run: RunDetail) -> Place:
        if not run.directory:
            raise UserError(f"Run {run.name} ({run.run}) was recorded without a directory: it has no checkpoints.")
        storage = Storage(run.directory).join(DIRECTORY)
        return Place(storage=storage, title=f"run {run.name}", reference=run.run, run=run)


def split(reference: str) -> tuple[str, str]:
    """Example: split("brave-otter@best") == ("brave-otter", "best"). The user in a URL is none of ours."""
    source, at, name = reference.rpartition("@")
    return (source, name) if at and source and "/" not in name else (reference, "")


def is_directory(source: str) -> bool:
    return "/" in source or source.startswith((".", "~"))


def _directory(source: str, name: str) -> tuple[Place, str]:
    storage = Storage(source)
    try:
        is_there = storage.exists()
        if storage.exists(MANIFEST) or storage.exists(QUARANTINE_NOTE):
            parent = storage.above(1)
            if parent is not None:
                storage, name = parent, storage.parts[-1]
        elif storage.exists(DIRECTORY):
            storage = storage.join(DIRECTORY)
    except OSError as error:
        raise Unreachable(storage.uri(), _words(error)) from error
    if not is_there:
        raise NoCheckpoint(storage.uri(), name, "There is no such directory.")
    return Place(storage=storage, title=storage.uri(), reference=storage.uri()), name


def _words(error: OSError) -> str:
    return error.strerror or str(error)
