"""Creating runs and attempts and moving them between states, inside a transaction of the caller's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import psycopg
from psycopg.types.json import Json, Jsonb

from orchestrator.errors import ConfigError, NotFound, RunExists, RunIsActive
from orchestrator.records import TERMINAL, TRANSITIONS, RunSpec, RunStatus, RunTicket
from orchestrator.store.chunks import LATEST_TIME_MS
from orchestrator.store.cleaning import clean_json, clean_name, clean_text, typed
from orchestrator.store.names import is_run_id, run_directory, run_id, run_name

Cursor = psycopg.Cursor[Any]

MOST_EARLIER = 50
"""Failed attempts of which the next one hears."""


class Move(Enum):
    done = "done"
    already = "already"
    """It was in that status before."""
    stale = "stale"
    """A later attempt decides now; only the attempt's own row was changed."""
    illegal = "illegal"


def when(at: float) -> datetime:
    """The time for PostgreSQL; a broken clock's time is moved to the nearer end of 1970 … 9999."""
    seconds = 0.0 if math.isnan(at) else min(max(at, 0.0), LATEST_TIME_MS / 1000)
    return datetime.fromtimestamp(seconds, UTC)


def json_or_null(value: Mapping[str, Any] | None) -> Jsonb | None:
    return None if value is None else Jsonb(clean_json(value))


def open_attempt(cursor: Cursor, spec: RunSpec, now: float, lease_seconds: float) -> RunTicket:
    """The run (new, unless `spec` names or finds one) as RUNNING in its next attempt.

    Raises NotFound, RunIsActive, RunExists.
    """
    at, user = when(now), clean_text(spec.user)
    run = (
        clean_text(spec.run)
        or (_interrupted(cursor, spec) if spec.resume else "")
        or (_started_before(cursor, spec) if spec.new_run else "")
        or _create_run(cursor, spec, at, now)
    )
    found = cursor.execute(
        "SELECT r.attempt, r.name, r.status, r.directory, e.name"
        " FROM runs r JOIN experiments e ON e.id = r.experiment_id WHERE r.id = %s"
        " AND r.deleted_at IS NULL FOR UPDATE OF r",
        (run,),
    ).fetchone()
    if found is None:
        raise NotFound("run", run)
    earlier, name, status, directory, experiment = found
    is_over = status == RunStatus.created or RunStatus(status).is_terminal or earlier == spec.after_attempt
    if not is_over:
        raise RunIsActive(run, status)
    attempt = earlier + 1
    cursor.execute(
        "UPDATE attempts SET status = %s, reason = %s, ended_at = %s, lease_until = NULL, xid = pg_current_xact_id()"
        " WHERE run_id = %s AND ended_at IS NULL",
        (RunStatus.crashed, f"attempt {attempt} took its place", at, run),
    )
    cursor.execute(
        "INSERT INTO attempts"
        " (run_id, attempt, status, who, job, workers, config, config_hash, started_at, lease_until)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            run, attempt, RunStatus.running, user, clean_text(spec.job), spec.workers, json_or_null(spec.config),
            spec.config_hash, at, when(now + lease_seconds),
        ),
    )  # fmt: skip
    cursor.execute(
        "UPDATE runs SET status = %s, reason = '', error = NULL, attempt = %s, workers = %s, job = %s,"
        " config_hash = %s, started_at = coalesce(started_at, %s), ended_at = NULL, updated_at = %s, updated_by = %s,"
        " cancel_requested_at = NULL, cancel_requested_by = '', xid = pg_current_xact_id() WHERE id = %s",
        (RunStatus.running, attempt, spec.workers, clean_text(spec.job), spec.config_hash, at, at, user, run),
    )
    set_params(cursor, run, attempt, user, spec.params)
    set_tags(cursor, run, user, spec.tags)
    if attempt > 1 or spec.alerts:
        _watch(cursor, run, attempt, spec.alerts)
    add_event(
        cursor, run, attempt=attempt, at=at, kind="status", user=user,
        message=f"attempt {attempt}: {status} -> {RunStatus.running}",
        details={"old": status, "new": RunStatus.running},
    )  # fmt: skip
    seconds = _seconds_before(cursor, run, attempt) if attempt > 1 else 0.0
    return RunTicket(run=run, name=name, experiment=experiment, attempt=attempt, directory=directory, seconds=seconds)


def _seconds_before(cursor: Cursor, run: str, attempt: int) -> float:
    found = cursor.execute(
        "SELECT coalesce(sum(extract(epoch FROM ended_at - started_at)), 0) FROM attempts"
        " WHERE run_id = %s AND attempt < %s",
        (run, attempt),
    )
    return float(_one(found))


def failed_before(cursor: Cursor, ticket: RunTicket) -> tuple[Mapping[str, Any], ...]:
    """See RunTicket.earlier. Without what only people read: tracebacks, hints, logs."""
    rows = cursor.execute(
        "SELECT attempt, status, coalesce(error, '{}') - %s::text[] FROM attempts WHERE run_id = %s AND attempt < %s"
        " AND (status = %s OR status = ANY(%s) AND jsonb_typeof(error) = 'object') ORDER BY attempt DESC LIMIT %s",
        (
            ["traceback", "hint", "log", "done"], ticket.run, ticket.attempt, RunStatus.finished.value,
            [RunStatus.failed.value, RunStatus.crashed.value], MOST_EARLIER,
        ),
    ).fetchall()  # fmt: skip
    return tuple(
        {"attempt": attempt, "status": status, "error": _shortened(error)} for attempt, status, error in reversed(rows)
    )


def _shortened(error: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[:1000] if isinstance(value, str) else value for name, value in error.items()}


def _interrupted(cursor: Cursor, spec: RunSpec) -> str:
    """The newest run that did the same work and did not come to its end; '' if there is none."""
    found = cursor.execute(
        "SELECT r.id, r.status FROM runs r JOIN experiments e ON e.id = r.experiment_id"
        " WHERE e.project = %s AND e.name = %s AND r.config_hash = %s AND r.deleted_at IS NULL"
        " ORDER BY r.id DESC LIMIT 1",
        (clean_name(spec.project) or "default", clean_name(spec.experiment) or "default", spec.config_hash),
    ).fetchone()
    return found[0] if found and found[1] != RunStatus.finished else ""


def _started_before(cursor: Cursor, spec: RunSpec) -> str:
    """The run that has the chosen id already, because its job was started again; '' if there is none."""
    if not is_run_id(spec.new_run):
        raise ConfigError("--run-id", spec.new_run, "is no id of a run.", f"One looks like {run_id(0.0)}.")
    found = cursor.execute("SELECT status, config_hash FROM runs WHERE id = %s", (spec.new_run,)).fetchone()
    if found is None:
        return ""
    status, config_hash = found
    if status == RunStatus.finished or config_hash != spec.config_hash:
        raise RunExists(spec.new_run, status)
    return spec.new_run


def _create_run(cursor: Cursor, spec: RunSpec, at: datetime, now: float) -> str:
    project, user = clean_name(spec.project) or "default", clean_text(spec.user)
    experiment = clean_name(spec.experiment) or "default"
    cursor.execute(
        "INSERT INTO experiments (project, name, who, created_at) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (project, experiment, user, at),
    )
    if spec.sweep:
        cursor.execute(
            "INSERT INTO sweeps (id, project, who) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (spec.sweep, project, user),
        )
    number = _one(cursor.execute("SELECT nextval(pg_get_serial_sequence('runs', 'number'))"))
    name = clean_name(spec.name) or run_name(number)
    run = ""
    while not run:  # an id is taken about once in four thousand million runs of one second
        candidate = spec.new_run or run_id(when(now).timestamp())
        made = cursor.execute(
            "INSERT INTO runs (id, number, experiment_id, project, name, description, who, status, workers, seed,"
            " directory, model, dataset, sweep_id, created_at, updated_at, updated_by)"
            " SELECT %s, %s, id, project, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s FROM experiments"
            " WHERE project = %s AND name = %s ON CONFLICT (id) DO NOTHING RETURNING id",
            (
                candidate, number, name, clean_text(spec.description), user, RunStatus.created, spec.workers, spec.seed,
                run_directory(spec.storage_url, experiment, candidate), json_or_null(spec.model),
                json_or_null(spec.dataset), spec.sweep or None, at, at, user, project, experiment,
            ),
        ).fetchone()  # fmt: skip
        run = made[0] if made else ""
        if not run and spec.new_run:
            raise RunIsActive(candidate, RunStatus.created)  # somebody else made it since we looked
    if spec.is_sweep:
        cursor.execute(
            # A driver without a name: what the sweep is made of is said when it opens the sweep.
            "INSERT INTO sweeps (id, project, who, driver) VALUES (%s, %s, %s, '-') ON CONFLICT DO NOTHING",
            (run, project, user),
        )
    if spec.parent:
        linked = cursor.execute(
            "INSERT INTO run_edges (parent_id, child_id, kind, who) SELECT id, %s, 'parent', %s FROM runs WHERE id = %s"
            " RETURNING 1",
            (run, user, spec.parent),
        ).fetchone()
        if linked is None:
            raise NotFound("run", spec.parent)
    return run


def move(
    cursor: Cursor, run: str, attempt: int, new: RunStatus, *, reason: str, error: Mapping[str, Any] | None, user: str,
    at: datetime,
) -> tuple[Move, RunStatus]:  # fmt: skip
    """Moves a run with its attempt, if that is legal; also gives the status it had. Raises NotFound."""
    found = cursor.execute("SELECT status, attempt FROM runs WHERE id = %s FOR UPDATE", (run,)).fetchone()
    if found is None:
        raise NotFound("run", run)
    old, current = RunStatus(found[0]), found[1]
    values: dict[str, Any] = {
        "run": run, "attempt": attempt, "new": new.value, "reason": clean_text(reason), "error": json_or_null(error),
        "at": at, "user": clean_text(user), "ends": new in TERMINAL, "runs": new is RunStatus.running,
        "terminal": [status.value for status in TERMINAL], "crashed": RunStatus.crashed.value,
    }  # fmt: skip
    if attempt != current:
        # The word of a superseded attempt counts for that attempt, unless it has already told its end.
        cursor.execute(
            "UPDATE attempts SET status = %(new)s, reason = %(reason)s, error = %(error)s, ended_at = %(at)s,"
            " lease_until = NULL, xid = pg_current_xact_id() WHERE run_id = %(run)s AND attempt = %(attempt)s"
            " AND %(ends)s AND (status = %(crashed)s OR status <> ALL (%(terminal)s))",
            values,
        )
        return Move.stale, old
    if new is old:
        # Who says the same later may know more about it.
        for table, row in (("runs", "id = %(run)s"), ("attempts", "run_id = %(run)s AND attempt = %(attempt)s")):
            cursor.execute(
                f"UPDATE {table} SET reason = %(reason)s, error = coalesce(error, %(error)s),"
                f" xid = pg_current_xact_id() WHERE {row} AND reason = '' AND %(reason)s <> ''",
                values,
            )
        return Move.already, old
    if new not in TRANSITIONS[old]:
        return Move.illegal, old
    cursor.execute(
        "UPDATE runs SET status = %(new)s, reason = %(reason)s, error = %(error)s, updated_at = %(at)s,"
        " updated_by = %(user)s, started_at = CASE WHEN %(runs)s THEN coalesce(started_at, %(at)s) ELSE started_at END,"
        " ended_at = CASE WHEN %(ends)s THEN %(at)s::timestamptz END, xid = pg_current_xact_id() WHERE id = %(run)s",
        values,
    )
    cursor.execute(
        # Only what runs has a lease; a paused or queued attempt has nobody to renew it.
        "UPDATE attempts SET status = %(new)s, reason = %(reason)s, error = %(error)s,"
        " ended_at = CASE WHEN %(ends)s THEN %(at)s::timestamptz END,"
        " lease_until = CASE WHEN %(runs)s THEN lease_until END, xid = pg_current_xact_id()"
        " WHERE run_id = %(run)s AND attempt = %(attempt)s",
        values,
    )
    add_event(
        cursor, run, attempt=attempt, at=at, kind="status", user=user,
        level="error" if new in (RunStatus.failed, RunStatus.crashed) else "info",
        message=f"{old} -> {new}" + (f": {clean_text(reason)}" if reason else ""), details={"old": old, "new": new},
    )  # fmt: skip
    return Move.done, old


def _watch(cursor: Cursor, run: str, attempt: int, alerts: Mapping[str, Any]) -> None:
    """What is to be told of the run from now on. What was still to be told of the end of the attempt before is dropped:
    it was not the run's end."""
    cursor.execute(
        "DELETE FROM notifications WHERE run_id = %s AND state = 'waiting' AND kind = 'failure' AND tries = 0"
        " AND attempt < %s",
        (run, attempt),
    )
    if alerts:
        cursor.execute(
            "INSERT INTO alert_watches (run_id, attempt, place, alerts) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (run_id) DO UPDATE SET attempt = excluded.attempt, place = excluded.place,"
            " alerts = excluded.alerts, done_at = NULL",
            (run, attempt, clean_text(alerts.get("place", "")), Json(clean_json(dict(alerts)))),
        )


def set_params(cursor: Cursor, run: str, attempt: int, user: str, params: Mapping[str, Any]) -> None:
    rows = []
    for name, value in params.items():
        kind, json, number = typed(value)
        rows.append((run, clean_name(name), kind, Jsonb(json), number, attempt, user))
    if rows:
        cursor.executemany(
            "INSERT INTO params (run_id, name, type, value, number, attempt, who) VALUES (%s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (run_id, name) DO UPDATE SET type = excluded.type, value = excluded.value,"
            " number = excluded.number, attempt = excluded.attempt, who = excluded.who, updated_at = now(),"
            " xid = pg_current_xact_id()",
            rows,
        )


def set_tags(cursor: Cursor, run: str, user: str, tags: Mapping[str, Any]) -> None:
    rows = [(run, clean_name(name), clean_text(value), user) for name, value in tags.items()]
    if rows:
        cursor.executemany(
            "INSERT INTO tags (run_id, name, value, who) VALUES (%s, %s, %s, %s) ON CONFLICT (run_id, name) DO UPDATE"
            " SET value = excluded.value, who = excluded.who, updated_at = now(), xid = pg_current_xact_id()",
            rows,
        )


def add_event(
    cursor: Cursor, run: str, *, attempt: int, at: datetime, kind: str, message: str, rank: int = -1,
    level: str = "info", step: int | None = None, user: str = "", details: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    cursor.execute(
        "INSERT INTO events (run_id, attempt, rank, at, level, kind, message, step, details, who)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            run, attempt, rank, at, level if level in ("debug", "info", "warning", "error") else "info",
            clean_text(kind), clean_text(message), step, Jsonb(clean_json(details or {})), clean_text(user),
        ),
    )  # fmt: skip


def _one(cursor: Cursor) -> Any:
    row = cursor.fetchone()
    assert row is not None
    return row[0]
