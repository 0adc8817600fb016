"""Is what is stored consistent? Looks at every row of points, says what does not fit, and mends what can be mended.

For each producer: its points and those counted as lost make up its watermark, numbers begin at 1 and end at the
watermark, no two rows as committed have the same number. For each row: its checksum. For each key and rank: the summary
is that of the points, and so are the windows for charts. Runs are looked at in groups, each as of one moment, so
trackers and merging may go on meanwhile; memory holds one block of rows, and one line per key, rank and producer of the
group.

Nothing is ever deleted. What is gone is counted as lost, what differs from its checksum is kept as it is, and both are
told in an event of the run, so that nobody has to remember them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np
import psycopg

from orchestrator.errors import NotFound
from orchestrator.store import chunks, levels
from orchestrator.store.binary import numpy_cursor
from orchestrator.store.lifecycle import add_event
from orchestrator.store.merge import lock_name

Connection = psycopg.Connection[Any]

RUNS_AT_ONCE = 200
ROWS_AT_ONCE = 50
TRIES = 20
"""Of a repair, when others commit to the same run."""
SAME_SUM = 1e-9
"""Sums may differ by that much of the sum of magnitudes: the order of adding differs."""


class Trouble(StrEnum):
    """What can be wrong."""

    missing_points = "missing_points"
    doubled_points = "doubled_points"
    watermark = "watermark"
    checksum = "checksum"
    summary = "summary"
    windows = "windows"
    stray_points = "stray_points"
    spool = "spool"
    log = "log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    trouble: Trouble
    run: str
    where: str
    what: str
    repair: str = ""
    """What `--repair` does about it; empty: it cannot be mended."""
    is_repaired: bool = False
    fix: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(slots=True, kw_only=True)
class Counts:
    """What was looked at."""

    runs: int = 0
    producers: int = 0
    rows: int = 0
    points: int = 0
    lost: int = 0
    """Points that are known to be lost, see `producers.lost`."""


Progress = Callable[[Counts, int], None]
"""Told after each block of rows; with how many runs there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    id: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Producer:
    id: int
    uuid: str
    run: str
    attempt: int
    rank: int
    points: int
    lost: int

    @property
    def where(self) -> str:
        return f"run {self.run}, producer {self.uuid} (attempt {self.attempt}, rank {self.rank})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """Rows of one producer (0: nobody's), attempt and rank."""

    run_number: int
    producer: int
    attempt: int
    rank: int
    n: int
    first: int
    last: int
    has_unnumbered: bool
    """Written before rows had numbers, or imported."""


# -- what is asked from outside ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    counts: Counts
    problems: tuple[Problem, ...]


Open = Callable[[], AbstractContextManager[Connection]]
"""Gives a connection in a transaction, which is committed at the end."""

_ONE_MOMENT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"


def examine(connect: Open, run: str | None, progress: Progress | None) -> Verdict:
    """Everything, or one run. Raises NotFound."""
    with connect() as connection:
        wanted = runs(connection, run)
    if run is not None and not wanted:
        raise NotFound("run", run)
    counts, problems = Counts(), []
    pace = Pace(progress, counts, len(wanted))
    for start in range(0, len(wanted), RUNS_AT_ONCE):
        with connect() as connection:
            connection.execute(f"{_ONE_MOMENT}, READ ONLY")
            problems += check(connection, wanted[start : start + RUNS_AT_ONCE], counts, pace)
            pace()
    if run is None:
        with connect() as connection:
            problems += stray(connection)
    return Verdict(counts=counts, problems=tuple(problems))


def mend(connect: Open, names: Iterable[str], *, user: str, at: datetime) -> list[Problem]:
    """Looks at these runs again, each in a transaction of its own, and mends what can be mended."""
    found = []
    for name in names:
        for tries_left in reversed(range(TRIES)):
            try:
                with connect() as connection:
                    found += _mended(connection, name, user=user, at=at)
                break
            except psycopg.errors.SerializationFailure:  # somebody committed while we waited for the lock
                if not tries_left:
                    raise
    return found


def _mended(connection: Connection, name: str, *, user: str, at: datetime) -> list[Problem]:
    """Nobody merges the run meanwhile. The lock is of the session, because what is seen must not be older than it."""
    key = "hashtextextended(%s, 0)"
    connection.execute(f"SELECT pg_advisory_lock({key})", (lock_name(name),))
    try:
        connection.commit()
        connection.execute(_ONE_MOMENT)
        found = [problem for run in runs(connection, name) for problem in repair(connection, run, user=user, at=at)]
        connection.commit()
    finally:
        with suppress(psycopg.Error):  # a connection that ended has given the lock away
            connection.rollback()
            connection.execute(f"SELECT pg_advisory_unlock({key})", (lock_name(name),))
    return found


def runs(connection: Connection, run: str | None) -> list[_Run]:
    """All runs that are not removed, or the one of that id."""
    rows = connection.execute(
        "SELECT id, number FROM runs WHERE deleted_at IS NULL AND (%(run)s::text IS NULL OR id = %(run)s)"
        " ORDER BY number",
        {"run": run},
    )
    return [_Run(id=row[0], number=row[1]) for row in rows]


def check(connection: Connection, group: Sequence[_Run], counts: Counts, told: Callable[[], None]) -> list[Problem]:
    """What is wrong with these runs, as of one moment: inside a transaction that sees one."""
    names = {run.number: run.id for run in group}
    producers = _producers(connection, [run.id for run in group])
    held = _held(connection, list(names))
    problems = _of_watermarks(producers, held, names)
    problems += _of_overlaps(connection, producers, names)
    parts, summed_up, damage = _points(connection, names, counts, told)
    problems += damage
    damaged = {problem.fix["number"] for problem in damage}
    problems += _of_summaries(connection, parts, names, damaged)
    problems += _of_windows(connection, summed_up, names, damaged)
    counts.runs += len(group)
    counts.producers += len(producers)
    counts.lost += sum(producer.lost for producer in producers.values())
    return problems


def stray(connection: Connection) -> list[Problem]:
    """Points of runs that are not there, or removed."""
    rows = connection.execute(
        "SELECT c.run_number, count(*), sum(c.n)::bigint FROM metric_chunks c WHERE NOT EXISTS"
        " (SELECT FROM runs r WHERE r.number = c.run_number AND r.deleted_at IS NULL) GROUP BY 1 ORDER BY 1 LIMIT 1000"
    )
    return [
        Problem(
            trouble=Trouble.stray_points, run="", where=f"run number {number}",
            what=f"{points} points in {count} rows belong to no run that is there; nothing shows them",
        )
        for number, count, points in rows
    ]  # fmt: skip


def repair(connection: Connection, run: _Run, *, user: str, at: datetime) -> list[Problem]:
    """Mends what can be mended of one run; the caller commits. Commits of the run wait meanwhile. Gives what was
    wrong, with `is_repaired` where it is no more."""
    connection.execute("SELECT 1 FROM producers WHERE run_id = %s ORDER BY uuid FOR UPDATE", (run.id,))
    connection.execute("SELECT 1 FROM runs WHERE id = %s FOR UPDATE", (run.id,))  # no new producers
    found = check(connection, [run], Counts(), lambda: None)
    mended = []
    for problem in found:
        is_repaired = bool(problem.repair)
        if is_repaired:
            _MEND[problem.trouble](connection, problem)
            with connection.cursor() as cursor:
                add_event(
                    cursor, run.id, attempt=problem.fix.get("attempt", 0), rank=problem.fix.get("rank", -1), at=at,
                    kind="repaired", level=_LEVELS.get(problem.trouble, "error"), user=user,
                    message=f"{problem}: {problem.repair}", details={"trouble": problem.trouble.value},
                )  # fmt: skip
        mended.append(replace(problem, is_repaired=is_repaired))
    return mended


# -- watermarks --------------------------------------------------------------------------------------------------------


def _producers(connection: Connection, runs: list[str]) -> dict[int, _Producer]:
    rows = connection.execute(
        "SELECT id, uuid, run_id, attempt, rank, points, lost FROM producers WHERE run_id = ANY(%s)", (runs,)
    )
    return {
        row[0]: _Producer(
            id=row[0], uuid=row[1].hex, run=row[2], attempt=row[3], rank=row[4], points=row[5], lost=row[6]
        )
        for row in rows
    }


def _held(connection: Connection, numbers: list[int]) -> list[_Held]:
    rows = connection.execute(
        "SELECT run_number, producer_id, attempt, rank, sum(n)::bigint, min(first_seq), max(last_seq),"
        " bool_or(first_seq = 0) FROM metric_chunks WHERE run_number = ANY(%s) GROUP BY 1, 2, 3, 4",
        (numbers,),
    )
    return [
        _Held(
            run_number=row[0], producer=row[1], attempt=row[2], rank=row[3], n=row[4], first=row[5], last=row[6],
            has_unnumbered=row[7],
        )
        for row in rows
    ]  # fmt: skip


def _of_watermarks(
    producers: Mapping[int, _Producer], held: Sequence[_Held], names: Mapping[int, str]
) -> list[Problem]:
    # Imported points may stand under another producer of the same attempt and rank, and what came for a removed run
    # was dropped and counts in its watermark: of these it is only known what there may be at most.
    unnumbered = {(names[one.run_number], one.attempt, one.rank) for one in held if one.has_unnumbered}
    problems: list[Problem] = []
    by_producer = {one.producer: one for one in held}
    for producer in producers.values():
        if (producer.run, producer.attempt, producer.rank) not in unnumbered:
            problems += _of_producer(producer, by_producer.get(producer.id))
    for run, attempt, rank in sorted(unnumbered):
        own = [p for p in producers.values() if (p.run, p.attempt, p.rank) == (run, attempt, rank)]
        stored = sum(o.n for o in held if (names[o.run_number], o.attempt, o.rank) == (run, attempt, rank))
        most = sum(p.points - p.lost for p in own)
        if stored > most:
            problems.append(
                Problem(
                    trouble=Trouble.doubled_points,
                    run=run,
                    where=f"run {run}, attempt {attempt}, rank {rank}",
                    what=f"{stored} points are stored, and its producers sent {most}",
                )  # fmt: skip
            )
    strangers = [o for o in held if o.producer not in producers and not o.has_unnumbered]
    return problems + [
        Problem(
            trouble=Trouble.watermark, run=names[o.run_number],
            where=f"run {names[o.run_number]}, attempt {o.attempt}, rank {o.rank}",
            what=f"{o.n} points belong to a producer that is not there",
        )
        for o in strangers
    ]  # fmt: skip


def _of_producer(producer: _Producer, held: _Held | None) -> Iterator[Problem]:
    """min = 1, max = stored + lost = watermark."""
    n, last = (held.n, held.last) if held else (0, 0)
    fix = {"producer": producer.id, "attempt": producer.attempt, "rank": producer.rank}
    if last > producer.points:
        yield Problem(
            trouble=Trouble.watermark, run=producer.run, where=producer.where,
            what=f"its watermark is {producer.points}, and point {last} is stored: what comes again would be doubled",
            repair=f"the watermark becomes {last}", fix={**fix, "points": last, "lost": max(last - n, 0)},
        )  # fmt: skip
        return
    if held and held.first < 1:
        yield Problem(
            trouble=Trouble.watermark, run=producer.run, where=producer.where, what=f"it has a point {held.first}"
        )
    found = n + producer.lost
    if found > producer.points:
        yield Problem(
            trouble=Trouble.doubled_points, run=producer.run, where=producer.where,
            what=f"{n} points are stored and {producer.lost} lost, but it sent {producer.points}",
        )  # fmt: skip
    if found < producer.points:
        gone = producer.points - found
        yield Problem(
            trouble=Trouble.missing_points, run=producer.run, where=producer.where,
            what=f"{gone} of {producer.points} committed points are not there",
            repair=f"{gone} points are counted as lost",
            fix={**fix, "points": producer.points, "lost": producer.lost + gone},
        )  # fmt: skip


def _of_overlaps(connection: Connection, producers: Mapping[int, _Producer], names: Mapping[int, str]) -> list[Problem]:
    """Rows as committed: a batch each (or more, with the same numbers, where its differences did not fit in one)."""
    rows = connection.execute(
        "SELECT producer_id, first_seq, last_seq, n, before FROM ("
        "  SELECT producer_id, first_seq, last_seq, sum(n)::bigint AS n,"
        "    max(last_seq) OVER (PARTITION BY producer_id ORDER BY first_seq, last_seq"
        "      ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before"
        "  FROM metric_chunks WHERE run_number = ANY(%s) AND level = 0 AND first_seq > 0 GROUP BY 1, 2, 3"
        ") batches WHERE n > last_seq - first_seq + 1 OR first_seq <= before LIMIT 1000",
        (list(names),),
    )
    return [
        Problem(
            trouble=Trouble.doubled_points, run=producers[producer].run, where=producers[producer].where,
            what=f"points {first} to {last if n > last - first + 1 else min(last, before)} are stored twice",
        )
        for producer, first, last, n, before in rows
        if producer in producers
    ]  # fmt: skip


# -- checksums and summaries -------------------------------------------------------------------------------------------

_PART = np.dtype([*chunks.SUMMARY.descr, ("producer", "i8"), ("low", "i8"), ("high", "i8"), ("magnitude", "f8")])
"""The summary of one producer's points of one key; `low` and `high`: ids of the first and last row they are from."""
_IDENTITY = ("run", "key", "rank", "last_attempt", "producer")

_ROWS = (
    "SELECT c.run_number, c.xid::text::bigint, c.id, c.producer_id, c.attempt, c.rank, c.first_seq, c.last_seq, c.crc,"
    " c.n, c.first_step, c.first_time_ms, c.is_wide, c.key_ids, c.counts, c.steps, c.times, c.values, c.level"
    " FROM metric_chunks c WHERE c.run_number = ANY(%s)"
)


def _points(
    connection: Connection, names: Mapping[int, str], counts: Counts, told: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray, list[Problem]]:
    """What the points of these runs sum up to, the same of each piece that has windows, and rows that differ from their
    checksum."""
    parts, problems = np.empty(0, _PART), []
    summed_up = [parts]
    with numpy_cursor(connection, name="integrity") as cursor:
        cursor.execute(_ROWS, (list(names),))
        while rows := cursor.fetchmany(ROWS_AT_ONCE):
            readable = []
            for row in rows:
                is_intact = chunks.is_intact(row[8], row[6], *row[13:18])
                is_readable = _is_readable(row)
                if not is_intact or not is_readable:
                    problems.append(_damage(row, names, is_readable=is_readable))
                if is_readable:
                    readable.append(row)
            pieces, has_windows = _summed(readable)
            summed_up.append(pieces[has_windows])
            parts = _joined(np.concatenate([parts, pieces]))
            counts.rows += len(rows)
            counts.points += sum(row[9] for row in rows)
            told()
    return parts, np.concatenate(summed_up), problems


def _stored(row: Sequence[Any]) -> chunks.Stored:
    return chunks.Stored(
        first_step=row[10], first_time_ms=row[11], is_wide=row[12], key_ids=row[13], counts=row[14], steps=row[15],
        times=row[16], values=row[17],
    )  # fmt: skip


def _is_readable(row: Sequence[Any]) -> bool:
    try:
        return len(chunks.unpacked([_stored(row)]).values) == row[9]
    except (ValueError, IndexError):
        return False


def _damage(row: Sequence[Any], names: Mapping[int, str], *, is_readable: bool) -> Problem:
    number, xid, id_, _, attempt, rank, first, last = row[:8]
    numbers = f" (points {first} to {last} of its producer)" if first else ""
    can_be_read = "its points are kept as they are now" if is_readable else ""
    return Problem(
        trouble=Trouble.checksum, run=names[number],
        where=f"run {names[number]}, attempt {attempt}, rank {rank}, row {xid}/{id_}{numbers}",
        what=f"its {row[9]} points are not what was written" + ("" if is_readable else ", and cannot be read"),
        repair=can_be_read,
        fix={"number": number, "xid": xid, "id": id_, "attempt": attempt, "rank": rank},
    )  # fmt: skip


def _summed(rows: Sequence[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """dtype _PART, one per row and key, and which of them have windows."""
    series = chunks.unpacked([_stored(row) for row in rows])
    owners = np.array([row[:6] for row in rows], np.int64).reshape(-1, 6)
    found = np.zeros(len(series.starts), _PART)
    if not len(found):
        return found, np.empty(0, bool)
    summary = chunks.summaries(series, owners[:, 0], owners[:, 4], owners[:, 5])
    for name in summary.dtype.names or ():
        found[name] = summary[name]
    found["producer"] = owners[series.owners, 3]
    found["low"] = found["high"] = owners[series.owners, 2]
    with np.errstate(over="ignore"):
        finite = np.where(np.isfinite(series.values), np.abs(series.values), 0.0)
        found["magnitude"] = np.add.reduceat(finite, series.starts)
    return found, (np.array([row[18] for row in rows]) == _SUMMED_UP)[series.owners]


def _joined(parts: np.ndarray) -> np.ndarray:
    """One per key, rank, attempt and producer, sorted by these. Rows come in any order."""
    by_end = _sorted(parts, "high")
    rows = _sorted(parts, "low")
    starts, ends = _groups(rows, _IDENTITY)
    found = rows[starts].copy()
    for name in ("last_value", "last_step", "last_time_ms", "high"):
        found[name] = by_end[name][ends]
    return _added(rows, starts, found)


def _sorted(parts: np.ndarray, place: str) -> np.ndarray:
    return parts[np.lexsort((parts[place], *(parts[name] for name in reversed(_IDENTITY))))]


def _groups(rows: np.ndarray, names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal rows begin, and where they end (included)."""
    is_new = np.zeros(len(rows), bool)
    is_new[:1] = True
    for name in names:
        is_new[1:] |= np.diff(rows[name]) != 0
    starts = np.flatnonzero(is_new)
    return starts, np.append(starts[1:], len(rows)) - 1 if len(starts) else starts


def _added(rows: np.ndarray, starts: np.ndarray, found: np.ndarray) -> np.ndarray:
    if not len(starts):
        return found
    with np.errstate(over="ignore", invalid="ignore"):
        for name in ("count", "nan_count", "inf_count", "sum", "magnitude"):
            found[name] = np.add.reduceat(rows[name], starts)
    for name, extreme in (("min", np.fmin), ("max", np.fmax)):
        best = extreme.reduceat(rows[f"{name}_value"], starts)
        lengths = np.diff(np.append(starts, len(rows)))
        places = np.where(rows[f"{name}_value"] == np.repeat(best, lengths), np.arange(len(rows)), len(rows))
        at = np.minimum.reduceat(places, starts)
        is_none = at == len(rows)
        at[is_none] = 0
        found[f"{name}_value"], found[f"{name}_step"] = best, np.where(is_none, 0, rows[f"{name}_step"][at])
    return found


_KEPT = [name for name in chunks.SUMMARY.names or () if name not in ("run", "key")]
_STORED = (
    "SELECT run_number, key_id, "
    + ", ".join(_KEPT)
    + " FROM metric_summaries WHERE run_number = ANY(%s) ORDER BY run_number, key_id, rank"
)


def _of_summaries(
    connection: Connection, parts: np.ndarray, names: Mapping[int, str], damaged: set[int]
) -> list[Problem]:
    """`damaged`: runs whose points are not what they were; of these it is told once they are mended."""
    stored: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in connection.execute(_STORED, (list(names),)):
        stored[row[0], row[1], row[2]] = dict(zip(("run", "key", *_KEPT), row, strict=True))
    problems = []
    wrong: dict[int, list[tuple[int, int]]] = defaultdict(list)
    whys: dict[int, str] = {}
    starts, ends = _groups(parts, ("run", "key", "rank"))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        own = parts[start : end + 1]
        place = (int(own["run"][0]), int(own["key"][0]), int(own["rank"][0]))
        why = _difference(stored.pop(place, None), own)
        if why:
            wrong[place[0]].append(place[1:])
            whys.setdefault(place[0], why)
    for place in stored:
        wrong[place[0]].append(place[1:])
        whys.setdefault(place[0], "there are no points")
    for number, places in wrong.items():
        if number in damaged:
            continue
        own = parts[parts["run"] == number]
        problems.append(
            Problem(
                trouble=Trouble.summary,
                run=names[number],
                where=f"run {names[number]}",
                what=f"{len(places)} summaries differ from the points ({_key(connection, places[0][0])}, rank "
                f"{places[0][1]}: {whys[number]})",
                repair="they are computed from the points",
                fix={"number": number, "parts": own, "places": places},
            )  # fmt: skip
        )
    return problems


def _key(connection: Connection, number: int) -> str:
    found = connection.execute("SELECT name FROM metric_keys WHERE id = %s", (number,)).fetchone()
    return found[0] if found else f"key {number}"


def _difference(summary: Mapping[str, Any] | None, parts: np.ndarray) -> str:
    """What of a stored summary is not as its points say; empty if it fits."""
    if summary is None:
        return "there is none"
    total = _total(parts)
    for name in ("count", "nan_count", "inf_count", "first_attempt", "last_attempt"):
        if summary[name] != total[name]:
            return f"{name} is {summary[name]}, not {total[name]}"
    for name in ("min_value", "max_value"):
        if not _is_same(summary[name], float(total[name])):
            return f"{name} is {summary[name]}, not {total[name]}"
    # Among producers of one rank (threads, forked children) the database knows no order once rows are merged.
    for end, attempt in (("first", total["first_attempt"]), ("last", total["last_attempt"])):
        candidates = parts[parts["last_attempt"] == attempt]
        fields = [f"{end}_{name}" for name in ("value", "step", "time_ms")]
        if not any(all(_is_same(summary[name], one[name].item()) for name in fields) for one in candidates):
            return f"{end}_value is {summary[f'{end}_value']}, not {candidates[0][f'{end}_value']}"
    magnitude = float(total["magnitude"])
    if magnitude < 1e300 and abs(summary["sum"] - float(total["sum"])) > SAME_SUM * magnitude:
        return f"sum is {summary['sum']}, not {total['sum']}"
    return ""


def _total(parts: np.ndarray) -> np.void:
    """Of one key and rank, over attempts and producers (in this order)."""
    found = parts[:1].copy()
    for name in ("last_attempt", "last_value", "last_step", "last_time_ms"):
        found[name] = parts[name][-1:]
    return _added(parts, np.array([0]), found)[0]


def _is_same(stored: float | None, found: float) -> bool:
    if stored is None or found != found:
        return (stored is None or stored != stored) and found != found
    return stored == found


# -- windows for charts, see levels.py ---------------------------------------------------------------------------------

_SUMMED_UP = 2
"""The level of rows of metric_chunks whose points are in windows."""

_WINDOWS = (
    "SELECT run_number, key_id, rank, attempt, producer_id, id, n, counts, nans, infinities, first, min, max, last"
    " FROM metric_levels WHERE run_number = ANY(%s) AND level = 1"
)
# Eight rows of one level make one of the next.
_ABOVE = """
WITH l AS (
  SELECT run_number, key_id, rank, attempt, producer_id, level, id, n, row_number() OVER (
    PARTITION BY run_number, key_id, rank, attempt, producer_id, level ORDER BY id) - 1 AS place
  FROM metric_levels WHERE run_number = ANY(%(runs)s)
), below AS (
  SELECT run_number, key_id, rank, attempt, producer_id, level + 1 AS level, place / %(factor)s AS place,
    sum(n) AS n, max(id) AS id, count(*) AS count
  FROM l GROUP BY 1, 2, 3, 4, 5, 6, 7
)
SELECT DISTINCT run_number, key_id, rank FROM (SELECT * FROM l WHERE level > 1) above
LEFT JOIN below USING (run_number, key_id, rank, attempt, producer_id, level, place)
WHERE below.count IS DISTINCT FROM %(factor)s OR above.n <> below.n OR above.id <> below.id
"""


def _of_windows(
    connection: Connection, summed_up: np.ndarray, names: Mapping[int, str], damaged: set[int]
) -> list[Problem]:
    wanted = {
        (p["run"], p["key"], p["rank"], p["last_attempt"], p["producer"], p["low"]): p
        for p in ({name: one[name].item() for name in _PART.names or ()} for one in summed_up)
    }
    wrong: dict[int, set[tuple[int, int]]] = defaultdict(set)
    with numpy_cursor(connection, name="windows") as cursor:
        cursor.execute(_WINDOWS, (list(names),))
        while rows := cursor.fetchmany(ROWS_AT_ONCE):
            for row in rows:
                piece = wanted.pop(tuple(row[:6]), None)
                if piece is None or not _sums_up(piece, row):
                    wrong[row[0]].add((row[1], row[2]))
    for run, key, rank, *_ in wanted:
        wrong[run].add((key, rank))
    for run, key, rank in connection.execute(_ABOVE, {"runs": list(names), "factor": levels.FACTOR}):
        wrong[run].add((key, rank))
    return [
        Problem(
            trouble=Trouble.windows, run=names[number], where=f"run {names[number]}",
            what=f"the windows of {len(places)} curves differ from the points ("
            f"{_key(connection, min(places)[0])}, rank {min(places)[1]})",
            repair="they are computed from the points", fix={"number": number},
        )
        for number, places in wrong.items() if number not in damaged
    ]  # fmt: skip


def _sums_up(piece: Mapping[str, Any], row: Sequence[Any]) -> bool:
    """Whether windows are those of the piece. Sums are not compared: where the points are right, they are."""
    n, counts, nans, infinities, first, low, high, last = row[6:]
    try:
        if n != piece["count"] or counts.sum() != n or (nans.sum(), infinities.sum()) != (
            piece["nan_count"], piece["inf_count"],
        ):  # fmt: skip
            return False
        ends = (first[0], piece["first_value"]), (last[-1], piece["last_value"])
        extremes = (np.fmin.reduce(low), piece["min_value"]), (np.fmax.reduce(high), piece["max_value"])
        return all(_is_same(float(found), wanted) for found, wanted in (*ends, *extremes))
    except (IndexError, ValueError):
        return False


# -- mending -----------------------------------------------------------------------------------------------------------


def _mend_producer(connection: Connection, problem: Problem) -> None:
    connection.execute(
        "UPDATE producers SET points = %(points)s, lost = %(lost)s, updated_at = now(), xid = pg_current_xact_id()"
        " WHERE id = %(producer)s",
        problem.fix,
    )


def _mend_row(connection: Connection, problem: Problem) -> None:
    """The checksum becomes that of what is there: from now on it tells of further changes."""
    place = " WHERE run_number = %(number)s AND xid = %(xid)s::text::xid8 AND id = %(id)s"
    given = {**problem.fix, "xid": str(problem.fix["xid"])}
    with numpy_cursor(connection) as cursor:
        rows = cursor.execute(f"SELECT key_ids, counts, steps, times, values FROM metric_chunks{place}", given)
        arrays = rows.fetchone()
    assert arrays is not None
    crc = chunks.checksum(*chunks.packed_arrays(*arrays))
    connection.execute(f"UPDATE metric_chunks SET crc = %(crc)s{place}", {**given, "crc": crc})


def _mend_summaries(connection: Connection, problem: Problem) -> None:
    parts, number = problem.fix["parts"], problem.fix["number"]
    for key, rank in problem.fix["places"]:
        connection.execute(
            "DELETE FROM metric_summaries WHERE run_number = %s AND key_id = %s AND rank = %s", (number, key, rank)
        )
        own = parts[(parts["key"] == key) & (parts["rank"] == rank)]
        if not len(own):
            continue
        total = _total(own)
        values = [None if name[:4] in ("min_", "max_") and np.isnan(total[f"{name[:4]}value"]) else total[name].item()
                  for name in _KEPT]  # fmt: skip
        connection.execute(
            f"INSERT INTO metric_summaries (run_number, key_id, {', '.join(_KEPT)})"
            f" VALUES (%s, %s, {', '.join(['%s'] * len(_KEPT))})",
            (number, key, *values),
        )


def _mend_windows(connection: Connection, problem: Problem) -> None:
    number = problem.fix["number"]
    connection.execute("DELETE FROM metric_levels WHERE run_number = %s", (number,))
    with numpy_cursor(connection, name="again") as reading, numpy_cursor(connection) as writing:
        reading.execute(f"{_ROWS} AND c.level = {_SUMMED_UP} ORDER BY c.id", ([number],))
        while rows := reading.fetchmany(ROWS_AT_ONCE):
            series = chunks.unpacked([_stored(row) for row in rows])
            owners = np.array([row[:6] for row in rows], np.int64)[series.owners]
            parts = np.zeros(len(series.keys), levels.PART)
            for name, column in (("run_number", 0), ("producer_id", 3), ("id", 2), ("attempt", 4), ("rank", 5)):
                parts[name] = owners[:, column]
            parts["key_id"] = series.keys
            levels.add(writing, series, parts)


_MEND: Mapping[Trouble, Callable[[Connection, Problem], None]] = {
    Trouble.missing_points: _mend_producer,
    Trouble.watermark: _mend_producer,
    Trouble.checksum: _mend_row,
    Trouble.summary: _mend_summaries,
    Trouble.windows: _mend_windows,
}


_LEVELS = {Trouble.summary: "warning", Trouble.windows: "warning"}
"""Of the event; other repairs are of points."""


class Pace:
    """Calls `progress` at most so often."""

    def __init__(self, progress: Progress | None, counts: Counts, total: int, every: float = 1.0) -> None:
        self._progress, self._counts, self._total, self._every = progress, counts, total, every
        self._next = time.monotonic() + every

    def __call__(self) -> None:
        if self._progress is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._progress(self._counts, self._total)
