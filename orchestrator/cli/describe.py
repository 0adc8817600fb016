"""What `orc ls` and `orc show` say about a run. Pure: rows and the time in, documents and cells out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.catalog.headline import is_automatic, main_key
from orchestrator.cli import text
from orchestrator.failures.explain import five_lines
from orchestrator.provenance.summary import code_line, fingerprint_line
from orchestrator.status import RunStatus

if TYPE_CHECKING:
    from orchestrator.cli.output import Output
    from orchestrator.store.views import (
        ArtifactRow,
        AttemptRow,
        CheckpointRow,
        EventRow,
        NoteRow,
        ParamRow,
        RunDetail,
        RunRow,
        SummaryRow,
    )

RUN_COLUMNS = ("status", "name", "id", "experiment", "age", "duration", "metric", "last", "best")
RUN_COLUMNS_RIGHT = (4, 5, 7, 8)
RUN_COLUMNS_OPTIONAL = ("id", "duration", "experiment", "last")
EVENTS_SHOWN = 10


def main_metric(summaries: Iterable[SummaryRow]) -> SummaryRow | None:
    """The one metric that tells how a run went: one with a declared direction if any, validation before training."""
    by_key = {row.key: row for row in lowest_ranks(summaries)}
    key = main_key({key: row.direction for key, row in by_key.items()})
    return None if key is None else by_key[key]


def lowest_ranks(summaries: Iterable[SummaryRow]) -> list[SummaryRow]:
    """One row for each key, by name: the lowest rank speaks for it."""
    rows = sorted(summaries, key=lambda row: row.rank, reverse=True)
    return sorted({row.key: row for row in rows}.values(), key=lambda row: row.key)


def run_cells(row: RunRow, metric: SummaryRow | None, now: float) -> tuple[str, ...]:
    return (
        str(row.status),
        row.name,
        row.run,
        row.experiment,
        text.age(now - row.created),
        text.duration(row.duration(now)),
        metric.key if metric else "-",
        text.number(metric.last if metric else None),
        text.number(metric.best if metric else None),
    )


def run_document(row: RunRow, metric: SummaryRow | None, now: float) -> dict[str, Any]:
    document = text.jsonable(row)
    document["duration"] = row.duration(now)
    document["metric"] = summary_document(metric) if metric else None
    return document


def summary_document(row: SummaryRow) -> dict[str, Any]:
    document = text.jsonable(row)
    del document["run"]
    return document | {"best": text.jsonable(row.best), "best_step": row.best_step}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Everything `orc show` tells."""

    run: RunDetail
    attempts: Sequence[AttemptRow]
    params: Sequence[ParamRow]
    summaries: Sequence[SummaryRow]
    checkpoints: Sequence[CheckpointRow]
    artifacts: Sequence[ArtifactRow]
    notes: Sequence[NoteRow]
    events: Sequence[EventRow]
    """The newest ones, oldest first."""
    links: Mapping[str, str]
    """Where to look further: name -> address."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Of the newest attempt, with what is recorded elsewhere; empty: all that there is stands in `attempts`."""
    recorded_with: RunDetail | None = None
    """The run that has its source and packages; None: itself."""

    def document(self, now: float) -> dict[str, Any]:
        return text.jsonable(
            {
                **run_document(self.run, None, now),
                "failure": dict(five_lines(self.run.error)) if self.run.error else None,
                "metric": None if (metric := main_metric(self.summaries)) is None else metric.key,
                "attempts": self.attempts,
                "recorded_with": self.recorded_with.run if self.recorded_with else None,
                "params": {row.name: row.value for row in self.params},
                "summaries": [summary_document(row) for row in self.summaries],
                "checkpoints": self.checkpoints,
                "artifacts": self.artifacts,
                "notes": self.notes,
                "events": self.events,
                "links": dict(self.links),
                "mirrors": self.run.links,
                "next": self.next_line(),
            }
        )

    def next_line(self) -> str:
        """The command that goes on from here; with the id, because several runs may have one name."""
        if not self.run.status.is_terminal:
            return f"orc logs {self.run.run} --follow"
        if self.run.status is not RunStatus.finished:
            return f"orc resume {self.run.run}"
        return f"orc run --from {self.run.run}"

    def render(self, output: Output, now: float) -> None:
        run = self.run
        provenance, other = self.provenance, self.recorded_with
        if not provenance and self.attempts:
            provenance = self.attempts[-1].provenance
        output.line(f"{run.name}  {run.status}", style="bold")
        output.fields(
            [
                ("id", run.run),
                ("experiment", run.experiment),
                ("why", run.reason),
                ("stop", _cancellation(run, now)),
                ("started", "" if run.started is None else text.age(now - run.started)),
                ("duration", "" if run.started is None else text.duration(run.duration(now))),
                ("workers", str(run.workers)),
                ("seed", str(run.seed)),
                ("user", run.user),
                ("job", run.job),
                ("about", run.description),
                ("tags", "  ".join(f"{name}={value}" for name, value in sorted(run.tags.items()))),
                ("config", run.config_hash[:12]),
                ("code", code_line(provenance)),
                ("fingerprint", fingerprint_line(provenance)),
                ("recorded", f"source and packages with sweep {other.name} ({other.run})" if other else ""),
            ]
        )
        if run.error and (run.status is not RunStatus.finished):
            output.line()
            output.line("failure", style="bold")
            output.fields(five_lines(run.error), indent="  ")
        self._tables(output, now)
        if self.links:
            output.line()
            output.line("look further")
            output.fields([(name.replace("_", " "), address) for name, address in self.links.items()], indent="  ")
        output.line()
        output.line(f"next: {self.next_line()}")

    def _tables(self, output: Output, now: float) -> None:
        if self.params:
            output.line()
            output.table(
                ("name", "value"),
                [(row.name, text.one_line(text.number(row.value))) for row in self.params],
                title="params",
            )
        if self.summaries:
            self._metrics(output)
        if self.attempts:
            output.line()
            output.table(
                ("attempt", "status", "started", "duration", "why"),
                [_attempt(row, now) for row in self.attempts],
                title="attempts",
            )
        if self.checkpoints:
            output.line()
            output.table(
                ("id", "step", "epoch", "state", "size", "age", ""),
                [_checkpoint(row, now) for row in self.checkpoints],
                right=(1, 2, 4),
                title="checkpoints",
            )
        if self.artifacts:
            output.line()
            rows = [(row.name, text.number(row.step), text.size(row.size_bytes), row.uri) for row in self.artifacts]
            output.table(("name", "step", "size", "where"), rows, right=(1, 2), title="artifacts")
        if self.notes:
            output.line()
            rows_of_notes = [(text.age(now - row.at), row.user, text.one_line(row.text)) for row in self.notes]
            output.table(("age", "user", "note"), rows_of_notes, title="notes")
        if self.events:
            output.line()
            output.table(("age", "level", "kind", "message"), [_event(row, now) for row in self.events], title="events")

    def _metrics(self, output: Output) -> None:
        rows = lowest_ranks(self.summaries)
        said = [row for row in rows if not is_automatic(row.key)]
        measured = [row for row in rows if is_shown_measurement(row.key)]
        if said:
            output.line()
            output.table(SUMMARY_COLUMNS, [summary_cells(row) for row in said], right=range(1, 8), title="metrics")
        if measured:
            output.line()
            cells = [measurement_cells(row) for row in measured]
            output.table(MEASUREMENT_COLUMNS, cells, right=range(1, 5), title="speed and machine")
        if len(said) + len(measured) < len(self.summaries):
            output.line(f"  `orc metrics {self.run.name}` shows the other ranks and all that was measured")


MEASUREMENT_COLUMNS = ("key", "last", "mean", "min", "max")
_OF_SYSTEM = ("cpu_percent", "memory_percent", "rss_bytes", "utilization_percent")


def is_shown_measurement(key: str) -> bool:
    """Of what is recorded without being asked: all about the run's speed, a little about its machine."""
    return is_automatic(key) and (not key.startswith("system/") or key.split("/")[-1] in _OF_SYSTEM)


def measurement_cells(row: SummaryRow) -> tuple[str, ...]:
    is_size = row.unit == "bytes"
    unit = f" [{row.unit}]" if row.unit and not is_size else ""
    numbers = (row.last, row.mean, row.minimum, row.maximum)
    shown = (text.size(n) if is_size else text.number(n) for n in numbers)
    return (row.key + unit, *shown)


SUMMARY_COLUMNS = ("key", "rank", "last", "step", "min", "max", "best", "points")


def summary_cells(row: SummaryRow) -> tuple[str, ...]:
    unit = f" [{row.unit}]" if row.unit else ""
    odd = ", ".join(f"{count} {what}" for count, what in ((row.nan_count, "NaN"), (row.inf_count, "inf")) if count)
    return (
        row.key + unit,
        str(row.rank),
        text.number(row.last),
        str(row.last_step),
        text.number(row.minimum),
        text.number(row.maximum),
        text.number(row.best),
        str(row.count) + (f" ({odd})" if odd else ""),
    )


def links(run: RunDetail, *, ray_dashboard: str) -> dict[str, str]:
    """Addresses that a person can open: the run's directory, its page in MLflow, its job in Ray's dashboard."""
    found = {"directory": run.directory}
    if "://" in run.directory:
        from orchestrator.config.redaction import redact_url  # a tenth of a second, which a local run need not pay

        found["directory"] = redact_url(run.directory)
    mirrored = run.links.get("mlflow")
    if isinstance(mirrored, Mapping) and mirrored.get("url"):
        found["mlflow"] = str(mirrored["url"])
    if ray_dashboard:
        found["ray_dashboard"] = ray_dashboard.rstrip("/") + (f"/#/jobs/{run.job}" if run.job else "")
    return found


def _error(error: Mapping[str, Any] | None) -> str:
    if not error:
        return ""
    where = f"rank {error['rank']}: " if error.get("rank") is not None else ""
    return where + text.one_line(": ".join(str(error[key]) for key in ("type", "message") if error.get(key)), 200)


def _cancellation(run: RunDetail, now: float) -> str:
    if run.cancel_requested is None or run.status not in (RunStatus.running, RunStatus.cancelled):
        return ""
    by = f" by {run.cancel_requested_by}" if run.cancel_requested_by else ""
    return f"asked for {text.age(now - run.cancel_requested)}{by}"


def _attempt(row: AttemptRow, now: float) -> tuple[str, ...]:
    end = row.ended if row.ended is not None else now
    why = text.one_line(row.reason or _error(row.error))
    return (str(row.attempt), str(row.status), text.age(now - row.started), text.duration(end - row.started), why)


def _checkpoint(row: CheckpointRow, now: float) -> tuple[str, ...]:
    marks = " ".join(
        mark for mark, is_set in (("best", row.is_best), ("pinned", row.is_pinned), (row.label, row.label)) if is_set
    )
    return (
        row.id,
        text.number(row.step),
        text.number(row.epoch),
        row.state,
        text.size(row.size_bytes),
        text.age(now - row.created),
        marks,
    )


def _event(row: EventRow, now: float) -> tuple[str, ...]:
    return (text.age(now - row.at), row.level, row.kind, text.one_line(row.message))
