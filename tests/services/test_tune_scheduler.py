"""Schedulers of Ray Tune by name: they decide here what they decide in Tune, and a restart takes nothing from them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from orchestrator.config.settings import Resource, SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.execution.sweep_place import scheduler_named
from orchestrator.execution.tune_scheduler import TuneScheduler
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned
from orchestrator.sweeps.replay import verify_stored
from orchestrator.sweeps.rules import rules_for
from orchestrator.sweeps.search import RandomSearcher
from orchestrator.sweeps.space import Space, space
from tests.plugins.sweep_ledger import Killed, MemoryLedger, Toy, toy_core, toy_space
from tests.plugins.sweep_model import score
from tests.unit.test_sweep_core import drive

RANGES = space({"lr": "loguniform(1e-4, 1)", "size": "qrandint(8, 64, 8)"})


def settings_of(name: str, **more: Any) -> SweepConfig:
    return SweepConfig(**{"samples": 12, "objective": ["loss:min"], "scheduler": f"tune:{name}", **more})


def core_of(settings: SweepConfig, ledger: MemoryLedger, **more: Any) -> Core:
    return toy_core(settings, ledger, scheduler=TuneScheduler(settings, toy_space()), **more)


def kinds(ledger: MemoryLedger) -> Counter[str]:
    return Counter(each["kind"] for each in ledger.decisions)


# -- what Tune would do


class Tune:
    """Tune's loop around a scheduler of Tune's, one trial at a time and one epoch at a time."""

    def __init__(self, scheduler: Any, values: Sequence[Mapping[str, Any]], epochs: int) -> None:
        self.scheduler, self.search_alg = scheduler, None
        self.trials = [Trial("by-hand", trial_id=str(number), stub=True) for number in range(len(values))]
        self.values, self.epochs = values, epochs
        self.begun: list[Trial] = []
        self.at: dict[Trial, int] = {}
        self.last: dict[Trial, dict[str, Any]] = {}
        self.stints: list[tuple[int, int]] = []
        """(trial in the order of their beginnings, epoch) where one left its place to another or ended."""

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [each for each in self.trials if not each.is_finished()]

    def stop_trial(self, trial: Trial) -> None:
        if trial.is_finished():
            return
        if trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, self.last[trial])
        else:
            self.scheduler.on_trial_remove(self, trial)
        trial.set_status(Trial.TERMINATED)

    def run(self) -> dict[int, int]:
        """Trial in the order of their beginnings -> epochs that it had."""
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)
        while (trial := self.scheduler.choose_trial_to_run(self)) is not None:
            if trial not in self.at:
                self.begun.append(trial)
                self.at[trial] = 0
            trial.set_status(Trial.RUNNING)
            while trial.status == Trial.RUNNING:
                self._epoch(trial)
            self.stints.append((self.begun.index(trial), self.at[trial]))
        return {number: self.at[trial] for number, trial in enumerate(self.begun)}

    def _epoch(self, trial: Trial) -> None:
        self.at[trial] += 1
        at = self.at[trial]
        self.last[trial] = {"training_iteration": at, "loss": score(self.values[self.begun.index(trial)], at)}
        said = self.scheduler.on_trial_result(self, trial, self.last[trial])
        if said == TrialScheduler.STOP or at == self.epochs:
            self.stop_trial(trial)
        elif said == TrialScheduler.PAUSE:
            trial.set_status(Trial.PAUSED)


ASKED = {"time_attr": "training_iteration", "metric": "loss", "mode": "min"}


@pytest.mark.parametrize(
    ("name", "made", "arguments", "most_jobs"),
    [
        ("hyperband", HyperBandScheduler, {"max_t": 9, "reduction_factor": 3}, 40),
        ("hyperband", HyperBandScheduler, {"max_t": 8, "reduction_factor": 2, "stop_last_trials": False}, 60),
        ("async_hyperband", AsyncHyperBandScheduler, {"max_t": 9, "grace_period": 1, "reduction_factor": 3}, 50),
        ("asynchyperband", AsyncHyperBandScheduler, {"max_t": 7, "grace_period": 2, "reduction_factor": 2}, 60),
        ("medianstopping", MedianStoppingRule, {"grace_period": 2, "min_samples_required": 2}, 300),
        ("medianstopping", MedianStoppingRule, {"grace_period": 3, "hard_stop": False}, 300),
    ],
)
def test_it_stops_and_pauses_what_it_would_in_tune(
    name: str, made: Any, arguments: dict[str, Any], most_jobs: int
) -> None:
    settings = settings_of(name, samples=22, scheduler_args=arguments)
    searcher = RandomSearcher(toy_space(), seed=3, samples=22)
    values = [dict(found.values) for number in range(22) if (found := searcher.suggest(number))]
    tune = Tune(made(**ASKED, **arguments), values, epochs=9)
    expected = tune.run()

    ledger, given = MemoryLedger(), list[Assigned]()
    core = core_of(settings, ledger)
    drive(core, Epochs(), given=given)
    had = {number: int(row["resource"]) for number, row in ledger.trials.items()}
    assert had == expected
    is_compared = len(set(expected.values())) > 1 or len(tune.stints) > len(tune.trials)
    assert is_compared, "nothing was stopped or paused"
    ends = [(job.trial, int(core.state.trials[job.trial].results[job.rung].resource)) for job in given]
    # A job may end where Tune would only have gone on; where it left its place is the same, in the same order.
    left = [end for end, after in zip(ends, [*ends[1:], (-1, 0)], strict=True) if end[0] != after[0]]
    assert left == [
        end for end, after in zip(tune.stints, [*tune.stints[1:], (-1, 0)], strict=True) if end[0] != after[0]
    ]
    assert len(given) <= most_jobs


class Epochs(Toy):
    """Nine epochs and no more, however far the milestone is."""

    def __call__(self, job: Assigned) -> Any:
        if job.until is None or job.until >= 9:
            return super().__call__(replace(job, until=None))
        return super().__call__(job)


# -- restarts

NAMED = {
    "hyperband": settings_of("hyperband", scheduler_args={"max_t": 9}),
    "async": settings_of("async_hyperband", scheduler_args={"max_t": 9, "reduction_factor": 2, "brackets": 2}),
    "median": settings_of("median_stopping_rule", samples=6, scheduler_args={"every": 3, "min_samples_required": 2}),
    "pbt": settings_of("pbt", samples=6, scheduler_args={"perturbation_interval": 3}),
    "pbt in step": settings_of("pbt", samples=6, scheduler_args={"perturbation_interval": 2, "synch": True}),
    "pb2": settings_of("pb2", samples=4, scheduler_args={"perturbation_interval": 3}),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("lanes", [1, 3])
def test_killed_anywhere_it_ends_as_if_nothing_had_happened(name: str, lanes: int) -> None:
    settings, undisturbed = NAMED[name], MemoryLedger()
    drive(core_of(settings, undisturbed), toy(), lanes)
    again = TuneScheduler(settings, toy_space())
    assert verify_stored(undisturbed.facts, undisturbed.history(), again) == []
    if lanes > 1:
        return  # who is killed then has another order of ends
    half, third = undisturbed.steps // 2, undisturbed.steps // 3
    for number in (half,) if name == "pb2" else (1, third, 2 * third):  # its regressions take a while
        ledger, train = MemoryLedger(), toy()

        def killed(step: int, at: int = number) -> None:
            if step == at:
                raise Killed

        ledger.before = killed
        with pytest.raises(Killed):
            drive(core_of(settings, ledger), train)
        ledger.before = lambda step: None
        core = core_of(settings, ledger, driver="d2")
        drive(core, train)
        assert core.view().notes == ()
        assert decided(ledger) == decided(undisturbed)


def toy() -> Epochs:
    return Epochs(trouble=0.1)


def decided(ledger: MemoryLedger) -> list[Any]:
    kept = ("kind", "trial", "job", "inputs", "outcome")
    return [[each[key] for key in kept] for each in ledger.decisions if each["kind"] not in ("reopen", "retry")]


class Moody(AsyncHyperBandScheduler):
    """Every one of them has another mind."""

    lives: ClassVar[list[Moody]] = []

    def __init__(self, metric: str | None = None, mode: str | None = None) -> None:
        super().__init__(metric=metric, mode=mode, max_t=9)
        self.lives.append(self)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        is_odd = (int(trial.trial_id) + len(self.lives) // 2) % 2  # one is made to look at it, one to ask
        return self.STOP if is_odd and result["training_iteration"] >= 2 else self.CONTINUE


def test_what_decides_otherwise_begins_anew_and_says_so() -> None:
    settings = settings_of(f"{__name__}:Moody")
    ledger, given = MemoryLedger(), list[Assigned]()

    def killed(step: int) -> None:
        if step == 60:
            raise Killed

    ledger.before = killed
    with pytest.raises(Killed):
        drive(core_of(settings, ledger), Epochs(), given=given)
    over = {number for number, row in ledger.trials.items() if row["status"] in ("complete", "stopped")}
    reached = {number: row["resource"] for number, row in ledger.trials.items()}
    assert over
    ledger.before = lambda step: None
    core, later = core_of(settings, ledger, driver="d2"), list[Assigned]()
    drive(core, Epochs(), given=later)
    assert "decided otherwise" in " ".join(core.view().notes)
    assert not over & {job.trial for job in later}
    assert all(job.until is None or job.until > reached.get(job.trial, 0) for job in later)
    assert len(ledger.trials) == settings.samples


# -- people, and trials that fail


def test_held_stopped_retried_and_extended_trials_are_known_to_it() -> None:
    settings = settings_of("hyperband", samples=3, scheduler_args={"max_t": 9})
    ledger = MemoryLedger()
    core = core_of(settings, ledger)
    first = core.next_job()
    assert first is not None
    ledger.ask("hold", trials=[0])
    assert core.poll().stops == (first.ticket.run,)
    core.ended(first.job, Toy()(first))
    drive(core, Epochs())
    assert core.reason == ""
    assert ledger.trials[0]["is_held"]
    ledger.ask("continue", trials=[0])
    ledger.ask("extend", samples=2)
    core.poll()
    drive(core_of(settings, ledger, driver="d2"), Epochs())
    assert len(ledger.trials) == 5
    assert {row["status"] for row in ledger.trials.values()} <= {"complete", "stopped"}
    assert verify_stored(ledger.facts, ledger.history(), TuneScheduler(settings, toy_space())) == []


def test_one_that_is_stopped_is_waited_for_no_longer() -> None:
    """The bracket of five that are asked at three epochs: two of the other four go on when the last one is gone."""
    settings = settings_of("hyperband", samples=8, scheduler_args={"max_t": 9})
    ledger, train = MemoryLedger(), Epochs()
    core = core_of(settings, ledger)
    asked: list[int] = []
    while (job := core.next_job()) is not None:
        if job.until == 3:
            asked.append(job.trial)
            if len(asked) == 5:
                ledger.ask("stop", trials=[job.trial])
                core.poll()
        core.ended(job.job, train(job))
    assert core.is_over()
    status = Counter(row["status"] for row in ledger.trials.values())
    assert status == {"complete": 5, "stopped": 2, "cancelled": 1}
    assert verify_stored(ledger.facts, ledger.history(), TuneScheduler(settings, toy_space())) == []


def test_one_that_fails_is_missed_by_nobody() -> None:
    settings, ledger = settings_of("hyperband", scheduler_args={"max_t": 9}), MemoryLedger()
    drive(core_of(settings, ledger), Epochs(trouble=0.6), lanes=2)
    status = Counter(row["status"] for row in ledger.trials.values())
    assert status["failed"] >= 1
    assert status["complete"] + status["stopped"] + status["failed"] == 12


# -- populations


@pytest.mark.parametrize("name", ["pbt", "pb2"])
def test_what_takes_over_from_another_gets_its_checkpoint_and_values_of_the_space(name: str) -> None:
    settings = NAMED[name]
    ledger, given = MemoryLedger(), list[Assigned]()
    core = core_of(settings, ledger)
    drive(core, Epochs(), given=given)
    taken = [job for job in given if job.clone]
    assert taken
    assert kinds(ledger)["exploit"] == len(taken)
    for job in taken:
        assert job.clone["run"] != job.ticket.run
        assert toy_space().contains(job.values) == ""
    donors = {job.clone["run"]: job.clone["name"] for job in taken}
    kept = {row["run"]: row for row in ledger.trials.values()}
    assert set(donors) <= set(kept)


def test_ranges_of_the_space_are_what_it_may_change() -> None:
    made = TuneScheduler(settings_of("pb2"), RANGES)._scheduler
    assert made._hyperparam_bounds == {"lr": [1e-4, 1], "size": [8, 64]}
    assert made._perturbation_interval == 1
    made = TuneScheduler(settings_of("pbt", scheduler_args={"hyperparam_mutations": {"lr": None}}), RANGES)._scheduler
    assert isinstance(made, PopulationBasedTraining)
    assert list(made._hyperparam_mutations) == ["lr"]


# -- what there is not


@pytest.mark.parametrize(
    ("settings", "where", "key", "said"),
    [
        ({"scheduler": "tune:hyperbend"}, RANGES, "sweep.scheduler", "hyperband"),
        ({"scheduler": "tune:nothing"}, RANGES, "sweep.scheduler", "median_stopping_rule"),
        ({"scheduler": "tune:fifo"}, RANGES, "sweep.scheduler", "sweep.scheduler=fifo"),
        ({"scheduler": "tune:hb_bohb"}, RANGES, "sweep.scheduler", "tune:hyperband"),
        ({"scheduler": "tune:resource_changing"}, RANGES, "sweep.scheduler", "resources"),
        ({"scheduler": "tune:no.such.module:Class"}, RANGES, "sweep.scheduler", "cannot be imported"),
        ({"scheduler": "tune:json:JSONDecoder"}, RANGES, "sweep.scheduler", "TrialScheduler"),
        ({"scheduler_args": {"max_y": 3}}, RANGES, "sweep.scheduler_args.max_y", "max_t"),
        ({"scheduler_args": {"metric": "loss"}}, RANGES, "sweep.scheduler_args.metric", "sweep.objective"),
        ({"scheduler_args": {"time_attr": "epoch"}}, RANGES, "sweep.scheduler_args.time_attr", "sweep.resource"),
        ({"scheduler_args": {"max_t": 0}}, RANGES, "sweep.scheduler_args", "not valid"),
        ({"scheduler_args": {"every": 0}}, RANGES, "sweep.scheduler_args.every", "above 0"),
        ({"objective": []}, RANGES, "sweep.objective", "val/accuracy:max"),
        ({"scheduler": "tune:pb2"}, space({"kind": "choice(a, b)"}), "sweep.space", "range"),
        ({"scheduler": "tune:pbt", "scheduler_args": {"hyperparam_mutations": {"lz": [1]}}}, RANGES,
         "sweep.scheduler_args.hyperparam_mutations.lz", "lr"),
        ({"scheduler": "tune:pbt"}, space({"a": "choice(1, 2)", "b": "when(a == 1, uniform(0, 1))"}),
         "sweep.scheduler", "only some trials"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_start(
    settings: dict[str, Any], where: Space, key: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        scheduler_named(settings_of("hyperband", **settings), where)
    assert caught.value.key == key
    assert said in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        scheduler_named(settings_of("pb2"), RANGES)


def test_several_seeds_are_refused_and_the_end_is_the_functions_own() -> None:
    with pytest.raises(ConfigError) as caught:
        rules_for(settings_of("hyperband", seeds=2), samples=3, seed=0, params={"epochs": 9})
    assert caught.value.key == "sweep.seeds"
    rules = rules_for(settings_of("hyperband"), samples=3, seed=0, params={"epochs": 9})
    assert rules.tune is not None
    assert rules.tune.max == 9
    by_report = rules_for(settings_of("hyperband", resource=Resource.report), samples=3, seed=0, params={"epochs": 9})
    assert by_report.tune is not None
    assert by_report.tune.max == 0


def test_the_plan_says_what_is_left_after_a_restart() -> None:
    said = scheduler_named(settings_of("hyperband"), RANGES).survives
    assert "played to it again" in said
    assert "finished trials are not repeated" in said
    assert "lost" in said
