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
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from orchestrator.records import Batch, Stream
from orchestrator.store import chunks, facts
from orchestrator.store.binary import COPY_END, COPY_HEADER, numpy_cursor
from orchestrator.store.cleaning import clean_name
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


def names_of_keys(batch: Batch) -> dict[int, str]:
    """The names of the keys that occur in the points; an index that the batch does not name gets a telling one."""
    indexes = np.unique(batch.points()["key"]).tolist()
    return {i: clean_name(batch.keys[i]) or "unnamed" if i < len(batch.keys) else f"unnamed/{i}" for i in indexes}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What never changes about a run."""

    number: int
    user: str


def transact(
    connection: psycopg.Connection[Any],
    batches: Mapping[str, Sequence[Batch]],
    runs: Mapping[str, RunIdentity],
    key_ids: Mapping[str, int],
) -> Outcome:
    """One try; the caller commits. `runs` and `key_ids` know everything that the batches name."""
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
        if points:
            _write_points(cursor, points, runs, key_ids, {producer: row[0] for producer, row in rows.items()})
        facts.apply(connection, [said for batch in kept for said in _facts(batch, runs)])
        marks: Watermarks = {(producer, stream): mark for producer in new for stream, mark in rows[producer][1].items()}
        marks |= {(producer, batch.stream): batch.last for producer, sent in new.items() for batch in sent}
        moved = [producer for producer, sent in new.items() if sent]
        if moved:
            cursor.execute(
                "UPDATE producers p SET points = new.points, facts = new.facts, updated_at = now(),"
                " xid = pg_current_xact_id() FROM unnest(%s, %s, %s) AS new(id, points, facts) WHERE p.id = new.id",
                [
                    np.array(column, dtype=np.int64)
                    for column in zip(
                        *(
                            (rows[producer][0], marks[producer, Stream.points], marks[producer, Stream.facts])
                            for producer in moved
                        ),
                        strict=True,
                    )
                ],
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
        cursor.executemany(
            "INSERT INTO producers (uuid, run_id, attempt, rank) VALUES (%s, %s, %s, %s) ON CONFLICT (uuid) DO NOTHING",
            [(UUID(hex=batch.producer), batch.run, batch.attempt, batch.rank) for batch in unknown],
        )
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
    cursor: psycopg.Cursor[Any], batches: Sequence[Batch], runs: Mapping[str, RunIdentity], key_ids: Mapping[str, int],
    producer_ids: Mapping[str, int],
) -> None:  # fmt: skip
    copied, summaries = [COPY_HEADER], []
    for batch in batches:
        columns, number = chunks.columns(batch), runs[batch.run].number
        ids = {index: key_ids[name] for index, name in names_of_keys(batch).items()}
        columns.summaries["run"] = number
        columns.summaries["key"] = [ids[index] for index in columns.summaries["key"].tolist()]
        summaries.append(columns.summaries)
        producer_id = producer_ids[batch.producer]
        copied += [
            chunks.copy_row(
                chunk, run_number=number, producer_id=producer_id, key_id=ids[chunk.key], attempt=batch.attempt,
                rank=batch.rank,
            )
            for chunk in columns.chunks
        ]  # fmt: skip
    with cursor.copy(f"COPY metric_chunks ({chunks.COPY_COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
        copy.write(b"".join((*copied, COPY_END)))
    new = chunks.merged(np.concatenate(summaries))
    cursor.execute(_SUMMARIES, [np.ascontiguousarray(new[name]) for name in _SUMMARY_COLUMNS])


def _facts(batch: Batch, runs: Mapping[str, RunIdentity]) -> list[facts.Said]:
    if batch.stream is not Stream.facts:
        return []
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

# Who is later: the higher attempt; within one, what is written later. NaN stands for "no minimum" on the way in.
# PostgreSQL refuses a sum that overflows, where floating point says infinity; so infinity is said for it.
_SUMMARIES = f"""
INSERT INTO metric_summaries AS s ({_TABLE_COLUMNS})
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
