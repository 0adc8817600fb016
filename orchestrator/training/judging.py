"""What pauses or ends a training besides its own function, decided on rank 0 inside `run.report`.

A judge knows its rules beforehand and asks nobody: the milestone at which the training waits, the median of other
trials, early stopping. So a report costs a few microseconds more, a verdict takes effect in the report that causes it,
and the same reports give the same verdict wherever and however often they are made. Its state lies in every checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from orchestrator.backends.storage import Storage
from orchestrator.catalog.headline import main_key
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.clone import is_clone
from orchestrator.checkpoints.manifest import STATE, finite
from orchestrator.sweeps.median import compare
from orchestrator.training.stopping import Stopping, StopRules, plain

MOST_REPORTS = 2000
"""That a tally keeps. Of more, every second one goes, again and again."""
_LOW_WORDS = ("loss", "error", "perplexity")
"""What has one of these in its name is better when it is lower, where nobody says otherwise."""


class Action(StrEnum):
    go = "go"
    pause = "pause"
    """Save, and leave: somebody may go on from here."""
    end = "end"
    """It is not worth going on: the function may still do what it does after its loop."""


class Unit(StrEnum):
    """What a training's resource is counted in."""

    auto = "auto"
    """Epochs where `run.epochs` is used, else reports; found out at the first report."""
    epoch = "epoch"
    report = "report"
    """Those with the first objective among their metrics."""
    step = "step"


class Verdict(NamedTuple):
    action: Action
    reason: str = ""
    """Why it ends, in words."""


GO = Verdict(Action.go)
PAUSE = Verdict(Action.pause)


class Report(NamedTuple):
    """What a judge sees of a report: rank 0's."""

    metrics: Mapping[str, float]
    step: int
    epochs_done: int
    uses_epochs: bool
    """Whether the train function goes through `run.epochs`."""
    has_state: bool
    """Whether a checkpoint can be taken now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What rank 0 has counted over the whole life of the run, since its beginning or since it was cloned. Example:
    Tally(objectives=(("val/loss", "min"),), unit="epoch", resource=3.0, last={"val/loss": 0.4}, ...)."""

    objectives: Sequence[tuple[str, str]] = ()
    """(metric, min or max); the first one rules."""
    unit: str = Unit.auto.value
    resource: float = 0.0
    """At the last report that had the first objective."""
    last: Mapping[str, float] = field(default_factory=dict)
    """Objective -> its newest value."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Objective -> its best finite value."""
    reports: Sequence[tuple[float, float]] = ()
    """(resource, value of the first objective), thinned to MOST_REPORTS."""
    n_reports: int = 0
    """With the first objective, before thinning; of a clone, its donor's included."""
    has_state: bool = False
    verdict: str = Action.go.value
    reason: str = ""
    compared: Mapping[str, Any] = field(default_factory=dict)
    """The numbers that the median's verdict depended on."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """The newest one that training can go on from: {"name", "sha256", "step"}."""

    def to_json(self) -> dict[str, Any]:
        """Numbers that are not finite are text that `float` reads."""
        return {
            "objectives": [list(each) for each in self.objectives],
            "unit": self.unit,
            "resource": self.resource,
            "last": finite(self.last),
            "best": finite(self.best),
            "reports": [plain(each) for each in self.reports],
            "n_reports": self.n_reports,
            "has_state": self.has_state,
            "verdict": self.verdict,
            "reason": self.reason,
            "compared": dict(self.compared),
            "checkpoint": dict(self.checkpoint),
        }


class Judge(Protocol):
    """Asked on rank 0; every rank has one, so that all of them know after a restore how it stands."""

    def reported(self, report: Report) -> Verdict:
        """At a report with metrics, in order. After an end it is asked no more."""
        ...

    def declared(self, metric: str, direction: str) -> None:
        """The train function has said which way a metric gets better."""
        ...

    def tally(self) -> Tally: ...

    def missing(self) -> Sequence[str]:
        """What it looks at and was never given."""
        ...

    def state(self) -> dict[str, Any]:
        """All that later verdicts depend on, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any], *, is_clone: bool = False) -> Verdict:
        """Goes on from what `state` gave; of a clone, from another run's: what was measured there is not this run's.
        Gives the verdict as it stands then."""
        ...


def judge(spec: Mapping[str, Any], *, best_metric: tuple[str, str] = ("", "")) -> Judge | None:
    """Of a plan's `judge`; None where it has no rules and no objectives, so that nothing is judged.

    {"until": float or None, "unit": see Unit, "objectives": [[metric, direction], …], "median": what
    `MedianStopping.judge` gives, "stopping": the section `stopping`}, each of which may be missing. `best_metric`:
    metric and direction that count where no objectives are given.
    """
    stopping = StopRules.of(spec.get("stopping") or {})
    if not spec or (not stopping.is_active and not spec.keys() - {"stopping"}):
        return None
    objectives = [(str(metric), str(direction)) for metric, direction in spec.get("objectives") or ()]
    if not objectives and best_metric[0]:
        objectives = [best_metric]
    return RulesJudge(
        until=spec.get("until"),
        unit=Unit(spec.get("unit") or Unit.auto),
        objectives=objectives,
        median=spec.get("median") or None,
        stopping=stopping,
        keeps_reports="objectives" in spec,
    )


def tally_left(directory: str) -> dict[str, Any]:
    """What the newest checkpoint of the run in `directory` says had been counted, as `Tally.to_json`: for whoever heard
    no more of its ranks. {} where there is no checkpoint, or none of a judged run. Raises OSError, CheckpointError."""
    storage = Storage(directory).join("checkpoints")
    newest = next((each for each in catalog.scan(storage).good if each.resumable), None)
    if newest is None:
        return {}
    state = json.loads(storage.read_bytes(f"{newest.name}/{STATE}"))["progress"].get("judge")
    if state is None:
        return {}
    judge = RulesJudge(unit=Unit(state["unit"]))
    judge.restore(state, is_clone=is_clone(newest))
    found = {"name": newest.name, "sha256": newest.digest, "step": newest.step}
    return replace(judge.tally(), checkpoint=found).to_json()


class RulesJudge:
    """A Judge. Of several rules the first that ends the training counts, else the milestone pauses it.

    Where no objective is named, it is the metric of the first report that tells most (`headline.main_key`), with the
    direction that was declared for it, else by its name. A milestone is reached at the first report at or beyond it
    that has the first objective: a pause without a score would tell nobody anything.
    """

    def __init__(
        self,
        *,
        until: float | None = None,
        unit: Unit = Unit.auto,
        objectives: Sequence[tuple[str, str]] = (),
        median: Mapping[str, Any] | None = None,
        stopping: StopRules | None = None,
        keeps_reports: bool = True,
    ) -> None:
        self._until, self._unit, self._objectives = until, unit, list(objectives)
        self._median, self._rules, self._keeps_reports = median, stopping or StopRules(), keeps_reports
        self._stopping: Stopping | None = None
        self._directions: dict[str, str] = {}
        self._n, self._resource = 0, -math.inf
        self._last: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._reports: list[tuple[float, float]] = []
        self._stride = 1
        """Every so-manieth report is kept."""
        self._has_state, self._uses_epochs = False, False
        self._verdict, self._reason = Action.go, ""
        self._compared: Mapping[str, Any] = {}
        self._begin_stopping()
        named = asdict(self._rules) if self._rules.is_active else {}
        self._rules_text = json.dumps([self._median, named], sort_keys=True)
        """What an end of an earlier attempt must have come from to count."""

    def declared(self, metric: str, direction: str) -> None:
        self._directions[metric] = direction

    def reported(self, report: Report) -> Verdict:
        metrics = report.metrics
        if not self._objectives:
            self._choose_objective(metrics)
        self._has_state = self._has_state or report.has_state
        self._uses_epochs = report.uses_epochs
        reason = ""
        if (stopping := self._stopping) is not None and (watched := metrics.get(stopping.metric)) is not None:
            reason = stopping.reported(watched)
        is_first, is_scored, before = True, False, self._resource
        for metric, direction in self._objectives:
            if (value := metrics.get(metric)) is not None:
                self._last[metric] = value
                if math.isfinite(value):
                    best = self._best.get(metric)
                    if best is None or (value > best if direction == "max" else value < best):
                        self._best[metric] = value
                if is_first:
                    is_scored = True
                    self._count(report, value)
            is_first = False
        if is_scored and not reason and self._median is not None:
            reason = self._behind(self._median, before)
        if reason:
            self._verdict, self._reason = Action.end, reason
            return Verdict(Action.end, reason)
        if is_scored and self._until is not None and self._resource >= self._until:
            self._verdict = Action.pause
            return PAUSE
        return GO

    def missing(self) -> list[str]:
        found = [metric for metric, _ in self._objectives if metric not in self._last]
        if self._stopping is not None and not self._stopping.n:
            found.append(self._stopping.metric)
        return list(dict.fromkeys(found))

    def tally(self) -> Tally:
        return Tally(
            objectives=tuple(self._objectives), unit=self._unit.value, resource=max(self._resource, 0.0),
            last=dict(self._last), best=dict(self._best), reports=tuple(self._reports), n_reports=self._n,
            has_state=self._has_state, verdict=self._verdict.value, reason=self._reason, compared=self._compared,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        tally = self.tally().to_json()
        del tally["checkpoint"]
        return {
            **tally,
            "stride": self._stride,
            "uses_epochs": self._uses_epochs,
            "rules": self._rules_text,
            "stopping": None if self._stopping is None else self._stopping.state(),
        }

    def restore(self, state: Mapping[str, Any], *, is_clone: bool = False) -> Verdict:
        if not self._objectives:
            self._objectives = [(metric, direction) for metric, direction in state["objectives"]]
        if self._unit is Unit.auto:
            self._unit = Unit(state["unit"])
        self._uses_epochs, self._has_state = state["uses_epochs"], state["has_state"]
        if state["n_reports"] and state["unit"] == self._unit:
            self._n, self._resource = state["n_reports"], float(state["resource"])
        known = {metric for metric, _ in self._objectives}
        self._last = {metric: float(value) for metric, value in state["last"].items() if metric in known}
        self._begin_stopping()
        if not is_clone:
            self._best = {metric: float(value) for metric, value in state["best"].items() if metric in known}
            self._reports = [(float(at), float(value)) for at, value in state["reports"]]
            self._stride = state["stride"]
            if self._stopping is not None and state["stopping"] is not None:
                self._stopping.restore(state["stopping"])
            if state["verdict"] == Action.end and state["rules"] == self._rules_text:
                self._verdict, self._reason, self._compared = Action.end, state["reason"], state["compared"]
                return Verdict(Action.end, self._reason)
        if self._until is not None and self._n and self._resource >= self._until:
            self._verdict = Action.pause
            return PAUSE
        return GO

    def _choose_objective(self, metrics: Mapping[str, float]) -> None:
        metric = main_key({key: self._directions.get(key, "") for key in metrics})
        if metric is None:
            return
        is_low = any(word in metric.lower() for word in _LOW_WORDS)
        self._objectives = [(metric, self._directions.get(metric) or ("min" if is_low else "max"))]
        self._begin_stopping()

    def _begin_stopping(self) -> None:
        rules = self._rules
        if not rules.is_active or self._stopping is not None:
            return
        watched = (rules.metric, rules.direction) if rules.metric else next(iter(self._objectives), None)
        if watched is not None:
            self._stopping = Stopping(rules=rules, metric=watched[0], direction=watched[1])

    def _count(self, report: Report, value: float) -> None:
        """A report with the first objective."""
        if self._unit is Unit.auto:
            self._unit = Unit.epoch if report.uses_epochs else Unit.report
        self._n += 1
        if self._unit is Unit.epoch:
            self._resource = float(report.epochs_done)
        elif self._unit is Unit.report:
            self._resource = float(self._n)
        else:
            self._resource = float(report.step)
        if self._keeps_reports and self._n % self._stride == 0:
            self._reports.append((self._resource, value))
            if len(self._reports) > MOST_REPORTS:
                self._stride *= 2
                del self._reports[::2]

    def _behind(self, median: Mapping[str, Any], before: float) -> str:
        metric = self._objectives[0][0]
        best = self._best.get(metric, math.nan)
        found = compare(median, resource=self._resource, best=best, before=before)
        if found is None or not found.is_behind:
            return ""
        self._compared = found.to_json()
        where = f"{self._resource:g} {self._unit.value}s"
        of_others = f"the median of {found.n} others {found.median:g}"
        return f"behind the median: its best {metric} was {best:g} after {where}, {of_others}"
