"""The catalog straight from the database."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from orchestrator.alert_records import AlertRow, NotificationRow
from orchestrator.catalog.headline import AUTOMATIC, FIRST_WORDS
from orchestrator.catalog.live import LiveAnswers
from orchestrator.catalog.logs import StoredLogs
from orchestrator.catalog.questions import LAST, LONGEST_WAIT
from orchestrator.errors import NotFound
from orchestrator.live_records import LiveRun
from orchestrator.status import RunStatus
from orchestrator.store.store import Store
from orchestrator.store.views import (
    ArtifactRow,
    AttemptRow,
    CheckpointRow,
    Curve,
    EventRow,
    ExperimentRow,
    NoteRow,
    ParamRow,
    Points,
    RunDetail,
    RunRow,
    SinkLag,
    SummaryRow,
    SweepDetail,
    SweepRow,
)
from orchestrator.sweep_records import DecisionRow, JobRow, RequestRow, TrialRow


class DatabaseCatalog:
    """A Catalog over a `Store`. As safe to share between threads as the store is."""

    def __init__(self, store: Store, redis_url: str = "") -> None:
        self._store = store
        self._live = LiveAnswers(store, redis_url)

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
        trials: bool = True,
    ) -> list[RunRow]:
        rows = self._store.runs(
            experiment=experiment, status=status, tags=tags, search=search, limit=limit, offset=offset, trials=trials
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
        return {row.run: row for row in self._store.first_summaries(runs, groups=FIRST_WORDS, without=AUTOMATIC)}

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points:
        return self._store.points(run, key, rank=rank, attempt=attempt)

    def points_of(self, run: str, keys: Sequence[str]) -> dict[str, Points]:
        return self._store.points_of(run, keys)

    def point_blocks(
        self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None
    ) -> Generator[Points]:
        return self._store.point_blocks(run, key, rank=rank, attempt=attempt)

    def curve(
        self,
        run: str,
        key: str,
        *,
        rank: int = 0,
        attempt: int | None = None,
        start: int | None = None,
        stop: int | None = None,
        most: int = 2000,
    ) -> Curve:
        return self._store.curve(run, key, rank=rank, attempt=attempt, start=start, stop=stop, most=most)

    def live(self, run: str, *, after: str = "", wait: float = 0.0, redis: bool = True) -> LiveRun:
        return self._live.of(run, after, min(wait, LONGEST_WAIT), redis=redis)

    def sweeps(self, *, limit: int = 50, offset: int = 0) -> list[SweepRow]:
        return self._store.sweeps(limit=limit, offset=offset)

    def sweep(self, reference: str) -> SweepDetail:
        if reference == LAST:
            newest = self._store.sweeps(limit=1)
            if not newest:
                raise NotFound("sweep", reference)
            return self._store.sweep(newest[0].sweep)
        return self._store.sweep(self._store.run(reference).run)

    def trials(self, sweep: str, *, status: str = "", limit: int | None = None) -> list[TrialRow]:
        return list(self._store.sweep_trials(sweep, status=status, limit=limit))

    def sweep_jobs(self, sweep: str) -> list[JobRow]:
        return list(self._store.sweep_jobs(sweep))

    def decisions(self, sweep: str, *, after: int = -1, limit: int | None = None) -> list[DecisionRow]:
        return list(self._store.sweep_decisions(sweep, after=after, limit=limit))

    def sweep_requests(self, sweep: str) -> list[RequestRow]:
        return list(self._store.sweep_requests(sweep))

    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        """Not a question, so no other catalog has it: see `Store.ask_sweep`."""
        return self._store.ask_sweep(sweep, kind, details, user)

    def alerts(self, run: str | None = None, *, only_firing: bool = True) -> list[AlertRow]:
        return list(self._store.alerts(None if run is None else [run], only_firing=only_firing))

    def notifications(self, run: str | None = None) -> list[NotificationRow]:
        return list(self._store.notifications(run))

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        return self._store.sink_lags(run)

    def logs(self, run: str) -> StoredLogs:
        return StoredLogs(self._store.run(run).directory)
