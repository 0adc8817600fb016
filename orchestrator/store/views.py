"""What reading the store gives: frozen values. Times are seconds since 1970; None means "not yet" or "not said"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.status import RunStatus

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentRow:
    """An experiment and how its runs stand."""

    name: str
    project: str
    description: str
    user: str
    created: float
    runs: int
    active: int
    """Runs that are in no terminal state."""
    last_run: float | None
    """When its newest run was created."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One line of a list of runs."""

    run: str
    name: str
    experiment: str
    project: str
    user: str
    status: RunStatus
    reason: str
    """Why it has this status, in words; empty when there is nothing to say."""
    attempt: int
    """Number of the current attempt, 0 before the first."""
    workers: int
    job: str
    sweep: str
    created: float
    started: float | None
    """Start of the first attempt."""
    ended: float | None
    tags: Mapping[str, str] = field(default_factory=dict)

    def duration(self, now: float) -> float | None:
        """Seconds from the first start to the end (or to `now` while it has not ended)."""
        return None if self.started is None else (self.ended if self.ended is not None else now) - self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetail(RunRow):
    """Everything about a run that fits in one row. Lists (params, events, …) have methods of their own."""

    description: str
    directory: str
    config: Mapping[str, Any]
    """The whole resolved config of the current attempt."""
    config_hash: str
    seed: int
    model: Mapping[str, Any]
    dataset: Mapping[str, Any]
    error: Mapping[str, Any] | None
    cancel_requested: float | None
    cancel_requested_by: str
    parents: Mapping[str, str]
    """Run id -> kind of edge (parent, fork, resume, pipeline)."""
    links: Mapping[str, Any]
    """Where the same run is found elsewhere, by sink; what `Store.set_link` stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One line of a list of sweeps. Its id is that of its parent run."""

    sweep: str
    name: str
    """Of the parent run, as are the experiment, the status and the times."""
    experiment: str
    project: str
    user: str
    status: RunStatus
    reason: str
    created: float
    ended: float | None
    seed: int
    driver: str
    """Who alone may decide now; empty: nobody ever did, another program only named the sweep."""
    driver_since: float | None
    decisions: int
    """How many there are: the newest has the number below."""
    spent: Mapping[str, Any]
    facts: Mapping[str, Any]
    trials: Mapping[str, int]
    """Status of trials -> how many have it."""
    runs: int
    """Of its trials, as far as they were not removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepDetail(SweepRow):
    """A sweep and what it is made of. Trials, jobs, decisions and requests have methods of their own."""

    settings: Mapping[str, Any]
    """The section `sweep` of the configuration, as given at the start."""
    space: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    run: str
    attempt: int
    status: RunStatus
    reason: str
    error: Mapping[str, Any] | None
    user: str
    job: str
    workers: int
    config_hash: str
    started: float
    ended: float | None
    lease_until: float | None
    provenance: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole resolved config of this attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """A run, or a sweep, that ended CRASHED or FAILED, with what tells whether anybody wanted it to end."""

    run: str
    name: str
    attempt: int
    status: RunStatus
    job: str
    """At Ray; empty for a run without Ray."""
    is_sweep: bool
    is_asked_to_stop: bool
    has_error: bool
    """Somebody said how the attempt ended; False: it ended in silence."""
    action: str
    """What its driver decided when it ended, see `failures.policy.Action`; empty: nothing."""
    after: float
    """Seconds that a restart was to wait."""
    started: float
    """Of the attempt."""
    ended: float
    is_kept: bool
    """Its configuration has `run.keep`."""
    directory: str
    """Where its driver ran; empty if that is not known."""
    host: str
    pid: int
    """Of its driver there; 0 if that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamRow:
    name: str
    type: str
    """int, float, bool, str, null, list or dict."""
    value: Any
    """NaN and ±inf come back as floats when `type` is float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteRow:
    at: float
    user: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """All points of one key and rank, of all attempts. `minimum` and `maximum` ignore NaN, `mean` ignores ±inf, too."""

    run: str
    key: str
    rank: int
    unit: str
    direction: str
    """min, max or empty: which values are better."""
    reduction: str
    count: int
    nan_count: int
    inf_count: int
    first: float
    first_step: int
    first_time: float
    last: float
    """The latest written point of the highest attempt."""
    last_step: int
    last_time: float
    last_attempt: int
    minimum: float | None
    min_step: int | None
    maximum: float | None
    max_step: int | None
    mean: float | None

    @property
    def best(self) -> float | None:
        """The best value under the declared direction; None when none was declared."""
        return {"min": self.minimum, "max": self.maximum}.get(self.direction)

    @property
    def best_step(self) -> int | None:
        return {"min": self.min_step, "max": self.max_step}.get(self.direction)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    id: int
    run: str
    attempt: int
    rank: int
    at: float
    level: str
    """debug, info, warning or error."""
    kind: str
    message: str
    step: int | None
    user: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """What the database knows of a checkpoint. Its storage is the truth."""

    run: str
    id: str
    attempt: int
    uri: str
    state: str
    step: int | None
    epoch: int | None
    label: str
    metrics: Mapping[str, Any]
    is_best: bool
    """It was the best one when it was saved."""
    is_pinned: bool
    size_bytes: int | None
    duration: float | None
    manifest_sha256: str
    cipher: str
    key_id: str
    created: float
    resumable: bool = True
    """Training can go on from it; else it holds weights only."""
    kind: str = ""
    """sharded, full or weights."""
    world_size: int | None = None
    """Ranks that saved it."""
    reasons: Sequence[str] = ()
    """Why it was saved."""
    is_registered: bool = False
    """A model was made from it, so nothing deletes it."""
    timings: Mapping[str, Any] = field(default_factory=dict)
    """Seconds of its parts, of the slowest rank: copy, write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    run: str
    name: str
    attempt: int
    uri: str
    media_type: str
    size_bytes: int | None
    sha256: str
    step: int | None
    created: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """Points of one key in order of attempt, rank and writing. Six arrays of one length."""

    steps: np.ndarray
    """int64"""
    times: np.ndarray
    """float64, seconds since 1970, in milliseconds' precision"""
    values: np.ndarray
    """float64, bit for bit what was logged"""
    ranks: np.ndarray
    """int32"""
    attempts: np.ndarray
    """int32"""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """A key's curve of one rank and attempt in windows of consecutive points, in the order of writing (steps may repeat
    or go back). Arrays of one length, one entry per window; where `is_exact`, a window is one point.

    No spike vanishes: `minimum` and `maximum` are exact and ignore NaN only, ±inf is in them; NaN stands in `nans`.
    """

    attempt: int
    """0: there are no points."""
    rank: int
    steps: np.ndarray
    """int64, of the window's first point"""
    times: np.ndarray
    """float64, of the window's first point, seconds since 1970"""
    counts: np.ndarray
    """int64, points in the window, NaN among them"""
    nans: np.ndarray
    """int64, NaN among them"""
    first: np.ndarray
    """float64, as are the following; NaN where the point was NaN"""
    minimum: np.ndarray
    """NaN where all points are"""
    maximum: np.ndarray
    mean: np.ndarray
    """of the finite points; NaN where there is none"""
    last: np.ndarray
    is_exact: bool

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FeedPosition:
    """A place in a run's feed of chunks: everything up to here was seen. The default is the beginning."""

    xid: int = 0
    id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkRow:
    """Consecutive points of one key, attempt and rank, as the feed for sinks gives them."""

    key: str
    attempt: int
    rank: int
    steps: np.ndarray
    times: np.ndarray
    values: np.ndarray
    position: FeedPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class FactChanges:
    """What of a run's facts was written since a facts cursor; `cursor` is the one to pass next time."""

    run: RunDetail
    params: tuple[ParamRow, ...]
    tags: Mapping[str, str]
    notes: tuple[NoteRow, ...]
    checkpoints: tuple[CheckpointRow, ...]
    artifacts: tuple[ArtifactRow, ...]
    attempts: tuple[AttemptRow, ...]
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedRuns:
    """Runs in which anything was written since a cursor; `cursor` is the one to pass next time."""

    runs: tuple[str, ...]
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkCursor:
    """How far a sink has come with one run, and what it needs to remember about it. The default is the beginning."""

    position: FeedPosition = FeedPosition()
    facts: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON of the sink's own, the id of the mirrored run for example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkLag:
    """How far a sink is behind what is committed, and how it says it is."""

    sink: str
    points: int
    """Committed and not read by the sink yet, of all ranks."""
    seconds: float
    """Between the newest committed point and the newest copied one, of the run that is furthest behind."""
    runs: int
    """Runs with something to copy."""
    state: str
    """Of its circuit breaker: closed (it works), open or half-open (it fails, and is left alone); empty: not told."""
    error: str
    """Why it does not take everything; empty when it does."""
    updated: float
    """When it last said that it lives; seconds since 1970."""
