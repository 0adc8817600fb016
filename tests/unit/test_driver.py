"""The attempts of a run as their driver leads them, when what is around it fails. A place in memory stands for Ray."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import disk
from orchestrator.config import Job, ResourcesConfig, Settings
from orchestrator.errors import ConfigError, RunIsActive, ServiceUnavailable
from orchestrator.execution import driver, moving
from orchestrator.execution.place import Notice
from orchestrator.execution.sizing import Room
from orchestrator.execution.worker import DONE, STOPPED, Plan, Returned
from orchestrator.failures.classify import Evidence, RanksFailed
from orchestrator.provenance.record import Recorded
from orchestrator.records import Ack, Batch, FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.tracking.shipper import Shipper
from tests.plugins.runs import wait_until

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
        self.is_cancelled = self.is_asked = False
        self.plans: list[Plan] = []
        self.metrics: dict[str, float] = {}
        self.free = 99
        """How many workers there is room for."""
        self.workers: list[int] = []
        """With how many each attempt was begun."""
        self.earlier: tuple[Mapping[str, Any], ...] = ()
        self.circuits: list[dict[str, Any]] = []
        self.told_to_leave: Notice | None = None
        self.halted: set[int] = set()
        self.lacking = ""
        """What the ranks wait for."""
        self.given_up = threading.Event()

    def check(self, settings: Settings) -> None: ...
    def resources(self) -> Mapping[str, Any]:
        return {}

    def waits_for(self) -> str:
        return self.lacking

    def end(self, ticket: RunTicket) -> None:
        self.given_up.set()

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        self.avoided = tuple(avoid)
        return Room(workers=min(self.free, wanted.workers), without=tuple(avoid))

    def notice(self) -> Notice | None:
        return self.told_to_leave

    def halt(self, run: str, attempt: int) -> None:
        self.halted.add(attempt)

    def moved(self) -> Returned:
        """The end of an attempt whose ranks do as they are asked."""
        wait_until(lambda: self.attempts in self.halted, 10, "the ranks are asked to save and return")
        self.told_to_leave = None
        return Returned(how=STOPPED)

    is_watched = False

    def network(self) -> str:
        return ""

    def close(self) -> None: ...
    def fit(self, plan: Plan, settings: Settings) -> Returned:
        self.fitted += 1
        self.plans.append(plan)
        self.workers.append(settings.resources.workers)
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
        return RunTicket(
            run="r1", name="n", experiment="e", attempt=self.attempts, directory=directory, earlier=self.earlier
        )  # fmt: skip

    def heartbeat(self, run: str, attempt: int) -> bool:
        return self.is_cancelled

    def cancel(self, run: str, user: str = "") -> None:
        self.is_asked = True

    def live(self, run: str) -> dict[str, Any]:
        metrics = {key: {"value": value} for key, value in self.metrics.items()}
        is_known = metrics or self.circuits
        return {"step": 0, "metrics": metrics, "rate": 0.0, "circuits": self.circuits} if is_known else {}

    # -- the agent's tracker: what the driver told

    def acknowledged(self, producers: object) -> list[Ack]:
        return []

    def push(self, frames: list[bytes]) -> list[Ack]:
        self.told = [fact for frame in frames for fact in Batch.decode(frame).facts()]
        return []

    def statuses(self) -> list[Mapping[str, Any]]:
        Shipper(self.directory / "spools", self).step()
        return [fact.data for fact in self.told if fact.kind is FactKind.status]

    def events(self, kind: str) -> list[Mapping[str, Any]]:
        Shipper(self.directory / "spools", self).step()
        return [fact.data for fact in self.told if fact.kind is FactKind.event and fact.data["kind"] == kind]

    def ended(self) -> list[Mapping[str, Any]]:
        """What the attempts that failed said of it."""
        return [told for told in self.statuses() if told["error"]]


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


def trained(
    place: Place, *, restarts: int = 0, limits: dict[str, int] | None = None, progress: Any = None, function: str = ""
) -> driver.Outcome:
    settings = Settings()
    settings.failures.max_restarts = restarts
    settings.failures.limits = limits or {}
    settings.failures.function = function
    settings.tracking.heartbeat = 0.01
    job = Job(train="m:f", hash="h", settings=settings, user={}, resolved={}, sources=[], secrets=(SECRET,))
    return driver.train(job, progress=progress, open_place=lambda stack: place)


def test_services_that_are_away_are_told_once_per_outage_whatever_becomes_of_the_attempts(place: Place) -> None:
    now = driver.time.time()
    away = {"name": "redis", "by": "tracker", "state": "open", "began": now - 9, "failures": 2, "error": "gone"}
    copies = {**away, "name": "directory"}

    def with_circuits(*states: Mapping[str, Any], end: Callable[[], Returned]) -> Callable[[], Returned]:
        def ending() -> Returned:
            place.circuits = [dict(state) for state in states]
            return end()

        return ending

    back = {**away, "state": "closed", "ended": now + 1}
    states = ((away, copies), killed), ((away,), lost), ((back,), done)
    place.ends = [with_circuits(*told, end=end) for told, end in states]
    assert trained(place, restarts=2).status is RunStatus.finished
    (degraded,), (recovered,) = place.events("degraded"), place.events("recovered")
    assert (degraded["level"], degraded["details"]) == ("warning", {"service": "redis", "error": "gone"})
    assert (recovered["level"], recovered["details"]["seconds"]) == ("info", 10.0)


def test_how_an_attempt_ended_waits_for_room_on_a_full_disk(place: Place) -> None:
    refused = 0

    def full(call: str, path: str) -> None:
        nonlocal refused
        if call == "write" and path.endswith("/facts") and refused < 3:
            refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    def fills() -> Returned:
        disk.watch(full)
        return Returned(how=DONE)

    place.ends = [fills]
    try:
        assert trained(place).status is RunStatus.finished
    finally:
        disk.watch(None)
    assert refused == 3
    assert [told["status"] for told in place.statuses()] == ["FINISHED"]


def test_a_disk_that_is_full_for_the_driver_is_a_failure_as_any_and_no_defect(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = 0

    def record(*_: Any, **__: Any) -> Recorded:
        nonlocal described
        described += 1
        if described == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return Recorded(values={}, files=(), warnings=())

    monkeypatch.setattr(driver, "record", record)
    place.ends = [done]
    assert (trained(place, restarts=1).status, place.attempts) == (RunStatus.finished, 2)
    (told,) = place.ended()
    assert (told["error"]["kind"], "orchestrator failed" in told["reason"]) == ("storage", False)


LOST = Evidence(rank=0, type="NodeDiedError", message="the node died", host="n1", step=3)


def lost() -> Returned:
    raise RanksFailed([LOST])


def raised() -> Returned:
    raise RanksFailed([Evidence(rank=0, type="KeyError", message="'x'", traceback="File", step=3)])


def test_a_lost_node_needs_no_restart_of_the_budget_and_is_told_as_an_event(place: Place) -> None:
    place.ends = [lost, done]
    assert (trained(place).status, place.fitted) == (RunStatus.finished, 2)
    (told,) = place.events("policy")
    assert (told["level"], told["step"]) == ("warning", 3)
    assert told["message"].startswith("restarted from the newest checkpoint after ")
    assert told["details"]["kind"] == "node_lost"
    assert told["details"]["budget"] == "failures.max_preemptions"
    assert told["message"] == place.ended()[0]["error"]["done"]


def test_what_a_restart_cannot_mend_ends_the_run_and_says_so(place: Place) -> None:
    place.ends = [raised, done]
    assert (trained(place, restarts=-1).status, place.fitted) == (RunStatus.failed, 1)
    assert [told["message"] for told in place.events("policy")] == ["not restarted: the same would only happen again"]


def test_the_same_end_at_the_same_step_ends_the_run(place: Place) -> None:
    def died() -> Returned:
        raise RanksFailed([Evidence(rank=1, type="ActorDiedError", message="the worker process has died", step=9)])

    place.ends = [died, lost, died, done]
    outcome = trained(place, restarts=-1)
    assert (outcome.status, place.fitted) == (RunStatus.crashed, 3)
    assert "at step 9 twice" in outcome.error["done"]


def test_out_of_memory_halves_the_micro_batch_as_long_as_there_is_something_to_halve(place: Place) -> None:
    def full() -> Returned:
        place.metrics = {"perf/micro_batch": 8.0 / place.plans[-1].splits}
        text = "CUDA out of memory. Tried to allocate 2.00 GiB."
        raise RanksFailed([Evidence(rank=1, type="OutOfMemoryError", message=text, traceback="File", step=0)])

    place.ends = [full, full, lost, done]
    assert (trained(place).status, [plan.splits for plan in place.plans]) == (RunStatus.finished, [1, 2, 4, 4])
    place.plans, place.ends = [], [full, full, full, full, done]
    outcome = trained(place)
    assert (outcome.status, [plan.splits for plan in place.plans]) == (RunStatus.failed, [1, 2, 4, 8])
    assert outcome.error["done"] == "not restarted: the same would only happen again"


def test_collectives_that_timed_out_get_more_time_once(place: Place) -> None:
    def slow() -> Returned:
        text = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"
        raise RanksFailed(
            [Evidence(rank=0, type="RuntimeError", message=text, traceback="File", step=len(place.plans))]
        )

    place.ends = [slow, lost, slow, done]
    assert trained(place, restarts=5).status is RunStatus.failed
    assert [plan.collective_timeout for plan in place.plans] == [1800, 5400, 5400]


def test_a_kind_that_there_is_not_is_refused_before_a_run_exists(place: Place) -> None:
    with pytest.raises(ConfigError, match="worker_killed"):
        trained(place, limits={"worker_kiled": 3})
    assert not place.specs


def test_a_signal_during_the_pause_calls_the_restart_off(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    place.ends = [killed, done]
    assert (trained(place, restarts=1).status, place.fitted) == (RunStatus.crashed, 1)


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


def elastic(place: Place, workers: int, least: int, **settings: Any) -> driver.Outcome:
    given = Settings(resources=ResourcesConfig(workers=workers, min_workers=least))
    given.elastic.look = given.elastic.every = 0.0
    given.tracking.heartbeat = 0.01
    for key, value in settings.items():
        setattr(given.failures, key, value)
    job = Job(train="m:f", hash="h", settings=given, user={}, resolved={}, sources=[])
    return driver.train(job, open_place=lambda stack: place)


def test_after_a_lost_node_an_elastic_run_goes_on_with_the_workers_that_there_is_room_for(place: Place) -> None:
    def lost_one() -> Returned:
        place.free = 3
        return lost()

    def lost_more() -> Returned:
        place.free = 1
        return lost()

    place.ends = [lost_one, lost_more, done]
    assert elastic(place, 4, 2).status is RunStatus.finished
    assert place.workers == [4, 3, 2], "with less room than for two it waits for two"
    assert [spec.workers for spec in place.specs] == [4, 3, 2], "the record knows with how many each attempt was"
    first, second = sorted(place.ended(), key=lambda told: told["error"]["done"].partition("(")[2])
    assert "with the workers that there is room for: 3" in first["error"]["done"]
    assert first["error"]["decision"]["changes"] == {"workers": 3}
    assert "room for" not in second["error"]["done"]
    assert sorted(told["details"]["workers"] for told in place.events("elastic")) == [2, 3]


def test_nodes_that_are_taken_away_are_left_after_saving_and_nobody_counts_that(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "PAUSE", 0.01)
    place.told_to_leave = Notice(why="n1 is taken away in 30 s", nodes=("n1",))
    place.ends = [place.moved, done]
    outcome = trained(place)
    assert (outcome.status, place.fitted, place.halted) == (RunStatus.finished, 2, {1})
    (told,) = place.ended()
    assert (told["status"], told["reason"]) == ("CRASHED", "moved: n1 is taken away in 30 s")
    assert (told["error"]["kind"], told["restarts"]) == ("preemption", True)
    assert told["error"]["decision"]["budget"] == "failures.max_preemptions"
    assert not place.events("failure"), "nothing has failed"


def test_a_run_that_is_smaller_than_it_wants_grows_when_there_is_room(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "PAUSE", 0.01)
    place.metrics, place.free = {"loss": 1.0}, 1

    def grows() -> Returned:
        place.free = 2
        return place.moved()

    place.ends = [grows, done]
    assert elastic(place, 2, 1, max_restarts=0).status is RunStatus.finished
    assert place.workers == [1, 2]
    (told,) = place.ended()
    assert told["error"]["kind"] == "resize"
    assert told["error"]["done"] == "goes on with more workers: there is room for 2 of 2 workers now, instead of 1"


def test_a_run_whose_room_was_taken_begins_with_what_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "PAUSE", 0.01)
    place.free = 3

    def waits() -> Returned:
        place.free, place.lacking = 2, "waiting for 3 CPUs"
        assert place.given_up.wait(10)
        place.lacking = ""
        raise RanksFailed([Evidence(rank=-1, type="ActorDiedError", message="the controller was killed")])

    place.ends = [waits, done]
    assert elastic(place, 4, 1, max_restarts=0).status is RunStatus.finished
    assert place.workers == [3, 2]
    (told,) = place.ended()
    assert (told["status"], told["error"]["kind"], told["restarts"]) == ("CRASHED", "resize", True)
    assert told["error"]["done"] == "goes on with fewer workers: there is room for 2 of 4 workers now, not for 3"
    assert not place.events("failure"), "nothing has failed"
    (event,) = place.events("resize")
    assert event["message"].endswith("not waiting any longer, to begin in a new attempt")


def test_who_cancels_a_run_that_moves_has_the_last_word(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "PAUSE", 0.01)
    place.told_to_leave = Notice(why="n1 is taken away")

    def cancelled() -> Returned:
        place.moved()
        os.kill(os.getpid(), signal.SIGTERM)
        return Returned(how=STOPPED)

    place.ends = [cancelled, done]
    assert (trained(place).status, place.fitted) == (RunStatus.cancelled, 1)


def test_nodes_to_avoid_reach_the_place(place: Place) -> None:
    def on_a_bad_node() -> Returned:
        raise RanksFailed([Evidence(rank=1, type="ActorDiedError", message="the worker process has died", node="bad")])

    place.ends = [on_a_bad_node, on_a_bad_node, done]
    assert trained(place, restarts=-1).status is RunStatus.finished
    assert [plan.without for plan in place.plans] == [(), (), ("bad",)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_each_signal_that_asks_to_stop_ends_the_run_with_its_name(place: Place, number: signal.Signals) -> None:
    def stopped() -> Returned:
        os.kill(os.getpid(), number)
        wait_until(lambda: place.is_asked, 10, "the ranks are asked to stop")
        return Returned(how=STOPPED)

    place.ends = [stopped, done]
    outcome = trained(place, restarts=-1)
    assert (outcome.status, outcome.reason) == (RunStatus.cancelled, f"stopped by {number.name}")
    assert place.fitted == 1


def test_who_is_asked_to_stop_on_a_node_that_goes_has_until_then_at_most(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "PAUSE", 0.01)
    place.told_to_leave = Notice(why="n1 is taken away", deadline=time.time() + 0.5)

    def silent() -> Returned:
        wait_until(lambda: place.halted, 10, "the ranks are asked to save and return")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: False, 10, "no report comes")
        return done()

    place.ends = [silent]
    outcome = trained(place)
    assert (outcome.status, "grace time" in outcome.reason) == (RunStatus.cancelled, True)
    assert outcome.elapsed < 9, "failures.grace is 20 s"


def hung() -> Returned:
    raise RanksFailed([Evidence(rank=1, type="Hang", message="no progress", node="node-b", step=7, kind="hang")])


def test_a_driver_goes_on_with_what_failed_before_it(place: Place) -> None:
    place.ends = [hung, done]
    assert trained(place, restarts=2).status is RunStatus.finished
    (told,) = place.ended()
    assert told["error"]["decision"]["action"] == "restart"
    before = {"attempt": 1, "status": "FAILED", "error": {**told["error"], "what": "another one", "step": 6}}
    full = {"action": "halve", "changes": {"splits": 4}}
    halved = {"attempt": 2, "status": "FAILED", "error": {"kind": "device_out_of_memory", "decision": full}}

    place.earlier, place.ends, place.plans = (before, halved), [hung, hung, done], []
    outcome = trained(place, restarts=2)
    assert (outcome.status, [plan.splits for plan in place.plans]) == (RunStatus.failed, [4, 4])
    assert [plan.ticket.earlier for plan in place.plans] == [(), ()], "no rank needs it"
    done_of = {each["error"]["done"]: each["error"]["decision"]["changes"] for each in place.ended()}
    (again,) = (changes for words, changes in done_of.items() if "restart 2 of 2: failures.max_restarts" in words)
    assert again == {"avoid": ["node-b"]}, "for the second time there"
    assert "at step 7 twice" in outcome.error["done"]


def test_the_users_function_is_asked_before_a_decision_is_carried_out(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asked_of_failures.py").write_text(
        "def of(failure, decision):\n"
        "    if failure['attempt'] == 1:\n"
        "        raise ValueError('canary-1234 is no answer')\n"
        "    return 'stop' if decision['action'] == 'restart' and failure['node'] == 'node-b' else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    place.ends = [lost, lost, hung, done]
    outcome = trained(place, restarts=9, function="asked_of_failures:of")
    assert (outcome.status, place.fitted) == (RunStatus.failed, 3)
    assert outcome.error["done"] == "not restarted: failures.function says so"
    said = [told["message"] for told in place.events("policy")]
    assert "failures.function was not followed: it raised ValueError: *** is no answer" in said
    assert len(said) == 4
    place.specs = []
    with pytest.raises(ConfigError, match="has no function off"):
        trained(place, function="asked_of_failures:off")
    assert not place.specs
