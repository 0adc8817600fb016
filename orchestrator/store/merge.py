"""Merging: many small rows of metric_chunks become few large ones, which are smaller, too, and faster to read.

Rows are committed with level 0, one per batch. What of a producer is there with level 0 or 1 is its *pool*. A merge
takes the pool from its beginning, puts the points of each key together, in their order, and writes them again: a long
curve alone in rows of at least `LONG` points, short ones together. Rows of long curves are there for good (level 2);
short ones stay in the pool (level 1) until they are long, or until the pool is large or the run is over (level 2 or 3).

A merge is one transaction: a crash leaves all of it or nothing. What makes it safe beside others:

* **Commits** only add rows; a merge takes rows that it sees and locks nothing that commits use.
* **Readers of the feed** stand at the position of a row. A merge takes only rows that every reader which has a cursor
  for the run has passed, and its rows keep the largest position of what they were made of: who has passed that gets
  nothing again, who has not gets all of it. A new reader saves its cursor before it reads, and waits with that for a
  merge of its run (`lock_name`).
* **Removal** of a run waits for its merge, and a merge leaves out runs that are being removed.
* **Within a curve** rows stand in the order of their ids: no two rows of a merge with points of the same key end in the
  same source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg

from orchestrator.records import TERMINAL, RunStatus
from orchestrator.store import chunks, levels, removal, transaction
from orchestrator.store.binary import COPY_END, COPY_HEADER, numpy_cursor
from orchestrator.store.chunks import OWNER, Series
from orchestrator.store.reading import STORED_COLUMNS, stored

LONG = 8192
"""Points of a key that are a row of their own."""
MOST = 16384
"""Points of short curves in one row."""
MOST_AT_ONCE = 1_000_000
"""Points in one transaction, as far as rows are smaller than that."""
LARGE = MOST_AT_ONCE // 2
"""Points in a pool that is merged for good whatever the length of its curves."""
SUMMED_UP = 2 * levels.WINDOW
"""Points of a short curve in a large pool that are worth windows of their own."""

MANY_ROWS, MANY_POINTS = 128, 65_536
"""Of level 0 in the pool of a run that goes on: enough to merge …"""
TOO_MANY_ROWS = 1024
"""… even where these are little beside what has to be written again."""

_WIDE_ENOUGH = 400
"""Bytes that equal steps and times must save before they are worth a row of their own."""

SOURCE = np.dtype(
    [
        ("run_number", "i8"), ("producer_id", "i8"), ("attempt", "i8"), ("rank", "i8"), ("id", "i8"), ("xid", "i8"),
        ("n", "i8"), ("level", "i8"),
    ]
)  # fmt: skip


def lock_name(run: str) -> str:
    """Of the advisory lock that a merge of the run takes alone, and whoever begins to read its feed shares."""
    return f"orc.merge.{run}"


# -- pure: what to merge -----------------------------------------------------------------------------------------------


def taken(pool: np.ndarray, limit: tuple[int, int] | None, is_over: bool) -> int:
    """How many rows of a producer's pool (dtype SOURCE, by id) to merge now, from its beginning; 0: none.

    `limit` is the position that all readers have passed; None: there are no readers.
    """
    end = int(np.searchsorted(np.cumsum(pool["n"]), MOST_AT_ONCE, side="right"))
    rows = pool[: max(end, min(2, len(pool)))]
    while len(rows) and limit is not None and (int(rows["xid"].max()), int(rows["id"].max())) > limit:
        rows = rows[:-1]
    live = rows[rows["level"] == 0]
    if not len(live):
        return 0
    new, every = int(live["n"].sum()), int(rows["n"].sum())
    is_enough = len(live) >= MANY_ROWS or new >= MANY_POINTS
    is_worth_it = new * 3 >= every or every >= LARGE or len(live) >= TOO_MANY_ROWS
    return len(rows) if is_over or (is_enough and is_worth_it) else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regrouped:
    """Points as they are to be written: owners are indexes of `owners`."""

    series: Series
    owners: np.ndarray
    """dtype OWNER, one per row"""
    summed_up: np.ndarray
    """bool, one per row: goes to metric_levels, too"""


def regrouped(
    series: Series, sources: np.ndarray, pools: np.ndarray, is_over: np.ndarray, is_large: np.ndarray
) -> Regrouped:
    """The points of pools in the rows that merging makes of them.

    `series`: of the source rows, its owners are their indexes. `sources`: dtype OWNER, one per row, those of one pool
    side by side and in order. `pools`: the pool of each row, rising from 0. Of a pool that is over or large (one entry
    per pool) nothing stays in the pool, and where it is large, shorter curves are summed up, too.
    """
    order = np.lexsort((series.owners, series.keys, pools[series.owners]))
    counts = series.counts[order]
    ends = np.cumsum(counts)
    gather = np.arange(len(series.values)) + np.repeat(series.starts[order] - (ends - counts), counts)
    keys, rows = series.keys[order], series.owners[order]
    starts = ends - counts
    points = Series(
        keys=keys, owners=rows, starts=starts, steps=series.steps[gather], times=series.times[gather],
        values=series.values[gather],
    )  # fmt: skip
    parts = _parts(points, pools[rows])
    groups, is_short = _groups(points, parts, pools[rows[parts]], is_large)
    return _written(points, parts, groups, is_short, sources, pools, is_over | is_large, is_large)


def _parts(points: Series, pools: np.ndarray) -> np.ndarray:
    """The pieces with which new parts of curves begin: at another key or pool, at a jump, and when a part is long."""
    is_new = np.ones(len(points.keys), bool)
    is_new[1:] = (np.diff(points.keys) != 0) | (np.diff(pools) != 0)
    curves = np.flatnonzero(is_new)
    whole = Series(
        keys=points.keys[curves], owners=points.owners[curves], starts=points.starts[curves], steps=points.steps,
        times=points.times, values=points.values,
    )  # fmt: skip
    is_new[np.isin(points.starts, np.flatnonzero(chunks.jumps(whole)))] = True
    counts = points.counts
    long = np.flatnonzero(np.add.reduceat(counts, curves) >= LONG) if len(curves) else curves
    ends = np.append(curves[1:], len(counts))
    for curve in long.tolist():
        so_far = 0
        for piece in range(int(curves[curve]), int(ends[curve])):
            if is_new[piece] or so_far >= LONG:
                is_new[piece] = True
                so_far = 0
            so_far += int(counts[piece])
    return np.flatnonzero(is_new)


def _groups(
    points: Series, parts: np.ndarray, pools: np.ndarray, is_large: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The row of each part (any numbers, equal for one row), and whether it is a short one's."""
    lengths = np.add.reduceat(points.counts, parts)
    keys = points.keys[parts]
    is_last = np.ones(len(parts), bool)
    is_last[:-1] = (np.diff(keys) != 0) | (np.diff(pools) != 0)
    is_short = is_last & (lengths < LONG)
    alone = np.arange(len(parts))
    short = np.flatnonzero(is_short)
    if not len(short):
        return alone, is_short
    size, pool = lengths[short], pools[short]
    is_kept = is_large[pool] & (size >= SUMMED_UP)
    axis = _signatures(points, points.starts[parts[short]], size)
    order = np.lexsort((keys[short], axis, is_kept, pool))
    short, size, pool, is_kept, axis = (array[order] for array in (short, size, pool, is_kept, axis))
    # Those with the same steps and times come together where that pays, the others of the pool anyhow.
    same = np.ones(len(short), bool)
    same[1:] = (np.diff(axis) != 0) | (np.diff(pool) != 0) | (np.diff(is_kept) != 0)
    begins = np.flatnonzero(same)
    members = np.diff(begins, append=len(short))
    pays = 8 * (members - 1) * size[begins] >= _WIDE_ENOUGH
    kind = np.where(np.repeat(pays, members), np.repeat(np.arange(1, len(begins) + 1), members), 0)
    order = np.lexsort((keys[short], kind, is_kept, pool))
    short, size, pool, is_kept, kind = (array[order] for array in (short, size, pool, is_kept, kind))
    differs = np.ones(len(short), bool)
    differs[1:] = (np.diff(kind) != 0) | (np.diff(pool) != 0) | (np.diff(is_kept) != 0)
    begins = np.flatnonzero(differs)
    so_far = np.cumsum(size) - size
    in_group = so_far - np.repeat(so_far[begins], np.diff(begins, append=len(short)))
    full = np.zeros(len(short), np.int64)
    full[1:] = np.diff(in_group // MOST) > 0
    row = np.cumsum(differs | (full > 0))
    groups = alone.copy()
    groups[short] = len(parts) + row
    return groups, is_short


def _signatures(points: Series, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Equal for parts whose steps and times are equal, hardly ever for others."""
    ends = np.cumsum(lengths)
    place = np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)
    at = place + np.repeat(starts, lengths)
    with np.errstate(over="ignore"):
        mixed = points.steps[at].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= points.times[at].astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed *= (2 * place + 1).astype(np.uint64) * np.uint64(0x165667B19E3779F9)
        mixed ^= mixed >> np.uint64(29)
        return np.add.reduceat(mixed, ends - lengths) ^ lengths.astype(np.uint64)


def _written(
    points: Series, parts: np.ndarray, groups: np.ndarray, is_short: np.ndarray, sources: np.ndarray,
    pools: np.ndarray, is_closed: np.ndarray, is_large: np.ndarray,
) -> Regrouped:  # fmt: skip
    order = np.lexsort((points.keys[parts], groups))
    lengths = np.add.reduceat(points.counts, parts)[order]
    begins = points.starts[parts][order]
    ends = np.cumsum(lengths)
    gather = np.arange(len(points.values)) + np.repeat(begins - (ends - lengths), lengths)
    of_row = groups[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.diff(of_row) != 0
    firsts = np.flatnonzero(is_first)
    row = np.cumsum(is_first) - 1

    def over(name: str, extreme: np.ufunc) -> np.ndarray:
        """Of all sources of a row."""
        of_part = extreme.reduceat(sources[name][points.owners], parts)[order]
        return extreme.reduceat(of_part, firsts)

    source = points.owners[parts][order][firsts]
    owners = np.zeros(len(firsts), OWNER)
    for name in ("run_number", "producer_id", "attempt", "rank"):
        owners[name] = sources[name][source]
    for name, extreme in (("xid", np.maximum), ("id", np.maximum), ("last_seq", np.maximum), ("first_seq", np.minimum)):
        owners[name] = over(name, extreme)
    pool, short, length = pools[source], is_short[order][firsts], lengths[firsts]
    summed_up = (length >= np.where(short & is_large[pool], SUMMED_UP, LONG)) & ~(short & ~is_large[pool])
    owners["level"] = np.where(summed_up, 2, np.where(short & ~is_closed[pool], 1, 3))
    series = Series(
        keys=points.keys[parts][order], owners=row, starts=ends - lengths, steps=points.steps[gather],
        times=points.times[gather], values=points.values[gather],
    )  # fmt: skip
    return Regrouped(series=series, owners=owners, summed_up=summed_up)


# -- the transaction ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What one transaction did."""

    points: int = 0
    rows: int = 0
    """Rows that went."""
    made: int = 0
    """Rows that came."""
    waiting: frozenset[int] = frozenset()
    """Numbers of runs that could not be merged now, or only in part: a reader is behind, or somebody works on them."""
    more: frozenset[int] = frozenset()
    """Numbers of runs of which more can be merged at once."""


def merge(connection: psycopg.Connection[Any], numbers: Sequence[int]) -> Merged:
    """What is due of these runs, up to about `MOST_AT_ONCE` points; the caller commits."""
    runs, busy = _locked(connection, numbers)
    with numpy_cursor(connection) as cursor:
        limits = _limits(cursor, runs)
        rows = cursor.execute(
            "SELECT run_number, producer_id, attempt, rank, id, xid::text::bigint, n, level, ctid::text"
            " FROM metric_chunks WHERE run_number = ANY(%s) AND level IN (0, 1) ORDER BY 1, 2, 3, 4, 5",
            (list(runs),),
        ).fetchall()
        pool = np.array([row[:8] for row in rows], SOURCE)
        chosen, waiting, more, sizes = _chosen(pool, runs, limits)
        if not len(chosen):
            return Merged(waiting=frozenset(waiting | busy), more=frozenset(more))
        places = [rows[place][8] for place in chosen.tolist()]
        is_over = [runs[number].is_over for number, _ in sizes]
        is_large = [size >= LARGE for _, size in sizes]
        made = _rewrite(cursor, pool[chosen], places, np.array(is_over), np.array(is_large))
    return Merged(
        points=int(pool["n"][chosen].sum()), rows=len(chosen), made=made, waiting=frozenset(waiting | busy),
        more=frozenset(more),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    id: str
    attempt: int
    is_over: bool


def _locked(connection: psycopg.Connection[Any], numbers: Sequence[int]) -> tuple[dict[int, _Run], set[int]]:
    """The runs that nobody removes and nobody else merges until the end of the transaction; and those that somebody
    does."""
    rows = connection.execute(
        "SELECT number, id, attempt, status FROM runs WHERE number = ANY(%s) AND deleted_at IS NULL ORDER BY number",
        (list(numbers),),
    ).fetchall()
    if not rows:
        return {}, set()
    ids = [row[1] for row in rows]
    free = connection.execute(
        "SELECT pg_try_advisory_xact_lock_shared(hashtextextended(r, 0)) AND"
        " pg_try_advisory_xact_lock(hashtextextended(m, 0)) FROM unnest(%s::text[], %s::text[]) AS t (r, m)",
        ([removal.lock_name(run) for run in ids], [lock_name(run) for run in ids]),
    ).fetchall()
    # Asked again: a removal may have ended just before its lock was free.
    there = {
        row[0] for row in connection.execute("SELECT id FROM runs WHERE id = ANY(%s) AND deleted_at IS NULL", (ids,))
    }
    found, busy = {}, set()
    for (number, run, attempt, status), (is_free,) in zip(rows, free, strict=True):
        if is_free and run in there:
            found[number] = _Run(id=run, attempt=attempt, is_over=status in TERMINAL)
        elif run in there:
            busy.add(number)
    return found, busy


_SINKS = """
WITH RECURSIVE s AS (
  SELECT min(sink) AS sink FROM sink_cursors
  UNION ALL SELECT (SELECT min(c.sink) FROM sink_cursors c WHERE c.sink > s.sink) FROM s WHERE s.sink IS NOT NULL
)
SELECT s.sink, coalesce(c.updated_at > now() - interval '1 day', false) FROM s
LEFT JOIN sink_cursors c ON c.sink = s.sink AND c.run_id = '' WHERE s.sink IS NOT NULL
"""

_CURSORS = """
SELECT run_id, xid, id FROM sink_cursors WHERE sink = %s AND run_id = ANY(%s)
  AND (%s OR updated_at > now() - interval '1 day')
"""


def _limits(cursor: psycopg.Cursor[Any], runs: Mapping[int, _Run]) -> dict[int, tuple[int, int]]:
    """How far every reader has come that lives and reads the run's points."""
    names = {
        name: number
        for number, run in runs.items()
        for name in (run.id, *(f"{run.id}/attempt-{attempt}" for attempt in range(1, run.attempt + 1)))
    }
    found: dict[int, tuple[int, int]] = {}
    for sink, lives in cursor.execute(_SINKS).fetchall():
        for name, xid, number in cursor.execute(_CURSORS, (sink, list(names), lives)).fetchall():
            run = names[name]
            found[run] = min(found.get(run, (xid, number)), (xid, number))
    return found


def _chosen(
    pool: np.ndarray, runs: Mapping[int, _Run], limits: Mapping[int, tuple[int, int]]
) -> tuple[np.ndarray, set[int], set[int], list[tuple[int, int]]]:
    """Places of rows to merge, runs that wait, runs with more, and of each pool its run and the points taken."""
    chosen: list[np.ndarray] = []
    waiting: set[int] = set()
    more: set[int] = set()
    sizes: list[tuple[int, int]] = []
    room = MOST_AT_ONCE
    of_pool = _pools(pool)
    begins = np.flatnonzero(np.diff(of_pool, prepend=-1))
    for begin, end in zip(begins.tolist(), np.append(begins[1:], len(pool))[: len(begins)].tolist(), strict=True):
        rows, run = pool[begin:end], int(pool["run_number"][begin])
        if room <= 0:
            more.add(run)
            continue
        is_over = runs[run].is_over
        count = taken(rows, limits.get(run), is_over)
        size = int(rows["n"][:count].sum())
        if count:
            chosen.append(np.arange(begin, begin + count))
            sizes.append((run, size))
            room -= size
        if (rows["level"][count:] == 0).any():
            if count == 0 and (is_over or taken(rows, None, is_over)):
                waiting.add(run)
            elif count:
                (more if taken(rows[count:], limits.get(run), is_over) else waiting).add(run)
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64), waiting, more, sizes


def _pools(sources: np.ndarray) -> np.ndarray:
    """The number of each row's pool, rising from 0: rows of one producer stand side by side."""
    differs = np.zeros(len(sources), bool)
    for name in ("run_number", "producer_id", "attempt", "rank"):  # an imported run may have points without a producer
        differs[1:] |= np.diff(sources[name]) != 0
    return np.cumsum(differs)


_TAKE = f"""
DELETE FROM {{table}} c WHERE ctid = ANY(%s::tid[])
RETURNING c.ctid::text, c.first_seq, c.last_seq, c.attempt, c.rank, {STORED_COLUMNS}
"""


def _rewrite(
    cursor: psycopg.Cursor[Any], sources: np.ndarray, places: Sequence[str], is_over: np.ndarray, is_large: np.ndarray
) -> int:
    """Takes the rows out and writes what merging makes of them. Gives how many rows that are."""
    is_live = sources["level"] == 0
    rows: list[Any] = [None] * len(places)
    for table, own in (
        ("metric_chunks_live", np.flatnonzero(is_live)),
        ("metric_chunks_merged", np.flatnonzero(~is_live)),
    ):
        at = {places[place]: place for place in own.tolist()}
        if at:
            for row in cursor.execute(_TAKE.format(table=table), (list(at),)).fetchall():
                rows[at[row[0]]] = row[1:]
    series = chunks.unpacked([stored(row[4:]) for row in rows])
    owners = np.zeros(len(rows), OWNER)
    for name in ("run_number", "producer_id", "xid", "id"):
        owners[name] = sources[name]
    for column, name in enumerate(("first_seq", "last_seq", "attempt", "rank")):
        owners[name] = [row[column] for row in rows]
    new = regrouped(series, owners, _pools(sources), is_over, is_large)
    copied = [chunks.copy_row(row, new.owners[row.owner]) for row in chunks.rows(new.series)]
    with cursor.copy(f"COPY metric_chunks_merged ({chunks.MERGED_COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
        copy.write(b"".join((COPY_HEADER, *copied, COPY_END)))
    _sum_up(cursor, new)
    return len(copied)


def _sum_up(cursor: psycopg.Cursor[Any], new: Regrouped) -> None:
    series = new.series
    pieces = np.flatnonzero(new.summed_up[series.owners])
    if not len(pieces):
        return
    parts = np.zeros(len(pieces), levels.PART)
    for name in ("run_number", "producer_id", "id", "attempt", "rank"):
        parts[name] = new.owners[name][series.owners[pieces]]
    parts["key_id"] = series.keys[pieces]
    counts = series.counts[pieces]
    ends = np.cumsum(counts)
    gather = np.arange(int(ends[-1])) + np.repeat(series.starts[pieces] - (ends - counts), counts)
    levels.add(
        cursor,
        Series(
            keys=series.keys[pieces], owners=series.owners[pieces], starts=ends - counts, steps=series.steps[gather],
            times=series.times[gather], values=series.values[gather],
        ),
        parts,
    )  # fmt: skip


def _names(statuses: Iterable[RunStatus]) -> list[str]:
    return [status.value for status in statuses]


# -- summaries of runs that are over -----------------------------------------------------------------------------------


def settle(connection: psycopg.Connection[Any], numbers: Sequence[int]) -> frozenset[int]:
    """Moves the summaries of those runs that are over to the partition that nobody updates; the caller commits. A
    commit that comes later brings its run's back (see transaction.py).

    Producers are locked before runs, as commits and removals do it, and nobody is waited for: a run that is written to
    has its turn another time. Gives the runs that are done, go on again, or are removed.
    """
    with connection.cursor() as cursor:
        locked = cursor.execute(
            "SELECT p.run_id FROM producers p JOIN runs r ON r.id = p.run_id WHERE r.number = ANY(%s)"
            " ORDER BY p.uuid FOR UPDATE OF p SKIP LOCKED",
            (list(numbers),),
        )
        free = Counter(row[0] for row in locked.fetchall())
        over = "number = ANY(%s) AND status = ANY(%s) AND deleted_at IS NULL"
        runs = cursor.execute(
            f"SELECT number, id FROM runs WHERE {over} ORDER BY number FOR UPDATE SKIP LOCKED",
            (list(numbers), _names(TERMINAL)),
        ).fetchall()
        # Counted when the runs are locked: from now on they get no new producers.
        every = dict(
            cursor.execute(
                "SELECT run_id, count(*) FROM producers WHERE run_id = ANY(%s) GROUP BY 1", ([run for _, run in runs],)
            ).fetchall()
        )
        ready = {number for number, run in runs if free[run] == every.get(run, 0)}
        transaction.move_summaries(cursor, sorted(ready), is_final=True)
        still = cursor.execute(f"SELECT number FROM runs WHERE {over}", (list(numbers), _names(TERMINAL))).fetchall()
    return frozenset(ready | (set(numbers) - {row[0] for row in still}))


# -- what there is to merge --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """A producer with rows of level 0; `points` is its watermark, or the number of points in these rows."""

    producer: int
    run: int
    """The run's number."""
    is_over: bool
    points: int
    rows: int = 0


def everything(connection: psycopg.Connection[Any]) -> list[Unmerged]:
    """All that is there, by reading the live rows once; also runs that are over and whose summaries have not moved."""
    found = connection.execute(
        "SELECT c.producer_id, c.run_number, r.status, sum(c.n)::bigint, count(*) FROM metric_chunks_live c"
        " JOIN runs r ON r.number = c.run_number GROUP BY 1, 2, 3"
        " UNION ALL SELECT 0, number, status, 0, 0 FROM runs WHERE status = ANY(%s)"
        " AND number IN (SELECT run_number FROM metric_summaries_live)",
        (_names(TERMINAL),),
    ).fetchall()
    return [
        Unmerged(producer=row[0], run=row[1], is_over=row[2] in TERMINAL, points=row[3], rows=row[4]) for row in found
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    producers: tuple[Unmerged, ...]
    ended: tuple[int, ...]
    """Numbers of runs; removed ones, too."""
    cursor: int
    """To be passed next time."""


def changed(connection: psycopg.Connection[Any], after: int) -> Changes:
    """What transactions did that ended since a cursor."""
    horizon = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint").fetchone()
    assert horizon is not None
    span = (str(after), str(horizon[0]))
    found = connection.execute(
        "SELECT p.id, r.number, r.status, p.points FROM producers p JOIN runs r ON r.id = p.run_id"
        " WHERE p.xid >= %s::text::xid8 AND p.xid < %s::text::xid8 AND r.deleted_at IS NULL",
        span,
    ).fetchall()
    ended = connection.execute(
        "SELECT number FROM runs WHERE xid >= %s::text::xid8 AND xid < %s::text::xid8 AND status = ANY(%s)",
        (*span, _names(TERMINAL)),
    ).fetchall()
    return Changes(
        producers=tuple(
            Unmerged(producer=row[0], run=row[1], is_over=row[2] in TERMINAL, points=row[3]) for row in found
        ),
        ended=tuple(row[0] for row in ended),
        cursor=horizon[0],
    )


TABLES = ("metric_chunks_live", "metric_chunks_merged", "metric_summaries_live", "metric_summaries_final")

WORTH_A_VACUUM = """
SELECT relname::text FROM pg_stat_user_tables
WHERE schemaname = current_schema() AND relname = ANY(%s) AND n_dead_tup > 5000 + n_live_tup / 5
  AND pg_has_role((SELECT relowner FROM pg_class c WHERE c.oid = relid), 'USAGE')
"""

# A vacuum gives the pages of a table back, never those of an index. Where hardly anything is left, a new index is made
# in no time.
WORTH_A_REINDEX = """
SELECT relname::text FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relname = ANY(%s)
  AND pg_has_role(relowner, 'USAGE')
  AND pg_table_size(oid) < 1000000 AND pg_indexes_size(oid) > 100000 + 2 * pg_table_size(oid)
"""


def tidy(connection: psycopg.Connection[Any]) -> tuple[str, ...]:
    """Gives the space of rows that went back to the disk, where that is much; the server's own round may be a minute
    away. Only an owner may do that. The connection commits each statement. Gives the tables it took care of.
    """
    dead = [row[0] for row in connection.execute(WORTH_A_VACUUM, (list(TABLES),)).fetchall()]
    for table in dead:
        connection.execute(f"VACUUM {table}".encode())
    empty = [row[0] for row in connection.execute(WORTH_A_REINDEX, (list(TABLES),)).fetchall()]
    for table in empty:
        with suppress(psycopg.errors.LockNotAvailable), connection.transaction():
            connection.execute("SET LOCAL lock_timeout = '100ms'")  # commits wait while it waits
            connection.execute(f"REINDEX TABLE {table}".encode())
    return tuple(dict.fromkeys((*dead, *empty)))
