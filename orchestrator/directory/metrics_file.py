"""metrics.csv: `key,attempt,rank,step,time,value`, one line per point, and back without losing a bit. Pure.

Floats are as Python prints them (the shortest text that gives the same float); `nan`, `-nan`, `inf` and `-inf` are
spelled so, a NaN with other bits as in C, `nan(0x7ff8000000000001)`. Times are seconds since 1970, to the millisecond.
"""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from orchestrator.store.errors import BadRecord
from orchestrator.store.views import ChunkRow, FeedPosition

COLUMNS = ("key", "attempt", "rank", "step", "time", "value")
NAN, NEGATIVE_NAN = 0x7FF8 << 48, 0xFFF8 << 48
"""Bits of the usual ones; the second is what 0/0 is on most processors."""
BLOCK = 4096
"""Most points that are read into one piece."""


def lines(blocks: Iterable[ChunkRow]) -> Iterator[bytes]:
    """The file's content, piece by piece."""
    yield (",".join(COLUMNS) + "\n").encode()
    for block in blocks:
        place = f"{_quoted(block.key)},{block.attempt},{block.rank},"
        rows = zip(block.steps.tolist(), block.times.tolist(), _spelled(block.values), strict=True)
        yield "".join([f"{place}{step},{time!r},{value}\n" for step, time, value in rows]).encode()


def _quoted(key: str) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow([key])  # quotes what is in the end of a line, too
    return text.getvalue().removesuffix("\r\n")


def _spelled(values: np.ndarray) -> list[str]:
    spelled = list(map(repr, values.tolist()))
    for place in np.flatnonzero(np.isnan(values)).tolist():
        spelled[place] = _spelled_nan(int(values[place : place + 1].view(np.uint64)[0]))
    return spelled


def _spelled_nan(bits: int) -> str:
    return {NAN: "nan", NEGATIVE_NAN: "-nan"}.get(bits) or f"nan({bits:#018x})"


def _value(spelled: str) -> float:
    if not spelled.startswith("nan("):
        return float(spelled)
    (value,) = struct.unpack("<d", struct.pack("<Q", int(spelled[4:-1], 16)))
    return value


def read(stream: BinaryIO) -> Iterator[ChunkRow]:
    """The points in the order of the file, neighbours of one key, attempt and rank together. Raises BadRecord."""
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    rows = csv.reader(text)
    try:
        if tuple(next(rows, ())) != COLUMNS:
            raise BadRecord("metrics.csv", f"its first line is not {','.join(COLUMNS)}.")
        place: tuple[str, str, str] = ("", "", "")
        steps: list[int] = []
        times: list[float] = []
        values: list[float] = []
        for key, attempt, rank, step, time, value in rows:
            if (key, attempt, rank) != place or len(steps) == BLOCK:
                if steps:
                    yield _block(place, steps, times, values)
                place, steps, times, values = (key, attempt, rank), [], [], []
            steps.append(int(step))
            times.append(float(time))
            values.append(_value(value))
        if steps:
            yield _block(place, steps, times, values)
    except (ValueError, OverflowError, struct.error, csv.Error) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("metrics.csv", f"line {rows.line_num}: {error}.") from error
    finally:
        text.detach()


def _block(place: tuple[str, str, str], steps: list[int], times: list[float], values: list[float]) -> ChunkRow:
    key, attempt, rank = place
    return ChunkRow(
        key=key, attempt=int(attempt), rank=int(rank), steps=np.array(steps, np.int64),
        times=np.array(times, np.float64), values=np.array(values, np.float64), position=FeedPosition(),
    )  # fmt: skip
