"""Points of a batch -> rows of metric_chunks and metric_summaries. Pure; no Python object per point, one loop per key.

A chunk holds consecutive points of one key: the first step and time, and differences from there that fit into four
bytes. Where a difference does not fit, the next chunk begins. Values are kept bit for bit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.records import Batch
from orchestrator.store.binary import ARRAY_HEADER, FLOAT8, INT4, array_header, elements

LATEST_TIME_MS = 253_402_300_799_999
"""The end of the year 9999. Times of a broken clock are moved to the nearer end of 1970 … 9999, NaN to 1970."""

_SAFE_STEP = 2.0**31 - 4096
"""Step differences are judged as float64, whose error is at most 1024 at the ends of int64."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The part of a metric_chunks row that comes from the points. The arrays are in the form of `binary.elements`."""

    key: int
    """Index into the batch's keys."""
    first_step: int
    last_step: int
    first_time_ms: int
    n: int
    steps: bytes = field(repr=False)
    times: bytes = field(repr=False)
    values: bytes = field(repr=False)

    @property
    def crc(self) -> int:
        """As a signed number, because PostgreSQL has no other."""
        crc = zlib.crc32(self.values, zlib.crc32(self.times, zlib.crc32(self.steps)))
        return crc - (1 << 32) if crc >= 1 << 31 else crc


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """What a batch adds to the two metric tables."""

    chunks: Sequence[Chunk]
    summaries: np.ndarray
    """dtype SUMMARY, one per key; `key` is an index into the batch's keys, `run` is 0."""


def columns(batch: Batch) -> Columns:
    """The batch's points by key, in their order."""
    points = batch.points()
    order = np.argsort(points["key"], kind="stable")
    keys = points["key"][order]
    steps = points["step"][order]
    times = milliseconds(points["time"][order])
    values = points["value"][order]

    step_jumps = np.abs(np.diff(steps.astype(np.float64))) > _SAFE_STEP
    time_jumps = np.abs(np.diff(times)) > np.iinfo(np.int32).max
    new_key = np.diff(keys) != 0
    starts = _starts(new_key | step_jumps | time_jumps)
    ends = [*starts[1:].tolist(), len(points)]

    packed_steps, stride4 = elements(_differences(steps, starts), INT4), 8
    packed_times = elements(_differences(times, starts), INT4)
    packed_values, stride8 = elements(values, FLOAT8), 12
    chunks = [
        Chunk(
            key=key, first_step=first_step, last_step=last_step, first_time_ms=first_time, n=end - start,
            steps=packed_steps[start * stride4 : end * stride4],
            times=packed_times[start * stride4 : end * stride4],
            values=packed_values[start * stride8 : end * stride8],
        )
        for start, end, key, first_step, last_step, first_time in zip(
            starts.tolist(), ends, keys[starts].tolist(), steps[starts].tolist(),
            steps[np.asarray(ends) - 1].tolist(), times[starts].tolist(), strict=True,
        )
    ]  # fmt: skip
    return Columns(chunks=chunks, summaries=_summaries(batch, keys, steps, times, values, _starts(new_key)))


def milliseconds(seconds: np.ndarray) -> np.ndarray:
    """int64 milliseconds since 1970, whatever the clock said."""
    with np.errstate(over="ignore"):
        wide = np.nan_to_num(seconds * 1000.0, nan=0.0, posinf=LATEST_TIME_MS, neginf=0.0)
    return np.rint(np.clip(wide, 0.0, LATEST_TIME_MS)).astype(np.int64)


def _starts(is_new: np.ndarray) -> np.ndarray:
    """Where groups begin; `is_new[i]` tells whether one begins at i + 1."""
    return np.concatenate([[0], np.flatnonzero(is_new) + 1])


def _differences(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    different = np.empty_like(numbers)
    different[1:] = numbers[1:] - numbers[:-1]  # wraps around only where a chunk starts
    different[starts] = 0
    return different


def _summaries(
    batch: Batch, keys: np.ndarray, steps: np.ndarray, times: np.ndarray, values: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    last = np.append(starts[1:], len(keys)) - 1
    is_nan, is_inf = np.isnan(values), np.isinf(values)
    found = np.zeros(len(starts), dtype=SUMMARY)
    found["key"], found["rank"] = keys[starts], batch.rank
    found["first_attempt"] = found["last_attempt"] = batch.attempt
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
    starts = _starts(is_new)
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


COPY_COLUMNS = (
    "run_number, producer_id, first_step, last_step, first_time_ms, key_id, attempt, rank, n, crc, steps, times, values"
)
_NUMBERS = struct.Struct(">h" + "iq" * 5 + "ii" * 5 + "i")
"""Number of columns; five of 8 bytes, five of 4 bytes, each after its length; the length of `steps`."""
_LENGTH = struct.Struct(">i")


def copy_row(chunk: Chunk, *, run_number: int, producer_id: int, key_id: int, attempt: int, rank: int) -> bytes:
    """The chunk as a row of binary COPY with `COPY_COLUMNS`."""
    ints, floats = array_header(INT4, chunk.n), array_header(FLOAT8, chunk.n)
    ints_length = ARRAY_HEADER.size + len(chunk.steps)
    numbers = _NUMBERS.pack(
        13,
        8, run_number, 8, producer_id, 8, chunk.first_step, 8, chunk.last_step, 8, chunk.first_time_ms,
        4, key_id, 4, attempt, 4, rank, 4, chunk.n, 4, chunk.crc,
        ints_length,
    )  # fmt: skip
    return b"".join(
        (
            numbers, ints, chunk.steps,
            _LENGTH.pack(ints_length), ints, chunk.times,
            _LENGTH.pack(ARRAY_HEADER.size + len(chunk.values)), floats, chunk.values,
        )
    )  # fmt: skip
