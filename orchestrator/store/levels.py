"""Long curves in windows of neighbouring points, so that a chart of any length reads a few thousand numbers.

When a row of metric_chunks is merged for good (level 2), its points are also summed up in windows of `WINDOW` points: a
row of metric_levels of level 1. Eight rows of one level make one of the next, in windows eight times as long; the rows
below stay, for charts of a part. So the windows of all levels together cost about 0.7 bytes per point.

The order is that of writing: the producers of an attempt one after the other, each in the order in which it wrote.
Steps may repeat or go back; a window is as long as it is whatever its steps are. What is not merged for good is read
point by point: merging keeps that little.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import psycopg

from orchestrator.store import reading
from orchestrator.store.binary import COPY_END, COPY_HEADER, numpy_cursor, row
from orchestrator.store.chunks import Series
from orchestrator.store.views import Curve

WINDOW = 128
"""Points in a window of level 1."""
FACTOR = 8
"""Windows of one level in one of the next, and rows of one level in a row of the next."""

WINDOWS = np.dtype(
    [
        ("counts", "i4"), ("nans", "i4"), ("infinities", "i4"), ("steps", "i8"), ("low_steps", "i8"),
        ("high_steps", "i8"), ("times_ms", "i8"), ("first", "f8"), ("min", "f8"), ("max", "f8"), ("sum", "f8"),
        ("last", "f8"),
    ]
)  # fmt: skip
"""The arrays of metric_levels, one entry per window."""
_ARRAYS = ", ".join(WINDOWS.names or ())

PART = np.dtype(
    [
        ("run_number", "i8"), ("producer_id", "i8"), ("id", "i8"), ("key_id", "i8"), ("attempt", "i8"), ("rank", "i8"),
    ]
)  # fmt: skip
"""Whose windows they are, and the id of the last chunk in them."""
_FINER = 8
"""So many times the windows of a chart are made of what is not merged yet before these are joined."""
_SERIES = ("run_number", "producer_id", "key_id", "attempt", "rank")


# -- pure --------------------------------------------------------------------------------------------------------------


def of_points(steps: np.ndarray, times_ms: np.ndarray, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Neighbouring points in windows that begin at `starts`, the first of which is 0; dtype WINDOWS."""
    found = np.zeros(len(starts), WINDOWS)
    if not len(starts):
        return found
    is_nan, is_inf = np.isnan(values), np.isinf(values)
    found["counts"] = np.diff(starts, append=len(values))
    found["nans"] = np.add.reduceat(is_nan, starts, dtype=np.int64)
    found["infinities"] = np.add.reduceat(is_inf, starts, dtype=np.int64)
    found["steps"], found["times_ms"], found["first"] = steps[starts], times_ms[starts], values[starts]
    found["last"] = values[np.append(starts[1:], len(values)) - 1]
    with np.errstate(over="ignore", invalid="ignore"):
        found["sum"] = np.add.reduceat(np.where(is_nan | is_inf, 0.0, values), starts)
    for name, extreme, of in (
        ("low_steps", np.minimum, steps), ("high_steps", np.maximum, steps), ("min", np.fmin, values),
        ("max", np.fmax, values),
    ):  # fmt: skip
        found[name] = extreme.reduceat(of, starts)
    return found


def joined(windows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Neighbouring windows as one; `starts` are where the new ones begin, the first is 0."""
    found = windows[starts]
    last = np.append(starts[1:], len(windows)) - 1
    found["last"] = windows["last"][last]
    with np.errstate(over="ignore", invalid="ignore"):
        for name in ("counts", "nans", "infinities", "sum"):
            found[name] = np.add.reduceat(windows[name], starts)
    for name, extreme in (
        ("low_steps", np.minimum), ("high_steps", np.maximum), ("min", np.fmin), ("max", np.fmax),
    ):  # fmt: skip
        found[name] = extreme.reduceat(windows[name], starts)
    return found


def at_most(windows: np.ndarray, most: int) -> np.ndarray:
    """Joined to so many, each with about the same number of points."""
    if len(windows) <= most:
        return windows
    counts = windows["counts"].astype(np.int64)
    total = int(counts.sum())
    group = (np.cumsum(counts) - counts) // max(1, -(-total // most))
    return joined(windows, np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1]))


def _within(windows: np.ndarray, start: int | None, stop: int | None) -> np.ndarray:
    """Those that reach into the range of steps."""
    chosen = np.ones(len(windows), bool)
    if start is not None:
        chosen &= windows["high_steps"] >= start
    if stop is not None:
        chosen &= windows["low_steps"] <= stop
    return windows[chosen]


# -- writing -----------------------------------------------------------------------------------------------------------


def add(cursor: psycopg.Cursor[Any], series: Series, parts: np.ndarray) -> None:
    """Level 1 of pieces of curves (dtype PART, one per piece of the series), and what becomes complete above it."""
    if not len(parts):
        return
    counts = series.counts
    pieces = -(-counts // WINDOW)
    firsts = np.cumsum(pieces) - pieces
    starts = np.repeat(series.starts, pieces) + WINDOW * (np.arange(pieces.sum()) - np.repeat(firsts, pieces))
    windows = of_points(series.steps, series.times, series.values, starts)
    _write(cursor, 1, parts, np.split(windows, firsts[1:]))
    level, grown = 1, parts
    while len(grown):
        grown = _grow(cursor, level, np.unique(grown[list(_SERIES)]))
        level += 1


def _write(cursor: psycopg.Cursor[Any], level: int, parts: np.ndarray, windows: Sequence[np.ndarray]) -> None:
    names = f"run_number, producer_id, id, n, min_step, max_step, key_id, attempt, rank, level, {_ARRAYS}"
    with cursor.copy(f"COPY metric_levels ({names}) FROM STDIN (FORMAT binary)") as copy:
        copy.write(COPY_HEADER)
        for part, own in zip(parts, windows, strict=True):
            longs = (
                part["run_number"],
                part["producer_id"],
                part["id"],
                own["counts"].sum(dtype=np.int64),
                own["low_steps"].min(),
                own["high_steps"].max(),
            )
            ints = (part["key_id"], part["attempt"], part["rank"], level)
            copy.write(row(map(int, longs), map(int, ints), [own[name] for name in WINDOWS.names or ()]))
        copy.write(COPY_END)


_COMPLETE = """
SELECT l.run_number, l.producer_id, l.key_id, l.attempt, l.rank, l.id
FROM unnest(%s, %s, %s, %s, %s) AS s (run_number, producer_id, key_id, attempt, rank)
CROSS JOIN LATERAL (
  SELECT coalesce(max(u.id), 0) AS id FROM metric_levels u WHERE u.run_number = s.run_number AND u.key_id = s.key_id
    AND u.rank = s.rank AND u.attempt = s.attempt AND u.level = %s AND u.producer_id = s.producer_id
) done
JOIN metric_levels l ON l.run_number = s.run_number AND l.key_id = s.key_id AND l.rank = s.rank
  AND l.attempt = s.attempt AND l.level = %s AND l.producer_id = s.producer_id AND l.id > done.id
ORDER BY 1, 2, 3, 4, 5, 6
"""

_OF_SERIES = f"""
SELECT id, {_ARRAYS} FROM metric_levels WHERE run_number = %s AND producer_id = %s AND key_id = %s AND attempt = %s
  AND rank = %s AND level = %s AND id = ANY(%s) ORDER BY id
"""


def _grow(cursor: psycopg.Cursor[Any], level: int, series: np.ndarray) -> np.ndarray:
    """Rows of the next level, where there are enough of this one. Gives those that were made (dtype PART)."""
    wanted = [np.ascontiguousarray(series[name]) for name in _SERIES]
    rows = cursor.execute(_COMPLETE, [*wanted, level + 1, level]).fetchall()
    parts, windows = [], []
    for of, own in groupby(rows, key=lambda row: row[:5]):
        ids = [row[5] for row in own]
        for first in range(0, len(ids) - FACTOR + 1, FACTOR):
            chosen = np.array(ids[first : first + FACTOR], np.int64)
            below = np.concatenate([_windows(each[1:]) for each in cursor.execute(_OF_SERIES, [*of, level, chosen])])
            run_number, producer_id, key_id, attempt, rank = of
            parts.append((run_number, producer_id, ids[first + FACTOR - 1], key_id, attempt, rank))
            windows.append(joined(below, np.arange(0, len(below), FACTOR)))
    made = np.array(parts, PART)
    if parts:
        _write(cursor, level + 1, made, windows)
    return made


def _windows(arrays: Sequence[np.ndarray]) -> np.ndarray:
    found = np.empty(len(arrays[0]), WINDOWS)
    for name, array in zip(WINDOWS.names or (), arrays, strict=True):
        found[name] = array
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    run: int
    key: int
    rank: int
    attempt: int
    start: int | None
    stop: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """Neighbouring windows; blocks stand in the order of producer and id."""

    producer: int
    id: int
    windows: np.ndarray


def curve(
    connection: psycopg.Connection[Any], run_number: int, key: str, rank: int, attempt: int | None, start: int | None,
    stop: int | None, most: int,
) -> Curve:  # fmt: skip
    """See Store.curve. The connection's transaction must not have asked anything before."""
    most = max(1, most)
    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")  # merging goes on meanwhile
    number = reading.key_id(connection, key)
    with numpy_cursor(connection) as cursor:
        newest = cursor.execute(
            "SELECT last_attempt, count FROM metric_summaries WHERE run_number = %s AND key_id = %s AND rank = %s",
            (run_number, number, rank),
        ).fetchone()
        if newest is None:
            return _curve(0, rank, np.empty(0, WINDOWS), most)
        chosen = newest[0] if attempt is None else attempt
        assert number is not None
        asked = _Asked(run=run_number, key=number, rank=rank, attempt=chosen, start=start, stop=stop)
        blocks = _long_part(cursor, asked, most, newest[1])
        blocks += _rest(connection, asked, blocks, most)
    windows = [block.windows for block in sorted(blocks, key=lambda block: (block.producer, block.id))]
    return _curve(chosen, rank, np.concatenate([np.empty(0, WINDOWS), *windows]), most)


def _long_part(cursor: psycopg.Cursor[Any], asked: _Asked, most: int, count: int) -> list[_Block]:
    """What is merged for good, in windows as long as the chart allows: from the longest down until there are enough.

    `count`: there are not more points than that.
    """
    top = cursor.execute(
        "SELECT max(level) FROM metric_levels WHERE run_number = %s AND key_id = %s AND rank = %s AND attempt = %s",
        (asked.run, asked.key, asked.rank, asked.attempt),
    ).fetchone()
    if top is None or top[0] is None:
        return []
    level = max(1, _level_for(count, most, top[0]))
    while True:
        blocks = list(_cover(cursor, asked, level))
        points = sum(int(block.windows["counts"].sum(dtype=np.int64)) for block in blocks)
        wanted = _level_for(points, most, level)
        if wanted == level:
            return blocks
        if wanted == 0 and level == 1:
            return _points(cursor.connection, asked)
        level = max(wanted, 1)


def _level_for(points: int, most: int, highest: int) -> int:
    """The highest level that has a quarter of the windows that are allowed; the one below has eight times as many."""
    level = highest
    while level > 0 and points < most // 4 * WINDOW * FACTOR ** (level - 1):
        level -= 1
    return level


_COVER = f"""
SELECT producer_id, id, {_ARRAYS} FROM metric_levels
WHERE run_number = %(run)s AND key_id = %(key)s AND rank = %(rank)s AND attempt = %(attempt)s AND level = %(level)s
  AND producer_id = ANY(%(producers)s::bigint[]) AND id > %(after)s
  AND (%(start)s::bigint IS NULL OR max_step >= %(start)s) AND (%(stop)s::bigint IS NULL OR min_step <= %(stop)s)
"""

_ENDS = """
SELECT producer_id, max(id) FROM metric_levels
WHERE run_number = %(run)s AND key_id = %(key)s AND rank = %(rank)s AND attempt = %(attempt)s AND level = %(level)s
GROUP BY producer_id
"""


def _cover(cursor: psycopg.Cursor[Any], asked: _Asked, level: int) -> Iterator[_Block]:
    """Windows of this level, and for what these do not reach yet, those of the levels below."""
    question = {
        "run": asked.run, "key": asked.key, "rank": asked.rank, "attempt": asked.attempt, "start": asked.start,
        "stop": asked.stop,
    }  # fmt: skip
    reached: dict[int, int] = {}
    for each in range(level, 0, -1):
        ends = dict(cursor.execute(_ENDS, {**question, "level": each}).fetchall())
        for after in {reached.get(producer, 0) for producer in ends}:
            producers = [producer for producer in ends if reached.get(producer, 0) == after]
            rows = cursor.execute(_COVER, {**question, "level": each, "producers": producers, "after": after})
            for producer, number, *arrays in rows.fetchall():
                yield _Block(
                    producer=producer, id=number, windows=_within(_windows(arrays), asked.start, asked.stop)
                )  # fmt: skip
        reached |= ends


def _points(connection: psycopg.Connection[Any], asked: _Asked) -> list[_Block]:
    """The points of rows that are merged for good, one by one."""
    return [
        _Block(producer=row[7], id=row[8], windows=_of_rows([row], asked, 1))
        for rows in _rows(connection, asked, [2])
        for row in rows
    ]


def _rows(connection: psycopg.Connection[Any], asked: _Asked, among: Sequence[int]) -> Iterator[list[Any]]:
    return reading.rows_of_key(
        connection, asked.run, asked.key, asked.rank, asked.attempt, among, asked.start, asked.stop
    )


def _of_rows(rows: Sequence[Any], asked: _Asked, width: int) -> np.ndarray:
    """Their points in windows of `width`."""
    _, steps, times_ms, values = reading.decoded(rows)
    chosen = np.ones(len(values), bool)
    if asked.start is not None:
        chosen &= steps >= asked.start
    if asked.stop is not None:
        chosen &= steps <= asked.stop
    if not chosen.all():
        steps, times_ms, values = steps[chosen], times_ms[chosen], values[chosen]
    return of_points(steps, times_ms, values, np.arange(0, len(values), width))


def _rest(connection: psycopg.Connection[Any], asked: _Asked, long: Sequence[_Block], most: int) -> list[_Block]:
    """What is not merged for good: point by point where that is little, else (nobody merges, or a reader is behind) in
    windows that are doubled whenever there are too many. What lies between two blocks of the long part stays there.
    """
    ends: dict[int, list[int]] = {}
    for block in sorted(long, key=lambda block: block.id):
        ends.setdefault(block.producer, []).append(block.id)
    found: dict[tuple[int, int], list[np.ndarray]] = {}  # producer, place among its long blocks -> windows
    width = 1

    def place(row: Sequence[Any]) -> tuple[int, int]:
        return row[7], bisect.bisect_left(ends.get(row[7], ()), row[8])

    for rows in _rows(connection, asked, [0, 1, 3]):
        for where, own in groupby(rows, key=place):
            windows = _of_rows(list(own), asked, width)
            if len(windows):
                found.setdefault(where, []).append(windows)
        while sum(len(piece) for pieces in found.values() for piece in pieces) > max(_FINER * most, len(found)):
            width *= 2
            for where, pieces in found.items():
                windows = np.concatenate(pieces)
                found[where] = [joined(windows, np.arange(0, len(windows), 2))]
    return [
        # before the long block at this place, behind the one before it
        _Block(producer=producer, id=(ends.get(producer, ())[nth:] or [sys.maxsize])[0] - 1, windows=windows)
        for (producer, nth), pieces in found.items()
        for windows in pieces
    ]


def _curve(attempt: int, rank: int, windows: np.ndarray, most: int) -> Curve:
    found = at_most(windows, most)
    finite = found["counts"] - found["nans"] - found["infinities"]
    mean = np.full(len(found), np.nan)
    np.divide(found["sum"], finite, out=mean, where=finite > 0)
    return Curve(
        attempt=attempt if len(found) else 0, rank=rank, steps=found["steps"].copy(),
        times=found["times_ms"] / 1000.0, counts=found["counts"].astype(np.int64),
        nans=found["nans"].astype(np.int64), first=found["first"].copy(), minimum=found["min"].copy(),
        maximum=found["max"].copy(), mean=mean, last=found["last"].copy(),
        is_exact=bool((found["counts"] == 1).all()),
    )  # fmt: skip
