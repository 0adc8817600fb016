"""A sweep in MLflow: trials lie below their sweep, whoever was copied first, and have no copies of attempts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from orchestrator.backends.mlflow import MlflowSink
from orchestrator.records import RunStatus
from orchestrator.tracking.mirror import MirrorService
from tests.plugins.mirror_parts import MemoryFeed
from tests.plugins.mlflow_server import MlflowServer


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed()


@pytest.fixture
def sink(mlflow_server: MlflowServer) -> Iterator[MlflowSink]:
    sink = MlflowSink(mlflow_server.uri)
    yield sink
    sink.close()


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri)


def settle(mirror: MirrorService, feed: MemoryFeed, patience: float = 30.0) -> None:
    """Step until nothing is behind."""
    begun = time.monotonic()
    while mirror.step(time.monotonic()) or mirror.lag().runs:
        assert time.monotonic() - begun < patience, mirror.health()
        time.sleep(0.02)  # the real server's time, not a guess: the loop ends when all has arrived


def open_trial(feed: MemoryFeed, sweep: str, number: int, *, experiment: str) -> str:
    run = f"{sweep}-trial-{number}"
    feed.open(
        run, experiment=experiment, sweep=sweep, parents={sweep: "parent"},
        tags={"orc.sweep": sweep, "orc.trial": str(number), "orc.rung": "0"},
    )  # fmt: skip
    return run


def all_of(client: MlflowClient, experiment: str) -> list[Run]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], max_results=1000))


def test_the_sweep_is_there_before_its_trials(feed: MemoryFeed, sink: MlflowSink, client: MlflowClient) -> None:
    """The feed tells of the trials first, as it does after the parent's first change, and a new mirror takes over."""
    trials = [open_trial(feed, "sweep-order", number, experiment="sweep-order") for number in range(2)]
    feed.open("sweep-order", experiment="sweep-order")
    settle(MirrorService(feed, sink), feed)
    trials += [open_trial(feed, "sweep-order", number, experiment="sweep-order") for number in (2, 3)]
    feed.change("sweep-order", reason="4 trials")
    settle(MirrorService(feed, sink), feed)
    runs = {run.data.tags["orc.run_id"]: run for run in all_of(client, "sweep-order")}
    assert sorted(runs) == ["sweep-order", *trials], "each once"
    parent = runs["sweep-order"].info.run_id
    for number, trial in enumerate(trials):
        tags = runs[trial].data.tags
        assert tags["mlflow.parentRunId"] == parent
        assert (tags["orc.sweep"], tags["orc.trial"], tags["orc.rung"]) == ("sweep-order", str(number), "0")
    assert "mlflow.parentRunId" not in runs["sweep-order"].data.tags


def test_a_promoted_trial_stays_one_run(feed: MemoryFeed, sink: MlflowSink, client: MlflowClient) -> None:
    feed.open("sweep-rungs", experiment="sweep-rungs")
    trial = open_trial(feed, "sweep-rungs", 0, experiment="sweep-rungs")
    feed.log(trial, "loss", [3.0, 2.0])
    feed.end(trial, RunStatus.finished)
    mirror = MirrorService(feed, sink)
    settle(mirror, feed)
    feed.change(trial, status=RunStatus.running, ended=None, attempt=2, tags={"orc.trial": "0", "orc.rung": "1"})
    feed.log(trial, "loss", [1.0, 0.5], first_step=2, attempt=2)
    feed.end(trial, RunStatus.finished)
    settle(mirror, feed)
    settle(MirrorService(feed, sink), feed)
    runs = {run.data.tags.get("orc.run_id", "an attempt"): run for run in all_of(client, "sweep-rungs")}
    assert sorted(runs) == ["sweep-rungs", trial]
    found = runs[trial]
    assert (found.data.tags["orc.rung"], found.data.tags["orc.attempt"], found.info.status) == ("1", "2", "FINISHED")
    points = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]


def test_a_trial_whose_sweep_was_removed_is_copied_all_the_same(
    feed: MemoryFeed, sink: MlflowSink, client: MlflowClient
) -> None:
    trial = open_trial(feed, "sweep-gone", 0, experiment="sweep-gone")
    settle(MirrorService(feed, sink), feed)
    (run,) = all_of(client, "sweep-gone")
    assert run.data.tags["orc.run_id"] == trial
    assert "mlflow.parentRunId" not in run.data.tags
