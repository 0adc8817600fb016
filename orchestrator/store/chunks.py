"""Points <-> rows of metric_chunks, and points -> summaries. Pure; no Python object per point or per key, one loop per
row.

A row holds points of several keys, key after key: the first step and time, and differences from there that fit into
four bytes. Where a difference does not fit, the next row begins. Values are kept bit for bit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.records import LOST, POINT, Batch
from orchestrator.store.binary import ARRAY_HEADER, FLOAT8, INT4, array_header, elements

LATEST_TIME_MS = 253_402_300_799_999
"""The end of the year 9999. Times of a broken clock are moved to the nearer end of 1970 … 9999, NaN to 1970."""

_SAFE_STEP = 2.0**31 - 4096
"""Step differences are judged as float64, whose error is at most 1024 at the ends of int64."""
_SAFE_TIME = np.iinfo(np.int32).max

SUMMARY = np.dtype(
    [
        ("run", "i8"), ("key", "i8"), ("rank", "i4"), ("first_attempt", "i4"), ("last_attempt", "i4"),
        ("count", "i8"), ("nan_count", "i8"), ("inf_count", "i8"), ("sum", "f8"),
        ("first_value", "f8"), ("first_step", "i8"), ("first_time_ms", "i8"),
        ("last_value", "f8"), ("last_step", "i8"), ("last_time_ms", "i8"),
        ("min_value", "f8"), ("min_step", "i8"), ("max_value", "f8"), ("max_step", "i8"),
    ]
)  # fmt: skip
"""Columns of metric_summaries. NaN as min_value or max_value: there is none, all values are NaN."""

OWNER = np.dtype(
    [
        ("run_number", "i8"), ("xid", "i8"), ("id", "i8"), ("producer_id", "i8"), ("first_seq", "i8"),
        ("last_seq", "i8"), ("attempt", "i4"), ("rank", "i4"), ("level", "i4"),
    ]
)  # fmt: skip
"""Whose points a row has. `xid` and `id` 0: the database gives them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """Points in pieces, each piece of one key and owner, in their order; the pieces of one owner side by side."""

    keys: np.ndarray
    """int64, one per piece"""
    owners: np.ndarray
    """int64, one per piece: an index into whatever owns them"""
    starts: np.ndarray
    """int64, one per piece: where its points begin"""
    steps: np.ndarray
    """int64, one per point, as the following"""
    times: np.ndarray
    """int64, milliseconds since 1970"""
    values: np.ndarray
    """float64"""

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.starts, append=len(self.values))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """A row of metric_chunks without its owner. The arrays are in the form of `binary.elements`."""

    owner: int
    first_step: int
    min_step: int
    max_step: int
    first_time_ms: int
    n: int
    key_id: int
    """0 where there are several"""
    is_wide: bool
    key_ids: bytes = field(repr=False)
    counts: bytes = field(repr=False)
    steps: bytes = field(repr=False)
    times: bytes = field(repr=False)
    values: bytes = field(repr=False)

    @property
    def crc(self) -> int:
        return checksum(self.key_ids, self.counts, self.steps, self.times, self.values)


def checksum(key_ids: bytes, counts: bytes, steps: bytes, times: bytes, values: bytes) -> int:
    """Of the arrays in the form of `binary.elements`; signed, because PostgreSQL has no other numbers. Rows without
    sequence numbers may have one of the last three only: they are older than the first two.
    """
    crc = zlib.crc32(values, zlib.crc32(times, zlib.crc32(steps)))
    crc = zlib.crc32(counts, zlib.crc32(key_ids, crc))
    return crc - (1 << 32) if crc >= 1 << 31 else crc


def is_intact(
    crc: int, first_seq: int, key_ids: np.ndarray, counts: np.ndarray, steps: np.ndarray, times: np.ndarray,
    values: np.ndarray,
) -> bool:  # fmt: skip
    """Whether the arrays of a stored row are those that its checksum was made of."""
    packed = packed_arrays(key_ids, counts, steps, times, values)
    return crc == checksum(*packed) or (first_seq == 0 and crc == checksum(b"", b"", *packed[2:]))


def packed_arrays(
    key_ids: np.ndarray, counts: np.ndarray, steps: np.ndarray, times: np.ndarray, values: np.ndarray
) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """What `checksum` takes, of the arrays of a stored row."""
    ints = (key_ids, counts, steps, times)
    first, second, third, fourth = (elements(array, INT4) for array in ints)
    return first, second, third, fourth, elements(values, FLOAT8)


# -- batches -> pieces -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss:
    """Points of one batch that could not be read any more when they were sent."""

    batch: int
    first_seq: int
    last_seq: int
    count: int


def series_of(batches: Sequence[Batch], key_tables: Sequence[np.ndarray]) -> tuple[Series, list[Loss]]:
    """The batches' points by batch and key; owners are indexes of batches. `key_tables[i]` has the id of each key index
    of batch i; an index beyond it must not occur.
    """
    points = np.frombuffer(b"".join([batch.payload for batch in batches]), POINT)
    sizes = np.array([batch.count for batch in batches], np.int64)
    owners = np.repeat(np.arange(len(batches)), sizes)
    lost: list[Loss] = []
    is_lost = (points["flags"] & LOST) != 0
    if is_lost.any():
        lost = _losses(batches, owners, sizes, is_lost)
        points, owners = points[~is_lost], owners[~is_lost]
    tables = np.cumsum([0, *map(len, key_tables)])
    every = np.concatenate(key_tables) if key_tables else np.empty(0, np.int64)
    place = points["key"] + tables[owners]
    keys = every[place]
    order = np.argsort((owners << 32) | keys, kind="stable")
    owners, keys = owners[order], keys[order]
    starts = _starts(len(keys), (np.diff(keys) != 0) | (np.diff(owners) != 0))
    return Series(
        keys=keys[starts], owners=owners[starts], starts=starts, steps=points["step"][order],
        times=milliseconds(points["time"][order]), values=points["value"][order],
    ), lost  # fmt: skip


def _losses(batches: Sequence[Batch], owners: np.ndarray, sizes: np.ndarray, is_lost: np.ndarray) -> list[Loss]:
    places = np.flatnonzero(is_lost)
    begins = np.cumsum(sizes) - sizes
    found = []
    for number in np.unique(owners[places]).tolist():
        own = places[owners[places] == number] - begins[number] + batches[number].first
        found.append(Loss(batch=number, first_seq=int(own[0]), last_seq=int(own[-1]), count=len(own)))
    return found


def milliseconds(seconds: np.ndarray) -> np.ndarray:
    """int64 milliseconds since 1970, whatever the clock said."""
    with np.errstate(over="ignore"):
        wide = np.nan_to_num(seconds * 1000.0, nan=0.0, posinf=LATEST_TIME_MS, neginf=0.0)
    return np.rint(np.clip(wide, 0.0, LATEST_TIME_MS)).astype(np.int64)


def _starts(length: int, is_new: np.ndarray) -> np.ndarray:
    """Where groups begin; `is_new[i]` tells whether one begins at i + 1."""
    if not length:
        return np.empty(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(is_new) + 1])


# -- pieces -> rows ----------------------------------------------------------------------------------------------------


def jumps(series: Series) -> np.ndarray:
    """bool, one per point: whether it is too far from the one before it to stand in one row with it."""
    far = np.zeros(len(series.values), bool)
    if len(far):
        with np.errstate(over="ignore"):
            far[1:] = np.abs(np.diff(series.steps.astype(np.float64))) > _SAFE_STEP
        far[1:] |= np.abs(np.diff(series.times)) > _SAFE_TIME
        far[series.starts] = False
    return far


def rows(series: Series) -> Iterator[Row]:
    """One row per owner; more where differences do not fit."""
    if not len(series.values):
        return
    far = jumps(series)
    if far.any():
        series = _cut(series, far)
    firsts = _starts(len(series.owners), np.diff(series.owners) != 0)
    # Where the first points of two pieces are too far from each other, each piece gets a row of its own.
    in_row = np.repeat(firsts, np.diff(firsts, append=len(series.owners)))
    heads, bases = series.starts, series.starts[in_row]
    away = np.abs(series.steps[heads].astype(np.float64) - series.steps[bases].astype(np.float64)) > _SAFE_STEP
    away |= np.abs(series.times[heads] - series.times[bases]) > _SAFE_TIME
    # So does each piece of a key that was cut: a key stands in a row once.
    if far.any():
        twice = np.zeros(len(away), bool)
        twice[1:] = (np.diff(series.keys) == 0) & (np.diff(series.owners) == 0)
        away |= twice
    if away.any():
        alone = np.isin(in_row, in_row[away])
        firsts = np.union1d(firsts, np.flatnonzero(alone))
    yield from _packed(series, firsts)


def _cut(series: Series, far: np.ndarray) -> Series:
    starts = np.union1d(series.starts, np.flatnonzero(far))
    piece = np.searchsorted(series.starts, starts, side="right") - 1
    return Series(
        keys=series.keys[piece], owners=series.owners[piece], starts=starts, steps=series.steps, times=series.times,
        values=series.values,
    )  # fmt: skip


def _packed(series: Series, firsts: np.ndarray) -> Iterator[Row]:
    """Rows whose first pieces are `firsts`."""
    counts, starts = series.counts, series.starts
    pieces = np.diff(firsts, append=len(starts))
    heads = starts[firsts]
    lengths = np.diff(heads, append=len(series.values))
    steps, times = (_differences(array, starts, np.repeat(heads, pieces)) for array in (series.steps, series.times))
    is_wide = _are_wide(series, firsts, pieces, counts, steps, times)
    low, high = np.minimum.reduceat(series.steps, heads), np.maximum.reduceat(series.steps, heads)
    packed_steps, packed_times = elements(steps, INT4), elements(times, INT4)
    packed_values = elements(series.values, FLOAT8)
    packed_keys, packed_counts = elements(series.keys, INT4), elements(counts, INT4)
    key_ids = np.where(pieces == 1, series.keys[firsts], 0)
    axes = np.where(is_wide, counts[firsts], lengths)
    for owner, first, number, head, n, axis, key_id, wide, first_step, first_time, lowest, highest in zip(
        series.owners[firsts].tolist(), firsts.tolist(), pieces.tolist(), heads.tolist(), lengths.tolist(),
        axes.tolist(), key_ids.tolist(), is_wide.tolist(), series.steps[heads].tolist(), series.times[heads].tolist(),
        low.tolist(), high.tolist(), strict=True,
    ):  # fmt: skip
        yield Row(
            owner=owner, first_step=first_step, min_step=lowest, max_step=highest, first_time_ms=first_time, n=n,
            key_id=key_id, is_wide=wide, key_ids=packed_keys[first * 8 : (first + number) * 8],
            counts=packed_counts[first * 8 : (first + number) * 8], steps=packed_steps[head * 8 : (head + axis) * 8],
            times=packed_times[head * 8 : (head + axis) * 8], values=packed_values[head * 12 : (head + n) * 12],
        )  # fmt: skip


def _differences(numbers: np.ndarray, starts: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """To the number before; of each piece's first one to that at its base."""
    different = np.empty_like(numbers)
    different[1:] = numbers[1:] - numbers[:-1]  # wraps around only where a piece starts
    different[starts] = numbers[starts] - numbers[bases]
    return different


def _are_wide(
    series: Series, firsts: np.ndarray, pieces: np.ndarray, counts: np.ndarray, steps: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """bool, one per row: whether it has several pieces and all have the steps and times of the first."""
    of_piece = np.repeat(firsts, pieces)  # the first piece of each piece's row
    is_even = np.logical_and.reduceat(counts == counts[of_piece], firsts) & (pieces > 1)
    candidates = np.repeat(is_even, pieces)
    if not candidates.any():
        return is_even
    length = np.where(candidates, counts, 0)
    shift = series.starts - series.starts[of_piece]
    first = np.flatnonzero(np.repeat(candidates, counts))
    partner = first - np.repeat(shift, length)
    same = (steps[first] == steps[partner]) & (times[first] == times[partner])
    sizes = np.add.reduceat(length, firsts)[is_even]
    is_even[is_even] = np.logical_and.reduceat(same, np.cumsum(sizes) - sizes)
    return is_even


# -- rows -> COPY ------------------------------------------------------------------------------------------------------

COPY_COLUMNS = (
    "run_number, producer_id, first_seq, last_seq, first_step, min_step, max_step, first_time_ms, key_id, attempt,"
    " rank, n, crc, level, is_wide, key_ids, counts, steps, times, values"
)
MERGED_COLUMNS = "run_number, xid, id, " + COPY_COLUMNS.removeprefix("run_number, ")

_NUMBERS = struct.Struct(">" + "iq" * 7 + "ii" * 5 + "ih" + "i?")
_COUNT = struct.Struct(">h")
_PLACE = struct.Struct(">iqiqiq")
_RUN = struct.Struct(">iq")
_LENGTH = struct.Struct(">i")


def copy_row(row: Row, owner: Any) -> bytes:
    """As a row of binary COPY with `COPY_COLUMNS`, or with `MERGED_COLUMNS` where the owner (of OWNER) has an id."""
    run, xid, number, producer, first_seq, last_seq, attempt, rank, level = owner.item()
    numbers = _NUMBERS.pack(
        8, producer, 8, first_seq, 8, last_seq, 8, row.first_step, 8, row.min_step, 8, row.max_step,
        8, row.first_time_ms,
        4, row.key_id, 4, attempt, 4, rank, 4, row.n, 4, row.crc, 2, level, 1, row.is_wide,
    )  # fmt: skip
    place = (
        (_COUNT.pack(22), _PLACE.pack(8, run, 8, xid, 8, number)) if number else (_COUNT.pack(20), _RUN.pack(8, run))
    )
    parts = [*place, numbers]
    for array, oid, size in (
        (row.key_ids, INT4, 8), (row.counts, INT4, 8), (row.steps, INT4, 8), (row.times, INT4, 8),
        (row.values, FLOAT8, 12),
    ):  # fmt: skip
        parts += (_LENGTH.pack(ARRAY_HEADER.size + len(array)), array_header(oid, len(array) // size), array)
    return b"".join(parts)


# -- rows -> pieces ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """What of a stored row its points are made of; the arrays are int32 and float64."""

    first_step: int
    first_time_ms: int
    is_wide: bool
    key_ids: np.ndarray
    counts: np.ndarray
    steps: np.ndarray
    times: np.ndarray
    values: np.ndarray


def unpacked(stored: Sequence[Stored]) -> Series:
    """The points of stored rows; owners are indexes of rows. Raises ValueError where the arrays of a row do not belong
    together, which only damage can bring about.
    """
    if not stored:
        none = np.empty(0, np.int64)
        return Series(keys=none, owners=none, starts=none, steps=none, times=none, values=np.empty(0))
    pieces = np.array([len(row.key_ids) for row in stored])
    counts = np.concatenate([row.counts for row in stored]).astype(np.int64)
    keys = np.concatenate([row.key_ids for row in stored]).astype(np.int64)
    values = np.concatenate([row.values for row in stored])
    owners = np.repeat(np.arange(len(stored)), pieces)
    starts = np.cumsum(counts) - counts
    is_wide = np.array([row.is_wide for row in stored])
    axes = np.array([len(row.steps) for row in stored])
    firsts = np.cumsum(pieces) - pieces
    lengths = np.array([len(row.values) for row in stored])
    fits = len(keys) == len(counts) and np.array_equal(axes, [len(row.times) for row in stored])
    if not fits or not np.array_equal(np.add.reduceat(counts, firsts), lengths) or (counts < 1).any() \
            or not np.array_equal(axes, np.where(is_wide, counts[firsts], lengths)):  # fmt: skip
        raise ValueError("the arrays of a row have different lengths")
    shift = (np.cumsum(axes) - axes)[owners] + np.where(is_wide[owners], 0, starts - starts[firsts][owners])
    axis = np.arange(len(values)) + np.repeat(shift - starts, counts)

    def absolute(name: str, base: str) -> np.ndarray:
        total = np.cumsum(np.concatenate([getattr(row, name) for row in stored])[axis], dtype=np.int64)
        before = np.where(starts > 0, total[starts - 1], 0)
        origin = np.array([getattr(row, base) for row in stored], np.int64)[owners]
        return total + np.repeat(origin - before, counts)

    return Series(
        keys=keys, owners=owners, starts=starts, steps=absolute("steps", "first_step"),
        times=absolute("times", "first_time_ms"), values=values,
    )  # fmt: skip


# -- summaries ---------------------------------------------------------------------------------------------------------


def summaries(series: Series, runs: np.ndarray, attempts: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """dtype SUMMARY, one per piece; run, attempt and rank are given per owner."""
    starts, steps, times, values = series.starts, series.steps, series.times, series.values
    last = np.append(starts[1:], len(values)) - 1
    found = np.zeros(len(starts), dtype=SUMMARY)
    if not len(found):
        return found
    is_nan, is_inf = np.isnan(values), np.isinf(values)
    found["run"], found["key"], found["rank"] = runs[series.owners], series.keys, ranks[series.owners]
    found["first_attempt"] = found["last_attempt"] = attempts[series.owners]
    found["count"] = last - starts + 1
    found["nan_count"] = np.add.reduceat(is_nan, starts, dtype=np.int64)
    found["inf_count"] = np.add.reduceat(is_inf, starts, dtype=np.int64)
    with np.errstate(over="ignore"):
        found["sum"] = np.add.reduceat(np.where(is_nan | is_inf, 0.0, values), starts)
    for name, at in (("first", starts), ("last", last)):
        found[f"{name}_value"], found[f"{name}_step"], found[f"{name}_time_ms"] = values[at], steps[at], times[at]
    for name, extreme in (("min", np.minimum), ("max", np.maximum)):
        found[f"{name}_value"], found[f"{name}_step"] = _first_extreme(extreme, values, steps, starts)
    return found


def merged(summaries: np.ndarray) -> np.ndarray:
    """One summary per (run, key, rank), sorted by these; earlier rows of an attempt were written earlier."""
    rows = summaries[np.lexsort((summaries["last_attempt"], summaries["rank"], summaries["key"], summaries["run"]))]
    is_new = np.zeros(max(len(rows) - 1, 0), dtype=bool)
    for name in ("run", "key", "rank"):
        is_new |= np.diff(rows[name]) != 0
    starts = _starts(len(rows), is_new)
    if len(starts) == len(rows):
        return rows
    last = np.append(starts[1:], len(rows)) - 1
    found = rows[starts].copy()
    for name in ("last_attempt", "last_value", "last_step", "last_time_ms"):
        found[name] = rows[name][last]
    with np.errstate(over="ignore", invalid="ignore"):
        for name in ("count", "nan_count", "inf_count", "sum"):
            found[name] = np.add.reduceat(rows[name], starts)
    for name, extreme in (("min", np.minimum), ("max", np.maximum)):
        found[f"{name}_value"], found[f"{name}_step"] = _first_extreme(
            extreme, rows[f"{name}_value"], rows[f"{name}_step"], starts
        )
    return found


def _first_extreme(
    extreme: np.ufunc, values: np.ndarray, steps: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The extreme of each group, ignoring NaN, and the step where it occurred first; NaN and 0 where all are NaN."""
    worst = np.inf if extreme is np.minimum else -np.inf
    found = extreme.reduceat(np.where(np.isnan(values), worst, values), starts)
    lengths = np.diff(np.append(starts, len(values)))
    places = np.where(values == np.repeat(found, lengths), np.arange(len(values)), len(values))
    at = np.minimum.reduceat(places, starts)
    is_none = at == len(values)
    at[is_none] = 0
    return np.where(is_none, np.nan, values[at]), np.where(is_none, 0, steps[at])
