"""How far each sink is behind what is committed: a few questions to the database, whether the sinks run or not.

A sink keeps a row of its own (its place in the list of changed runs, and in `state` which runs wait, how it is and,
for one without a cursor per run, what of them it has) and, where it copies points one by one, a row per run with
`seen` (points read) and `last_ms` (time of the newest one copied). Only runs with something to copy are looked at, all
at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import psycopg

from orchestrator.store.views import SinkLag

_SINKS = """
SELECT sink, facts, state, extract(epoch FROM updated_at)::float8 FROM sink_cursors WHERE run_id = '' ORDER BY sink
"""

_CHANGED = """
SELECT run, max(xid::text::bigint) FROM (
  SELECT id AS run, xid FROM runs WHERE xid >= %(after)s::text::xid8
  UNION ALL SELECT run_id, xid FROM producers WHERE xid >= %(after)s::text::xid8
) AS changed WHERE %(run)s::text IS NULL OR run = %(run)s GROUP BY run
"""

# Names of the sinks that the run declines stand in its configuration: `mlflow.enabled=false`.
_RUNS = """
SELECT r.id, r.number, r.directory <> '', array(
  SELECT s FROM unnest(%(sinks)s::text[]) AS s WHERE lower(a.config #>> ARRAY[s, 'enabled']) = 'false'
) FROM runs r LEFT JOIN attempts a ON a.run_id = r.id AND a.attempt = r.attempt
WHERE r.id = ANY(%(runs)s) AND r.deleted_at IS NULL
"""

_COMMITTED = """
SELECT run_number, sum(count)::bigint, min(first_time_ms), max(last_time_ms) FROM metric_summaries
WHERE run_number = ANY(%s) GROUP BY run_number
"""

_COPIED = """
SELECT sink, run_id, (state ->> 'seen')::bigint, (state ->> 'last_ms')::bigint FROM sink_cursors
WHERE sink = ANY(%s) AND run_id = ANY(%s)
"""


class _Committed(NamedTuple):
    points: int
    first_ms: int
    last_ms: int


def sink_lags(connection: psycopg.Connection[Any], run: str | None) -> list[SinkLag]:
    """One per sink that ever ran, by name; `run`: of that one alone."""
    sinks = connection.execute(_SINKS).fetchall()
    if not sinks:
        return []
    names = [sink for sink, _, _, _ in sinks]
    after = str(min(facts for _, facts, _, _ in sinks))
    changed = dict(connection.execute(_CHANGED, {"after": after, "run": run}).fetchall())
    waiting = {
        sink: {one for one in state.get("runs", ()) if run in (None, one)}
        | {one for one, xid in changed.items() if xid >= facts}
        for sink, facts, state, _ in sinks
    }
    every = sorted(set().union(*waiting.values()))
    runs = {row[0]: row[1:] for row in connection.execute(_RUNS, {"runs": every, "sinks": names})}
    numbers = [number for number, _, _ in runs.values()]
    committed = {row[0]: _Committed(*row[1:]) for row in connection.execute(_COMMITTED, (numbers,))}
    copied = {(row[0], row[1]): (row[2] or 0, row[3] or 0) for row in connection.execute(_COPIED, (names, list(runs)))}
    return [
        _lag(
            sink, state, updated,
            {
                one: committed.get(runs[one][0])
                for one in waiting[sink]
                if one in runs and _takes(sink, has_directory=runs[one][1], declined=runs[one][2])
            },
            {**state.get("written", {}), **{one: said for (name, one), said in copied.items() if name == sink}},
        )
        for sink, _, state, updated in sinks
    ]  # fmt: skip


def _takes(sink: str, *, has_directory: bool, declined: Iterable[str]) -> bool:
    return has_directory if sink == "directory" else sink not in declined


def _lag(
    sink: str, state: Mapping[str, Any], updated: float, runs: Mapping[str, _Committed | None],
    copied: Mapping[str, tuple[int, int]],
) -> SinkLag:  # fmt: skip
    points, late_ms = 0, 0
    for run, there in runs.items():
        seen, last_ms = copied.get(run, (0, 0))
        if there is not None and there.points > seen:
            points += there.points - seen
            late_ms = max(late_ms, there.last_ms - (last_ms or there.first_ms))
    return SinkLag(
        sink=sink, points=points, seconds=late_ms / 1000, runs=len(runs), state=state.get("state", ""),
        error=state.get("error", ""), updated=updated,
    )  # fmt: skip
