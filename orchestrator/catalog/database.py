"""The catalog straight from the database."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from orchestrator.catalog.headline import FIRST_WORDS
from orchestrator.catalog.logs import StoredLogs
from orchestrator.catalog.questions import LAST
from orchestrator.errors import NotFound
from orchestrator.status import RunStatus
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
        return self._store.newest_events(run, limit=newest)

    def summaries(self, *runs: str) -> list[SummaryRow]:
        return self._store.summaries_of(runs) if runs else []

    def main_metrics(self, *runs: str) -> dict[str, SummaryRow]:
        return {row.run: row for row in self._store.first_summaries(runs, groups=FIRST_WORDS)}

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points:
        return self._store.points(run, key, rank=rank, attempt=attempt)

    def logs(self, run: str) -> StoredLogs:
        return StoredLogs(self._store.run(run).directory)
