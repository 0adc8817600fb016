"""Where a run stands, and which moves are legal. Apart from records.py, because who only reads runs needs no numpy."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class RunStatus(StrEnum):
    """Where a run (or an attempt) stands. Legal moves are in `TRANSITIONS` and enforced by the database."""

    created = "CREATED"
    queued = "QUEUED"
    running = "RUNNING"
    paused = "PAUSED"
    finished = "FINISHED"
    failed = "FAILED"
    crashed = "CRASHED"
    cancelled = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({RunStatus.finished, RunStatus.failed, RunStatus.crashed, RunStatus.cancelled})

TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.created: frozenset(
        {RunStatus.queued, RunStatus.running, RunStatus.failed, RunStatus.crashed, RunStatus.cancelled}
    ),
    RunStatus.queued: frozenset({RunStatus.running, RunStatus.failed, RunStatus.crashed, RunStatus.cancelled}),
    RunStatus.running: frozenset({RunStatus.paused, RunStatus.queued} | TERMINAL),
    RunStatus.paused: frozenset(
        {RunStatus.running, RunStatus.queued, RunStatus.failed, RunStatus.crashed, RunStatus.cancelled}
    ),
    RunStatus.finished: frozenset({RunStatus.running, RunStatus.queued}),
    RunStatus.failed: frozenset({RunStatus.running, RunStatus.queued}),
    RunStatus.crashed: frozenset(
        {RunStatus.running, RunStatus.queued, RunStatus.finished, RunStatus.failed, RunStatus.cancelled}
    ),
    RunStatus.cancelled: frozenset({RunStatus.running, RunStatus.queued}),
}
"""A resumed run goes from an end back to RUNNING (as a new attempt). CRASHED is a verdict from silence: if the
producer was alive after all and says how it ended, its word counts.
"""
