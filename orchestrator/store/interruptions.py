"""Runs whose last attempt ended in a way that may be nobody's wish: what `orc keep` judges."""

from __future__ import annotations

from typing import Any

import psycopg

from orchestrator.records import RunStatus
from orchestrator.store.views import Interrupted

_QUESTION = """
SELECT r.id, r.name, r.attempt, r.status, r.job, s.id IS NOT NULL, r.cancel_requested_at IS NOT NULL,
       a.error IS NOT NULL, a.error -> 'decision', extract(epoch FROM a.started_at)::float8,
       extract(epoch FROM r.ended_at)::float8, coalesce(a.config #>> '{run,keep}', '') = 'true',
       coalesce(a.provenance ->> 'directory', ''), coalesce(a.provenance ->> 'host', ''),
       coalesce((a.provenance ->> 'pid')::int, 0)
FROM runs r
JOIN attempts a ON a.run_id = r.id AND a.attempt = r.attempt
LEFT JOIN sweeps s ON s.id = r.id AND s.driver <> ''
WHERE r.status = ANY (%s) AND r.deleted_at IS NULL AND r.ended_at >= to_timestamp(%s)
  AND NOT EXISTS (SELECT 1 FROM sweeps t WHERE t.id = r.sweep_id AND t.driver <> '')
ORDER BY r.number
"""


def interrupted(connection: psycopg.Connection[Any], since: float) -> list[Interrupted]:
    """CRASHED and FAILED since then (seconds since 1970), oldest first, without trials: they go on with their sweep."""
    rows = connection.execute(_QUESTION, ([RunStatus.crashed.value, RunStatus.failed.value], since))
    return [
        Interrupted(
            run=run, name=name, attempt=attempt, status=RunStatus(status), job=job, is_sweep=is_sweep,
            is_asked_to_stop=asked, has_error=has_error, action=str((decision or {}).get("action", "")),
            after=float((decision or {}).get("after", 0.0)), started=started, ended=ended, is_kept=is_kept,
            directory=directory, host=host, pid=pid,
        )
        for run, name, attempt, status, job, is_sweep, asked, has_error, decision, started, ended, is_kept, directory,
        host, pid in rows
    ]  # fmt: skip
