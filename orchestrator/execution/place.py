"""Where the ranks of an attempt run. The driver asks a place and knows no Ray; `on_ray.py` is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from orchestrator.config import Settings
from orchestrator.execution.worker import Plan, Returned
from orchestrator.records import RunSpec, RunTicket
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep


class Tracker(Protocol):
    """What the driver asks of the tracker. Every call may raise ConnectionError or TimeoutError."""

    def open_run(self, spec: RunSpec) -> RunTicket: ...
    def heartbeat(self, run: str, attempt: int) -> bool: ...
    def heartbeats(self, attempts: Sequence[tuple[str, int]]) -> list[bool]:
        """`heartbeat` of many attempts, in their order."""
        ...

    def cancel(self, run: str, user: str = "") -> None: ...
    def live(self, run: str) -> dict[str, Any]: ...
    def describe(self) -> dict[str, Any]: ...

    # A `sweeps.jobs.Ledger`, too.
    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord: ...
    def sweep_step(self, step: SweepStep) -> Mapping[int, RunTicket]: ...
    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll: ...
    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        """The request's id."""
        ...


class Place(Protocol):
    """Open until `close`. `check` comes before a run exists, `fit` once per attempt."""

    @property
    def name(self) -> str:
        """`ray` or `local`."""
        ...

    @property
    def tracker(self) -> Tracker: ...

    @property
    def job(self) -> str:
        """Under which id Ray knows this driver (a submission's, else a job's); '' where there is no Ray."""
        ...

    def check(self, settings: Settings) -> None:
        """Raises ConfigError when a run with these settings could never start here."""
        ...

    def resources(self) -> Mapping[str, Any]:
        """What there is, as plain values for the record: nodes with host, cpus, gpus, memory_gb."""
        ...

    def fit(self, plan: Plan, settings: Settings) -> Returned:
        """Trains on all ranks. Blocks; returns what rank 0 did. Raises RanksFailed."""
        ...

    def waits_for(self) -> str:
        """During `fit`: what the ranks lack to begin, in words; '' when they lack nothing. Returns at once."""
        ...

    def close(self) -> None: ...
