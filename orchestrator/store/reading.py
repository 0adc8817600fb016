"""Questions to the database. Functions take a connection and give the plain values of views.py."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
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
    exists,
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
from orchestrator.store import chunks
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
    search: str | None, limit: int, offset: int, *, trials: bool = True,
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
    if not trials:
        query = query.where(t.runs.c.sweep_id.is_(None))
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
    c, v = t.checkpoints.c, t.model_versions.c
    is_registered = exists().where(v.run_id == c.run_id, v.checkpoint_id == c.id).label("is_registered")
    query = (
        select(t.checkpoints, is_registered)
        .where(c.run_id == run_id, *conditions)
        .order_by(c.created_at, c.step, c.id)
    )  # fmt: skip
    return [
        CheckpointRow(
            run=row.run_id, id=row.id, attempt=row.attempt, uri=row.uri, state=row.state, step=row.step,
            epoch=row.epoch, label=row.label, metrics=row.metrics, is_best=row.is_best, is_pinned=row.is_pinned,
            is_registered=row.is_registered, size_bytes=row.size_bytes, duration=row.duration,
            manifest_sha256=row.manifest_sha256, cipher=row.cipher, key_id=row.key_id,
            created=row.created_at.timestamp(), resumable=row.resumable, kind=row.kind, world_size=row.world_size,
            reasons=row.reasons or [], timings=row.timings or {},
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
    connection: Connection, run_ids: Sequence[str], groups: Sequence[Sequence[str]], without: Sequence[str]
) -> list[SummaryRow]:
    """Of each run that has metrics the first summary: declared directions before others, keys that begin with a word of
    the first group before those of the second and the rest, then by name; of the lowest rank. Keys that begin with a
    word of `without` do not count."""
    s, k = t.metric_summaries, t.metric_keys
    word = func.split_part(k.c.name, "/", 1)
    weight = case(*((word.in_(group), place) for place, group in enumerate(groups)), else_=len(groups))
    query = (
        select(s, t.runs.c.id.label("run"), k.c.name.label("key"), k.c.unit, k.c.direction, k.c.reduction)
        .ext(distinct_on(s.c.run_number))
        .join(t.runs, t.runs.c.number == s.c.run_number)
        .join(k, k.c.id == s.c.key_id)
        .where(t.runs.c.id == any_(literal(list(run_ids), ARRAY(Text))), word.not_in(without))
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


CHUNKS_AT_ONCE = 50
"""Read from the server in one piece."""

# Of a row with several keys only the key's part is sent. Producers one after the other, each in the order in which it
# wrote: so merging changes nothing.
_CHUNKS_OF_KEY = """
SELECT c.attempt, c.rank, c.first_step, c.first_time_ms, p.steps, p.times, p.values, c.producer_id, c.id
FROM metric_chunks c
CROSS JOIN LATERAL (SELECT CASE WHEN c.key_id = %(key)s THEN 1 ELSE array_position(c.key_ids, %(key)s) END AS place) f
CROSS JOIN LATERAL (
  SELECT c.counts[f.place] AS count,
    (SELECT coalesce(sum(b), 0)::int FROM unnest(c.counts[: f.place - 1]) AS b) AS before
) s
CROSS JOIN LATERAL (
  SELECT CASE WHEN c.is_wide OR c.key_id <> 0 THEN c.steps ELSE c.steps[s.before + 1 : s.before + s.count] END AS steps,
    CASE WHEN c.is_wide OR c.key_id <> 0 THEN c.times ELSE c.times[s.before + 1 : s.before + s.count] END AS times,
    CASE WHEN c.key_id <> 0 THEN c.values ELSE c.values[s.before + 1 : s.before + s.count] END AS values
) p
WHERE c.run_number = %(run)s AND c.level = ANY(%(levels)s) AND c.key_id IN (0, %(key)s)
  AND (%(rank)s::int IS NULL OR c.rank = %(rank)s) AND (%(attempt)s::int IS NULL OR c.attempt = %(attempt)s)
  AND (%(start)s::bigint IS NULL OR c.max_step >= %(start)s) AND (%(stop)s::bigint IS NULL OR c.min_step <= %(stop)s)
  AND f.place IS NOT NULL
ORDER BY c.attempt, c.rank, c.producer_id, c.id
"""

EVERY_LEVEL = (0, 1, 2, 3)


def key_id(connection: psycopg.Connection[Any], key: str) -> int | None:
    found = connection.execute("SELECT id FROM metric_keys WHERE name = %s", (key,)).fetchone()
    return None if found is None else found[0]


def _asked(
    run: int, key: int, rank: int | None, attempt: int | None, levels: Sequence[int] = EVERY_LEVEL,
    start: int | None = None, stop: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "run": run, "key": key, "rank": rank, "attempt": attempt, "levels": list(levels), "start": start, "stop": stop,
    }  # fmt: skip


def rows_of_key(
    connection: psycopg.Connection[Any], run_number: int, key: int, rank: int, attempt: int, levels: Sequence[int],
    start: int | None, stop: int | None,
) -> Generator[list[Any]]:  # fmt: skip
    """For `decoded`, from rows of these levels that reach into the range of steps, then producer and id; never more
    than `CHUNKS_AT_ONCE` in memory."""
    with numpy_cursor(connection, name="rows_of_key") as cursor:
        cursor.execute(_CHUNKS_OF_KEY, _asked(run_number, key, rank, attempt, levels, start, stop))
        while rows := cursor.fetchmany(CHUNKS_AT_ONCE):
            yield rows


def points(
    connection: psycopg.Connection[Any], run_number: int, key: str, rank: int | None, attempt: int | None
) -> Points:
    number = key_id(connection, key)
    if number is None:
        return _joined([])
    with numpy_cursor(connection) as cursor:
        return _joined(cursor.execute(_CHUNKS_OF_KEY, _asked(run_number, number, rank, attempt)).fetchall())


def point_blocks(
    connection: psycopg.Connection[Any], run_number: int, key: str, rank: int | None, attempt: int | None
) -> Generator[Points]:
    """The same points piece by piece, never more than `CHUNKS_AT_ONCE` rows in memory."""
    number = key_id(connection, key)
    if number is None:
        return
    with numpy_cursor(connection, name="points") as cursor:
        cursor.execute(_CHUNKS_OF_KEY, _asked(run_number, number, rank, attempt))
        while rows := cursor.fetchmany(CHUNKS_AT_ONCE):
            yield _joined(rows)


def decoded(rows: Sequence[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of rows of `_CHUNKS_OF_KEY`: how many points each has; and steps, times in milliseconds and values of all."""
    lengths = np.array([len(row[6]) for row in rows], np.int64)
    starts = np.cumsum(lengths) - lengths

    def absolute(base: int, differences: int) -> np.ndarray:
        total = np.cumsum(np.concatenate([row[differences] for row in rows]), dtype=np.int64)
        before = np.where(starts > 0, total[starts - 1], 0)
        return total + np.repeat(np.array([row[base] for row in rows], np.int64) - before, lengths)

    return lengths, absolute(2, 4), absolute(3, 5), np.concatenate([row[6] for row in rows])


def _joined(rows: Sequence[Sequence[Any]]) -> Points:
    if not rows:
        none = np.empty(0, np.int64)
        return Points(
            steps=none, times=np.empty(0), values=np.empty(0), ranks=np.empty(0, np.int32),
            attempts=np.empty(0, np.int32),
        )  # fmt: skip
    lengths, steps, times_ms, values = decoded(rows)
    return Points(
        steps=steps, times=times_ms / 1000.0, values=values,
        ranks=np.repeat(np.array([row[1] for row in rows], np.int32), lengths),
        attempts=np.repeat(np.array([row[0] for row in rows], np.int32), lengths),
    )  # fmt: skip


def chunk_rows_of_key(
    connection: psycopg.Connection[Any], run_number: int, key: str, number: int, name: str
) -> Generator[ChunkRow]:
    """All points of a key in the same order, through a cursor of that name."""
    with numpy_cursor(connection, name=name) as cursor:
        cursor.execute(_CHUNKS_OF_KEY, _asked(run_number, number, None, None))
        while rows := cursor.fetchmany(CHUNKS_AT_ONCE):
            for row in rows:
                _, steps, times_ms, values = decoded([row])
                yield ChunkRow(
                    key=key, attempt=row[0], rank=row[1], steps=steps, times=times_ms / 1000.0, values=values,
                    position=FeedPosition(),
                )  # fmt: skip


STORED_COLUMNS = "c.first_step, c.first_time_ms, c.is_wide, c.key_ids, c.counts, c.steps, c.times, c.values"
"""What `stored` takes."""


_ROWS_OF_KEYS = f"""
SELECT c.attempt, c.rank, {STORED_COLUMNS} FROM metric_chunks c
WHERE c.run_number = %(run)s AND c.level = ANY(%(levels)s)
  AND (c.key_id = ANY(%(keys)s) OR c.key_id = 0 AND c.key_ids && %(keys)s)
ORDER BY c.attempt, c.rank, c.producer_id, c.id
"""


ROWS_AT_ONCE = 8
"""Whole rows in memory, of which only some keys are wanted."""


def points_of(connection: psycopg.Connection[Any], run_number: int, keys: Sequence[str]) -> dict[str, Points]:
    """All points of several keys, each as `points` gives it. Reads rows that keys share once, not once for each."""
    found = connection.execute("SELECT id, name FROM metric_keys WHERE name = ANY(%s)", (list(keys),)).fetchall()
    names: dict[int, str] = dict(found)
    parts: dict[str, list[Points]] = {key: [_joined([])] for key in keys}
    with numpy_cursor(connection, name="points_of") as cursor:
        ids = np.array(sorted(names), np.int32)
        cursor.execute(_ROWS_OF_KEYS, {"run": run_number, "levels": list(EVERY_LEVEL), "keys": ids})
        while rows := cursor.fetchmany(ROWS_AT_ONCE):
            series = chunks.unpacked([stored(row[2:]) for row in rows])
            wanted = np.flatnonzero(np.isin(series.keys, ids)).tolist()
            ends = [*series.starts[1:].tolist(), len(series.values)]
            for place in wanted:
                piece, row = slice(int(series.starts[place]), ends[place]), rows[series.owners[place]]
                length = piece.stop - piece.start
                parts[names[int(series.keys[place])]].append(
                    Points(
                        steps=series.steps[piece].copy(), times=series.times[piece] / 1000.0,
                        values=series.values[piece].copy(), ranks=np.full(length, row[1], np.int32),
                        attempts=np.full(length, row[0], np.int32),
                    )
                )  # fmt: skip
    columns = [column.name for column in fields(Points)]
    return {
        key: Points(**{name: np.concatenate([getattr(part, name) for part in parts[key]]) for name in columns})
        for key in keys
    }


def stored(row: Sequence[Any]) -> chunks.Stored:
    first_step, first_time_ms, is_wide, key_ids, counts, steps, times, values = row
    return chunks.Stored(
        first_step=first_step, first_time_ms=first_time_ms, is_wide=is_wide, key_ids=key_ids, counts=counts,
        steps=steps, times=times, values=values,
    )  # fmt: skip


_ROWS = f"""
SELECT c.attempt, c.rank, {STORED_COLUMNS} FROM metric_chunks c
WHERE c.run_number = %s AND (c.key_id = 0 OR c.key_id = ANY(%s)) ORDER BY c.attempt, c.rank, c.producer_id, c.id
"""

PIECE = 16_384
"""Points of a ChunkRow that is put together from several rows, at most."""


def chunk_rows_of_keys(
    connection: psycopg.Connection[Any], run_number: int, keys: Mapping[str, int], name: str
) -> Generator[ChunkRow]:
    """All points of these keys (name -> id), key after key; for many short curves, which are in memory together. Each
    row is read once: to ask for one key after the other would take a row with n keys apart n times.
    """
    names, ids = list(keys), np.fromiter(keys.values(), np.int64, len(keys))
    by_id = np.argsort(ids)
    found: list[list[np.ndarray]] = []
    with numpy_cursor(connection, name=name) as cursor:
        cursor.execute(_ROWS, (run_number, ids))
        while rows := cursor.fetchmany(CHUNKS_AT_ONCE):
            series = chunks.unpacked([stored(row[2:]) for row in rows])
            place = by_id[np.minimum(np.searchsorted(ids, series.keys, sorter=by_id), len(ids) - 1)]
            is_wanted = ids[place] == series.keys
            attempts, ranks = (np.array([row[column] for row in rows], np.int32) for column in (0, 1))
            lengths = series.counts[is_wanted]
            owners = series.owners[is_wanted]
            chosen = np.repeat(is_wanted, series.counts)
            found.append(
                [
                    *(np.repeat(of, lengths) for of in (place[is_wanted], attempts[owners], ranks[owners])),
                    *(array[chosen] for array in (series.steps, series.times, series.values)),
                ]
            )
    if not found:
        return
    order = np.argsort(np.concatenate([part[0] for part in found]), kind="stable")
    places, attempt, rank, steps, times_ms, values = (
        np.concatenate([part[column] for part in found])[order] for column in range(6)
    )
    is_new = np.ones(len(values), bool)
    is_new[1:] = (np.diff(places) != 0) | (np.diff(attempt) != 0) | (np.diff(rank) != 0)
    starts = np.flatnonzero(is_new)
    for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True):
        for start in range(first, last, PIECE):
            part = slice(start, min(last, start + PIECE))
            yield ChunkRow(
                key=names[places[first]], attempt=int(attempt[first]), rank=int(rank[first]), steps=steps[part],
                times=times_ms[part] / 1000.0, values=values[part], position=FeedPosition(),
            )  # fmt: skip


# -- the feed for sinks ------------------------------------------------------------------------------------------------
# Rows are numbered when they are written but appear when their transaction commits, so a reader that remembers the
# highest number would miss what a slower transaction commits later. Hence the order is (transaction, number), and
# nothing is read that is not older than every running transaction.

_HORIZON = "pg_snapshot_xmin(pg_current_snapshot())"


# Rows that merging made of the same ones may stand at one place, so none of these is cut off.
_CHUNKS_AFTER = f"""
SELECT c.attempt, c.rank, c.xid::text::bigint, c.id, {STORED_COLUMNS} FROM metric_chunks c
WHERE c.run_number = %(run)s AND (c.xid, c.id) > (%(xid)s::text::xid8, %(id)s) AND c.xid < {_HORIZON}
ORDER BY c.xid, c.id FETCH FIRST %(limit)s ROWS WITH TIES
"""


def chunks_after(
    connection: psycopg.Connection[Any], run_number: int, position: FeedPosition, limit: int
) -> list[ChunkRow]:
    with numpy_cursor(connection) as cursor:
        rows = cursor.execute(
            _CHUNKS_AFTER, {"run": run_number, "xid": str(position.xid), "id": position.id, "limit": limit}
        ).fetchall()
        series = chunks.unpacked([stored(row[4:]) for row in rows])
        ids = np.unique(series.keys).tolist()
        names = dict(cursor.execute("SELECT id, name FROM metric_keys WHERE id = ANY(%s::int[])", (ids,)).fetchall())
    seconds = series.times / 1000.0
    ends = series.starts + series.counts
    return [
        ChunkRow(
            key=names[key], attempt=rows[owner][0], rank=rows[owner][1], steps=series.steps[start:end],
            times=seconds[start:end], values=series.values[start:end],
            position=FeedPosition(xid=rows[owner][2], id=rows[owner][3]),
        )
        for key, owner, start, end in zip(
            series.keys.tolist(), series.owners.tolist(), series.starts.tolist(), ends.tolist(), strict=True
        )
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


_HAS_FACTS = (
    "SELECT r.xid >= %(after)s::text::xid8"
    + "".join(
        f" OR EXISTS (SELECT FROM {table} x WHERE x.run_id = r.id AND x.xid >= %(after)s::text::xid8)"
        for table in ("attempts", "params", "tags", "notes", "checkpoints", "artifacts")
    )
    + " FROM runs r WHERE r.id = %(run)s AND r.deleted_at IS NULL"
)


def has_facts_after(connection: psycopg.Connection[Any], run_id: str, after: int) -> bool:
    """True as well for what is younger than the horizon: then `facts_after` gives it later."""
    found = connection.execute(_HAS_FACTS, {"run": run_id, "after": str(after)}).fetchone()
    if found is None:
        raise NotFound("run", run_id)
    return bool(found[0])


def sink_cursor(connection: Connection, sink: str, run_id: str) -> SinkCursor:
    c = t.sink_cursors.c
    row = connection.execute(select(t.sink_cursors).where(tuple_(c.sink, c.run_id) == tuple_(sink, run_id))).first()
    if row is None:
        return SinkCursor()
    return SinkCursor(position=FeedPosition(xid=row.xid, id=row.id), facts=row.facts, state=row.state)
