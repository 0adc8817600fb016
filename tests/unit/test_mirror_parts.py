"""The pure parts of the mirror: the circuit breaker, the decimation, and names in MLflow's alphabet."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.tracking.breaker import BreakerState, CircuitBreaker
from orchestrator.tracking.decimation import Decimator, window_length

Chosen = list[tuple[int, int, str]]


def test_a_breaker_opens_after_failures_in_a_row_and_probes_with_growing_pauses() -> None:
    breaker = CircuitBreaker(threshold=2, first_pause=1.0, longest_pause=3.0)
    assert not breaker.failed(0.0)
    assert breaker.allows(0.0)
    assert breaker.failed(0.0)
    assert not breaker.allows(0.9)
    assert breaker.retry_in(0.75) == 0.25
    assert breaker.state(1.0) is BreakerState.half_open
    assert not breaker.failed(1.0)
    assert not breaker.allows(2.9)
    assert breaker.allows(3.0)
    assert not breaker.failed(3.0)
    assert breaker.allows(6.0)  # 3 s, not 4
    assert breaker.succeeded()
    assert breaker.state(6.0) is BreakerState.closed


def test_a_success_between_failures_keeps_a_breaker_closed() -> None:
    breaker = CircuitBreaker(threshold=2)
    for now in range(10):
        assert not breaker.failed(float(now))
        assert not breaker.succeeded()


def decimated(values: list[float], cuts: list[int], complete: int, through_json: bool = False) -> Chosen:
    decimator, chosen, start = Decimator(complete=complete), [], 0
    for stop in [*cuts, len(values)]:
        if through_json:
            decimator = Decimator.from_json(json.loads(json.dumps(decimator.to_json())), complete)
        steps = np.arange(start, stop, dtype=np.int64)
        chosen += _listed(decimator.add(steps, steps * 10, np.array(values[start:stop], np.float64)))
        start = stop
    return chosen + _listed(decimator.flush())


def _listed(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Chosen:
    return [(int(s), int(t), repr(float(v))) for s, t, v in zip(*parts, strict=True)]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), values=st.lists(st.floats(width=32), min_size=1, max_size=120))
def test_decimation_depends_on_the_points_and_not_on_how_they_were_cut(
    data: st.DataObject, values: list[float]
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=6)))
    whole = decimated(values, [], complete=20)
    assert decimated(values, cuts, complete=20) == whole
    assert decimated(values, cuts, complete=20, through_json=True) == whole
    assert [step for step, _, _ in whole] == sorted({step for step, _, _ in whole})


def test_each_window_keeps_minimum_maximum_last_and_the_first_nan() -> None:
    values = [0.0] * 5 + [3.0, 1.0, float("nan"), 9.0, float("nan"), 4.0, 5.0, 6.0, 7.0, 8.0]
    kept = [step for step, _, _ in decimated(values, [], complete=5)]
    assert kept == [0, 1, 2, 3, 4, 6, 7, 8, 14]


def test_ten_million_points_become_a_few_ten_thousand() -> None:
    index, points = 10_000, 10_000
    while index < 10_000_000:
        index, points = index + window_length(index), points + 3
    assert points < 35_000
