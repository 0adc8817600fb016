"""Alerts and the outbox of notifications. An alert, its event and what is to be sent because of it are one transaction,
so a crash leaves all or nothing of it, and a second try adds nothing: notifications have unique keys.

Who sends: the tracker whose `place` a notification has, because it alone knows the addresses. It claims one for some
seconds; what it claimed and did not settle is claimed again. Times are the tracker's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Json

from orchestrator.alert_records import (
    AlertRow,
    Claimed,
    Notice,
    NotificationRow,
    Posting,
    TurnRow,
    Watched,
)
from orchestrator.store.cleaning import clean_json, clean_text
from orchestrator.store.lifecycle import Cursor, add_event, when

Connection = psycopg.Connection[Any]

FIRED, RESOLVED = "alert_fired", "alert_resolved"
NOTIFIED, NOT_NOTIFIED = "notified", "notification_failed"
"""Kinds of events."""


def watched(connection: Connection, place: str) -> list[Watched]:
    """Runs of which not everything is told. Those of a tracker that never comes back stay."""
    rows = connection.execute(
        "SELECT w.run_id, w.attempt, r.name, e.name, r.status, r.reason, r.error,"
        " extract(epoch FROM r.ended_at)::float8, w.alerts"
        " FROM alert_watches w JOIN runs r ON r.id = w.run_id JOIN experiments e ON e.id = r.experiment_id"
        " WHERE w.place = %s AND w.done_at IS NULL AND r.attempt = w.attempt AND r.deleted_at IS NULL"
        " ORDER BY w.created_at",
        (place,),
    )
    names = ("run", "attempt", "name", "experiment", "status", "reason", "error", "ended_at", "alerts")
    return [Watched(**dict(zip(names, row, strict=True))) for row in rows]


def names_of(connection: Connection, runs: Collection[str]) -> dict[str, tuple[str, str]]:
    """Name and experiment of each run."""
    rows = connection.execute(
        "SELECT r.id, r.name, e.name FROM runs r JOIN experiments e ON e.id = r.experiment_id WHERE r.id = ANY(%s)",
        (list(runs),),
    )
    return {run: (name, experiment) for run, name, experiment in rows}


def put_turn(cursor: Cursor, turn: TurnRow, place: str) -> None:
    """One alert that fired or was resolved. Nothing if the run is gone."""
    alert = turn.alert
    if not _is_there(cursor, alert.run):
        return
    changed = cursor.execute(
        "INSERT INTO alerts AS a (run_id, rule, rank, key, attempt, is_firing, number, level, message, value, step,"
        " fired_at, resolved_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (run_id, rule, rank, key) DO UPDATE SET attempt = excluded.attempt,"
        " is_firing = excluded.is_firing, number = excluded.number, level = excluded.level,"
        " message = excluded.message, value = excluded.value, step = excluded.step, fired_at = excluded.fired_at,"
        " resolved_at = excluded.resolved_at"
        " WHERE (a.number, NOT a.is_firing) < (excluded.number, NOT excluded.is_firing) RETURNING 1",
        (
            alert.run, clean_text(alert.rule), alert.rank, clean_text(alert.key), alert.attempt, alert.is_firing,
            alert.number, alert.level, clean_text(alert.message), alert.value, alert.step, when(alert.fired_at),
            None if alert.resolved_at is None else when(alert.resolved_at),
        ),
    ).fetchone()  # fmt: skip
    if changed is None:
        return  # a transaction whose answer was lost had said all of it
    ends = alert.resolved_at is not None
    add_event(
        cursor, alert.run, attempt=alert.attempt, rank=alert.rank, at=when(turn.at), step=alert.step,
        kind=RESOLVED if ends and not turn.details.get("is_instant") else FIRED,
        level="info" if ends and not turn.details.get("is_instant") else alert.level,
        message=f"{alert.rule}: {alert.message}",
        details={"rule": alert.rule, "key": alert.key, "number": alert.number, "value": alert.value},
    )  # fmt: skip
    post(cursor, turn.postings, place, now=turn.at)


def post(cursor: Cursor, postings: Sequence[Posting], place: str, *, now: float) -> None:
    """Puts notices into the outbox; what is there already stays as it is. Those of a run that is gone are dropped."""
    for posting in postings:
        notice = posting.notice
        cursor.execute(
            "INSERT INTO notifications (run_id, attempt, key, subject, place, channel, notifier, kind, notice, next_at)"
            " SELECT id, %s, %s, %s, %s, %s, %s, %s, %s, %s FROM runs WHERE id = %s AND deleted_at IS NULL"
            " ON CONFLICT (channel, key) DO NOTHING",
            (
                notice.attempt, clean_text(notice.key), clean_text(notice.subject), place, posting.channel,
                posting.notifier, notice.kind, Json(clean_json(asdict(notice))), when(max(now, posting.after)),
                notice.run,
            ),
        )  # fmt: skip


def end_watch(cursor: Cursor, run: str, attempt: int) -> None:
    cursor.execute(
        "UPDATE alert_watches SET done_at = now() WHERE run_id = %s AND attempt <= %s AND done_at IS NULL",
        (run, attempt),
    )


def event_of(
    cursor: Cursor, run: str, *, attempt: int, kind: str, level: str, message: str, now: float,
    details: Mapping[str, Any],
) -> None:  # fmt: skip
    """Nothing if the run is gone."""
    if _is_there(cursor, run):
        add_event(
            cursor, run, attempt=attempt, at=when(now), kind=kind, level=level, message=message, details=details
        )  # fmt: skip


def claim(
    connection: Connection, place: str, *, now: float, lease: float, busy: Collection[str], most: int
) -> list[Claimed]:
    """The oldest due ones, at most one of each channel, none of those that are busy. They are claimed for `lease`
    seconds. One waits for an older one about the same subject."""
    rows = connection.execute(
        "UPDATE notifications n SET tries = tries + 1, next_at = %(until)s FROM ("
        "  SELECT DISTINCT ON (channel) id FROM notifications w"
        "  WHERE place = %(place)s AND state = 'waiting' AND next_at <= %(now)s AND channel <> ALL (%(busy)s)"
        "   AND NOT EXISTS (SELECT FROM notifications o WHERE o.channel = w.channel AND o.subject = w.subject"
        "    AND o.id < w.id AND o.state = 'waiting')"
        "  ORDER BY channel, id LIMIT %(most)s) due"
        " WHERE n.id = due.id RETURNING n.id, n.channel, n.notifier, n.tries, n.notice",
        {"place": place, "now": when(now), "until": when(now + lease), "busy": list(busy), "most": most},
    ).fetchall()
    return [
        Claimed(id=id_, channel=channel, notifier=notifier, tries=tries, notice=Notice(**notice))
        for id_, channel, notifier, tries, notice in sorted(rows)
    ]


def next_due(connection: Connection, place: str) -> float | None:
    """When the next one is due, seconds since 1970; None if nothing waits."""
    row = connection.execute(
        "SELECT extract(epoch FROM min(next_at))::float8 FROM notifications WHERE place = %s AND state = 'waiting'",
        (place,),
    ).fetchone()
    return row[0] if row else None


def release(connection: Connection, place: str, *, now: float) -> None:
    """What the process before us had claimed and not settled is due at once."""
    connection.execute(
        "UPDATE notifications SET next_at = %s WHERE place = %s AND state = 'waiting' AND tries > 0 AND next_at > %s",
        (when(now), place, when(now)),
    )


def sent(cursor: Cursor, claimed: Claimed, *, now: float) -> None:
    _settle(cursor, claimed, "sent", "", now)
    again = f" (try {claimed.tries})" if claimed.tries > 1 else ""
    _tell(cursor, claimed, NOTIFIED, "info", f"{claimed.notifier} was told{again}: {claimed.notice.title}", now)


def try_again(cursor: Cursor, claimed: Claimed, error: str, *, at: float) -> None:
    cursor.execute(
        "UPDATE notifications SET next_at = %s, error = %s WHERE id = %s AND state = 'waiting'",
        (when(at), clean_text(error), claimed.id),
    )


def given_up(cursor: Cursor, claimed: Claimed, error: str, *, now: float) -> None:
    _settle(cursor, claimed, "failed", error, now)
    times = f"{claimed.tries} tries" if claimed.tries > 1 else "one try"
    text = f"{claimed.notifier} could not be told after {times} ({error}): {claimed.notice.title}"
    _tell(cursor, claimed, NOT_NOTIFIED, "error", text, now)


def _settle(cursor: Cursor, claimed: Claimed, state: str, error: str, now: float) -> None:
    cursor.execute(
        "UPDATE notifications SET state = %s, error = %s, done_at = %s WHERE id = %s AND state = 'waiting'",
        (state, clean_text(error), when(now), claimed.id),
    )


def _tell(cursor: Cursor, claimed: Claimed, kind: str, level: str, message: str, now: float) -> None:
    notice = claimed.notice
    event_of(
        cursor, notice.run, attempt=notice.attempt, kind=kind, level=level, message=message, now=now,
        details={"notifier": claimed.notifier, "kind": notice.kind, "key": notice.key, "tries": claimed.tries},
    )  # fmt: skip


def _is_there(cursor: Cursor, run: str) -> bool:
    """Whether it was not removed; it is not while this transaction goes on."""
    found = cursor.execute("SELECT 1 FROM runs WHERE id = %s AND deleted_at IS NULL FOR KEY SHARE", (run,))
    return found.fetchone() is not None


# -- reading -----------------------------------------------------------------------------------------------------------


def alerts(
    connection: Connection, *, runs: Collection[str] | None, only_firing: bool, limit: int
) -> tuple[AlertRow, ...]:
    """Newest firing first."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            "SELECT run_id AS run, rule, rank, key, attempt, is_firing, number, level, message, value, step,"
            " extract(epoch FROM fired_at)::float8 AS fired_at, extract(epoch FROM resolved_at)::float8 AS resolved_at"
            " FROM alerts WHERE (is_firing OR NOT %(only)s) AND (%(all)s OR run_id = ANY(%(runs)s))"
            " ORDER BY alerts.fired_at DESC, run_id, rule, rank, key LIMIT %(limit)s",
            {"only": only_firing, "all": runs is None, "runs": list(runs or ()), "limit": limit},
        ).fetchall()
    return tuple(AlertRow(**row) for row in rows)


def notifications(
    connection: Connection, *, run: str | None, only_unsent: bool, limit: int
) -> tuple[NotificationRow, ...]:
    """Newest first."""
    rows = connection.execute(
        "SELECT run_id, notifier, kind, notice ->> 'title', state, tries, error,"
        " extract(epoch FROM created_at)::float8 FROM notifications"
        " WHERE (state <> 'sent' OR NOT %(only)s) AND (%(all)s OR run_id = %(run)s) ORDER BY id DESC LIMIT %(limit)s",
        {"only": only_unsent, "all": run is None, "run": run, "limit": limit},
    )
    names = ("run", "notifier", "kind", "title", "state", "tries", "error", "created")
    return tuple(NotificationRow(**dict(zip(names, row, strict=True))) for row in rows)
