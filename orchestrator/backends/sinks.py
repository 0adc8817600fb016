"""What every sink takes and how it says no. A *sink* receives copies (MLflow, TensorBoard, W&B); the truth is in
PostgreSQL.

Light on purpose: importing it loads none of the sinks' own libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.errors import OrchestratorError
from orchestrator.records import RunStatus


class SinkUnavailable(OrchestratorError):
    """The sink did not do it now, but may do it later: not reachable, too slow, overloaded, broken inside.

    `answered` is true when a server answered with an error: it lives, but perhaps this one request is what breaks it.
    """

    def __init__(self, sink: str, why: str, answered: bool = False) -> None:
        super().__init__(sink, why, answered)
        self.sink, self.why, self.answered = sink, why, answered

    def __str__(self) -> str:
        return f"{self.sink}: {self.why}"


class SinkRefused(OrchestratorError):
    """The sink will never take this data as it is. `what` names it."""

    def __init__(self, sink: str, what: str, why: str) -> None:
        super().__init__(sink, what, why)
        self.sink, self.what, self.why = sink, what, why

    def __str__(self) -> str:
        return f"{self.sink} refuses {self.what}: {self.why}"


class SinkGone(OrchestratorError):
    """The run (or its experiment) is not in the sink any more. `deleted`: by a person, so it is not made again."""

    def __init__(self, sink: str, run: str, why: str, deleted: bool) -> None:
        super().__init__(sink, run, why, deleted)
        self.sink, self.run, self.why, self.deleted = sink, run, why, deleted

    def __str__(self) -> str:
        return f"{self.sink} has no run {self.run}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFacts:
    """A file of a run, where it lies. Example: ArtifactFacts(name="plot.png", uri="/runs/r1/artifacts/plot.png")."""

    name: str
    uri: str
    attempt: int = 0
    step: int | None = None
    media_type: str = ""
    size_bytes: int | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """Data that a run says it uses."""

    name: str
    fingerprint: str = ""
    uri: str = ""
    version: str = ""
    split: str = ""
    size: int | None = None
    """Samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Everything about a run but its points, as it stands now.

    Example: RunFacts(id="r1", experiment="digits", name="calm-otter").
    """

    id: str
    experiment: str
    name: str
    project: str = "default"
    parent: str = ""
    """Id of the run that this one belongs to in the sink: a sweep's for a trial, the run's own for an attempt."""
    attempt_of: str = ""
    """This is the copy of one attempt (`attempt`) of that run; empty: of the run itself."""
    status: RunStatus = RunStatus.running
    reason: str = ""
    error: str = ""
    """One line; empty unless it failed."""
    failure: Mapping[str, str] = field(default_factory=dict)
    """The same as what, where, why, done and log, as far as they are known."""
    attempt: int = 1
    start_ms: int = 0
    end_ms: int | None = None
    user: str = ""
    source: str = ""
    """What was run, `module:function` or a command line."""
    description: str = ""
    notes: Sequence[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Sequence[ArtifactFacts] = ()
    """The newest last."""
    datasets: Sequence[DatasetFacts] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole resolved configuration, secrets redacted."""
    config_hash: str = ""
    directory: str = ""
    job: str = ""
    host: str = ""
    """Where the driver ran."""
    git: Mapping[str, Any] = field(default_factory=dict)
    """commit, branch, is_dirty, remote; any may be missing."""
    version: int = 0
    """Grows with every change of the run; chunks of points do not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a run's copy lives in the sink."""

    id: str
    """The sink's own name of the run."""
    url: str = ""
    """For people; empty when there is nothing to open."""
    created: bool = False
    """It was not there before: everything has to be sent from the start."""
    takes_files: bool = False
    """Files can be sent to the sink itself, so nobody has to write where it keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A small file that the sink is to have. What is in it: `data`, or the file at `uri` inside `directory`."""

    path: str
    """In the sink, with `/` between the parts."""
    mark: str
    """Changes when the content does."""
    data: bytes | None = None
    uri: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Consecutive points of one metric. The three arrays have the same length."""

    name: str
    """As the sink writes it."""
    steps: np.ndarray
    """int64"""
    times_ms: np.ndarray
    """int64, since 1970"""
    values: np.ndarray
    """float64; NaN and ±inf are possible."""

    def __len__(self) -> int:
        return len(self.steps)

    def part(self, start: int, stop: int | None = None) -> Series:
        cut = slice(start, stop)
        return Series(name=self.name, steps=self.steps[cut], times_ms=self.times_ms[cut], values=self.values[cut])
