"""Population based training against a second one written by hand, and who may take over from whom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.sweeps.population import PopulationScheduler, checked, explored, neighbour
from orchestrator.sweeps.state import Continue, Kind, Population, Settings, Status, Wait
from tests.plugins.sweep_model import (
    Ending,
    Items,
    Job,
    Line,
    Loop,
    PopulationByHand,
    ToySpace,
    World,
    jobs_of,
    population_by_hand,
    repeated_by_hand,
    simulate,
)

GENERATIONS = 3


def pbt(members: int, *, seed: int = 0, is_sync: bool = True, is_open: bool = False, repeats: int = 1) -> Loop:
    rules = Population(interval=1, max=GENERATIONS, is_sync=is_sync, is_open=is_open)
    settings = Settings(samples=members, seed=seed, population=rules, repeats=repeats)
    return Loop(settings, PopulationScheduler(ToySpace()))


def given(loop: Loop) -> dict[tuple[int, int], tuple[dict[str, Any], int | None]]:
    """(member, generation) -> the values it had and its donor."""
    return {(j.trial, j.rung): (dict(j.values), j.clone[0] if j.clone else None) for j in loop.jobs.values()}


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_generation_by_generation_as_the_one_written_by_hand(lanes: int) -> None:
    for seed in range(200):
        trouble = 0.25 if seed % 3 else 0.0
        expected = population_by_hand(seed, 5, GENERATIONS, World(seed, trouble=trouble).train_member)
        loop, world = pbt(5, seed=seed), World(seed, trouble=trouble)
        ended = {
            (job.trial, job.rung): (dict(job.values), job.clone[0] if job.clone else None, str(e.end), repr(e.score))
            for job, e in simulate(loop, lanes, world.train_member, world.seconds)
        }
        assert ended == expected, f"seed {seed}"


@pytest.mark.parametrize("lanes", [1, 4])
def test_of_several_runs_the_mean_counts_as_in_the_one_written_by_hand(lanes: int) -> None:
    copied = refused = 0
    for seed in range(60):
        trouble = 0.25 if seed % 3 else 0.0
        expected = repeated_by_hand(seed, 5, GENERATIONS, World(seed, trouble=trouble).train_member, 3)
        loop, world = pbt(5, seed=seed, repeats=3), World(seed, trouble=trouble)
        ended = {
            (j.trial, j.rung, j.repeat): (j, e) for j, e in simulate(loop, lanes, world.train_member, world.seconds)
        }
        assert {key[:2] for key in ended} == set(expected), f"seed {seed}"
        for (trial, rung), (values, donor, ends, scores) in expected.items():
            for repeat in range(3):
                job, ending = ended[trial, rung, repeat]
                found = (dict(job.values), job.clone[0] if job.clone else None, str(ending.end), repr(ending.score))
                assert found == (values, donor, ends[repeat], scores[repeat]), f"seed {seed}"
                copied += donor is not None
        refused += any("failed" in ends for _, _, ends, _ in expected.values())
    assert copied > 100
    assert refused > 20


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_out_of_step_as_the_one_written_by_hand(lanes: int) -> None:
    copied = 0
    for seed in range(200):
        trouble = 0.25 if seed % 3 else 0.0
        by_hand, world = PopulationByHand(seed, 5, GENERATIONS), World(seed, trouble=trouble)
        expected = jobs_of(by_hand, lanes, world.train_member, world.seconds)
        loop, world = pbt(5, seed=seed, is_sync=False), World(seed, trouble=trouble)
        assert jobs_of(loop, lanes, world.train_member, world.seconds) == expected, f"seed {seed}"
        assert {n: dict(t.values) for n, t in loop.state.trials.items()} == by_hand.values
        copied += sum(job.clone is not None for job in loop.jobs.values())
    assert copied > 200


def test_in_step_the_outcome_does_not_depend_on_the_lanes() -> None:
    tables = []
    for lanes in (1, 2, 3, 7):
        loop, world = pbt(7, seed=5), World(5)
        jobs_of(loop, lanes, world.train_member, world.seconds)
        tables.append(given(loop))
    assert all(table == tables[0] for table in tables)
    assert any(donor is not None for _, donor in tables[0].values())


def test_those_that_take_over_begin_before_their_donor_goes_on() -> None:
    """A donor that trains on may delete the checkpoint."""
    for seed in range(20):
        loop, world = pbt(8, seed=seed), World(seed)
        jobs_of(loop, 3, world.train_member, world.seconds)
        begun = {(job.trial, job.rung): number for number, job in loop.jobs.items()}
        for (trial, rung), (_, donor) in given(loop).items():
            if donor is not None:
                assert begun[trial, rung] < begun[donor, rung]


def test_a_decision_names_donor_checkpoint_and_both_values() -> None:
    loop, world = pbt(4), World(0)
    jobs_of(loop, 1, world.train_member, world.seconds)
    decision = next(d for d in loop.decisions() if d.kind == Kind.exploit)
    clone = decision.outcome["clone"]
    assert clone == {"trial": clone["trial"], "rung": 0, "checkpoint": {"name": f"{clone['trial']}-0"}}
    assert decision.inputs["label"] == ["pbt", 0, decision.trial]
    assert set(decision.inputs["before"]) == set(decision.inputs["of_donor"]) == set(decision.outcome["values"])
    assert len(decision.inputs["ranked"]) == 4


def ended(loop: Loop, scores: Mapping[int, float | str]) -> None:
    """One generation: all jobs that there are, then their ends."""
    jobs = []
    while (job := loop.ask()) is not None:
        jobs.append(job)
    for job in jobs:
        loop.tell(job, ending(job, scores[job.trial]))


def ending(job: Job, result: float | str) -> Ending:
    if isinstance(result, str):
        return Ending(result, math.nan if result == "failed" else 0.0, job.rung + 1.0)
    return Ending("paused", result, job.rung + 1.0)


def test_a_failed_member_goes_on_as_a_copy() -> None:
    loop = pbt(4)
    ended(loop, {0: 1.0, 1: "failed", 2: 3.0, 3: math.nan})
    first, second = loop.scheduler.next(loop.state), None
    loop.ask()
    second = loop.scheduler.next(loop.state)
    assert isinstance(first, Continue)
    assert isinstance(second, Continue)
    assert [(c.trial, (c.clone or {})["trial"]) for c in (first, second)] == [(1, 0), (3, 0)]


def test_without_any_good_one_failed_members_stay_failed() -> None:
    loop = pbt(3)
    ended(loop, {0: "failed", 1: "failed", 2: "failed"})
    assert loop.ask() is None
    assert loop.over
    assert {t.status for t in loop.state.trials.values()} == {Status.failed}


def test_members_without_a_finite_score_go_on_where_there_is_nobody_to_copy() -> None:
    loop = pbt(2)
    ended(loop, {0: math.nan, 1: "failed"})
    assert [(job.trial, job.clone) for job in iter(loop.ask, None)] == [(0, None)]


def test_one_that_returned_is_ranked_but_never_copied() -> None:
    loop = pbt(4)
    ended(loop, {0: "complete", 1: 2.0, 2: 3.0, 3: 4.0})
    assert [(job.trial, job.clone) for job in iter(loop.ask, None)] == [(1, None), (2, None), (3, None)]


def test_a_held_member_does_not_stop_the_others_and_takes_nothing_over_when_it_is_late() -> None:
    loop = pbt(4)
    loop.request(trials=[])
    jobs = [loop.ask() for _ in range(4)]
    loop.request(trials=[{"trial": 3, "what": "hold"}])
    for job in jobs:
        assert job is not None
        loop.tell(job, Ending("cancelled", math.nan, 0.5) if job.trial == 3 else ending(job, float(job.trial)))
    going = [job.trial for job in iter(loop.ask, None)]
    assert sorted(going) == [0, 1, 2]
    loop.request(trials=[{"trial": 3, "what": "continue"}])
    late = loop.ask()
    assert late is not None
    assert (late.trial, late.rung) == (3, 0)
    loop.tell(late, ending(late, 99.0))
    following = loop.ask()
    assert following is not None
    assert (following.trial, following.rung, following.clone) == (3, 1, None)


def test_a_generation_waits_for_its_last_member() -> None:
    loop = pbt(3)
    jobs = [loop.ask() for _ in range(3)]
    for job in jobs[:2]:
        assert job is not None
        loop.tell(job, ending(job, 1.0))
    assert isinstance(loop.scheduler.next(loop.state), Wait)


def test_out_of_step_nobody_waits() -> None:
    loop = pbt(3, is_sync=False)
    jobs = [loop.ask() for _ in range(3)]
    assert jobs[1] is not None
    loop.tell(jobs[1], ending(jobs[1], 1.0))
    assert isinstance(loop.scheduler.next(loop.state), Continue)


def test_one_member_alone_trains_to_the_end() -> None:
    loop, world = pbt(1), World(0)
    assert [row[1] for row in jobs_of(loop, 2, world.train_member, world.seconds)] == [0, 1, 2]


@pytest.mark.parametrize(("is_open", "untils"), [(False, [2.0, 4.0, 5.0]), (True, [2.0, 4.0, None])])
def test_the_last_generation_ends_at_the_end(is_open: bool, untils: list[float | None]) -> None:
    settings = Settings(samples=2, population=Population(interval=2.0, max=5.0, is_open=is_open))
    assert [settings.until(rung) for rung in range(settings.top + 1)] == untils


def test_neighbours() -> None:
    line, items = Line("x", 0.0, 1.0), Items("kind", (1, True, "c"))
    assert [neighbour(line, 0.5, 1.2), neighbour(line, 0.9, 1.2)] == [0.6, 1.0]
    assert [neighbour(items, "c", f) for f in (0.8, 1.2)] == [True, "c"]
    assert neighbour(items, 1, 1.2) is True
    assert neighbour(items, "not there", 1.2) == "not there"


class Conditional(ToySpace):
    """`speed` is searched only where kind is b."""

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != "speed" or values["kind"] == "b"}


class Refusing(ToySpace):
    def contains(self, values: Mapping[str, Any]) -> str:
        return "" if values["x"] > 0.5 else "x is too small"


def test_a_key_whose_condition_changes_appears_and_vanishes() -> None:
    seen: Counter[bool] = Counter()
    for member in range(50):
        values = {"x": 0.5, "kind": "a"}
        found = explored(Conditional(), values, Population(), seed=0, label=("pbt", 0, member))
        assert ("speed" in found) == (found["kind"] == "b")
        seen["speed" in found] += 1
    assert set(seen) == {True, False}


def test_constraints_hold_after_exploring_and_else_the_donors_values_stay() -> None:
    values = {"x": 0.55, "speed": 0.5, "kind": "b"}
    for member in range(30):
        assert explored(Refusing(), values, Population(), seed=0, label=("pbt", 0, member))["x"] > 0.5
    down = Population(resample=0.0, factors=(0.5,))
    assert explored(Refusing(), values, down, seed=0, label=("pbt", 0, 0)) == values


def test_only_the_keys_to_mutate_change() -> None:
    values = {"x": 0.5, "speed": 0.5, "kind": "b"}
    found = [explored(ToySpace(), values, Population(mutate=("x",)), seed=0, label=("pbt", 0, m)) for m in range(20)]
    assert all({**each, "x": 0.5} == values for each in found)
    assert len({each["x"] for each in found}) > 2


@pytest.mark.parametrize(
    ("change", "samples"),
    [
        ({}, 1),
        ({"interval": 0}, 4),
        ({"max": 0.5}, 4),
        ({"quantile": 0.6}, 4),
        ({"resample": 2}, 4),
        ({"factors": ()}, 4),
    ],
)
def test_rules_that_nobody_can_follow_are_refused(change: dict[str, Any], samples: int) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.pbt\."):
        checked(Population(**change), samples)
