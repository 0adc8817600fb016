"""What can be asked about runs, whoever answers."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from orchestrator.alert_records import AlertRow, NotificationRow
    from orchestrator.live_records import LiveRun
    from orchestrator.status import RunStatus
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

LONGEST_WAIT = 5.0
LAST = "last"
"""Instead of a run's id or name: the newest run; of a sweep's: the newest sweep."""


class LogFiles(Protocol):
    """What a run's processes printed: text files in its directory, wherever that is."""

    def attempts(self) -> list[int]:
        """Numbers of the attempts that have logs, oldest first."""
        ...

    def sources(self, attempt: int) -> dict[str, int]:
        """`driver`, `rank-0`, `rank-1` …, then `driver.jsonl` …, the structured lines beside them, then
        `rank-0.stack` … of an attempt that hung; as far as they have a file, each with the size of its file in bytes.
        """
        ...

    def read(self, attempt: int, source: str, offset: int, limit: int) -> bytes:
        """At most `limit` bytes from `offset` on, possibly fewer; nothing at the end of the file. Raises NotFound."""
        ...

    def uri(self, attempt: int = 0, source: str = "") -> str:
        """Where the file is (or all of them are), for people."""
        ...


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
        trials: bool = True,
    ) -> list[RunRow]:
        """Newest first; `trials`: also the runs of sweeps' trials. An experiment that does not exist raises NotFound,
        naming the nearest."""
        ...

    def run(self, reference: str) -> RunDetail:
        """By id, unique beginning of an id, name, or `last`. Raises NotFound, naming the nearest, and AmbiguousName."""
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

    def main_metrics(self, *runs: str) -> dict[str, SummaryRow]:
        """Of each run that has metrics, the one that tells how it went (see headline.py), of the lowest rank."""
        ...

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points:
        """Exactly as logged; empty when there are none. Raises NotFound for the run."""
        ...

    def points_of(self, run: str, keys: Sequence[str]) -> dict[str, Points]:
        """The same for many short metrics at once, of all ranks and attempts."""
        ...

    def point_blocks(
        self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None
    ) -> Generator[Points]:
        """The same, piece by piece, with bounded memory. Ask nothing else before it is exhausted or closed."""
        ...

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
        """For a chart: one rank and attempt (None: the newest that has the key) in at most `most` windows, from step
        `start` to `stop`; see `Store.curve`. Reads a few thousand points, however long the curve is."""
        ...

    def live(self, run: str, *, after: str = "", wait: float = 0.0, redis: bool = True) -> LiveRun:
        """The newest values of a run, also while it is going on; what is committed once Redis knows nothing of it.

        With the `cursor` of an earlier answer as `after`: at least what changed since, waiting for it at most `wait`
        seconds (and at most `LONGEST_WAIT`). Without `redis` the database is asked. Raises NotFound for the run.
        """
        ...

    def sweeps(self, *, limit: int = 50, offset: int = 0) -> list[SweepRow]:
        """Newest first."""
        ...

    def sweep(self, reference: str) -> SweepDetail:
        """By id, unique beginning of an id, or name of its parent run, or `last`. Raises NotFound and AmbiguousName."""
        ...

    def trials(self, sweep: str, *, status: str = "", limit: int | None = None) -> list[TrialRow]:
        """By number; `sweep` is a full id, here and below."""
        ...

    def sweep_jobs(self, sweep: str) -> list[JobRow]:
        """By number."""
        ...

    def decisions(self, sweep: str, *, after: int = -1, limit: int | None = None) -> list[DecisionRow]:
        """With their inputs, oldest first, from the one behind `after`."""
        ...

    def sweep_requests(self, sweep: str) -> list[RequestRow]:
        """Oldest first, answered ones too."""
        ...

    def alerts(self, run: str | None = None, *, only_firing: bool = True) -> list[AlertRow]:
        """Newest first, at most a thousand; of one run or of all."""
        ...

    def notifications(self, run: str | None = None) -> list[NotificationRow]:
        """What waits to be sent or could not be, newest first, at most a thousand."""
        ...

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        """How far each sink is behind what is committed; `run`: of that one alone."""
        ...

    def logs(self, run: str) -> LogFiles:
        """Raises NotFound for the run."""
        ...
