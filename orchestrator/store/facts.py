"""Writes facts, in the transaction that moves their producer's watermark. An unusable fact becomes an event."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from orchestrator.config.identity import whole_fingerprint
from orchestrator.records import Fact, FactKind, RunStatus
from orchestrator.store.cleaning import clean_json, clean_name, clean_text
from orchestrator.store.lifecycle import Cursor, Move, add_event, move, set_params, set_tags, when

MAX_BAD_FACT_TEXT = 4000
"""Characters of an unusable fact that its event keeps."""

_BAD_DATA_STATES = ("22", "23", "42", "54", "P0")
"""Classes of SQLSTATE that blame the data, not the server: data, integrity, types, limits, raised."""
_OUR_FAULT_STATES = ("42P01", "42703", "42501")
"""A missing table, column or right is no fault of the fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One fact, still unparsed, with who said it."""

    run: str
    attempt: int
    rank: int
    user: str
    raw: Any


def apply(connection: psycopg.Connection[Any], facts: Sequence[Said]) -> None:
    """Writes them in order. First all at once; if one of them is bad, each behind a savepoint of its own."""
    if not facts:
        return
    with connection.cursor() as cursor:
        try:
            with connection.transaction():
                for said in facts:
                    _write(cursor, said)
            return
        except Exception as error:
            if not _is_bad_data(error):
                raise
        for said in facts:
            try:
                with connection.transaction():
                    _write(cursor, said)
            except Exception as error:
                if not _is_bad_data(error):
                    raise
                _complain(cursor, said, error)


def _is_bad_data(error: Exception) -> bool:
    if isinstance(error, psycopg.Error):
        state = error.sqlstate or ""
        # psycopg itself raises DataError without a SQLSTATE for what it cannot send
        return (state[:2] in _BAD_DATA_STATES and state not in _OUR_FAULT_STATES) or (
            not state and isinstance(error, psycopg.DataError | psycopg.ProgrammingError)
        )
    return isinstance(error, ValueError | TypeError | LookupError | AttributeError | ArithmeticError | RecursionError)


def _complain(cursor: Cursor, said: Said, error: Exception) -> None:
    raw = said.raw if isinstance(said.raw, str) else json.dumps(said.raw, default=str)
    at = said.raw.get("at") if isinstance(said.raw, dict) else None
    kind = said.raw.get("kind") if isinstance(said.raw, dict) else None
    why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]
    add_event(
        cursor, said.run, attempt=said.attempt, rank=said.rank, at=when(at if isinstance(at, int | float) else 0.0),
        level="warning", kind="bad_fact", user=said.user,
        message=f"a {clean_text(kind)[:50]} fact cannot be recorded: {why}",
        details={"fact": clean_text(raw)[:MAX_BAD_FACT_TEXT], "error": why},
    )  # fmt: skip


def _write(cursor: Cursor, said: Said) -> None:
    fact = Fact.from_json(said.raw)
    data, at = fact.data, when(fact.at)
    who = {"run": said.run, "attempt": said.attempt, "user": said.user, "at": at}
    match fact.kind:
        case FactKind.param:
            set_params(cursor, said.run, said.attempt, said.user, {_name(data["name"]): data["value"]})
        case FactKind.tag:
            set_tags(cursor, said.run, said.user, {_name(data["name"]): data["value"]})
        case FactKind.note:
            cursor.execute(
                "INSERT INTO notes (run_id, body, who, created_at) VALUES (%(run)s, %(body)s, %(user)s, %(at)s)",
                who | {"body": clean_text(data["text"])},
            )
        case FactKind.event:
            details = data.get("details") or {}
            add_event(
                cursor, said.run, attempt=said.attempt, rank=said.rank, at=at, level=str(data.get("level", "info")),
                kind=_name(data["kind"]), message=data.get("message", ""), step=_integer(data.get("step")),
                user=said.user,
                details=details if isinstance(details, dict) else {"details": details},
            )  # fmt: skip
        case FactKind.metric:
            _declare(cursor, said, data, at)
        case FactKind.artifact:
            cursor.execute(
                _ARTIFACT,
                who | {
                    "name": _name(data["name"]), "uri": _text(data.get("uri")),
                    "media_type": _text(data.get("media_type")),
                    "size_bytes": _integer(data.get("size_bytes")), "sha256": _text(data.get("sha256")),
                    "step": _integer(data.get("step")),
                },
            )  # fmt: skip
        case FactKind.checkpoint:
            cursor.execute(_CHECKPOINT, who | checkpoint_values(data))
        case FactKind.status:
            _move(cursor, said, RunStatus(data["status"]), data, fact)
        case FactKind.provenance:
            _add_provenance(cursor, who, clean_json(dict(data)))


def checkpoint_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a checkpoint's row; None for what is not said. Raises ValueError or TypeError for what cannot be
    one."""
    reasons, metrics, timings = (data.get(name) for name in ("reasons", "metrics", "timings"))
    return {
        "id": _name(data["id"]),
        **{name: _text(data.get(name)) for name in _CHECKPOINT_TEXTS},
        **{name: _integer(data.get(name)) for name in ("step", "epoch", "size_bytes", "world_size")},
        **{
            name: None if data.get(name) is None else bool(data[name]) for name in ("is_best", "is_pinned", "resumable")
        },
        "metrics": None if metrics is None else Jsonb(clean_json(dict(metrics))),
        "timings": None if timings is None else Jsonb(clean_json(dict(timings))),
        "reasons": None if reasons is None else Jsonb([clean_text(reason) for reason in reasons]),
        "duration": None if data.get("duration") is None else float(data["duration"]),
    }


def _declare(cursor: Cursor, said: Said, data: Mapping[str, Any], at: datetime) -> None:
    """What a metric means. Keys belong to all runs, and the latest declaration counts for all of them; one that
    contradicts an earlier one is an event of the run that makes it. What is known already is not written again, because
    every run declares the same."""
    name, told = _name(data["name"]), {key: _text(data.get(key)) for key in ("unit", "direction", "reduction")}
    known = cursor.execute("SELECT unit, direction, reduction FROM metric_keys WHERE name = %s", (name,)).fetchone()
    before = dict(zip(told, known or ("", "", ""), strict=True))
    news = {key: value for key, value in told.items() if value is not None and value != before[key]}
    if known is not None and not news:
        return
    cursor.execute(_METRIC, {"name": name} | told)
    contradicted = {key: [before[key], value] for key, value in news.items() if before[key]}
    if contradicted:
        what = ", ".join(f"{key} was {old!r}, is now {new!r}" for key, (old, new) in contradicted.items())
        add_event(
            cursor, said.run, attempt=said.attempt, rank=said.rank, at=at, level="warning", kind="metric_redeclared",
            user=said.user, message=f"{name}: {what}, for all runs", details={"metric": name, **contradicted},
        )  # fmt: skip


PARTWISE = ("ranks", "datasets", "fingerprint")
"""Parts of a provenance to which several facts add: one rank each, one dataset each, one hash each."""


def _add_provenance(cursor: Cursor, who: dict[str, Any], data: dict[str, Any]) -> None:
    """Adds to what the driver and other ranks said. Each statement reads and writes under the row's lock, so facts of
    several producers may come in any order and at the same time.
    """
    parts = {name: data[name] for name in PARTWISE if isinstance(data.get(name), dict)}
    if "datasets" in parts:  # first, because whoever locks both rows begins with the run's
        cursor.execute(_DATASETS, who | {"more": Jsonb(parts["datasets"])})
    whole = {name: value for name, value in data.items() if name not in parts}
    row = cursor.execute(_PROVENANCE, who | {"whole": Jsonb(whole), "parts": Jsonb(parts)}).fetchone()
    if row is not None and isinstance(row[0], dict) and (run := whole_fingerprint(row[0])) != row[0].get("run"):
        cursor.execute(_PROVENANCE, who | {"whole": Jsonb({}), "parts": Jsonb({"fingerprint": {"run": run}})})


def _move(cursor: Cursor, said: Said, new: RunStatus, data: Any, fact: Fact) -> None:
    at, reason, error = when(fact.at), _text(data.get("reason")) or "", data.get("error")
    error = error if isinstance(error, dict) or error is None else {"message": error}
    outcome, old = move(
        cursor, said.run, said.attempt, new, reason=reason, error=error, user=said.user, at=at
    )  # fmt: skip
    if outcome in (Move.done, Move.already):
        return
    why = f"{old} cannot become {new}" if outcome is Move.illegal else f"attempt {said.attempt} is not the current one"
    add_event(
        cursor, said.run, attempt=said.attempt, rank=said.rank, at=at, level="warning", kind="status_ignored",
        user=said.user, message=f"{new} was not taken: {why}",
        details={"status": new, "reason": reason, "error": error},
    )  # fmt: skip


def _name(value: Any) -> str:
    """Names are text and not empty."""
    if not isinstance(value, str) or not clean_text(value):
        raise ValueError(f"{value!r} is no name")
    return clean_name(value)


def _text(value: Any) -> str | None:
    return None if value is None else clean_text(value)


def _integer(value: Any) -> int | None:
    if value is None:
        return None
    number = int(value)
    if number != value or not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{value!r} is no 64-bit integer")
    return number


_PROVENANCE = """
UPDATE attempts SET xid = pg_current_xact_id(), provenance = provenance || %(whole)s || coalesce((
  SELECT jsonb_object_agg(part.key, CASE jsonb_typeof(provenance -> part.key)
    WHEN 'object' THEN (provenance -> part.key) || part.value ELSE part.value END)
  FROM jsonb_each(%(parts)s) part), '{}')
WHERE run_id = %(run)s AND attempt = %(attempt)s
RETURNING provenance -> 'fingerprint'
"""

_DATASETS = """
UPDATE runs SET dataset = dataset || %(more)s, xid = pg_current_xact_id(), updated_at = %(at)s, updated_by = %(user)s
WHERE id = %(run)s AND attempt = %(attempt)s
"""

# What is not said stays as it is.
_METRIC = """
INSERT INTO metric_keys AS k (name, unit, direction, reduction)
VALUES (%(name)s, coalesce(%(unit)s, ''), coalesce(%(direction)s, ''), coalesce(%(reduction)s, ''))
ON CONFLICT (name) DO UPDATE SET
  unit = coalesce(%(unit)s, k.unit), direction = coalesce(%(direction)s, k.direction),
  reduction = coalesce(%(reduction)s, k.reduction)
"""

_ARTIFACT = """
INSERT INTO artifacts AS a (run_id, name, step, attempt, uri, media_type, size_bytes, sha256, who, created_at)
VALUES (%(run)s, %(name)s, %(step)s, %(attempt)s, coalesce(%(uri)s, ''), coalesce(%(media_type)s, ''), %(size_bytes)s,
        coalesce(%(sha256)s, ''), %(user)s, %(at)s)
ON CONFLICT (run_id, name, step) DO UPDATE SET
  attempt = excluded.attempt, uri = coalesce(%(uri)s, a.uri), media_type = coalesce(%(media_type)s, a.media_type),
  size_bytes = coalesce(excluded.size_bytes, a.size_bytes), sha256 = coalesce(%(sha256)s, a.sha256),
  who = excluded.who, created_at = excluded.created_at, xid = pg_current_xact_id()
"""

_CHECKPOINT_TEXTS = ("uri", "state", "label", "manifest_sha256", "cipher", "key_id", "kind")

# What was deleted or set aside stays so when an older word about the same bytes comes late.
_CHECKPOINT = """
INSERT INTO checkpoints AS c (run_id, id, attempt, uri, state, step, epoch, label, metrics, is_best, is_pinned,
  size_bytes, duration, manifest_sha256, cipher, key_id, resumable, kind, world_size, reasons, timings, who, created_at,
  updated_at)
VALUES (%(run)s, %(id)s, %(attempt)s, coalesce(%(uri)s, ''), coalesce(%(state)s, ''), %(step)s, %(epoch)s,
  coalesce(%(label)s, ''), coalesce(%(metrics)s, '{}'::jsonb), coalesce(%(is_best)s, false),
  coalesce(%(is_pinned)s, false), %(size_bytes)s, %(duration)s, coalesce(%(manifest_sha256)s, ''),
  coalesce(%(cipher)s, ''), coalesce(%(key_id)s, ''), coalesce(%(resumable)s, true), coalesce(%(kind)s, ''),
  %(world_size)s, %(reasons)s, %(timings)s, %(user)s, %(at)s, %(at)s)
ON CONFLICT (run_id, id) DO UPDATE SET
  uri = coalesce(%(uri)s, c.uri),
  state = CASE WHEN c.state IN ('deleted', 'quarantined') AND %(state)s::text NOT IN ('deleted', 'quarantined')
    AND coalesce(%(manifest_sha256)s, c.manifest_sha256) = c.manifest_sha256 THEN c.state
    ELSE coalesce(%(state)s, c.state) END,
  step = coalesce(excluded.step, c.step),
  epoch = coalesce(excluded.epoch, c.epoch), label = coalesce(%(label)s, c.label),
  metrics = coalesce(%(metrics)s, c.metrics), is_best = coalesce(%(is_best)s, c.is_best),
  is_pinned = coalesce(%(is_pinned)s, c.is_pinned), size_bytes = coalesce(excluded.size_bytes, c.size_bytes),
  duration = coalesce(excluded.duration, c.duration),
  manifest_sha256 = coalesce(%(manifest_sha256)s, c.manifest_sha256),
  cipher = coalesce(%(cipher)s, c.cipher), key_id = coalesce(%(key_id)s, c.key_id),
  resumable = coalesce(%(resumable)s, c.resumable), kind = coalesce(%(kind)s, c.kind),
  world_size = coalesce(excluded.world_size, c.world_size), reasons = coalesce(excluded.reasons, c.reasons),
  timings = coalesce(excluded.timings, c.timings), who = excluded.who,
  updated_at = excluded.updated_at, xid = pg_current_xact_id()
"""
