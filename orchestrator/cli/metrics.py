"""The verb `metrics`: which keys a run has, and their points as a table, JSON, JSON lines, CSV or Parquet."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from orchestrator.cli import describe, text
from orchestrator.cli.access import asked_catalog
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.catalog.curves import Source
    from orchestrator.catalog.metrics import Reading
    from orchestrator.catalog.questions import Catalog
    from orchestrator.store.views import Curve, Points, RunDetail, SummaryRow

MOST_WINDOWS = 100
"""Rows of a table for one key; longer curves are shown in windows."""
MOST_IN_DOCUMENT = 2_000_000
"""Points in one JSON document, which has to be held as a whole, here and by its reader."""
ROWS_IN_GROUP = 1 << 18
"""Of a Parquet file."""
BORING = 2.0
"""Seconds after which progress is told."""


def metrics(arguments: argparse.Namespace, output: Output) -> int:
    form = _form(arguments)
    output.as_json = arguments.json or (form == "json" and not arguments.output)
    with asked_catalog(arguments) as catalog:
        if not arguments.keys:
            run = catalog.run(arguments.run)
            rows = [row for row in catalog.summaries(run.run) if arguments.rank in (None, "all", row.rank)]
            _summaries(run, rows, form, output)
            return 0
        from orchestrator.catalog.curves import Choice  # imports numpy, without which the summaries are there sooner
        from orchestrator.catalog.metrics import Reading

        chosen = ("rank", "attempt", "reduce", "start", "stop", "every")
        choice = Choice(**{name: getattr(arguments, name) for name in chosen})
        reading = Reading(catalog, arguments.run, arguments.keys, choice)
        if form == "table":
            _table(catalog, reading, output)
        elif form == "json" and not arguments.output:
            document = _document(reading, Progress(output, reading.most()))
            output.result(document, lambda: None)
        else:
            _export(reading, form, arguments.output, output)
    return 0


def _form(arguments: argparse.Namespace) -> str:
    """What to write, decided by --format, the ending of --output, --json. Raises UsageError."""
    endings = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
    form = arguments.format or (endings.get(Path(arguments.output).suffix, "") if arguments.output else "")
    if arguments.output and form in ("", "table"):
        raise UsageError(f"--output {arguments.output}: say --format csv, jsonl, json or parquet.")
    if arguments.json and not arguments.output:
        if form not in ("", "json"):
            raise UsageError(f"--json and --format {form} are two forms of the same answer: choose one.")
        form = "json"
    if not arguments.keys:
        about_points = ("attempt", "reduce", "start", "stop", "output")
        asked = [name for name in about_points if getattr(arguments, name) not in (None, "")]
        if asked or arguments.every != 1 or form in ("jsonl", "parquet"):
            raise UsageError("Say whose points, e.g. `orc metrics RUN 'train/*'`; '*' are all of them.")
    return form or "table"


# -- keys --------------------------------------------------------------------------------------------------------------

CSV_SUMMARY = (
    "key", "rank", "unit", "count", "first", "last", "last_step", "minimum", "maximum", "mean", "best", "best_step",
    "nan_count",
)  # fmt: skip


def _summaries(run: RunDetail, rows: list[SummaryRow], form: str, output: Output) -> None:
    documents = [describe.summary_document(row) for row in rows]

    def render() -> None:
        if form == "csv":
            writer = csv.writer(output.stdout, lineterminator="\n")
            writer.writerow(CSV_SUMMARY)
            writer.writerows([document[column] for column in CSV_SUMMARY] for document in documents)
        elif not rows:
            output.line(f"run {run.name} has no metrics")
        else:
            output.table(describe.SUMMARY_COLUMNS, [describe.summary_cells(row) for row in rows], right=range(1, 8))

    output.result({"run": run.run, "name": run.name, "metrics": documents}, render)


# -- a table for people ------------------------------------------------------------------------------------------------


def _table(catalog: Catalog, reading: Reading, output: Output) -> None:
    progress = Progress(output, reading.most())

    def render() -> None:
        for place, key in enumerate(reading.keys):
            if place:
                output.line()
            source = reading.source(key)
            curves = _curves(catalog, reading, source, progress)
            points = sum(int(curve.counts.sum()) for curve in curves)
            output.line(
                f"{key}{f' [{source.unit}]' if source.unit else ''}: {_origin(reading, source, points)}", style="bold"
            )
            _windows(reading, source, curves, output)
            if any(not curve.is_exact for curve in curves):
                output.message(
                    f"orc: {points:,} points of {key} are shown in windows of neighbours; "
                    "--every N shows each N-th, --format csv gives all"
                )

    output.result(None, render)


def _curves(catalog: Catalog, reading: Reading, source: Source, progress: Progress) -> list[Curve]:
    from orchestrator.catalog.curves import by_series, joined, windows

    choice = reading.choice
    one_attempt = choice.attempt if isinstance(choice.attempt, int) else 1 if source.attempts == 1 else None
    is_plain = not source.reduce and source.rank is not None and one_attempt is not None and choice.every == 1
    if is_plain and source.most > MOST_WINDOWS:
        ends = {"start": choice.start, "stop": choice.stop}
        return [
            catalog.curve(
                reading.run.run, source.key, rank=source.rank or 0, attempt=one_attempt, most=MOST_WINDOWS, **ends
            )
        ]
    points = joined(progress.counted(reading.blocks(source.key)))
    series = list(by_series(points)) if reading.has_places else [points] if len(points) else []
    return [windows(each, max(MOST_WINDOWS // len(series), 5)) for each in series]


def _origin(reading: Reading, source: Source, points: int) -> str:
    """Where the rows come from."""
    ranks = "each rank" if source.rank is None else f"rank {source.rank}"
    attempts = f", attempt {reading.choice.attempt}"
    if reading.choice.attempt == "all":
        attempts = ", all attempts"
    elif reading.choice.attempt is None:
        attempts = f", attempts up to {source.attempts} where each went on" if source.attempts > 1 else ""
    return f"{f'{source.reduce} over ranks' if source.reduce else ranks}{attempts}, {points:,} points"


def _windows(reading: Reading, source: Source, curves: list[Curve], output: Output) -> None:
    is_exact = all(curve.is_exact for curve in curves)
    header = ["step", "epoch", "time", *(["value"] if is_exact else ["points", "mean", "min", "max", "last"])]
    if reading.has_places:
        header = ["attempt", "rank", *header]
    cells: list[tuple[str, ...]] = []
    for curve in curves:
        newest = source.attempts if reading.choice.attempt is None else curve.attempt
        epoch, is_known = reading.epochs.of(curve.steps, newest)
        shown = (
            [[f"{value:.6g}" for value in curve.last.tolist()]]
            if is_exact
            else [
                list(map(str, curve.counts.tolist())),
                *(
                    [text.number(value) for value in c.tolist()]
                    for c in (curve.mean, curve.minimum, curve.maximum, curve.last)
                ),
            ]
        )
        n = len(curve)
        places = [[str(curve.attempt)] * n, [str(curve.rank)] * n] if reading.has_places else []
        times = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) for at in curve.times.tolist()]
        cells += zip(
            *places, map(str, curve.steps.tolist()), _spelled(epoch, is_known, "-"), times, *shown, strict=True
        )
    output.table(header, cells, right=[n for n, name in enumerate(header) if name != "time"])


# -- exact forms -------------------------------------------------------------------------------------------------------


def _export(reading: Reading, form: str, file: str, output: Output) -> None:
    progress = Progress(output, reading.most())
    write = {"csv": _write_csv, "jsonl": _write_jsonl, "parquet": _write_parquet, "json": _write_json}[form]
    if file:
        with _new_file(Path(file)) as stream:
            write(reading, stream, progress)
        size = Path(file).stat().st_size
        document = {
            "run": reading.run.run, "name": reading.run.name, "file": file, "format": form, "keys": reading.keys,
            "points": progress.done, "size_bytes": size,
        }  # fmt: skip
        output.result(
            document,
            lambda: output.line(
                f"{progress.done:,} points of {len(reading.keys)} metrics of run {reading.run.name} in {file} "
                f"({text.size(size)})"
            ),
        )
        return
    if form == "parquet" and output.stdout.isatty():
        raise UsageError("Parquet is no text: say --output FILE.")
    output.stdout.flush()
    write(reading, output.stdout.buffer, progress)
    output.stdout.buffer.flush()
    output.has_result = True


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Appears under its name when it is whole, and not at all when something goes wrong. Raises UserError."""
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        if path.exists():
            raise UserError(f"{path} exists already: choose another name, or remove it.")
        with part.open("xb") as stream:
            yield stream
        part.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _write_csv(reading: Reading, stream: BinaryIO, progress: Progress) -> None:
    places = ["attempt", "rank"] if reading.has_places else []
    stream.write((",".join(["key", "step", "epoch", "time", "value", *places]) + "\n").encode())
    for key in reading.keys:
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow([key])  # a key with a line end is quoted only for this one
        quoted = line.getvalue().removesuffix("\r\n")
        for points, columns in _texts(reading, key, "", progress):
            columns = [*columns[:2], list(map(repr, points.times.tolist())), columns[2], *columns[3:]]
            stream.write("".join([f"{quoted},{','.join(row)}\n" for row in zip(*columns, strict=True)]).encode())


def _write_jsonl(reading: Reading, stream: BinaryIO, progress: Progress) -> None:
    for key in reading.keys:
        phase, slash, metric = key.partition("/")
        of_key = f'"phase": {json.dumps(phase) if slash else "null"}, "metric": {json.dumps(metric if slash else key)}'
        row = f'{{{{"step": {{}}, "epoch": {{}}, {of_key.replace("{", "{{").replace("}", "}}")}, "value": {{}}'
        row += ', "rank": {}, "attempt": {}, "time": {}}}\n' if reading.has_places else "}}\n"
        for points, columns in _texts(reading, key, "null", progress):
            for place, value in enumerate(columns[2]):
                if value in ("nan", "inf", "-inf"):
                    columns[2][place] = f'"{value}"'
            if reading.has_places:
                columns = [*columns[:3], columns[4], columns[3], list(map(repr, points.times.tolist()))]
            stream.write("".join(map(row.format, *columns)).encode())


def _texts(reading: Reading, key: str, unknown: str, progress: Progress) -> Iterator[tuple[Points, list[list[str]]]]:
    """Pieces of a key with the texts of step, epoch, value and, where rows tell them, attempt and rank. A float is the
    shortest text that gives the same float."""
    for points, epoch, is_known in reading.rows(key):
        progress.add(len(points))
        columns = [
            list(map(str, points.steps.tolist())),
            _spelled(epoch, is_known, unknown),
            list(map(repr, points.values.tolist())),
        ]
        if reading.has_places:
            columns += [list(map(str, points.attempts.tolist())), list(map(str, points.ranks.tolist()))]
        yield points, columns


def _spelled(epoch: Any, is_known: Any, unknown: str) -> list[str]:
    return [str(value) if known else unknown for value, known in zip(epoch.tolist(), is_known.tolist(), strict=True)]


def _write_parquet(reading: Reading, stream: BinaryIO, progress: Progress) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetWriter(stream, reading.schema, compression="zstd") as writer:
        waiting: list[pa.RecordBatch] = []
        rows = 0
        for batch in reading.batches():
            progress.add(batch.num_rows)
            waiting.append(batch)
            rows += batch.num_rows
            if rows >= ROWS_IN_GROUP:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting, rows = [], 0
        if rows:
            writer.write_table(pa.Table.from_batches(waiting))


def _write_json(reading: Reading, stream: BinaryIO, progress: Progress) -> None:
    stream.write(json.dumps(text.jsonable(_document(reading, progress)), allow_nan=False).encode())


def _document(reading: Reading, progress: Progress) -> dict[str, Any]:
    """Columns of each key. Raises UserError when they are too many for one document."""
    if reading.most() > MOST_IN_DOCUMENT:
        raise UserError(
            f"{reading.most():,} points are too many for one JSON document: --format jsonl writes them line by line, "
            "--every N takes each N-th."
        )
    points: dict[str, dict[str, list[Any]]] = {}
    for key in reading.keys:
        columns: dict[str, list[Any]] = {name: [] for name in ("step", "epoch", "time", "value")}
        columns |= {"attempt": [], "rank": []} if reading.has_places else {}
        for piece, epoch, is_known in reading.rows(key):
            progress.add(len(piece))
            columns["step"] += piece.steps.tolist()
            columns["epoch"] += [
                e if known else None for e, known in zip(epoch.tolist(), is_known.tolist(), strict=True)
            ]
            columns["time"] += piece.times.tolist()
            columns["value"] += piece.values.tolist()
            if reading.has_places:
                columns["attempt"] += piece.attempts.tolist()
                columns["rank"] += piece.ranks.tolist()
        points[key] = columns
    curves = {
        key: {"unit": source.unit, "direction": source.direction, "rank": source.rank, "reduce": source.reduce or None}
        for key, source in ((key, reading.source(key)) for key in reading.keys)
    }
    return {"run": reading.run.run, "name": reading.run.name, "curves": curves, "points": points}


# -- progress ----------------------------------------------------------------------------------------------------------


class Progress:
    """Tells on stderr how many points are written, once it has taken a while: redrawn on a terminal, else now and
    then."""

    def __init__(self, output: Output, total: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._output, self._total, self._monotonic = output, total, monotonic
        self._is_terminal = output.stderr.isatty()
        self._next = monotonic() + BORING
        self._is_drawn = False
        self.done = 0

    def counted(self, pieces: Iterator[Points]) -> Iterator[Points]:
        for points in pieces:
            self.add(len(points))
            yield points

    def add(self, points: int) -> None:
        self.done += points
        if (now := self._monotonic()) < self._next:
            return
        self._next = now + (0.5 if self._is_terminal else 10.0)
        told = f"orc: {self.done:,} of about {self._total:,} points"
        self._output.message(f"\x1b[1A\x1b[2K{told}" if self._is_terminal and self._is_drawn else told)
        self._is_drawn = True
