"""Schedulers of Ray Tune: they decide, our core records, and what was recorded is played to them after a restart.

Tune's controller would ask its scheduler at every report of every trial. Here a job runs to where its scheduler could
next say anything but "go on": the end of a bracket's round, the next rung, the next perturbation; where that cannot be
known, to the next report. There it leaves a checkpoint and waits, as our own ASHA's do. So nobody waits for an answer
while it trains, a pause is a pause, and the scheduler's object lives in the driver, is called by nobody but the core's
thread, and hears the same calls in the same order as from Tune: added, results, completed, removed, failed.

All that it hears follows from the sweep's decisions (`State.story`), and random numbers are seeded before each call. So
the next driver makes a new one, plays the story to it, and has what was lost: brackets, rungs, populations. What it
says then is compared with what was decided; if it differs (another version of it, a class that looks at the clock),
it begins anew with the trials that are left, and says so.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
import random
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.train._internal.session import _TrainingResult
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    SCHEDULER_IMPORT,
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from orchestrator.config.functions import load_class
from orchestrator.config.names import did_you_mean
from orchestrator.config.settings import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.seeding import derive
from orchestrator.sweeps.grammar import same
from orchestrator.sweeps.rules import TUNE
from orchestrator.sweeps.space import Dimension, Space
from orchestrator.sweeps.state import (
    Choice,
    Continue,
    Happened,
    JobEnd,
    New,
    Over,
    Settle,
    State,
    Status,
    Tune,
    Wait,
)
from orchestrator.sweeps.values import stored

logger = logging.getLogger(__name__)

TIME = "training_iteration"
"""What a result calls the resource: Tune's own name, which schedulers look at that are told no other."""
_OURS = {
    "metric": "is the first of sweep.objective.",
    "mode": "is said by sweep.objective, as in val/accuracy:max.",
    "time_attr": "is what sweep.resource counts.",
}
"""Arguments of schedulers that the sweep has settings for."""
_EVERY = "every"
"""Ours, among the arguments: units between two results, where nobody can know which of them matters."""
_NOT_HERE = {
    "fifo": "is sweep.scheduler=fifo here.",
    "hb_bohb": "works only with Tune's own BOHB search, which must be told of every pause. Use tune:hyperband.",
    "pbt_replay": "follows a file that Tune's PBT writes, which no sweep here does. Use tune:pbt.",
    "resource_changing": "changes what trials hold, and lanes keep theirs. Use resources.*.",
}
_NEEDS = {"pb2": ("sklearn", "pandas")}
_PACKAGES = {"sklearn": "scikit-learn"}
_KEEPS_APART = (HyperBandScheduler, AsyncHyperBandScheduler, MedianStoppingRule)
"""No trial of these gets anything from another."""
_MUTATIONS, _BOUNDS = "hyperparam_mutations", "hyperparam_bounds"


def library(settings: SweepConfig, space: Space) -> TuneScheduler:
    """`sweeps.rules.Library`."""
    return TuneScheduler(settings, space)


class TuneScheduler:
    """`sweep.scheduler=tune:NAME`: a `sweeps.state.Scheduler` around one of Ray Tune's.

    Raises ConfigError for what Tune does not have, what is not installed, what cannot work here and for arguments that
    it does not take.
    """

    def __init__(self, settings: SweepConfig, space: Space) -> None:
        self.name, self._space = settings.scheduler, space
        self.survives = (
            "everything, though it lives in Ray Tune: what it heard is recorded and played to it again; should it then "
            "decide otherwise, finished trials are not repeated and running ones go on from their checkpoint, but its "
            "brackets, rungs or population are lost"
        )
        self.lost = ""
        """Why it did not come back as it was, after a restart; '' where it did."""
        if not settings.objectives:
            hint = "Name it: sweep.objective=[val/accuracy:max], or checkpoints.best_metric."
            raise ConfigError("sweep.objective", None, f"{self.name} must know from the start what gets better.", hint)
        self._metric, direction = settings.objectives[0]
        self._mode = direction.value
        self._arguments = dict(settings.scheduler_args)
        self._every = _number(self._arguments.pop(_EVERY, 1))
        self._class = _class(self.name)
        self._check_arguments()
        self._make(Tune(name=self.name))
        self._state: weakref.ref[State] | None = None

    # -- sweeps.state.Scheduler

    def next(self, state: State) -> Choice:
        self._listen(state)
        if self._proposed:
            return self._proposed[0]
        inputs = {"by": self.name, "settings": state.settings.version}
        if (due := state.due()) is not None:
            member = self._by_trial[due.number]
            until = self._until(member, member.at)
            return Continue(trial=due.number, rung=max(due.rung, 0), until=until, inputs=inputs)
        going = next((each for each in self._going.values() if not each.is_held), None)
        found = going or self._choose()
        if found is not None and found.number is not None:
            return self._go_on(state, found, inputs)
        if found is not None and state.has_room():
            count = {"trials": len(state.trials), "of": state.settings.samples}
            return New(until=self._until(found, 0.0), inputs={**inputs, **count})
        if state.open:
            return Wait()
        over = state.idle()
        left = sum(each.status == Trial.PAUSED and not each.is_held for each in self._by_trial.values())
        if isinstance(over, Over) and left and not over.reason:
            return Over(reason=f"{self.name} left {left} trials waiting", inputs=over.inputs)
        return over

    def judge(self, state: State, trial: int) -> Mapping[str, Any]:
        return {}

    def _go_on(self, state: State, member: _Member, inputs: Mapping[str, Any]) -> Choice:
        assert member.number is not None
        trial, taken = state.trials[member.number], state.takes.get(member.number)
        at, more = member.at, dict[str, Any]()
        if taken is not None:
            at = state.trials[taken["clone"]["trial"]].results[taken["clone"]["rung"]].resource
            more = {"clone": taken["clone"], "values": taken["values"]}
        return Continue(trial=member.number, rung=trial.rung + 1, until=self._until(member, at), inputs=inputs, **more)

    # -- what it is made of

    def _check_arguments(self) -> None:
        takes = inspect.signature(self._class).parameters
        known = [name for name in takes if name not in _OURS]
        for name, value in self._arguments.items():
            key = f"sweep.scheduler_args.{name}"
            if name in _OURS:
                raise ConfigError(key, value, _OURS[name], "Leave it out.")
            if name not in takes and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
                hint = did_you_mean(name, [*known, _EVERY]) or f"It takes {', '.join([*known, _EVERY])}."
                raise ConfigError(key, value, f"{self.name} does not take it.", hint)

    def _make(self, told: Tune) -> None:
        """A new scheduler that knows of no trial."""
        takes, arguments = inspect.signature(self._class).parameters, dict(self._arguments)
        if "time_attr" in takes:
            if takes["time_attr"].default == "time_total_s":
                # What these default to are seconds, and nobody counts seconds here.
                for name in ("grace_period", "perturbation_interval"):
                    if name in takes:
                        arguments.setdefault(name, 1)
            arguments["time_attr"] = TIME
        if "max_t" in takes and told.max:
            arguments.setdefault("max_t", int(told.max))
        if "log_config" in takes:
            arguments.setdefault("log_config", False)  # into files of Tune's that are not there
        for name in (_BOUNDS, _MUTATIONS):
            if name in takes:
                arguments[name] = self._searched(name, arguments.get(name))
        try:
            self._scheduler: Any = self._class(**arguments)
            is_taken = self._scheduler.set_search_properties(self._metric, self._mode)
        except (TypeError, ValueError, AssertionError, RuntimeError, ImportError, TuneError) as error:
            why = f"{self.name} does not take them: {type(error).__name__}: {error}."
            raise ConfigError("sweep.scheduler_args", dict(self._arguments), why) from error
        if not is_taken:
            raise ConfigError("sweep.scheduler", self.name, "does not take the objective of this sweep.")
        self._controller = _Controller(self._scheduler)
        self._by_trial: dict[int, _Member] = {}
        self._going: dict[int, _Member] = {}
        """Trials that it lets go on, and that have no job."""
        self._held: dict[int, _Member] = {}
        self._proposed: deque[Settle] = deque()
        self._calls = 0

    def _searched(self, name: str, given: Any) -> dict[str, Any]:
        """What it may change: `given`, else every key that is drawn."""
        key = f"sweep.scheduler_args.{name}"
        known = {each.key: each for each in self._space.dimensions if each.is_drawn}
        if any(each.when is not None for each in self._space.dimensions):
            raise ConfigError("sweep.scheduler", self.name, "cannot change keys that only some trials have (when(…)).")
        for each in given or {}:
            if each not in known:
                hint = did_you_mean(each, known) or f"Searched and drawn are {', '.join(known) or 'none'}."
                raise ConfigError(f"{key}.{each}", given[each], "is not searched.", hint)
        if name == _BOUNDS:
            found = given or {
                each.key: [each.low, each.high]
                for each in known.values()
                if not each.is_listed and math.isfinite(each.low) and math.isfinite(each.high)
            }
        else:
            found = {each: given[each] if given and given[each] else _drawn(known[each]) for each in given or known}
        if not found:
            raise ConfigError("sweep.space", sorted(known), f"{self.name} needs a searched key that is a range.")
        return dict(found)

    # -- what it hears

    def _listen(self, state: State) -> None:
        """Plays to it what has happened since the last time."""
        if self._state is None or self._state() is not state:
            self._make(state.settings.tune or Tune(name=self.name))
            self._state, self._heard, self._seed = weakref.ref(state), 0, state.settings.seed
        story = state.story
        while self._heard < len(story):
            event = story[self._heard]
            self._heard += 1
            if event.what == "settled":
                said = self._proposed.popleft()
                if _plain(said.outcome()) != _plain(event.more):
                    self._begin_anew(state)
                    return
            else:
                self._hear(event)

    def _hear(self, event: Happened) -> None:
        self._take_in(event)
        others = [each.number for each in self._controller.stopped if each.number not in (None, event.trial)]
        if others and others[0] is not None:
            # What went was the last one that they waited for, and not all of them may go on.
            self._proposed.append(self._settle(others[0], -1, "gone"))
        self._controller.stopped.clear()

    def _take_in(self, event: Happened) -> None:
        match event.what:
            case "room":
                self._make_room(event.more)
            case "exhausted":
                for member in self._unbound():
                    self._call(self._controller.stop_trial, member)
            case "begun":
                self._begun(event)
            case "ended":
                self._going.pop(event.trial, None)
                self._proposed.append(self._ended(self._by_trial[event.trial], event.rung, event.more))
            case "held":
                self._by_trial[event.trial].is_held = True
                self._held[event.trial] = self._by_trial[event.trial]
            case "freed":
                self._by_trial[event.trial].is_held = False
                self._held.pop(event.trial, None)
            case "gone":
                self._going.pop(event.trial, None)
                self._call(self._controller.stop_trial, self._by_trial[event.trial])
            case "again":
                member = self._member(self._by_trial[event.trial].config)
                member.number, member.at = event.trial, self._by_trial[event.trial].at
                member.is_held = self._by_trial[event.trial].is_held
                self._by_trial[event.trial] = member
                if member.is_held:
                    self._held[event.trial] = member

    def _make_room(self, count: int) -> None:
        """For all trials there will be, as Tune adds a grid or random samples: brackets and populations fill with them.
        Which values one has is told when it begins."""
        places = self._controller.places
        for member in self._unbound()[::-1][: max(len(places) - count, 0)]:
            self._call(self._controller.stop_trial, member)
            places.remove(member)
        while len(places) < count:
            places.append(self._member({}))

    def _member(self, config: Mapping[str, Any]) -> _Member:
        member = _Member("trial", trial_id=f"{len(self._controller.trials):06d}", config=dict(config), stub=True)
        self._controller.trials.append(member)
        self._call(self._scheduler.on_trial_add, self._controller, member)
        return member

    def _unbound(self) -> list[_Member]:
        return [each for each in self._controller.places if each.number is None and each.status == Trial.PENDING]

    def _begun(self, event: Happened) -> None:
        member = self._by_trial.get(event.trial)
        if member is None:
            found = self._choose()
            if found is None or found.number is not None:
                found = next(iter(self._unbound()), None)
            if found is None:  # more trials than there was room for
                found = self._member({})
                self._controller.places.append(found)
            member = self._by_trial[event.trial] = found
            member.number = event.trial
        self._going.pop(event.trial, None)
        member.set_config(dict(event.more))
        if not member.is_finished():
            member.set_status(Trial.RUNNING)

    def _ended(self, member: _Member, rung: int, end: JobEnd) -> Settle:
        """What it says to a job's end, as Tune's controller would ask and do it."""
        controller, trial = self._controller, member.number
        assert trial is not None
        action, points = "continue", _points(end)
        if member.is_finished():  # it was stopped while it trained
            controller.stopped.append(member)
            action = "stop"
        elif end.status == Status.failed:
            self._call(self._scheduler.on_trial_error, controller, member)
            member.set_status(Trial.ERROR)
            action = "failed"
        else:
            action = self._results(member, rung, end, points)
        if end.status == Status.waiting and action == "continue" and not member.is_finished():
            self._going[trial] = member
        return self._settle(trial, rung, action, results=[[at, stored(score)] for at, score in points])

    def _settle(self, trial: int, rung: int, action: str, **inputs: Any) -> Settle:
        over = [each for each in self._controller.stopped if each.number is not None]
        self._controller.stopped.clear()
        stopped = [{"trial": each.number, "is_whole": each.at >= self._most} for each in over]
        takes = self._takes()
        return Settle(
            trial=trial, rung=rung, action=action, stopped=stopped, takes=takes, inputs={"by": self.name, **inputs}
        )

    def _results(self, member: _Member, rung: int, end: JobEnd, points: Sequence[tuple[float, float]]) -> str:
        controller, said = self._controller, TrialScheduler.CONTINUE
        assert member.number is not None
        # Typed as Tune's: it only hands it on.
        checkpoints: Any = member.run_metadata.checkpoint_manager
        pointer: Any = _Pointer(trial=member.number, rung=rung, given=end.result.given())
        member.is_taken = False
        for at, score in points:
            result = self._result(member, at, score)
            checkpoints._latest_checkpoint_result = _TrainingResult(checkpoint=pointer, metrics=result)
            member.at = at
            said = self._call(self._scheduler.on_trial_result, controller, member, result)
            member.run_metadata.last_result = result
            if said == TrialScheduler.NOOP:
                said = TrialScheduler.PAUSE if member.status == Trial.PAUSED else TrialScheduler.CONTINUE
            if said != TrialScheduler.CONTINUE:
                break  # were there more, they came too late to count
        member.at = end.result.resource
        if end.has_returned:
            if not member.is_finished():
                member.set_status(Trial.RUNNING)
                self._call(controller.stop_trial, member)
            return "complete"
        if said == TrialScheduler.STOP:
            self._call(controller.stop_trial, member)
        elif said == TrialScheduler.PAUSE:
            member.set_status(Trial.PAUSED)
        return str(said).lower()

    def _result(self, member: _Member, at: float, score: float) -> dict[str, Any]:
        if not math.isfinite(score):  # as the worst there is: what no number is has no order
            score = -math.inf if self._mode == "max" else math.inf
        return {TIME: int(at) if at == int(at) else at, self._metric: score, "trial_id": member.trial_id}

    def _takes(self) -> list[dict[str, Any]]:
        """Trials to which it has just given the checkpoint of another, with values that it has changed."""
        found: list[dict[str, Any]] = []
        if isinstance(self._scheduler, _KEEPS_APART):
            return found
        for number, member in sorted(self._by_trial.items()):
            pointer: Any = member.checkpoint
            if member.is_finished() or member.is_taken or not pointer or pointer.trial == number:
                continue
            member.is_taken = True
            member.set_config(self._values(member.config, self._by_trial[pointer.trial].config))
            clone = {"trial": pointer.trial, "rung": pointer.rung, **pointer.given}
            found.append({"trial": number, "clone": clone, "values": dict(member.config)})
        return found

    def _values(self, config: Mapping[str, Any], donor: Mapping[str, Any]) -> dict[str, Any]:
        """Its values as the space has them: next to what it wants, the donor's where that cannot be."""
        found = {
            each.key: _fitted(each, config[each.key], donor) for each in self._space.dimensions if each.key in donor
        }
        return dict(donor) if self._space.contains(found) else found

    def _begin_anew(self, state: State) -> None:
        """Without its memory, with the trials that are not over."""
        self.lost = f"{self.name} decided otherwise when it heard the same again, so its memory was lost"
        logger.warning("%s; it begins anew with the trials that are left", self.lost)
        settled = {(event.trial, event.more["rung"]) for event in state.story if event.what == "settled"}
        ends = [event for event in state.story if event.what == "ended"]
        pending = [event for event in ends if (event.trial, event.rung) not in settled]
        self._make(state.settings.tune or Tune(name=self.name))
        for number, trial in sorted(state.trials.items()):
            is_pending = any(event.trial == number for event in pending)
            if trial.status not in (Status.running, Status.waiting, Status.proposed) and not is_pending:
                gone = _Member("trial", trial_id=f"gone-{number}", stub=True)
                gone.set_status(Trial.TERMINATED)
                self._controller.places.append(gone)
                continue
            member = self._by_trial[number] = self._member(trial.values)
            member.number, member.is_held = number, trial.is_held
            if member.is_held:
                self._held[number] = member
            member.at = max((result.resource for result in trial.results.values()), default=0.0)
            member.set_status(Trial.RUNNING)
            if trial.status == Status.waiting and not trial.is_due and not is_pending:
                self._going[number] = member
            self._controller.places.append(member)
        if not state.is_exhausted:
            self._make_room(state.settings.samples)
        self._heard = len(state.story)
        for event in pending:
            self._hear(event)

    # -- what it is asked

    def _choose(self) -> _Member | None:
        """Which trial it would run next."""
        held = [each for each in self._held.values() if each.status == Trial.PAUSED]
        for each in held:
            each.status = Trial.RUNNING  # one that a person holds is to it one that takes long
        try:
            with self._seeded():
                found: _Member | None = self._scheduler.choose_trial_to_run(self._controller)
        finally:
            for each in held:
                each.status = Trial.PAUSED
        return found

    def _until(self, member: _Member, at: float) -> float:
        """The resource beyond `at` where it could next say anything but "go on", as far as it can be known."""
        try:
            found = [each for each in self._looks(member, at) if each > at]
        except (AttributeError, KeyError):  # another version of Tune, or it has forgotten the trial
            found = []
        return float(min(found, default=at + self._every))

    def _looks(self, member: _Member, at: float) -> list[float]:
        scheduler = self._scheduler
        if isinstance(scheduler, HyperBandScheduler):
            return [scheduler._trial_info[member][0]._cumul_r]
        if isinstance(scheduler, AsyncHyperBandScheduler):
            bracket = scheduler._trial_info[member.trial_id]
            return [scheduler._max_t, *(milestone for milestone, _ in bracket._rungs)]
        if isinstance(scheduler, PopulationBasedTraining):
            known = scheduler._trial_state[member]
            last = max(known.last_perturbation_time + scheduler._perturbation_interval, scheduler._burn_in_period)
            return [max(last, scheduler._next_perturbation_sync) if scheduler._synch else last]
        if isinstance(scheduler, MedianStoppingRule):
            return [max(scheduler._grace_period, at + self._every)]
        return []

    @property
    def _most(self) -> float:
        """What a trial may have at most."""
        found = getattr(self._scheduler, "_max_t_attr", getattr(self._scheduler, "_max_t", math.inf))
        return float(found)

    def _call(self, call: Any, *arguments: Any) -> Any:
        with self._seeded():
            found = call(*arguments)
        self._calls += 1
        return found

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """What it draws from the global generators depends on the sweep's seed and on what it has heard, and others
        that draw from them notice nothing."""
        before = random.getstate(), np.random.get_state()
        seed = derive(getattr(self, "_seed", 0), "tune", "scheduler", self._calls)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@dataclass(frozen=True, slots=True)
class _Pointer:
    """Which of our checkpoints one of Tune's is."""

    trial: int
    rung: int
    given: Mapping[str, Any]
    """What a clone of it says."""


class _Member(Trial):
    """Tune's picture of one of our trials, or of one that has not begun."""

    number: int | None = None
    """Of our trial; None: it has not begun."""
    at: float = 0.0
    """The resource that it has had."""
    is_held = False
    is_taken = False
    """Whether what it took over from another has been said."""


class _Controller:
    """As much of a TuneController as schedulers use."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler_alg, self.search_alg = scheduler, None
        self.trials: list[_Member] = []
        self.places: list[_Member] = []
        """One for each trial that there may be, whoever has been tried twice."""
        self.stopped: list[_Member] = []

    def get_trials(self) -> list[_Member]:
        return list(self.trials)

    def get_live_trials(self) -> list[_Member]:
        return [each for each in self.trials if not each.is_finished()]

    def get_trial(self, trial_id: str) -> _Member | None:
        return next((each for each in self.trials if each.trial_id == trial_id), None)

    def stop_trial(self, trial: _Member) -> None:
        """As `TuneController.stop_trial`."""
        if trial.is_finished():
            return
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self.scheduler_alg.on_trial_remove(self, trial)
        else:
            self.scheduler_alg.on_trial_complete(self, trial, dict(trial.run_metadata.last_result or {}))
        trial.set_status(Trial.TERMINATED)
        self.stopped.append(trial)

    def pause_trial(self, trial: _Member, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: _Member, storage: Any = None, result: Any = None) -> Any:
        return trial.checkpoint  # it has one whenever it is asked


def _class(name: str) -> type[Any]:
    called = name.removeprefix(TUNE)
    if called in _NOT_HERE:
        raise ConfigError("sweep.scheduler", name, _NOT_HERE[called])
    if ":" in called:
        found = load_class("sweep.scheduler", name, called)
    elif called in SCHEDULER_IMPORT:
        missing = [each for each in _NEEDS.get(called, ()) if importlib.util.find_spec(each) is None]
        if missing:
            packages = [_PACKAGES.get(each, each) for each in missing]
            hint = f"Install it: pip install {' '.join(packages)}"
            raise ConfigError("sweep.scheduler", name, f"needs {' and '.join(packages)}.", hint)
        found = SCHEDULER_IMPORT[called]
        if inspect.isfunction(found):
            found = found()
    else:
        known = [each for each in SCHEDULER_IMPORT if each not in _NOT_HERE]
        hint = did_you_mean(called, known) or f"There are {', '.join(known)}, and module:Class."
        raise ConfigError("sweep.scheduler", name, "Ray Tune has no such scheduler.", hint)
    if not (isinstance(found, type) and issubclass(found, TrialScheduler)):
        raise ConfigError("sweep.scheduler", name, "is no ray.tune.schedulers.TrialScheduler.")
    return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"sweep.scheduler_args.{_EVERY}", value, "must be a number above 0.")
    return float(value)


def _points(end: JobEnd) -> list[tuple[float, float]]:
    """(resource, score) of each report of a job, the last of which is its result."""
    result = end.result
    return [each for each in end.points if each[0] < result.resource] + [(result.resource, result.score)]


def _drawn(each: Dimension) -> Any:
    """As PopulationBasedTraining takes it: a list steps to its neighbours, anything else is drawn or multiplied."""
    if each.is_listed:
        return list(each.items)
    return lambda: each.value(random.random())


def _fitted(each: Dimension, value: Any, donor: Mapping[str, Any]) -> Any:
    if each.is_listed:
        return next((item for item in each.items if same(item, value)), donor[each.key])
    return each.fitted(value) if math.isfinite(value) else donor[each.key]


def _plain(outcome: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(outcome))
