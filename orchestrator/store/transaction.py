"""The exactly-once commit: points, summaries, facts and the producers' watermarks in one transaction.

A producer numbers what it sends; its row holds the highest number that is committed, per stream. Whoever commits locks
that row, drops what is at or below the watermark, writes the rest and moves the watermark, all or nothing. So it does
not matter how often something arrives, in which order, from how many trackers at once, or whether the answer to a
COMMIT was lost: the next try finds the watermark and drops. The big table needs no
unique index and no ON CONFLICT for it.

Rows are locked in the order of the producers' ids, and summaries are written in one order, so two trackers wait for
each other instead of deadlocking; where they deadlock all the same (over status facts), PostgreSQL ends one, and it
is tried again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from orchestrator.records import LOST, Batch, Stream
from orchestrator.store import chunks, facts, lifecycle
from orchestrator.store.binary import COPY_END, COPY_HEADER, numpy_cursor
from orchestrator.store.errors import Gap, Watermarks


class _OutOfOrder(Exception):
    def __init__(self, gap: Gap) -> None:
        super().__init__(gap)
        self.gap = gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one transaction did."""

    watermarks: Watermarks
    gaps: tuple[Gap, ...]


def by_producer(batches: Sequence[Batch]) -> dict[str, list[Batch]]:
    """Sorted by producer: the order in which rows are locked."""
    grouped: dict[str, list[Batch]] = defaultdict(list)
    for batch in batches:
        grouped[batch.producer].append(batch)
    return dict(sorted(grouped.items()))


def missing(batches: Sequence[Batch], committed: Mapping[Stream, int]) -> list[Batch]:
    """What of one producer's batches is not committed yet, in order and without doubles. Raises _OutOfOrder."""
    marks, rest = dict(committed), []
    for batch in sorted(batches, key=lambda batch: (batch.stream, batch.first)):
        expected = marks[batch.stream] + 1
        if batch.first > expected:
            raise _OutOfOrder(Gap(producer=batch.producer, stream=batch.stream, expected=expected, found=batch.first))
        new = batch.after(expected - 1)
        if new is not None and new.count:
            rest.append(new)
            marks[batch.stream] = new.last
    return rest


def named(batch: Batch) -> Batch:
    """The batch with a name for every key index that occurs; one that the batch does not name gets a telling one."""
    points = batch.points()
    indexes = points["key"][(points["flags"] & LOST) == 0]
    if not len(indexes) or indexes.max() < len(batch.keys):
        return batch
    indexes, place = np.unique(points["key"], return_inverse=True)
    renumbered = points.copy()
    renumbered["key"] = place
    keys = tuple(batch.keys[i] if i < len(batch.keys) else f"unnamed/{i}" for i in indexes.tolist())
    return replace(batch, keys=keys, payload=renumbered.tobytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What never changes about a run."""

    number: int
    user: str


def transact(
    connection: psycopg.Connection[Any],
    batches: Mapping[str, Sequence[Batch]],
    runs: Mapping[str, RunIdentity],
    key_tables: Mapping[tuple[str, ...], np.ndarray],
) -> Outcome:
    """One try; the caller commits. `runs` and `key_tables` know everything that the batches name: the latter has the
    ids of a batch's keys, by `Batch.keys`.
    """
    connection.execute("SET LOCAL synchronous_commit = on")  # committed means: survives a crash of the server
    with numpy_cursor(connection) as cursor:
        rows = _locked(cursor, batches)
        new: dict[str, list[Batch]] = {}
        gaps = []
        for producer, sent in batches.items():
            try:
                new[producer] = missing(sent, rows[producer][1])
            except _OutOfOrder as error:
                gaps.append(error.gap)
        removed = _removed(cursor, {batch.run for sent in new.values() for batch in sent})
        kept = [batch for sent in new.values() for batch in sent if batch.run not in removed]
        points = [batch for batch in kept if batch.stream is Stream.points]
        lost: dict[str, int] = {}
        if points:
            lost = _write_points(cursor, points, runs, key_tables, {producer: row[0] for producer, row in rows.items()})
        told = [batch for batch in kept if batch.stream is Stream.facts]
        facts.apply(connection, [said for batch in told for said in _facts(batch, runs)])
        marks: Watermarks = {(producer, stream): mark for producer in new for stream, mark in rows[producer][1].items()}
        marks |= {(producer, batch.stream): batch.last for producer, sent in new.items() for batch in sent}
        moved = [producer for producer, sent in new.items() if sent]
        if moved:
            columns = zip(
                *(
                    (
                        rows[producer][0], marks[producer, Stream.points], marks[producer, Stream.facts],
                        lost.get(producer, 0),
                    )
                    for producer in moved
                ),
                strict=True,
            )  # fmt: skip
            cursor.execute(
                "UPDATE producers p SET points = new.points, facts = new.facts, lost = p.lost + new.lost,"
                " updated_at = now(), xid = pg_current_xact_id()"
                " FROM unnest(%s, %s, %s, %s) AS new(id, points, facts, lost) WHERE p.id = new.id",
                [np.array(column, dtype=np.int64) for column in columns],
            )
    return Outcome(watermarks=marks, gaps=tuple(gaps))


def _locked(
    cursor: psycopg.Cursor[Any], batches: Mapping[str, Sequence[Batch]]
) -> dict[str, tuple[int, dict[Stream, int]]]:
    """Database id and watermarks of each producer, whose rows stay locked until the end of the transaction."""
    uuids = [UUID(hex=producer) for producer in batches]

    def lock() -> dict[str, tuple[int, dict[Stream, int]]]:
        found = cursor.execute(
            "SELECT uuid, id, points, facts FROM producers WHERE uuid = ANY(%s) ORDER BY uuid FOR UPDATE", (uuids,)
        )
        return {row[0].hex: (row[1], {Stream.points: row[2], Stream.facts: row[3]}) for row in found}

    rows = lock()
    unknown = [sent[0] for producer, sent in batches.items() if producer not in rows]
    if unknown:
        cursor.execute(
            "INSERT INTO producers (uuid, run_id, attempt, rank)"
            " SELECT * FROM unnest(%s::uuid[], %s::text[], %s::int[], %s::int[]) ON CONFLICT (uuid) DO NOTHING",
            (
                [UUID(hex=batch.producer) for batch in unknown], [batch.run for batch in unknown],
                [batch.attempt for batch in unknown], [batch.rank for batch in unknown],
            ),
        )  # fmt: skip
        rows = lock()  # another tracker may have been faster, so read what is there
    return rows


def _removed(cursor: psycopg.Cursor[Any], runs: set[str]) -> set[str]:
    """Runs that somebody removed: what comes late for them is acknowledged and dropped, see removal.py.

    Asked when the producers are locked: a removal locks them too, so it comes wholly before or wholly after.
    """
    found = cursor.execute(
        "SELECT id FROM runs WHERE id = ANY(%s) AND deleted_at IS NOT NULL", (sorted(runs),)
    ).fetchall()
    return {row[0] for row in found}


def _write_points(
    cursor: psycopg.Cursor[Any], batches: Sequence[Batch], runs: Mapping[str, RunIdentity],
    key_tables: Mapping[tuple[str, ...], np.ndarray], producer_ids: Mapping[str, int],
) -> dict[str, int]:  # fmt: skip
    """One row per batch, and one summary per key. Gives how many points were lost on their way, by producer."""
    series, losses = chunks.series_of(batches, [key_tables[batch.keys] for batch in batches])
    owners = np.array(
        [
            (
                runs[batch.run].number, 0, 0, producer_ids[batch.producer], batch.first, batch.last, batch.attempt,
                batch.rank, 0,
            )
            for batch in batches
        ],
        chunks.OWNER,
    )  # fmt: skip
    if len(series.values):
        copied = [chunks.copy_row(row, owners[row.owner]) for row in chunks.rows(series)]
        with cursor.copy(f"COPY metric_chunks_live ({chunks.COPY_COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
            copy.write(b"".join((COPY_HEADER, *copied, COPY_END)))
        new = chunks.merged(chunks.summaries(series, owners["run_number"], owners["attempt"], owners["rank"]))
        move_summaries(cursor, np.unique(owners["run_number"]).tolist(), is_final=False)
        cursor.execute(_SUMMARIES, [np.ascontiguousarray(new[name]) for name in _SUMMARY_COLUMNS])
    lost: dict[str, int] = defaultdict(int)
    for loss in losses:
        batch = batches[loss.batch]
        lost[batch.producer] += loss.count
        _tell_loss(cursor, batch, loss, runs[batch.run].user)
    return lost


def _tell_loss(cursor: psycopg.Cursor[Any], batch: Batch, loss: chunks.Loss, user: str) -> None:
    lifecycle.add_event(
        cursor, batch.run, attempt=batch.attempt, rank=batch.rank, at=datetime.now(UTC), kind="lost_points",
        level="error", user=user,
        message=f"{loss.count} points were damaged before they could be sent; the rest is here",
        details={
            "producer": batch.producer, "count": loss.count, "first": loss.first_seq, "last": loss.last_seq,
        },
    )  # fmt: skip


def _facts(batch: Batch, runs: Mapping[str, RunIdentity]) -> list[facts.Said]:
    try:
        raws = json.loads(batch.payload)
        if not isinstance(raws, list) or len(raws) != batch.count:
            raws = [batch.payload.decode(errors="replace")]
    except ValueError:
        raws = [batch.payload.decode(errors="replace")]
    user = runs[batch.run].user
    return [facts.Said(run=batch.run, attempt=batch.attempt, rank=batch.rank, user=user, raw=raw) for raw in raws]


_SUMMARY_COLUMNS = tuple(name for name in chunks.SUMMARY.names or ())


def _of_end(end: str, is_new: str) -> str:
    """Takes the four columns of the first (or last) point from the new row under that condition."""
    return ", ".join(
        f"{end}_{name} = CASE WHEN {is_new} THEN excluded.{end}_{name} ELSE s.{end}_{name} END"
        for name in ("attempt", "value", "step", "time_ms")
    )


_TABLE_COLUMNS = ", ".join(("run_number", "key_id", *_SUMMARY_COLUMNS[2:]))

_MOVE = f"""
WITH gone AS (DELETE FROM metric_summaries_{{here}} WHERE run_number = ANY(%s) RETURNING *)
INSERT INTO metric_summaries_{{there}} ({_TABLE_COLUMNS}, is_final)
SELECT {_TABLE_COLUMNS}, {{is_final}} FROM gone ORDER BY run_number, key_id, rank
"""


def move_summaries(cursor: psycopg.Cursor[Any], runs: Sequence[int], *, is_final: bool) -> None:
    """To the partition that nobody updates, or back. The runs' producers (or the runs) are locked by the caller."""
    here, there = ("live", "final") if is_final else ("final", "live")
    cursor.execute(_MOVE.format(here=here, there=there, is_final=is_final), (list(runs),))


# Who is later: the higher attempt; within one, what is written later. NaN stands for "no minimum" on the way in.
# PostgreSQL refuses a sum that overflows, where floating point says infinity; so infinity is said for it.
_SUMMARIES = f"""
INSERT INTO metric_summaries_live AS s ({_TABLE_COLUMNS})
SELECT run, key, rank, first_attempt, last_attempt, count, nan_count, inf_count, sum, first_value, first_step,
  first_time_ms, last_value, last_step, last_time_ms,
  nullif(min_value, 'NaN'), CASE WHEN min_value <> 'NaN' THEN min_step END,
  nullif(max_value, 'NaN'), CASE WHEN max_value <> 'NaN' THEN max_step END
FROM unnest({", ".join(["%s"] * len(_SUMMARY_COLUMNS))}) AS new({", ".join(_SUMMARY_COLUMNS)})
ON CONFLICT (run_number, key_id, rank) DO UPDATE SET
  count = s.count + excluded.count, nan_count = s.nan_count + excluded.nan_count,
  inf_count = s.inf_count + excluded.inf_count,
  sum = CASE WHEN (s.sum > 0) = (excluded.sum > 0) AND abs(s.sum) > 1.79769313486231e308::float8 - abs(excluded.sum)
             THEN sign(s.sum) * 'Infinity'::float8 ELSE s.sum + excluded.sum END,
  {_of_end("first", "excluded.first_attempt < s.first_attempt")},
  {_of_end("last", "excluded.last_attempt >= s.last_attempt")},
  min_value = least(s.min_value, excluded.min_value),
  min_step = CASE WHEN s.min_value IS NULL OR excluded.min_value < s.min_value
                  THEN excluded.min_step ELSE s.min_step END,
  max_value = greatest(s.max_value, excluded.max_value),
  max_step = CASE WHEN s.max_value IS NULL OR excluded.max_value > s.max_value
                  THEN excluded.max_step ELSE s.max_step END
"""
