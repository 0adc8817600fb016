"""Points -> rows and summaries and back, and what merging makes of rows, without a database."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.records import LOST, POINT, Batch, Stream
from orchestrator.store import chunks
from orchestrator.store.binary import FLOAT8, INT4, array_header, unpacked
from orchestrator.store.chunks import LATEST_TIME_MS, OWNER, Row, Series, Stored, merged, milliseconds
from orchestrator.store.merge import SOURCE, regrouped, taken
from orchestrator.store.transaction import named

STEPS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
POINTS = st.lists(
    st.tuples(st.integers(0, 2), STEPS, st.floats(0, 2e9), st.floats(allow_nan=True, allow_infinity=True)),
    min_size=1,
    max_size=30,
)
Point = tuple[int, int, float, float]


def batch(points: list[Point], attempt: int = 1) -> Batch:
    payload = np.array([(key, 0, step, time, value) for key, step, time, value in points], POINT).tobytes()
    return Batch(
        producer="0" * 32, run="r", attempt=attempt, rank=0, stream=Stream.points, first=1, count=len(points),
        keys=("a", "b", "c"), payload=payload,
    )  # fmt: skip


KEY_IDS = np.arange(3)


def series(*batches: list[Point]) -> Series:
    found, lost = chunks.series_of([batch(points) for points in batches], [KEY_IDS] * len(batches))
    assert not lost
    return found


def stored(row: Row) -> Stored:
    """As it comes back from the database."""

    def ints(packed: bytes) -> np.ndarray:
        return unpacked(array_header(INT4, len(packed) // 8) + packed)

    found = Stored(
        first_step=row.first_step, first_time_ms=row.first_time_ms, is_wide=row.is_wide, key_ids=ints(row.key_ids),
        counts=ints(row.counts), steps=ints(row.steps), times=ints(row.times),
        values=unpacked(array_header(FLOAT8, row.n) + row.values),
    )  # fmt: skip
    assert chunks.is_intact(row.crc, 1, found.key_ids, found.counts, found.steps, found.times, found.values)
    return found


def points_of(found: Series) -> list[tuple[int, int, int, bytes]]:
    """Key, step, time in ms and value's bits, in order."""
    keys = np.repeat(found.keys, found.counts).tolist()
    values = [value.tobytes() for value in found.values]
    return list(zip(keys, found.steps.tolist(), found.times.tolist(), values, strict=True))


def expected(*batches: list[Point]) -> list[tuple[int, int, int, bytes]]:
    """The same of points as they were logged, by batch and key."""
    return [
        (key, step, int(milliseconds(np.array([time]))[0]), np.float64(value).tobytes())
        for points in batches
        for key, step, time, value in sorted(points, key=lambda point: point[0])
    ]


@given(st.lists(POINTS, min_size=1, max_size=3))
@settings(max_examples=40)
def test_rows_hold_exactly_the_points_of_each_key_in_order(batches: list[list[Point]]) -> None:
    rows = list(chunks.rows(series(*batches)))
    assert points_of(chunks.unpacked([stored(row) for row in rows])) == expected(*batches)
    assert [row.owner for row in rows] == sorted(row.owner for row in rows)
    for row in rows:
        found = chunks.unpacked([stored(row)])
        assert (row.min_step, row.max_step) == (found.steps.min(), found.steps.max())
        assert found.keys.tolist() == sorted(set(found.keys.tolist()))
        assert row.key_id == (found.keys[0] if len(found.keys) == 1 else 0)


def test_a_batch_is_one_row_and_equal_steps_stand_there_once() -> None:
    wide = [(key, step, 1.0 * step, key + step / 10) for step in range(5) for key in range(3)]
    (row,) = chunks.rows(series(wide))
    assert (row.is_wide, row.n, len(stored(row).steps), len(stored(row).values)) == (True, 15, 5, 15)
    (row,) = chunks.rows(series([*wide[:-1], (2, 4, 4.5, 0.0)]))
    assert (row.is_wide, len(stored(row).steps)) == (False, 15)


def test_a_flipped_bit_in_any_array_is_noticed() -> None:
    (row,) = chunks.rows(series([(0, 1, 0.0, 1.0), (1, 1, 0.0, 2.0)]))
    found = stored(row)
    arrays = [found.key_ids, found.counts, found.steps, found.times, found.values]
    assert chunks.is_intact(row.crc, 1, *arrays)
    for place in range(len(arrays)):
        flipped = [array.copy() for array in arrays]
        flipped[place].view(np.uint8)[3] ^= 1
        assert not chunks.is_intact(row.crc, 1, *flipped)


def test_what_was_lost_is_counted_and_left_out() -> None:
    whole = batch([(0, step, 0.0, 1.0) for step in range(6)])
    points = whole.points().copy()
    points[[1, 2, 5]] = (9, LOST, 0, 0.0, 0.0)
    damaged = Batch(
        producer=whole.producer, run="r", attempt=1, rank=0, stream=Stream.points, first=11, count=6, keys=whole.keys,
        payload=points.tobytes(),
    )  # fmt: skip
    assert named(damaged).keys == whole.keys
    found, (loss,) = chunks.series_of([damaged], [KEY_IDS])
    assert found.steps.tolist() == [0, 3, 4]
    assert (loss.first_seq, loss.last_seq, loss.count) == (12, 16, 3)


def summed(points: list[Point], attempt: int = 1) -> np.ndarray:
    one = np.ones(1, np.int64)
    return chunks.summaries(series(points), one, one * attempt, one)


@given(st.lists(POINTS, min_size=1, max_size=4))
@settings(max_examples=50)
def test_merged_summaries_equal_a_plain_loop(batches: list[list[Point]]) -> None:
    found = merged(np.concatenate([summed(points) for points in batches]))
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
    late, newest = summed([(0, 9, 0.0, 9.0)]), summed([(0, 5, 0.0, 5.0)], attempt=2)
    (row,) = merged(np.concatenate([newest, late]))
    assert (row["first_value"], row["last_value"], row["last_attempt"]) == (9.0, 5.0, 2)


def test_a_broken_clock_stays_within_what_postgresql_can_show() -> None:
    times = milliseconds(np.array([math.nan, -math.inf, math.inf, 1e300, -5.0, 1.5]))
    assert times.tolist() == [0, 0, LATEST_TIME_MS, LATEST_TIME_MS, 0, 1500]


# -- merging -----------------------------------------------------------------------------------------------------------


@given(st.lists(POINTS, min_size=1, max_size=6), st.booleans(), st.integers(1, 6))
@settings(max_examples=25)
def test_regrouped_rows_hold_the_same_points_in_the_same_order(
    batches: list[list[Point]], is_over: bool, size: int
) -> None:
    """Of two pools, cut anywhere: within a pool and key the order stays, and rows are in the order of their ids."""
    rows = list(chunks.rows(series(*batches)))
    sources = np.zeros(len(rows), OWNER)
    sources["id"] = sources["xid"] = np.arange(len(rows)) + 10
    sources["first_seq"], sources["last_seq"] = sources["id"], sources["id"]
    pools = np.array([int(place >= size) for place in range(len(rows))])
    pools -= pools[0]
    sources["producer_id"] = pools
    flags: Any = np.array([is_over, is_over]), np.array([False, False])
    new = regrouped(chunks.unpacked([stored(row) for row in rows]), sources, pools, *flags)
    assert set(new.owners["level"].tolist()) <= ({3} if is_over else {1, 3})
    again = list(chunks.rows(new.series))
    again.sort(key=lambda row: new.owners["id"][row.owner])
    before = [(pools[number], point) for number, row in enumerate(rows) for point in _of(row)]
    after = [(new.owners["producer_id"][row.owner], point) for row in again for point in _of(row)]
    for of in {(pool, point[0]) for pool, point in before}:
        assert [p for pool, p in after if (pool, p[0]) == of] == [p for pool, p in before if (pool, p[0]) == of]
    assert len(after) == len(before)
    keys = [
        (new.owners["producer_id"][row.owner], new.owners["id"][row.owner], key) for row in again for key in _keys(row)
    ]
    assert len(set(keys)) == len(keys), "two rows of one key at one place"


def _of(row: Row) -> list[tuple[int, int, int, bytes]]:
    return points_of(chunks.unpacked([stored(row)]))


def _keys(row: Row) -> list[int]:
    return stored(row).key_ids.tolist()


def pool(*rows: tuple[int, int, int]) -> np.ndarray:
    """(level, n, id)"""
    found = np.zeros(len(rows), SOURCE)
    for name, column in zip(("level", "n", "id"), zip(*rows, strict=True), strict=True):
        found[name] = column
    found["xid"] = found["id"]
    return found


def test_a_run_that_goes_on_is_merged_when_it_is_worth_it() -> None:
    few = pool(*[(0, 10, number) for number in range(5)])
    many = pool(*[(0, 10, number) for number in range(200)])
    beside_much = pool((1, 100_000, 0), *[(0, 10, number) for number in range(1, 201)])
    too_many = pool((1, 100_000, 0), *[(0, 10, number) for number in range(1, 1100)])
    assert [taken(each, None, False) for each in (few, many, beside_much, too_many)] == [0, 200, 0, 1100]
    assert [taken(each, None, True) for each in (few, many, beside_much)] == [5, 200, 201]
    assert taken(pool((1, 100, 0), (1, 100, 1)), None, True) == 0


def test_no_row_is_taken_that_a_reader_has_not_passed() -> None:
    rows = pool(*[(0, 10, number) for number in range(200)])
    assert taken(rows, (150, 150), True) == 151
    assert taken(rows, (0, 0), True) == 1
    assert taken(rows, (-1, 0), True) == 0
    rows["xid"][3], rows["id"][4:] = 500, rows["id"][4:] + 1000
    assert taken(rows, (500, 3), True) == 4, "its place would be behind the reader's"
