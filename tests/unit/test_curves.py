"""Which points make one curve: reductions over ranks that come in pieces and out of step, and attempts that overlap."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.tracking import curves
from orchestrator.tracking.curves import Arrays, Lineage, Reduction

Listed = list[tuple[int, int, str]]


def listed(points: Arrays) -> Listed:
    return [(int(step), int(at), repr(float(value))) for step, at, value in zip(*points, strict=True)]


def log(one: Reduction, rank: int, steps: Sequence[int], values: Sequence[float] | None = None) -> Listed:
    """What comes out when the rank logs these; the time is 100 times the step, plus the rank."""
    numbers = np.array(steps, np.int64)
    logged = [10.0 * rank + step for step in steps] if values is None else list(values)
    one.add(rank, numbers, numbers * 100 + rank, np.array(logged, np.float64))
    return listed(one.take())


def steps_of(points: Listed) -> list[int]:
    return [step for step, _, _ in points]


@pytest.mark.parametrize(("kind", "expected"), [("mean", 2.0), ("min", 1.0), ("max", 3.0), ("sum", 6.0), ("last", 1.0)])
def test_a_step_is_reduced_over_its_ranks_at_the_time_of_the_latest(kind: str, expected: float) -> None:
    one = Reduction(kind, {0, 1, 2})
    assert log(one, 0, [7], [2.0]) == []
    assert log(one, 1, [7], [3.0]) == []
    assert log(one, 2, [7], [1.0]) == [(7, 702, repr(expected))]


def test_last_is_the_value_that_was_logged_last_whatever_the_rank() -> None:
    one = Reduction("last", {0, 1})
    for rank, at in ((0, 9), (1, 5)):
        one.add(rank, np.array([1]), np.array([at]), np.array([float(rank)]))
    assert listed(one.take()) == [(1, 9, "0.0")]


def test_a_step_waits_for_a_rank_that_is_behind_and_not_for_one_that_skipped_it() -> None:
    one = Reduction("sum", {0, 1})
    assert log(one, 0, [0, 1, 2, 3]) == []
    assert steps_of(log(one, 1, [0])) == [0]
    assert [value for _, _, value in log(one, 1, [3])] == ["1.0", "2.0", "16.0"]


def test_a_silent_rank_is_waited_for_until_it_is_given_up_and_takes_part_from_then_on() -> None:
    one = Reduction("sum", {0, 1, 2})
    log(one, 0, [0, 1])
    assert log(one, 1, [0, 1]) == []
    assert one.silent == {2}
    one.give_up(one.silent)
    assert steps_of(listed(one.take())) == [0, 1]
    assert log(one, 2, [0, 1, 2]) == []
    assert one.late == 2
    log(one, 0, [2])
    assert log(one, 1, [2]) == [(2, 202, "36.0")]


def test_closing_gives_out_what_a_dead_rank_left_open_and_nothing_twice() -> None:
    one = Reduction("sum", {0, 1})
    log(one, 0, [0, 1, 2])
    log(one, 1, [0])
    one.close()
    assert steps_of(listed(one.take())) == [1, 2]
    assert log(one, 1, [1, 2, 3]) == []
    assert (one.late, one.waits) == (2, True)
    one.close()
    assert steps_of(listed(one.take())) == [3]


def test_points_at_one_step_are_paired_in_their_order() -> None:
    one = Reduction("mean", {0, 1})
    log(one, 0, [0, 0], [1.0, 2.0])
    log(one, 0, [0], [3.0])
    assert [value for _, _, value in log(one, 1, [0, 0, 0], [1.0, 4.0, 9.0])] == ["1.0", "3.0", "6.0"]


def test_steps_that_begin_anew_in_each_epoch_are_paired_by_epoch() -> None:
    one = Reduction("sum", {0, 1})
    log(one, 0, [0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0])
    assert steps_of(log(one, 1, [0, 1], [10.0, 20.0])) == [0, 1]
    assert [value for _, _, value in log(one, 1, [0, 1], [30.0, 40.0])] == ["33.0", "44.0"]


def test_nan_and_infinity_of_one_rank_are_seen() -> None:
    one = Reduction("mean", {0, 1})
    log(one, 0, [0, 1, 2], [math.nan, math.inf, math.inf])
    assert [value for _, _, value in log(one, 1, [0, 1, 2], [1.0, 1.0, -math.inf])] == ["nan", "inf", "nan"]


def test_a_rank_that_is_too_far_behind_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_OPEN", 100)
    one = Reduction("sum", {0, 1})
    assert log(one, 0, range(100)) == []
    assert steps_of(log(one, 0, [100])) == list(range(52))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), skipped=st.lists(st.sets(st.integers(0, 14)), min_size=1, max_size=3))
def test_a_reduction_depends_on_the_points_and_not_on_pieces_order_or_restarts(
    data: st.DataObject, skipped: list[set[int]]
) -> None:
    logged = {rank: [step for step in range(15) if step not in gaps] for rank, gaps in enumerate(skipped)}
    one, given_out = Reduction("mean", set(logged)), []
    left = {rank: list(steps) for rank, steps in logged.items() if steps}
    while left:
        rank = data.draw(st.sampled_from(sorted(left)))
        count = data.draw(st.integers(1, len(left[rank])))
        given_out += log(one, rank, left[rank][:count])
        left[rank] = left[rank][count:]
        left = {rank: steps for rank, steps in left.items() if steps}
        one = Reduction.from_json(json.loads(json.dumps(one.to_json())))
    one.close()
    given_out += listed(one.take())
    by_step = {step: [r for r in logged if step in logged[r]] for step in range(15)}
    assert given_out == [
        (step, 100 * step + max(ranks), repr(sum(10 * r + step for r in ranks) / len(ranks)))
        for step, ranks in by_step.items()
        if ranks
    ]
    assert one.late == 0


def test_what_a_later_attempt_repeats_is_left_out_where_it_comes_too_late() -> None:
    line = Lineage()

    def kept(attempt: int, steps: Sequence[int]) -> list[int]:
        numbers = np.array(steps, np.int64)
        return steps_of(listed(line.keep(attempt, (numbers, numbers, numbers.astype(float)))))

    assert kept(1, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert kept(2, [2, 3]) == [2, 3]
    assert kept(1, [1, 2, 4]) == [1]
    assert kept(3, [3, 4]) == [3, 4]
    line = Lineage.from_json(json.loads(json.dumps(line.to_json())))
    assert kept(2, [2, 3, 4]) == [2]
    assert line.left_out == 4
