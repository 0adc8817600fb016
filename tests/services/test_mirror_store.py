"""The mirror between a real PostgreSQL and a real MLflow server: both answer the same about every key."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from orchestrator.backends.mlflow import MlflowSink
from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream, facts_payload
from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.tracking.mirror import MirrorService, lag_of
from tests.plugins.mirror_parts import START, RecordingSink
from tests.plugins.mlflow_server import MlflowServer


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    migrate.upgrade(database_url)
    store = Store(database_url)
    yield store
    store.close()


class Producer:
    """One process that logs, straight into the store."""

    def __init__(self, store: Store, ticket: RunTicket, rank: int = 0) -> None:
        self._store, self._ticket, self._rank = store, ticket, rank
        self._id, self._next = uuid.uuid4().hex, {Stream.points: 1, Stream.facts: 1}

    def _commit(self, stream: Stream, count: int, keys: Sequence[str], payload: bytes) -> None:
        batch = Batch(
            producer=self._id, run=self._ticket.run, attempt=self._ticket.attempt, rank=self._rank, stream=stream,
            first=self._next[stream], count=count, keys=tuple(keys), payload=payload,
        )  # fmt: skip
        self._store.commit([batch])
        self._next[stream] += count

    def log(self, values: Mapping[str, Sequence[float]], first_step: int = 0) -> None:
        """Interleaved, as a train loop does: all keys of a step, then the next step."""
        keys = list(values)
        count = len(values[keys[0]])
        points = np.zeros(count * len(keys), POINT)
        points["key"] = np.tile(np.arange(len(keys)), count)
        points["step"] = np.repeat(np.arange(first_step, first_step + count), len(keys))
        points["time"] = START + points["step"] / 10 + 0.001
        points["value"] = np.column_stack([values[key] for key in keys]).ravel()
        self._commit(Stream.points, len(points), keys, points.tobytes())

    def tell(self, *facts: Fact) -> None:
        self._commit(Stream.facts, len(facts), (), facts_payload(facts))


def opened(store: Store, experiment: str, run: str = "", **fields: object) -> RunTicket:
    spec = RunSpec(experiment=experiment, run=run, params={"lr": 0.1}, tags={"team": "a"}, user="ada", **fields)  # type: ignore[arg-type]
    return store.open_attempt(spec, now=START, lease_seconds=60)


def settle(mirror: MirrorService, store: Store, sink: str = "mlflow", patience: float = 30.0) -> None:
    begun = time.monotonic()
    while mirror.step(time.monotonic()) or lag_of(store, sink).runs:
        assert time.monotonic() - begun < patience, mirror.health()
        time.sleep(0.02)  # the real servers' time: the loop ends when all has arrived


def agree(store: Store, client: MlflowClient, ticket: RunTicket, keys: Sequence[str], rank: int = 0) -> None:
    """MLflow has of every key exactly the points that the store has."""
    run_id = store.run(ticket.run).links["mlflow"]["run_id"]
    for key in keys:
        points = store.points(ticket.run, key, rank=rank)
        expected = sorted(
            (int(step), round(float(at) * 1000), repr(float(value)))
            for step, at, value in zip(points.steps, points.times, points.values, strict=True)
        )
        copied = [(point.step, point.timestamp, repr(point.value)) for point in client.get_metric_history(run_id, key)]
        assert sorted(copied) == expected


def test_mlflow_and_the_store_agree_on_every_key(store: Store, mlflow_server: MlflowServer) -> None:
    client, sink = MlflowClient(mlflow_server.uri), MlflowSink(mlflow_server.uri)
    mirror = MirrorService(store, sink)
    ticket = opened(store, "agreement", name="calm-otter")
    ranks = [Producer(store, ticket, rank) for rank in range(2)]
    keys = ("loss", "val/accuracy", "lr")
    for first in range(0, 500, 100):
        values = {key: [math.sin(first + i) for i in range(100)] for key in keys}
        values["loss"][7] = math.nan
        ranks[1].log({"loss": [9.0] * 100, "only/rank_1": values["lr"]}, first)
        ranks[0].log(values, first)
        mirror.step(time.monotonic())
    ranks[0].tell(
        Fact(kind=FactKind.tag, at=START, data={"name": "later", "value": "b"}),
        Fact(kind=FactKind.note, at=START, data={"text": "A thought."}),
        Fact(kind=FactKind.artifact, at=START, data={"name": "plot", "uri": "file:///plot.png"}),
    )
    store.transition(ticket.run, 1, RunStatus.finished, now=START + 90)
    settle(mirror, store)
    agree(store, client, ticket, keys)
    agree(store, client, ticket, ["only/rank_1"], rank=1)
    run = client.get_run(store.run(ticket.run).links["mlflow"]["run_id"])
    assert (run.info.run_name, run.info.status, run.info.end_time) == (
        "calm-otter",
        "FINISHED",
        int((START + 90) * 1000),
    )
    assert run.data.params == {"lr": "0.1"}
    assert {name: run.data.tags[name] for name in ("team", "later", "orc.run_id", "orc.artifact.plot")} == {
        "team": "a", "later": "b", "orc.run_id": ticket.run, "orc.artifact.plot": "file:///plot.png",
    }  # fmt: skip
    assert run.data.tags["mlflow.note.content"] == "A thought."

    second = opened(store, "agreement", run=ticket.run)
    settle(mirror, store)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    Producer(store, second).log({"loss": [0.5] * 50}, 450)
    store.transition(ticket.run, 2, RunStatus.cancelled, now=START + 200)
    settle(MirrorService(store, sink), store)
    agree(store, client, ticket, ["val/accuracy"])
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["orc.attempt"]) == ("KILLED", "2")
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_an_idle_mirror_writes_nothing(store: Store) -> None:
    mirror = MirrorService(store, RecordingSink())
    Producer(store, opened(store, "idle")).log({"loss": [1.0]})
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
