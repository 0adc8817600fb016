"""What schedulers read, and how decisions change it.

A `State` is the sum of its decisions: `apply` is the only thing that changes it, schedulers only read. Only which way
the objective gets better may be found out later (`measured`), before the first score is in. The same
trials and jobs read back from rows give the same state (`State.rebuilt`), so that whoever takes over chooses as the
one before would have.

No clock, no lane and no order of arrival but `seq` is in here.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol


class Direction(StrEnum):
    """Which way the objective gets better."""

    min = "min"
    max = "max"


class Status(StrEnum):
    """Where a trial stands. It is held besides, whatever it is."""

    proposed = "proposed"
    running = "running"
    waiting = "waiting"
    complete = "complete"
    stopped = "stopped"
    failed = "failed"
    cancelled = "cancelled"


class End(StrEnum):
    """How a job ended: it reached its milestone, its function returned, a judge ended it, it failed for good, or
    somebody took it away."""

    paused = "paused"
    complete = "complete"
    ended = "ended"
    failed = "failed"
    cancelled = "cancelled"


class Kind(StrEnum):
    """What was decided."""

    suggest = "suggest"
    assign = "assign"
    result = "result"
    promote = "promote"
    exploit = "exploit"
    stop = "stop"
    fail = "fail"
    retry = "retry"
    reopen = "reopen"
    """Another attempt of a job that has not ended. `retry` says why it needs one, where the driver lived to see it."""
    gone = "gone"
    """A checkpoint that another trial was to go on from is not there any more."""
    request = "request"
    budget = "budget"
    over = "over"
    tune = "tune"
    """What a scheduler of Ray Tune said to the end of a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asha:
    """Milestones in units of the sweep's resource, lowest first; one in `reduction` is promoted."""

    milestones: tuple[float, ...]
    reduction: int = 3
    is_open: bool = False
    """Whether the highest rung ends where the function itself ends: its job has no milestone then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """`grace` in units of the resource: nothing is stopped below. `trials` must have ended before anything is
    compared, and then at every `every`."""

    grace: float = 1.0
    trials: int = 3
    every: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """`max` and `interval` in units of the resource. `mutate` is empty for all keys."""

    interval: float = 1.0
    max: float = 1.0
    is_open: bool = False
    """Whether the last generation ends where the function itself ends."""
    quantile: float = 0.25
    resample: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.2)
    is_sync: bool = True
    mutate: tuple[str, ...] = ()

    @property
    def generations(self) -> int:
        return max(1, math.ceil(self.max / self.interval - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    """A scheduler of Ray Tune, which says at each job's end what comes next: a rung is one job, and none is highest."""

    name: str
    """tune:NAME."""
    max: float = 0.0
    """Where the train function ends by itself, in units of the resource; 0: nobody knows."""


MOST_RUNGS = 10**9
"""Where there is no highest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the schedulers are told. `version` grows with every change, so that a decision says which it followed."""

    samples: int
    """Trials in all. For a population: its members."""
    seed: int = 0
    direction: Direction = Direction.min
    repeats: int = 1
    version: int = 0
    asha: Asha | None = None
    median: Median = Median()
    population: Population | None = None
    tune: Tune | None = None

    @property
    def top(self) -> int:
        """The highest rung."""
        if self.tune:
            return MOST_RUNGS
        if self.asha:
            return len(self.asha.milestones) - 1
        return self.population.generations - 1 if self.population else 0

    def until(self, rung: int) -> float | None:
        """Where a job of this rung pauses; None: where its function ends."""
        if self.asha:
            return None if self.asha.is_open and rung == self.top else self.asha.milestones[rung]
        if self.population:
            last = rung == self.top
            if last and self.population.is_open:
                return None
            return self.population.max if last else (rung + 1) * self.population.interval
        return None

    def changed(self, **changes: Any) -> Settings:
        return replace(self, **changes, version=self.version + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One numbered decision with all that it read. JSON values only, NaN and infinities as text."""

    seq: int
    kind: Kind
    trial: int | None = None
    job: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outcome: Mapping[str, Any] = field(default_factory=dict)


# -- choices ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """A trial that the searcher suggests begins."""

    until: float | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = Kind.suggest

    def outcome(self) -> dict[str, Any]:
        return {"rung": 0, "until": self.until}


@dataclass(frozen=True, slots=True, kw_only=True)
class Promote:
    """A trial goes on to a higher rung."""

    trial: int
    rung: int
    until: float | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = Kind.promote

    def outcome(self) -> dict[str, Any]:
        return {"trial": self.trial, "rung": self.rung, "until": self.until}


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue:
    """A trial goes on where it was, or with `clone` from another one's checkpoint and with other `values`."""

    trial: int
    rung: int
    until: float | None = None
    clone: Mapping[str, Any] | None = None
    values: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return Kind.assign if self.clone is None else Kind.exploit

    def outcome(self) -> dict[str, Any]:
        found: dict[str, Any] = {"trial": self.trial, "rung": self.rung, "until": self.until}
        if self.clone is not None:
            found |= {"clone": dict(self.clone), "values": dict(self.values or {})}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing now: the end of a running job may bring something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Nothing can come any more, unless somebody extends the sweep or lets a held trial go on."""

    reason: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = Kind.over

    def outcome(self) -> dict[str, Any]:
        return {"reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """What becomes of a trial whose job has ended, and of others at the same time. No job follows from it by itself."""

    trial: int
    rung: int
    """-1 where it was no job's end that others are stopped for."""
    action: str
    """continue, pause, stop, complete, failed, gone."""
    stopped: Sequence[Mapping[str, Any]] = ()
    """[{"trial", "is_whole": whether it has had all that it may have}]."""
    takes: Sequence[Mapping[str, Any]] = ()
    """[{"trial", "clone", "values"}]: what trials go on with when their next job begins, see `Continue`."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = Kind.tune

    def outcome(self) -> dict[str, Any]:
        stopped, takes = [dict(each) for each in self.stopped], [dict(each) for each in self.takes]
        return {"rung": self.rung, "action": self.action, "stopped": stopped, "takes": takes}


Choice = New | Promote | Continue | Wait | Over | Settle


class Scheduler(Protocol):
    """Which job comes next. A pure function of the state; ties go to the lower trial number."""

    name: str
    survives: str
    """What of it a restart keeps, for the plan."""

    def next(self, state: State) -> Choice: ...

    def judge(self, state: State, trial: int) -> Mapping[str, Any]:
        """What the job's own process gets along to judge itself by."""
        ...


# -- trials and rungs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A trial at the end of a rung. `score` is the mean of the `n` repeats that have one, NaN if it failed."""

    score: float
    resource: float
    n: int = 1
    spread: float = 0.0
    """Sample standard deviation over the repeats; 0 for a single one."""
    objectives: tuple[float, ...] = ()
    """One per objective, means over the repeats; the first is the score."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """Of repeat 0; empty where it has none, or none any more."""
    checkpoints: tuple[Mapping[str, Any], ...] = ()
    """Of each repeat, where there are several."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.score)

    @property
    def saved(self) -> tuple[Mapping[str, Any], ...]:
        """The checkpoint of each repeat."""
        return self.checkpoints or (self.checkpoint,)

    @property
    def can_give(self) -> bool:
        """Whether another trial can go on from it: each of its repeats from the same one here."""
        return all(self.saved)

    def given(self) -> dict[str, Any]:
        """What a clone says of it in a decision."""
        several = {"checkpoints": [dict(each) for each in self.checkpoints]} if self.checkpoints else {}
        return {"checkpoint": dict(self.checkpoint), **several}


@dataclass(slots=True, kw_only=True)
class Trial:
    number: int
    values: Mapping[str, Any]
    status: Status = Status.proposed
    rung: int = -1
    """The highest rung that it was sent to."""
    is_held: bool = False
    has_returned: bool = False
    """Whether its function ended by itself or by a judge: there is nothing left to train."""
    results: dict[int, Result] = field(default_factory=dict)
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Repeat -> how it ended, at the rung that not all repeats have ended yet."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(resource, score) of each report of repeat 0, in order."""
    clone: Mapping[str, Any] = field(default_factory=dict)
    """Whose checkpoint it took over at the rung that it was sent to last; empty: it goes on with its own."""

    @property
    def is_due(self) -> bool:
        """Whether the job that it was sent to is still owed: it was held, taken away, or is tried again."""
        if self.is_held or self.status not in (Status.proposed, Status.waiting):
            return False
        return self.rung not in self.results


class Happened(NamedTuple):
    """Something that a scheduler with a memory of its own has to hear of, in this order, to know what it knew."""

    what: str
    """room (`more` is the number of trials in all), exhausted, begun (`more` is the trial's values), ended (`more` is
    a `JobEnd`), settled (`more` is what was decided then), held, freed, gone, again."""
    trial: int = -1
    rung: int = -1
    more: Any = None


class JobEnd(NamedTuple):
    """How a trial stood at the end of a rung."""

    status: Status
    has_returned: bool
    result: Result
    points: Sequence[tuple[float, float]]
    """(resource, score) of the reports since the rung before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    number: int
    trial: int
    rung: int
    repeat: int = 0


class Rung:
    """The trials with a score at one milestone, best first by (score, trial number); those without a finite score
    last. Its digest does not depend on the order in which they came."""

    def __init__(self) -> None:
        self.ranked: list[tuple[bool, float, int]] = []
        self.free: list[tuple[bool, float, int]] = []
        """Of these, those that wait here and may go on; they have finite scores."""
        self._sum = 0

    def enter(self, direction: Direction, trial: int, score: float) -> None:
        bisect.insort(self.ranked, rank(direction, trial, score))
        self._sum += _weight(trial, score)

    def leave(self, direction: Direction, trial: int, score: float) -> None:
        del self.ranked[bisect.bisect_left(self.ranked, rank(direction, trial, score))]
        self._sum -= _weight(trial, score)

    @property
    def finite(self) -> int:
        """How many have a finite score."""
        return bisect.bisect_left(self.ranked, (True,))

    @property
    def digest(self) -> str:
        return f"{self._sum % 2**64:016x}"


def rank(direction: Direction, trial: int, score: float) -> tuple[bool, float, int]:
    """Sorts the best first, what has no finite score last, and of equal ones the lower number."""
    if not math.isfinite(score):
        return True, 0.0, trial
    return False, -score if direction == Direction.max else score, trial


def _weight(trial: int, score: float) -> int:
    # A sum of hashes: one entry can be put in or taken out without reading ten thousand others.
    text = f"{trial}:{score!r}" if math.isfinite(score) else f"{trial}:none"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def plain(score: float) -> float | None:
    """A score for JSON: None where there is no finite one."""
    return score if math.isfinite(score) else None


def number(value: Any) -> float:
    """A score from JSON: NaN for None, and for the text that NaN and infinities are stored as."""
    return math.nan if value is None else float(value)


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Of each column; rows that say less than the others leave their columns out."""
    return tuple(statistics.fmean(column) for column in zip(*rows, strict=False))


def _given(value: int | None, what: str) -> int:
    if value is None:
        raise KeyError(f"no {what}")
    return value


class State:
    """All that schedulers know of a sweep."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.trials: dict[int, Trial] = {}
        self.open: dict[int, OpenJob] = {}
        self.rungs: list[Rung] = self._empty_rungs()
        self.seq = -1
        """Of the newest decision."""
        self.is_exhausted = False
        """Whether the searcher has nothing more to suggest, ever."""
        self.entered: tuple[int, int] | None = None
        """(trial, rung) that the newest decision has brought to its end."""
        self.curves: list[int] = []
        """Trials that are complete or stopped and have a curve, in the order of their ends."""
        self.story: list[Happened] = [Happened("room", more=settings.samples)] if settings.tune else []
        """For schedulers of Tune, else empty."""
        self.takes: dict[int, Mapping[str, Any]] = {}
        """Trial -> the clone and values with which its next job begins, where a scheduler of Tune has said so."""
        # What `due` and `owed_repeat` would find in ten thousand trials.
        self._due: set[int] = set()
        self._partial: set[int] = set()
        self._free: dict[int, tuple[int, tuple[bool, float, int]]] = {}
        """Trial -> (rung, its entry there) of those that are free there."""

    @classmethod
    def rebuilt(
        cls,
        settings: Settings,
        trials: Iterable[Trial],
        jobs: Iterable[OpenJob],
        *,
        seq: int,
        is_exhausted: bool = False,
    ) -> State:
        """The state that the rows of a sweep say; `jobs` are the open ones."""
        state = cls(settings)
        state.trials = {trial.number: trial for trial in sorted(trials, key=lambda t: t.number)}
        state.open = {job.number: job for job in sorted(jobs, key=lambda j: j.number)}
        state.seq, state.is_exhausted = seq, is_exhausted
        state._rank_all()
        for trial in state.trials.values():
            state._touch(trial)
            state._note_curve(trial)
        return state

    @classmethod
    def folded(cls, settings: Settings, decisions: Iterable[Decision]) -> State:
        state = cls(settings)
        for decision in decisions:
            state.apply(decision)
        return state

    def apply(self, decision: Decision) -> None:
        """Takes the next decision in. ValueError if it is not the next one, or speaks of what there is not."""
        if decision.seq != self.seq + 1:
            raise ValueError(f"Decision {decision.seq} cannot follow decision {self.seq}.")
        self.entered = None
        try:
            self._take(decision)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"Decision {decision.seq} ({decision.kind}) speaks of what there is not: {error}."
            ) from error
        self.seq = decision.seq

    def measured(self, direction: Direction) -> None:
        """Which way the objective gets better, where nobody had said it. ValueError once scores were compared."""
        if direction == self.settings.direction:
            return
        if any(rung.ranked for rung in self.rungs):
            raise ValueError(f"Scores were compared by {self.settings.direction} already.")
        self.settings = replace(self.settings, direction=direction)

    # -- questions ----------------------------------------------------------------------------------------

    def due(self) -> Trial | None:
        """The lowest trial that was sent to a rung and has no job there."""
        return self.trials[min(self._due)] if self._due else None

    def owed_repeat(self) -> tuple[int, int, int] | None:
        """(trial, rung, repeat) of the next repeat of what was begun: lowest trial, then lowest repeat."""
        if self.settings.repeats == 1:
            return None
        begun: dict[int, set[int]] = {}
        for job in self.open.values():
            begun.setdefault(job.trial, set()).add(job.repeat)
        for trial in (self.trials[number] for number in sorted(self._partial | set(begun))):
            runs_or_waits = trial.status in (Status.running, Status.waiting, Status.proposed)
            there = begun.get(trial.number, set()) | set(trial.parts)
            if trial.is_held or not runs_or_waits or not there:
                continue
            for repeat in range(self.settings.repeats):
                if repeat not in there:
                    return trial.number, trial.rung, repeat
        return None

    def has_room(self) -> bool:
        """Whether another trial may begin. Failed ones count."""
        return len(self.trials) < self.settings.samples and not self.is_exhausted

    def idle(self) -> Wait | Over:
        """What is left to say where nothing can be started."""
        if self.open:
            return Wait()
        held = sum(trial.is_held for trial in self.trials.values())
        reason = f"{held} held trials wait for `continue`" if held else ""
        return Over(reason=reason, inputs={"trials": len(self.trials), "held": held, "settings": self.settings.version})

    def _is_open(self, trial: int) -> bool:
        return any(job.trial == trial for job in self.open.values())

    def _touch(self, trial: Trial) -> None:
        """Whether it is due, whether repeats of it are missing and whether it may go on, after a change."""
        is_due = trial.is_due and not trial.parts and not self._is_open(trial.number)
        (self._due.add if is_due else self._due.discard)(trial.number)
        (self._partial.add if trial.parts else self._partial.discard)(trial.number)
        freed = self._free.pop(trial.number, None)
        if freed is not None:
            entries = self.rungs[freed[0]].free
            del entries[bisect.bisect_left(entries, freed[1])]
        result = trial.results.get(trial.rung)
        is_ranked = result is not None and result.is_finite and not self.settings.tune
        if trial.status == Status.waiting and not trial.is_held and result is not None and is_ranked:
            entry = rank(self.settings.direction, trial.number, result.score)
            bisect.insort(self.rungs[trial.rung].free, entry)
            self._free[trial.number] = trial.rung, entry

    def _note_curve(self, trial: Trial) -> None:
        if trial.curve and trial.status in (Status.complete, Status.stopped):
            self.curves.append(trial.number)

    # -- the fold -----------------------------------------------------------------------------------------

    def _take(self, decision: Decision) -> None:
        outcome = decision.outcome
        match decision.kind:
            case Kind.suggest:
                if outcome.get("exhausted"):
                    self.is_exhausted = True
                    self._tell("exhausted")
                    return
                new = _given(decision.trial, "trial")
                if new in self.trials:
                    raise KeyError(f"trial {new} once more")
                self.trials[new] = Trial(number=new, values=outcome["values"])
                if decision.job is not None:
                    self._begin(decision)
            case Kind.assign | Kind.promote | Kind.exploit:
                self._begin(decision)
            case Kind.result | Kind.fail:
                job = self.open.pop(_given(decision.job, "job"))
                self._end(job, decision)
                self._touch(self.trials[job.trial])
            case Kind.gone:
                trial, rung = self.trials[_given(decision.trial, "trial")], int(outcome["rung"])
                trial.results[rung] = replace(trial.results[rung], checkpoint={}, checkpoints=())
                self.takes.pop(int(outcome["for"]), None)
            case Kind.request:
                self._obey(outcome)
            case Kind.tune:
                self._settle(decision)

    def _tell(self, what: str, trial: int = -1, rung: int = -1, more: Any = None) -> None:
        if self.settings.tune:
            self.story.append(Happened(what, trial, rung, more))

    def _settle(self, decision: Decision) -> None:
        outcome = decision.outcome
        for each in outcome["stopped"]:
            trial = self.trials[each["trial"]]
            if trial.status == Status.waiting:
                trial.status = Status.complete if each["is_whole"] else Status.stopped
                trial.has_returned = True
                self._note_curve(trial)
                self._touch(trial)
        for each in outcome["takes"]:
            self.takes[each["trial"]] = {"clone": each["clone"], "values": each["values"]}
        self._tell("settled", _given(decision.trial, "trial"), more=outcome)

    def _begin(self, decision: Decision) -> None:
        trial, outcome = self.trials[_given(decision.trial, "trial")], decision.outcome
        job, rung = _given(decision.job, "job"), int(outcome["rung"])
        if job in self.open or not 0 <= rung <= self.settings.top:
            raise KeyError(f"job {job} at rung {rung}")
        if decision.kind == Kind.exploit:
            trial.values = outcome["values"]
            trial.clone = {**outcome["clone"], "job": job}
        elif rung > trial.rung:
            trial.clone = {}
        self.takes.pop(trial.number, None)
        trial.rung = max(trial.rung, rung)
        trial.status = Status.running
        self._tell("begun", trial.number, rung, dict(trial.values))
        self.open[job] = OpenJob(number=job, trial=trial.number, rung=rung, repeat=int(outcome.get("repeat", 0)))
        self._touch(trial)

    def _end(self, job: OpenJob, decision: Decision) -> None:
        trial, outcome = self.trials[job.trial], decision.outcome
        if trial.status == Status.cancelled:
            return
        end = End.failed if decision.kind == Kind.fail else End(outcome["end"])
        if end == End.cancelled:
            trial.status = Status.waiting if trial.is_held else Status.cancelled
            if not trial.is_held:
                self._tell("gone", trial.number)
            return
        heard = len(trial.curve)
        if job.repeat == 0:
            # A job's reports are those of its repeat's whole life.
            known = trial.curve[-1][0] if trial.curve else -math.inf
            trial.curve += [(float(at), number(each)) for at, each in outcome.get("reports", ()) if at > known]
        trial.parts[job.repeat] = {
            "end": end.value,
            "score": number(outcome.get("score")),
            "resource": float(outcome.get("resource") or 0.0),
            "objectives": [number(each) for each in outcome.get("objectives") or ()],
            "checkpoint": outcome.get("checkpoint") or {},
        }
        if len(trial.parts) == self.settings.repeats:
            parts = [trial.parts[repeat] for repeat in sorted(trial.parts)]
            trial.parts = {}
            self._enter(trial, job.rung, parts)
            said = JobEnd(trial.status, trial.has_returned, trial.results[job.rung], tuple(trial.curve[heard:]))
            self._tell("ended", trial.number, job.rung, said)

    def _enter(self, trial: Trial, rung: int, parts: Sequence[Mapping[str, Any]]) -> None:
        """All repeats are in: the mean of those that have a score counts, unless half of them have none."""
        whole = [part for part in parts if part["end"] != End.failed]
        scored = [part for part in whole if math.isfinite(part["score"])]
        scores = [part["score"] for part in scored]
        counts = 2 * (len(parts) - len(scores)) < len(parts)
        trial.results[rung] = Result(
            score=statistics.fmean(scores) if counts else math.nan,
            resource=max((part["resource"] for part in parts), default=0.0),
            n=len(scores) if counts else 0,
            spread=statistics.stdev(scores) if counts and len(scores) > 1 else 0.0,
            objectives=_means([part.get("objectives", ()) for part in scored]) if counts else (),
            checkpoint=parts[0]["checkpoint"],
            checkpoints=tuple(part["checkpoint"] for part in parts) if len(parts) > 1 else (),
        )
        self.entered = trial.number, rung
        ends = {part["end"] for part in whole}
        if 2 * (len(parts) - len(whole)) >= len(parts):
            trial.status = Status.failed
        elif ends & {End.complete, End.ended}:
            # One repeat that has nothing left to train is enough: means over fewer runs would not compare.
            trial.has_returned = True
            trial.status = Status.complete if End.complete in ends else Status.stopped
        else:
            trial.status = Status.complete if rung == self.settings.top else Status.waiting
        self._note_curve(trial)
        self._place(trial, rung)

    def _place(self, trial: Trial, rung: int) -> None:
        """What has nothing left to train counts in all higher rungs at once."""
        if self.settings.tune:
            return
        last = self.settings.top if trial.has_returned and rung == trial.rung else rung
        for each in range(rung, last + 1):
            self.rungs[each].enter(self.settings.direction, trial.number, trial.results[rung].score)

    def _rank_all(self) -> None:
        """`_touch` has to follow for all."""
        self.rungs = self._empty_rungs()
        self._free = {}
        for trial in self.trials.values():
            for rung in sorted(trial.results):
                self._place(trial, rung)

    def _empty_rungs(self) -> list[Rung]:
        return [] if self.settings.tune else [Rung() for _ in range(self.settings.top + 1)]

    def _obey(self, outcome: Mapping[str, Any]) -> None:
        changes = outcome.get("settings")
        if changes:
            self._change(changes)
        for each in outcome.get("trials", ()):
            trial, what = self.trials[each["trial"]], each["what"]
            if what == "hold":
                trial.is_held = True
                self._tell("held", trial.number)
            elif what == "continue":
                trial.is_held = False
                self._tell("freed", trial.number)
            elif what == "stop":
                trial.status = Status.cancelled
                self._tell("gone", trial.number)
            elif what == "retry":
                self._retry(trial)
            self._touch(trial)

    def _change(self, changes: Mapping[str, Any]) -> None:
        before, after = self.settings, self.settings
        if "samples" in changes:
            after = replace(after, samples=int(changes["samples"]))
            self.is_exhausted = False
            self._tell("room", more=after.samples)
        if "milestones" in changes and after.asha:
            after = replace(after, asha=replace(after.asha, milestones=tuple(map(float, changes["milestones"]))))
        if "median" in changes:
            after = replace(after, median=replace(after.median, **changes["median"]))
        self.settings = replace(after, version=before.version + 1)
        if after.top != before.top:
            for trial in self.trials.values():
                if trial.status == Status.complete and not trial.has_returned:
                    trial.status = Status.waiting
            self._rank_all()
            for trial in self.trials.values():
                self._touch(trial)

    def _retry(self, trial: Trial) -> None:
        """A failed trial begins its rung again; its place there is given up until it has ended."""
        if trial.status != Status.failed:
            return
        gone = trial.results.pop(trial.rung)
        trial.status = Status.waiting
        if self.settings.tune:
            self._tell("again", trial.number)
            return
        self.rungs[trial.rung].leave(self.settings.direction, trial.number, gone.score)
        if not self.settings.top:
            trial.curve = []  # its next attempt reports all of it again, its checkpoint's part from memory
