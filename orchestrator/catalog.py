"""Reading what is recorded, for people and tools: `orc`, notebooks, reports. Nothing here writes.

`Catalog` says what can be asked. `DatabaseCatalog` answers straight from the database; whoever can only reach the head
over HTTP asks another implementation the same questions. Answers are the plain values of `store/views.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from orchestrator.errors import NotFound
from orchestrator.records import RunStatus
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from orchestrator.store.views import (
    ArtifactRow,
    AttemptRow,
    CheckpointRow,
    EventRow,
    ExperimentRow,
    NoteRow,
    ParamRow,
    Points,
    RunDetail,
    RunRow,
    SummaryRow,
)

LAST = "last"
"""Instead of a run's id or name: the newest run."""

PAGE = 1000


class Catalog(Protocol):
    """Read-only. Every `run` argument but that of `run()` is a full run id."""

    def experiments(self) -> list[ExperimentRow]: ...

    def runs(
        self,
        *,
        experiment: str | None = None,
        status: RunStatus | None = None,
        tags: Mapping[str, str] | None = None,
        search: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[RunRow]:
        """Newest first. An experiment that does not exist raises NotFound, naming the nearest."""
        ...

    def run(self, reference: str) -> RunDetail:
        """By id, unique beginning of an id, name, or `last`. Raises NotFound, naming the nearest."""
        ...

    def attempts(self, run: str) -> list[AttemptRow]: ...
    def params(self, run: str) -> list[ParamRow]: ...
    def notes(self, run: str) -> list[NoteRow]: ...
    def checkpoints(self, run: str) -> list[CheckpointRow]: ...
    def artifacts(self, run: str) -> list[ArtifactRow]: ...

    def events(self, run: str, *, newest: int) -> list[EventRow]:
        """The newest ones, oldest of them first."""
        ...

    def summaries(self, *runs: str) -> list[SummaryRow]:
        """One per run, key and rank."""
        ...

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points: ...


class DatabaseCatalog:
    """A Catalog over a `Store`. As safe to share between threads as the store is."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def experiments(self) -> list[ExperimentRow]:
        return self._store.experiments()

    def runs(
        self,
        *,
        experiment: str | None = None,
        status: RunStatus | None = None,
        tags: Mapping[str, str] | None = None,
        search: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[RunRow]:
        rows = self._store.runs(
            experiment=experiment, status=status, tags=tags, search=search, limit=limit, offset=offset
        )
        if not rows and experiment is not None:
            names = [row.name for row in self._store.experiments()]
            if experiment not in names:
                raise NotFound("experiment", experiment, tuple(difflib.get_close_matches(experiment, names)))
        return rows

    def run(self, reference: str) -> RunDetail:
        if reference == LAST:
            newest = self._store.runs(limit=1)
            if not newest:
                raise NotFound("run", reference)
            return self._store.run(newest[0].run)
        return self._store.run(reference)

    def attempts(self, run: str) -> list[AttemptRow]:
        return self._store.attempts(run)

    def params(self, run: str) -> list[ParamRow]:
        return self._store.params(run)

    def notes(self, run: str) -> list[NoteRow]:
        return self._store.notes(run)

    def checkpoints(self, run: str) -> list[CheckpointRow]:
        return self._store.checkpoints(run)

    def artifacts(self, run: str) -> list[ArtifactRow]:
        return self._store.artifacts(run)

    def events(self, run: str, *, newest: int) -> list[EventRow]:
        kept: list[EventRow] = []
        after = 0
        while page := self._store.events(run, after=after, limit=PAGE):
            kept, after = [*kept, *page][-newest:], page[-1].id
            if len(page) < PAGE:
                break
        return kept

    def summaries(self, *runs: str) -> list[SummaryRow]:
        return self._store.summaries_of(runs) if runs else []

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points:
        return self._store.points(run, key, rank=rank, attempt=attempt)


@contextmanager
def open_catalog(home: Path) -> Iterator[Catalog]:
    """The catalog of the stack whose data directory is `home`. Raises ServiceUnavailable or SchemaMismatch."""
    with open_store(home) as store:
        yield DatabaseCatalog(store)


@contextmanager
def open_store(home: Path) -> Iterator[Store]:
    """The stack's store, with the schema checked, for the few commands that write."""
    store = Store(Stack.load(home).database_url, pool_size=1)
    try:
        store.check_schema()
        yield store
    finally:
        store.close()
