"""Questions to the database. Functions take a connection and give the plain values of views.py."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import psycopg
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Row,
    Select,
    Text,
    any_,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    tuple_,
)
from sqlalchemy import String as SqlString
from sqlalchemy.dialects.postgresql import distinct_on

from orchestrator.errors import AmbiguousName, NotFound
from orchestrator.records import TERMINAL, RunStatus
from orchestrator.store import tables as t
from orchestrator.store.binary import numpy_cursor
from orchestrator.store.cleaning import untyped
from orchestrator.store.views import (
    ArtifactRow,
    AttemptRow,
    ChangedRuns,
    CheckpointRow,
    ChunkRow,
    EventRow,
    ExperimentRow,
    FactChanges,
    FeedPosition,
    NoteRow,
    ParamRow,
    Points,
    RunDetail,
    RunRow,
    SinkCursor,
    SummaryRow,
)

_CANDIDATES = 5
_TERMINAL = [status.value for status in TERMINAL]


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()


# -- experiments and runs ----------------------------------------------------------------------------------------------


def experiments(connection: Connection, project: str | None) -> list[ExperimentRow]:
    """Those used last come first."""
    count = (
        select(
            t.runs.c.experiment_id,
            func.count().label("runs"),
            func.count().filter(t.runs.c.status.not_in(_TERMINAL)).label("active"),
            func.max(t.runs.c.created_at).label("last_run"),
        )
        .where(t.runs.c.deleted_at.is_(None))
        .group_by(t.runs.c.experiment_id)
        .subquery()
    )
    query = (
        select(t.experiments, count.c.runs, count.c.active, count.c.last_run)
        .outerjoin(count, count.c.experiment_id == t.experiments.c.id)
        .order_by(count.c.last_run.desc().nulls_last(), t.experiments.c.id.desc())
    )
    if project is not None:
        query = query.where(t.experiments.c.project == project)
    return [
        ExperimentRow(
            name=row.name, project=row.project, description=row.description, user=row.who,
            created=row.created_at.timestamp(),
            runs=row.runs or 0, active=row.active or 0, last_run=_seconds(row.last_run),
        )
        for row in connection.execute(query)
    ]  # fmt: skip


def _listed(*more: ColumnElement[Any]) -> Select[Any]:
    return (
        select(t.runs, t.experiments.c.name.label("experiment"), *more)
        .join(t.experiments, t.experiments.c.id == t.runs.c.experiment_id)
        .where(t.runs.c.deleted_at.is_(None))
    )


def runs_query(
    experiment_ids: Sequence[int] | None, project: str | None, status: RunStatus | None, tags: Mapping[str, str] | None,
    search: str | None, limit: int, offset: int,
) -> Select[Any]:  # fmt: skip
    """Newest first: each filter has an index that ends in `number`, so a page is read without sorting."""
    query = _listed().order_by(t.runs.c.number.desc()).limit(limit).offset(offset)
    if experiment_ids is not None:
        ids = t.runs.c.experiment_id
        query = query.where(ids == experiment_ids[0] if len(experiment_ids) == 1 else ids.in_(experiment_ids))
    if project is not None:
        query = query.where(t.runs.c.project == project)
    if status is not None:
        query = query.where(t.runs.c.status == status.value)
    if search:
        query = query.where(
            or_(t.runs.c.name.icontains(search, autoescape=True), t.runs.c.id.startswith(search, autoescape=True))
        )
    for name, value in (tags or {}).items():
        query = query.where(
            select(1)
            .where(
                t.tags.c.run_id == t.runs.c.id,
                t.tags.c.name == name,
                func.left(t.tags.c.value, 100) == value[:100],
                t.tags.c.value == value,
            )
            .exists()
        )
    return query


def experiment_ids(connection: Connection, name: str) -> list[int]:
    """More than one where projects have experiments of one name."""
    return list(connection.execute(select(t.experiments.c.id).where(t.experiments.c.name == name)).scalars())


def runs(connection: Connection, query: Select[Any]) -> list[RunRow]:
    rows = list(connection.execute(query))
    tags = tags_of(connection, [row.id for row in rows])
    return [RunRow(**_run_fields(row), tags=tags.get(row.id, {})) for row in rows]


def _run_fields(row: Row[Any]) -> dict[str, Any]:
    return {
        "run": row.id, "name": row.name, "experiment": row.experiment, "project": row.project, "user": row.who,
        "status": RunStatus(row.status), "reason": row.reason, "attempt": row.attempt, "workers": row.workers,
        "job": row.job, "sweep": row.sweep_id or "", "created": row.created_at.timestamp(),
        "started": _seconds(row.started_at), "ended": _seconds(row.ended_at),
    }  # fmt: skip


def tags_of(connection: Connection, run_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    if run_ids:
        query = (
            select(t.tags).where(t.tags.c.run_id == any_(literal(list(run_ids), ARRAY(Text)))).order_by(t.tags.c.name)
        )
        for row in connection.execute(query):
            found.setdefault(row.run_id, {})[row.name] = row.value
    return found


def run(connection: Connection, ref: str) -> RunDetail:
    """By id, by name, or by the beginning of an id, in this order. Raises NotFound and AmbiguousName."""
    query = _listed(t.attempts.c.config).outerjoin(
        t.attempts, (t.attempts.c.run_id == t.runs.c.id) & (t.attempts.c.attempt == t.runs.c.attempt)
    )
    for condition in (t.runs.c.id == ref, t.runs.c.name == ref, t.runs.c.id.startswith(ref, autoescape=True)):
        found = (
            list(connection.execute(query.where(condition).order_by(t.runs.c.number.desc()).limit(_CANDIDATES)))
            if ref
            else []
        )
        if len(found) > 1:
            raise AmbiguousName("run", ref, tuple(row.id for row in found))
        if found:
            return _detail(connection, found[0])
    recent = connection.execute(
        select(t.runs.c.name, t.runs.c.id)
        .where(t.runs.c.deleted_at.is_(None))
        .order_by(t.runs.c.number.desc())
        .limit(500)
    )
    known = [word for row in recent for word in row]
    raise NotFound("run", ref, tuple(difflib.get_close_matches(ref, known, n=3, cutoff=0.6)))


def _detail(connection: Connection, row: Row[Any]) -> RunDetail:
    edges = connection.execute(select(t.run_edges).where(t.run_edges.c.child_id == row.id))
    return RunDetail(
        **_run_fields(row), tags=tags_of(connection, [row.id]).get(row.id, {}), description=row.description,
        directory=row.directory, config=row.config or {}, config_hash=row.config_hash, seed=row.seed, model=row.model,
        dataset=row.dataset, error=row.error, cancel_requested=_seconds(row.cancel_requested_at),
        cancel_requested_by=row.cancel_requested_by, parents={edge.parent_id: edge.kind for edge in edges},
        links=row.links,
    )  # fmt: skip


# -- what belongs to a run ---------------------------------------------------------------------------------------------


def attempts(connection: Connection, run_id: str, *conditions: ColumnElement[bool]) -> list[AttemptRow]:
    query = select(t.attempts).where(t.attempts.c.run_id == run_id, *conditions).order_by(t.attempts.c.attempt)
    return [
        AttemptRow(
            run=row.run_id, attempt=row.attempt, status=RunStatus(row.status), reason=row.reason, error=row.error,
            user=row.who, job=row.job, workers=row.workers, config_hash=row.config_hash,
            started=row.started_at.timestamp(), ended=_seconds(row.ended_at), lease_until=_seconds(row.lease_until),
            provenance=row.provenance, config=row.config or {},
        )
        for row in connection.execute(query)
    ]  # fmt: skip


def params(connection: Connection, run_id: str, *conditions: ColumnElement[bool]) -> list[ParamRow]:
    query = select(t.params).where(t.params.c.run_id == run_id, *conditions).order_by(t.params.c.name)
    return [
        ParamRow(name=row.name, type=row.type, value=untyped(row.type, row.value)) for row in connection.execute(query)
    ]


def notes(connection: Connection, run_id: str, *conditions: ColumnElement[bool]) -> list[NoteRow]:
    query = select(t.notes).where(t.notes.c.run_id == run_id, *conditions).order_by(t.notes.c.id)
    return [NoteRow(at=row.created_at.timestamp(), user=row.who, text=row.body) for row in connection.execute(query)]


def events(connection: Connection, run_id: str, after: int, limit: int) -> list[EventRow]:
    query = (
        select(t.events).where(t.events.c.run_id == run_id, t.events.c.id > after).order_by(t.events.c.id).limit(limit)
    )
    return _events(connection, query)


def newest_events(connection: Connection, run_id: str, before: int | None, limit: int) -> list[EventRow]:
    """The newest ones (older than the id `before`), oldest of them first."""
    query = select(t.events).where(t.events.c.run_id == run_id).order_by(t.events.c.id.desc()).limit(limit)
    return _events(connection, query if before is None else query.where(t.events.c.id < before))[::-1]


def _events(connection: Connection, query: Select[Any]) -> list[EventRow]:
    return [
        EventRow(
            id=row.id, run=row.run_id, attempt=row.attempt, rank=row.rank, at=row.at.timestamp(), level=row.level,
            kind=row.kind, message=row.message, step=row.step, user=row.who, details=row.details,
        )
        for row in connection.execute(query)
    ]  # fmt: skip


def checkpoints(connection: Connection, run_id: str, *conditions: ColumnElement[bool]) -> list[CheckpointRow]:
    """In the order in which they were saved."""
    c = t.checkpoints.c
    query = select(t.checkpoints).where(c.run_id == run_id, *conditions).order_by(c.created_at, c.step, c.id)
    return [
        CheckpointRow(
            run=row.run_id, id=row.id, attempt=row.attempt, uri=row.uri, state=row.state, step=row.step,
            epoch=row.epoch, label=row.label, metrics=row.metrics, is_best=row.is_best, is_pinned=row.is_pinned,
            size_bytes=row.size_bytes,
            duration=row.duration, manifest_sha256=row.manifest_sha256, cipher=row.cipher, key_id=row.key_id,
            created=row.created_at.timestamp(),
        )
        for row in connection.execute(query)
    ]  # fmt: skip


def artifacts(connection: Connection, run_id: str, *conditions: ColumnElement[bool]) -> list[ArtifactRow]:
    query = select(t.artifacts).where(t.artifacts.c.run_id == run_id, *conditions).order_by(t.artifacts.c.id)
    return [
        ArtifactRow(
            run=row.run_id, name=row.name, attempt=row.attempt, uri=row.uri, media_type=row.media_type,
            size_bytes=row.size_bytes, sha256=row.sha256, step=row.step, created=row.created_at.timestamp(),
        )
        for row in connection.execute(query)
    ]  # fmt: skip


# -- metrics -----------------------------------------------------------------------------------------------------------


def summaries(connection: Connection, run_ids: Sequence[str], keys: Sequence[str] | None = None) -> list[SummaryRow]:
    """By run, key and rank."""
    s, k = t.metric_summaries, t.metric_keys
    query = (
        select(s, t.runs.c.id.label("run"), k.c.name.label("key"), k.c.unit, k.c.direction, k.c.reduction)
        .join(t.runs, t.runs.c.number == s.c.run_number)
        .join(k, k.c.id == s.c.key_id)
        .where(t.runs.c.id.in_(run_ids))
        .order_by(s.c.run_number, k.c.name, s.c.rank)
    )
    if keys is not None:
        query = query.where(k.c.name.in_(keys))
    return [_summary(row) for row in connection.execute(query)]


def first_summaries(
    connection: Connection, run_ids: Sequence[str], groups: Sequence[Sequence[str]]
) -> list[SummaryRow]:
    """Of each run that has metrics the first summary: declared directions before others, keys that begin with a word of
    the first group before those of the second and the rest, then by name; of the lowest rank."""
    s, k = t.metric_summaries, t.metric_keys
    word = func.split_part(k.c.name, "/", 1)
    weight = case(*((word.in_(group), place) for place, group in enumerate(groups)), else_=len(groups))
    query = (
        select(s, t.runs.c.id.label("run"), k.c.name.label("key"), k.c.unit, k.c.direction, k.c.reduction)
        .ext(distinct_on(s.c.run_number))
        .join(t.runs, t.runs.c.number == s.c.run_number)
        .join(k, k.c.id == s.c.key_id)
        .where(t.runs.c.id == any_(literal(list(run_ids), ARRAY(Text))))
        .order_by(s.c.run_number, k.c.direction == "", weight, k.c.name.collate("C"), s.c.rank)
    )
    return [_summary(row) for row in connection.execute(query)]


def _summary(row: Row[Any]) -> SummaryRow:
    m = row._mapping  # `count` and `sum` are methods of rows, too
    finite = m["count"] - m["nan_count"] - m["inf_count"]
    return SummaryRow(
        run=m["run"], key=m["key"], rank=m["rank"], unit=m["unit"], direction=m["direction"], reduction=m["reduction"],
        count=m["count"], nan_count=m["nan_count"], inf_count=m["inf_count"],
        first=m["first_value"], first_step=m["first_step"], first_time=m["first_time_ms"] / 1000,
        last=m["last_value"], last_step=m["last_step"], last_time=m["last_time_ms"] / 1000,
        last_attempt=m["last_attempt"],
        minimum=m["min_value"], min_step=m["min_step"], maximum=m["max_value"], max_step=m["max_step"],
        mean=m["sum"] / finite if finite else None,
    )  # fmt: skip


CHUNK_COLUMNS = (
    "c.attempt, c.rank, c.first_step, c.first_time_ms, c.steps, c.times, c.values, k.name, c.xid::text::bigint, c.id"
)


def decoded(row: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    steps = row[2] + np.cumsum(row[4], dtype=np.int64)
    times = (row[3] + np.cumsum(row[5], dtype=np.int64)) / 1000.0
    return steps, times, row[6]


CHUNKS_AT_ONCE = 50

_CHUNKS_OF_KEY = (
    f"SELECT {CHUNK_COLUMNS} FROM metric_chunks c JOIN metric_keys k ON k.id = c.key_id"
    " WHERE c.run_number = %(run)s AND k.name = %(key)s AND (%(rank)s::int IS NULL OR c.rank = %(rank)s)"
    " AND (%(attempt)s::int IS NULL OR c.attempt = %(attempt)s) ORDER BY c.attempt, c.rank, c.id"
)


def points(
    connection: psycopg.Connection[Any], run_number: int, key: str, rank: int | None, attempt: int | None
) -> Points:
    with numpy_cursor(connection) as cursor:
        asked = {"run": run_number, "key": key, "rank": rank, "attempt": attempt}
        return _joined(cursor.execute(_CHUNKS_OF_KEY, asked).fetchall())


def point_blocks(
    connection: psycopg.Connection[Any], run_number: int, key: str, rank: int | None, attempt: int | None
) -> Generator[Points]:
    """The same points piece by piece, never more than `CHUNKS_AT_ONCE` chunks in memory."""
    with numpy_cursor(connection, name="points") as cursor:
        cursor.execute(_CHUNKS_OF_KEY, {"run": run_number, "key": key, "rank": rank, "attempt": attempt})
        while rows := cursor.fetchmany(CHUNKS_AT_ONCE):
            yield _joined(rows)


def _joined(rows: Sequence[Sequence[Any]]) -> Points:
    columns_of = [decoded(row) for row in rows]
    lengths = [len(row[6]) for row in rows]

    def joined(place: int, dtype: type) -> np.ndarray:
        return np.concatenate([columns[place] for columns in columns_of]) if columns_of else np.empty(0, dtype)

    return Points(
        steps=joined(0, np.int64),
        times=joined(1, np.float64),
        values=joined(2, np.float64),
        ranks=np.repeat(np.array([row[1] for row in rows], np.int32), lengths),
        attempts=np.repeat(np.array([row[0] for row in rows], np.int32), lengths),
    )


# -- the feed for sinks ------------------------------------------------------------------------------------------------
# Rows are numbered when they are written but appear when their transaction commits, so a reader that remembers the
# highest number would miss what a slower transaction commits later. Hence the order is (transaction, number), and
# nothing is read that is not older than every running transaction.

_HORIZON = "pg_snapshot_xmin(pg_current_snapshot())"


def chunks_after(
    connection: psycopg.Connection[Any], run_number: int, position: FeedPosition, limit: int
) -> list[ChunkRow]:
    with numpy_cursor(connection) as cursor:
        rows = cursor.execute(
            f"SELECT {CHUNK_COLUMNS} FROM metric_chunks c JOIN metric_keys k ON k.id = c.key_id"
            f" WHERE c.run_number = %(run)s AND (c.xid, c.id) > (%(xid)s::text::xid8, %(id)s) AND c.xid < {_HORIZON}"
            " ORDER BY c.xid, c.id LIMIT %(limit)s",
            {"run": run_number, "xid": str(position.xid), "id": position.id, "limit": limit},
        ).fetchall()
    return [
        ChunkRow(
            key=row[7], attempt=row[0], rank=row[1], steps=steps, times=times, values=values,
            position=FeedPosition(xid=row[8], id=row[9]),
        )
        for row in rows
        for steps, times, values in [decoded(row)]
    ]  # fmt: skip


def _horizon(connection: Connection) -> int:
    return connection.exec_driver_sql(f"SELECT {_HORIZON}::text::bigint").scalar_one()


def _between(column: ColumnElement[Any], after: int, horizon: int) -> ColumnElement[bool]:
    low, high = (cast(cast(literal(str(xid)), SqlString), t.XID8) for xid in (after, horizon))
    return (column >= low) & (column < high)


def changed_runs(connection: Connection, after: int) -> ChangedRuns:
    """In the order of their creation."""
    horizon = _horizon(connection)
    wrote = select(t.producers.c.run_id).where(_between(t.producers.c.xid, after, horizon))
    query = (
        select(t.runs.c.id)
        .where(or_(_between(t.runs.c.xid, after, horizon), t.runs.c.id.in_(wrote)), t.runs.c.deleted_at.is_(None))
        .order_by(t.runs.c.number)
    )
    return ChangedRuns(runs=tuple(connection.execute(query).scalars()), cursor=horizon)


def facts_after(connection: Connection, run_id: str, after: int) -> FactChanges:
    horizon = _horizon(connection)
    tags = (
        select(t.tags).where(t.tags.c.run_id == run_id, _between(t.tags.c.xid, after, horizon)).order_by(t.tags.c.name)
    )
    return FactChanges(
        run=run(connection, run_id),
        params=tuple(params(connection, run_id, _between(t.params.c.xid, after, horizon))),
        tags={row.name: row.value for row in connection.execute(tags)},
        notes=tuple(notes(connection, run_id, _between(t.notes.c.xid, after, horizon))),
        checkpoints=tuple(checkpoints(connection, run_id, _between(t.checkpoints.c.xid, after, horizon))),
        artifacts=tuple(artifacts(connection, run_id, _between(t.artifacts.c.xid, after, horizon))),
        attempts=tuple(attempts(connection, run_id, _between(t.attempts.c.xid, after, horizon))),
        cursor=horizon,
    )


def sink_cursor(connection: Connection, sink: str, run_id: str) -> SinkCursor:
    c = t.sink_cursors.c
    row = connection.execute(select(t.sink_cursors).where(tuple_(c.sink, c.run_id) == tuple_(sink, run_id))).first()
    if row is None:
        return SinkCursor()
    return SinkCursor(position=FeedPosition(xid=row.xid, id=row.id), facts=row.facts, state=row.state)
