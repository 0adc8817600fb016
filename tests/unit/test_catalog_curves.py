"""Which points make a key's curve: attempts that overlap, ranks that differ, epochs; compared with slow, plain code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.catalog.curves import (
    Choice,
    Epochs,
    Source,
    Thinning,
    by_attempt,
    first_steps,
    is_current,
    joined,
    reduced,
    source,
    take,
    windows,
)
from orchestrator.catalog.metrics import matching
from orchestrator.errors import UserError
from orchestrator.store.views import Points, SummaryRow
from orchestrator.tracking.curves import KINDS_ON_READ, over_ranks

Row = tuple[int, int, int, float, float]
"""Attempt, rank, step, time, value."""


def points_of(rows: list[Row]) -> Points:
    """In the order in which the store gives them."""
    rows = sorted(rows, key=lambda row: row[:2])
    attempts, ranks, steps, times, values = zip(*rows, strict=True) if rows else ([],) * 5
    return Points(
        steps=np.array(steps, np.int64), times=np.array(times, np.float64), values=np.array(values, np.float64),
        ranks=np.array(ranks, np.int32), attempts=np.array(attempts, np.int32),
    )  # fmt: skip


def listed(points: Points) -> list[Row]:
    columns = (points.attempts, points.ranks, points.steps, points.times, points.values)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def cut(points: Points, places: list[int]) -> list[Points]:
    edges = sorted({0, len(points), *(place % (len(points) + 1) for place in places)})
    return [take(points, slice(start, end)) for start, end in zip(edges[:-1], edges[1:], strict=True)]


# -- reductions --------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda v: sum(v) / len(v),
    "min": lambda v: math.nan if any(map(math.isnan, v)) else min(v),
    "max": lambda v: math.nan if any(map(math.isnan, v)) else max(v),
    "sum": sum,
    "last": lambda v: v[-1],
    "p95": lambda v: float(np.quantile(v, 0.95)),
    "skew": lambda v: 0.0 if max(v) == min(v) else (max(v) - min(v)) / abs(sum(v) / len(v)),
}
VALUES = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, 0.0, 1.0])


def test_every_reduction_is_compared_with_a_plain_one() -> None:
    assert set(PLAIN) == set(KINDS_ON_READ)


def plainly_reduced(rows: list[Row], kind: str) -> list[tuple[int, float, float]]:
    """Step, time and value: points belong together by lap, step and occurrence."""
    slots: dict[tuple[int, int, int], list[tuple[float, int, float]]] = {}
    at: dict[int, tuple[int, int, int]] = {}
    for _, rank, step, time, value in sorted(rows, key=lambda row: row[1]):
        lap, before, turn = at.get(rank, (0, step - 1, 0))
        at[rank] = (lap + (step < before), step, turn + 1 if step == before else 0)
        slots.setdefault(at[rank], []).append((time, rank, value))
    made = []
    for (_, step, _), found in sorted(slots.items()):
        if kind == "last":
            found.sort(key=lambda each: each[:2])
        values = [value for _, _, value in found]
        value = math.nan if kind != "last" and any(map(math.isnan, values)) else PLAIN[kind](values)
        made.append((step, max(time for time, _, _ in found), value))
    return made


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 4), st.integers(0, 9), VALUES), max_size=25),
    st.sampled_from(KINDS_ON_READ),
)
def test_any_ranks_are_reduced_as_plain_code_does(logged: list[tuple[int, int, int, float]], kind: str) -> None:
    rows: list[Row] = [(1, rank, step, float(time), value) for rank, step, time, value in logged]
    found = reduced(points_of(rows), kind)
    wanted = plainly_reduced(rows, kind)
    assert found.steps.tolist() == [step for step, _, _ in wanted]
    assert found.times.tolist() == [time for _, time, _ in wanted]
    np.testing.assert_allclose(found.values, [value for _, _, value in wanted], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS_ON_READ)
def test_ranks_in_step_are_reduced_without_sorting_to_the_same(kind: str) -> None:
    """With one more rank that is out of step, which adds a slot of its own, the long way is taken."""
    random = np.random.default_rng(3)
    rows: list[Row] = [
        (1, rank, step, float(random.integers(0, 50)), float(random.normal()))
        for rank in range(5)
        for step in range(40)
    ]
    quick, long = reduced(points_of(rows), kind), reduced(points_of([*rows, (1, 9, 99, 0.0, 1.0)]), kind)
    assert long.steps.tolist() == [*quick.steps.tolist(), 99]
    assert long.times[:-1].tolist() == quick.times.tolist()
    np.testing.assert_array_equal(long.values[:-1], quick.values)


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        ("skew", [1.0, 1.1], 0.1 / 1.05), ("skew", [3.0, 3.0], 0.0), ("skew", [0.0, 0.0], 0.0),
        ("skew", [-1.0, 1.0], math.inf), ("skew", [-2.0, -4.0], 2 / 3), ("skew", [7.0], 0.0),
        ("p95", [5.0], 5.0), ("p95", list(map(float, range(21))), 19.0), ("p95", [math.inf] * 3, math.inf),
        ("p95", [1.0, math.inf], math.inf), ("p95", [1.0, math.nan], math.nan),
        ("mean", [math.inf, -math.inf], math.nan), ("max", [1.0, math.nan], math.nan),
        ("sum", [1.7e308, 1.7e308], math.inf), ("last", [math.nan, 2.0], 2.0),
    ],
)  # fmt: skip
def test_what_becomes_of_extremes(kind: str, values: list[float], wanted: float) -> None:
    (found,) = over_ranks(kind, np.array(values), np.array([0]))
    assert found == pytest.approx(wanted, nan_ok=True)


# -- attempts ----------------------------------------------------------------------------------------------------------


def canonical(pieces: list[Points]) -> Points:
    lowest = first_steps(pieces)
    return joined(take(piece, is_current(piece, lowest)) for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1), st.integers(0, 9)), max_size=30),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_a_later_attempt_replaces_what_it_did_again(logged: list[tuple[int, int, int]], places: list[int]) -> None:
    rows: list[Row] = [(attempt, rank, step, 0.0, float(n)) for n, (attempt, rank, step) in enumerate(logged)]
    points = points_of(rows)
    wanted = [
        (attempt, rank, step, time, value)
        for attempt, rank, step, time, value in listed(points)
        if all(step < other for later, _, other, *_ in rows if later > attempt)
    ]
    assert listed(canonical(cut(points, places))) == wanted


def test_attempts_are_put_together_whatever_the_pieces() -> None:
    rows: list[Row] = [(attempt, rank, step, 0.0, 1.0) for attempt in (1, 3) for rank in (0, 1) for step in range(3)]
    for pieces in (cut(points_of(rows), [1, 4, 7, 11]), cut(points_of(rows), [])):
        assert [set(part.attempts.tolist()) for part in by_attempt(pieces)] == [{1}, {3}]
        assert [len(part) for part in by_attempt(pieces)] == [6, 6]


# -- choices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"rank": -1}, {"rank": "some"}, {"attempt": 0}, {"rank": True}, {"reduce": "median"}, {"every": 0},
     {"start": "a"}, {"start": 1.5}, {"stop": 2**63}, {"rank": 1, "reduce": "mean"}, {"rank": "all", "reduce": "mean"}],
)  # fmt: skip
def test_a_choice_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Choice(**wrong)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 20), max_size=40), st.integers(1, 7), st.lists(st.integers(0, 40), max_size=5),
    st.integers(0, 20) | st.none(), st.integers(0, 20) | st.none(),
)  # fmt: skip
def test_each_nth_point_of_a_curve_is_kept_whatever_the_pieces(
    steps: list[int], every: int, places: list[int], start: int | None, stop: int | None
) -> None:
    rows: list[Row] = [(1, 0, step, 0.0, float(n)) for n, step in enumerate(steps)]
    thinning = Thinning(Choice(every=every, start=start, stop=stop))
    kept = joined(thinning.keep(piece) for piece in cut(points_of(rows), places))
    left = [row for row in rows if (start is None or row[2] >= start) and (stop is None or row[2] <= stop)]
    assert listed(kept) == left[::every]


def test_ranks_that_are_asked_for_one_by_one_are_thinned_one_by_one() -> None:
    rows: list[Row] = [(attempt, rank, step, 0.0, 0.0) for attempt in (1, 2) for rank in (0, 1) for step in range(3)]
    points = points_of(rows)
    kept = Thinning(Choice(rank="all", every=2)).keep(points)
    assert [(a, r, s) for a, r, s, *_ in listed(kept)] == [
        (1, 0, 0), (1, 0, 2), (1, 1, 0), (1, 1, 2), (2, 0, 1), (2, 1, 1),
    ]  # fmt: skip
    each = Thinning(Choice(rank="all", attempt="all", every=2)).keep(points)
    assert [s for *_, s, _, _ in listed(each)] == [0, 2] * 4


def summary(rank: int, count: int, attempt: int, reduction: str = "") -> SummaryRow:
    return SummaryRow(
        run="r", key="k", rank=rank, unit="s", direction="min", reduction=reduction, count=count, nan_count=0,
        inf_count=0, first=0.0, first_step=0, first_time=0.0, last=0.0, last_step=0, last_time=0.0,
        last_attempt=attempt, minimum=None, min_step=None, maximum=None, max_step=None, mean=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("declared", "choice", "rank", "reduce", "attempts", "most"),
    [
        ("", Choice(), 1, "", 1, 10),
        ("mean", Choice(), None, "mean", 2, 30),
        ("", Choice(reduce="skew"), None, "skew", 2, 30),
        ("mean", Choice(rank=2), 2, "", 2, 20),
        ("mean", Choice(rank="all"), None, "", 2, 30),
        ("", Choice(rank=7), 7, "", 0, 0),
    ],
)
def test_a_curve_is_the_declared_one_or_the_lowest_ranks_unless_told(
    declared: str, choice: Choice, rank: int | None, reduce: str, attempts: int, most: int
) -> None:
    rows = [summary(1, 10, 1, declared), summary(2, 20, 2, declared)]
    assert source("k", rows, choice) == Source(
        key="k", unit="s", direction="min", rank=rank, reduce=reduce, attempts=attempts, most=most
    )


def test_keys_are_found_by_pattern_and_by_their_own_name() -> None:
    known = ["train/loss", "train/acc", "val/loss", "odd[1]", "odd1"]
    assert matching(["train/*"], known, "r") == ["train/acc", "train/loss"]
    assert matching(["val/loss", "*loss"], known, "r") == ["val/loss", "train/loss"]
    assert matching(["odd[1]"], known, "r") == ["odd[1]"]
    with pytest.raises(UserError, match="no metric 'train/lose'.*'train/loss'"):
        matching(["train/lose"], known, "r")


# -- epochs ------------------------------------------------------------------------------------------------------------


def test_the_epoch_of_a_step_is_the_one_logged_last_before_it_in_the_points_own_attempt() -> None:
    logged: list[Row] = [(1, 0, step, 0.0, float(step // 10)) for step in range(5, 60)]
    logged += [(2, 0, step, 0.0, step // 10 + 0.5 + 100) for step in range(40, 50, 5)]
    epochs = Epochs(cut(points_of(logged), [3, 30]))
    asked = points_of([(a, 0, s, 0.0, 0.0) for a, s in ((1, 4), (1, 5), (1, 19), (1, 58), (2, 39), (2, 44), (2, 99))])
    found, is_known = epochs.at(asked)
    assert [e if k else None for e, k in zip(found.tolist(), is_known.tolist(), strict=True)] == [
        None, 0, 1, 5, 3, 104, 104,
    ]  # fmt: skip


def test_an_epoch_that_is_no_number_is_unknown() -> None:
    epochs = Epochs([points_of([(1, 0, 0, 0.0, math.nan), (1, 0, 5, 0.0, math.inf), (1, 0, 9, 0.0, 2.9)])])
    found, is_known = epochs.at(points_of([(1, 0, step, 0.0, 0.0) for step in (0, 7, 9)]))
    assert (is_known.tolist(), found[-1]) == ([False, False, True], 2)
    assert Epochs().at(points_of([(1, 0, 3, 0.0, 0.0)]))[1].tolist() == [False]


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES | st.just(math.inf), max_size=40), st.integers(1, 12))
def test_windows_leave_out_no_point(values: list[float], most: int) -> None:
    points = points_of([(1, 0, step, 0.0, value) for step, value in enumerate(values)])
    curve = windows(points, most)
    assert len(curve) <= most
    assert (curve.counts.sum(), curve.is_exact) == (len(values), len(values) <= most)
    for place, (start, count) in enumerate(zip(curve.steps.tolist(), curve.counts.tolist(), strict=True)):
        part = values[start : start + count]
        seen = [value for value in part if not math.isnan(value)]
        finite = [value for value in seen if math.isfinite(value)]
        wanted = [part[0], part[-1], min(seen, default=math.nan), max(seen, default=math.nan)]
        found = [curve.first[place], curve.last[place], curve.minimum[place], curve.maximum[place]]
        np.testing.assert_array_equal(found, wanted)
        assert curve.nans[place] == len(part) - len(seen)
        mean = sum(finite) / len(finite) if finite else math.nan
        assert curve.mean[place] == pytest.approx(mean, nan_ok=True, abs=1e-6)
