"""Whoever takes a sweep over chooses as the one before would have, and a changed record is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.sweeps.asha import AshaScheduler
from orchestrator.sweeps.fifo import Fifo
from orchestrator.sweeps.median import MedianStopping
from orchestrator.sweeps.population import PopulationScheduler
from orchestrator.sweeps.replay import verify
from orchestrator.sweeps.state import (
    Asha,
    Decision,
    Kind,
    Median,
    Population,
    Scheduler,
    Settings,
    State,
    Wait,
)
from tests.plugins.sweep_model import (
    Loop,
    ToySpace,
    World,
    jobs_of,
    rebuilt_from_rows,
    simulate,
    suggested,
)

KINDS: dict[str, tuple[Callable[[], Scheduler], dict[str, Any]]] = {
    "fifo": (Fifo, {}),
    "asha": (AshaScheduler, {"asha": Asha(milestones=(1.0, 3.0, 9.0))}),
    "asha-repeats": (AshaScheduler, {"asha": Asha(milestones=(1.0, 3.0, 9.0)), "repeats": 3}),
    "median": (MedianStopping, {"median": Median(trials=2)}),
    "pbt": (lambda: PopulationScheduler(ToySpace()), {"population": Population(max=3)}),
    "pbt-async": (lambda: PopulationScheduler(ToySpace()), {"population": Population(max=3, is_sync=False)}),
}


def begun(name: str, *, seed: int = 4, samples: int = 8, records: tuple[str, ...] = ()) -> Loop:
    make, more = KINDS[name]
    return Loop(Settings(samples=samples, seed=seed, **more), make(), records=records)


def training(name: str, seed: int = 4) -> World:
    return World(seed, trouble=0.25)


def through(loop: Loop, name: str, lanes: int, *, decisions: int | None = None) -> World:
    """Runs the sweep to its end, or until at least so many decisions are written: the driver is gone then."""
    world = training(name)
    train = world.train_member if name.startswith("pbt") else world.train
    for job in loop.open_jobs():
        loop.tell(job, train(job))
    for _ in simulate(loop, lanes, train, world.seconds):
        if decisions is not None and len(loop.history) >= decisions:
            break
    return world


@pytest.mark.parametrize("name", KINDS)
def test_killed_after_any_decision_it_goes_on_as_if_nothing_had_happened(name: str) -> None:
    """One lane. What ran when it was killed is trained again, from where its checkpoint says."""
    undisturbed = begun(name)
    through(undisturbed, name, 1)
    records = undisturbed.records
    train: Any
    for count in range(len(records) + 1):
        again = begun(name, records=tuple(records[:count]))
        world = training(name)
        train = world.train_member if name.startswith("pbt") else world.train
        for job in again.jobs.values():
            train(job)  # the checkpoints that are there
        if again.history and again.history[-1].kind == Kind.stop:
            continue  # written in one step with the result that follows
        for job in again.open_jobs():
            again.tell(job, train(job))
        jobs_of(again, 1, train, world.seconds)
        assert again.records == records, f"killed after {count}"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("lanes", [1, 3])
def test_rebuilt_from_its_rows_it_chooses_the_same(name: str, lanes: int) -> None:
    for seed in range(3):
        loop = begun(name, seed=seed)
        through(loop, name, lanes)
        state = State(loop.first)
        for decision in loop.decisions():
            again = rebuilt_from_rows(state)
            assert loop.scheduler.next(again) == loop.scheduler.next(state)
            assert json.dumps(loop.scheduler.judge(again, 0)) == json.dumps(loop.scheduler.judge(state, 0))
            assert again.owed_repeat() == state.owed_repeat()
            state.apply(decision)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_every_decision_is_made_again_alike(name: str, lanes: int) -> None:
    loop = begun(name)
    through(loop, name, lanes)
    loop.request(settings={"samples": 10})
    through(loop, name, lanes)
    assert len(loop.state.trials) == 10
    found = verify(loop.first, loop.decisions(), loop.scheduler, judges=loop.judges, suggest=lambda n: suggested(4, n))
    assert found == []


def changed(decision: Decision, **outcome: Any) -> Decision:
    return replace(decision, outcome={**decision.outcome, **outcome})


def test_a_promotion_of_another_one_is_found() -> None:
    loop = begun("asha")
    through(loop, "asha", 2)
    decisions = loop.decisions()
    place = next(i for i, d in enumerate(decisions) if d.kind == Kind.promote)
    other = next(d.trial for d in decisions if d.kind == Kind.suggest and d.trial != decisions[place].trial)
    decisions[place] = replace(changed(decisions[place], trial=other), trial=other)
    first = verify(loop.first, decisions, loop.scheduler)[0]
    assert (first.seq, first.what) == (place, "outcome.trial")
    assert "the rules say" in str(first)


def test_a_score_that_was_changed_later_is_found_by_the_digest() -> None:
    loop = begun("asha")
    through(loop, "asha", 1)
    decisions = loop.decisions()
    place = next(i for i, d in enumerate(decisions) if d.kind == Kind.result)
    decisions[place] = changed(decisions[place], score=-1.0)
    assert {d.what for d in verify(loop.first, decisions, loop.scheduler)} >= {"inputs.rungs"}


def test_a_promotion_that_was_not_due_is_found() -> None:
    loop = begun("asha")
    job = loop.ask()
    assert job is not None
    early = Decision(
        seq=1, kind=Kind.suggest, trial=1, job=1, inputs={"by": "asha"},
        outcome={"rung": 1, "until": 3.0, "values": suggested(4, 1)},
    )  # fmt: skip
    found = verify(loop.first, [*loop.decisions(), early], loop.scheduler)
    assert {d.what for d in found} >= {"outcome.rung", "outcome.until"}


def test_a_stop_with_other_numbers_is_found() -> None:
    loop = begun("median", samples=30)
    through(loop, "median", 1)
    decisions = loop.decisions()
    place = next(i for i, d in enumerate(decisions) if d.kind == Kind.stop)
    assert verify(loop.first, decisions, loop.scheduler, judges=loop.judges) == []
    decisions[place] = replace(decisions[place], inputs={**decisions[place].inputs, "best": -5.0})
    found = verify(loop.first, decisions, loop.scheduler, judges=loop.judges)
    assert [(d.seq, d.what) for d in found] == [(place, "inputs.is_behind")]


def test_other_values_than_the_searcher_suggests_are_found() -> None:
    loop = begun("fifo", samples=2)
    through(loop, "fifo", 1)
    found = verify(loop.first, loop.decisions(), loop.scheduler, suggest=lambda n: suggested(5, n))
    assert {d.what.split(".")[1] for d in found} == {"values"}


def test_a_gap_ends_the_list() -> None:
    loop = begun("fifo", samples=3)
    through(loop, "fifo", 1)
    decisions = loop.decisions()
    del decisions[2]
    last = verify(loop.first, decisions, loop.scheduler)[-1]
    assert (last.seq, last.what) == (3, "order")


@pytest.mark.parametrize(
    "decision",
    [
        Decision(seq=0, kind=Kind.assign, trial=0, job=0, outcome={"rung": 0}),
        Decision(seq=0, kind=Kind.result, job=0, outcome={"end": "paused"}),
        Decision(seq=0, kind=Kind.suggest, outcome={"values": {}}),
        Decision(seq=0, kind=Kind.suggest, trial=0, job=0, outcome={"values": {}, "rung": 7}),
        Decision(seq=1, kind=Kind.over),
    ],
)
def test_what_cannot_follow_is_refused(decision: Decision) -> None:
    with pytest.raises(ValueError, match=f"Decision {decision.seq} "):
        State(Settings(samples=2)).apply(decision)


def test_a_searcher_that_has_nothing_more_ends_the_sweep() -> None:
    loop = begun("fifo", samples=5)
    job = loop.ask()
    loop.decide(Kind.suggest, outcome={"exhausted": True})
    assert isinstance(loop.scheduler.next(loop.state), Wait)
    assert job is not None
    loop.tell(job, training("fifo").train(job))
    assert loop.ask() is None
    assert loop.over


def test_the_end_of_a_cancelled_trials_job_changes_nothing() -> None:
    loop = begun("asha", samples=1)
    job = loop.ask()
    assert job is not None
    loop.request(trials=[{"trial": 0, "what": "stop"}])
    loop.tell(job, training("asha").train(job))
    assert loop.state.trials[0].results == {}
    assert loop.ask() is None
