"""A sweep whose driver may die after any call is the sweep it would have been, and nothing is decided twice."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.config.settings import AshaConfig, MedianConfig, PbtConfig, SweepConfig
from orchestrator.errors import ConfigError, SweepTaken
from orchestrator.failures.policy import Rules
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned, Ended, Ending
from orchestrator.sweeps.median import compare
from orchestrator.sweeps.replay import verify_stored
from orchestrator.sweeps.rules import scheduler_for
from orchestrator.sweeps.search import RandomSearcher
from tests.plugins.sweep_ledger import Killed, MemoryLedger, Toy, tally, toy_core, toy_space
from tests.plugins.sweep_model import score, share

Train = Callable[[Assigned], Ending]


def fifo(**more: Any) -> SweepConfig:
    return SweepConfig(**{"samples": 6, "objective": ["loss:min"], **more})


def asha(**more: Any) -> SweepConfig:
    return fifo(**{"samples": 20, "scheduler": "asha", "asha": AshaConfig(min=1, max=9, reduction=3), **more})


def pbt(**more: Any) -> SweepConfig:
    return fifo(**{"samples": 8, "scheduler": "pbt", "pbt": PbtConfig(interval=3, max=9), **more})


def median(**more: Any) -> SweepConfig:
    return fifo(**{"samples": 20, "scheduler": "median", "median": MedianConfig(grace=2, trials=3), **more})


class Judged(Toy):
    """Trains to the end, unless the median of the others says no."""

    def __call__(self, job: Assigned) -> Ending:
        best, before, reports = math.nan, -math.inf, []
        for at in range(1, 10):
            now = score(job.values, at)
            reports.append([float(at), now])
            best = now if math.isnan(best) else min(best, now)
            found = compare(job.judge["median"], resource=float(at), best=best, before=before)
            if found and found.is_behind:
                said = tally(job, float(at), now, reports, verdict="end", reason="behind", compared=found.to_json())
                return Ending(how=Ended.ended, tally=said)
            before = float(at)
        return Ending(how=Ended.complete, tally=tally(job, 9.0, reports[-1][1], reports))


KINDS: dict[str, tuple[SweepConfig, Callable[[], Toy]]] = {
    "fifo": (fifo(), Toy),
    "asha": (asha(), lambda: Toy(trouble=0.3)),
    "asha-seeds": (asha(samples=9, seeds=3), lambda: Toy(trouble=0.2)),
    "median": (median(), Judged),
    "pbt": (pbt(), lambda: Toy(trouble=0.1)),
    "pbt-seeds": (pbt(samples=5, seeds=3), lambda: Toy(trouble=0.1)),
}


def drive(core: Core, train: Train, lanes: int = 1, *, given: list[Assigned] | None = None) -> None:
    """Runs it to its end on so many lanes, whose jobs take seeded times."""
    for _ in driven(core, train, lanes, given=given):
        pass


def driven(core: Core, train: Train, lanes: int = 1, *, given: list[Assigned] | None = None) -> Iterator[Assigned]:
    busy: list[tuple[float, int, Assigned]] = []
    now = 0.0
    while True:
        while len(busy) < lanes and (job := core.next_job()) is not None:
            if given is not None:
                given.append(job)
            seconds = 0.5 + share(1, "seconds", (job.trial, job.rung, job.repeat)) * (1 + job.rung)
            heapq.heappush(busy, (now + seconds, job.job, job))
        if not busy:
            assert core.is_over()
            return
        now, _, job = heapq.heappop(busy)
        core.ended(job.job, train(job))
        yield job


def outcome(ledger: MemoryLedger) -> list[dict[str, Any]]:
    """What people see of the trials, but for what time it was."""
    hidden = ("ended_at",)
    return [{key: value for key, value in row.items() if key not in hidden} for _, row in sorted(ledger.trials.items())]


def chosen(ledger: MemoryLedger) -> list[tuple[Any, ...]]:
    """The decisions that a restart leaves as they are, in their order."""
    return [
        (each["kind"], each["trial"], each["job"], each["inputs"], each["outcome"])
        for each in ledger.decisions
        if each["kind"] not in ("reopen", "retry")
    ]


def differences(ledger: MemoryLedger, settings: SweepConfig) -> list[Any]:
    judges = {number: row["judge"]["median"] for number, row in ledger.jobs.items() if "median" in row["judge"]}
    searcher = RandomSearcher(toy_space(), seed=3, samples=max(settings.samples, 1))
    scheduler = scheduler_for(settings, toy_space())
    return verify_stored(ledger.facts, ledger.history(), scheduler, judges=judges, searcher=searcher)


@pytest.mark.parametrize("name", KINDS)
def test_killed_after_any_call_it_ends_as_if_nothing_had_happened(name: str) -> None:
    """One lane. Killed before a step is written, which leaves what is left by a death after the one before it."""
    settings, toy = KINDS[name]
    undisturbed = MemoryLedger()
    drive(toy_core(settings, undisturbed), toy())
    assert len(undisturbed.trials) == settings.samples
    assert differences(undisturbed, settings) == []
    for number in range(0, undisturbed.steps, 1 if name == "asha" else 12):
        ledger = MemoryLedger()

        def killed(step: int, at: int = number) -> None:
            if step == at:
                raise Killed

        ledger.before = killed
        train = toy()
        with pytest.raises(Killed):
            drive(toy_core(settings, ledger), train)
        drive(toy_core(settings, ledger, driver="d2"), train)
        assert outcome(ledger) == outcome(undisturbed), f"step {number}"
        assert chosen(ledger) == chosen(undisturbed)
        if number % 6 == 0:
            assert differences(ledger, settings) == []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("lanes", [2, 4])
def test_on_more_lanes_nothing_is_lost_or_doubled(name: str, lanes: int) -> None:
    settings, toy = KINDS[name]
    ledger, train, kills = MemoryLedger(), toy(), 0
    while True:
        limit = ledger.steps + 7

        def killed(step: int, at: int = limit) -> None:
            if step == at:
                raise Killed

        ledger.after = killed
        try:
            drive(toy_core(settings, ledger, driver=f"d{kills}"), train, lanes)
            break
        except Killed:
            kills += 1
    assert kills
    assert sorted(ledger.trials) == list(range(settings.samples))
    ended = [(row["trial"], row["rung"], row["repeat"]) for row in ledger.jobs.values()]
    assert len(ended) == len(set(ended)), "no rung is run twice"
    assert all(row["ended_at"] for row in ledger.jobs.values())
    assert all("RUNNING" not in attempts for attempts in ledger.runs.values())
    for row in ledger.jobs.values():
        if row["status"] == "paused":
            assert row["resource"] == row["until"]
    assert differences(ledger, settings) == []


def test_a_lost_answer_is_asked_for_again_and_nothing_happens_twice() -> None:
    ledger, undisturbed = MemoryLedger(), MemoryLedger()
    drive(toy_core(asha(), undisturbed), Toy())
    lost: list[int] = []

    def lose(step: int) -> None:
        if step % 5 == 3:
            lost.append(step)
            raise ConnectionError("the answer was lost")

    ledger.after = lose
    drive(toy_core(asha(), ledger), Toy())
    assert len(lost) > 10
    assert chosen(ledger) == chosen(undisturbed)


def test_while_the_ledger_is_away_the_same_step_stays_the_next() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(), ledger)

    def away(step: int) -> None:
        raise ConnectionError("nobody answers")

    ledger.before = away
    for _ in range(2):
        with pytest.raises(ConnectionError):
            core.next_job()
    assert ledger.decisions == []
    ledger.before = lambda step: None
    first = core.next_job()
    assert first is not None
    assert (first.job, first.trial) == (0, 0)
    ledger.after = away
    with pytest.raises(ConnectionError):
        core.ended(first.job, Toy()(first))
    ledger.after = lambda step: None
    core.ended(first.job, Toy()(first))
    assert [each["kind"] for each in ledger.decisions] == ["suggest", "result"]
    assert list(core.running()) == []


def test_a_driver_that_lost_the_sweep_decides_nothing_more() -> None:
    ledger = MemoryLedger()
    first = toy_core(fifo(), ledger)
    assert first.next_job() is not None
    toy_core(fifo(), ledger, driver="d2")
    with pytest.raises(SweepTaken):
        first.next_job()
    with pytest.raises(SweepTaken):
        first.poll()
    assert len(ledger.decisions) == 1


def test_the_objective_of_the_first_report_holds_from_then_on() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(objective=[]), ledger)
    first, second = core.next_job(), core.next_job()
    assert first
    assert second
    assert first.judge["objectives"] == []
    said = tally(first, 9.0, 0.5, [[9.0, 0.5]], objectives=[["acc", "max"]], last={"acc": 0.5}, best={"acc": 0.5})
    core.ended(first.job, Ending(how=Ended.complete, tally=said))
    third = core.next_job()
    assert third
    assert third.judge["objectives"] == [["acc", "max"]]
    core.ended(second.job, Ending(how=Ended.complete, tally=tally(second, 9.0, 0.1, [[9.0, 0.1]])))
    assert ledger.trials[1]["status"] == "failed"
    assert "acc: it reported loss" in ledger.trials[1]["reason"]
    again = toy_core(fifo(objective=[]), ledger, driver="d2")
    assert again.state.settings.direction == "max"


def test_a_job_that_crashes_is_tried_again_while_it_gets_further() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=1, restarts=2), ledger)
    reached = [1.0, 1.0, 2.0, 2.0, 2.0]
    for count, resource in enumerate(reached):
        job = core.next_job()
        assert job
        assert job.ticket.attempt == count + 1
        said = tally(job, resource, 0.5, [[resource, 0.5]])
        error = {"type": "RuntimeError", "message": "node died"}
        core.ended(job.job, Ending(how=Ended.failed, error=error, tally=said, kind="service", is_restart_useful=True))
        if count == 2:
            core = toy_core(fifo(samples=1, restarts=2), ledger, driver="d2")
    assert core.next_job() is None
    assert core.is_over()
    assert ledger.trials[0]["status"] == "failed"
    assert "RuntimeError: node died" in ledger.trials[0]["reason"]
    assert ledger.runs["run-0.0"] == ["CRASHED"] * 4 + ["FAILED"]


def test_what_is_lost_is_not_counted_and_what_is_the_functions_fault_is_not_tried_again() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=2, restarts=0), ledger)
    for _ in range(5):
        job = core.next_job()
        assert job
        assert job.trial == 0
        core.ended(job.job, Ending(how=Ended.lost))
    job = core.next_job()
    assert job
    core.ended(job.job, Ending(how=Ended.failed, error={"type": "ValueError", "message": "no"}))
    following = core.next_job()
    assert following
    assert following.trial == 1
    assert ledger.trials[0]["reason"] == "ValueError: no"


def test_a_held_trial_stops_and_goes_on_where_it_was() -> None:
    ledger = MemoryLedger()
    core = toy_core(asha(samples=2), ledger)
    job = core.next_job()
    assert job
    request = ledger.ask("hold", trials=[0])
    assert core.poll().stops == (job.ticket.run,)
    assert ledger.requests[request].answer == "trial 0: held"
    core.ended(job.job, Ending(how=Ended.stopped))
    assert ledger.trials[0]["is_held"]
    drive(core, Toy())
    assert ledger.decisions[-1]["kind"] == "over"
    assert "held" in ledger.decisions[-1]["outcome"]["reason"]
    ledger.ask("continue", trials=[0])
    core = toy_core(asha(samples=2), ledger, driver="d2")
    assert core.poll().stops == ()
    drive(core, Toy())
    assert ledger.trials[0]["rung"] >= 0
    assert ledger.runs["run-0.0"][:2] == ["CANCELLED", "FINISHED"]
    assert differences(ledger, asha(samples=2)) == []


def test_a_trial_held_while_its_driver_died_keeps_nobody_waiting() -> None:
    ledger = MemoryLedger()
    core = toy_core(asha(samples=1), ledger)
    assert core.next_job()
    ledger.ask("hold", trials=[0])
    core.poll()
    again = toy_core(asha(samples=1), ledger, driver="d2")
    assert again.next_job() is None
    assert again.is_over()
    assert ledger.jobs[0]["status"] == "cancelled"


def test_stopped_it_goes_on_later_with_the_same_jobs() -> None:
    ledger, undisturbed = MemoryLedger(), MemoryLedger()
    drive(toy_core(asha(), undisturbed), Toy())
    core = toy_core(asha(), ledger)
    toy = Toy()
    for _ in range(7):
        job = core.next_job()
        assert job
        core.ended(job.job, toy(job))
    job = core.next_job()
    assert job
    core.stop("ctrl-C")
    assert core.poll().stops == (job.ticket.run,)
    assert core.next_job() is None
    assert not core.is_over(), "one still runs"
    core.ended(job.job, Ending(how=Ended.stopped))
    assert core.is_over()
    drive(toy_core(asha(), ledger, driver="d2"), toy)
    assert outcome(ledger) == outcome(undisturbed)


def test_a_run_that_somebody_cancels_ends_its_trial_alone() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=2), ledger)
    job = core.next_job()
    assert job
    core.ended(job.job, Ending(how=Ended.stopped))
    assert ledger.trials[0]["status"] == "cancelled"
    drive(core, Toy())
    assert ledger.trials[1]["status"] == "complete"


@pytest.mark.parametrize("name", ["fifo", "asha", "median"])
def test_extended_it_has_the_trials_that_it_would_have_had(name: str) -> None:
    settings, toy = KINDS[name]
    ledger = MemoryLedger()
    drive(toy_core(settings, ledger), toy())
    ledger.ask("extend", samples=5)
    core = toy_core(settings, ledger, driver="d2")
    core.poll()
    assert ledger.requests[0].answer == f"sweep.samples: {settings.samples} → {settings.samples + 5}"
    drive(core, toy())
    assert len(ledger.trials) == settings.samples + 5
    larger = MemoryLedger()
    drive(toy_core(SweepConfig(**{**vars(settings), "samples": settings.samples + 5}), larger), toy())
    assert [row["values"] for row in outcome(ledger)] == [row["values"] for row in outcome(larger)]


def test_a_higher_top_of_asha_promotes_from_the_old_one() -> None:
    ledger = MemoryLedger()
    drive(toy_core(asha(), ledger), Toy())
    ledger.ask("set", **{"asha.max": 27, "restarts": 1})
    core = toy_core(asha(), ledger, driver="d2")
    core.poll()
    drive(core, Toy())
    assert max(row["resource"] for row in ledger.trials.values()) == 9.0, "two at the old top promote nobody"
    ledger.ask("extend", samples=20)
    core = toy_core(asha(), ledger, driver="d3")
    core.poll()
    drive(core, Toy())
    assert max(row["resource"] for row in ledger.trials.values()) == 27.0
    assert differences(ledger, asha(samples=40)) == []


@pytest.mark.parametrize(
    ("kind", "details", "why"),
    [
        ("set", {"searcher": 1}, "cannot change any more"),
        ("set", {"asha.max": 3}, "may only grow"),
        ("set", {"restarts": "x"}, "is a number"),
        ("set", {"space": {"lr": "uniform(0,1)"}}, "keys cannot be added"),
        ("set", {"space": {"x": "uniform(3,1)"}}, "refused"),
        ("hold", {"trials": [77]}, "there is no trial 77"),
        ("retry", {}, "no trial has failed"),
        ("extend", {}, "by how many"),
        ("dance", {}, "nobody knows what"),
    ],
)
def test_a_refusal_is_an_answer(kind: str, details: dict[str, Any], why: str) -> None:
    ledger = MemoryLedger()
    core = toy_core(asha(), ledger)
    assert core.next_job()
    ledger.ask(kind, **details)
    core.poll()
    assert why in ledger.requests[0].answer
    assert ledger.requests[0].answer.startswith("refused: ")
    assert len(ledger.decisions) == 1
    core.poll()


def test_what_is_not_suggested_yet_may_have_another_range() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(), ledger)
    toy = Toy()
    for _ in range(3):
        job = core.next_job()
        assert job
        core.ended(job.job, toy(job))
    ledger.ask("set", space={"x": "uniform(5,6)"})
    core.poll()
    core = toy_core(fifo(), ledger, driver="d2")
    drive(core, toy)
    assert [row["values"]["x"] > 1 for row in outcome(ledger)] == [False] * 3 + [True] * 3


def test_failed_trials_are_tried_again_on_request() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=2), ledger)
    job = core.next_job()
    assert job
    core.ended(job.job, Ending(how=Ended.failed, kind="user"))
    drive(core, Toy())
    assert ledger.trials[0]["status"] == "failed"
    ledger.ask("retry")
    core = toy_core(fifo(samples=2), ledger, driver="d2")
    core.poll()
    drive(core, Toy())
    assert [row["status"] for row in outcome(ledger)] == ["complete", "complete"]
    assert ledger.runs["run-0.0"] == ["FAILED", "FINISHED"]


def test_too_many_failures_end_it_with_their_kinds() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=9, max_failed=2), ledger)
    for kind in ("oom", "user"):
        job = core.next_job()
        assert job
        core.ended(job.job, Ending(how=Ended.failed, kind=kind))
    assert core.next_job() is None
    assert core.is_over()
    assert core.reason == "2 trials failed (sweep.max_failed=2): 1 oom, 1 user"
    assert ledger.decisions[-1]["outcome"]["reason"] == core.reason


def test_a_population_without_states_is_refused_at_its_first_end() -> None:
    ledger = MemoryLedger()
    core = toy_core(pbt(), ledger)
    job = core.next_job()
    assert job
    said = tally(job, 3.0, 0.5, [[3.0, 0.5]], has_state=False, checkpoint={})
    core.ended(job.job, Ending(how=Ended.paused, tally=said))
    assert core.next_job() is None
    assert core.is_over()
    assert "pbt needs run.report" in core.reason


def test_a_member_that_takes_over_gets_the_donors_checkpoint_which_is_held_meanwhile() -> None:
    ledger, held, given = MemoryLedger(), [], []

    def hold(*, run: str, checkpoint: str, token: str, is_held: bool) -> bool:
        held.append((run, checkpoint, token, is_held, len(ledger.decisions)))
        return True

    drive(toy_core(pbt(), ledger, hold=hold), Toy(), given=given)
    clones = [job for job in given if job.clone]
    assert clones
    for job in clones:
        donor = job.clone["run"].removeprefix("run-")
        assert job.clone["directory"] == f"/runs/e/run-{donor}"
        assert job.clone["name"] == f"{donor}-{3.0 * job.rung:g}"
        assert job.clone["job"] == job.job
        takes = [each for each in held if each[2].endswith(f"-{job.job}")]
        assert [each[3] for each in takes] == [True, False]
        assert takes[0][4] <= job.job * 2 + 1, "before it was recorded"
        assert ledger.jobs[job.job]["clone"]["run"] == job.clone["run"]


def test_each_repeat_goes_on_from_the_donors_same_repeat() -> None:
    ledger, given = MemoryLedger(), []
    held: dict[str, str] = {}

    def hold(*, run: str, checkpoint: str, token: str, is_held: bool) -> bool:
        if is_held:
            held[token] = run
        else:
            assert held.pop(token) == run
        return True

    settings = pbt(samples=4, seeds=2)
    for job in driven(toy_core(settings, ledger, hold=hold), Toy(), 3, given=given):
        assert job.rung == 0 or not job.clone or job.clone["run"].endswith(f".{job.repeat}")
    clones = [job for job in given if job.clone]
    donors = {(job.trial, job.rung): job.clone["run"].partition(".")[0] for job in clones}
    assert len(clones) == 2 * len(donors) > 0
    for job in clones:
        assert job.clone["run"] == f"{donors[job.trial, job.rung]}.{job.repeat}"
        assert job.clone["name"].startswith(f"{job.clone['trial']}.{job.repeat}-")
    assert not held, "all of them were let go"
    assert differences(ledger, settings) == []
    assert any(row["scores"].get("clones") for row in ledger.trials.values())


@pytest.mark.parametrize("sync", [True, False])
def test_where_a_donors_checkpoint_is_gone_another_is_taken_and_that_is_recorded(sync: bool) -> None:
    """The first one that each driver wants is gone."""
    settings = pbt(samples=9, pbt=PbtConfig(interval=3, max=9, sync=sync))
    ledger, given, gone = MemoryLedger(), [], set[str]()

    def hold(*, run: str, checkpoint: str, token: str, is_held: bool) -> bool:
        if is_held and not gone and "milestone" not in token:
            gone.add(checkpoint)
        return checkpoint not in gone

    drive(toy_core(settings, ledger, hold=hold), Toy(), 2, given=given)
    (missed,) = [each for each in ledger.decisions if each["kind"] == "gone"]
    assert {missed["outcome"]["checkpoint"]} == gone
    clones = [job for job in given if job.clone]
    assert clones
    assert not any(job.clone["name"] in gone for job in clones)
    instead = next(job for job in clones if job.trial == missed["outcome"]["for"])
    assert instead.clone["instead_of"] == f"what trial {missed['trial']} had saved is gone"
    assert differences(ledger, settings) == []
    again = toy_core(settings, ledger, driver="d2")
    assert again.is_over()
    assert not again.state.trials[missed["trial"]].results[missed["outcome"]["rung"]].can_give


def test_out_of_step_each_member_keeps_what_others_may_want_until_there_is_something_newer() -> None:
    settings = pbt(pbt=PbtConfig(interval=3, max=9, sync=False), seeds=2)
    ledger, held = MemoryLedger(), dict[str, set[str]]()

    def hold(*, run: str, checkpoint: str, token: str, is_held: bool) -> bool:
        there = held.setdefault(token, set())
        (there.add if is_held else there.remove)(f"{run} {checkpoint}")
        return True

    core, jobs = toy_core(settings, ledger, hold=hold), 0
    for job in driven(core, Toy(), 3):
        jobs += 1
        newest = max(core.state.trials[job.trial].results, default=None)
        for repeat in range(2) if newest in (0, 1) else ():
            run = f"{job.trial}.{repeat}"
            assert held[f"{core.sweep}-milestone-{job.trial}-{repeat}"] == {f"run-{run} {run}-{3 * newest + 3}"}
    assert jobs > 8
    assert not any(held.values()), "at the end nothing is held"


def test_a_value_that_makes_another_model_is_told_what_to_do_about_it() -> None:
    ledger, toy = MemoryLedger(), Toy()

    def train(job: Assigned) -> Ending:
        error = {"type": "CheckpointMismatch", "message": "model: has 3 entries here, 2 in the checkpoint."}
        return Ending(how=Ended.failed, error=error, kind="user") if job.clone else toy(job)

    drive(toy_core(pbt(), ledger), train)
    reasons = {row["reason"] for row in ledger.trials.values() if row["status"] == "failed"}
    assert reasons
    assert all("name those that leave the model as it is in sweep.pbt.mutate" in reason for reason in reasons)


def test_without_any_checkpoint_left_members_go_on_by_themselves() -> None:
    ledger, given = MemoryLedger(), []

    def hold(*, run: str, checkpoint: str, token: str, is_held: bool) -> bool:
        return not is_held

    drive(toy_core(pbt(), ledger, hold=hold), Toy(), given=given)
    assert not any(job.clone for job in given)
    assert all(row["resource"] == 9.0 for row in ledger.trials.values())
    assert differences(ledger, pbt()) == []


def test_what_a_held_member_was_to_take_over_stays_held() -> None:
    ledger, toy, held = MemoryLedger(), Toy(), set[str]()

    def hold(*, run: str, checkpoint: str, token: str, is_held: bool) -> bool:
        (held.add if is_held else held.remove)(token)
        return True

    core = toy_core(pbt(), ledger, hold=hold)
    while not (job := core.next_job()).clone:  # type: ignore[union-attr]
        core.ended(job.job, toy(job))  # type: ignore[union-attr, arg-type]
    assert job
    ledger.ask("hold", trials=[job.trial])
    core.poll()
    core.ended(job.job, Ending(how=Ended.stopped))
    assert held
    ledger.ask("continue", trials=[job.trial])
    core.poll()
    drive(core, toy)
    assert not held, "let go once it was taken"
    assert differences(ledger, pbt()) == []


def test_seeds_are_runs_whose_mean_counts() -> None:
    ledger, given = MemoryLedger(), []
    drive(toy_core(fifo(samples=2, seeds=3), ledger), Toy(), given=given)
    assert [(job.trial, job.repeat, job.seed) for job in given] == [(t, r, 7 + r) for t in range(2) for r in range(3)]
    row = ledger.trials[0]
    assert row["n"] == 3
    assert row["spread"] == pytest.approx(0.001)
    assert row["score"] == pytest.approx(score(row["values"], 9) + 0.001)


def test_the_searcher_hears_of_every_rung() -> None:
    heard: list[tuple[int, float, str]] = []

    class Listening(RandomSearcher):
        def told(self, number: int, values: Any, resource: float, scores: Any, state: Any) -> None:
            heard.append((number, resource, str(state)))
            super().told(number, values, resource, scores, state)

    ledger = MemoryLedger()
    core = toy_core(asha(samples=9), ledger, searcher=Listening(toy_space(), seed=3, samples=9))
    drive(core, Toy())
    assert [each for each in heard if each[1] == 1.0] == [(trial, 1.0, "pruned") for trial in range(9)]
    assert sum(each[1] == 9.0 and each[2] == "complete" for each in heard) == 1


def test_a_sweep_that_cannot_know_its_top_says_so() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.asha\.max"):
        toy_core(asha(asha=AshaConfig(min=1, max=0)), MemoryLedger(), params={})


def test_with_the_functions_own_end_the_top_rung_has_no_milestone() -> None:
    given: list[Assigned] = []
    drive(toy_core(asha(samples=9, asha=AshaConfig(min=1, max=0)), MemoryLedger()), Toy(), given=given)
    assert {job.until for job in given} == {1.0, 3.0, None}


def test_who_ran_a_job_that_crashed_may_say_how_far_it_got() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=1, restarts=1), ledger)
    for step in (10.0, 20.0, 30.0, 30.0):
        job = core.next_job()
        assert job
        core.ended(job.job, Ending(how=Ended.failed, tally={"progress": step}, is_restart_useful=True))
        if step == 20.0:
            core = toy_core(fifo(samples=1, restarts=1), ledger, driver="d2")
    assert core.next_job() is None
    assert ledger.runs["run-0.0"] == ["CRASHED"] * 3 + ["FAILED"]


def test_a_trial_that_reports_nothing_but_nan_is_the_worst_and_not_broken() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=2), ledger)
    job = core.next_job()
    assert job
    said = tally(job, 9.0, math.nan, [[9.0, math.nan]], best={})
    core.ended(job.job, Ending(how=Ended.complete, tally=said))
    assert (ledger.trials[0]["status"], ledger.trials[0]["score"]) == ("complete", None)
    drive(core, Toy())
    assert [row[2] for row in core.state.rungs[0].ranked] == [1, 0]
    assert toy_core(fifo(samples=2), ledger, driver="d2").state.rungs[0].digest == core.state.rungs[0].digest


def test_a_limit_of_trials_at_once_holds_until_it_is_changed() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(concurrency=2), ledger)
    first, second = core.next_job(), core.next_job()
    assert first
    assert second
    assert core.next_job() is None
    assert not core.is_over()
    ledger.ask("set", **{"sweep.concurrency": 3})
    core.poll()
    assert core.next_job() is not None
    assert core.next_job() is None


@pytest.mark.parametrize("lanes", [1, 3])
def test_members_that_go_on_by_themselves_learn_from_the_newest_of_all(lanes: int) -> None:
    settings = pbt(pbt=PbtConfig(interval=3, max=9, sync=False))
    ledger, given = MemoryLedger(), []
    drive(toy_core(settings, ledger), Toy(), lanes, given=given)
    assert all(row["resource"] == 9.0 for row in ledger.trials.values())
    assert any(job.clone for job in given)
    assert differences(ledger, settings) == []


def test_an_exploit_that_was_held_takes_over_the_same_checkpoint_later() -> None:
    ledger, toy = MemoryLedger(), Toy()
    core = toy_core(pbt(), ledger)
    while True:
        job = core.next_job()
        assert job
        if job.clone:
            break
        core.ended(job.job, toy(job))
    ledger.ask("hold", trials=[job.trial])
    core.poll()
    core.ended(job.job, Ending(how=Ended.stopped))
    ledger.ask("continue", trials=[job.trial])
    core = toy_core(pbt(), ledger, driver="d2")
    core.poll()
    again = core.next_job()
    assert again
    assert (again.trial, again.rung) == (job.trial, job.rung)
    assert {**again.clone, "since": 2} == job.clone
    assert again.clone["since"] == 3
    assert again.values == job.values
    assert again.job > job.job
    core.ended(again.job, toy(again))
    drive(core, toy)
    assert differences(ledger, pbt()) == []


def failing(core: Core, *, kind: str, step: float = 0.0, **more: Any) -> Assigned:
    """The next job, which fails so; given once more if it is tried again."""
    job = core.next_job()
    assert job
    error = {"type": "RuntimeError", "message": "it failed", "kind": kind, **more.pop("error", {})}
    core.ended(job.job, Ending(how=Ended.failed, error=error, tally={"progress": step, **more}, kind=kind))
    return job


def test_a_failed_trial_is_answered_by_the_kind_of_its_failure_as_a_run_is() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=1, restarts=1), ledger, failures=Rules(limits={"licence": 1}, max_halvings=5))
    for _ in range(4):
        assert failing(core, kind="node_lost").changes == {}, "no restart of the budget is taken for it"
    failing(core, kind="device_out_of_memory", micro_batch=8)
    assert failing(core, kind="licence").changes == {"splits": 2}
    core = toy_core(fifo(samples=1, restarts=1), ledger, driver="d2", failures=Rules(limits={"licence": 1}))
    halved = failing(core, kind="licence")
    assert (halved.changes, halved.after > 0) == ({"splits": 2}, True)
    assert ledger.trials[0]["status"] == "failed"
    assert "all 1 restarts for that (failures.limits.licence) are used up" in ledger.trials[0]["reason"]
    decided = [each for each in ledger.decisions if each["kind"] in ("retry", "fail")]
    assert [each["outcome"]["decision"]["action"] for each in decided] == [*["restart"] * 4, "halve", "restart", "stop"]
    assert differences(ledger, fifo(samples=1)) == []


def test_a_trial_that_fails_again_at_the_same_step_is_not_tried_for_ever() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=2, restarts=5), ledger)
    failing(core, kind="worker_killed", step=7)
    failing(core, kind="worker_killed", step=7)
    assert "the same failure at step 7 twice" in ledger.trials[0]["reason"]
    assert ledger.jobs[0]["error"]["done"].startswith("not restarted: the same failure")
    again = failing(core, kind="user_bug")
    assert (again.trial, ledger.trials[1]["reason"]) == (1, "RuntimeError: it failed"), "no word about what is plain"


def test_a_pattern_of_the_users_goes_before_all_budgets_of_a_trial() -> None:
    ledger = MemoryLedger()
    core = toy_core(fifo(samples=1, restarts=5), ledger)
    failing(core, kind="user_bug", error={"wish": "restart"})
    failing(core, kind="node_lost", error={"wish": "stop"})
    assert "failures.patterns says so" in ledger.trials[0]["reason"]
    assert ledger.runs["run-0.0"] == ["CRASHED", "FAILED"]
