"""Each byte of a small log is flipped: the tracker starts, and all is stored once, from the log or the spools."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from orchestrator import disk
from orchestrator.clock import ManualClock
from orchestrator.records import POINT, Ack, Batch, Stream
from orchestrator.store import transaction
from orchestrator.store.errors import SequenceGap
from orchestrator.tracking import service, wal
from orchestrator.tracking.service import TrackerService

COUNT = 3
"""Batches of each producer."""
POINTS = 1
"""Of each batch."""


class Database:
    """Drops by watermark what it has, as the real one does (with the same function)."""

    def __init__(self) -> None:
        self.marks: dict[str, dict[Stream, int]] = {}
        self.values: dict[str, list[float]] = {}

    def watermarks(self, producers: Iterable[str]) -> dict[tuple[str, Stream], int]:
        return {(p, stream): mark for p in producers for stream, mark in self.marks.get(p, {}).items()}

    def commit(self, batches: Sequence[Batch]) -> dict[tuple[str, Stream], int]:
        gaps = []
        for producer, sent in transaction.by_producer(batches).items():
            marks = self.marks.setdefault(producer, dict.fromkeys(Stream, 0))
            try:
                new = transaction.missing(sent, marks)
            except transaction._OutOfOrder as error:
                gaps.append(error.gap)
                continue
            for batch in new:
                self.values.setdefault(producer, []).extend(batch.points()["value"].tolist())
                marks[batch.stream] = batch.last
        found = self.watermarks(transaction.by_producer(batches).keys() - {gap.producer for gap in gaps})
        if gaps:
            raise SequenceGap(tuple(gaps), found)
        return found

    def close(self) -> None:
        pass


class Producer:
    """A spool of a few points that is sent until all of it is committed. What is committed can be sent no more."""

    def __init__(self, name: str) -> None:
        self.name, self.accepted, self.committed = name, 0, 0
        self.points = np.zeros(POINTS * COUNT, POINT)
        self.points["value"] = np.arange(1, POINTS * COUNT + 1)

    def next(self) -> bytes | None:
        if self.accepted >= len(self.points):
            return None
        first = self.accepted + 1
        assert first > self.committed, "asked for what is gone"
        part = self.points[first - 1 : first - 1 + POINTS]
        batch = Batch(
            producer=self.name, run="r", attempt=1, rank=0, stream=Stream.points, first=first, count=len(part),
            keys=("x",), payload=part.tobytes(),
        )  # fmt: skip
        return batch.encode()

    def told(self, acks: Iterable[Ack]) -> None:
        for ack in acks:
            if ack.producer == self.name and ack.stream is Stream.points:
                assert ack.committed >= self.committed
                self.accepted, self.committed = ack.accepted, ack.committed


class World:
    def __init__(self, directory: Path) -> None:
        self.directory, self.clock = directory, ManualClock()
        self.producers = [Producer(f"{number:032x}") for number in (1, 2)]
        self.database = Database()

    def start(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(service, "open_store", lambda url: self.database)
        self.tracker = TrackerService(self.directory, "", clock=self.clock)

    def ship(self) -> None:
        for producer in self.producers:
            frame = producer.next()
            producer.told(self.tracker.push([frame]) if frame else [])
            producer.told(self.tracker.acknowledged([(producer.name, "r", 1)]))

    def settle(self) -> None:
        for _ in range(40):
            if all(producer.committed == len(producer.points) for producer in self.producers):
                break
            self.ship()
            self.tracker.commit_step()
        for producer in self.producers:
            assert self.database.values[producer.name] == producer.points["value"].tolist()
        self.tracker.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing here depends on the disk's cache; messages of hundreds of damages help nobody."""
    monkeypatch.setattr(disk, "fsync", lambda fd, path="": None)
    monkeypatch.setattr(wal, "PACE", 0.0)
    logging.disable(logging.CRITICAL)
    yield monkeypatch
    logging.disable(logging.NOTSET)


def filled(directory: Path, patch: pytest.MonkeyPatch) -> World:
    """All of it accepted, nothing committed."""
    world = World(directory)
    world.start(patch)
    for _ in range(COUNT):
        world.ship()
    assert all(producer.accepted == POINTS * COUNT for producer in world.producers)
    return world


def flip(directory: Path, index: int, content: bytes) -> None:
    damaged = bytearray(content)
    damaged[index] ^= 0xFF
    (directory / "00000001.log").write_bytes(damaged)


def test_every_byte_flipped_while_the_tracker_is_down(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    world = filled(tmp_path / "log", quick)
    world.tracker.stop()
    content = (tmp_path / "log" / "00000001.log").read_bytes()
    for index in range(len(content)):
        world.database = Database()
        for producer in world.producers:
            producer.accepted, producer.committed = POINTS * COUNT, 0
        flip(tmp_path / "log", index, content)
        world.start(quick)
        world.settle()


def test_bytes_flipped_under_the_running_tracker(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    for index in itertools.count(step=11):
        directory = tmp_path / str(index)
        world = filled(directory, quick)
        content = (directory / "00000001.log").read_bytes()
        if index >= len(content):
            break
        flip(directory, index, content)
        world.settle()
        if index >= 8:
            assert world.tracker.health()["log_damaged_bytes"] > 0
    assert index > 500


def test_a_directory_with_other_files_is_no_obstacle(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("notes.log").write_text("not a segment")
    tmp_path.joinpath("cursor.json").write_bytes(os.urandom(100))
    filled(tmp_path, quick).settle()
