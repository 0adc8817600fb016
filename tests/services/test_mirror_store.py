"""The mirror on a real PostgreSQL: its lock, its rest, how far it is behind, and merging."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from cluster import stack_status
from orchestrator.records import RunStatus
from orchestrator.stack import Stack
from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.store.views import FeedPosition, SinkCursor
from orchestrator.tracking.mirror import MirrorService
from tests.plugins.mirror_parts import START, RecordingSink
from tests.plugins.store_producer import Producer, opened, settle


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    migrate.upgrade(database_url)
    store = Store(database_url)
    yield store
    store.close()


def test_an_idle_mirror_writes_nothing(store: Store) -> None:
    mirror = MirrorService(store, RecordingSink())
    Producer(store, opened(store, "idle")).log({"loss": [1.0]}, [0])
    settle(mirror, store, "recording")
    before = store.cursor("recording")
    for _ in range(3):
        mirror.step(time.monotonic())
    assert store.cursor("recording") == before


def test_one_mirror_writes_and_another_takes_over_when_it_ends(store: Store, database_url: str) -> None:
    other = Store(database_url)
    first, second = MirrorService(store, RecordingSink()), MirrorService(other, RecordingSink())
    first.step(time.monotonic())
    second.step(time.monotonic())
    assert (first.health()["writer"], second.health()["writer"]) == (True, False)
    first.close()
    second.step(time.monotonic())
    first.step(time.monotonic())
    assert (first.health()["writer"], second.health()["writer"]) == (False, True)
    second.close()
    other.close()


def test_a_lock_whose_connection_was_cut_is_noticed(store: Store, database_url: str) -> None:
    other = Store(database_url)
    assert store.try_lock("mlflow")
    assert not other.try_lock("mlflow")
    with store._writing() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks JOIN pg_database ON pg_database.oid = database"
            " WHERE locktype = 'advisory' AND datname = current_database()"
        )
    assert other.try_lock("mlflow")
    assert not store.try_lock("mlflow")
    other.unlock("mlflow")
    assert store.try_lock("mlflow")
    other.close()


def test_the_database_tells_how_far_a_dead_mirror_is_behind(store: Store, database_url: str) -> None:
    told = {"mlflow_uri": "http://nowhere", "tensorboard_directory": "/nowhere"}
    stack = Stack(home="/nowhere", database_url=database_url, **told)
    assert {one.status for one in stack_status.sinks(stack, time.time())} == {"not started"}
    sink = RecordingSink()
    sink.name = "mlflow"
    mirror = MirrorService(store, sink)
    first, second = (Producer(store, opened(store, "lag")) for _ in range(2))
    declined = Producer(store, opened(store, "lag", config={"mlflow": {"enabled": "false"}}))
    first.log({"loss": [1.0] * 10}, range(10))
    settle(mirror, store)
    mirror.close()
    first.log({"loss": [1.0] * 20, "lr": [1.0] * 20}, range(10, 30))
    second.log({"loss": [1.0] * 5}, range(5))
    declined.log({"loss": [1.0] * 1000}, range(1000))
    mlflow, tensorboard, directory = stack_status.sinks(stack, time.time())
    assert (mlflow.name, mlflow.status, mlflow.points, mlflow.runs) == ("mlflow", "up", 45, 2)
    assert mlflow.seconds == pytest.approx(2.0)
    assert (tensorboard.status, directory.status) == ("not started", "not started")
    later = time.time() + stack_status.SILENT + 60
    assert [one.status for one in stack_status.sinks(stack, later)] == ["stopped", "not started", "not started"]
    (of_run,) = store.sink_lags(second._ticket.run)
    assert (of_run.points, of_run.runs) == (5, 1)
    (of_declined,) = store.sink_lags(declined._ticket.run)
    assert (of_declined.points, of_declined.runs) == (0, 0)
    settle(MirrorService(store, sink), store)
    (caught_up,) = store.sink_lags()
    assert (caught_up.points, caught_up.seconds, caught_up.runs, caught_up.state) == (0, 0.0, 0, "closed")
    assert [one.status for one in stack_status.sinks(stack, later)][0] == "idle"


def test_a_failing_sink_says_why_without_secrets(store: Store, database_url: str) -> None:
    why = "HTTPConnectionPool: no answer from http://ada:geheim@mlflow:5000/api"
    state = {"runs": [], "state": "open", "error": why}
    store.save_cursor("mlflow", "", SinkCursor(state=state))
    (found, _) = stack_status.sinks(Stack(home="/x", database_url=database_url, mlflow_uri="http://m"), time.time())
    assert (found.status, found.why) == ("failing", why.replace("geheim", "***"))


def test_merging_between_two_reads_gives_the_mirror_every_point_once(store: Store) -> None:
    sink = RecordingSink()
    mirror, ticket = MirrorService(store, sink), opened(store, "merged")
    producer, number, merged = Producer(store, ticket), store._number(ticket.run), 0
    for first in range(0, 3000, 20):
        producer.log({"a": [float(i) for i in range(first, first + 20)], "b": [0.5] * 20}, range(first, first + 20))
        if first % 300 == 0:
            mirror.step(time.monotonic())
        if first % 500 == 0:
            merged += store.merge([number]).rows
    store.transition(ticket.run, 1, RunStatus.finished, now=START + 400)
    merged += store.merge([number]).rows
    settle(mirror, store, "recording")
    assert merged > 128
    assert store.merge([number]).rows
    assert sink.curve(ticket.run, "a") == {step: float(step) for step in range(3000)}
    assert sink.received == 6000  # nothing was even sent twice
    assert store.chunks_after(ticket.run, store.cursor("recording", ticket.run).position) == []
    assert store.cursor("recording", ticket.run).position > FeedPosition()
