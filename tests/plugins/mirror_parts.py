"""A feed and a sink in memory for tests of the mirror: the feed behaves like the store, the sink like MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.backends.sinks import DatasetFacts, File, RunFacts, Series, SinkRefused, Target
from orchestrator.errors import NotFound, ServiceUnavailable
from orchestrator.records import RunStatus
from orchestrator.store.views import (
    ArtifactRow,
    AttemptRow,
    ChangedRuns,
    ChunkRow,
    FactChanges,
    FeedPosition,
    NoteRow,
    ParamRow,
    RunDetail,
    SinkCursor,
    SinkLag,
    SummaryRow,
)

START = 1_700_000_000.0


class MemoryFeed:
    """A `Feed`. Tests write with `open`, `log`, `tag`, `end` …; `is_away` makes it unreachable."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Any]] = {}
        self._chunks: dict[str, list[ChunkRow]] = {}
        self._attempts: dict[str, dict[int, dict[str, Any]]] = {}
        self.reductions: dict[str, str] = {}
        """Key -> what was declared for it."""
        self._cursors: dict[tuple[str, str], SinkCursor] = {}
        self._changes = 0
        self.links: dict[str, dict[str, Any]] = {}
        self.lock_owner: object | None = None
        self.is_locked_elsewhere = False
        self.is_away = False
        self.forgets_cursors = False
        """Saving a cursor has no effect, as if the process had died just before."""

    # -- what tests write -------------------------------------------------------------------------------------------

    def open(self, run: str, *, experiment: str = "digits", name: str = "calm-otter", **fields: Any) -> None:
        self._runs[run] = {
            "run": run, "name": name, "experiment": experiment, "project": "default", "user": "ada",
            "status": RunStatus.running, "reason": "", "attempt": 1, "workers": 1, "job": "", "sweep": "",
            "created": START, "started": START, "ended": None, "tags": {}, "description": "",
            "directory": f"/runs/{run}", "config": {"train": "digits:train"}, "config_hash": "c0ffee",
            "seed": 0, "model": {}, "dataset": {},
            "error": None, "cancel_requested": None, "cancel_requested_by": "", "parents": {},
            "params": {}, "notes": [], "artifacts": {}, "git": {}, "provenance": {}, **fields,
        }  # fmt: skip
        self._chunks[run] = []
        self._attempts[run] = {}
        self.change(run)

    def change(self, run: str, **fields: Any) -> None:
        """With `attempt` a further attempt begins."""
        row = self._runs[run]
        row.update(fields)
        began = self._attempts[run].get(row["attempt"], {}).get("started", START + 50 * (row["attempt"] - 1))
        self._touch(run)
        self._attempts[run][row["attempt"]] = {
            "status": row["status"], "reason": row["reason"], "error": row["error"], "workers": row["workers"],
            "started": began, "ended": row["ended"], "provenance": {"git": row["git"], **row["provenance"]},
            "changed": row["changed"],
        }  # fmt: skip

    def end(self, run: str, status: RunStatus = RunStatus.finished, at: float = START + 100) -> None:
        self.change(run, status=status, ended=at)

    def remove(self, run: str) -> None:
        del self._runs[run]

    def log(
        self, run: str, key: str, values: Sequence[float], *, first_step: int = 0, rank: int = 0, attempt: int = 1
    ) -> None:
        """One chunk: step i at START + i/10 seconds."""
        steps = np.arange(first_step, first_step + len(values), dtype=np.int64)
        self._changes += 1
        self._chunks[run].append(
            ChunkRow(
                key=key,
                attempt=attempt,
                rank=rank,
                steps=steps,
                times=START + steps / 10.0,
                values=np.asarray(values, np.float64),
                position=FeedPosition(xid=self._changes, id=self._changes),
            )  # fmt: skip
        )
        self._touch(run)

    def _touch(self, run: str) -> None:
        self._changes += 1
        self._runs[run]["changed"] = self._changes

    # -- what the mirror reads --------------------------------------------------------------------------------------

    def _answer(self) -> None:
        if self.is_away:
            raise ServiceUnavailable("postgresql", "memory", "it is switched off.", "")

    def try_lock(self, sink: str) -> bool:
        self._answer()
        return not self.is_locked_elsewhere

    def unlock(self, sink: str) -> None:
        self._answer()

    def changed_runs(self, after: int = 0) -> ChangedRuns:
        self._answer()
        runs = tuple(run for run, row in self._runs.items() if row["changed"] > after)
        return ChangedRuns(runs=runs, cursor=self._changes)

    def whereabouts(self, runs: Iterable[str]) -> dict[str, tuple[RunStatus, str]]:
        self._answer()
        return {run: (self._runs[run]["status"], "") for run in runs if run in self._runs}

    def facts_after(self, run: str, cursor: int = 0) -> FactChanges:
        self._answer()
        if run not in self._runs:
            raise NotFound("run", run)
        row = dict(self._runs[run])
        params, notes, artifacts = (row.pop(name) for name in ("params", "notes", "artifacts"))
        for name in ("changed", "git", "provenance"):
            row.pop(name)
        detail = RunDetail(**row, links=self.links.get(run, {}))
        attempts = tuple(
            AttemptRow(
                run=run, attempt=number, user="ada", job="", config_hash="", lease_until=None,
                **{name: value for name, value in one.items() if name != "changed"},
            )
            for number, one in self._attempts[run].items()
            if one["changed"] > cursor
        )  # fmt: skip
        return FactChanges(
            run=detail,
            params=tuple(ParamRow(name=k, type=type(v).__name__, value=v) for k, v in params.items()),
            tags=detail.tags,
            notes=tuple(NoteRow(at=START, user="ada", text=text) for text in notes),
            checkpoints=(),
            artifacts=tuple(_artifact(run, name, uri) for name, uri in artifacts.items()),
            attempts=attempts,
            cursor=self._changes,
        )

    def has_facts_after(self, run: str, cursor: int) -> bool:
        self._answer()
        if run not in self._runs:
            raise NotFound("run", run)
        return self._runs[run]["changed"] > cursor

    def chunks_after(self, run: str, position: FeedPosition, *, limit: int = 1000) -> list[ChunkRow]:
        self._answer()
        return [chunk for chunk in self._chunks[run] if chunk.position > position][:limit]

    def summaries(self, run: str) -> list[SummaryRow]:
        self._answer()
        groups: dict[tuple[str, int], list[ChunkRow]] = {}
        for chunk in self._chunks[run]:
            groups.setdefault((chunk.key, chunk.rank), []).append(chunk)
        return [
            _summary(run, key, rank, chunks, self.reductions.get(key, "")) for (key, rank), chunks in groups.items()
        ]

    def cursor(self, sink: str, run: str = "") -> SinkCursor:
        self._answer()
        return self._cursors.get((sink, run), SinkCursor())

    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None:
        self._answer()
        if not self.forgets_cursors:
            self._cursors[sink, run] = cursor

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        self._answer()
        return [self._lag(sink, cursor, run) for (sink, of_run), cursor in self._cursors.items() if not of_run]

    def _lag(self, sink: str, cursor: SinkCursor, only: str | None) -> SinkLag:
        noted = (*cursor.state["runs"], *self.changed_runs(cursor.facts).runs)
        runs = [run for run in dict.fromkeys(noted) if run in self._runs and only in (None, run)]
        points, seconds = 0, 0.0
        for run in runs:
            times = np.concatenate([np.empty(0), *(chunk.times for chunk in self._chunks[run])])
            state = self.cursor(sink, run).state
            if len(times) > state.get("seen", 0):
                points += len(times) - state.get("seen", 0)
                seconds = max(seconds, times.max() - (state.get("last_ms", 0) / 1000 or times.min()))
        return SinkLag(
            sink=sink, points=points, seconds=seconds, runs=len(runs), state=cursor.state["state"],
            error=cursor.state["error"], updated=START,
        )  # fmt: skip

    def set_link(self, run: str, name: str, value: Any) -> None:
        self._answer()
        self.links.setdefault(run, {})[name] = value
        self._touch(run)


def _artifact(run: str, name: str, uri: str) -> ArtifactRow:
    return ArtifactRow(
        run=run, name=name, attempt=1, uri=uri, media_type="", size_bytes=None, sha256="", step=None, created=START
    )


def _summary(run: str, key: str, rank: int, chunks: Sequence[ChunkRow], reduction: str) -> SummaryRow:
    values = np.concatenate([chunk.values for chunk in chunks])
    times = np.concatenate([chunk.times for chunk in chunks])
    return SummaryRow(
        run=run, key=key, rank=rank, unit="", direction="", reduction=reduction, count=len(values),
        nan_count=0, inf_count=0,
        first=float(values[0]), first_step=0, first_time=float(times[0]), last=float(values[-1]), last_step=0,
        last_time=float(times[-1]), last_attempt=1, minimum=None, min_step=None, maximum=None, max_step=None, mean=None,
    )  # fmt: skip


class RecordingSink:
    """A `Sink` that keeps points as a set of (name, time, step, value). `faults` are raised, one per request.

    Attempt 2 of run r1 is kept as `r1.2`.
    """

    name = "recording"
    max_points = 1000
    complete = 10_000
    clips_infinity = True

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.received = 0
        self.faults: list[Exception] = []
        self.is_down: Exception | None = None
        self.refused_values: set[float] = set()
        self.refused_tags: set[str] = set()
        self.takes_files = False
        self.upload_fault: Exception | None = None

    def _answer(self, request: str) -> None:
        self.requests.append(request)
        if self.is_down is not None:
            raise self.is_down
        if self.faults:
            raise self.faults.pop(0)

    def name_for(self, name: str) -> str:
        return name.replace("@", "_")

    def tags(self, run: RunFacts) -> Mapping[str, str]:
        return {**run.tags, "orc.status": run.status.value}

    def params(self, run: RunFacts) -> Mapping[str, str]:
        return {name: str(value) for name, value in run.params.items()}

    def ensure_run(self, run: RunFacts) -> Target:
        self._answer("ensure_run")
        name = f"{run.attempt_of}.{run.attempt}" if run.attempt_of else run.id
        created = name not in self.runs
        if created:
            self.runs[name] = {
                "points": set(), "tags": {}, "params": {}, "status": None, "facts": run, "datasets": set(), "files": {},
            }  # fmt: skip
        return Target(id=name, url=f"memory:{name}", created=created, takes_files=self.takes_files)

    def rewind(self, target: Target, mark: Any) -> bool:
        return True

    def mark(self, target: Target) -> Any:
        return None

    def set_tags(self, target: Target, tags: Mapping[str, str]) -> None:
        self._answer("set_tags")
        if bad := self.refused_tags & set(tags):
            raise SinkRefused(self.name, "tags", f"no {sorted(bad)}")
        self.runs[target.id]["tags"].update(tags)

    def log_params(self, target: Target, params: Mapping[str, str]) -> None:
        self._answer("log_params")
        self.runs[target.id]["params"].update(params)

    def log_metrics(self, target: Target, series: Sequence[Series]) -> None:
        self._answer("log_metrics")
        assert 0 < sum(map(len, series)) <= self.max_points
        points = [
            (one.name, int(time), int(step), repr(float(value)))
            for one in series
            for step, time, value in zip(one.steps, one.times_ms, one.values, strict=True)
        ]
        if any(float(point[3]) in self.refused_values for point in points):
            raise SinkRefused(self.name, "points", "a bad value")
        self.runs[target.id]["points"].update(points)
        self.received += len(points)

    def log_datasets(self, target: Target, datasets: Sequence[DatasetFacts]) -> None:
        self._answer("log_datasets")
        self.runs[target.id]["datasets"].update(datasets)

    def files(self, run: RunFacts) -> Sequence[File]:
        return [
            File(path=one.name, mark=one.uri, uri=one.uri, directory=run.directory) for one in run.artifacts
        ]  # fmt: skip

    def upload(self, target: Target, file: File) -> None:
        self._answer("upload")
        if self.upload_fault is not None:
            raise self.upload_fault
        self.runs[target.id]["files"][file.path] = file.mark

    def set_status(self, target: Target, status: RunStatus, end_ms: int | None) -> None:
        self._answer("set_status")
        self.runs[target.id]["status"] = (status, end_ms)

    def ping(self) -> None:
        self._answer("ping")

    def close(self) -> None: ...

    def curve(self, run: str, name: str) -> dict[int, float]:
        """Step -> value. Fails when a step is there twice."""
        points = [(step, float(value)) for key, _, step, value in self.runs[run]["points"] if key == name]
        assert len(points) == len({step for step, _ in points})
        return dict(sorted(points))
