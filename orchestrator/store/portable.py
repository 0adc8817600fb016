"""One run as plain values, all of its rows and points, and back into a database.

A *record* is a dict of JSON values: times are ISO 8601 in UTC, NaN and ±inf are the strings nan, inf, -inf. It has
everything that is known about the run but its points, and nothing that means something in one database only (row
numbers, transaction ids). What a later schema adds to a table is in the record by itself.

The parent run of a sweep may bring its *ledger* along: decisions, trials, jobs and requests. The runs of trials travel
by themselves and find their place in it, in whatever order they come.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Json, Jsonb
from sqlalchemy import DateTime, Double, Table, Uuid
from sqlalchemy.dialects.postgresql import JSON, JSONB

from orchestrator.errors import NotFound
from orchestrator.store import chunks
from orchestrator.store import tables as t
from orchestrator.store.binary import COPY_END, COPY_HEADER
from orchestrator.store.errors import BadRecord, RunIsThere
from orchestrator.store.reading import chunk_rows_of_key, chunk_rows_of_keys
from orchestrator.store.views import ChunkRow

Record = dict[str, Any]
Connection = psycopg.Connection[Any]

PROTOCOL = 1
"""Version of the record. A reader refuses what it does not know."""
WITH_LEDGER = 2
"""The same of a record with a sweep's ledger."""

MOST_TOGETHER = 2_000_000
"""Points of several keys that are read together, and held in memory."""
LONG = MOST_TOGETHER // 20
"""Points of a key that is read alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A table of which a run has many rows."""

    table: Table
    order: str
    stays: frozenset[str] = frozenset()
    """Columns that mean something in this database only."""

    def columns(self) -> list[str]:
        return [column.name for column in self.table.c if column.name not in self.stays | {"run_id", "xid"}]


PARTS: Mapping[str, _Part] = {
    "attempts": _Part(table=t.attempts, order="attempt", stays=frozenset({"lease_until", "tracker"})),
    "params": _Part(table=t.params, order='name COLLATE "C"'),
    "tags": _Part(table=t.tags, order='name COLLATE "C"'),
    "notes": _Part(table=t.notes, order="id", stays=frozenset({"id"})),
    "events": _Part(table=t.events, order="id", stays=frozenset({"id"})),
    "checkpoints": _Part(table=t.checkpoints, order="created_at, step, id"),
    "artifacts": _Part(table=t.artifacts, order="id", stays=frozenset({"id"})),
    # Watermarks: after a removal and an import, a spool that was left somewhere adds nothing twice.
    "producers": _Part(table=t.producers, order="uuid", stays=frozenset({"id"})),
}

_LEDGER: Mapping[str, tuple[Table, str, frozenset[str]]] = {
    "trials": (t.trials, "number", frozenset()),
    "jobs": (t.sweep_jobs, "number", frozenset()),
    "decisions": (t.sweep_decisions, "seq", frozenset()),
    "requests": (t.sweep_requests, "id", frozenset({"id"})),
}
"""Parts of a sweep's ledger, in the order in which they are written: table, order, columns of this database only."""
_SWEEP_STAYS = frozenset({"id", "project", "driver", "driver_since"})

_RUN_STAYS = {"number", "experiment_id", "dataset_version_id", "sweep_id", "deleted_at", "xid"}
_RUN_COLUMNS = [column.name for column in t.runs.c if column.name not in _RUN_STAYS]
_SUMMARY_STAYS = {"run_number", "key_id", "is_final"}
_SUMMARY_COLUMNS = [column.name for column in t.metric_summaries.c if column.name not in _SUMMARY_STAYS]


# -- out of a database -------------------------------------------------------------------------------------------------


class RunSnapshot:
    """One run at one moment: its record and its points belong together. Use it inside `Store.snapshot`."""

    def __init__(self, connection: Connection, run: str) -> None:
        self._connection = connection
        # A server in another time zone could not name the last hours of the year 9999.
        connection.execute("SET LOCAL TIME ZONE 'UTC'")
        with connection.cursor(row_factory=dict_row) as cursor:
            columns = sql.SQL(", ").join(sql.Identifier("r", name) for name in _RUN_COLUMNS)
            found = cursor.execute(
                sql.SQL(
                    "SELECT {}, r.number, coalesce(r.sweep_id, '') AS sweep, e.name AS experiment"
                    " FROM runs r JOIN experiments e ON e.id = r.experiment_id WHERE r.id = %s AND r.deleted_at IS NULL"
                ).format(columns),
                (run,),
            ).fetchone()
            if found is None:
                raise NotFound("run", run)
            self._number = found.pop("number")
            parts = {name: _rows(cursor, part, run) for name, part in PARTS.items()}
            parents = cursor.execute(
                "SELECT parent_id AS run, kind, checkpoint_id AS checkpoint, step, who, created_at FROM run_edges"
                " WHERE child_id = %s ORDER BY parent_id, kind",
                (run,),
            ).fetchall()
            summaries = cursor.execute(
                sql.SQL(
                    'SELECT k.name AS "key", {} FROM metric_summaries s JOIN metric_keys k ON k.id = s.key_id'
                    ' WHERE s.run_number = %s ORDER BY k.name COLLATE "C", s.rank'
                ).format(sql.SQL(", ").join(sql.Identifier("s", name) for name in _SUMMARY_COLUMNS)),
                (self._number,),
            ).fetchall()
            keys = sorted({row["key"] for row in summaries})
            metrics = cursor.execute(
                "SELECT id, name, unit, direction, reduction FROM metric_keys WHERE name = ANY(%s)"
                ' ORDER BY name COLLATE "C"',
                (keys,),
            ).fetchall()
        self._keys = {row["name"]: row.pop("id") for row in metrics}
        self._counts: Counter[str] = Counter()
        for row in summaries:
            self._counts[row["key"]] += row["count"]
        self.points: int = self._counts.total()
        """How many there are."""
        self.record: Record = _plain(
            {
                "protocol": PROTOCOL,
                "run": found,
                "parents": parents,
                "metrics": metrics,
                "summaries": summaries,
                **parts,
            }
        )

    def ledger(self) -> Record:
        """Of the sweep whose parent the run is: `insert` takes it as the record's `ledger`. Empty for others."""
        run = self.record["run"]["id"]
        with self._connection.cursor(row_factory=dict_row) as cursor:
            names = [column.name for column in t.sweeps.c if column.name not in _SWEEP_STAYS]
            query = sql.SQL("SELECT {} FROM sweeps WHERE id = %s").format(_identifiers(names))
            found = cursor.execute(query, (run,)).fetchone()
            if found is None:
                return {}
            parts = {}
            for part, (table, order, stays) in _LEDGER.items():
                query = sql.SQL("SELECT {} FROM {} WHERE sweep_id = %s ORDER BY {}").format(
                    _identifiers(_ledger_columns(table, stays)), sql.Identifier(table.name), sql.Identifier(order)
                )
                parts[part] = cursor.execute(query, (run,)).fetchall()
        return _plain({"sweep": found, **parts})

    def chunks(self) -> Iterator[ChunkRow]:
        """All points, by key; within a key by attempt and rank, as they were written. Held in memory piece by piece."""
        for place, keys in enumerate(together(self._keys, self._counts)):
            name = f"points_{place}"
            if len(keys) == 1:
                ((key, number),) = keys.items()
                yield from chunk_rows_of_key(self._connection, self._number, key, number, name)
            else:
                yield from chunk_rows_of_keys(self._connection, self._number, keys, name)


def _identifiers(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _ledger_columns(table: Table, stays: frozenset[str]) -> list[str]:
    return [column.name for column in table.c if column.name not in stays | {"sweep_id"}]


def together(keys: Mapping[str, int], counts: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The keys in their order, neighbours that have few points with each other; `counts`: points of each."""
    group: dict[str, int] = {}
    size = 0
    for key, number in keys.items():
        if group and (counts[key] >= LONG or size + counts[key] > MOST_TOGETHER):
            yield group
            group, size = {}, 0
        group[key] = number
        size += MOST_TOGETHER if counts[key] >= LONG else counts[key]
    if group:
        yield group


def _rows(cursor: psycopg.Cursor[Any], part: _Part, run: str) -> list[dict[str, Any]]:
    columns = sql.SQL(", ").join(map(sql.Identifier, part.columns()))
    query = sql.SQL("SELECT {} FROM {} WHERE run_id = %s ORDER BY {}").format(
        columns, sql.Identifier(part.table.name), sql.SQL(part.order)
    )
    return cursor.execute(query, (run,)).fetchall()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


# -- into a database ---------------------------------------------------------------------------------------------------


def insert(
    connection: Connection, record: Record, points: Iterable[ChunkRow], key_ids: Mapping[str, int]
) -> tuple[str, ...]:
    """Writes the run as it was; the caller commits. Gives the parents that are not here, whose edges are left out.

    `key_ids` knows every metric key of the record. Raises RunIsThere, BadRecord.
    """
    run = record["run"]
    number, watermarks = _make_room(connection, run["id"])
    number = _insert_run(connection, record, number)
    for name, part in PARTS.items():
        rows = [_with_watermark(row, watermarks) for row in record[name]] if name == "producers" else record[name]
        _insert_rows(connection, name, part, run["id"], rows)
    _keep_watermarks(connection, run["id"], record["producers"], watermarks)
    _insert_points(connection, record, points, number, key_ids)
    _insert_ledger(connection, record)
    _take_place(connection, record)
    return _insert_parents(connection, run["id"], record["parents"])


_Watermarks = dict[UUID, tuple[int, int, int, int]]
"""Producer -> attempt, rank, points, facts."""


def _make_room(connection: Connection, run: str) -> tuple[int | None, _Watermarks]:
    """What is left of a run of that id that was removed: its number, which others may remember, and its watermarks."""
    found = connection.execute(
        "SELECT number, deleted_at, directory FROM runs WHERE id = %s FOR UPDATE", (run,)
    ).fetchone()
    if found is None:
        return None, {}
    number, deleted_at, directory = found
    if deleted_at is None or directory:
        raise RunIsThere(run, is_half_removed=deleted_at is not None)
    rows = connection.execute("SELECT uuid, attempt, rank, points, facts FROM producers WHERE run_id = %s", (run,))
    watermarks = {row[0]: (row[1], row[2], row[3], row[4]) for row in rows}
    connection.execute("DELETE FROM runs WHERE id = %s", (run,))
    return number, watermarks


def _insert_run(connection: Connection, record: Record, number: int | None) -> int:
    run = dict(record["run"])
    experiment, sweep = run.pop("experiment"), run.pop("sweep")
    if unknown := set(run) - set(_RUN_COLUMNS):
        raise BadRecord("run", f"it has the unknown column {min(unknown)}: a newer version wrote it.")
    connection.execute(
        "INSERT INTO experiments (project, name, who) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        (run["project"], experiment, run["who"]),
    )
    if sweep:
        connection.execute(
            "INSERT INTO sweeps (id, project, who) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (sweep, run["project"], run["who"]),
        )
    if number is None:
        number = _one(connection.execute("SELECT nextval(pg_get_serial_sequence('runs', 'number'))"))
    values = {name: _typed(t.runs, name, value) for name, value in run.items()}
    values |= {"number": number, "sweep_id": sweep or None}
    query = sql.SQL(
        "INSERT INTO runs ({}, experiment_id) SELECT {}, id FROM experiments WHERE project = {} AND name = {}"
    ).format(
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(sql.SQL("%s") for _ in values),
        sql.SQL("%s"),
        sql.SQL("%s"),
    )
    connection.execute(query, [*values.values(), run["project"], experiment])
    return number


def _insert_ledger(connection: Connection, record: Record) -> None:
    """What the record has of a sweep; runs that are not here yet are left out of it until they come."""
    ledger = record.get("ledger")
    if not ledger:
        return
    run = record["run"]
    head = {name: _typed(t.sweeps, name, value) for name, value in _known("sweep", t.sweeps, ledger["sweep"]).items()}
    query = sql.SQL(
        "INSERT INTO sweeps (id, project, {names}) VALUES (%s, %s, {values}) ON CONFLICT (id) DO UPDATE SET {changes}"
    ).format(
        names=_identifiers(head),
        values=sql.SQL(", ").join(sql.SQL("%s") for _ in head),
        changes=sql.SQL(", ").join(
            sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in head
        ),
    )  # fmt: skip
    connection.execute(query, [run["id"], run["project"], *head.values()])
    here = "(SELECT id FROM runs WHERE id = %s AND deleted_at IS NULL)"
    for part, (table, _, _) in _LEDGER.items():
        rows = [_known(part, table, row) for row in ledger[part]]
        if not rows:
            continue
        columns = list(rows[0])
        query = sql.SQL("INSERT INTO {} (sweep_id, {}) VALUES (%s, {})").format(
            sql.Identifier(table.name),
            _identifiers(columns),
            sql.SQL(", ").join(sql.SQL(here if name == "run_id" else "%s") for name in columns),
        )
        with connection.cursor() as cursor:
            cursor.executemany(
                query, [(run["id"], *(_typed(table, name, row[name]) for name in columns)) for row in rows]
            )


def _known(part: str, table: Table, row: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := set(row) - {column.name for column in table.c}:
        raise BadRecord(part, f"it has the unknown column {min(unknown)}: a newer version wrote it.")
    return row


def _take_place(connection: Connection, record: Record) -> None:
    """The run of a trial whose sweep was here first."""
    run, tags = record["run"], {row["name"]: row["value"] for row in record["tags"]}
    trial, repeat = tags.get("orc.trial", ""), tags.get("orc.repeat", "0")
    if not (run["sweep"] and trial.isdecimal() and repeat.isdecimal()):
        return
    place = (run["id"], run["sweep"], int(trial))
    connection.execute(
        "UPDATE sweep_jobs SET run_id = %s WHERE sweep_id = %s AND trial = %s AND repeat = %s AND run_id IS NULL",
        (*place, int(repeat)),
    )
    if int(repeat) == 0:
        connection.execute(
            "UPDATE trials SET run_id = %s WHERE sweep_id = %s AND number = %s AND run_id IS NULL", place
        )


def _insert_rows(connection: Connection, name: str, part: _Part, run: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    columns = list(rows[0])
    if unknown := {column for row in rows for column in row} - set(part.columns()):
        raise BadRecord(name, f"it has the unknown column {min(unknown)}: a newer version wrote it.")
    query = sql.SQL("INSERT INTO {} (run_id, {}) VALUES (%s, {})").format(
        sql.Identifier(part.table.name),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(sql.SQL("%s") for _ in columns),
    )
    with connection.cursor() as cursor:
        cursor.executemany(
            query, [(run, *(_typed(part.table, column, row[column]) for column in columns)) for row in rows]
        )


def _with_watermark(row: Mapping[str, Any], watermarks: _Watermarks) -> dict[str, Any]:
    known = watermarks.get(UUID(hex=row["uuid"]))
    return {**row, **({"points": max(row["points"], known[2]), "facts": max(row["facts"], known[3])} if known else {})}


def _keep_watermarks(
    connection: Connection, run: str, rows: Sequence[Mapping[str, Any]], watermarks: _Watermarks
) -> None:
    """Producers that the record does not know: they sent something after it was removed, which was dropped."""
    written = {UUID(hex=row["uuid"]) for row in rows}
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO producers (uuid, run_id, attempt, rank, points, facts) VALUES (%s, %s, %s, %s, %s, %s)",
            [(uuid, run, *known) for uuid, known in watermarks.items() if uuid not in written],
        )


def _insert_points(
    connection: Connection, record: Record, points: Iterable[ChunkRow], number: int, key_ids: Mapping[str, int]
) -> None:
    producers = connection.execute("SELECT attempt, rank, id FROM producers WHERE run_id = %s", (record["run"]["id"],))
    producer_ids = {(attempt, rank): producer for attempt, rank, producer in producers}
    counts: Counter[tuple[str, int]] = Counter()
    with connection.cursor() as cursor:
        # As if it had been committed just now: merging makes of it what it makes of other runs.
        with cursor.copy(f"COPY metric_chunks_live ({chunks.COPY_COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
            copy.write(COPY_HEADER)
            for block in points:
                if block.key not in key_ids:
                    raise BadRecord("points", f"there are some of {block.key!r}, of which the record knows nothing.")
                counts[block.key, block.rank] += len(block.values)
                producer = producer_ids.get((block.attempt, block.rank), 0)
                owner = np.array((number, 0, 0, producer, 0, 0, block.attempt, block.rank, 0), chunks.OWNER)[()]
                for row in chunks.rows(_as_series(block, key_ids[block.key])):
                    copy.write(chunks.copy_row(row, owner))
            copy.write(COPY_END)
        _check_counts(record["summaries"], counts)
        columns = ("run_number", "key_id", *_SUMMARY_COLUMNS)
        query = sql.SQL("INSERT INTO metric_summaries ({}) VALUES ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)), sql.SQL(", ").join(sql.SQL("%s") for _ in columns)
        )
        rows = (
            [number, key_ids[row["key"]], *(_typed(t.metric_summaries, name, row[name]) for name in _SUMMARY_COLUMNS)]
            for row in record["summaries"]
        )
        cursor.executemany(query, rows)


def _check_counts(summaries: Sequence[Mapping[str, Any]], counts: Mapping[tuple[str, int], int]) -> None:
    told = {(row["key"], row["rank"]): row["count"] for row in summaries}
    for key, rank in sorted({*told, *counts}):
        found, wanted = counts.get((key, rank), 0), told.get((key, rank), 0)
        if found != wanted:
            raise BadRecord("points", f"{found} of {key} on rank {rank}, where the record tells of {wanted}.")


def _as_series(block: ChunkRow, key: int) -> chunks.Series:
    start = np.zeros(1 if len(block.values) else 0, np.int64)
    return chunks.Series(
        keys=start + key, owners=start, starts=start, steps=block.steps, times=chunks.milliseconds(block.times),
        values=block.values,
    )  # fmt: skip


def _insert_parents(connection: Connection, run: str, parents: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    missing = []
    for edge in parents:
        made = connection.execute(
            "INSERT INTO run_edges (parent_id, child_id, kind, checkpoint_id, step, who, created_at)"
            " SELECT id, %s, %s, %s, %s, %s, %s FROM runs WHERE id = %s AND deleted_at IS NULL",
            (
                run, edge["kind"], edge["checkpoint"], edge["step"], edge["who"],
                datetime.fromisoformat(edge["created_at"]), edge["run"],
            ),
        )  # fmt: skip
        if made.rowcount == 0:
            missing.append(edge["run"])
    return tuple(missing)


def declare_metrics(connection: Connection, metrics: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Ids of the keys. What is declared here already stays: keys belong to all runs."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO metric_keys AS k (name, unit, direction, reduction) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (name) DO UPDATE SET unit = coalesce(nullif(k.unit, ''), excluded.unit),"
            " direction = coalesce(nullif(k.direction, ''), excluded.direction),"
            " reduction = coalesce(nullif(k.reduction, ''), excluded.reduction)",
            [(row["name"], row["unit"], row["direction"], row["reduction"]) for row in metrics],
        )
    names = [row["name"] for row in metrics]
    return dict(connection.execute("SELECT name, id FROM metric_keys WHERE name = ANY(%s)", (names,)).fetchall())


def _typed(table: Table, column: str, value: Any) -> Any:
    """The value as the column takes it."""
    kind = table.c[column].type
    if value is None:  # where there must be something, it was JSON's null
        return Jsonb(None) if isinstance(kind, JSONB) and not table.c[column].nullable else None
    if isinstance(kind, JSONB):
        return Jsonb(value)
    if isinstance(kind, JSON):
        return Json(value)
    if isinstance(kind, DateTime):
        return datetime.fromisoformat(value)
    if isinstance(kind, Double):
        return float(value)
    if isinstance(kind, Uuid):
        return UUID(hex=value)
    return value


def _one(cursor: psycopg.Cursor[Any]) -> Any:
    row = cursor.fetchone()
    assert row is not None
    return row[0]
