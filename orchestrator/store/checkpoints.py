"""The index of checkpoints, corrected by hand or from their storage. What runs say of them comes as facts; facts.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg

from orchestrator.errors import NotFound
from orchestrator.store.cleaning import clean_text
from orchestrator.store.facts import checkpoint_values
from orchestrator.store.lifecycle import Cursor, when

_EMPTY: Mapping[str, Any] = {
    "uri": "", "state": "", "label": "", "metrics": {}, "is_best": False, "is_pinned": False, "manifest_sha256": "",
    "cipher": "", "key_id": "", "resumable": True, "kind": "", "reasons": [], "timings": {},
}  # fmt: skip
"""What a row has where nothing is said: here silence means nothing, not "as it was"."""

_COLUMNS = (
    *("attempt", "uri", "state", "step", "epoch", "label", "metrics", "is_best", "is_pinned", "size_bytes"),
    *("duration", "manifest_sha256", "cipher", "key_id", "resumable", "kind", "world_size", "reasons", "timings"),
)

# A row that is right already is left alone, or every mirror would read it again.
_PUT = f"""
INSERT INTO checkpoints AS c (run_id, id, {", ".join(_COLUMNS)}, who, created_at, updated_at)
VALUES (%(run)s, %(id)s, {", ".join(f"%({name})s" for name in _COLUMNS)}, %(user)s, %(created)s, %(at)s)
ON CONFLICT (run_id, id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)},
  updated_at = excluded.updated_at, xid = pg_current_xact_id()
WHERE ({", ".join(f"c.{name}" for name in _COLUMNS)})
  IS DISTINCT FROM ({", ".join(f"excluded.{name}" for name in _COLUMNS)})
"""


def put(cursor: Cursor, run: str, rows: Sequence[Mapping[str, Any]], *, user: str, at: datetime) -> int:
    """Makes these rows what they are told to be; how many were not. A row is the data of a `checkpoint` fact with
    `attempt` and `created` (seconds since 1970). Raises NotFound for the run."""
    _lock(cursor, run)
    changed = 0
    for row in rows:
        values = checkpoint_values({**_EMPTY, **{name: value for name, value in row.items() if value is not None}})
        values |= {"run": run, "user": clean_text(user), "at": at, "created": when(row["created"])}
        cursor.execute(_PUT, values | {"attempt": int(row["attempt"])})
        changed += cursor.rowcount
    return changed


def mark(cursor: Cursor, run: str, ids: Iterable[str], state: str, *, user: str, at: datetime) -> int:
    """Puts these checkpoints into another state, as far as the index has them; how many were in another one."""
    cursor.execute(
        "UPDATE checkpoints SET state = %s, who = %s, updated_at = %s, xid = pg_current_xact_id()"
        " WHERE run_id = %s AND id = ANY(%s) AND state <> %s",
        (state, clean_text(user), at, run, list(ids), state),
    )
    return cursor.rowcount


def pin(cursor: Cursor, run: str, checkpoint: str, pinned: bool, *, user: str, at: datetime) -> bool:
    """False when the index has no such checkpoint."""
    cursor.execute(
        "UPDATE checkpoints SET is_pinned = %s, who = %s, updated_at = %s, xid = pg_current_xact_id()"
        " WHERE run_id = %s AND id = %s",
        (pinned, clean_text(user), at, run, checkpoint),
    )
    return cursor.rowcount > 0


def registered(connection: psycopg.Connection[Any], run: str) -> dict[str, str]:
    """Ids of the run's checkpoints that a model was made from, each with one of these: "digits version 3"."""
    rows = connection.execute(
        "SELECT v.checkpoint_id, m.name, v.version FROM model_versions v JOIN models m ON m.id = v.model_id"
        " WHERE v.run_id = %s AND v.checkpoint_id IS NOT NULL ORDER BY m.name, v.version",
        (run,),
    )
    return {checkpoint: f"{name} version {version}" for checkpoint, name, version in rows}


def _lock(cursor: Cursor, run: str) -> None:
    """Against a removal at the same time."""
    found = cursor.execute("SELECT 1 FROM runs WHERE id = %s AND deleted_at IS NULL FOR KEY SHARE", (run,)).fetchone()
    if found is None:
        raise NotFound("run", run)
