"""Metrics of a run as tables: for notebooks and reports (`orchestrator.metrics`), and what `orc metrics` writes.

One row is one point: `key`, `step`, `epoch` (of the run's metric `epoch`, see `curves.Epochs`), `time`, `value`; and
`attempt` and `rank` where all ranks or attempts were asked for. Which points there are: `curves.Choice`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.catalog import open_catalog
from orchestrator.catalog.curves import (
    ALL,
    EPOCH,
    Choice,
    Epochs,
    Source,
    Thinning,
    by_attempt,
    first_steps,
    is_current,
    reduced,
    source,
    take,
)
from orchestrator.catalog.questions import Catalog
from orchestrator.errors import UserError

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa

    from orchestrator.store.views import Points, SummaryRow

SHORT = 10_000
"""Points of a key, of all ranks and attempts, up to which it is read together with others."""
POINTS_TOGETHER = 200_000
ROWS_AT_ONCE = 65_536
"""Points that are held as rows at one time; there may be more in a piece."""


def metrics(
    run: str,
    *keys: str,
    rank: int | str | None = None,
    attempt: int | str | None = None,
    reduce: str = "",
    start: int | None = None,
    stop: int | None = None,
    every: int = 1,
    home: Path | str | None = None,
    api: str = "",
) -> Metrics:
    """Points of a run's metrics. Nothing is read before `.arrow()`, `.pandas()` or `.polars()`.

    `run` is an id, the beginning of an id, a name, or `last`. `keys` may have `*` and `?`; none: all of them. Each key
    gives its canonical curve: the newest attempt from where it went on, earlier ones before; reduced over ranks as
    declared or as `reduce` says (mean, min, max, sum, last, p95, skew), else of the lowest rank. `rank` and `attempt`
    are a number or "all". `start` and `stop` are steps, both included; `every` keeps each N-th point. `home` is a data
    directory and `api` the address of an API server; without them whom `orc` would ask. Raises UserError.

    Example: orchestrator.metrics("last", "train/*").pandas()
    """
    choice = Choice(rank=rank, attempt=attempt, reduce=reduce, start=start, stop=stop, every=every)
    where = None if home is None else Path(home).expanduser().absolute()
    return Metrics(lambda: open_catalog(where, api=api), run, keys, choice)


class Metrics:
    """Points of some metrics of a run, read anew each time they are asked for. Made by `orchestrator.metrics`."""

    def __init__(
        self, opened: Callable[[], AbstractContextManager[Catalog]], run: str, keys: Sequence[str], choice: Choice
    ) -> None:
        self._opened, self._run, self._keys, self._choice = opened, run, tuple(keys), choice

    def __repr__(self) -> str:
        return f"<metrics {', '.join(self._keys) or '*'} of run {self._run}: .arrow(), .pandas(), .polars()>"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows piece by piece, with bounded memory."""
        with self._opened() as catalog:
            yield from Reading(catalog, self._run, self._keys, self._choice).batches()

    def arrow(self) -> pa.Table:
        """A pyarrow.Table: `time` is a timestamp in UTC, `key` a dictionary, `epoch` null where it is unknown."""
        import pyarrow as pa

        with self._opened() as catalog:
            reading = Reading(catalog, self._run, self._keys, self._choice)
            return pa.Table.from_batches(reading.batches(), schema=reading.schema)

    def pandas(self) -> pandas.DataFrame:
        """A pandas.DataFrame; `epoch` is of pandas' own Int64, which has a missing value."""
        try:
            import pandas
        except ImportError as error:
            raise _missing("pandas", error) from error
        table = self.arrow()
        frame = table.to_pandas()
        frame["epoch"] = table["epoch"].to_pandas(types_mapper=lambda _: pandas.Int64Dtype())
        return frame

    def polars(self) -> polars.DataFrame:
        """A polars.DataFrame."""
        try:
            import polars
        except ImportError as error:
            raise _missing("polars", error) from error
        frame = polars.from_arrow(self.arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame


def _missing(package: str, error: ImportError) -> UserError:
    return UserError(
        f"metrics(…).{package}() needs {package}, which cannot be imported here ({error}): pip install {package}. "
        "Or use .arrow(), which needs nothing more."
    )


class Reading:
    """The chosen points of a run, read through an open catalog. Raises NotFound for the run, UserError for keys."""

    def __init__(self, catalog: Catalog, reference: str, patterns: Sequence[str], choice: Choice) -> None:
        self._catalog, self.choice = catalog, choice
        self.run = catalog.run(reference)
        self._rows: dict[str, list[SummaryRow]] = {}
        for row in catalog.summaries(self.run.run):
            self._rows.setdefault(row.key, []).append(row)
        self._together: dict[str, Points] = {}
        """Short keys that were read at once."""
        self.keys = matching(patterns, self._rows, self.run.name) if patterns else sorted(self._rows)

    @property
    def has_places(self) -> bool:
        """Whether rows tell their attempt and rank."""
        return ALL in (self.choice.rank, self.choice.attempt)

    def source(self, key: str) -> Source:
        return source(key, self._rows[key], self.choice)

    def most(self) -> int:
        """About how many points there are; `start`, `stop` and attempts leave some out."""
        return sum(self.source(key).most // self.choice.every for key in self.keys)

    def blocks(self, key: str) -> Iterator[Points]:
        """The key's points, piece by piece.

        Memory is bounded, but a curve of all ranks needs all points of one attempt at once: some 70 bytes each.
        """
        told, choice = self.source(key), self.choice
        attempt = choice.attempt if isinstance(choice.attempt, int) else None
        lowest = None
        if choice.attempt is None and told.attempts > 1:
            lowest = first_steps(self._pieces(key, told.rank, None))
        pieces = self._pieces(key, told.rank, attempt)
        if told.reduce:
            pieces = (reduced(points, told.reduce) for points in by_attempt(pieces))
        thinning = Thinning(choice)
        for piece in pieces:
            current = piece if lowest is None else take(piece, is_current(piece, lowest))
            kept = thinning.keep(current)
            for place in range(0, len(kept), ROWS_AT_ONCE):
                yield take(kept, slice(place, place + ROWS_AT_ONCE))

    def _pieces(self, key: str, rank: int | None, attempt: int | None) -> Iterable[Points]:
        if self._count(key) > SHORT:
            return self._catalog.point_blocks(self.run.run, key, rank=rank, attempt=attempt)
        if key not in self._together:
            self._together = self._catalog.points_of(self.run.run, self._short_ones_from(key))
        points = self._together[key]
        is_meant = np.ones(len(points), bool)
        for column, number in ((points.ranks, rank), (points.attempts, attempt)):
            if number is not None:
                is_meant &= column == number
        return [take(points, is_meant)]

    def _short_ones_from(self, key: str) -> list[str]:
        """That key and those that follow it, as many as may be held."""
        found, points = [key], self._count(key)
        for other in self.keys[self.keys.index(key) + 1 :]:
            points += self._count(other) if self._count(other) <= SHORT else 0
            if points > POINTS_TOGETHER:
                break
            if self._count(other) <= SHORT:
                found.append(other)
        return found

    def _count(self, key: str) -> int:
        return sum(row.count for row in self._rows[key])

    def rows(self, key: str) -> Iterator[tuple[Points, np.ndarray, np.ndarray]]:
        """The same with the epoch of each point, and whether it is known."""
        epochs = self.epochs  # before: nothing else can be asked while points come
        for points in self.blocks(key):
            yield points, *epochs.at(points)

    @cached_property
    def epochs(self) -> Epochs:
        rows = self._rows.get(EPOCH, ())
        if not rows:
            return Epochs()
        return Epochs(self._catalog.point_blocks(self.run.run, EPOCH, rank=min(row.rank for row in rows)))

    # -- Arrow ---------------------------------------------------------------------------------------------------------

    @cached_property
    def schema(self) -> pa.Schema:
        import pyarrow as pa

        places = [("attempt", pa.int32()), ("rank", pa.int32())] if self.has_places else []
        columns = [
            ("key", pa.dictionary(pa.int32(), pa.string())), ("step", pa.int64()), ("epoch", pa.int64()),
            ("time", pa.timestamp("ms", tz="UTC")), ("value", pa.float64()),
        ]  # fmt: skip
        return pa.schema([*columns, *places])

    def batches(self) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        names = pa.array(self.keys, pa.string())
        for place, key in enumerate(self.keys):
            for points, epoch, is_known in self.rows(key):
                columns: list[Any] = [
                    pa.DictionaryArray.from_arrays(np.full(len(points), place, np.int32), names),
                    pa.array(points.steps),
                    pa.array(epoch, mask=~is_known),
                    pa.array(np.rint(points.times * 1000).astype(np.int64)).view(self.schema.field("time").type),
                    pa.array(points.values),
                ]
                if self.has_places:
                    columns += [pa.array(points.attempts), pa.array(points.ranks)]
                yield pa.RecordBatch.from_arrays(columns, schema=self.schema)


def matching(patterns: Iterable[str], known: Iterable[str], run: str) -> list[str]:
    """The known keys that are meant, in the order of the patterns, by name within one. A key that is there is itself,
    whatever characters it has. Raises UserError for a pattern that fits nothing; `run` is for its text."""
    keys, found = sorted(known), dict[str, None]()
    for pattern in patterns:
        fitting = [pattern] if pattern in keys else [key for key in keys if fnmatch.fnmatchcase(key, pattern)]
        if not fitting:
            near = difflib.get_close_matches(pattern, keys, n=3)
            meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UserError(f"Run {run} has no metric {pattern!r}.{meant} `orc metrics {run}` lists them.")
        found |= dict.fromkeys(fitting)
    return list(found)
