"""The tracker as a process of its own: shared, killed, restarted, left alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.progress import Progress
from cluster.stack_down import down
from orchestrator.backends import postgres as server_of
from orchestrator.clock import ManualClock
from orchestrator.errors import NotFound, RunIsActive
from orchestrator.execution.scribe import Open, Over, Points, Scribe
from orchestrator.records import Fact, FactKind, RunSpec, RunStatus
from orchestrator.stack import Stack
from orchestrator.tracking.local.client import LocalTracker, is_running, stop_local_tracker
from orchestrator.tracking.local.places import places
from orchestrator.tracking.local.stack_start import running_stack
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.service import TrackerService
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import wait_until

SPEC = RunSpec(experiment="local", user="me", params={"lr": 0.1})


def logger_of(tracker: LocalTracker, run: str, rank: int = 0) -> Logger:
    return Logger(Path(tracker.describe()["spool_directory"]), run=run, attempt=1, rank=rank)


def test_a_tracker_killed_in_mid_run_loses_and_doubles_nothing(local: LocalStack) -> None:
    tracker, other = local.tracker(), local.tracker()
    first = tracker.describe()["pid"]
    assert other.describe()["pid"] == first, "one process for all"
    ticket = tracker.open_run(SPEC)
    logger = logger_of(tracker, ticket.run)
    for step in range(3000):
        logger.log({"count": step}, step)
        if step == 1000:
            assert logger.flush(10)
            os.kill(first, signal.SIGKILL)
    assert not tracker.heartbeat(ticket.run, 1), "the next call starts another one"
    assert tracker.describe()["pid"] != first
    logger.fact(Fact(kind=FactKind.status, at=0.0, data={"status": "FINISHED", "reason": ""}))
    assert logger.wait_committed(20)
    logger.close()
    assert local.points(ticket.run, "count") == list(range(3000))
    assert local.store.run(ticket.run).status is RunStatus.finished


def test_errors_arrive_as_what_they_are(local: LocalStack) -> None:
    tracker = local.tracker()
    with pytest.raises(NotFound, match="no run 'nobody'"):
        tracker.open_run(RunSpec(experiment="local", run="nobody"))
    ticket = tracker.open_run(SPEC)
    with pytest.raises(RunIsActive):
        tracker.open_run(RunSpec(experiment="local", run=ticket.run))
    tracker.cancel(ticket.run, "me")
    assert tracker.heartbeat(ticket.run, 1), "it should stop"


PRODUCER = """
import sys
from pathlib import Path
from orchestrator.tracking.logger import Logger
logger = Logger(Path(sys.argv[1]), run=sys.argv[2], attempt=1, rank=0)
logger.log({"a": 1.0})
print("logging", flush=True)
sys.stdin.read()
"""


def test_a_living_process_keeps_its_run_alive_and_a_killed_one_leaves_it_crashed(local: LocalStack) -> None:
    tracker = local.tracker()
    ticket = tracker.open_run(RunSpec(experiment="local", lease=2.5))
    words = [sys.executable, "-c", PRODUCER, tracker.describe()["spool_directory"], ticket.run]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"logging\n"
    opened = time.monotonic()
    wait_until(lambda: time.monotonic() - opened > 5, 10, "two lengths of the lease")
    assert local.store.run(ticket.run).status is RunStatus.running, "nobody called heartbeat, the process lives"
    process.kill()
    process.wait()
    wait_until(lambda: local.store.run(ticket.run).status is RunStatus.crashed, 10, "CRASHED")
    assert local.points(ticket.run, "a") == [1.0]


def test_a_tracker_without_work_ends_and_the_next_call_starts_one(schema_url: str) -> None:
    local = LocalStack.make(schema_url)
    try:
        where = places(local.stack)
        words = [sys.executable, "-P", "-m", "orchestrator.tracking.local.process", "--home", str(local.home)]
        where.directory.mkdir(mode=0o700)
        process = subprocess.Popen([*words, "--idle", "0.5"], stderr=subprocess.DEVNULL)
        wait_until(where.socket.exists, 30, "the socket")
        assert process.wait(timeout=30) == 0
        assert not where.socket.exists()
        assert not is_running(where)
        assert not stop_local_tracker(local.home)
        local.tracker()
        assert is_running(where)
        assert (where.directory.stat().st_mode & 0o777, where.socket.stat().st_mode & 0o777) == (0o700, 0o600)
        assert stop_local_tracker(local.home)
    finally:
        local.remove()


def test_a_stack_is_started_where_none_was_with_the_database_that_is_given(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    home = tmp_path / "home"
    words = ["database.url=${oc.env:GIVEN_URL}", "mlflow.enabled=false"]
    stack = running_stack(home, words, said.append, {"GIVEN_URL": database_url})
    try:
        assert len(said) == 1
        assert str(home) in said[0]
        assert "down" in said[0]
        assert (stack.database_url, stack.ray_address, stack.mlflow_uri) == (database_url, "", "")
        assert running_stack(home, say=said.append) == stack
        assert len(said) == 1, "it runs already"
    finally:
        down(home, Progress(io.StringIO()))


def test_a_tracker_of_another_stack_is_replaced(local: LocalStack, postgres, template: str) -> None:
    before = local.tracker().describe()["pid"]
    moved = Stack(**{**vars(local.stack), "mlflow_uri": ""})
    assert LocalTracker(moved).describe()["pid"] == before
    server_of.ensure_database(postgres.url("postgres"), "moved", template=template)
    try:
        Stack(**{**vars(local.stack), "database_url": postgres.url("moved")}).save()
        assert local.tracker().describe()["pid"] != before
        stop_local_tracker(local.home)
    finally:
        moved.save()
        server_of.drop_database(postgres.url("postgres"), "moved")


def test_what_a_callback_tells_before_a_tracker_answers_is_not_lost(local: LocalStack) -> None:
    answers: list[Exception | LocalTracker] = [ConnectionError("not yet"), local.tracker()]

    def find() -> LocalTracker:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    scribe = Scribe(find)
    began = time.monotonic()
    scribe.tell(Open(key="sweep", spec=RunSpec(experiment="told")))
    scribe.tell(Open(key="trial", spec=RunSpec(experiment="told"), parent="sweep"))
    for step in range(100):
        scribe.tell(Points(key="trial", rank=0, step=step, values={"loss": float(step)}))
    scribe.tell(Points(key="nobody", rank=0, step=0, values={"loss": 0.0}))
    scribe.tell(Over(key="trial", status=RunStatus.failed, reason="it broke"))
    scribe.tell(Open(key="trial", spec=RunSpec(experiment="told"), parent="sweep"))
    assert time.monotonic() - began < 0.5, "telling waits for nobody"
    assert scribe.drain(20)
    sweep, trial = scribe.tickets["sweep"], scribe.tickets["trial"]
    assert local.store.run(trial.run).parents == {sweep.run: "parent"}
    (first,) = (run for run in local.store.runs(experiment="told") if run.run not in (sweep.run, trial.run))
    wait_until(lambda: local.store.run(first.run).status is RunStatus.failed, 10, "its end")
    assert local.points(first.run, "loss") == [float(step) for step in range(100)]
    for key in ("sweep", "trial"):
        scribe.tell(Over(key=key, status=RunStatus.finished))
    assert scribe.drain(10)


class Two:
    """Two trackers on one database, each with a log of its own, under one clock."""

    def __init__(self, directory: Path, url: str) -> None:
        self.clock = ManualClock()
        self.ours, self.theirs = (
            TrackerService(directory / name, url, clock=self.clock) for name in ("ours", "theirs")
        )

    def turn(self, seconds: float, *trackers: TrackerService) -> None:
        """Lets time go by, second by second, as the loops of these trackers see it."""
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            for tracker in trackers:
                tracker.lease_step()


def test_trackers_on_one_database_leave_each_others_runs_alone(local: LocalStack, tmp_path: Path) -> None:
    two = Two(tmp_path, local.stack.database_url)
    try:
        ticket = two.ours.open_run(SPEC)
        for _ in range(40):
            two.ours.heartbeat(ticket.run, 1)
            two.turn(2, two.ours, two.theirs)
        assert local.store.run(ticket.run).status is RunStatus.running
        two.turn(40, two.theirs)
        crashed = local.store.run(ticket.run)
        assert crashed.status is RunStatus.crashed, "its own tracker is gone, and nobody speaks for it"
    finally:
        two.ours.stop()
        two.theirs.stop()


def test_a_run_that_ended_at_another_tracker_is_forgotten(local: LocalStack, tmp_path: Path) -> None:
    two = Two(tmp_path, local.stack.database_url)
    try:
        ticket = two.ours.open_run(SPEC)
        two.turn(2, two.theirs)
        local.store.transition(ticket.run, 1, RunStatus.finished, now=two.clock.now())
        two.turn(40, two.theirs)
        assert local.store.run(ticket.run).status is RunStatus.finished
        assert two.theirs.health()["running"] == 0
    finally:
        two.ours.stop()
        two.theirs.stop()
