"""The mirror on a real PostgreSQL: its lock, and its rest when there is nothing to do."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.tracking.mirror import MirrorService
from tests.plugins.mirror_parts import RecordingSink
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
