"""The one place that decides what a sweep does next.

What it knows is the sum of its decisions. Each is sent to the ledger, with the rows and attempts that follow from it,
before anything is done about it: a driver that dies loses nothing but its own time, and the next one folds the same
decisions to the same state.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from orchestrator.clock import Clock, SystemClock
from orchestrator.config.settings import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.failures.policy import SAME_AGAIN, Abilities, Action, Failure, decide, draw_of
from orchestrator.failures.policy import Decision as FailureDecision
from orchestrator.failures.policy import Rules as FailureRules
from orchestrator.records import RunSpec, RunTicket
from orchestrator.status import RunStatus
from orchestrator.sweep_records import (
    DecisionRow,
    JobRow,
    RequestRow,
    RunEnd,
    SweepPoll,
    SweepRecord,
    SweepSpec,
    SweepStep,
    TrialRow,
)
from orchestrator.sweeps import budget, rules
from orchestrator.sweeps.budget import Gang, Work
from orchestrator.sweeps.jobs import Assigned, Ended, Ending, Ledger
from orchestrator.sweeps.median import MOST_ROWS
from orchestrator.sweeps.replay import tellings
from orchestrator.sweeps.requests import Standing, answered, changed
from orchestrator.sweeps.search import Searcher, total
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.state import (
    Choice,
    Continue,
    Decision,
    Direction,
    End,
    Kind,
    New,
    Over,
    Scheduler,
    Settle,
    State,
    Status,
    Trial,
    Wait,
    number,
    plain,
)
from orchestrator.sweeps.summary import SweepView
from orchestrator.sweeps.values import Past, Telling, stored

SENDINGS = 3
"""So often a step is sent when its answer is lost; then the caller hears of it, and the next call sends it again."""
SAVED_EVERY = 30.0
"""Seconds after which what was spent is recorded, where no decision does it."""
MOST_REPORTS = 2000
"""Of a job, in its row."""

BEGINNINGS = (Kind.suggest, Kind.assign, Kind.promote, Kind.exploit)


class Hold(Protocol):
    """Keeps a checkpoint of another trial's run from being removed while a job starts from it, or lets it go. False
    where it is gone."""

    def __call__(self, *, run: str, checkpoint: str, token: str, is_held: bool) -> bool: ...


@dataclass(slots=True, kw_only=True)
class _Open:
    """A job that has not ended."""

    row: JobRow
    history: tuple[Failure, ...] = ()
    """Failures after which it was tried again, in a row without progress."""
    reached: float = -1.0
    """How far it was at a crash, see `_progress`."""
    after: float = 0.0
    """Seconds that its next attempt waits before it begins."""

    @property
    def restarts(self) -> int:
        return len(self.history)


@dataclass(slots=True, kw_only=True)
class _Known:
    """What rows of a trial say besides its state."""

    values: Mapping[str, Any]
    """As suggested."""
    seq: int = -1
    """Of the decision that suggested it."""
    origin: str = ""
    run: str = ""
    config_hash: str = ""
    reason: str = ""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    clones: list[list[int]] = field(default_factory=list)
    """[rung, the trial that it took over there, the rung of that one's checkpoint]"""
    ended_at: float | None = None
    tellings: list[Telling] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A step in the making. Its decisions are in the state already."""

    after: int
    decisions: list[DecisionRow] = field(default_factory=list)
    trials: set[int] = field(default_factory=set)
    jobs: list[JobRow] = field(default_factory=list)
    opens: list[tuple[int, RunSpec]] = field(default_factory=list)
    closes: list[RunEnd] = field(default_factory=list)
    answers: list[tuple[int, str]] = field(default_factory=list)
    begins: list[Assigned] = field(default_factory=list)
    """Without their tickets."""
    tellings: list[tuple[int, Telling]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Jobs that nobody runs any more."""
    has_facts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What becomes of a job whose ranks came back."""

    end: End | None
    """None: it is not over, another attempt goes on."""
    status: RunStatus
    """Of the attempt."""
    reason: str = ""
    what: str = ""
    """Why it is tried again: crash, lost, stopped."""
    kind: str = ""
    """Of the failure."""
    failure: Failure | None = None
    decision: FailureDecision | None = None
    """What follows it, where policy was asked."""


class Core:
    """Decides. Called from one thread; one call is at most a few steps.

    Every public call may raise SweepTaken (another driver has the sweep: this one is done), ConnectionError,
    TimeoutError or ServiceUnavailable. After the latter three, what was to be recorded is kept and sent again, the
    same, by the next call whatever it is; asking again is right, and an ending that was recorded after all is not
    counted twice.

    `spec_of` makes the RunSpec of a trial's run from (trial, repeat, values), with `new_run`. `renewed` makes the
    searcher anew when samples or space are changed. `params` are those of the base configuration. `gang` is what a job
    holds, `at_once` how many there is room for, `unmeasured` why nobody measures their energy. `stopping` is the spec
    of early stoppers for jobs' judges. `hold` keeps donors' checkpoints. `failures` says what follows a failed job;
    where it has no `max_restarts`, `sweep.restarts` is that.
    """

    def __init__(
        self,
        record: SweepRecord,
        ledger: Ledger,
        *,
        driver: str,
        settings: SweepConfig,
        space: Space,
        searcher: Searcher,
        scheduler: Scheduler,
        spec_of: Callable[[int, int, Mapping[str, Any]], RunSpec],
        clock: Clock | None = None,
        params: Mapping[str, Any] | None = None,
        gang: Gang | None = None,
        at_once: int = 0,
        unmeasured: str = "",
        renewed: Callable[[SweepConfig, Space], Searcher] | None = None,
        stopping: Mapping[str, Any] | None = None,
        hold: Hold | None = None,
        failures: FailureRules | None = None,
    ) -> None:
        self.sweep, self._seed = record.spec.sweep, record.spec.seed
        self._failure_rules = failures or FailureRules()
        self.settings, self._space = settings, space
        self._ledger, self._driver, self._spec_of, self._clock = ledger, driver, spec_of, clock or SystemClock()
        self._searcher, self._scheduler, self._renewed = searcher, scheduler, renewed
        self._gang, self._stopping, self._hold = gang or Gang(), dict(stopping or {}), hold
        self._at_once, self._unmeasured = at_once, unmeasured
        self.facts: dict[str, Any] = dict(record.facts)
        self._is_new = "rules" not in self.facts
        if self._is_new:
            first = rules.rules_for(settings, samples=self._total(searcher), seed=self._seed, params=params or {})
            self.facts["rules"] = rules.to_json(first)
        self.state = State(rules.from_json(self.facts["rules"]))
        if self.facts.get("objectives"):
            self.state.measured(Direction(self.facts["objectives"][0][1]))

        self._open: dict[int, _Open] = {}
        self._known: dict[int, _Known] = {}
        self._given: dict[int, Assigned] = {}
        self._since: dict[int, float] = {}
        """Of jobs that were given out: when, by the monotonic clock."""
        self._ready: deque[Assigned] = deque()
        self._attempts: Counter[tuple[int, int]] = Counter()
        self._changes: dict[tuple[int, int], dict[str, Any]] = {}
        """(trial, repeat) -> what its attempts do otherwise since one failed, `failures.policy.Decision.changes`."""
        self._next_job = 0
        self._failures: dict[int, str] = {}
        """Failed trials, with the kind of their failure."""
        self._last: Kind | None = None
        self._pending: tuple[SweepStep, _Draft] | None = None
        self._choice: tuple[int, Choice] | None = None
        self._stop_reason = ""
        self._refusal = ""
        self._rows: dict[int, TrialRow] = {}
        self._told: set[int] = set()
        """Trials that the searcher has heard of."""
        self._said: set[str] = set()
        """Words about the budget that were said."""
        self._spent: dict[str, float] = budget.added(record.spent, {}, settings.prices)
        """Without the jobs that run now."""
        self._began = self._saved = self._clock.monotonic()
        self._wall = self._spent["hours"]
        self._is_renewed = False
        self._has_news = False

        self._resume(record)
        self._note_work()

    @classmethod
    def open(
        cls, spec: SweepSpec, ledger: Ledger, *, driver: str, settings: SweepConfig, space: Space,
        scheduler: Scheduler | None = None, **more: Any,
    ) -> Core:  # fmt: skip
        """Of a sweep that is new, or was left by another driver. `more` as the constructor takes it."""
        record = ledger.open_sweep(spec, driver)
        return cls(
            record, ledger, driver=driver, settings=settings, space=space,
            scheduler=scheduler or rules.scheduler_for(settings, space), **more,
        )  # fmt: skip

    # -- for whoever runs the jobs ------------------------------------------------------------------------

    def next_job(self) -> Assigned | None:
        """The next job; None: nothing now. Recorded, and its attempt opened, before it is given out.

        First what an earlier driver or a crash left, then missing repeats, then what the scheduler says.
        """
        self._settle()
        if not self._ready and not self._halted() and not self._is_full():
            self._decide_next()
        return self._ready.popleft() if self._ready else None

    def ended(self, job: int, ending: Ending) -> None:
        """How a job ended. Said twice it counts once; of a job that was not given out it is not heard."""
        self._settle()
        assigned = self._given.get(job)
        if assigned is None:
            return
        draft = self._draft()
        self._measure(draft, ending.tally)
        verdict = self._after(assigned, ending)
        self._end(draft, assigned, ending, verdict)
        self._commit(draft)

    def is_over(self) -> bool:
        """Whether nothing can come any more and nothing runs. Recorded the first time."""
        self._settle()
        if self._given or self._ready:
            return False
        if self._stop_reason:
            return True
        reason = self._halted()
        if not reason:
            if self._left() is not None or self.state.owed_repeat() is not None:
                return False
            choice = self._chosen()
            if not isinstance(choice, Over):
                return False
            reason = choice.reason
        if self._last != Kind.over:
            self._record_over(reason)
        return True

    def stop(self, reason: str) -> None:
        """No further jobs. Those that run are in the next poll's `stops`."""
        self._stop_reason = self._stop_reason or reason

    def running(self) -> Sequence[Assigned]:
        return list(self._given.values())

    def poll(self) -> SweepPoll:
        """What is asked of the sweep, answered; `stops` are the runs that have to be asked to stop now."""
        self._settle()
        polled = self._ledger.sweep_poll(self.sweep, self._driver)
        if polled.is_taken:
            return polled
        for request in polled.requests:
            self._answer(request)
        stops = dict.fromkeys([*polled.stops, *self._unwanted()])
        return SweepPoll(stops=tuple(stops))

    def spend(self, *, kwh: float | None = None) -> str:
        """Counts what was used so far, `kwh` in all where it is measured; records it now and then, and once where a
        limit is near or reached. Gives the words for that, '' where there is nothing to say."""
        self._settle()
        if kwh is not None:
            self._spent["kwh"] = max(kwh, self._spent["kwh"])  # of removed trials nothing is left to measure
        said = self._watch_budget()
        if not said and self._clock.monotonic() - self._saved >= SAVED_EVERY:
            self._commit(self._draft())
        return said

    @property
    def reason(self) -> str:
        """Why no further job is given out, '' while some may come or all was done."""
        return self._halted()

    @property
    def spent(self) -> dict[str, float]:
        """{"hours", "gpu_hours", "cpu_hours", "money", "kwh"} in all, with the jobs that run now."""
        now = self._clock.monotonic()
        running = Counter[str]()
        for since in self._since.values():
            running.update(self._gang.used(now - since))
        found = budget.added(self._spent, running, self.settings.prices)
        found["hours"] = self._wall + (now - self._began) / 3600
        return found

    def view(self) -> SweepView:
        """How it stands, for people."""
        return SweepView(
            sweep=self.sweep,
            scheduler=self._scheduler.name,
            objectives=tuple((metric, direction) for metric, direction in self._objectives()),
            unit=self.facts.get("unit", ""),
            samples=self.state.settings.samples,
            milestones=self.state.settings.asha.milestones if self.state.settings.asha else (),
            reduction=self.state.settings.asha.reduction if self.state.settings.asha else 0,
            ends_at=self.state.settings.population.max if self.state.settings.population else 0.0,
            seq=self.state.seq,
            trials=tuple(self._rows.values()),
            jobs=tuple(self._open[job].row for job in self._given),
            keys=tuple(each.key for each in self._space.dimensions),
            spent=self.spent,
            currency=self.settings.prices.currency,
            work=Work(
                gang=self._gang,
                at_once=self.facts["work"]["at_once"],
                lane_seconds=self._gang.seconds(self._spent),
                prices=self.settings.prices,
            ),
            failures=dict(Counter(self._failures.values())),
            reason=self._halted(),
            notes=self._notes(),
        )

    def _note_work(self) -> None:
        """For who shows a sweep that nobody runs: what its jobs hold, and how many there are at once."""
        most = self.settings.concurrency
        at_once = min(most or self._at_once, self._at_once or most)
        work = {"cpus": self._gang.cpus, "gpus": self._gang.gpus, "at_once": at_once}
        self._has_news |= self.facts.get("work") != work
        self.facts["work"] = work

    def _notes(self) -> tuple[str, ...]:
        found = []
        if not self.rebuilt.is_exact:
            found.append(f"the searcher goes on, but not as it would have: {self.rebuilt.why}")
        if self.state.settings.asha and not self.facts.get("has_state", True):
            found.append("run.report(…) has no state: trials that are promoted begin anew")
        if lost := getattr(self._scheduler, "lost", ""):
            found.append(lost)
        return tuple(found)

    # -- what comes next ----------------------------------------------------------------------------------

    def _decide_next(self) -> None:
        if any(job not in self._given and self._is_parted(each.row.trial) for job, each in self._open.items()):
            draft = self._draft()
            self._take_away(draft)
            self._commit(draft)
        left = self._left()
        if left is not None:
            self._reopen(left)
            return
        owed = self.state.owed_repeat()
        if owed is not None:
            trial, rung, repeat = owed
            self._begin(Kind.assign, trial, repeat, rung, inputs={"owed": [trial, rung, repeat]})
            return
        choice = self._chosen()
        while isinstance(choice, Continue) and choice.clone and not self._keeps(choice.trial, choice.clone):
            choice = self._chosen()
        if isinstance(choice, New):
            self._suggest(choice)
        elif isinstance(choice, Settle):
            draft, outcome = self._draft(), choice.outcome()
            self._decide(draft, choice.kind, trial=choice.trial, inputs=choice.inputs, outcome=outcome)
            draft.trials |= {each["trial"] for each in outcome["stopped"]}
            self._commit(draft)
            self._decide_next()
        elif not isinstance(choice, Wait | Over):
            outcome = choice.outcome()
            self._begin(choice.kind, choice.trial, 0, choice.rung, inputs=choice.inputs, outcome=outcome)

    def _chosen(self) -> Choice:
        if self._choice is None or self._choice[0] != self.state.seq:
            self._choice = self.state.seq, self._scheduler.next(self.state)
        return self._choice[1]

    def _left(self) -> int | None:
        """The lowest job that is not over, and that nobody runs."""
        left = [job for job in self._open if job not in self._given and not self._is_parted(self._open[job].row.trial)]
        return min(left, default=None)

    def _is_parted(self, trial: int) -> bool:
        """Whether somebody took it out: what runs of it ends, and nothing begins."""
        found = self.state.trials[trial]
        return found.is_held or found.status == Status.cancelled

    def _is_full(self) -> bool:
        return 0 < self.settings.concurrency <= len(self._given)

    def _halted(self) -> str:
        if self._stop_reason or self._refusal:
            return self._stop_reason or self._refusal
        limit = budget.used_up(self.spent, self.settings.budget, self.settings.prices)
        if limit is not None:
            return str(limit)
        if 0 < self.settings.max_failed <= len(self._failures):
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(self._failures.values()).most_common())
            return f"{len(self._failures)} trials failed (sweep.max_failed={self.settings.max_failed}): {kinds}"
        return ""

    def _suggest(self, choice: New) -> None:
        trial = len(self.state.trials)
        found = self._searcher.suggest(trial)
        draft = self._draft()
        if found is None:
            self._decide(draft, Kind.suggest, inputs={"search": {"number": trial}}, outcome={"exhausted": True})
            self._commit(draft)
            self._decide_next()
            return
        spec = self._spec_of(trial, 0, found.values)
        outcome = {
            **choice.outcome(), "values": dict(found.values), "origin": found.origin, "token": found.token,
            "run": spec.new_run, "config_hash": spec.config_hash,
        }  # fmt: skip
        inputs = {**choice.inputs, "search": dict(found.inputs)}
        self._begin(Kind.suggest, trial, 0, 0, inputs=inputs, outcome=outcome, spec=spec)

    def _begin(
        self, kind: Kind, trial: int, repeat: int, rung: int, *, inputs: Mapping[str, Any],
        outcome: Mapping[str, Any] | None = None, spec: RunSpec | None = None,
    ) -> None:  # fmt: skip
        """A new job, with its attempt."""
        draft, job, until = self._draft(), self._next_job, self.state.settings.until(rung)
        said = {"trial": trial, "rung": rung, "until": until, "repeat": repeat, **(outcome or {})}
        until = said["until"]
        values = said.get("values") or self.state.trials[trial].values
        if spec is None:
            spec = self._spec_of(trial, repeat, values)
            if kind == Kind.exploit:
                said["config_hash"] = spec.config_hash
        clone = self._clone(kind, trial, said)
        if clone and kind == Kind.assign:
            self._holds(clone, repeat)
        if clone and inputs.get("gone"):
            gone = ", ".join(str(each) for each in inputs["gone"])
            clone["instead_of"] = f"what trial {gone} had saved is gone"
        judge = self._judge(trial, until)
        self._decide(draft, kind, trial=trial, job=job, inputs=inputs, outcome=said)
        if clone:
            clone["since"] = self._attempts[trial, repeat]
        row = JobRow(
            number=job, trial=trial, repeat=repeat, rung=rung, until=until, run=spec.new_run or spec.run,
            attempt=self._attempts[trial, repeat], judge=judge, clone=clone,
        )  # fmt: skip
        self._open[job].row = row
        self._open_attempt(draft, row, spec)
        self._commit(draft)

    def _reopen(self, job: int) -> None:
        """The next attempt of a job that has not ended."""
        draft, open_ = self._draft(), self._open[job]
        row = open_.row
        spec = self._spec_of(row.trial, row.repeat, self.state.trials[row.trial].values)
        if row.clone:
            self._holds(row.clone, row.repeat)
        self._decide(draft, Kind.reopen, trial=row.trial, job=job, outcome={"restarts": open_.restarts})
        judge = {**row.judge, **self._measure_of_judge()}
        attempt = self._attempts[row.trial, row.repeat]
        open_.row = replace(
            row, attempt=attempt, judge=judge, run=spec.new_run or row.run, status="assigned", restarts=open_.restarts
        )
        self._open_attempt(draft, open_.row, spec)
        self._commit(draft)

    def _open_attempt(self, draft: _Draft, row: JobRow, spec: RunSpec) -> None:
        if row.attempt > 1:
            # Its latest attempt is known to be over, whatever it says of itself: nobody else may run this trial.
            spec = replace(spec, run=row.run, new_run="", after_attempt=row.attempt - 1)
        draft.opens.append((row.number, spec))
        draft.jobs.append(row)
        draft.trials.add(row.trial)
        values = self.state.trials[row.trial].values
        draft.begins.append(
            Assigned(
                job=row.number, trial=row.trial, repeat=row.repeat, rung=row.rung, until=row.until, seed=spec.seed,
                ticket=RunTicket(run=row.run, name="", experiment="", attempt=0, directory=""), values=values,
                judge=row.judge, clone=row.clone, restarts=row.restarts, after=self._open[row.number].after,
                changes=dict(self._changes.get((row.trial, row.repeat), {})),
            )
        )  # fmt: skip

    def _clone(self, kind: Kind, trial: int, said: Mapping[str, Any]) -> dict[str, Any]:
        """{"run", "name", "sha256", "step", "trial"} of the checkpoint that a job starts from, and the "job" that took
        it over first: what was trained since is not given up when it is begun once more."""
        taken: Mapping[str, Any] = said["clone"] if kind == Kind.exploit else {}
        if kind == Kind.assign and self.state.trials[trial].rung == said["rung"]:
            # The next repeat of it, or it is begun once more, after somebody held it.
            taken = self.state.trials[trial].clone
        return self._of_repeat(taken, said["repeat"])

    def _of_repeat(self, taken: Mapping[str, Any], repeat: int) -> dict[str, Any]:
        """What a repeat takes over of a clone in a decision; {} of none."""
        all_ = taken.get("checkpoints")
        checkpoint = (all_[repeat] if all_ else taken.get("checkpoint")) or {}
        found = {key: checkpoint[key] for key in ("run", "name", "sha256", "step") if key in checkpoint}
        return {**found, "trial": taken["trial"], "job": taken.get("job", self._next_job)} if found else {}

    def _keeps(self, trial: int, taken: Mapping[str, Any]) -> bool:
        """Holds all that a trial takes over, before it is recorded: whatever happens then, it is there when somebody
        wants it. What is gone already is recorded, and False: something else has to be chosen."""
        repeats = range(self.state.settings.repeats)
        for repeat in repeats:
            clone = self._of_repeat(taken, repeat)
            if self._holds(clone, repeat):
                continue
            for each in repeats[:repeat]:
                self._lets_go(self._of_repeat(taken, each), each)
            draft = self._draft()
            outcome = {"for": trial, "rung": taken["rung"], "run": clone["run"], "checkpoint": clone["name"]}
            self._decide(draft, Kind.gone, trial=taken["trial"], outcome=outcome)
            self._commit(draft)
            return False
        return True

    def _holds(self, clone: Mapping[str, Any], repeat: int) -> bool:
        """False where it is gone."""
        if self._hold is None or not clone:
            return True
        token = self._token(clone, repeat)
        return self._hold(run=clone["run"], checkpoint=clone["name"], token=token, is_held=True)

    def _lets_go(self, clone: Mapping[str, Any], repeat: int) -> None:
        if self._hold is not None and clone:
            token = self._token(clone, repeat)
            self._hold(run=clone["run"], checkpoint=clone["name"], token=token, is_held=False)

    def _keep_milestone(self) -> None:
        """Out of step, others learn from what a member saved a while ago: its runs keep it until there is a newer one.
        At its end, or when it has failed, it gives nothing any more."""
        rules = self.state.settings.population
        if self._hold is None or rules is None or rules.is_sync or self.state.entered is None:
            return
        number, rung = self.state.entered
        trial = self.state.trials[number]
        before = max((each for each in trial.results if each < rung), default=None)
        gives = trial.results[rung].saved if trial.status == Status.waiting else ()
        for is_held, saved in ((True, gives), (False, () if before is None else trial.results[before].saved)):
            for repeat, checkpoint in enumerate(saved):
                if checkpoint and (is_held or checkpoint not in gives):
                    token = f"{self.sweep}-milestone-{number}-{repeat}"
                    self._hold(run=checkpoint["run"], checkpoint=checkpoint["name"], token=token, is_held=is_held)

    def _token(self, clone: Mapping[str, Any], repeat: int) -> str:
        """Of the job that took it over, so that whoever begins it once more holds it by the same."""
        return f"{self.sweep}-{clone['job']}" + (f"-{repeat}" if self.state.settings.repeats > 1 else "")

    # -- the judge of a job -------------------------------------------------------------------------------

    def _objectives(self) -> list[list[str]]:
        frozen: list[list[str]] = self.facts.get("objectives") or []
        return frozen or [[metric, direction.value] for metric, direction in self.settings.objectives]

    def _measure_of_judge(self) -> dict[str, Any]:
        return {"unit": self.facts.get("unit") or self.settings.resource.value, "objectives": self._objectives()}

    def _judge(self, trial: int, until: float | None) -> dict[str, Any]:
        found = {"until": until, **self._measure_of_judge(), "score": rules.score_of(self.settings).value}
        median = self._scheduler.judge(self.state, trial)
        if median:
            found["median"] = dict(median)
        if self._stopping:
            found["stopping"] = dict(self._stopping)
        return found

    def _measure(self, draft: _Draft, tally: Mapping[str, Any]) -> None:
        """What the first tally says about objective and resource holds from then on."""
        if not tally or "unit" in self.facts or not tally.get("objectives"):
            return
        self.facts["objectives"] = [list(each) for each in tally["objectives"]]
        self.facts["unit"] = tally.get("unit", "")
        self.facts["has_state"] = bool(tally.get("has_state", True))
        self.state.measured(Direction(self.facts["objectives"][0][1]))
        self.facts["current"] = rules.to_json(self.state.settings)
        draft.has_facts = True

    # -- how a job ended ----------------------------------------------------------------------------------

    def _after(self, assigned: Assigned, ending: Ending) -> _Verdict:
        """What becomes of it."""
        trial, how = self.state.trials[assigned.trial], ending.how
        if how in (Ended.paused, Ended.complete, Ended.ended):
            return self._reached(assigned, ending)
        if self._is_parted(assigned.trial):
            reason = "held" if trial.is_held else "stopped"
            return _Verdict(end=End.cancelled, status=RunStatus.cancelled, reason=reason)
        if how == Ended.stopped:
            halted = self._halted()
            if halted:
                return _Verdict(end=None, status=RunStatus.cancelled, reason=halted, what="stopped")
            reason = ending.reason or "somebody stopped it"
            return _Verdict(end=End.cancelled, status=RunStatus.cancelled, reason=reason)
        if how == Ended.lost:
            reason = ending.reason or "whoever ran it went away"
            return _Verdict(end=None, status=RunStatus.crashed, reason=reason, what="lost")
        words = ending.reason or _first_line(ending.error)
        failure = _failure(ending)
        decision = self._decided(assigned, ending, failure)
        if decision.is_restart:
            return _Verdict(
                end=None, status=RunStatus.crashed, reason=words, what="crash", kind=ending.kind, failure=failure,
                decision=decision,
            )  # fmt: skip
        if not decision.words.endswith(SAME_AGAIN):
            words = f"{words} ({decision.words})"
        if assigned.clone and ending.error.get("type") == "CheckpointMismatch":
            keys = ", ".join(each.key for each in self._space.dimensions)
            words = f"{words} Of {keys}, name those that leave the model as it is in sweep.pbt.mutate."
        return _Verdict(
            end=End.failed, status=RunStatus.failed, reason=words, kind=ending.kind or "error", failure=failure,
            decision=decision,
        )  # fmt: skip

    def _decided(self, assigned: Assigned, ending: Ending, failure: Failure) -> FailureDecision:
        """What follows a failed job, by the policy of runs. Failures count since the job last got further."""
        open_, rules = self._open[assigned.job], self._failure_rules
        if not rules.max_restarts:
            rules = replace(rules, max_restarts=self.settings.restarts, restarts_key="sweep.restarts")
        rules = replace(rules, by_hand="`orc sweep retry` begins its rung again")
        is_further = _progress(ending.tally) > open_.reached
        actions = frozenset([Action.halve] if float(ending.tally.get("micro_batch") or 0) >= 2 else [])
        changes = self._changes.get((assigned.trial, assigned.repeat), {})
        return decide(
            failure,
            () if is_further else open_.history,
            rules,
            draw=draw_of(assigned.ticket.run, assigned.ticket.attempt),
            can=Abilities(actions=actions, splits=int(changes.get("splits", 1))),
        )

    def _reached(self, assigned: Assigned, ending: Ending) -> _Verdict:
        """It ended as it should, if it has said what it is compared by."""
        objectives = self._objectives()
        values = self._values(ending.tally)
        missing = [metric for (metric, _), value in zip(objectives, values, strict=False) if value is None]
        if not objectives or missing:
            named = sorted(ending.tally.get("last") or {})
            said = f"it reported {', '.join(named)}" if named else "it reported nothing"
            wanted = f"{', '.join(missing)}: " if missing else ""
            reason = f"{wanted}{said}; run.report(…) must say what sweep.objective names"
            return _Verdict(end=End.failed, status=RunStatus.failed, reason=reason, kind="no-result")
        if self._scheduler.name == "pbt" and ending.how == Ended.paused and not ending.tally.get("has_state", True):
            self._refusal = "pbt needs run.report(…, state=…): without a state nobody can go on from a checkpoint"
            return _Verdict(end=End.failed, status=RunStatus.failed, reason=self._refusal, kind="no-state")
        tune = self.state.settings.tune
        if tune and ending.how == Ended.paused and not ending.tally.get("has_state", True):
            self._refusal = f"{tune.name} needs run.report(…, state=…): without a state each of its jobs begins anew"
            return _Verdict(end=End.failed, status=RunStatus.failed, reason=self._refusal, kind="no-state")
        end = {Ended.paused: End.paused, Ended.complete: End.complete, Ended.ended: End.ended}[ending.how]
        reason = ending.reason or str(ending.tally.get("reason") or "")
        if end == End.paused:
            unit, top = self.facts.get("unit", ""), self.state.settings.until(self.state.settings.top)
            whole = f" of {top:g}" if top else ""
            reason = f"waits at rung {assigned.rung} ({_resource(ending.tally):g}{whole} {unit}s)"
            if tune:
                reason = f"waits for {tune.name} ({_resource(ending.tally):g} {unit}s)"
        return _Verdict(end=end, status=RunStatus.finished, reason=reason)

    def _values(self, tally: Mapping[str, Any]) -> list[float | None]:
        """One per objective; None where it was not reported."""
        last, said = tally.get("last") or {}, tally.get(rules.score_of(self.settings).value) or {}
        # Where nothing but NaN was reported there is no best value, and yet something was said.
        return [number(said.get(metric)) if metric in last else None for metric, _ in self._objectives()]

    def _end(self, draft: _Draft, assigned: Assigned, ending: Ending, verdict: _Verdict) -> None:
        """The decisions and rows of an ending."""
        job, trial, tally = assigned.job, assigned.trial, ending.tally
        resource = _resource(tally)
        decided = {**verdict.decision.to_json(), "words": verdict.decision.words} if verdict.decision else {}
        error = dict(ending.error)
        if error and decided:
            error |= {"done": decided["words"], "decision": decided}
        row = replace(
            self._open[job].row, resource=resource, lane=ending.lane, reason=verdict.reason, error=error,
            lane_seconds=self._open[job].row.lane_seconds + ending.lane_seconds, started_at=ending.started_at,
        )  # fmt: skip
        draft.closes.append(
            RunEnd(
                run=assigned.ticket.run, attempt=assigned.ticket.attempt, status=verdict.status, reason=verdict.reason,
                error=error,
            )
        )  # fmt: skip
        draft.ends.append(job)
        draft.trials.add(trial)
        seconds = ending.lane_seconds or self._clock.monotonic() - self._since.get(job, self._clock.monotonic())
        self._spent = budget.added(self._spent, self._gang.used(seconds), self.settings.prices)
        self._since.pop(job, None)
        if verdict.end is None:
            reached = _progress(tally)
            outcome = {"what": verdict.what, "reached": reached, "reason": verdict.reason, "kind": verdict.kind}
            if verdict.failure and decided:
                outcome |= {"failure": verdict.failure.to_json(), "decision": decided}
            self._decide(draft, Kind.retry, trial=trial, job=job, outcome=outcome)
            row = replace(row, status="assigned", restarts=self._open[job].restarts)
            self._open[job].row = row
            draft.jobs.append(row)
            return
        values = [] if verdict.end == End.failed else [number(value) for value in self._values(tally)]
        if verdict.end == End.ended and tally.get("compared"):
            said = {"verdict": tally.get("verdict", ""), "reason": verdict.reason}
            self._decide(draft, Kind.stop, trial=trial, job=job, inputs=tally["compared"], outcome=said)
        reports = [[float(at), number(value)] for at, value in tally.get("reports") or ()]
        checkpoint = {"run": assigned.ticket.run, **tally["checkpoint"]} if tally.get("checkpoint") else {}
        outcome = {
            "end": verdict.end.value,
            "score": stored(values[0]) if values else None,
            "objectives": [stored(value) for value in values],
            "resource": resource,
            "reason": verdict.reason,
            "checkpoint": checkpoint,
        }
        if verdict.end == End.failed:
            outcome["kind"] = verdict.kind
            if decided:
                outcome["decision"] = decided
        if self._scheduler.name == "median" and assigned.repeat == 0 and verdict.end != End.failed:
            outcome["reports"] = [[at, stored(value)] for at, value in thinned(reports, MOST_ROWS)]
        if self.state.settings.tune and verdict.end != End.failed:
            heard = self.state.trials[trial].curve[-1:]
            fresh = [each for each in reports if not heard or each[0] > heard[0][0]]
            outcome["reports"] = [[at, stored(value)] for at, value in thinned(fresh, MOST_ROWS)]
        kind = Kind.fail if verdict.end == End.failed else Kind.result
        self._decide(draft, kind, trial=trial, job=job, outcome=outcome)
        self._keep_milestone()
        draft.jobs.append(
            replace(
                row, status=verdict.end.value, score=plain(values[0]) if values else None, ended_at=self._clock.now(),
                reports=[[at, plain(value)] for at, value in thinned(reports, MOST_REPORTS)],
            )
        )  # fmt: skip
        if not (verdict.end == End.cancelled and self.state.trials[trial].is_held):  # else it may still want it
            self._lets_go(assigned.clone, assigned.repeat)

    # -- requests and budgets -----------------------------------------------------------------------------

    def _answer(self, request: RequestRow) -> None:
        answer = answered(request, self._standing())
        draft = self._draft()
        draft.answers.append((request.id, answer.text))
        if answer.outcome is not None:
            outcome = {"request": request.id, "kind": request.kind, "who": request.who, **answer.outcome}
            self._decide(draft, Kind.request, inputs=dict(request.details), outcome=outcome)
            draft.trials |= {each["trial"] for each in answer.outcome.get("trials", ())}
            self._take_away(draft)
            self._renew()
            # For who shows a sweep without folding it; `rules` are those that it began with.
            self.facts["current"] = rules.to_json(self.state.settings)
            self._note_work()
            draft.has_facts = True
        self._commit(draft)
        if answer.outcome is not None and answer.outcome.get("stop"):
            self.stop(f"stopped by {request.who}" if request.who else "stopped")

    def _take_away(self, draft: _Draft) -> None:
        """Open jobs of trials that somebody took out, where nobody runs them."""
        for job in [job for job, each in self._open.items() if job not in self._given]:
            row = self._open[job].row
            if self._is_parted(row.trial):
                reason = "held" if self.state.trials[row.trial].is_held else "stopped"
                outcome = {"end": End.cancelled.value, "score": None, "resource": row.resource, "reason": reason}
                self._decide(draft, Kind.result, trial=row.trial, job=job, outcome=outcome)
                draft.jobs.append(replace(row, status="cancelled", reason=reason, ended_at=self._clock.now()))
                draft.trials.add(row.trial)
                if reason != "held":
                    self._lets_go(row.clone, row.repeat)

    def _unwanted(self) -> list[str]:
        """Runs of jobs that are to end now."""
        is_spent = budget.used_up(self.spent, self.settings.budget, self.settings.prices) is not None
        ends_all = bool(self._stop_reason or self._refusal) or is_spent
        return [each.ticket.run for each in self._given.values() if ends_all or self._is_parted(each.trial)]

    def _watch_budget(self) -> str:
        settings = self.settings
        spent, found = self.spent, []
        for limit in budget.nearly(spent, settings.budget, settings.prices):
            is_reached = limit.used >= limit.of
            mark = f"{'reached' if is_reached else 'near'} {limit.name} {limit.of:g}"
            if mark not in self._said:
                found.append((limit, mark, is_reached))
        if not found:
            return ""
        draft = self._draft()
        for limit, mark, is_reached in found:
            outcome = {"mark": mark, "name": limit.name, "used": limit.used, "of": limit.of, "is_reached": is_reached}
            self._decide(draft, Kind.budget, outcome=outcome)
        self._commit(draft)
        return "; ".join(str(limit) for limit, _, _ in found)

    def _record_over(self, reason: str) -> None:
        choice = self._chosen()
        by_scheduler = isinstance(choice, Over) and not self._halted()
        inputs = choice.inputs if isinstance(choice, Over) and by_scheduler else {}
        draft = self._draft()
        for trial in self.state.trials.values():
            if trial.status == Status.waiting and not trial.is_held:
                # It may still be promoted once the sweep is extended; for people it has come to its end.
                tune = self.state.settings.tune
                left = f"left waiting by {tune.name}" if tune else f"not promoted from rung {trial.rung}"
                self._known[trial.number].reason = left
                draft.trials.add(trial.number)
        self._decide(draft, Kind.over, inputs=inputs, outcome={"reason": reason})
        self._commit(draft)

    def _total(self, searcher: Searcher) -> int:
        if self.settings.scheduler == "pbt" and self.settings.pbt.population:
            return self.settings.pbt.population
        return searcher.total

    def _standing(self) -> Standing:
        def samples(settings: SweepConfig, space: Space) -> int:
            if self._renewed is None:
                raise ConfigError("sweep.samples", settings.samples, "cannot change in this sweep.")
            # Trials that the searcher was begun with besides stay.
            return self.state.settings.samples + total(settings, space) - total(self.settings, self._space)

        return Standing(
            state=self.state, settings=self.settings, space=self._space, samples=samples, unmeasured=self._unmeasured
        )

    def _renew(self) -> None:
        """The searcher and the scheduler, after samples or space have changed."""
        if not self._is_renewed:
            return
        self._is_renewed = False
        if self._renewed is not None:
            self._searcher = self._renewed(self.settings, self._space)
        if self._scheduler.name in rules.NAMES:
            self._scheduler = rules.scheduler_for(self.settings, self._space)
        self._searcher.rebuild(self._history())

    # -- the ledger ---------------------------------------------------------------------------------------

    def _draft(self) -> _Draft:
        if self._is_new:
            self.facts["current"] = self.facts["rules"]
        draft = _Draft(after=self.state.seq, has_facts=self._is_new or self._has_news)
        self._is_new = self._has_news = False
        return draft

    def _decide(
        self, draft: _Draft, kind: Kind, *, trial: int | None = None, job: int | None = None,
        inputs: Mapping[str, Any] | None = None, outcome: Mapping[str, Any],
    ) -> None:  # fmt: skip
        row = DecisionRow(
            seq=self.state.seq + 1, kind=kind.value, trial=trial, job=job, inputs=dict(inputs or {}),
            outcome=dict(outcome),
        )  # fmt: skip
        draft.tellings += self._fold(row)
        draft.decisions.append(row)

    def _commit(self, draft: _Draft) -> None:
        self._saved = self._clock.monotonic()
        step = SweepStep(
            sweep=self.sweep, driver=self._driver, after=draft.after, decisions=tuple(draft.decisions),
            trials=tuple(self._written_row(trial) for trial in sorted(draft.trials)), jobs=tuple(draft.jobs),
            opens=tuple(draft.opens), closes=tuple(draft.closes), spent=self.spent,
            facts=dict(self.facts) if draft.has_facts else None, answered=tuple(draft.answers),
        )  # fmt: skip
        self._pending = step, draft
        self._settle()

    def _settle(self) -> None:
        """Sends what was decided and has no answer yet. Whatever goes wrong, it stays the next to be sent."""
        if self._pending is None:
            return
        step, draft = self._pending
        tickets = self._sent(step)
        self._pending = None
        for job in draft.ends:
            self._given.pop(job, None)
        for trial, telling in draft.tellings:
            self._searcher.told(trial, self._known[trial].values, telling.resource, telling.scores, telling.state)
        for assigned in draft.begins:
            self._give(assigned, tickets[assigned.job])

    def _sent(self, step: SweepStep) -> Mapping[int, RunTicket]:
        for turn in range(SENDINGS):
            try:
                return self._ledger.sweep_step(step)
            except (ConnectionError, TimeoutError):
                if turn == SENDINGS - 1:
                    raise
        raise AssertionError("unreachable")

    def _give(self, assigned: Assigned, ticket: RunTicket) -> None:
        clone = dict(assigned.clone)
        if clone:
            # All runs of a sweep lie beside each other.
            clone["directory"] = f"{ticket.directory.rstrip('/').rpartition('/')[0]}/{clone['run']}"
        given = replace(assigned, ticket=ticket, clone=clone)
        self._attempts[assigned.trial, assigned.repeat] = ticket.attempt
        self._given[assigned.job] = given
        self._since[assigned.job] = self._clock.monotonic()
        self._ready.append(given)

    # -- the fold -----------------------------------------------------------------------------------------

    def _resume(self, record: SweepRecord) -> None:
        for decision in record.decisions:
            self._fold(decision)
        rows = {row.number: row for row in record.jobs}
        for job, open_ in self._open.items():
            if job in rows:
                open_.row = rows[job]
                key = open_.row.trial, open_.row.repeat
                self._attempts[key] = max(self._attempts[key], open_.row.attempt)
            if "until" not in open_.row.judge:
                open_.row = replace(open_.row, judge=self._judge(open_.row.trial, open_.row.until))
        if self._is_renewed and self._renewed is not None:
            self._searcher = self._renewed(self.settings, self._space)
        self._is_renewed = False
        self._rows = {trial: self._trial_row(trial) for trial in self.state.trials}
        self.rebuilt = self._searcher.rebuild(self._history())
        """What the searcher says about going on: exactly as without the restart, or why not."""

    def _history(self) -> list[Past]:
        return [
            Past(number=trial, values=each.values, origin=each.origin, tellings=tuple(each.tellings), seq=each.seq)
            for trial, each in self._known.items()
        ]

    def _fold(self, row: DecisionRow) -> list[tuple[int, Telling]]:
        """Takes a decision in, and gives what the searcher is to hear about it."""
        kind, outcome = Kind(row.kind), row.outcome
        decision = Decision(seq=row.seq, kind=kind, trial=row.trial, job=row.job, inputs=row.inputs, outcome=outcome)
        self.state.apply(decision)
        self._last = kind
        if row.job is not None:
            self._next_job = max(self._next_job, row.job + 1)
        if kind in BEGINNINGS and row.trial is not None and row.job is not None:
            self._fold_beginning(kind, row, row.trial, row.job)
        elif kind == Kind.reopen and row.job is not None:
            each = self._open[row.job].row
            self._attempts[each.trial, each.repeat] += 1
        elif kind == Kind.retry and row.job is not None:
            self._fold_retry(self._open[row.job], outcome)
        elif kind in (Kind.result, Kind.fail) and row.job is not None:
            self._fold_end(row, self._open.pop(row.job).row)
        elif kind == Kind.request:
            self._fold_request(row)
        elif kind == Kind.budget:
            self._said.add(outcome["mark"])
        elif kind == Kind.tune:
            self._fold_tune(row)
        found = tellings(self.state, decision, self._told)
        for trial, telling in found:
            self._known[trial].tellings.append(telling)
        return found

    def _fold_beginning(self, kind: Kind, row: DecisionRow, trial: int, job: int) -> None:
        outcome = row.outcome
        if kind == Kind.suggest:
            self._known[trial] = _Known(
                values=outcome["values"], seq=row.seq, origin=outcome.get("origin", ""), run=outcome.get("run", ""),
                config_hash=outcome.get("config_hash", ""),
            )  # fmt: skip
        known, repeat = self._known[trial], int(outcome.get("repeat", 0))
        known.reason, known.ended_at = "", None
        known.config_hash = outcome.get("config_hash", known.config_hash)
        if kind == Kind.exploit:
            known.clones.append([int(outcome["rung"]), outcome["clone"]["trial"], outcome["clone"]["rung"]])
        self._attempts[trial, repeat] += 1
        self._open[job] = _Open(
            row=JobRow(
                number=job, trial=trial, repeat=repeat, rung=int(outcome["rung"]), until=outcome.get("until"),
                attempt=self._attempts[trial, repeat],
            )
        )  # fmt: skip

    def _fold_retry(self, open_: _Open, outcome: Mapping[str, Any]) -> None:
        open_.after = 0.0
        if outcome["what"] != "crash":
            return
        # Before policy was asked here, a decision told no more of the failure than this.
        told = {"kind": outcome["kind"], "what": outcome["reason"], "is_restart_useful": True}
        failure = Failure.of(RunStatus.failed, outcome.get("failure", told))
        is_further = outcome["reached"] > open_.reached
        open_.history = (failure,) if is_further else (*open_.history, failure)
        open_.reached = max(open_.reached, outcome["reached"])
        decision = outcome.get("decision", {})
        open_.after = float(decision.get("after", 0.0))
        if changes := decision.get("changes"):
            self._changes.setdefault((open_.row.trial, open_.row.repeat), {}).update(changes)

    def _fold_end(self, row: DecisionRow, job: JobRow) -> None:
        trial, outcome = self.state.trials[job.trial], row.outcome
        known = self._known[job.trial]
        known.reason = outcome.get("reason", "")
        if job.repeat == 0 and outcome.get("checkpoint"):
            known.checkpoint = outcome["checkpoint"]
        if trial.status not in (Status.running, Status.waiting):
            known.ended_at = row.at or self._clock.now()
        self._note_failure(trial, outcome.get("kind", ""))

    def _fold_tune(self, row: DecisionRow) -> None:
        for each in row.outcome["stopped"]:
            known, trial = self._known[each["trial"]], self.state.trials[each["trial"]]
            if trial.status in (Status.complete, Status.stopped) and known.ended_at is None:
                at = max((result.resource for result in trial.results.values()), default=0.0)
                how = "all that there is" if each["is_whole"] else f"stopped by {self._scheduler.name}"
                known.reason = f"{how}: {at:g} {self.facts.get('unit', '')}s"
                known.ended_at = row.at or self._clock.now()

    def _fold_request(self, row: DecisionRow) -> None:
        outcome = row.outcome
        config = {key: new for key, (_, new) in outcome.get("config", {}).items()}
        self.settings = changed(self.settings, config)
        if "space" in outcome:
            self._space = Space.from_json(outcome["space"])
        self._is_renewed |= "space" in outcome or "samples" in config
        for each in outcome.get("trials", ()):
            trial = self.state.trials[each["trial"]]
            self._note_failure(trial, "")
            if trial.status == Status.cancelled:
                known = self._known[trial.number]
                known.reason, known.ended_at = "stopped", row.at or self._clock.now()

    def _note_failure(self, trial: Trial, kind: str) -> None:
        if trial.status == Status.failed:
            self._failures.setdefault(trial.number, kind or "error")
        else:
            self._failures.pop(trial.number, None)

    # -- rows ---------------------------------------------------------------------------------------------

    def _written_row(self, number: int) -> TrialRow:
        self._rows[number] = self._trial_row(number)
        return self._rows[number]

    def _trial_row(self, number: int) -> TrialRow:
        trial, known = self.state.trials[number], self._known[number]
        scored = [rung for rung, result in trial.results.items() if result.is_finite]
        best = trial.results[max(scored)] if scored else None
        is_left = trial.status == Status.waiting and known.reason.startswith(("not promoted", "left waiting"))
        return TrialRow(
            number=number, values=trial.values, status=(Status.stopped if is_left else trial.status).value,
            is_held=trial.is_held, origin=known.origin, config_hash=known.config_hash, run=known.run, rung=trial.rung,
            resource=max((result.resource for result in trial.results.values()), default=0.0),
            score=best.score if best else None, spread=best.spread if best else None, n=best.n if best else 0,
            scores={
                "rungs": [[k, r.resource, plain(r.score), r.n] for k, r in sorted(trial.results.items())],
                "objectives": self._named(best.objectives) if best else {},
                **({"clones": list(known.clones)} if known.clones else {}),
            },
            checkpoint={key: known.checkpoint[key] for key in ("run", "name") if key in known.checkpoint},
            reason=known.reason, ended_at=known.ended_at,
        )  # fmt: skip

    def _named(self, values: Sequence[float]) -> dict[str, float | None]:
        return {metric: plain(value) for (metric, _), value in zip(self._objectives(), values, strict=False)}


def thinned(reports: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, with the last one."""
    if len(reports) <= most:
        return list(reports)
    step = math.ceil((len(reports) - 1) / (most - 1))
    found = list(reports[::step])
    return found if (len(reports) - 1) % step == 0 else [*found[: most - 1], reports[-1]]


def _resource(tally: Mapping[str, Any]) -> float:
    return float(tally.get("resource") or 0.0)


def _progress(tally: Mapping[str, Any]) -> float:
    """How far a job was when it died. A crash leaves no tally; who ran it may say as {"progress": …} how far it got, in
    any measure that grows, such as its newest step."""
    return float(tally.get("progress") or _resource(tally))


def _failure(ending: Ending) -> Failure:
    """As policy sees it. A trial's processes are where the lane is: it avoids no node."""
    useful = ending.error.get("is_restart_useful", ending.is_restart_useful or None)
    step = _progress(ending.tally) or None  # nothing is known of it, or it came to no step
    told = {**ending.error, "is_restart_useful": useful, "step": step, "node": ""}
    return Failure.of(RunStatus.failed, told if told.get("kind") else {**told, "kind": ending.kind})


def _first_line(error: Mapping[str, Any]) -> str:
    message = str(error.get("message", "")).strip().split("\n")[0]
    return ": ".join(part for part in (str(error.get("type", "")), message) if part) or "it failed without a word"
