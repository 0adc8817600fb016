"""Where the ranks of an attempt run. The driver asks a place and knows no Ray; `on_ray.py` is one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.config import ResourcesConfig, Settings
from orchestrator.execution.sizing import Room
from orchestrator.execution.stacks import Dump
from orchestrator.execution.worker import Plan, Returned
from orchestrator.records import RunSpec, RunTicket
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep


class Tracker(Protocol):
    """What the driver asks of the tracker. Every call may raise ConnectionError or TimeoutError, and those that
    need its database ServiceUnavailable."""

    def open_run(self, spec: RunSpec) -> RunTicket: ...
    def heartbeat(self, run: str, attempt: int) -> bool: ...
    def heartbeats(self, attempts: Sequence[tuple[str, int]]) -> list[bool]:
        """`heartbeat` of many attempts, in their order."""
        ...

    def cancel(self, run: str, user: str = "") -> None: ...
    def halt(self, run: str, attempt: int) -> None:
        """Asks the ranks of this attempt, and nobody else, to save and return; asked again until they have."""
        ...

    def live(self, run: str) -> dict[str, Any]: ...
    def describe(self) -> dict[str, Any]: ...

    # A `sweeps.jobs.Ledger`, too.
    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord: ...
    def sweep_step(self, step: SweepStep) -> Mapping[int, RunTicket]: ...
    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll: ...
    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        """The request's id."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Nodes on which ranks are will be gone soon."""

    why: str
    nodes: tuple[str, ...] = ()
    """Ray's ids."""
    deadline: float = math.inf
    """When, in seconds since 1970."""


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

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        """Where the workers of a run fit now, counting what its own attempt holds as free. `avoid`: ids, names or
        addresses of nodes. After an attempt it waits some seconds until what that had is free. May raise what the
        cluster's client raises when the cluster does not answer."""
        ...

    def notice(self) -> Notice | None:
        """During `fit`: whether nodes of the ranks are taken away. May wait for the cluster, and raise as `room`."""
        ...

    @property
    def is_watched(self) -> bool:
        """Whether the driver shall look whether the ranks of `fit` get on; else the place does it, or nobody."""
        ...

    def stacks(self, ticket: RunTicket) -> Sequence[Dump]:
        """During `fit`: where the ranks of an attempt are in their code, those that do not answer included. Takes
        seconds; may raise as `room`."""
        ...

    def end(self, ticket: RunTicket) -> None:
        """During `fit`: kills its ranks, or what waits for their room, so that it raises."""
        ...

    def network(self) -> str:
        """After `fit`: which of its nodes reach which, in words. Takes ten seconds at most, never raises."""
        ...

    def waits_for(self) -> str:
        """During `fit`: what the ranks lack to begin, in words; '' when they lack nothing. Returns at once."""
        ...

    def close(self) -> None: ...
