"""What the node agent's loop does with many spools: fair, bounded, and idle ones cost nothing."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.clock import ManualClock
from orchestrator.records import LOST, Ack, Batch, Fact, FactKind, Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import SEGMENT_POINTS, SpoolReader, spools


class Tracker:
    """Takes what continues what it has; commits as far as it is told."""

    def __init__(self) -> None:
        self.accepted: dict[tuple[str, Stream], int] = {}
        self.pushed: list[list[Batch]] = []
        self.asked: list[list[str]] = []
        self.stopping: set[str] = set()
        self.watched: set[str] = set()
        self.commits = True
        self.refused: set[str] = set()

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        batches = [Batch.decode(frame) for frame in frames]
        self.pushed.append(batches)
        for batch in batches:
            key = (batch.producer, batch.stream)
            if batch.first == self.accepted.get(key, 0) + 1 and batch.producer not in self.refused:
                self.accepted[key] = batch.last
        return [self.ack(batch.producer, batch.stream, batch.run) for batch in batches]

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        self.asked.append([producer for producer, _, _ in producers])
        return [self.ack(producer, stream, run) for producer, run, _ in producers for stream in Stream]

    def ack(self, producer: str, stream: Stream, run: str) -> Ack:
        accepted = self.accepted.get((producer, stream), 0)
        committed = accepted if self.commits else 0
        return Ack(
            producer=producer, stream=stream, accepted=accepted, committed=committed, stop=run in self.stopping,
            watched=run in self.watched,
        )  # fmt: skip

    def points(self, producer: str) -> int:
        return self.accepted.get((producer, Stream.points), 0)


class Node:
    """A spool directory, its shipper and a tracker."""

    def __init__(self, root: Path) -> None:
        self.root, self.tracker, self.clock = root, Tracker(), ManualClock()
        self.shipper = Shipper(root, self.tracker, self.clock)

    def logger(self, run: str = "r1", rank: int = 0, **settings: int) -> Logger:
        return Logger(self.root, run=run, attempt=1, rank=rank, **settings)

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.clock.advance(1.0)
            self.shipper.step()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def fill(logger: Logger, points: int) -> None:
    for step in range(points):
        logger.log({"x": 1.0}, step=step)


def test_a_producer_with_much_does_not_hold_up_one_with_little(node: Node) -> None:
    node.shipper.ROUND_BYTES = 32 * 6000
    heavy, light = node.logger(rank=0), node.logger(rank=1)
    fill(heavy, 40_000)
    node.shipper.step()
    for step in range(5):
        light.log({"x": 1.0}, step=step)
        node.shipper.step()
        assert node.tracker.points(light._spool.producer) == step + 1
        size = sum(len(batch.payload) for batch in node.tracker.pushed[-1])
        assert size <= node.shipper.ROUND_BYTES + 32 * SEGMENT_POINTS, "a round is bounded"
    assert 0 < node.tracker.points(heavy._spool.producer) < 40_000


def test_idle_spools_are_not_looked_at_and_one_that_logs_is_at_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    loggers = [node.logger(run=f"r{number}") for number in range(60)]
    for logger in loggers:
        logger.log({"x": 1.0}, step=0)
    node.rounds(3)
    looked: list[str] = []
    real = SpoolReader.logged

    def logged(reader: SpoolReader, stream: Stream) -> int:
        looked.append(reader.producer)
        return real(reader, stream)

    monkeypatch.setattr(SpoolReader, "logged", logged)
    node.shipper.step()  # the clock stands still: no visits are due
    assert looked == []
    loggers[17].log({"x": 1.0}, step=1)
    node.shipper.step()
    assert set(looked) == {loggers[17]._spool.producer}
    assert node.tracker.points(loggers[17]._spool.producer) == 2


def test_a_bell_that_is_lost_delays_and_loses_nothing(node: Node) -> None:
    logger = node.logger()
    node.rounds(2)
    logger.log({"x": 1.0}, step=0)
    logger._spool.bell_words[0] = 0
    node.rounds(2)
    assert node.tracker.points(logger._spool.producer) == 1


def test_only_who_waits_is_asked_about_and_one_of_each_attempt(node: Node) -> None:
    ranks = [node.logger(rank=rank) for rank in range(8)]
    node.rounds(2)
    assert len(node.tracker.asked[-1]) == 1
    node.tracker.commits = False
    for logger in ranks:
        logger.log({"x": 1.0})
    node.rounds(2)
    assert len(node.tracker.asked[-1]) == 8


def test_the_word_to_stop_reaches_every_idle_producer_of_the_run(node: Node) -> None:
    ranks = [node.logger(run="r1", rank=rank) for rank in range(4)]
    other = node.logger(run="r2")
    node.rounds(1)
    node.tracker.stopping = {"r1"}
    node.rounds(2)
    assert all(logger.stop_requested() for logger in ranks)
    assert not other.stop_requested()


def test_what_the_tracker_does_not_take_is_offered_less_and_less_often(node: Node) -> None:
    stray, good = node.logger(run="unknown", rank=1), node.logger()
    stray.log({"x": 1.0})
    node.tracker.refused = {stray._spool.producer}
    for step in range(100):
        good.log({"x": 1.0}, step=step)
        node.clock.advance(0.05)
        node.shipper.step()
    offered = sum(batch.producer == stray._spool.producer for batches in node.tracker.pushed for batch in batches)
    assert 2 <= offered < 20
    assert node.tracker.points(good._spool.producer) == 100
    node.tracker.refused = set()
    node.rounds(3)
    assert node.tracker.points(stray._spool.producer) == 1


@contextmanager
def shipping(root: Path, tracker: Tracker) -> Iterator[Shipper]:
    shipper = Shipper(root, tracker)
    thread = threading.Thread(target=shipper.run, daemon=True)
    thread.start()
    try:
        yield shipper
    finally:
        shipper.stop()
        thread.join(timeout=10)


def test_what_trickles_in_comes_together_and_who_waits_is_served_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shipper, "PAUSE", 3600.0)
    tracker = Tracker()
    logger = Logger(tmp_path, run="r1", attempt=1, rank=0)
    with shipping(tmp_path, tracker) as shipper:
        logger.log({"a": 0.0})
        assert logger.flush(30)
        time.sleep(4 * shipper.TICK)  # the last word of the flush may be heard only now
        for step in range(200):  # less than the first segment: a full one is in a hurry
            logger.log({"a": float(step)})
        before = len(tracker.pushed)
        time.sleep(4 * shipper.TICK)
        assert len(tracker.pushed) == before  # nobody waits
        assert logger.flush(30)
        logger.fact(Fact(kind=FactKind.note, at=0.0, data={"text": "b"}))
        assert logger.flush(30)
    assert sum(batch.count for pushed in tracker.pushed for batch in pushed if batch.stream is Stream.points) == 201
    logger.close()


def test_what_was_logged_before_a_fact_is_shipped_with_it_at_the_latest(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a run is another producer's word than its points: whoever reads the end finds the points."""
    driver, rank = node.logger(rank=-1), node.logger(rank=0)
    driver.fact(Fact(kind=FactKind.note, at=0.0, data={"text": "begins"}))
    rank.log({"a": 1.0})
    node.rounds(2)
    points = node.tracker.points(rank._spool.producer)
    inner, told = SpoolReader.next_batch, []

    def late(reader: SpoolReader, stream: Stream, after: int, limit: int) -> Batch | None:
        if not told:  # at the last moment before the round reads the driver's word
            told.append(stream)
            rank.log({"a": 2.0})
            driver.fact(Fact(kind=FactKind.note, at=0.0, data={"text": "is over"}))
        return inner(reader, stream, after, limit)

    driver.fact(Fact(kind=FactKind.note, at=0.0, data={"text": "goes on"}))
    monkeypatch.setattr(SpoolReader, "next_batch", late)
    node.rounds(1)
    assert told
    shipped = {(batch.producer, batch.stream): batch.count for batch in node.tracker.pushed[-1]}
    assert shipped[driver._spool.producer, Stream.facts] == 2
    assert shipped[rank._spool.producer, Stream.points] == 1
    assert node.tracker.points(rank._spool.producer) == points + 1
    driver.close()
    rank.close()


def test_rounds_come_quicker_while_somebody_watches(node: Node) -> None:
    logger = node.logger()
    logger.log({"a": 1.0})
    node.rounds(1)
    assert node.shipper._pause() == Shipper.PAUSE
    node.tracker.watched = {"r1"}
    logger.log({"a": 1.0})
    node.rounds(1)
    assert node.shipper._pause() == Shipper.PAUSE_WATCHED
    node.tracker.watched = set()
    node.clock.advance(Shipper.WATCHED + 1)
    assert node.shipper._pause() == Shipper.PAUSE
    logger.close()


def test_what_was_not_taken_does_not_wait_for_the_next_slow_round(node: Node) -> None:
    logger = node.logger()
    logger.log({"a": 1.0})
    node.tracker.refused = {logger._spool.producer}
    node.rounds(1)
    assert node.shipper._pause() == Shipper.TICK
    node.tracker.refused = set()
    node.rounds(1)
    assert node.shipper._pause() == Shipper.PAUSE
    logger.close()


def test_a_spool_goes_when_its_producer_is_gone_and_everything_is_committed(node: Node) -> None:
    logger = node.logger()
    fill(logger, 300)
    logger.fact(Fact(kind=FactKind.note, at=0.0, data={"text": "x"}))
    node.tracker.commits = False
    logger.close()
    node.rounds(5)
    assert len(list(spools(node.root))) == 1, "accepted is not committed"
    node.tracker.commits = True
    node.rounds(3)
    assert list(spools(node.root)) == []
    assert not list(node.root.glob(".*.gone"))
    assert node.shipper.backlog() == {"producers": 0, "not_accepted": 0, "not_committed": 0}


def test_what_was_left_half_removed_goes_when_the_next_agent_begins(tmp_path: Path) -> None:
    (tmp_path / f".{'ab' * 16}.gone").mkdir(parents=True)
    (tmp_path / f".{'ab' * 16}.gone" / "keys").write_bytes(b"x")
    (tmp_path / f".{'cd' * 16}").mkdir()
    Node(tmp_path).rounds(1)
    assert not (tmp_path / f".{'ab' * 16}.gone").exists()
    assert (tmp_path / f".{'cd' * 16}").exists(), "somebody may be making it"


def test_a_damaged_spool_is_shipped_with_its_losses_and_the_others_go_on(node: Node) -> None:
    damaged, whole = node.logger(rank=0), node.logger(rank=1)
    fill(damaged, 200)
    fill(whole, 200)
    with (damaged._spool.directory / "points-000000").open("r+b") as file:
        file.seek(40)
        file.write(b"\xff\xff")
    node.rounds(2)
    flags = [
        flag
        for batches in node.tracker.pushed
        for batch in batches
        if batch.producer == damaged._spool.producer
        for flag in batch.points()["flags"].tolist()
    ]
    assert flags == [LOST] * 127 + [0] * 73
    assert node.tracker.points(whole._spool.producer) == 200


def test_a_spool_more_than_half_full_releases_what_is_accepted(node: Node) -> None:
    node.tracker.commits = False
    small, large = node.logger(rank=0, max_bytes=1 << 20), node.logger(rank=1)
    fill(small, 30_000)
    fill(large, 30_000)
    node.rounds(6)
    assert not (small._spool.directory / "points-000000").exists()
    assert (large._spool.directory / "points-000000").exists(), "kept until it is committed"
    node.shipper._budget_bytes = 1 << 20
    node.rounds(2)
    assert not (large._spool.directory / "points-000000").exists(), "the node holds more than half of its budget"
    fill(large, 20_000)
    node.rounds(6)
    assert node.tracker.points(large._spool.producer) == 50_000


def test_an_error_in_reading_is_no_damage(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = node.logger()
    fill(logger, 10)

    def too_many(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(SpoolReader, "_read", too_many)
        node.rounds(2)
    assert node.tracker.points(logger._spool.producer) == 0
    node.rounds(2)
    assert node.tracker.points(logger._spool.producer) == 10
    assert not any(batch.points()["flags"].any() for batches in node.tracker.pushed for batch in batches)


def test_a_spool_of_another_version_is_told_once_and_left_as_it_is(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    old = node.root / ("ab" * 16)
    old.mkdir()
    for name, content in (("meta.json", b"{}"), ("control", b"ORCSPOOL\x01"), ("keys", bytes(64)), ("owner", b"")):
        (old / name).write_bytes(content)
    logger = node.logger()
    logger.log({"x": 1.0})
    node.rounds(20)
    assert node.tracker.points(logger._spool.producer) == 1
    assert sorted(path.name for path in old.iterdir()) == ["control", "keys", "meta.json", "owner"]
    told = [record.getMessage() for record in caplog.records if str(old) in record.getMessage()]
    assert len(told) == 1
    assert "version is 1" in told[0]


def test_a_spool_that_cannot_be_opened_now_is_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = node.logger()
    logger.log({"x": 1.0})

    def too_many(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(SpoolReader, "_whole", too_many)
        node.rounds(8)
    assert node.tracker.pushed == []
    node.rounds(8)
    assert node.tracker.points(logger._spool.producer) == 1


def test_a_directory_that_was_removed_and_made_again_is_shipped(node: Node) -> None:
    node.logger().log({"x": 1.0})
    node.rounds(2)
    shutil.rmtree(node.root)
    node.rounds(3)
    assert not node.root.exists()
    logger = node.logger(run="r2")
    node.rounds(3)
    logger.log({"x": 1.0})
    node.shipper.step()  # the clock stands still: no visits are due
    assert node.tracker.points(logger._spool.producer) == 1


def test_a_tracker_that_does_not_answer_is_offered_less(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(node.logger(), 60_000)
    sizes: list[int] = []

    def silent(frames: Sequence[bytes]) -> list[Ack]:
        sizes.append(sum(map(len, frames)))
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(node.tracker, "push", silent)
        node.rounds(8)
    assert sizes[-1] < sizes[0] / 3
    node.rounds(5)
    assert sum(node.tracker.accepted.values()) == 60_000


def test_every_state_that_a_killed_agent_leaves_is_taken_up_by_the_next(tmp_path: Path) -> None:
    """The agent stops before each of its calls in turn; the one after it ships the rest and removes the spool."""

    class Killed(BaseException):
        pass

    def run(stop_at: int) -> tuple[int, bool]:
        root = tmp_path / str(stop_at)
        first, calls = Node(root), 0
        logger = first.logger()
        fill(logger, 700)
        logger.close()

        def watcher(call: str, path: str) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Killed

        disk.watch(watcher)
        was_killed = False
        try:
            first.rounds(6)
        except Killed:
            was_killed = True
        finally:
            disk.watch(None)
        first.shipper._turn.end()
        second = Node(root)
        second.tracker = first.tracker
        second.shipper._tracker = first.tracker
        second.rounds(6)
        assert list(spools(root)) == []
        assert not [path.name for path in root.iterdir() if path.name not in (".node", ".turn")]
        return first.tracker.points(logger._spool.producer), was_killed

    results = [run(number) for number in range(1, 12)]
    assert [points for points, _ in results] == [700] * len(results)
    assert [was_killed for _, was_killed in results].count(True) >= 6
