"""Median stopping against a second one written by hand, and its table."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from orchestrator.sweeps.median import MOST_ROWS, Medians, MedianStopping, compare, table
from orchestrator.sweeps.state import Direction, Median, Settings, State, Status
from tests.plugins.sweep_model import Ending, Loop, MedianByHand, World, jobs_of, simulate

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


def test_a_table_that_grew_curve_by_curve_is_the_one_made_at_once() -> None:
    for seed in range(20):
        stream = random.Random(seed)
        curves: list[list[tuple[float, float]]] = []
        medians = Medians()
        for _ in range(12):
            resources = sorted({round(stream.uniform(0, 8), stream.choice([0, 1])) for _ in range(stream.randrange(6))})
            curves.append([(at, stream.choice([math.nan, stream.random(), stream.random()])) for at in resources])
            medians.add(curves[-1])
            finite = [[(at, score) for at, score in curve if math.isfinite(score)] for curve in curves]
            expected = []
            for at in sorted({at for curve in finite for at, _ in curve}):
                means = [statistics.fmean(s for r, s in c if r <= at) for c in finite if c and c[0][0] <= at]
                expected.append([at, pytest.approx(statistics.median(means)), len(means)])
            assert medians.rows() == expected


def test_a_state_that_went_on_is_read_on_and_another_one_from_the_start() -> None:
    loop = Loop(Settings(samples=12, seed=1, median=Median(trials=2)), MedianStopping())
    kept, other = MedianStopping(), State(loop.first)
    for _ in simulate(loop, 2, World(1).train, World(1).seconds):
        assert kept.judge(loop.state, 99) == MedianStopping().judge(loop.state, 99)
        assert kept.judge(other, 99)["means"] == []
