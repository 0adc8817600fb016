"""What is logged is in the spool, exactly, whatever happens to the process that logged it."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import numpy as np
import pytest

from orchestrator import disk
from orchestrator.errors import BadMetric
from orchestrator.records import Fact, FactKind, Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SEGMENT_POINTS
from orchestrator.tracking.spool_layout import PAGE_POINTS
from tests.plugins.spool_contents import logged, readers


@pytest.fixture
def logger(tmp_path: Path) -> Logger:
    return Logger(tmp_path / "spools", run="r1", attempt=2, rank=3)


def test_points_come_back_as_logged(tmp_path: Path, logger: Logger) -> None:
    logger.log({"loss": 0.5, "accuracy": 1}, step=7)
    logger.log({"loss": 0.25})
    (reader,) = readers(tmp_path)
    assert logged(reader) == [("loss", 7, 0.5), ("accuracy", 7, 1.0), ("loss", 0, 0.25)]
    assert (reader.owner.run, reader.owner.attempt, reader.owner.rank) == ("r1", 2, 3)


def test_steps_count_when_none_is_given(tmp_path: Path, logger: Logger) -> None:
    for value in (0.1, 0.2, 0.3):
        logger.log({"loss": value})
    assert [step for _, step, _ in logged(readers(tmp_path)[0])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (float("nan"), float("nan")),
        (float("inf"), float("inf")),
        (float("-inf"), float("-inf")),
        (True, 1.0),
        (2**53, float(2**53)),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(-3), -3.0),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (np.float64("nan"), float("nan")),
    ],
)
def test_values_are_stored_exactly(tmp_path: Path, logger: Logger, value: object, stored: float) -> None:
    logger.log({"x": value})
    ((_, _, found),) = logged(readers(tmp_path)[0])
    assert found == stored or (math.isnan(found) and math.isnan(stored))


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"x": 2**53 + 1}, "'x'"),
        ({"x": 10**400}, "'x'"),
        ({"x": "0.5"}, "'x'"),
        ({"x": None}, "'x'"),
        ({"x": 1j}, "'x'"),
        ({"x": [1.0]}, "'x'"),
        ({"x": np.zeros(3)}, "shape (3,)"),
        ({"": 1.0}, "empty"),
        ({3: 1.0}, "'3'"),
        ({"a\0b": 1.0}, "NUL"),
        ({"\ud800": 1.0}, "Unicode"),
        ({"k" * 1_000_000: 1.0}, "1,000,000 bytes"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name_and_the_rest_is_kept(
    tmp_path: Path, logger: Logger, metrics: dict, named: str
) -> None:
    with pytest.raises(BadMetric, match=r".") as refusal:
        logger.log({**metrics, "good": 1.0}, step=1)
    assert named in str(refusal.value)
    assert logged(readers(tmp_path)[0]) == [("good", 1, 1.0)]


@pytest.mark.parametrize("step", [1.5, "3", None.__class__, 2**63])
def test_a_step_that_is_no_whole_number_is_refused(logger: Logger, step: object) -> None:
    with pytest.raises(BadMetric, match="step"):
        logger.log({"x": 1.0}, step=step)  # type: ignore[arg-type]


def test_committed_segments_are_removed_and_the_current_one_stays(tmp_path: Path, logger: Logger) -> None:
    for i in range(SEGMENT_POINTS * 2 + 5):
        logger.log({"x": 1.0}, step=i)
    (reader,) = readers(tmp_path)
    before = sorted(path.name for path in reader.directory.glob("points-*"))
    count = reader.logged(Stream.points)
    reader.acknowledge(Stream.points, accepted=count, committed=count)
    assert [path.name for path in reader.directory.glob("points-*")] == before[-1:]


def test_facts_come_back_in_order(tmp_path: Path, logger: Logger) -> None:
    for i in range(5):
        logger.fact(Fact(kind=FactKind.tag, at=float(i), data={"name": f"t{i}", "value": "ä\n"}))
    (reader,) = readers(tmp_path)
    first = reader.next_batch(Stream.facts, 0, limit=2)
    rest = reader.next_batch(Stream.facts, 2)
    assert first is not None
    assert rest is not None
    assert [f.data["name"] for f in (*first.facts(), *rest.facts())] == ["t0", "t1", "t2", "t3", "t4"]
    assert reader.next_batch(Stream.facts, 5) is None


def test_half_a_fact_on_a_full_disk_spoils_no_other(
    tmp_path: Path, logger: Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: str) -> Fact:
        return Fact(kind=FactKind.tag, at=0.0, data={"name": name, "value": "x"})

    real, calls = disk.write, []

    def full(fd: int, data: bytes, path: str = "") -> int:
        calls.append(data)
        if len(calls) == 1:
            return real(fd, data[:20], path)
        raise OSError(errno.ENOSPC, "No space left on device")

    logger.fact(said("first"))
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write", full)
        with pytest.raises(OSError, match="No space"):
            logger.fact(said("lost"))
    assert len(calls) == 2
    logger.fact(said("last"))
    batch = readers(tmp_path)[0].next_batch(Stream.facts, 0)
    assert batch is not None
    assert [fact.data["name"] for fact in batch.facts()] == ["first", "last"]


def test_what_stands_before_a_value_that_raises_is_logged(tmp_path: Path, logger: Logger) -> None:
    class Broken:
        def item(self) -> float:
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError):
        logger.log({"loss": 0.5, "broken": Broken()}, step=1)
    assert logged(readers(tmp_path)[0]) == [("loss", 1, 0.5)]


def test_a_page_that_was_only_begun_costs_the_one_before_nothing(tmp_path: Path, logger: Logger) -> None:
    for step in range(PAGE_POINTS):
        logger.log({"x": 1.0}, step=step)
    with pytest.raises(BadMetric):
        logger.log({"x": 1.0}, step=1 << 63)
    logger.close()
    assert logged(readers(tmp_path)[0]) == [("x", step, 1.0) for step in range(PAGE_POINTS)]


def test_a_fact_of_a_signal_handler_in_the_middle_of_another_fact(tmp_path: Path, logger: Logger) -> None:
    def said(name: str) -> Fact:
        return Fact(kind=FactKind.tag, at=0.0, data={"name": name, "value": "x"})

    def interrupt(call: str, path: str) -> None:
        disk.watch(None)
        logger.fact(said("second"))

    disk.watch(interrupt)
    try:
        logger.fact(said("first"))
    finally:
        disk.watch(None)
    logger.fact(said("third"))
    batch = readers(tmp_path)[0].next_batch(Stream.facts, 0)
    assert batch is not None
    assert [fact.data.get("name") for fact in batch.facts()] == ["first", "second", "third"]


def test_a_key_of_a_signal_handler_in_the_middle_of_another_key(tmp_path: Path, logger: Logger) -> None:
    (reader,) = readers(tmp_path)

    def interrupt(call: str, path: str) -> None:
        disk.watch(None)
        logger.log({"second": 2.0}, step=2)
        assert logged(reader) == [("second", 2, 2.0)]

    disk.watch(interrupt)
    try:
        logger.log({"first": 1.0}, step=1)
    finally:
        disk.watch(None)
    assert sorted(logged(reader)) == [("first", 1, 1.0), ("second", 2, 2.0)]
    assert not reader.next_batch(Stream.points, 0).points()["flags"].any()  # type: ignore[union-attr]
