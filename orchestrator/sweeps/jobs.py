"""What the core gives to whoever runs jobs, and what it hears back; and what it asks of its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from orchestrator.records import RunTicket
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """A job that is recorded and whose attempt is open. Whoever takes it runs it, and says how it ended."""

    job: int
    trial: int
    repeat: int
    rung: int
    ticket: RunTicket
    values: Mapping[str, Any]
    """Dotted key -> value."""
    seed: int
    """`run.seed` of this repeat."""
    until: float | None = None
    judge: Mapping[str, Any] = field(default_factory=dict)
    """What `training.judging.judge` takes; plain JSON."""
    clone: Mapping[str, Any] = field(default_factory=dict)
    """Of the checkpoint of another run that it starts from, see `execution.worker.Plan.clone`; empty: its own newest
    one."""
    restarts: int = 0
    after: float = 0.0
    """Seconds that its ranks wait before they begin, after a failure. The lane is taken meanwhile: what comes next does
    not depend on the pause."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What it does otherwise since an attempt failed: {"splits"}, see `failures.policy.Decision`."""


class Ended(StrEnum):
    """How a job's ranks came back."""

    paused = "paused"
    """At its milestone, with a durable checkpoint."""
    complete = "complete"
    """Its function returned."""
    ended = "ended"
    """A judge ended it: median, patience, target …"""
    stopped = "stopped"
    """It was asked to stop."""
    failed = "failed"
    """Its function raised, or its processes died; `error` says how. The core decides whether it is tried again."""
    lost = "lost"
    """Whoever ran it went away, which is no fault of the trial: it is tried again and not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a job ended, in the words of who ran it."""

    how: Ended
    tally: Mapping[str, Any] = field(default_factory=dict)
    """What rank 0 counted, see `training.judging.Tally.to_json`: {"objectives": [[metric, direction], …], "unit",
    "resource", "last": {metric: value}, "best": {metric: value}, "reports": [[resource, value], …], "n_reports",
    "has_state", "verdict", "reason", "compared": {…}, "checkpoint": {"name", "sha256", "step"}}. Empty where nothing
    was reported, or where a crash left nothing. Of a crash, who ran it may say {"progress": how far it got,
    "micro_batch": its size}."""
    error: Mapping[str, Any] = field(default_factory=dict)
    """{"type", "message", "rank", "traceback", "kind"} as in `failures.classify.Finding.error()`."""
    kind: str = ""
    """Of the failure, see `failures.classify`."""
    reason: str = ""
    is_restart_useful: bool = False
    """Whether it may be mended by another attempt, where `error` says nothing of that."""
    evidence: Sequence[Mapping[str, Any]] = ()
    """What its ranks left behind, `failures.classify.Evidence` as plain values, where another process than the driver's
    has judged it: it knows neither the users' patterns nor the logs."""
    lane: str = ""
    lane_seconds: float = 0.0
    started_at: float | None = None


class Ledger(Protocol):
    """Where decisions are kept before they are carried out: the tracker. Raises SweepTaken when another driver has the
    sweep, ConnectionError and TimeoutError when nobody answers, ServiceUnavailable when its database does not; the same
    step may then be sent again."""

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord: ...
    def sweep_step(self, step: SweepStep) -> Mapping[int, RunTicket]: ...
    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll: ...


class Jobs(Protocol):
    """What whoever runs jobs (the loop of local mode, Tune on Ray) may ask of the core. From one thread."""

    def next_job(self) -> Assigned | None:
        """The next job; None: nothing now. Recorded before it is given out."""
        ...

    def ended(self, job: int, ending: Ending) -> None: ...

    def is_over(self) -> bool:
        """Whether nothing can come any more and nothing runs."""
        ...

    def stop(self, reason: str) -> None:
        """No further jobs; those that run end by the wish to stop that their ranks hear."""
        ...

    def running(self) -> Sequence[Assigned]: ...
