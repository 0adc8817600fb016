"""Storage alone is the truth: the database's rows come back from it whole, and travel with a run."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, index
from orchestrator.checkpoints.catalog import Hold
from orchestrator.checkpoints.job import KeepRules
from orchestrator.checkpoints.keeping import Keeping
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointInfo, CheckpointState, Manifest
from orchestrator.directory import bundle, record
from orchestrator.records import FactKind, RunSpec, RunStatus
from orchestrator.store.store import Store
from tests.plugins.checkpoint_files import write
from tests.plugins.producers import NOW, Producer, fact
from tests.plugins.s3_server import S3Server

TENSORS = {"model": {"w": torch.arange(12.0).reshape(3, 4)}, "optim": {"s.0.exp_avg": torch.ones(3, 4)}}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.close()


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: S3Server) -> str:
    if request.param == "local":
        return str(tmp_path / "runs")
    return f"s3://key:secret@{server.bucket(request.node.name)}/runs?{server.options}"


@pytest.fixture
def second_schema_url(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """Of another stack."""
    name = f"t{uuid.uuid4().hex[:12]}"
    server_of.ensure_database(postgres.url("postgres"), name, template=template)
    yield postgres.url(name)
    server_of.drop_database(postgres.url("postgres"), name)


@contextmanager
def emptied(url: str) -> Iterator[Store]:
    store = Store(url, pool_size=2)
    yield store
    store.close()
    with psycopg.connect(server_of.conninfo(url), autocommit=True) as sql:
        sql.execute("DELETE FROM runs")


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    with emptied(schema_url) as store:
        yield store


def forget_checkpoints(url: str) -> None:
    with psycopg.connect(server_of.conninfo(url), autocommit=True) as sql:
        sql.execute("DELETE FROM checkpoints")


class Told:
    """A run whose trainer tells of each checkpoint when it is durable, as the engine does."""

    def __init__(self, store: Store, place: str, name: str = "") -> None:
        spec = RunSpec(experiment="digits", name=name, storage_url=place)
        self.store, self.ticket = store, store.open_attempt(spec, now=NOW, lease_seconds=1e6)
        self.root = Storage(self.ticket.directory).join("checkpoints")
        self.producer = Producer(self.ticket)

    def saved(self, step: int, **fields: Any) -> Manifest:
        said = {"created": NOW + step, "reasons": ("every_steps",), "metrics": {"loss": 1 / (1 + step)}, "label": "v0"}
        made = write(self.root, TENSORS, step=step, world_size=2, run=self.ticket.run, **{**said, **fields})
        self.tell(made)
        return made

    def tell(self, made: Manifest, state: CheckpointState = CheckpointState.committed, **more: Any) -> None:
        said = CheckpointInfo.of(made, self.root.uri(made.name), state).to_json() | more
        at = made.created + made.duration
        self.store.commit([self.producer.facts(fact(FactKind.checkpoint, at=at, **said))])

    def states(self) -> dict[str, str]:
        return {row.id.rpartition("/")[2]: row.state for row in self.store.checkpoints(self.ticket.run)}


def test_every_row_comes_back_from_storage_alone(store: Store, schema_url: str, place: str) -> None:
    run, neighbour = Told(store, place), Told(store, place)
    made = [run.saved(step, is_best=step == 20) for step in (10, 20, 30, 40)]
    made.append(run.saved(50, kind="weights", resumable=False, metrics={"loss": float("nan")}))
    theirs = [neighbour.saved(step, created=NOW - 90_000 + step) for step in (1, 2)]
    catalog.hold(run.root, made[1].name, Hold.pinned)
    store.pin_checkpoint(run.ticket.run, made[1].id, True, user="ann", now=NOW)
    catalog.quarantine(run.root, made[2].name, "a bit flipped", now=NOW)
    run.tell(made[2], CheckpointState.quarantined)
    quota = sum(each.size_bytes for each in (*made[1:2], *made[3:], theirs[1]))
    tidied = Keeping(run.root, KeepRules(last=1, quota_bytes=quota), attempt=1).after_commit(made[4], now=NOW + 60)
    assert tidied.deleted == (made[0],)
    for gone in tidied.deleted:
        run.tell(gone, CheckpointState.deleted)
    assert neighbour.states()[theirs[0].name] == "committed", "nobody told it of the quota"
    rebuilt = index.rebuild(store, place, user="ann", now=NOW + 100)
    assert rebuilt.gone == [theirs[0].id]

    rows = {ticket.run: store.checkpoints(ticket.run) for ticket in (run.ticket, neighbour.ticket)}
    assert [row.state for row in rows[run.ticket.run]] == [
        "deleted", "committed", "quarantined", "committed", "committed",
    ]  # fmt: skip
    assert [row.state for row in rows[neighbour.ticket.run]] == ["deleted", "committed"]
    forget_checkpoints(schema_url)
    again = index.rebuild(store, place, user="ann", now=NOW + 200)
    assert {ticket: store.checkpoints(ticket) for ticket in rows} == rows
    assert (again.runs, again.changed, again.gone, again.damaged) == (2, 7, [], [])
    assert index.rebuild(store, place, user="ann", now=NOW + 300).changed == 0


def test_of_a_damaged_manifest_the_name_comes_back(store: Store, schema_url: str, place: str) -> None:
    run = Told(store, place)
    made = [run.saved(step) for step in (10, 20)]
    run.root.write_bytes(f"{made[0].name}/{MANIFEST}", b"{}")
    catalog.quarantine(run.root, made[0].name, "its manifest is damaged", now=NOW)
    run.root.write_bytes(f"{made[1].name}/{MANIFEST}", b"{}")  # that nobody has noticed yet
    forget_checkpoints(schema_url)
    for _ in range(2):
        index.rebuild(store, place, user="ann", now=NOW)
        assert [(row.id, row.state, row.step, row.attempt) for row in store.checkpoints(run.ticket.run)] == [
            (each.id, "quarantined", each.step, 1) for each in made
        ]


def test_a_run_takes_its_checkpoints_along(
    store: Store, schema_url: str, second_schema_url: str, tmp_path: Path
) -> None:
    """Export, import elsewhere, and there the rows are those that its own storage tells."""
    run = Told(store, str(tmp_path / "here"))
    made = [run.saved(step, is_best=step == 20, cipher="aes", key_id="k1") for step in (10, 20, 30)]
    run.tell(made[0], CheckpointState.deleted)
    catalog.remove(run.root, made[0].name, manifest=made[0], why="no rule keeps it", now=NOW)
    catalog.hold(run.root, made[1].name, Hold.pinned)
    index.rebuild(store, "", user="ann", now=NOW)
    store.transition(run.ticket.run, 1, RunStatus.finished, now=NOW + 60)
    before = store.checkpoints(run.ticket.run)
    bundle.write(store, run.ticket.run, tmp_path / "run.tar")
    shutil.rmtree(run.ticket.directory)
    with emptied(second_schema_url) as other:
        taken = bundle.read(other, tmp_path / "run.tar", str(tmp_path / "there"))
        after = other.checkpoints(run.ticket.run)
        assert [replace(row, uri="") for row in after] == [replace(row, uri="") for row in before]
        assert [row.uri for row in after] == [f"{taken.directory}/checkpoints/{each.name}" for each in made]
        assert index.rebuild(other, str(tmp_path / "there"), user="ann", now=NOW + 90).changed == 0
        forget_checkpoints(second_schema_url)
        assert index.rebuild(other, str(tmp_path / "there"), user="ann", now=NOW + 90).changed == 3
        assert other.checkpoints(run.ticket.run) == after


def test_a_run_on_an_object_store_is_found_where_it_lies(store: Store, server: S3Server, tmp_path: Path) -> None:
    """What a URL has after its `?` belongs to the end, in the run's directory and in each checkpoint's place."""
    bucket = server.bucket("travels")
    run = Told(store, f"s3://key:secret@{bucket}/runs?{server.options}")
    made = run.saved(10)
    assert run.ticket.directory == f"s3://key:secret@{bucket}/runs/digits/{run.ticket.run}?{server.options}"
    (row,) = store.checkpoints(run.ticket.run)
    assert row.uri == f"s3://key@{bucket}/runs/digits/{run.ticket.run}/checkpoints/{made.name}?{server.options}"
    store.transition(run.ticket.run, 1, RunStatus.finished, now=NOW + 60)
    with store.snapshot(run.ticket.run) as snapshot:
        there = record.placed(record.movable(snapshot.record), "s3://other/x?region=r")
    assert there["checkpoints"][0]["uri"] == f"s3://other/x/checkpoints/{made.name}?region=r"
