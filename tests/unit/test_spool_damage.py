"""A damaged spool: every point is exact or counted as lost, nothing is wrong in silence, nothing loops or holds up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.records import LOST, Fact, FactKind, Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SpoolReader, SpoolUnusable
from orchestrator.tracking.spool_layout import PAGE_BYTES, PAGE_POINTS
from tests.plugins.spool_contents import facts_of, left_spool, points_of, wanted


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return left_spool(tmp_path)


def test_a_damaged_page_costs_that_page_and_no_other(directory: Path) -> None:
    with (directory / "points-000000").open("r+b") as file:
        file.seek(PAGE_BYTES + 100)
        file.write(b"\xff")
    expected = [None if point[1] // PAGE_POINTS == 1 else point for point in wanted()]
    assert points_of(directory) == expected


def test_pages_that_never_reached_the_disk_are_lost_and_what_follows_is_not(directory: Path) -> None:
    with (directory / "points-000000").open("r+b") as file:
        file.write(bytes(PAGE_BYTES))
    assert points_of(directory) == [None] * PAGE_POINTS + wanted()[PAGE_POINTS:]


def test_a_segment_that_is_gone_is_lost_by_number(directory: Path) -> None:
    (directory / "points-000000").unlink()
    assert points_of(directory)[:254] == [None] * 254
    assert points_of(directory)[254:] == wanted()[254:]


def test_points_of_a_key_that_cannot_be_read_are_lost_alone(directory: Path) -> None:
    raw = (directory / "keys").read_bytes()
    (directory / "keys").write_bytes(raw.replace(b"accuracy", b"accurac!"))
    assert points_of(directory) == [None if point[0] == "accuracy" else point for point in wanted()]


def test_a_damaged_fact_is_an_event_in_its_place(directory: Path) -> None:
    raw = (directory / "facts").read_bytes()
    (directory / "facts").write_bytes(raw.replace(b'"t1"', b'"t9"'))
    assert facts_of(directory) == ["t0", None, "t2"]
    (directory / "facts").write_bytes(raw[:-1])
    assert facts_of(directory) == ["t0", "t1", None]
    (directory / "facts").unlink()
    assert facts_of(directory) == [None, None, None]


def test_a_record_that_was_stored_before_its_producer_was_killed_counts(tmp_path: Path) -> None:
    logger = Logger(tmp_path, run="r1", attempt=1, rank=0)
    for key, step, value in wanted():
        logger.log({key: value}, step=step)
    logger._spool.words[0] = PAGE_BYTES  # as after a power cut that took the position, but not the records
    assert points_of(logger._spool.directory) == wanted()


def test_a_position_that_is_wrong_while_the_producer_lives_loses_nothing(tmp_path: Path) -> None:
    logger = Logger(tmp_path, run="r1", attempt=1, rank=0)
    for key, step, value in wanted()[:100]:
        logger.log({key: value}, step=step)
    spool = logger._spool
    for wrong in (spool.words[0] + 5 * 32, 1 << 40, 17):
        spool.words[0] = wrong
        reader = SpoolReader(spool.directory)
        found = 0
        while (batch := reader.next_batch(Stream.points, found)) is not None:
            assert not batch.points()["flags"].any()
            found = batch.last
        assert found in (0, 100)
    for key, step, value in wanted()[100:]:
        logger.log({key: value}, step=step)
    assert points_of(spool.directory) == wanted()


def test_lost_points_are_said_once(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (directory / "points-000000").open("r+b") as file:
        file.write(b"\xff")
    reader = SpoolReader(directory)
    for _ in range(3):
        batch = reader.next_batch(Stream.points, 0)
        assert batch is not None
        assert np.count_nonzero(batch.points()["flags"] == LOST) == PAGE_POINTS
    assert len([record for record in caplog.records if "cannot be read any more" in record.message]) == 1


def test_who_the_producer_is_stands_in_two_places(directory: Path) -> None:
    for name in ("control", "keys"):
        path = directory / name
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b'"r1"', b'"s1"'))
        assert points_of(directory) == wanted()
        path.write_bytes(raw)
    for name in ("control", "keys"):
        (directory / name).write_bytes((directory / name).read_bytes().replace(b'"r1"', b'"s1"'))
    with pytest.raises(SpoolUnusable, match="damaged"):
        SpoolReader(directory)


def test_a_fact_may_hold_anything(tmp_path: Path) -> None:
    logger = Logger(tmp_path, run="r1", attempt=1, rank=0)
    text = json.dumps({"a": "\n\r\0 ä"})
    logger.fact(Fact(kind=FactKind.note, at=0.0, data={"text": text}))
    batch = SpoolReader(logger._spool.directory).next_batch(Stream.facts, 0)
    assert batch is not None
    assert batch.facts()[0].data["text"] == text


@pytest.mark.parametrize("word", [64, 72, 80, 88])
def test_a_damaged_watermark_removes_nothing_and_holds_back_nothing(directory: Path, word: int) -> None:
    with (directory / "control").open("r+b") as file:
        file.seek(word * 8 + 1)
        file.write(b"\xff")
    reader = SpoolReader(directory)
    assert not reader.is_done()
    assert [reader.accepted(stream) for stream in Stream] == [0, 0]
