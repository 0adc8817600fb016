"""Every `orc checkpoint …` verb where the checkpoints lie on an object store: a real server that speaks S3."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.backends import postgres as server_of
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.manifest import CheckpointInfo, Manifest
from orchestrator.cli import main
from orchestrator.records import FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from tests.plugins.checkpoint_files import random_tensors, write
from tests.plugins.producers import Producer, fact
from tests.plugins.s3_server import S3Server

NOW = time.time()
NAMES = [f"step_{step:08d}-a1" for step in (10, 20, 30, 40)]
RULES = {"keep_last": 2, "keep_best": 1, "best_metric": "val/loss", "best_direction": "min"}


@dataclass
class Stacked:
    """A stack whose storage is a bucket, with a finished run of four checkpoints."""

    home: Path
    store: Store
    url: str
    server: S3Server

    def run(self, name: str, steps: tuple[int, ...], **rules: Any) -> RunTicket:
        config = {"checkpoints": {**RULES, **rules}}
        spec = RunSpec(experiment="digits", name=name, storage_url=self.url, config=config)
        later = len(self.store.runs(limit=10))  # which run is newest matters
        ticket = self.store.open_attempt(spec, now=NOW + later, lease_seconds=1e6)
        root = self.root(ticket)
        for step in steps:
            manifest = self.saved(ticket, step)
            said = CheckpointInfo.of(manifest, root.uri(manifest.name)).to_json()
            self.store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, at=NOW - 9000 + step, **said))])
        self.store.transition(ticket.run, 1, RunStatus.finished, now=NOW)
        return ticket

    def saved(self, ticket: RunTicket, step: int, **more: Any) -> Manifest:
        return write(
            self.root(ticket), random_tensors(), step=step, run=ticket.run, created=NOW - 9000 + step,
            metrics={"val/loss": abs(step - 20) / 10}, is_best=step == 20, label=f"v0.{step}", **more,
        )  # fmt: skip

    @staticmethod
    def root(ticket: RunTicket) -> Storage:
        return Storage(ticket.directory).join("checkpoints")

    def names(self, ticket: RunTicket) -> list[str]:
        return sorted(manifest.name for manifest in catalog.scan(self.root(ticket)).committed)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.close()


@pytest.fixture
def stacked(
    schema_url: str, tmp_path: Path, server: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stacked]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    url = f"s3://{server.bucket(request.node.name)}/runs?{server.options}&request_timeout=2&attempts=1"
    Stack(home=str(tmp_path), database_url=schema_url, storage_url=url).save()
    store = Store(schema_url, pool_size=2)
    yield Stacked(tmp_path, store, url, server)
    store.close()
    server.fault = lambda method, path: ""
    with psycopg.connect(server_of.conninfo(schema_url), autocommit=True) as sql:
        sql.execute("DELETE FROM runs")


@pytest.fixture
def orc(stacked: Stacked, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str, code: int = 0) -> Any:
        assert main.main(["--home", str(stacked.home), "checkpoint", *words]) == code, capsys.readouterr()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert "hush-hush" not in shown.out + shown.err
        if "--json" in words and code != 2:
            return json.loads(shown.out)
        return shown.err if code == 2 else shown.out

    return call


def test_looking_at_checkpoints_in_a_bucket(orc: Any, stacked: Stacked) -> None:
    ticket = stacked.run("brave-otter", (10, 20, 30, 40))
    rows = orc("ls", "--json")
    assert [row["name"] for row in rows] == NAMES[::-1]
    assert rows[2]["kept_because"] == ["best val/loss"]
    assert rows[0]["uri"].startswith("s3://bucket-")
    assert [row["name"] for row in orc("ls", ticket.directory, "--json")] == NAMES[::-1]
    for reference, name in (("last@best", NAMES[1]), ("last@v0.10", NAMES[0]), (ticket.directory, NAMES[3])):
        assert orc("show", reference, "--json")["name"] == name
    assert orc("show", Storage(ticket.directory).join("checkpoints", NAMES[2]).url, "--json")["step"] == 30
    assert "Did you mean" in orc("show", f"last@{NAMES[0][:-1]}2", code=2)
    assert orc("verify", "last", "--all", "--json")["is_sound"] is True
    stacked.root(ticket).write_bytes(f"{NAMES[3]}/model/model-00001-of-00001.safetensors", b"x")
    assert "damaged" in orc("verify", code=1)
    assert stacked.names(ticket) == NAMES, "nothing was set aside"


def test_a_checkpoint_of_a_bucket_is_exported(orc: Any, stacked: Stacked, tmp_path: Path) -> None:
    stacked.run("brave-otter", (10, 20))
    target = str(tmp_path / "m.safetensors")
    assert orc("export", "last@best", "-f", "safetensors", "-o", target, "--json")["step"] == 20
    assert torch.equal(load_file(target)["fc.weight"], random_tensors()["model"]["fc.weight"])
    assert "exists already" in orc("export", "last@best", "-f", "safetensors", "-o", target, code=2)


def test_pinning_removing_and_making_the_list_anew_in_a_bucket(orc: Any, stacked: Stacked, schema_url: str) -> None:
    ticket = stacked.run("brave-otter", (10, 20, 30, 40))
    orc("pin", "last@10")
    assert orc("show", "last@10", "--json")["holds"] == ["pinned"]
    assert "is pinned" in orc("rm", "last@10", "--yes", code=2)
    orc("rm", "last@30", "--yes")
    assert stacked.names(ticket) == [NAMES[0], NAMES[1], NAMES[3]]
    before = stacked.store.checkpoints(ticket.run)
    assert [row.state for row in before] == ["committed", "committed", "deleted", "committed"]
    with psycopg.connect(server_of.conninfo(schema_url), autocommit=True) as sql:
        sql.execute("DELETE FROM checkpoints")
    assert orc("rebuild", "--json")["changed"] == 4
    after = stacked.store.checkpoints(ticket.run)
    assert [(row.id, row.state, row.is_pinned, row.uri) for row in after] == [
        (row.id, row.state, row.is_pinned, row.uri) for row in before
    ]
    orc("unpin", "last@10")
    orc("rm", "last@10", "--yes")
    assert stacked.names(ticket) == [NAMES[1], NAMES[3]]


def test_gc_in_a_bucket_keeps_to_the_quota_that_the_newest_run_says(orc: Any, stacked: Stacked) -> None:
    old = stacked.run("calm-finch", (10, 20, 30), keep_last=0)
    size = stacked.store.checkpoints(old.run)[0].size_bytes
    assert size
    new = stacked.run("brave-otter", (10, 40), keep_last=0, quota_gb=3.5 * size / 1e9)
    document = orc("gc", "--experiment", "digits", "--json")
    doomed = [(run["name"], each["name"], each["why"]) for run in document["runs"] for each in run["delete"]]
    why = "the quota of experiment digits"
    assert (document["dry_run"], sorted(doomed)) == (
        True, [("brave-otter", NAMES[0], why), ("calm-finch", NAMES[0], why)],
    )  # fmt: skip
    assert stacked.names(old) == NAMES[:3]
    orc("gc", "--experiment", "digits", "--yes")
    assert (stacked.names(old), stacked.names(new)) == (NAMES[1:3], [NAMES[3]])
    assert orc("ls", "calm-finch", "--all", "--json")[-1]["state"] == "deleted"


def test_a_bucket_that_does_not_answer_is_said_so(orc: Any, stacked: Stacked) -> None:
    stacked.run("brave-otter", (10,))
    stacked.server.fault = lambda method, path: "500"
    for words in (("show",), ("verify",), ("pin", "last@10"), ("rm", "last@10", "--yes"), ("export",)):
        said = orc(*words, code=2)
        assert "s3://bucket-" in said
        assert "may you use it" in said
    assert "brave-otter" in orc("gc", "--yes", "--json")["runs"][0]["name"]
    assert orc("rebuild", "--json", code=1)["damaged"]
