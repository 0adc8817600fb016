"""How answers travel over HTTP: rows and errors as JSON, points as Arrow. Both ends use this module; nothing is lost.

JSON has no NaN and no infinity: they are the strings nan, inf and -inf, as everywhere in `orc`'s JSON. Points travel
as an Arrow IPC stream with the columns `ARRAYS`, which other tools read, too; a batch without rows is its end, so a
shortened answer is noticed.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator import alert_records, errors, live_records, sweep_records
from orchestrator.status import RunStatus
from orchestrator.store import views

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from orchestrator.store.views import Curve, Points

    Columns = tuple[tuple[str, str], ...]

VERSION = 1
"""Of the routes and their parameters: the 1 of /api/v1."""

RUNS_AT_ONCE = 5000
EVENTS_AT_ONCE = 1000
SWEEP_ROWS_AT_ONCE = 2000
"""The most rows of a page."""
WINDOWS_AT_ONCE = 100_000
"""Of a curve."""
IDS_AT_ONCE = 500
"""Ids in one URL, which may have 64 KiB."""
KEYS_BYTES = 32 << 10
"""The same for keys of metrics, quoted."""

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
    views.SinkLag,
    views.SweepRow,
    views.SweepDetail,
    sweep_records.TrialRow,
    sweep_records.JobRow,
    sweep_records.DecisionRow,
    sweep_records.RequestRow,
    *alert_records.ROWS,
)


def protocol() -> str:
    """What two ends must have in common. It changes by itself when a row or an array gets another column."""
    rows = (*ROWS, *live_records.ROWS)
    columns = ";".join(f"{row.__name__}:" + ",".join(f"{f.name} {f.type}" for f in fields(row)) for row in rows)
    answers = f"{columns};{ARROW};{ARRAYS_OF};{CURVE_ARRAYS}"
    return f"{VERSION}.{zlib.crc32(answers.encode()):08x}"


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
"""Columns of a stream of points."""
ARRAYS_OF = (*ARRAYS, ("keys", "<i4"))
"""Columns of the points of several keys; the last is the place of the key among those that were asked for."""
CURVE_ARRAYS = (
    ("steps", "<i8"), ("times", "<f8"), ("counts", "<i8"), ("nans", "<i8"), ("first", "<f8"), ("minimum", "<f8"),
    ("maximum", "<f8"), ("mean", "<f8"), ("last", "<f8"),
)  # fmt: skip
"""Columns of a curve; its other fields are metadata of the schema."""
ARROW = "application/vnd.apache.arrow.stream"


def blocks(pieces: Generator[Points]) -> Generator[bytes]:
    """The bytes of an answer, one batch for each piece. Closes `pieces` when it is closed."""
    import pyarrow as pa

    written, schema = io.BytesIO(), _schema(ARRAYS)
    with closing(pieces), pa.ipc.new_stream(written, schema) as stream:
        for points in pieces:
            if len(points):
                stream.write_batch(_batch(points, ARRAYS))
                yield _taken(written)
        stream.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
    yield _taken(written)


def points_from(answer: Any) -> Generator[Points]:
    """The pieces of an answer, a binary file. Raises EOFError or ValueError where it is no whole one."""
    for batch in _batches(answer):
        if not batch.num_rows:
            return
        yield views.Points(**{name: _array(batch, name, kind) for name, kind in ARRAYS})
    raise EOFError("the end is missing")


def points_of_to_bytes(points: Sequence[Points]) -> bytes:
    """The answer for several keys, in their order."""
    import numpy as np
    import pyarrow as pa

    keys = np.repeat(np.arange(len(points), dtype=np.int32), [len(each) for each in points])
    columns = [np.concatenate([getattr(each, name) for each in points]).astype(kind) for name, kind in ARRAYS]
    written = io.BytesIO()
    with pa.ipc.new_stream(written, schema := _schema(ARRAYS_OF)) as stream:
        stream.write_batch(pa.RecordBatch.from_arrays([pa.array(column) for column in (*columns, keys)], schema=schema))
    return written.getvalue()


def points_of_from(answer: Any, count: int) -> list[Points]:
    """What `points_of_to_bytes` was given, for `count` keys. Raises EOFError or ValueError."""
    import numpy as np

    for batch in _batches(answer):
        ends = np.searchsorted(_array(batch, "keys", "<i4"), np.arange(count), side="right").tolist()
        columns = {name: _array(batch, name, kind) for name, kind in ARRAYS}
        return [
            views.Points(**{name: column[start:end] for name, column in columns.items()})
            for start, end in zip([0, *ends], ends, strict=False)
        ]
    raise EOFError("there are no points")


def curve_to_bytes(curve: Curve) -> bytes:
    import pyarrow as pa

    written = io.BytesIO()
    told = {"attempt": str(curve.attempt), "rank": str(curve.rank), "is_exact": str(int(curve.is_exact))}
    schema = _schema(CURVE_ARRAYS).with_metadata(told)
    with pa.ipc.new_stream(written, schema) as stream:
        stream.write_batch(_batch(curve, CURVE_ARRAYS).replace_schema_metadata(told))
    return written.getvalue()


def curve_from(answer: Any) -> Curve:
    """The very curve that `curve_to_bytes` was given. Raises EOFError or ValueError."""
    for batch in _batches(answer):
        told = {name.decode(): int(value) for name, value in batch.schema.metadata.items()}
        columns = {name: _array(batch, name, kind) for name, kind in CURVE_ARRAYS}
        return views.Curve(**columns, attempt=told["attempt"], rank=told["rank"], is_exact=bool(told["is_exact"]))
    raise EOFError("there is no curve")


def _schema(columns: Columns) -> pa.Schema:
    import pyarrow as pa

    types = {"<i4": pa.int32(), "<i8": pa.int64(), "<f8": pa.float64()}
    return pa.schema([pa.field(name, types[kind], nullable=False) for name, kind in columns])


def _batch(row: Points | Curve, columns: Columns) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = [pa.array(getattr(row, name).astype(kind, copy=False)) for name, kind in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=_schema(columns))


def _array(batch: pa.RecordBatch, name: str, kind: str) -> np.ndarray:
    """A column without copying it. Arrow's own `to_numpy` imports pandas, where there is one."""
    import numpy as np

    column = batch.column(name)
    if column.type != _schema(((name, kind),)).field(name).type or column.null_count:
        raise ValueError(f"{name} is {column.type}")
    return np.frombuffer(column.buffers()[1] or b"", kind, len(column), column.offset * np.dtype(kind).itemsize)


def _batches(answer: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    yield from pa.ipc.open_stream(answer)


def _taken(written: io.BytesIO) -> bytes:
    data = written.getvalue()
    written.seek(0)
    written.truncate()
    return data
