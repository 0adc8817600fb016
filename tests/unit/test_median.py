"""Median stopping against a second one written by hand, and its table."""

from __future__ import annotations

import math

import pytest

from orchestrator.sweeps.median import MOST_ROWS, MedianStopping, compare, table
from orchestrator.sweeps.state import Direction, Median, Settings, Status
from tests.plugins.sweep_model import Ending, Loop, MedianByHand, World, jobs_of

JUDGE = {"direction": "min", "grace": 2, "trials": 3, "every": 1, "means": [[1, 0.5, 3], [2, 0.5, 3], [4, 0.25, 2]]}


def rules(samples: int, *, seed: int = 0, grace: float = 1, trials: int = 3, every: float = 1) -> Settings:
    return Settings(samples=samples, seed=seed, median=Median(grace=grace, trials=trials, every=every))


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_trial_by_trial_as_the_one_written_by_hand(lanes: int) -> None:
    stopped = 0
    for seed in range(200):
        world = World(seed, trouble=0.3 if seed % 3 else 0.0)
        grace, every = 1 + seed % 3, 1 + seed % 2
        ours = Loop(rules(8, seed=seed, grace=grace, every=every), MedianStopping())
        by_hand = MedianByHand(seed, 8, grace, 3, every)
        expected = jobs_of(by_hand, lanes, world.train, world.seconds)
        assert jobs_of(ours, lanes, world.train, world.seconds) == expected, f"seed {seed}"
        stopped += sum(trial.status == Status.stopped for trial in ours.state.trials.values())
    assert stopped > 100


def test_the_table_has_the_median_of_the_running_means() -> None:
    curves = [[(1.0, 1.0), (2.0, 3.0)], [(1.0, 5.0)], [(2.0, 9.0)]]
    assert table(curves) == [[1.0, 3.0, 2], [2.0, 5.0, 3]]


def test_scores_that_are_no_number_are_left_out_of_the_table() -> None:
    assert table([[(1.0, math.nan), (2.0, 4.0), (3.0, math.inf)]]) == [[2.0, 4.0, 1]]
    assert table([[(1.0, math.nan)]]) == []
    assert table([]) == []


def test_the_table_stays_small() -> None:
    rows = table([[(float(step), 1.0) for step in range(10_000)]])
    assert MOST_ROWS // 2 < len(rows) <= MOST_ROWS
    assert rows[0][0] == 0.0


@pytest.mark.parametrize(
    ("resource", "best", "expected"),
    [
        (1, 9.0, None),  # grace
        (2, 0.5, False),  # as good as the median is not worse
        (2, 0.6, True),
        (3, 0.6, True),  # the row below
        (4, 0.6, None),  # too few others
        (2, math.nan, True),
        (2, math.inf, True),
    ],
)
def test_who_is_behind(resource: float, best: float, expected: bool | None) -> None:
    found = compare(JUDGE, resource=resource, best=best)
    assert (found and found.is_behind) == expected


def test_where_higher_is_better_the_lower_one_is_behind() -> None:
    judge = {**JUDGE, "direction": Direction.max.value}
    assert [compare(judge, resource=2, best=best).is_behind for best in (0.4, 0.6)] == [True, False]  # type: ignore[union-attr]


def test_it_is_compared_at_every_so_many_however_far_apart_reports_are() -> None:
    judge = {**JUDGE, "every": 10, "means": [[1, 0.5, 3]]}
    reports = [1, 2, 5, 11, 13, 30, 31, 32]
    compared = [r for before, r in zip([-1, *reports], reports, strict=False)
                if compare(judge, resource=r, best=1.0, before=before)]  # fmt: skip
    assert compared == [2, 13, 30, 32]


def test_nothing_is_stopped_where_nobody_reported_before() -> None:
    assert compare({**JUDGE, "means": [[5, 0.1, 9]]}, resource=3, best=9.0) is None


def test_failed_ones_and_the_trial_itself_are_not_compared_with() -> None:
    loop = Loop(rules(4, trials=1), MedianStopping())
    world = World(0, trouble=0.0)
    jobs = [loop.ask() for _ in range(3)]
    assert all(jobs)
    loop.tell(jobs[0], Ending("failed", math.nan, 3.0, ((1.0, 0.0),)))  # type: ignore[arg-type]
    loop.tell(jobs[1], world.train(jobs[1]))  # type: ignore[arg-type]
    assert [row[2] for row in loop.scheduler.judge(loop.state, 2)["means"]] == [1] * 9
    assert loop.scheduler.judge(loop.state, 1)["means"] == []
