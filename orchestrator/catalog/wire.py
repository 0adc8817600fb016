"""How answers travel over HTTP: rows and errors as JSON, points as arrays. Both ends use this module; nothing is lost.

JSON has no NaN and no infinity: they are the strings nan, inf and -inf, as everywhere in `orc`'s JSON. Points travel
in blocks: a block is their number n (8 bytes) and n × 32 bytes, one array after the other in the order of `ARRAYS`,
little-endian; a block of none is the end, so a shortened answer is noticed.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator import errors
from orchestrator.status import RunStatus
from orchestrator.store import views

if TYPE_CHECKING:
    from orchestrator.store.views import Points

VERSION = 1
"""Of the routes and their parameters: the 1 of /api/v1."""

RUNS_AT_ONCE = 5000
EVENTS_AT_ONCE = 1000
"""The most rows of a page."""
IDS_AT_ONCE = 500
"""Ids in one URL, which may have 64 KiB."""

ROWS = (
    views.ExperimentRow,
    views.RunRow,
    views.RunDetail,
    views.AttemptRow,
    views.ParamRow,
    views.NoteRow,
    views.SummaryRow,
    views.EventRow,
    views.CheckpointRow,
    views.ArtifactRow,
)


def protocol() -> str:
    """What two ends must have in common. It changes by itself when a row gets another column."""
    columns = ";".join(f"{row.__name__}:" + ",".join(f"{f.name} {f.type}" for f in fields(row)) for row in ROWS)
    return f"{VERSION}.{zlib.crc32(columns.encode()):08x}"


# -- rows --------------------------------------------------------------------------------------------------------------

Row = TypeVar("Row")


def _columns(row: Any) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Names of all columns, names of those that hold floats, and whether there is a status."""
    columns = fields(row)
    # Annotations are texts, because every module annotates lazily.
    floats = tuple(f.name for f in columns if f.type in ("float", "float | None"))
    return tuple(f.name for f in columns), floats, any(f.type == "RunStatus" for f in columns)


_COLUMNS: Mapping[Any, tuple[tuple[str, ...], tuple[str, ...], bool]] = {row: _columns(row) for row in ROWS}


def to_json(row: Any) -> dict[str, Any]:
    """A row of `ROWS` as a JSON object."""
    names, floats, _ = _COLUMNS[type(row)]
    raw = {name: getattr(row, name) for name in names}
    for name in (*floats, "value") if "value" in raw else floats:
        number = raw[name]
        if isinstance(number, float) and not math.isfinite(number):
            raw[name] = str(number)
    return raw


def from_json(row: type[Row], raw: Mapping[str, Any]) -> Row:
    """The very row that `to_json` was given."""
    names, floats, has_status = _COLUMNS[row]
    given: dict[str, Any] = {name: raw[name] for name in names}
    for name in floats:
        if isinstance(given[name], str):
            given[name] = float(given[name])
    if has_status:
        given["status"] = RunStatus(given["status"])
    if row is views.ParamRow and given["type"] == "float":
        given["value"] = float(given["value"])
    return row(**given)


# -- errors ------------------------------------------------------------------------------------------------------------

TOLD: Mapping[str, tuple[Callable[..., errors.UserError], int]] = {
    "NotFound": (errors.NotFound, 404),
    "AmbiguousName": (errors.AmbiguousName, 409),
    "ServiceUnavailable": (errors.ServiceUnavailable, 503),
    "SchemaMismatch": (errors.SchemaMismatch, 503),
}
"""Errors that arrive as what they are, with their HTTP status. Others arrive as their text."""


def error_to_json(error: errors.UserError) -> tuple[dict[str, Any], int]:
    """The document and the HTTP status."""
    name = type(error).__name__
    told = {"type": name, "message": str(error), "arguments": list(error.args) if name in TOLD else []}
    return {"error": told}, TOLD[name][1] if name in TOLD else 400


def error_from_json(document: Any) -> errors.UserError | None:
    """None if the document is no error of ours."""
    told = document.get("error") if isinstance(document, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("message"), str):
        return None
    kind, _ = TOLD.get(str(told.get("type")), (errors.UserError, 400))
    if kind is errors.UserError:
        return errors.UserError(told["message"])
    arguments = [tuple(value) if isinstance(value, list) else value for value in told.get("arguments", ())]
    try:
        return kind(*arguments)
    except TypeError:
        return errors.UserError(told["message"])


# -- points ------------------------------------------------------------------------------------------------------------

ARRAYS = (("steps", "<i8"), ("times", "<f8"), ("values", "<f8"), ("ranks", "<i4"), ("attempts", "<i4"))
COUNT = struct.Struct("<Q")
MOST_POINTS = 1 << 26
"""In one block. What claims more is no block."""


def blocks(pieces: Generator[Points]) -> Generator[bytes]:
    """The bytes of an answer. Closes `pieces` when it is closed."""
    with closing(pieces):
        for points in pieces:
            if len(points):
                yield COUNT.pack(len(points))
                yield from (getattr(points, name).astype(kind, copy=False).tobytes() for name, kind in ARRAYS)
    yield COUNT.pack(0)


def points_from(read: Callable[[int], bytes]) -> Points:
    """All points of an answer; `read(n)` gives its next n bytes, fewer only at its end. Raises EOFError, ValueError."""
    import numpy as np

    columns: dict[str, list[np.ndarray]] = {name: [] for name, _ in ARRAYS}
    while count := COUNT.unpack(_exactly(read, COUNT.size))[0]:
        if count > MOST_POINTS:
            raise ValueError(f"a block of {count} points")
        for name, kind in ARRAYS:
            data = _exactly(read, count * np.dtype(kind).itemsize)
            columns[name].append(np.frombuffer(data, dtype=kind))
    empty = {name: np.empty(0, kind) for name, kind in ARRAYS}
    joined = {name: np.concatenate(parts) if parts else empty[name] for name, parts in columns.items()}
    return views.Points(**joined)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = read(size)
    if len(data) != size:
        raise EOFError(f"{size} bytes were to come, {len(data)} came")
    return data
