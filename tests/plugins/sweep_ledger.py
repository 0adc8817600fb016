"""A ledger in memory that refuses and repeats as the real one does, and a sweep's core around a toy problem.

Everything goes through JSON on its way in and out, so what would not survive the database does not survive here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.clock import ManualClock
from orchestrator.config.settings import SweepConfig
from orchestrator.errors import SweepTaken
from orchestrator.records import RunSpec, RunTicket
from orchestrator.status import RunStatus
from orchestrator.sweep_records import (
    RequestRow,
    SweepPoll,
    SweepRecord,
    SweepSpec,
    SweepStep,
    sweep_record_from,
    sweep_step_from,
    to_json,
)
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned, Ended, Ending
from orchestrator.sweeps.search import RandomSearcher
from orchestrator.sweeps.space import Space, space
from orchestrator.sweeps.state import Decision, Kind
from tests.plugins.sweep_model import score, share

SWEEP = "20260101-000000-00000000"


class Killed(BaseException):
    """The driver is gone. No `except Exception` may hold it up."""


class MemoryLedger:
    """`before` and `after` are called around each step with its number; what they raise is what the driver sees."""

    def __init__(self) -> None:
        self.spec: SweepSpec | None = None
        self.driver = ""
        self.decisions: list[dict[str, Any]] = []
        self.trials: dict[int, dict[str, Any]] = {}
        self.jobs: dict[int, dict[str, Any]] = {}
        self.runs: dict[str, list[str]] = {}
        """Run -> status of each of its attempts."""
        self.spent: Mapping[str, float] = {}
        self.facts: Mapping[str, Any] = {}
        self.requests: list[RequestRow] = []
        self.stops: list[str] = []
        self.steps = 0
        self.before: Callable[[int], None] = lambda number: None
        self.after: Callable[[int], None] = lambda number: None

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        self.spec, self.driver = self.spec or spec, driver
        record = {
            "spec": dataclasses.asdict(self.spec),
            "decisions": [{**each, "inputs": {}} for each in self.decisions],
            "jobs": [each for each in self.jobs.values() if each["ended_at"] is None],
            "spent": self.spent,
            "facts": self.facts,
        }
        return sweep_record_from(_through_json(record))

    def sweep_step(self, step: SweepStep) -> dict[int, RunTicket]:
        number, self.steps = self.steps, self.steps + 1
        self.before(number)
        tickets = self._written(sweep_step_from(_through_json(to_json(step))))
        self.after(number)
        return tickets

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        waiting = tuple(each for each in self.requests if each.done_at is None)
        return SweepPoll(requests=waiting, stops=tuple(self.stops), is_taken=driver != self.driver)

    def ask(self, kind: str, **details: Any) -> int:
        self.requests.append(RequestRow(id=len(self.requests), kind=kind, details=details, who="ann"))
        return len(self.requests) - 1

    def history(self) -> list[Decision]:
        """With their inputs, as who verifies reads them."""
        return [
            Decision(**{**{key: each[key] for key in ("seq", "trial", "job", "inputs", "outcome")}, "kind": Kind(kind)})
            for each in self.decisions
            if (kind := each["kind"])
        ]

    def _written(self, step: SweepStep) -> dict[int, RunTicket]:
        if step.driver != self.driver:
            raise SweepTaken(step.sweep, self.driver)
        given = [_fields(each) for each in step.decisions]
        assert [each["seq"] for each in given] == list(range(step.after + 1, step.after + 1 + len(given)))
        assert given or not step.opens, "opens without decisions cannot be told from opens sent again"
        newest = len(self.decisions) - 1
        if newest != step.after and given:
            if newest != given[-1]["seq"] or self.decisions[step.after + 1 :] != given:
                raise SweepTaken(step.sweep, self.driver)
            return {job: self._ticket(self.jobs[job]["run"], self.jobs[job]["attempt"]) for job, _ in step.opens}
        self.decisions += given
        for end in step.closes:
            assert RunStatus(end.status).is_terminal
            if self.runs[end.run][end.attempt - 1] == "RUNNING":
                self.runs[end.run][end.attempt - 1] = end.status
        tickets = {job: self._opened(spec) for job, spec in step.opens}
        for trial in step.trials:
            self.trials[trial.number] = _fields(trial)
        for row in step.jobs:
            ticket = tickets.get(row.number)
            self.jobs[row.number] = _fields(replace(row, run=ticket.run, attempt=ticket.attempt) if ticket else row)
        self.spent, self.facts = step.spent or self.spent, step.facts or self.facts
        for request, answer in step.answered:
            self.requests[request] = replace(self.requests[request], answer=answer, done_at=1.0)
        return tickets

    def _opened(self, spec: RunSpec) -> RunTicket:
        run = spec.run or spec.new_run
        attempts = self.runs.setdefault(run, [])
        assert bool(spec.run) == bool(attempts), "an existing run is named, a new one gets its id"
        if attempts:
            assert attempts[-1] != "RUNNING" or spec.after_attempt == len(attempts), f"{run} is active"
            if attempts[-1] == "RUNNING":
                attempts[-1] = "CRASHED"
        attempts.append("RUNNING")
        return self._ticket(run, len(attempts))

    def _ticket(self, run: str, attempt: int) -> RunTicket:
        return RunTicket(run=run, name=run, experiment="e", attempt=attempt, directory=f"/runs/e/{run}")


def _fields(row: Any) -> dict[str, Any]:
    """Not copied deeply: it came out of JSON, and nobody else has it."""
    return {each.name: getattr(row, each.name) for each in dataclasses.fields(row)}


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


# -- a sweep of the toy problem ---------------------------------------------------------------------------


def toy_space() -> Space:
    return space({"x": "uniform(0,1)", "speed": "uniform(0.15,1)", "kind": "choice(a,b,c)"})


def spec_of(trial: int, repeat: int, values: Mapping[str, Any]) -> RunSpec:
    config_hash = f"{hash(json.dumps(dict(values), sort_keys=True)) & 0xFFFF:04x}"
    return RunSpec(
        experiment="e", new_run=f"run-{trial}.{repeat}", parent=SWEEP, sweep=SWEEP, params=values,
        config_hash=config_hash, seed=7 + repeat,
    )  # fmt: skip


def toy_core(settings: SweepConfig, ledger: MemoryLedger, *, driver: str = "d1", **more: Any) -> Core:
    searched = toy_space()
    spec = SweepSpec(sweep=SWEEP, seed=3, settings=dataclasses.asdict(settings), space=searched.to_json())

    def searcher(settings: SweepConfig, space: Space) -> RandomSearcher:
        return RandomSearcher(space, seed=3, samples=settings.samples)

    given: dict[str, Any] = {
        "clock": ManualClock(), "params": {"epochs": 9}, "renewed": searcher, "spec_of": spec_of,
        "searcher": searcher(settings, searched), **more,
    }  # fmt: skip
    return Core.open(spec, ledger, driver=driver, settings=settings, space=searched, **given)


@dataclass
class Toy:
    """Trains toy trials: what a job says depends on its trial, values and milestone alone, as an exact resume does."""

    seed: int = 0
    own_end: float = 9.0
    trouble: float = 0.0
    """Share of jobs that fail for good, return early, or report NaN."""
    skill: dict[tuple[int, int], float] = field(default_factory=dict)

    def __call__(self, job: Assigned) -> Ending:
        key = (job.trial, job.rung, job.repeat)
        wrong = share(self.seed, "wrong", key)
        until = self.own_end if job.until is None else job.until
        how = Ended.complete if job.until is None else Ended.paused
        if wrong < self.trouble / 3:
            error = {"type": "RuntimeError", "message": "loss is NaN"}
            return Ending(how=Ended.failed, error=error, kind="user", lane_seconds=1.0)
        if wrong < self.trouble * 2 / 3:
            how = Ended.complete
        value = score(job.values, until) + 0.001 * job.repeat
        reports = [[float(at), score(job.values, at) + 0.001 * job.repeat] for at in range(1, int(until) + 1)]
        if self.trouble * 2 / 3 <= wrong < self.trouble:
            value = math.nan
        return Ending(how=how, tally=tally(job, until, value, reports), lane_seconds=1.0)


def tally(job: Assigned, resource: float, value: float, reports: list[list[float]], **more: Any) -> dict[str, Any]:
    text: Any = value if math.isfinite(value) else str(value)
    best = min((each for _, each in reports if math.isfinite(each)), default=None)
    found = {
        "objectives": [["loss", "min"]], "unit": "epoch", "resource": resource, "last": {"loss": text},
        "best": {} if best is None else {"loss": best}, "reports": reports, "n_reports": len(reports),
        "has_state": True, "verdict": "go", "reason": "", "compared": {},
        "checkpoint": {
            "name": f"{job.trial}.{job.repeat}-{resource:g}", "sha256": f"sha-{job.trial}-{resource:g}",
            "step": int(resource),
        },
    }  # fmt: skip
    return {**found, **more}
