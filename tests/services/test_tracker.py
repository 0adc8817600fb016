"""From a spool through the tracker into PostgreSQL: exactly once, whatever stops in between."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.clock import ManualClock, SystemClock
from orchestrator.errors import RunIsActive, ServiceUnavailable
from orchestrator.records import Ack, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.tracking.admission import QUIET
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.service import COLLECT_POINTS, TIDY, TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import spools
from tests.plugins.producers import Producer

SPEC = RunSpec(experiment="digits", user="me", params={"lr": 0.1}, storage_url="/tmp/runs", workers=1)


class Exited(BaseException):
    """What a service's `exit` does in these tests."""


def _exit(code: int) -> None:
    raise Exited(code)


class World:
    """A tracker that can be stopped and started, an agent, and the store to look into."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url, self.clock = directory, url, ManualClock()
        self.store = Store(url)
        self.tracker = self._new_tracker()
        self.shipper = Shipper(directory / "spools", self, clock=self.clock)
        self.answers = True

    def _new_tracker(self) -> TrackerService:
        return TrackerService(self.directory / "wal", self.url, clock=self.clock, exit=_exit)

    def restart(self) -> None:
        self.tracker.stop()
        self.tracker = self._new_tracker()

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        if not self.answers:
            raise ConnectionError("down")
        return self.tracker.push(frames)

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        if not self.answers:
            raise ConnectionError("down")
        return self.tracker.acknowledged(producers)

    def settle(self) -> None:
        """Until everything is where it belongs."""
        for _ in range(50):
            self.clock.advance(1.0)
            moved = self.shipper.step()
            moved |= self.tracker.commit_step()
            if not moved and self.shipper.backlog()["not_committed"] == 0:
                return
        raise AssertionError(f"never settled: {self.shipper.backlog()}, {self.tracker.health()}")

    def logger(self, ticket: RunTicket, rank: int = 0) -> Logger:
        return Logger(self.directory / "spools", run=ticket.run, attempt=ticket.attempt, rank=rank)


@pytest.fixture
def world(tmp_path: Path, database_url: str) -> Iterator[World]:
    migrate.upgrade(database_url)
    world = World(tmp_path, database_url)
    yield world
    world.tracker.stop()
    world.store.close()


def test_what_was_logged_is_stored_and_the_spool_goes(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for step in range(100):
        logger.log({"loss": 1 / (step + 1), "lr": 0.1}, step=step)
    logger.fact(Fact(kind=FactKind.tag, at=0.0, data={"name": "team", "value": "a"}))
    world.settle()
    points = world.store.points(ticket.run, "loss")
    assert points.steps.tolist() == list(range(100))
    assert points.values.tolist() == [1 / (step + 1) for step in range(100)]
    assert world.store.tags(ticket.run)["team"] == "a"
    assert logger.flush(0.1)
    assert logger.wait_committed(0.1)
    assert len(list(spools(world.directory / "spools"))) == 1, "its producer still lives"
    logger.close()
    world.settle()
    world.shipper.step()
    assert list(spools(world.directory / "spools")) == []


def test_a_tracker_that_restarts_anywhere_loses_and_doubles_nothing(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for piece in range(12):
        for step in range(50):
            logger.log({"loss": float(piece * 50 + step)}, step=piece * 50 + step)
        if piece % 3 != 0:
            world.shipper.step()
        if piece % 3 == 1:
            world.restart()
        if piece % 4 == 2:
            world.tracker.commit_step()
        if piece == 8:
            os.unlink(world.directory / "wal" / "cursor.json")
            world.restart()
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [float(i) for i in range(600)]


def test_a_tracker_that_lost_its_log_asks_again(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    world.settle()
    logger.log({"loss": 2.0}, step=2)
    world.shipper.step()  # accepted, not committed
    world.tracker.stop()
    for path in (world.directory / "wal").iterdir():
        path.unlink()
    world.tracker = world._new_tracker()
    logger.log({"loss": 3.0}, step=3)
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [1.0, 2.0, 3.0]


def test_a_full_disk_acknowledges_nothing_until_there_is_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    fired = []

    def full(call: str, path: str) -> None:
        if call == "write" and path.endswith(".log"):
            fired.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_watcher", full)
        world.shipper.step()
    assert fired
    assert "No space" in world.tracker.health()["log"]
    assert not logger.flush(0.05)
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [1.0]


def test_a_failed_fsync_ends_the_tracker_and_nothing_was_acknowledged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)

    def broken(call: str, path: str) -> None:
        if call == "fsync" and path.endswith(".log"):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_watcher", broken)
        with pytest.raises(Exited):
            world.shipper.step()
    assert not logger.flush(0.05)
    world.restart()
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [1.0]


def test_an_attempt_without_a_sign_of_life_is_crashed_and_a_late_word_counts(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket, rank=-1)
    world.clock.advance(14)
    world.tracker.heartbeat(ticket.run, ticket.attempt)
    world.clock.advance(14)
    world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.running
    world.clock.advance(2)
    world.tracker.lease_step()
    crashed = world.store.run(ticket.run)
    assert crashed.status is RunStatus.crashed
    assert "no sign of life" in crashed.reason
    logger.fact(Fact(kind=FactKind.status, at=0.0, data={"status": "FINISHED", "reason": ""}))
    world.settle()
    assert world.store.run(ticket.run).status is RunStatus.finished


def test_a_tracker_that_stood_still_itself_ends_nobody_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = world.tracker.open_run(SPEC)
    monkeypatch.setattr(world.tracker._stopped, "wait", lambda _: world.clock.advance(100))
    world.tracker._pause(1.0)
    world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.running
    world.clock.advance(16)
    world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.crashed


def test_a_restarted_tracker_watches_the_attempts_it_finds(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    world.restart()
    world.tracker.lease_step()
    world.clock.advance(16)
    world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.crashed


def test_a_run_that_is_going_on_gets_no_second_attempt_and_an_ended_one_does(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    with pytest.raises(RunIsActive, match="RUNNING"):
        world.tracker.open_run(replace(SPEC, run=ticket.run))
    assert world.tracker.open_run(replace(SPEC, run=ticket.run, after_attempt=1)).attempt == 2
    world.store.transition(ticket.run, 2, RunStatus.failed, now=world.clock.now())
    again = world.tracker.open_run(replace(SPEC, run=ticket.run))
    assert (again.run, again.attempt, again.directory) == (ticket.run, 3, ticket.directory)


def test_the_same_command_goes_on_with_what_did_not_finish(world: World) -> None:
    spec = replace(SPEC, resume=True, config_hash="c1")
    first = world.tracker.open_run(spec)
    world.store.transition(first.run, 1, RunStatus.crashed, now=world.clock.now())
    assert world.tracker.open_run(replace(spec, config_hash="other")).run != first.run
    second = world.tracker.open_run(spec)
    assert (second.run, second.attempt) == (first.run, 2)
    with pytest.raises(RunIsActive):
        world.tracker.open_run(spec)
    world.store.transition(first.run, 2, RunStatus.finished, now=world.clock.now())
    assert world.tracker.open_run(spec).run != first.run


def test_a_request_to_stop_reaches_ranks_and_driver(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    world.shipper.step()
    assert not logger.stop_requested()
    world.store.request_cancel(ticket.run, user="somebody", now=world.clock.now())
    world.tracker.lease_step()
    world.clock.advance(1)
    world.shipper.step()
    assert logger.stop_requested()
    assert world.tracker.heartbeat(ticket.run, ticket.attempt)


def test_garbage_is_refused_and_the_rest_is_taken(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    assert world.tracker.push([b"", b"garbage" * 20]) == []
    assert world.tracker.health()["refused_batches"] == 2
    world.settle()
    assert len(world.store.points(ticket.run, "loss")) == 1


def test_an_agent_goes_on_where_the_one_before_it_stopped(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for step in range(10):
        logger.log({f"key{step}": 1.0}, step=step)
    world.shipper.step()
    for step in range(10, 20):
        logger.log({f"key{step}": 1.0, "key3": 2.0}, step=step)
    world.shipper = Shipper(world.directory / "spools", world, clock=world.clock)
    world.settle()
    assert world.store.points(ticket.run, "key3").steps.tolist() == [3, *range(10, 20)]
    assert {s.key for s in world.store.summaries(ticket.run)} == {f"key{i}" for i in range(20)}


def test_the_tracker_takes_batches_while_postgresql_is_away(world: World, postgres) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    world.settle()
    postgres.stop()
    try:
        for step in range(2, 50):
            logger.log({"loss": float(step)}, step=step)
        world.shipper.step()
        assert logger.flush(0.1), "accepted without a database"
        assert not world.tracker.commit_step()
        assert "postgresql" in world.tracker.health()["database"]
        assert world.tracker.lease_step() is False
    finally:
        postgres.start()
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [float(i) for i in range(1, 50)]


def test_a_damaged_log_is_mended_from_the_spools(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for step in range(6):
        logger.log({"loss": float(step)}, step=step)
        world.shipper.step()
    world.tracker.stop()
    path = world.directory / "wal" / "00000001.log"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    world.tracker = world._new_tracker()
    world.settle()
    assert world.tracker.health()["log_damaged_bytes"] > 0
    assert world.store.points(ticket.run, "loss").values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_batches_of_an_unknown_run_do_not_hold_up_the_others(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    stray = Logger(world.directory / "spools", run="never-created", attempt=1, rank=0)
    stray.log({"x": 1.0}, step=1)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    for _ in range(10):
        world.clock.advance(1.0)
        world.shipper.step()
        world.tracker.commit_step()
    assert len(world.store.points(ticket.run, "loss")) == 1
    assert Stream.points in Stream


def test_after_a_restart_both_streams_are_known_though_the_log_tells_of_one(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    world.shipper.step()
    world.restart()
    assert world.tracker.commit_step()
    logger.fact(Fact(kind=FactKind.tag, at=0.0, data={"name": "team", "value": "a"}))
    world.settle()
    assert world.store.tags(ticket.run)["team"] == "a"


def test_a_gap_in_one_stream_does_not_lose_the_other(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for step in range(3):
        logger.log({"loss": float(step)}, step=step)
        world.shipper.step()
    logger.fact(Fact(kind=FactKind.tag, at=0.0, data={"name": "team", "value": "a"}))
    world.shipper.step()
    path = world.directory / "wal" / "00000001.log"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"ORCF", 100) + 40] ^= 0xFF  # the second batch
    path.write_bytes(damaged)
    world.settle()
    assert world.tracker.health()["log_damaged_bytes"] > 0
    assert world.store.tags(ticket.run)["team"] == "a"
    assert world.store.points(ticket.run, "loss").values.tolist() == [0.0, 1.0, 2.0]


def test_a_database_that_hangs_holds_up_nobody_who_needs_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = world.tracker.open_run(SPEC)
    known = world.logger(ticket)
    known.log({"loss": 1.0}, step=1)
    world.settle()
    asked, answer = threading.Event(), threading.Event()
    real = world.tracker._store.watermarks

    def hangs(producers: Sequence[str]) -> object:
        asked.set()
        answer.wait(30)
        return real(producers)

    monkeypatch.setattr(world.tracker._store, "watermarks", hangs)
    fresh = Producer(ticket, rank=1)
    thread = threading.Thread(target=world.tracker.push, args=([fresh.points([(0, 1, 1.0)]).encode()],), daemon=True)
    thread.start()
    try:
        assert asked.wait(10)
        known.log({"loss": 2.0}, step=2)
        pushed = threading.Thread(target=world.shipper.step, daemon=True)
        pushed.start()
        pushed.join(10)
        assert known.flush(0.1), "accepted while the database says nothing"
    finally:
        answer.set()
        thread.join(10)


def test_an_agent_pauses_while_the_tracker_takes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)

    def down(producers: Sequence[str]) -> None:
        raise ServiceUnavailable("postgresql", "here", "it is away.", "")

    with monkeypatch.context() as patch:
        patch.setattr(world.tracker._store, "watermarks", down)
        assert not world.shipper.step(), "nothing was taken: no reason to come again at once"
    assert world.shipper.step()


def test_a_log_that_was_removed_under_its_cursor_commits_what_comes(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for step in range(20):
        logger.log({"loss": float(step)}, step=step)
        world.shipper.step()
    world.settle()
    world.tracker.stop()
    (world.directory / "wal" / "00000001.log").unlink()
    world.tracker = world._new_tracker()
    logger.log({"loss": 20.0}, step=20)
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [float(i) for i in range(21)]


def test_on_a_full_disk_committed_segments_go_though_the_cursor_cannot_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    world.tracker._log._segment_bytes = 100
    for step in range(3):
        logger.log({"loss": float(step)}, step=step)
        world.shipper.step()
    assert len(list((world.directory / "wal").glob("*.log"))) == 3
    fired = []

    def full(position: object) -> None:
        fired.append(position)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(world.tracker._log, "save_cursor", full)
    assert world.tracker.commit_step()
    assert fired
    assert len(list((world.directory / "wal").glob("*.log"))) == 1


def test_a_restarted_tracker_gives_an_attempt_the_silence_it_asked_for(world: World) -> None:
    ticket = world.tracker.open_run(replace(SPEC, lease=120.0))
    world.restart()
    world.tracker.lease_step()
    world.clock.advance(100)
    world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.running
    world.clock.advance(30)
    world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.crashed


def test_points_that_are_fewer_than_said_are_refused(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    batch = Producer(ticket).points([(0, 1, 1.0)])
    assert world.tracker.push([replace(batch, payload=b"").encode()]) == []
    assert world.tracker.health()["refused_batches"] == 1


def test_a_damaged_spool_does_not_hold_up_the_others(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    damaged, whole = world.logger(ticket, rank=0), world.logger(ticket, rank=1)
    for logger in (damaged, whole):
        logger.log({"loss": 1.0}, step=1)
    (damaged._spool.directory / "points-000000").unlink()
    for _ in range(3):
        world.clock.advance(1.0)
        world.shipper.step()
        world.tracker.commit_step()
    assert world.store.points(ticket.run, "loss").ranks.tolist() == [1]
    assert damaged._spool.directory.exists(), "it is left where it is"


def test_a_spool_that_somebody_removed_is_forgotten(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    world.settle()
    shutil.rmtree(logger._spool.directory)
    logger.close()
    world.shipper.step()
    assert world.shipper.backlog()["producers"] == 0


def test_what_still_lives_of_an_attempt_is_told_to_stop_when_the_next_one_took_its_place(world: World) -> None:
    """A driver that stood still longer than its lease, ranks on a node that nobody could reach."""
    first = world.tracker.open_run(SPEC)
    ranks = world.logger(first)
    world.clock.advance(SPEC.lease + 1)
    world.tracker.lease_step()
    assert not world.tracker.heartbeat(first.run, 1), "alone it may go on, its last word counts"
    second = world.tracker.open_run(replace(SPEC, run=first.run))
    their_ranks = world.logger(second)
    world.settle()
    assert ranks.stop_requested()
    assert world.tracker.heartbeat(first.run, 1)
    assert not their_ranks.stop_requested()
    assert not world.tracker.heartbeat(second.run, second.attempt)


def test_a_producer_that_was_quiet_is_forgotten_and_goes_on_where_it_was(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    sent = []
    real = world.tracker.push

    def push(frames: Sequence[bytes]) -> list[Ack]:
        sent.append(list(frames))
        return real(frames)

    world.tracker.push = push  # type: ignore[method-assign]
    for step in range(5):
        logger.log({"loss": float(step)}, step=step)
        world.settle()
    assert world.tracker.health()["producers"] == 1
    world.clock.advance(QUIET + TIDY)
    world.tracker.lease_step()
    assert world.tracker.health()["producers"] == 0
    for frames in sent[::-1]:
        real(frames)  # everything once more, in any order
    logger.log({"loss": 5.0}, step=5)
    world.settle()
    assert world.store.points(ticket.run, "loss").values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_batch_that_was_damaged_at_the_end_of_the_running_log_is_asked_for_again(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    logger.log({"loss": 1.0}, step=1)
    world.shipper.step()
    assert logger.flush(0.1)
    path = world.directory / "wal" / "00000001.log"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 0xFF
    path.write_bytes(damaged)
    world.settle()
    assert world.tracker.health()["log_damaged_bytes"] > 0
    assert world.store.points(ticket.run, "loss").values.tolist() == [1.0]


def test_many_runs_are_opened_and_kept_alive_in_one_call_each(world: World) -> None:
    tickets = world.tracker.open_runs([SPEC] * 3)
    attempts = [(ticket.run, ticket.attempt) for ticket in tickets]
    assert len(set(attempts)) == 3
    world.tracker.cancel(tickets[1].run)
    world.clock.advance(10)
    assert world.tracker.heartbeats(attempts[:2]) == [False, True]
    world.clock.advance(10)
    world.tracker.lease_step()
    found = [world.store.run(ticket.run).status for ticket in tickets]
    assert found == [RunStatus.running, RunStatus.running, RunStatus.crashed]
    with pytest.raises(RunIsActive):
        world.tracker.open_runs([SPEC, replace(SPEC, run=tickets[0].run)])
    assert len(world.store.runs(experiment="digits")) == 3, "all or none"


def test_a_stop_request_ends_with_its_attempt(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    world.store.request_cancel(ticket.run, user="somebody", now=world.clock.now())
    world.tracker.lease_step()
    assert world.tracker.heartbeat(ticket.run, 1)
    world.store.transition(ticket.run, 1, RunStatus.cancelled, now=world.clock.now())
    world.tracker.lease_step()
    again = world.tracker.open_run(replace(SPEC, run=ticket.run))
    assert not world.tracker.heartbeat(again.run, again.attempt)


def test_what_waits_to_be_committed_is_told(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    for step in range(30):
        logger.log({"loss": float(step)}, step=step)
    world.shipper.step()
    world.clock.advance(3.0)
    behind = world.tracker.health()
    assert (behind["lag_points"], behind["lag_seconds"]) == (30, 3.0)
    world.restart()
    assert world.tracker.health()["lag_points"] == 30
    world.settle()
    health = world.tracker.health()
    assert (health["lag_points"], health["lag_seconds"], health["lag_bytes"]) == (0, 0.0, 0)


def test_small_commits_are_collected_and_facts_are_not_kept_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.service.COLLECT", 3600.0)
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket)
    monkeypatch.setattr(world.tracker, "_clock", SystemClock())
    world.tracker.start()

    def log(points: int) -> None:
        for _ in range(points):
            logger.log({"loss": 1.0})
        world.shipper.step()

    def are_stored(points: int, seconds: float = 20.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(world.store.points(ticket.run, "loss").steps) == points:
                return True
            time.sleep(0.02)
        return False

    log(1)
    assert are_stored(1), "what comes after silence is committed at once"
    log(5)
    assert not are_stored(6, seconds=0.4)
    logger.fact(Fact(kind=FactKind.note, at=0.0, data={"text": "now"}))
    world.shipper.step()
    assert are_stored(6)
    log(5)
    assert not are_stored(11, seconds=0.4)
    log(COLLECT_POINTS)
    assert are_stored(11 + COLLECT_POINTS)
    logger.close()


def test_a_database_that_hung_ends_nobody_for_whom_no_tracker_could_vouch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = world.tracker.open_run(SPEC)
    world.tracker.lease_step()
    other = TrackerService(world.directory / "other", world.url, clock=world.clock)
    other.lease_step()
    real = other._store.cancel_requested

    def hangs() -> set[str]:
        world.clock.advance(60)
        return real()

    with monkeypatch.context() as patch:
        patch.setattr(other._store, "cancel_requested", hangs)
        other.lease_step()
    world.clock.advance(1)
    other.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.running
    world.clock.advance(16)
    other.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.crashed, "now its tracker had the time to vouch"
    other.stop()


def test_an_end_that_stands_in_the_log_counts_before_it_is_committed(world: World) -> None:
    ticket = world.tracker.open_run(SPEC)
    logger = world.logger(ticket, rank=-1)
    logger.fact(Fact(kind=FactKind.status, at=0.0, data={"status": "FINISHED", "reason": ""}))
    world.clock.advance(1)
    world.shipper.step()
    world.restart()
    for _ in range(4):
        world.clock.advance(12)
        world.tracker.lease_step()
    assert world.store.run(ticket.run).status is RunStatus.running
    world.settle()
    assert world.store.run(ticket.run).status is RunStatus.finished


def test_what_the_database_can_never_take_holds_up_nobody_else(world: World, caplog: pytest.LogCaptureFixture) -> None:
    ticket = world.tracker.open_run(SPEC)
    poison = Producer(replace(ticket, attempt=(1 << 32) - 1)).points([(0, 1, 1.0)])
    good = Producer(ticket)
    world.tracker.push([poison.encode()])
    with pytest.raises(Exception, match="out of range"):
        world.tracker.commit_step()  # alone it may be the database: it is tried again
    world.tracker.push([good.points([(0, 1, 1.0), (0, 2, 2.0)]).encode()])
    assert world.tracker.commit_step()
    assert world.store.points(ticket.run, "train/loss").steps.tolist() == [1, 2]
    assert f"producer {poison.producer} logged cannot be committed" in caplog.text
    found = {ack.stream: ack for ack in world.tracker.acknowledged([(poison.producer, ticket.run, 1)])}
    assert (found[Stream.points].accepted, found[Stream.points].committed) == (1, 0), "its spool stays"
