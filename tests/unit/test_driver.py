"""The attempts of a run as their driver leads them, when what is around it fails. A place in memory stands for Ray."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import Job, Settings
from orchestrator.errors import RunIsActive, ServiceUnavailable
from orchestrator.execution import driver
from orchestrator.execution.worker import DONE, Returned
from orchestrator.failures.classify import Evidence, RanksFailed
from orchestrator.provenance.record import Recorded
from orchestrator.records import Ack, Batch, FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.tracking.shipper import Shipper

KILLED = Evidence(rank=1, type="ActorDiedError", message="the worker process has died")
SECRET = "canary-1234"


class Place:
    """With a tracker. `ends` says how each attempt ends, `answers` what becomes of each request for one."""

    name, job = "here", ""

    def __init__(self, directory: Path) -> None:
        self.directory, self.tracker = directory, self
        self.ends: list[Callable[[], Returned]] = []
        self.answers: list[Exception | None] = []
        self.specs: list[RunSpec] = []
        self.fitted = self.attempts = 0
        self.is_cancelled = False

    def check(self, settings: Settings) -> None: ...
    def resources(self) -> Mapping[str, Any]:
        return {}

    def waits_for(self) -> str:
        return ""

    def close(self) -> None: ...
    def fit(self, plan: Any, settings: Settings) -> Returned:
        self.fitted += 1
        return self.ends.pop(0)()

    # -- the tracker

    def describe(self) -> dict[str, Any]:
        return {"spool_directory": str(self.directory / "spools")}

    def open_run(self, spec: RunSpec) -> RunTicket:
        self.specs.append(spec)
        if self.answers and (problem := self.answers.pop(0)) is not None:
            raise problem
        self.attempts += 1
        directory = str(self.directory / "run")
        return RunTicket(run="r1", name="n", experiment="e", attempt=self.attempts, directory=directory)

    def heartbeat(self, run: str, attempt: int) -> bool:
        return self.is_cancelled

    def cancel(self, run: str, user: str = "") -> None: ...
    def live(self, run: str) -> dict[str, Any]:
        return {}

    # -- the agent's tracker: what the driver told

    def acknowledged(self, producers: object) -> list[Ack]:
        return []

    def push(self, frames: list[bytes]) -> list[Ack]:
        self.told = [fact for frame in frames for fact in Batch.decode(frame).facts()]
        return []

    def statuses(self) -> list[Mapping[str, Any]]:
        Shipper(self.directory / "spools", self).step()
        return [fact.data for fact in self.told if fact.kind is FactKind.status]


def done() -> Returned:
    return Returned(how=DONE)


def killed() -> Returned:
    raise RanksFailed([KILLED])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    stack = Stack(home=str(tmp_path), storage_url=str(tmp_path))
    monkeypatch.setattr(Stack, "load", lambda home: stack)
    monkeypatch.setattr(driver, "record", lambda *_, **__: Recorded(values={}, files=(), warnings=()))
    monkeypatch.setattr(driver, "FLUSH", 0.0)
    monkeypatch.setattr(driver, "PAUSE", 0.0)
    monkeypatch.setattr(driver.time, "sleep", lambda _: None)
    return Place(tmp_path)


def trained(place: Place, *, restarts: int = 0, progress: Any = None) -> driver.Outcome:
    settings = Settings()
    settings.failures.max_restarts = restarts
    settings.tracking.heartbeat = 0.01
    job = Job(train="m:f", hash="h", settings=settings, user={}, resolved={}, sources=[], secrets=(SECRET,))
    return driver.train(job, progress=progress, open_place=lambda stack: place)


class Closed:
    """A display whose pipe is closed."""

    def started(self, ticket: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    phase = update = finished = started


def test_a_display_that_fails_ends_no_run(place: Place) -> None:
    place.ends = [done]
    assert trained(place, progress=Closed()).status is RunStatus.finished
    assert [told["status"] for told in place.statuses()] == ["FINISHED"]


def test_a_restart_waits_for_the_tracker_and_for_the_attempt_whose_answer_was_lost(place: Place) -> None:
    place.ends = [killed, done]
    place.answers = [
        None, ConnectionError("it starts again"), ServiceUnavailable("postgresql", "db", "it is away.", ""),
        TimeoutError("the answer is lost"), RunIsActive("r1", "RUNNING"),
    ]  # fmt: skip
    assert (trained(place, restarts=1).status, place.fitted) == (RunStatus.finished, 2)
    first, *others = place.specs
    assert first.new_run
    assert {(spec.run, spec.after_attempt) for spec in others} == {("r1", 1)}


def test_an_attempt_that_somebody_else_began_is_not_waited_for(place: Place) -> None:
    place.ends, place.answers = [killed], [None, RunIsActive("r1", "RUNNING")]
    with pytest.raises(RunIsActive):
        trained(place, restarts=1)


def test_a_tracker_that_is_not_there_at_the_beginning_is_said_at_once(place: Place) -> None:
    place.answers = [ConnectionError("gone")]
    with pytest.raises(ServiceUnavailable, match="gone"):
        trained(place, restarts=1)
    assert len(place.specs) == 1


def test_who_stops_a_run_that_is_just_ending_gets_no_restart(place: Place) -> None:
    class Impatient(driver.Silent):
        def phase(self, what: str) -> None:
            if what == "saving the record":
                os.kill(os.getpid(), signal.SIGINT)

    place.ends = [killed, done]
    assert trained(place, restarts=1, progress=Impatient()).status is RunStatus.crashed
    assert place.fitted == 1


def test_a_run_that_is_cancelled_before_its_restart_gets_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.time, "sleep", lambda _: setattr(place, "is_cancelled", True))
    place.ends = [killed, done]
    assert trained(place, restarts=1).status is RunStatus.crashed
    assert place.fitted == 1


def test_what_goes_wrong_in_the_driver_is_told_and_logged_without_secrets(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(f"no answer from s3://me:{SECRET}@bucket")

    monkeypatch.setattr(driver, "write_config", broken)
    outcome = trained(place)
    assert outcome.status is RunStatus.failed
    (told,) = place.statuses()
    assert "no answer from s3" in told["reason"]
    log = (place.directory / "run" / "logs" / "attempt-1" / "driver.log").read_text()
    assert "Traceback" in log
    assert SECRET not in f"{log} {told} {outcome}"


def test_a_driver_that_cannot_end_its_attempt_renews_no_lease(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(driver._Attempt, "_fact", broken)
    with pytest.raises(OSError, match="no space"):
        trained(place)
    for thread in threading.enumerate():
        if thread.name == "heartbeat":
            thread.join(timeout=10)
            assert not thread.is_alive()
