"""Points -> chunks and summaries, without a database."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.records import POINT, Batch, Stream
from orchestrator.store.binary import FLOAT8, INT4, array_header, unpacked
from orchestrator.store.chunks import LATEST_TIME_MS, Chunk, columns, merged, milliseconds

STEPS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
POINTS = st.lists(
    st.tuples(st.integers(0, 2), STEPS, st.floats(0, 2e9), st.floats(allow_nan=True, allow_infinity=True)),
    min_size=1,
    max_size=30,
)


def batch(points: list[tuple[int, int, float, float]], attempt: int = 1) -> Batch:
    payload = np.array([(key, 0, step, time, value) for key, step, time, value in points], POINT).tobytes()
    return Batch(
        producer="0" * 32, run="r", attempt=attempt, rank=0, stream=Stream.points, first=1, count=len(points),
        keys=("a", "b", "c"), payload=payload,
    )  # fmt: skip


def decoded(chunk: Chunk) -> list[tuple[int, int, int, bytes]]:
    steps = chunk.first_step + np.cumsum(unpacked(array_header(INT4, chunk.n) + chunk.steps), dtype=np.int64)
    times = chunk.first_time_ms + np.cumsum(unpacked(array_header(INT4, chunk.n) + chunk.times), dtype=np.int64)
    values = unpacked(array_header(FLOAT8, chunk.n) + chunk.values)
    return [
        (chunk.key, step, time, value.tobytes())
        for step, time, value in zip(steps.tolist(), times.tolist(), values, strict=True)
    ]


@given(POINTS)
def test_chunks_hold_exactly_the_points_of_each_key_in_order(points: list[tuple[int, int, float, float]]) -> None:
    given_points = [
        (key, step, int(milliseconds(np.array([time]))[0]), np.float64(value).tobytes())
        for key, step, time, value in points
    ]
    chunks = columns(batch(points)).chunks
    stored = [point for chunk in chunks for point in decoded(chunk)]
    assert stored == sorted(given_points, key=lambda point: point[0])
    for chunk in chunks:
        assert chunk.first_step == decoded(chunk)[0][1]
        assert chunk.last_step == decoded(chunk)[-1][1]


@given(st.lists(POINTS, min_size=1, max_size=4))
def test_merged_summaries_equal_a_plain_loop(batches: list[list[tuple[int, int, float, float]]]) -> None:
    found = merged(np.concatenate([columns(batch(points)).summaries for points in batches]))
    everything = [point for points in batches for point in points]
    assert found["key"].tolist() == sorted({point[0] for point in everything})
    for row in found:
        points = [point for point in everything if point[0] == row["key"]]
        values = [value for *_, value in points]
        finite = [value for value in values if math.isfinite(value)]
        numbers = [(step, value) for _, step, _, value in points if not math.isnan(value)]
        assert row["count"] == len(points)
        assert row["nan_count"] == len(points) - len(numbers)
        assert row["inf_count"] == len(numbers) - len(finite)
        assert (row["first_step"], row["last_step"]) == (points[0][1], points[-1][1])
        assert row["last_value"].tobytes() == np.float64(values[-1]).tobytes()
        if numbers:
            assert row["min_value"] == min(value for _, value in numbers)
            assert row["min_step"] == next(step for step, value in numbers if value == row["min_value"])
            assert row["max_value"] == max(value for _, value in numbers)
            assert row["max_step"] == next(step for step, value in numbers if value == row["max_value"])
        else:
            assert np.isnan(row["min_value"])
            assert np.isnan(row["max_value"])
        if all(abs(value) < 1e290 for value in finite):
            assert row["sum"] == pytest.approx(math.fsum(finite), rel=1e-9, abs=1e-9 * sum(map(abs, finite)))


def test_the_last_point_is_that_of_the_highest_attempt() -> None:
    late = columns(batch([(0, 9, 0.0, 9.0)], attempt=1)).summaries
    newest = columns(batch([(0, 5, 0.0, 5.0)], attempt=2)).summaries
    (row,) = merged(np.concatenate([newest, late]))
    assert (row["first_value"], row["last_value"], row["last_attempt"]) == (9.0, 5.0, 2)


def test_a_broken_clock_stays_within_what_postgresql_can_show() -> None:
    times = milliseconds(np.array([math.nan, -math.inf, math.inf, 1e300, -5.0, 1.5]))
    assert times.tolist() == [0, 0, LATEST_TIME_MS, LATEST_TIME_MS, 0, 1500]
