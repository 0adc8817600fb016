"""Sweeps without training: toy curves, lanes that are only a queue of ends, and schedulers written a second time.

The references know nothing of `orchestrator.sweeps`: plain dicts and lists, as the papers say it.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from orchestrator.sweeps.median import compare
from orchestrator.sweeps.state import (
    Decision,
    End,
    Kind,
    New,
    OpenJob,
    Over,
    Result,
    Scheduler,
    Settings,
    State,
    Status,
    Trial,
    Wait,
)  # fmt: skip


def drawn(seed: int, *labels: object) -> float:
    """A number from 0 to 1. As orchestrator.seeding.derive says, but written again."""
    text = "/".join(str(part) for part in (seed, *labels))
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1).random()


# -- the problem ------------------------------------------------------------------------------------------


def suggested(seed: int, number: int) -> dict[str, Any]:
    x, speed, kind = _suggested(seed, number)
    return {"x": x, "speed": speed, "kind": kind}


@functools.cache
def _suggested(seed: int, number: int) -> tuple[float, float, str]:
    stream = random.Random(f"{seed} {number}")
    return stream.random(), 0.15 + 0.85 * stream.random(), "abc"[stream.randrange(3)]


@functools.cache
def share(seed: int, what: str, job: tuple[int, int, int]) -> float:
    """A number from 0 to 1 of a job, by (trial, rung, repeat)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what} {job}".encode()).digest()[:4], "little") / 2**32


def score(values: Mapping[str, Any], resource: float) -> float:
    """A loss: falls towards what `x` allows, as fast as `speed` says, so that curves cross. Lower is better."""
    return abs(values["x"] - 0.3) + math.exp(-values["speed"] * resource)


@dataclass(frozen=True)
class Job:
    """What an engine gives to a lane."""

    number: int
    trial: int
    rung: int
    until: float | None
    values: Mapping[str, Any]
    clone: tuple[int, int] | None = None
    """(donor, rung of its checkpoint)."""
    judge: Callable[[float, float, float], bool] | None = None
    """(resource, best so far, resource before) -> whether to stop."""
    repeat: int = 0


@dataclass(frozen=True)
class Ending:
    end: str
    score: float
    resource: float
    reports: tuple[tuple[float, float], ...] = ()


@dataclass
class World:
    """What training gives. All of it depends on the seed, the trial and its rung alone, never on when it happened."""

    seed: int
    own_end: int = 9
    """Where a function without milestone returns."""
    trouble: float = 0.0
    """Share of jobs that go wrong, in one of four ways."""
    may_return_early: bool = True
    curve: Callable[[Mapping[str, Any], float], float] = score
    skill: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """For populations, (trial, rung, repeat) -> what its checkpoint has learnt."""

    def seconds(self, job: Job) -> float:
        return 0.5 + share(self.seed, "seconds", (job.trial, job.rung, job.repeat)) * (1 + job.rung)

    def train(self, job: Job) -> Ending:
        wrong = share(self.seed, "wrong", (job.trial, job.rung, job.repeat))
        until = self.own_end if job.until is None else job.until
        end = End.complete if job.until is None else End.paused
        if wrong < self.trouble * 0.25:
            return Ending(End.failed, math.nan, until / 2)
        if wrong < self.trouble * 0.5 and self.may_return_early:
            end = End.complete
            until = until - 1 if until > 1 else until
        value, reports = self.curve(job.values, until) + 0.001 * job.repeat, []
        if job.judge is not None:
            best, before = math.nan, -math.inf
            for resource in range(1, int(until) + 1):
                now = self.curve(job.values, resource)
                reports.append((float(resource), now))
                best = now if math.isnan(best) else min(best, now)
                if job.judge(resource, best, before):
                    return Ending(End.ended, now, resource, tuple(reports))
                before = resource
        if wrong < self.trouble and wrong >= self.trouble * 0.5:
            value = math.nan if wrong < self.trouble * 0.75 else math.inf
        return Ending(end, value, until, tuple(reports))

    def train_member(self, job: Job) -> Ending:
        """A member learns by what its values are worth, from where it or its donor was. Its score is a loss."""
        key = (job.trial, job.rung, job.repeat)
        wrong = share(self.seed, "wrong", key)
        before = self.skill.get((job.trial, job.rung - 1, job.repeat), 0.0)
        if job.clone:
            before = self.skill[*job.clone, job.repeat]
        now = before + 1.0 - abs(job.values["x"] - 0.3) + (0.1 if job.values["kind"] == "b" else 0.0)
        if job.repeat:
            now += 0.3 * share(self.seed, "luck", key)
        self.skill[key] = now
        end = End.complete if job.until is None else End.paused
        if wrong < self.trouble * 0.5:
            return Ending(End.failed, math.nan, 0.0)
        return Ending(end, math.nan if wrong < self.trouble else 100.0 - now, job.rung + 1.0)


# -- lanes ------------------------------------------------------------------------------------------------


class Engine(Protocol):
    def ask(self) -> Job | None: ...

    def tell(self, job: Job, ending: Ending) -> None: ...


def simulate(
    engine: Engine, lanes: int, train: Callable[[Job], Ending], seconds: Callable[[Job], float]
) -> Iterator[tuple[Job, Ending]]:
    """Runs the engine's jobs on so many lanes; gives each with its ending, in the order of ends."""
    busy: list[tuple[float, int, Job, Ending]] = []
    now, started = 0.0, 0
    while True:
        while len(busy) < lanes and (job := engine.ask()) is not None:
            heapq.heappush(busy, (now + seconds(job), started, job, train(job)))
            started += 1
        if not busy:
            return
        now, _, job, ending = heapq.heappop(busy)
        engine.tell(job, ending)
        yield job, ending


def jobs_of(
    engine: Engine, lanes: int, train: Callable[[Job], Ending], seconds: Callable[[Job], float]
) -> list[tuple[Any, ...]]:
    """(trial, rung, until, repeat, how it ended, resource, score as text), in the order of ends."""
    return [
        (j.trial, j.rung, j.until, j.repeat, str(e.end), e.resource, repr(e.score))
        for j, e in simulate(engine, lanes, train, seconds)
    ]


class Loop:
    """Our schedulers around a ledger of JSON lines, as the sweep's driver has it: every decision is written down
    before it is carried out."""

    def __init__(self, settings: Settings, scheduler: Scheduler, *, records: Sequence[str] = ()) -> None:
        self.first, self.scheduler = settings, scheduler
        self.history: list[Decision] = []
        self.state = State(settings)
        self.judges: dict[int, Mapping[str, Any]] = {}
        self.jobs: dict[int, Job] = {}
        """Those that were given out."""
        self.over = ""
        for line in records:
            self._write(decision_from(line))

    def ask(self) -> Job | None:
        owed = self.state.owed_repeat()
        if owed is not None:
            trial, rung, repeat = owed
            begun = {"trial": trial, "rung": rung, "repeat": repeat, "until": self.state.settings.until(rung)}
            return self._assign(Kind.assign, trial, {}, begun)
        choice = self.scheduler.next(self.state)
        if isinstance(choice, Wait):
            return None
        if isinstance(choice, Over):
            self.over = choice.reason or "over"
            return None
        outcome: dict[str, Any] = choice.outcome()
        if isinstance(choice, New):
            trial = len(self.state.trials)
            outcome["values"] = suggested(self.state.settings.seed, trial)
        else:
            trial = choice.trial
        return self._assign(choice.kind, trial, choice.inputs, outcome)

    def _assign(self, kind: Kind, trial: int, inputs: Mapping[str, Any], outcome: Mapping[str, Any]) -> Job:
        self.decide(kind, trial=trial, job=len(self.jobs), inputs=inputs, outcome=outcome)
        return self.jobs[len(self.jobs) - 1]

    def tell(self, job: Job, ending: Ending) -> None:
        if ending.end == End.ended:
            best = min(value for _, value in ending.reports)
            found = compare(self.judges[job.number], resource=ending.resource, best=best)
            assert found is not None
            self.decide(Kind.stop, trial=job.trial, job=job.number, inputs=found.to_json(), outcome={"end": "ended"})
        outcome = {
            "end": str(ending.end),
            "score": ending.score if math.isfinite(ending.score) else str(ending.score),
            "resource": ending.resource,
            "reports": list(ending.reports),
            "checkpoint": {} if ending.end == End.failed else {"name": f"{job.trial}-{job.rung}"},
        }
        kind = Kind.fail if ending.end == End.failed else Kind.result
        self.decide(kind, trial=job.trial, job=job.number, outcome=outcome)

    def request(self, **outcome: Any) -> None:
        self.decide(Kind.request, outcome=outcome)
        self.over = ""

    def decide(
        self, kind: Kind, *, trial: int | None = None, job: int | None = None,
        inputs: Mapping[str, Any] | None = None, outcome: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._write(
            Decision(
                seq=self.state.seq + 1,
                kind=kind,
                trial=trial,
                job=job,
                inputs=dict(inputs or {}),
                outcome=dict(outcome),
            )
        )

    def _write(self, decision: Decision) -> None:
        self.history.append(decision)
        self.state.apply(decision)
        if decision.job is not None and decision.job not in self.jobs:
            self.jobs[decision.job] = self._job(decision)

    def _job(self, decision: Decision) -> Job:
        assert decision.trial is not None
        assert decision.job is not None
        outcome = decision.outcome
        judge = self.scheduler.judge(self.state, decision.trial)
        self.judges[decision.job] = judge
        clone = outcome.get("clone") or (self.state.trials[decision.trial].clone if outcome.get("repeat") else None)
        return Job(
            number=decision.job, trial=decision.trial, rung=outcome["rung"], until=outcome["until"],
            values=self.state.trials[decision.trial].values, repeat=outcome.get("repeat", 0),
            clone=(clone["trial"], clone["rung"]) if clone else None,
            judge=(lambda r, best, before: _is_behind(judge, r, best, before)) if judge else None,
        )  # fmt: skip

    def decisions(self) -> list[Decision]:
        """As they come back from the ledger."""
        return [decision_from(line) for line in self.records]

    @property
    def records(self) -> list[str]:
        return [text_of(decision) for decision in self.history]

    def open_jobs(self) -> list[Job]:
        return [self.jobs[number] for number in sorted(self.state.open)]


def _is_behind(judge: Mapping[str, Any], resource: float, best: float, before: float) -> bool:
    found = compare(judge, resource=resource, best=best, before=before)
    return found is not None and found.is_behind


def text_of(decision: Decision) -> str:
    fields = (decision.seq, decision.kind, decision.trial, decision.job, decision.inputs, decision.outcome)
    return json.dumps(fields, allow_nan=False)


def decision_from(line: str) -> Decision:
    seq, kind, trial, job, inputs, outcome = json.loads(line)
    return Decision(seq=seq, kind=Kind(kind), trial=trial, job=job, inputs=inputs, outcome=outcome)


def rebuilt_from_rows(state: State) -> State:
    """The state as the tables have it: its trials and open jobs, through plain values and in another order."""
    trials = [
        Trial(
            number=t.number, values=dict(t.values), status=Status(t.status.value), rung=t.rung, is_held=t.is_held,
            has_returned=t.has_returned, parts={r: dict(p) for r, p in t.parts.items()}, curve=list(t.curve),
            results={
                k: Result(score=r.score, resource=r.resource, n=r.n, spread=r.spread, checkpoint=dict(r.checkpoint))
                for k, r in t.results.items()
            },
        )
        for t in reversed(state.trials.values())
    ]  # fmt: skip
    jobs = [
        OpenJob(number=j.number, trial=j.trial, rung=j.rung, repeat=j.repeat) for j in reversed(state.open.values())
    ]
    return State.rebuilt(state.settings, trials, jobs, seq=state.seq, is_exhausted=state.is_exhausted)


# -- the same again, by hand ------------------------------------------------------------------------------


class AshaByHand:
    """Algorithm 2 of Li et al. 2020: `get_job`, with rungs as dicts. Lower is better."""

    def __init__(
        self, seed: int, samples: int, milestones: Sequence[float], eta: int, *, is_open: bool = False
    ) -> None:
        self.seed, self.samples, self.milestones, self.eta, self.is_open = seed, samples, milestones, eta, is_open
        self.rungs: list[dict[int, float]] = [{} for _ in milestones]
        self.promoted: list[set[int]] = [set() for _ in milestones]
        self.begun = self.given = 0

    def ask(self) -> Job | None:
        for k in range(len(self.milestones) - 2, -1, -1):
            losses = self.rungs[k]
            finite = sorted((loss, trial) for trial, loss in losses.items() if math.isfinite(loss))
            for _, trial in finite[: len(losses) // self.eta]:
                if trial not in self.promoted[k]:
                    self.promoted[k].add(trial)
                    return self._job(trial, k + 1)
        if self.begun < self.samples:
            self.begun += 1
            return self._job(self.begun - 1, 0)
        return None

    def _job(self, trial: int, rung: int) -> Job:
        self.given += 1
        until = None if self.is_open and rung == len(self.milestones) - 1 else self.milestones[rung]
        return Job(self.given - 1, trial, rung, until, suggested(self.seed, trial))

    def tell(self, job: Job, ending: Ending) -> None:
        self.rungs[job.rung][job.trial] = ending.score
        if ending.end == "complete":
            for k in range(job.rung, len(self.milestones)):
                self.rungs[k][job.trial] = ending.score
                self.promoted[k].add(job.trial)


class MedianByHand:
    """Section 3.2.2 of Golovin et al. 2017, straight from its sentence. Lower is better."""

    def __init__(self, seed: int, samples: int, grace: int, least: int, every: int) -> None:
        self.seed, self.samples, self.grace, self.least, self.every = seed, samples, grace, least, every
        self.ended: dict[int, dict[float, float]] = {}
        self.begun = 0

    def ask(self) -> Job | None:
        if self.begun == self.samples:
            return None
        self.begun += 1
        others = [dict(curve) for curve in self.ended.values()]

        def stops(resource: float, best: float, before: float) -> bool:
            if resource < self.grace or (resource - self.grace) % self.every:
                return False
            seen = [at for curve in others for at in curve if at <= resource]
            row = max(seen, default=0)
            means = [statistics.fmean(v for at, v in c.items() if at <= row) for c in others if min(c) <= row]
            return len(means) >= self.least and best > statistics.median(means)

        return Job(self.begun - 1, self.begun - 1, 0, None, suggested(self.seed, self.begun - 1), judge=stops)

    def tell(self, job: Job, ending: Ending) -> None:
        if ending.end != "failed":
            self.ended[job.trial] = dict(ending.reports)


class Line:
    """A range of numbers, as exploring sees it."""

    is_drawn, is_listed, items = True, False, ()

    def __init__(self, key: str, low: float, high: float) -> None:
        self.key, self.low, self.high = key, low, high

    def value(self, r: float) -> float:
        return self.low + (self.high - self.low) * r

    def fitted(self, number: float) -> float:
        return min(max(number, self.low), self.high)


class Items:
    """A choice, as exploring sees it."""

    is_drawn, is_listed = True, True

    def __init__(self, key: str, items: Sequence[Any]) -> None:
        self.key, self.items = key, items

    def value(self, r: float) -> Any:
        return self.items[int(r * len(self.items))]

    def fitted(self, number: float) -> float:
        raise AssertionError("a choice is no number")


class ToySpace:
    dimensions = (Line("x", 0.0, 1.0), Line("speed", 0.15, 1.0), Items("kind", "abc"))

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)

    def contains(self, values: Mapping[str, Any]) -> str:
        return ""


def explored_by_hand(seed: int, generation: int, member: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Factors 0.8 and 1.2, a quarter drawn anew."""
    found: dict[str, Any] = {}
    for key in ("x", "speed", "kind"):
        label = f"{seed}/pbt/{generation}/{member}/explore/0/{key}"
        r = random.Random(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") >> 1)
        anew, second = r.random() < 0.25, r.random()
        if key == "kind":
            place = "abc".index(values[key]) + (1 if second >= 0.5 else -1)
            found[key] = "abc"[int(second * 3)] if anew else "abc"[max(0, min(2, place))]
        else:
            low = 0.0 if key == "x" else 0.15
            number = low + (1.0 - low) * second if anew else values[key] * (1.2 if second >= 0.5 else 0.8)
            found[key] = max(low, min(1.0, number))
    return found


def population_by_hand(
    seed: int, members: int, generations: int, train: Callable[[Job], Ending]
) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Synchronous, generation by generation, without lanes: (member, generation) -> (values, donor, how it ended,
    score as text). A quarter at each end."""
    table = repeated_by_hand(seed, members, generations, train, 1)
    return {key: (values, donor, ends[0], scores[0]) for key, (values, donor, ends, scores) in table.items()}


def repeated_by_hand(
    seed: int, members: int, generations: int, train: Callable[[Job], Ending], repeats: int
) -> dict[tuple[int, int], tuple[Any, ...]]:
    """The same where each member is so many runs, with how each ended and each score. Their mean counts, unless half of
    them have none; a donor gives something to each run of the other one."""
    table: dict[tuple[int, int], tuple[Any, ...]] = {}
    jobs = {m: Job(m, m, 0, 1.0, suggested(seed, m)) for m in range(members)}
    living = list(range(members))
    last: dict[int, Ending] = {}
    gives: dict[int, bool] = {}
    for g in range(generations):
        for m in living:
            runs = [train(replace(jobs[m], repeat=r)) for r in range(repeats)]
            scores = [run.score for run in runs if run.end != "failed" and not math.isnan(run.score)]
            mean = statistics.fmean(scores) if 2 * len(scores) > repeats else math.nan
            failed = sum(run.end == "failed" for run in runs)
            last[m] = Ending("failed" if 2 * failed >= repeats else "paused", mean, 0.0)
            gives[m] = failed == 0
            clone = jobs[m].clone
            donor = clone[0] if clone else None
            table[m, g] = (
                dict(jobs[m].values), donor, [str(run.end) for run in runs], [repr(run.score) for run in runs]
            )  # fmt: skip
        order = sorted(living, key=lambda m: (math.isnan(last[m].score), last[m].score if last[m].score > 0 else 0, m))
        ends = min(max(1, math.ceil(len(order) * 0.25)), len(order) // 2)
        top = [m for m in order[:ends] if not math.isnan(last[m].score) and gives[m]]
        bad = [m for m in living if m in order[len(order) - ends :] or math.isnan(last[m].score)]
        following = {}
        for m in living:
            if m in bad and top:
                donor = top[int(drawn(seed, "pbt", g, m, "donor") * len(top))]
                values = explored_by_hand(seed, g, m, jobs[donor].values)
                following[m] = Job(0, m, g + 1, g + 2.0, values, clone=(donor, g))
            elif last[m].end != "failed":
                following[m] = Job(0, m, g + 1, g + 2.0, jobs[m].values)
        living, jobs = list(following), following
    return table


class PopulationByHand:
    """Asynchronous: whoever has ended is ranked against everybody's newest score."""

    def __init__(self, seed: int, members: int, generations: int) -> None:
        self.seed, self.members, self.generations = seed, members, generations
        self.values: dict[int, dict[str, Any]] = {}
        self.newest: dict[int, tuple[float, int]] = {}
        self.idle: dict[int, tuple[int, bool]] = {}
        """Member -> (the generation it ended, whether it failed)."""

    def ask(self) -> Job | None:
        if len(self.values) < self.members:
            m = len(self.values)
            self.values[m] = suggested(self.seed, m)
            return Job(0, m, 0, 1.0, self.values[m])
        order = sorted(self.newest, key=lambda m: (math.isnan(self.newest[m][0]), self._loss(m), m))
        ends = min(max(1, math.ceil(len(order) * 0.25)), len(order) // 2)
        for g, m, has_failed in sorted((g, m, has_failed) for m, (g, has_failed) in self.idle.items()):
            if g == self.generations - 1:
                continue
            job = None
            if m in order[len(order) - ends :] or math.isnan(self.newest[m][0]):
                job = self._copy(m, g, [d for d in order[:ends] if d != m])
            if job is None and not has_failed:
                job = Job(0, m, g + 1, g + 2.0, self.values[m])
            if job is not None:
                del self.idle[m]
                return job
        return None

    def _loss(self, m: int) -> float:
        return 0.0 if math.isnan(self.newest[m][0]) else self.newest[m][0]

    def _copy(self, m: int, g: int, top: Sequence[int]) -> Job | None:
        able = [
            d for d in top
            if not math.isnan(self.newest[d][0]) and g <= self.newest[d][1] < self.generations - 1
        ]  # fmt: skip
        if not able:
            return None
        donor = able[int(drawn(self.seed, "pbt", g, m, "donor") * len(able))]
        self.values[m] = explored_by_hand(self.seed, g, m, self.values[donor])
        rung = self.newest[donor][1]
        return Job(0, m, rung + 1, rung + 2.0, self.values[m], clone=(donor, rung))

    def tell(self, job: Job, ending: Ending) -> None:
        self.newest[job.trial] = (ending.score, job.rung)
        self.idle[job.trial] = (job.rung, ending.end == "failed")
