"""The ledger of sweeps: decisions with all that follows from them, in one transaction each.

A sweep has one driver at a time. Whoever opens it becomes that, and the steps of the one before are refused: both lock
the sweep's row, so a step comes wholly before or wholly after. A step says which decision was the newest that its
driver knew of. Where the database knows more, its answer was lost on the way: the decisions are compared, and the
attempts that were opened then are told again; nothing is opened twice.

Decisions are numbered 0, 1, 2 … and are the truth. Trials and jobs are written whole whenever they change; nothing but
the open jobs is ever read back by a driver. The JSON of all of them is exact (`json`, not `jsonb`).

Locks are taken in one order: the sweep's row, then those of runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Json, Jsonb

from orchestrator.errors import NotFound, SweepTaken
from orchestrator.records import RunStatus, RunTicket
from orchestrator.store import lifecycle
from orchestrator.store.cleaning import clean_json, clean_text
from orchestrator.store.lifecycle import Cursor
from orchestrator.store.views import SweepDetail, SweepRow
from orchestrator.sweep_records import (
    DecisionRow,
    JobRow,
    RequestRow,
    RunEnd,
    SweepPoll,
    SweepRecord,
    SweepSpec,
    SweepStep,
    TrialRow,
)

Connection = psycopg.Connection[Any]

# -- what a driver does ------------------------------------------------------------------------------------------------


def open_sweep(connection: Connection, spec: SweepSpec, driver: str) -> SweepRecord:
    """Makes `driver` the sweep's only one, and gives what was decided so far. What the sweep is made of stays as it was
    when it was first opened. Raises NotFound when there is no run of that id."""
    cursor = connection.cursor()
    found = cursor.execute("SELECT 1 FROM runs WHERE id = %s AND deleted_at IS NULL", (spec.sweep,)).fetchone()
    if found is None:
        raise NotFound("run", spec.sweep)
    cursor.execute(
        # Who opens the run, or starts a child of it first, makes a row that says nothing.
        "INSERT INTO sweeps AS s (id, project, who, seed, settings, space, driver, driver_since)"
        " VALUES (%(sweep)s, %(project)s, %(who)s, %(seed)s, %(settings)s, %(space)s, %(driver)s, now())"
        " ON CONFLICT (id) DO UPDATE SET driver = excluded.driver, updated_at = now(),"
        " driver_since = CASE WHEN s.driver = excluded.driver THEN s.driver_since ELSE now() END,"
        f" {', '.join(_first_time(name) for name in ('who', 'seed', 'settings', 'space'))}",
        {
            "sweep": spec.sweep, "project": clean_text(spec.project) or "default", "who": clean_text(spec.who),
            "seed": spec.seed, "settings": _json(spec.settings), "space": _json(spec.space),
            "driver": clean_text(driver),
        },
    )  # fmt: skip
    row = _one_row(cursor, "SELECT * FROM sweeps WHERE id = %s", spec.sweep)
    assert row is not None
    return SweepRecord(
        spec=SweepSpec(
            sweep=row["id"], project=row["project"], who=row["who"], seed=row["seed"], settings=row["settings"],
            space=row["space"],
        ),
        decisions=decisions(connection, spec.sweep, with_inputs=False),
        jobs=jobs(connection, spec.sweep, only_open=True),
        spent=row["spent"],
        facts=row["facts"],
    )  # fmt: skip


def _first_time(column: str) -> str:
    return (
        f"{column} = CASE WHEN s.settings::text = '{{}}' AND s.decisions = 0 THEN excluded.{column} ELSE s.{column} END"
    )


def step(connection: Connection, given: SweepStep, *, now: float) -> dict[int, RunTicket]:
    """Writes it, all or nothing; the caller commits. Gives the opened attempts by job.

    Raises NotFound, SweepTaken, what `lifecycle.open_attempt` raises, and ValueError for a step that cannot be: its
    decisions do not follow `after`, or it opens something without having decided it.
    """
    if [decision.seq for decision in given.decisions] != list(
        range(given.after + 1, given.after + 1 + len(given.decisions))
    ):
        raise ValueError(f"the decisions of a step of sweep {given.sweep} do not follow number {given.after}")
    if given.opens and not given.decisions:
        raise ValueError(f"a step of sweep {given.sweep} opens attempts and decides nothing")
    # What is decided is carried out as soon as we answer, so it must survive a crash of the server.
    connection.execute("SET LOCAL synchronous_commit = on")
    cursor = connection.cursor()
    found = cursor.execute("SELECT driver, decisions FROM sweeps WHERE id = %s FOR UPDATE", (given.sweep,)).fetchone()
    if found is None:
        raise NotFound("sweep", given.sweep)
    driver, count = found
    if driver != clean_text(given.driver):
        raise SweepTaken(given.sweep, driver)
    newest = count - 1
    if newest != given.after and given.decisions:
        if newest != given.decisions[-1].seq or not _are_stored(connection, given):
            raise SweepTaken(given.sweep, driver)
        return _tickets(connection, given)
    _insert_decisions(cursor, given.sweep, given.decisions)
    for end in sorted(given.closes, key=lambda end: end.run):
        _close(cursor, end, lifecycle.when(now))
    tickets = {
        job: lifecycle.open_attempt(cursor, spec, now, spec.lease) for job, spec in sorted(given.opens, key=_by_run)
    }
    _put_trials(cursor, given.sweep, given.trials)
    _put_jobs(cursor, given.sweep, given.jobs, tickets)
    _mark(cursor, given, tickets)
    if given.answered:
        cursor.executemany(
            "UPDATE sweep_requests SET answer = %s, done_at = now() WHERE id = %s AND sweep_id = %s",
            [(clean_text(answer), request, given.sweep) for request, answer in given.answered],
        )
    cursor.execute(
        "UPDATE sweeps SET decisions = decisions + %s, spent = coalesce(%s, spent), facts = coalesce(%s, facts),"
        " updated_at = now() WHERE id = %s",
        (
            len(given.decisions), None if given.spent is None else _json(given.spent),
            None if given.facts is None else _json(given.facts), given.sweep,
        ),
    )  # fmt: skip
    return tickets


def _by_run(opened: tuple[int, Any]) -> str:
    """Runs are locked in one order."""
    _, spec = opened
    return spec.run or spec.new_run


def _are_stored(connection: Connection, given: SweepStep) -> bool:
    stored = decisions(connection, given.sweep, after=given.after)
    return [_content(decision) for decision in stored] == [_content(decision) for decision in given.decisions]


def _content(decision: DecisionRow) -> tuple[Any, ...]:
    said = json.loads(json.dumps(clean_json([decision.inputs, decision.outcome])))
    return decision.seq, clean_text(decision.kind), decision.trial, decision.job, said


def _tickets(connection: Connection, given: SweepStep) -> dict[int, RunTicket]:
    """Those of the attempts that this step opened when it came first: its driver has opened nothing since."""
    rows = connection.execute(
        "SELECT j.number, r.id, r.name, e.name, j.attempt, r.directory FROM sweep_jobs j"
        " JOIN runs r ON r.id = j.run_id JOIN experiments e ON e.id = r.experiment_id"
        " WHERE j.sweep_id = %s AND j.number = ANY(%s)",
        (given.sweep, [job for job, _ in given.opens]),
    )
    return {
        job: RunTicket(run=run, name=name, experiment=experiment, attempt=attempt, directory=directory)
        for job, run, name, experiment, attempt, directory in rows
    }


def _insert_decisions(cursor: Cursor, sweep: str, given: Sequence[DecisionRow]) -> None:
    if given:
        cursor.executemany(
            "INSERT INTO sweep_decisions (sweep_id, seq, kind, trial, job, inputs, outcome)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [
                (
                    sweep, each.seq, clean_text(each.kind), each.trial, each.job, _json(each.inputs),
                    _json(each.outcome),
                )
                for each in given
            ],
        )  # fmt: skip


def _close(cursor: Cursor, end: RunEnd, at: datetime) -> None:
    """An attempt that ended otherwise meanwhile, or was superseded, stays what it is; a removed run stays away."""
    status = RunStatus(end.status)
    if not status.is_terminal:
        raise ValueError(f"run {end.run} cannot be closed as {status}")
    try:
        lifecycle.move(cursor, end.run, end.attempt, status, reason=end.reason, error=end.error or None, user="", at=at)
    except NotFound:
        return


_TRIAL = (
    "run_id", "status", "score", "params", "is_held", "origin", "config_hash", "rung", "resource", "spread", "n",
    "scores", "checkpoint", "reason", "ended_at",
)  # fmt: skip
_JOB = (
    "trial", "repeat", "rung", "until", "run_id", "attempt", "status", "restarts", "judge", "clone", "score",
    "resource", "reports", "lane", "lane_seconds", "reason", "error", "started_at", "ended_at",
)  # fmt: skip


def _put(table: str, columns: Sequence[str]) -> str:
    """Inserts a row of (sweep, number, *columns), or writes the columns anew. A run that was removed is left out."""
    places = ("(SELECT id FROM runs WHERE id = %s)" if name == "run_id" else "%s" for name in columns)
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return (
        f"INSERT INTO {table} (sweep_id, number, {', '.join(columns)}) VALUES (%s, %s, {', '.join(places)})"
        f" ON CONFLICT (sweep_id, number) DO UPDATE SET {changes}, updated_at = now()"
    )


_PUT_TRIAL, _PUT_JOB = _put("trials", _TRIAL), _put("sweep_jobs", _JOB)


def _put_trials(cursor: Cursor, sweep: str, given: Sequence[TrialRow]) -> None:
    if given:
        cursor.executemany(
            _PUT_TRIAL,
            [
                (
                    sweep, each.number, each.run, clean_text(each.status), _finite(each.score), _json(each.values),
                    each.is_held, clean_text(each.origin), clean_text(each.config_hash), each.rung, each.resource,
                    _finite(each.spread), each.n, _json(each.scores), _json(each.checkpoint), clean_text(each.reason),
                    _at(each.ended_at),
                )
                for each in given
            ],
        )  # fmt: skip


def _put_jobs(cursor: Cursor, sweep: str, given: Sequence[JobRow], tickets: Mapping[int, RunTicket]) -> None:
    if given:
        opened = {job: (ticket.run, ticket.attempt) for job, ticket in tickets.items()}
        cursor.executemany(
            _PUT_JOB,
            [
                (
                    sweep, each.number, each.trial, each.repeat, each.rung, each.until,
                    *opened.get(each.number, (each.run, each.attempt)), clean_text(each.status), each.restarts,
                    _json(each.judge), _json(each.clone), _finite(each.score), each.resource, _json(each.reports),
                    clean_text(each.lane), each.lane_seconds, clean_text(each.reason), _json(each.error),
                    _at(each.started_at), _at(each.ended_at),
                )
                for each in given
            ],
        )  # fmt: skip


def _mark(cursor: Cursor, given: SweepStep, tickets: Mapping[int, RunTicket]) -> None:
    """Tells the opened runs, and those who only see them, which place they have in the sweep and where they come
    from."""
    for job in given.jobs:
        ticket = tickets.get(job.number)
        if ticket is None:
            continue
        # What was recorded of source and packages is the sweep's, once for all of its trials.
        cursor.execute(
            "UPDATE attempts SET provenance = provenance || %s WHERE run_id = %s AND attempt = %s",
            (Jsonb({"sweep": given.sweep, "of": given.sweep}), ticket.run, ticket.attempt),
        )
        tags = {"orc.sweep": given.sweep, "orc.trial": job.trial, "orc.rung": job.rung}
        lifecycle.set_tags(cursor, ticket.run, "", {**tags, **({"orc.repeat": job.repeat} if job.repeat else {})})
        donor = job.clone.get("run")
        if donor and donor != ticket.run:
            cursor.execute(
                "INSERT INTO run_edges (parent_id, child_id, kind, checkpoint_id, step)"
                " SELECT id, %s, 'fork', %s, %s FROM runs WHERE id = %s ON CONFLICT (child_id, parent_id, kind)"
                " DO UPDATE SET checkpoint_id = excluded.checkpoint_id, step = excluded.step",
                (ticket.run, job.clone.get("name"), job.clone.get("step"), donor),
            )


def poll(connection: Connection, sweep: str, driver: str) -> SweepPoll:
    found = connection.execute("SELECT driver FROM sweeps WHERE id = %s", (sweep,)).fetchone()
    if found is None:
        raise NotFound("sweep", sweep)
    stops = connection.execute(
        "SELECT id FROM runs WHERE sweep_id = %s AND cancel_requested_at IS NOT NULL AND ended_at IS NULL ORDER BY id",
        (sweep,),
    )
    return SweepPoll(
        requests=requests(connection, sweep, only_open=True),
        stops=tuple(row[0] for row in stops),
        is_taken=found[0] != clean_text(driver),
    )


def ask(connection: Connection, sweep: str, kind: str, details: Mapping[str, Any], *, user: str) -> int:
    """The number of the request. Raises NotFound."""
    found = connection.execute(
        "INSERT INTO sweep_requests (sweep_id, kind, details, who) SELECT id, %s, %s, %s FROM sweeps WHERE id = %s"
        " RETURNING id",
        (clean_text(kind), _json(details), clean_text(user), sweep),
    ).fetchone()
    if found is None:
        raise NotFound("sweep", sweep)
    return found[0]


# -- reading -----------------------------------------------------------------------------------------------------------


def decisions(
    connection: Connection, sweep: str, *, after: int = -1, limit: int | None = None, with_inputs: bool = True
) -> tuple[DecisionRow, ...]:
    """Oldest first, from the one behind `after`."""
    inputs = "inputs" if with_inputs else "NULL"
    rows = connection.execute(
        f"SELECT seq, kind, trial, job, {inputs}, outcome, extract(epoch FROM at)::float8 FROM sweep_decisions"
        " WHERE sweep_id = %s AND seq > %s ORDER BY seq LIMIT %s",
        (sweep, after, limit),
    )
    return tuple(
        DecisionRow(seq=seq, kind=kind, trial=trial, job=job, inputs=given or {}, outcome=outcome, at=at)
        for seq, kind, trial, job, given, outcome, at in rows
    )


def trials(
    connection: Connection, sweep: str, *, status: str = "", after: int = -1, limit: int | None = None
) -> tuple[TrialRow, ...]:
    """By number, from the one behind `after`."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            f"SELECT number, {_columns(_TRIAL)} FROM trials WHERE sweep_id = %s AND number > %s"
            " AND (%s = '' OR status = %s) ORDER BY number LIMIT %s",
            (sweep, after, status, status, limit),
        ).fetchall()
    return tuple(TrialRow(run=row.pop("run_id") or "", values=row.pop("params"), **row) for row in rows)


def jobs(
    connection: Connection, sweep: str, *, after: int = -1, limit: int | None = None, only_open: bool = False
) -> tuple[JobRow, ...]:
    """By number, from the one behind `after`."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            f"SELECT number, {_columns(_JOB)} FROM sweep_jobs WHERE sweep_id = %s AND number > %s"
            f" {'AND ended_at IS NULL' if only_open else ''} ORDER BY number LIMIT %s",
            (sweep, after, limit),
        ).fetchall()
    return tuple(JobRow(run=row.pop("run_id") or "", **row) for row in rows)


def energy(connection: Connection, sweep: str) -> float | None:
    """Joules that GPUs used for the runs of its trials, as far as it is recorded; None where nothing is."""
    row = connection.execute(
        "SELECT sum(s.sum) FROM metric_summaries s JOIN runs r ON r.number = s.run_number"
        " WHERE r.sweep_id = %s AND s.key_id IN"
        r" (SELECT id FROM metric_keys WHERE name LIKE 'system/gpu\_%%/energy\_joules')",
        (sweep,),
    ).fetchone()
    return None if row is None or row[0] is None else float(row[0])


def requests(connection: Connection, sweep: str, *, only_open: bool = False) -> tuple[RequestRow, ...]:
    """Oldest first."""
    rows = connection.execute(
        "SELECT id, kind, details, who, extract(epoch FROM created_at)::float8, answer,"
        " extract(epoch FROM done_at)::float8 FROM sweep_requests WHERE sweep_id = %s"
        f" {'AND done_at IS NULL' if only_open else ''} ORDER BY id",
        (sweep,),
    )
    return tuple(
        RequestRow(id=id, kind=kind, details=details, who=who, at=at, answer=answer, done_at=done_at)
        for id, kind, details, who, at, answer, done_at in rows
    )


_SWEEPS = """
SELECT s.id AS sweep, r.name, e.name AS experiment, s.project, s.who AS user, r.status, r.reason,
  extract(epoch FROM r.created_at)::float8 AS created, extract(epoch FROM r.ended_at)::float8 AS ended,
  s.decisions, s.seed, s.driver, extract(epoch FROM s.driver_since)::float8 AS driver_since, s.spent, s.facts,
  coalesce((SELECT json_object_agg(status, n ORDER BY status) FROM
    (SELECT status, count(*) AS n FROM trials WHERE sweep_id = s.id GROUP BY status) each), '{{}}') AS trials,
  (SELECT count(*) FROM runs c WHERE c.sweep_id = s.id AND c.deleted_at IS NULL) AS runs
  {more}
FROM sweeps s JOIN runs r ON r.id = s.id JOIN experiments e ON e.id = r.experiment_id
WHERE r.deleted_at IS NULL AND {condition} ORDER BY r.number DESC LIMIT %s OFFSET %s
"""


def sweeps(connection: Connection, *, limit: int, offset: int) -> list[SweepRow]:
    """Newest first."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(_SWEEPS.format(more="", condition="true"), (limit, offset)).fetchall()
    return [SweepRow(**{**row, "status": RunStatus(row["status"])}) for row in rows]


def sweep(connection: Connection, id: str) -> SweepDetail | None:
    """By its full id."""
    with connection.cursor(row_factory=dict_row) as cursor:
        query = _SWEEPS.format(more=", s.settings, s.space", condition="s.id = %s")
        row = cursor.execute(query, (id, 1, 0)).fetchone()
    return None if row is None else SweepDetail(**{**row, "status": RunStatus(row["status"])})


def _columns(names: Sequence[str]) -> str:
    return ", ".join(
        f"extract(epoch FROM {name})::float8 AS {name}" if name in ("started_at", "ended_at") else name
        for name in names
    )


def _one_row(cursor: Cursor, query: str, *values: Any) -> dict[str, Any] | None:
    with cursor.connection.cursor(row_factory=dict_row) as named:
        return named.execute(query, values).fetchone()


def _json(value: Any) -> Json:
    return Json(clean_json(value))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _at(seconds: float | None) -> datetime | None:
    return None if seconds is None else lifecycle.when(seconds)
