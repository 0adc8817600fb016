"""What a sweep's driver and its ledger, the database behind the tracker, say to each other.

The decisions of a sweep are its truth: whoever folds them knows all that its driver knew. Trials and jobs are rows made
from them, for people and for questions. All values are plain, frozen and survive JSON; NaN and infinities are text in
JSON (`sweeps.values`), scores that are no finite number are None here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `orc ls` reads these rows, and starts without numpy
    from orchestrator.records import RunSpec, RunTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpec:
    """What a sweep is made of. Its id is that of its parent run, which must exist."""

    sweep: str
    project: str = "default"
    who: str = ""
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The `sweep` section of the configuration, as given at the start."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """`Space.to_json()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """One numbered decision. Decisions are never changed and never removed."""

    seq: int
    kind: str
    trial: int | None = None
    job: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """All that it read. Left out when a sweep is opened: only who verifies needs it."""
    outcome: Mapping[str, Any] = field(default_factory=dict)
    at: float = 0.0
    """Seconds since 1970, filled by the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """How a trial stands. Written whole whenever it changes."""

    number: int
    values: Mapping[str, Any]
    status: str
    """See sweeps.state.Status."""
    is_held: bool = False
    origin: str = ""
    config_hash: str = ""
    run: str = ""
    """The run of its repeat 0."""
    rung: int = -1
    """The highest it was sent to."""
    resource: float = 0.0
    """Epochs, reports or steps that it has had."""
    score: float | None = None
    """Mean over the repeats at the highest rung with a score."""
    spread: float | None = None
    """Sample standard deviation over the repeats."""
    n: int = 0
    scores: Mapping[str, Any] = field(default_factory=dict)
    """{"rungs": [[rung, resource, score, n], …], "objectives": {metric: value}, "clones": [[rung, the trial whose
    checkpoint it took over there, that one's rung], …]}; clones only where there are any."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """{"run", "name"} of the newest one of repeat 0."""
    reason: str = ""
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A stretch of one repeat of a trial up to its next milestone. Written whole whenever it changes."""

    number: int
    trial: int
    repeat: int = 0
    rung: int = 0
    until: float | None = None
    """Where it pauses, in units of the resource; None: where its function ends."""
    run: str = ""
    attempt: int = 0
    """The newest attempt that worked on it."""
    status: str = "assigned"
    """assigned|running|paused|complete|ended|failed|cancelled; `assigned` again after a restart."""
    restarts: int = 0
    judge: Mapping[str, Any] = field(default_factory=dict)
    clone: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None
    resource: float = 0.0
    reports: Sequence[Sequence[float | None]] = field(default_factory=tuple)
    """[[resource, score], …], thinned to 2,000."""
    lane: str = ""
    lane_seconds: float = 0.0
    reason: str = ""
    error: Mapping[str, Any] = field(default_factory=dict)
    started_at: float | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How an attempt of a trial's run ended."""

    run: str
    attempt: int
    status: str
    """A terminal RunStatus."""
    reason: str = ""
    error: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepStep:
    """What a driver decided, with all that follows from it: stored in one transaction or not at all."""

    sweep: str
    driver: str
    after: int
    """The newest decision that the driver knew of; -1: none. The same step sent again changes nothing."""
    decisions: Sequence[DecisionRow] = ()
    trials: Sequence[TrialRow] = ()
    jobs: Sequence[JobRow] = ()
    opens: Sequence[tuple[int, RunSpec]] = ()
    """(job, the attempt that is opened for it)"""
    closes: Sequence[RunEnd] = ()
    spent: Mapping[str, float] | None = None
    """Of the budget, in all: {"hours", "gpu_hours", "cpu_hours", "money", "kwh"}; None: unchanged."""
    facts: Mapping[str, Any] | None = None
    """What was found out once and holds from then on: the objective, the unit of the resource; None: unchanged."""
    answered: Sequence[tuple[int, str]] = ()
    """(request, the answer in words)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """What somebody asked of a sweep that runs, or will go on: see `sweeps.requests`."""

    id: int
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)
    who: str = ""
    at: float = 0.0
    answer: str = ""
    done_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """All that a driver must know to go on."""

    spec: SweepSpec
    decisions: Sequence[DecisionRow] = ()
    """All, oldest first, without their inputs."""
    jobs: Sequence[JobRow] = ()
    """Those that have not ended."""
    spent: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoll:
    """What a driver asks for every second."""

    requests: Sequence[RequestRow] = ()
    """Those not answered, oldest first."""
    stops: Sequence[str] = ()
    """Trials' runs of which somebody cancelled the attempt that runs."""
    is_taken: bool = False
    """Another driver has the sweep now."""


def sweep_step_from(raw: Mapping[str, Any]) -> SweepStep:
    from orchestrator.records import RunSpec

    return SweepStep(
        **{
            **raw,
            "decisions": tuple(DecisionRow(**each) for each in raw["decisions"]),
            "trials": tuple(TrialRow(**each) for each in raw["trials"]),
            "jobs": tuple(JobRow(**each) for each in raw["jobs"]),
            "opens": tuple((job, RunSpec(**spec)) for job, spec in raw["opens"]),
            "closes": tuple(RunEnd(**each) for each in raw["closes"]),
            "answered": tuple((request, answer) for request, answer in raw["answered"]),
        }
    )


def sweep_record_from(raw: Mapping[str, Any]) -> SweepRecord:
    return SweepRecord(
        spec=SweepSpec(**raw["spec"]),
        decisions=tuple(DecisionRow(**each) for each in raw["decisions"]),
        jobs=tuple(JobRow(**each) for each in raw["jobs"]),
        spent=raw["spent"],
        facts=raw["facts"],
    )


def sweep_poll_from(raw: Mapping[str, Any]) -> SweepPoll:
    requests = tuple(RequestRow(**each) for each in raw["requests"])
    return SweepPoll(requests=requests, stops=tuple(raw["stops"]), is_taken=raw["is_taken"])


def tickets_from(raw: Mapping[str, Any]) -> dict[int, RunTicket]:
    """Of JSON, whose keys are text."""
    from orchestrator.records import RunTicket

    return {int(job): RunTicket(**ticket) for job, ticket in raw.items()}


def to_json(value: SweepSpec | SweepStep | SweepRecord | SweepPoll) -> dict[str, Any]:
    """Shares what is inside of `value`: `dataclasses.asdict` would copy every value of ten thousand trials."""
    return _plain(value)


def _plain(value: Any) -> Any:
    names = _FIELDS.get(type(value))
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value):  # a RunSpec
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return value


_FIELDS = {
    row: tuple(each.name for each in dataclasses.fields(row))
    for row in (
        SweepSpec, DecisionRow, TrialRow, JobRow, RunEnd, SweepStep, RequestRow, SweepRecord, SweepPoll,
    )
}  # fmt: skip
