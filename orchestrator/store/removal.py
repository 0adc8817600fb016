"""Removing a run for good.

All of a run's rows go in one transaction but two kinds: its own row becomes a marker (`deleted_at`), and its
producers keep their watermarks. So a spool that comes late is acknowledged and dropped (see transaction.py): it
neither brings the run back nor waits for it for ever. The marker keeps the run's directory until that is gone, too,
so whoever removes a run again finishes what a crash left.

With the parent run of a sweep go its decisions, trials and jobs, once the runs of all trials are gone. What a trial
came to stays in the sweep when its run is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from orchestrator.errors import NotFound, RunIsActive
from orchestrator.records import RunStatus
from orchestrator.store.cleaning import clean_text
from orchestrator.store.errors import ModelDependsOnRun, SweepHasTrials
from orchestrator.store.lifecycle import Cursor

LOCK_WAIT = "60s"
"""For whoever is copying the run (to its directory, to a bundle) or writing to it."""

# In this order: what refers to another row goes before it.
_BY_RUN = (
    "artifacts", "checkpoints", "events", "notes", "tags", "params", "queue", "sink_cursors", "notifications", "alerts",
    "alert_watches", "attempts",
)  # fmt: skip
_BY_NUMBER = ("metric_chunks", "metric_levels", "metric_summaries")


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfRemoved:
    """A run whose rows are gone and whose files may be there still."""

    run: str
    name: str
    directory: str


def lock_name(run: str) -> str:
    """Of the advisory lock that readers of the whole run share and its removal takes alone."""
    return f"orc.run.{run}"


def remove(cursor: Cursor, run: str, *, user: str, at: datetime, force: bool) -> None:
    """Removes the rows; does nothing when that was done before. Raises NotFound, RunIsActive, ModelDependsOnRun,
    SweepHasTrials."""
    cursor.execute("SELECT set_config('lock_timeout', %s, true)", (LOCK_WAIT,))
    cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (lock_name(run),))
    # Producers before the run, as commits do it: so none of these is in the middle of a commit, and the next one sees
    # the marker.
    cursor.execute("SELECT 1 FROM producers WHERE run_id = %s ORDER BY uuid FOR UPDATE", (run,))
    found = cursor.execute("SELECT number, status, deleted_at FROM runs WHERE id = %s FOR UPDATE", (run,)).fetchone()
    if found is None:
        raise NotFound("run", run)
    number, status, deleted_at = found
    if deleted_at is not None:
        return
    if not (RunStatus(status).is_terminal or force):
        raise RunIsActive(run, status)
    model = cursor.execute(
        "SELECT m.name, v.version FROM model_versions v JOIN models m ON m.id = v.model_id WHERE v.run_id = %s LIMIT 1",
        (run,),
    ).fetchone()
    if model is not None:
        raise ModelDependsOnRun(run, f"{model[0]} version {model[1]}")
    trials = trial_runs(cursor, run)
    if trials:
        raise SweepHasTrials(run, len(trials))
    cursor.execute("DELETE FROM sweeps WHERE id = %s", (run,))
    for table in _BY_NUMBER:
        cursor.execute(f"DELETE FROM {table} WHERE run_number = %s", (number,))
    for table in _BY_RUN:
        cursor.execute(f"DELETE FROM {table} WHERE run_id = %s", (run,))
    cursor.execute("DELETE FROM run_edges WHERE child_id = %(run)s OR parent_id = %(run)s", {"run": run})
    for table in ("trials", "sweep_jobs"):
        cursor.execute(f"UPDATE {table} SET run_id = NULL WHERE run_id = %s", (run,))
    cursor.execute(
        # Where something of it still works, it is asked to stop.
        "UPDATE runs SET deleted_at = %(at)s, updated_at = %(at)s, updated_by = %(user)s, description = '',"
        " reason = '', error = NULL, model = '{}', dataset = '{}', dataset_version_id = NULL, sweep_id = NULL,"
        " links = '{}', config_hash = '', status = CASE WHEN %(active)s THEN %(cancelled)s ELSE status END,"
        " cancel_requested_at = CASE WHEN %(active)s THEN %(at)s::timestamptz ELSE cancel_requested_at END,"
        " ended_at = coalesce(ended_at, %(at)s), xid = pg_current_xact_id() WHERE id = %(run)s",
        {
            "run": run, "at": at, "user": clean_text(user), "active": not RunStatus(status).is_terminal,
            "cancelled": RunStatus.cancelled.value,
        },
    )  # fmt: skip


def trial_runs(cursor: Cursor, sweep: str) -> list[str]:
    """The runs of a sweep's trials, oldest first."""
    rows = cursor.execute(
        "SELECT id FROM runs WHERE sweep_id = %s AND id <> %s AND deleted_at IS NULL ORDER BY number", (sweep, sweep)
    )
    return [row[0] for row in rows]


def half_removed(cursor: Cursor, run: str) -> HalfRemoved | None:
    """By the full id: a run whose directory is still to be removed."""
    found = cursor.execute(
        "SELECT id, name, directory FROM runs WHERE id = %s AND deleted_at IS NOT NULL AND directory <> ''", (run,)
    ).fetchone()
    return None if found is None else HalfRemoved(run=found[0], name=found[1], directory=found[2])


def finish(cursor: Cursor, run: str) -> None:
    """Its files are gone, or are nobody's business any more."""
    cursor.execute("UPDATE runs SET directory = '' WHERE id = %s AND deleted_at IS NOT NULL", (run,))
