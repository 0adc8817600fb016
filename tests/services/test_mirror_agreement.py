"""MLflow's own client and our store give the same answer about every run and every key, also when the connection is
reset after the server has done what was asked.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of
from orchestrator.backends.mlflow import MlflowSink, mlflow_name
from orchestrator.records import Fact, FactKind, RunStatus, RunTicket
from orchestrator.store.store import Store
from orchestrator.tracking.mirror import MirrorConfig, MirrorService
from tests.plugins.fault_proxy import PASS, RESET, FaultProxy, Request
from tests.plugins.mirror_parts import START
from tests.plugins.mirror_process import EXPERIMENT
from tests.plugins.mlflow_server import MlflowServer
from tests.plugins.store_producer import Curve, Producer, canonical, opened, settle

STRANGE = ["val/acc@5", "a//b", "ключ", "x" * 300, "..", "p:q r"]
MUST_BE_RESET = {
    "experiments/create", "runs/create", "runs/log-inputs", "runs/update", "log_metrics", "log_texts", "upload",
}  # fmt: skip


class QuickClock:
    """Twenty times as fast: the pauses of the circuit breaker are not what is tested."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic() * 20


@pytest.fixture
def store(postgres: EmbeddedPostgres, template: str) -> Iterator[Store]:
    """Of the test's own: a mirror copies every run that it finds."""
    name = f"t{uuid.uuid4().hex[:12]}"
    server_of.ensure_database(postgres.url("postgres"), name, template=template)
    store = Store(postgres.url(name))
    yield store
    store.close()
    server_of.drop_database(postgres.url("postgres"), name)


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri)


def quick_mirror(store: Store, uri: str) -> MirrorService:
    # Every rank logs in the end: nothing has to be decided by the clock.
    config = MirrorConfig(budget=40.0, grace=1e6, aside=2.0)
    return MirrorService(store, MlflowSink(uri), config=config, clock=QuickClock())


class Resets:
    """The first request of each kind is reset after the server has answered, then some at random."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._met: set[str] = set()

    def __call__(self, request: Request) -> str:
        if request.kind not in MUST_BE_RESET:
            return PASS
        is_first = request.kind not in self._met
        self._met.add(request.kind)
        return RESET if is_first or self._dice.random() < 0.1 else PASS


def history(client: MlflowClient, run_id: str, name: str) -> Curve:
    return sorted((p.step, p.timestamp, repr(p.value)) for p in client.get_metric_history(run_id, name))


def run_of(client: MlflowClient, experiment: str, wanted: str) -> Run:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], wanted)
    return run


def number_list(dice: random.Random, count: int) -> list[float]:
    return [dice.choice([dice.random(), dice.random(), -math.inf]) for _ in range(count)]


def write_ranks_and_attempts(store: Store, mirror: MirrorService, experiment: str, directory: Path) -> RunTicket:
    """Three ranks, two attempts, reductions, strange names and values; the mirror copies in between."""
    config = {"mlflow": {"other_ranks": True}, "train": "digits:train"}
    ticket = opened(store, experiment, workers=3, config=config, storage_url=str(directory), job="job-1")
    dice, skipped = random.Random(experiment), {(0, 3), (1, 3), (2, 7)}
    for attempt, first in ((1, 0), (2, 25)):
        if attempt == 2:
            store.transition(ticket.run, 1, RunStatus.crashed, reason="a node was lost", now=START + 50)
            ticket = opened(store, experiment, run=ticket.run, workers=3, config=config, job="job-2")
        ranks = [Producer(store, ticket, rank) for rank in range(3)]
        for kind in ("mean", "sum", "min", "max"):
            ranks[0].declare(f"all/{kind}", kind)
        data = {"digits/train": {"name": "digits", "split": "train", "fingerprint": "xxh128:" + "ab" * 16, "size": 9}}
        git = {"commit": f"c{attempt}", "branch": "main", "is_dirty": True}
        provenance = {"host": f"node-{attempt}", "git": git, "datasets": data}
        ranks[0].tell(Fact(kind=FactKind.provenance, at=START, data=provenance))
        for start in (first, first + 10, first + 20):
            for rank in dice.sample(ranks, 3):
                values = {key: [dice.gauss(0, 1) for _ in range(10)] for key in ("loss", "lr", *STRANGE)}
                values["loss"][3:6] = [math.nan, math.inf, 5e-324]
                rank.log(values, range(start, start + 10))
            for rank in dice.sample(range(3), 3):
                there = [step for step in range(start, start + 10) if (rank, step) not in skipped]
                for steps in (there[: len(there) // 2], there[len(there) // 2 :]):
                    values = {f"all/{kind}": number_list(dice, len(steps)) for kind in ("mean", "sum", "min", "max")}
                    ranks[rank].log(values, steps)
                if dice.random() < 0.5:
                    mirror.step(mirror._clock.monotonic())
    ranks[0].tell(
        Fact(kind=FactKind.tag, at=START, data={"name": "later", "value": "b"}),
        Fact(kind=FactKind.note, at=START, data={"text": "A thought."}),
    )
    artifacts = Path(ticket.directory) / "artifacts"
    artifacts.mkdir(parents=True)
    (artifacts / "notes.md").write_text("What was seen.")
    for name in ("notes.md", "weights.bin"):
        ranks[0].tell(Fact(kind=FactKind.artifact, at=START, data={"name": name, "uri": f"{artifacts}/{name}"}))
    store.transition(ticket.run, 2, RunStatus.finished, now=START + 190)
    return ticket


def test_every_run_and_key_agrees_although_answers_are_lost_after_the_server_has_committed(
    store: Store, mlflow_server: MlflowServer, client: MlflowClient, tmp_path: Path
) -> None:
    experiment = "agreement"
    with FaultProxy(mlflow_server.port, Resets(seed=7)) as proxy:
        mirror = quick_mirror(store, proxy.uri)
        tickets = [write_ranks_and_attempts(store, mirror, experiment, tmp_path) for _ in range(2)]
        settle(mirror, store)
    assert {kind for kind, count in proxy.resets.items() if count} == MUST_BE_RESET
    assert sum(proxy.resets.values()) > 2 * len(MUST_BE_RESET)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 2 * 3
    alone = client.search_runs([found.experiment_id], "tags.`orc.attempt_of` IS NULL")
    assert {run.data.tags["orc.run_id"] for run in alone} == {ticket.run for ticket in tickets}
    assert len(alone) == len(client.search_runs([found.experiment_id], "params.lr = '0.1'")) == 2
    assert {run.data.tags["orc.run_id"] for run in runs if "orc.run_id" in run.data.tags} == {t.run for t in tickets}
    for ticket in tickets:
        check_run(store, client, experiment, ticket)


def check_run(store: Store, client: MlflowClient, experiment: str, ticket: RunTicket) -> None:
    run = run_of(client, experiment, f"tags.`orc.run_id` = '{ticket.run}'")
    run_id, tags, detail = run.info.run_id, run.data.tags, store.run(ticket.run)
    assert detail.links["mlflow"]["run_id"] == run_id
    assert (run.info.run_name, run.info.status) == (detail.name, "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (round(START * 1000), round((START + 190) * 1000))
    assert run.data.params == {"lr": "0.1"}
    assert (tags["team"], tags["later"], tags["orc.job"], tags["orc.host"]) == ("a", "b", "job-2", "node-2")
    assert tags["mlflow.note.content"] == "A thought."
    keys = sorted({row.key for row in store.summaries(ticket.run)})
    assert set(keys) == {"loss", "lr", *STRANGE, *(f"all/{kind}" for kind in ("mean", "sum", "min", "max"))}
    names = {mlflow_name(key) for key in keys}
    names |= {mlflow_name(f"{key}/rank_{rank}") for key in keys for rank in range(3) if rank or "all/" in key}
    assert set(run.data.metrics) == names
    for key in keys:
        assert history(client, run_id, mlflow_name(key)) == canonical(store, ticket.run, key)
        newest = max(history(client, run_id, mlflow_name(key)))  # the newest attempt wrote the last step
        assert repr(run.data.metrics[mlflow_name(key)]) == newest[2]
    for attempt, commit in ((1, "c1"), (2, "c2")):
        child = run_of(
            client, experiment, f"tags.`orc.attempt_of` = '{ticket.run}' AND tags.`orc.attempt` = '{attempt}'"
        )
        assert child.data.tags["mlflow.parentRunId"] == run_id
        assert child.data.tags["mlflow.source.git.commit"] == commit
        assert child.data.tags["mlflow.source.git.dirty"] == "True"
        assert child.info.run_name == f"{detail.name} attempt {attempt}"
        assert child.info.status == ("FAILED" if attempt == 1 else "FINISHED")
        assert set(child.data.metrics) == names
        for key in keys:
            expected = canonical(store, ticket.run, key, attempt=attempt)
            assert history(client, child.info.run_id, mlflow_name(key)) == expected
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "ab" * 16)
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]
    paths = {file.path for folder in ("orc", "artifacts") for file in client.list_artifacts(run_id, folder)}
    assert paths == {"orc/config.yaml", "orc/artifacts.json", "artifacts/notes.md"}
    assert Path(client.download_artifacts(run_id, "artifacts/notes.md")).read_text() == "What was seen."
    assert tags["orc.artifact.weights.bin"].endswith("artifacts/weights.bin")


def test_a_long_curve_is_complete_up_to_the_limit_and_decimated_beyond(
    store: Store, mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    mirror = MirrorService(store, MlflowSink(mlflow_server.uri))
    ticket = opened(store, "long")
    producer, values = Producer(store, ticket), np.sin(np.arange(10_600) / 50.0)
    values[10_333] = 7.0
    for first in range(0, len(values), 2000):
        some = values[first : first + 2000]
        producer.log({"loss": list(some)}, range(first, first + len(some)))
    store.transition(ticket.run, 1, RunStatus.finished, now=START + 2000)
    settle(mirror, store)
    run = run_of(client, "long", f"tags.`orc.run_id` = '{ticket.run}'")
    copied = history(client, run.info.run_id, "loss")
    assert copied == canonical(store, ticket.run, "loss")
    assert [(step, float(value)) for step, _, value in copied[:10_000]] == list(enumerate(values[:10_000]))
    assert len(copied) < 10_000 + 3 * 60 + 3
    assert {10_333, 10_599} <= {step for step, _, _ in copied}
    assert "complete up to 10000" in run.data.tags["orc.decimated.loss"]


def test_a_slow_server_is_left_alone_and_the_other_runs_go_on(
    store: Store, mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    """Whatever asks for points of one run takes ten seconds, and the mirror waits for one."""
    slow, quick = (opened(store, "slow", name=name) for name in ("tortoise", "hare"))
    for ticket in (slow, quick):
        Producer(store, ticket).log({"loss": [1.0, 2.0, 3.0]}, range(3))
    with FaultProxy(mlflow_server.port) as proxy:
        mirror = MirrorService(store, MlflowSink(proxy.uri, timeout=1), clock=QuickClock())

        def rule(request: Request) -> str | float:
            run_id = store.run(slow.run).links.get("mlflow", {}).get("run_id", "?")
            return 10.0 if request.kind == "log_metrics" and run_id.encode() in request.body else PASS

        proxy.rule = rule
        deadline = time.monotonic() + 30
        while not (proxy.delays["log_metrics"] >= 2 and "mlflow" in store.run(quick.run).links):
            begun = time.monotonic()
            assert begun < deadline, mirror.health()
            mirror.step(mirror._clock.monotonic())
            assert time.monotonic() - begun < 8
            time.sleep(0.02)  # the real servers' time
        proxy.rule = lambda request: PASS
        settle(mirror, store)
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "30"  # of the whole process: the mirror's second is not for who looks
    for ticket in (slow, quick):
        run = run_of(client, "slow", f"tags.`orc.run_id` = '{ticket.run}'")
        assert history(client, run.info.run_id, "loss") == canonical(store, ticket.run, "loss")
    assert proxy.delays["log_metrics"] >= 2


def test_mirrors_that_are_killed_between_two_calls_miss_and_double_nothing(
    store: Store, mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    """Each at another place; then one goes on with what all of them left behind."""
    root = Path(__file__).parents[2]
    url = store._url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.mirror_process", url, "mlflow", mlflow_server.uri],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    runs = [line["run"] for line in lines if "run" in line]
    signals = [line["signal"] for line in lines if "signal" in line]
    assert signals == [signal.SIGKILL] * (len(runs) - 1) + [0], done.stderr
    assert len(runs) > 5
    settle(MirrorService(store, MlflowSink(mlflow_server.uri)), store)
    found = client.get_experiment_by_name(EXPERIMENT)
    assert found is not None
    copies = client.search_runs([found.experiment_id])
    assert len(copies) == 3 * len(runs)
    by_id = {
        (copy.data.tags.get("orc.run_id") or copy.data.tags["orc.attempt_of"], copy.data.tags["mlflow.runName"]): copy
        for copy in copies
    }
    for run in runs:
        name = store.run(run).name
        for attempt, title in ((None, name), (1, f"{name} attempt 1"), (2, f"{name} attempt 2")):
            copy = by_id[run, title]
            assert copy.info.status == ("FAILED" if attempt == 1 else "FINISHED")
            assert len(copy.inputs.dataset_inputs) == 1
            for key in ("loss", "lr"):
                assert history(client, copy.info.run_id, key) == canonical(store, run, key, attempt=attempt)
