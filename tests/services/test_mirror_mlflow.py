"""The mirror against a real MLflow server: MLflow's own client reads what was logged, whatever happened in between."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from orchestrator.backends.mlflow import MAX_NAME, MlflowSink, mlflow_name
from orchestrator.backends.sinks import DatasetFacts, RunFacts, SinkGone, SinkUnavailable
from orchestrator.records import RunStatus
from orchestrator.tracking.mirror import MirrorConfig, MirrorService
from tests.plugins.mirror_parts import START, MemoryFeed
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


def run_of(client: MlflowClient, feed: MemoryFeed, run: str) -> Run:
    return client.get_run(feed.links[run]["mlflow"]["run_id"])


def experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    assert found is not None
    return found.experiment_id


def curve(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, int, float]]:
    return sorted((point.step, point.timestamp, point.value) for point in client.get_metric_history(run_id, key))


def test_a_run_arrives_exactly(feed: MemoryFeed, sink: MlflowSink, client: MlflowClient) -> None:
    feed.open(
        "run-exact", experiment="exactness", name="calm-otter", description="What it is.", notes=["A thought."],
        params={"lr": 0.1, "amp": True, "layers": [1, 2], "none": None, "text": "ä" * 7000, "empty": "", "odd key!": 1},
        tags={"team": "vision", "nul": "a\0b", "tag@home": "x"}, artifacts={"model/weights": "s3://bucket/w"},
        git={"commit": "abc123", "branch": "main", "dirty": True},
    )  # fmt: skip
    values = {
        "train/loss": [1.0 / (i + 1) for i in range(500)],
        "val/acc@5": [i / 500 for i in range(500)],
        "lr": [0.1] * 500,
    }
    for first in range(0, 500, 100):
        for key, numbers in values.items():
            feed.log("run-exact", key, numbers[first : first + 100], first_step=first)
    feed.log("run-exact", "odd", [math.nan, math.inf, -math.inf, 1e-310])
    feed.end("run-exact", RunStatus.crashed, at=START + 60.25)
    settle(MirrorService(feed, sink), feed)

    (found,) = client.search_runs([experiment_id(client, "exactness")], "tags.`orc.run_id` = 'run-exact'")
    for key, numbers in values.items():
        expected = [(i, round((START + i / 10) * 1000), value) for i, value in enumerate(numbers)]
        assert curve(client, found.info.run_id, mlflow_name(key)) == expected
    odd = {step: value for step, _, value in curve(client, found.info.run_id, "odd")}
    assert math.isnan(odd[0])
    assert odd[1] > 1e308
    assert odd[3] == 1e-310
    tags, params = found.data.tags, found.data.params
    assert tags["orc.nonfinite.odd"] == "1:inf,2:-inf"
    assert tags[f"orc.key.{mlflow_name('val/acc@5')}"] == "val/acc@5"
    assert (tags["team"], tags["nul"], tags[mlflow_name("tag@home")]) == ("vision", "a\ufffdb", "x")
    assert tags["mlflow.note.content"] == "What it is.\n\nA thought."
    assert tags["orc.artifact.model/weights"] == "s3://bucket/w"
    assert (tags["mlflow.user"], tags["mlflow.source.git.commit"]) == ("ada", "abc123")
    assert tags["orc.status"] == "CRASHED"
    assert (params["lr"], params["amp"], params["layers"], params["none"], params["empty"]) == (
        "0.1", "True", "[1, 2]", "None", "",
    )  # fmt: skip
    assert params["text"] == "ä" * 5999 + "…"
    assert params[mlflow_name("odd key!")] == "1"
    assert found.info.run_name == "calm-otter"
    assert (found.info.start_time, found.info.end_time) == (round(START * 1000), round((START + 60.25) * 1000))
    assert found.info.status == "FAILED"


def test_a_server_killed_three_times_in_the_middle_misses_nothing_and_doubles_nothing(
    mlflow_server: MlflowServer, feed: MemoryFeed, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MlflowSink(mlflow_server.uri, timeout=2)
    mirror = MirrorService(feed, sink, config=MirrorConfig(budget=0.2))
    feed.open("run-killed", experiment="outage")
    for kill in range(3):
        for first in range(1000 * kill, 1000 * kill + 1000, 500):
            for key in ("a", "b"):
                feed.log("run-killed", key, [float(i) for i in range(first, first + 500)], first_step=first)
        while mirror.health()["copied_points"] < 500:
            mirror.step(time.monotonic())
        mlflow_server.kill()
        for key in ("a", "b"):
            feed.log("run-killed", key, [-1.0], first_step=10_000 + kill)
        while mirror.health()["state"] == "closed":
            begun = time.monotonic()
            mirror.step(begun)
            assert time.monotonic() - begun < 10
        assert mirror.lag().points > 0
        mlflow_server.start()
        mirror = MirrorService(feed, sink, config=MirrorConfig(budget=0.2))  # and the mirror died, too
    feed.end("run-killed")
    settle(mirror, feed)
    run = run_of(client, feed, "run-killed")
    assert [(step, value) for step, _, value in curve(client, run.info.run_id, "a")] == [
        *((i, float(i)) for i in range(3000)), *((10_000 + kill, -1.0) for kill in range(3)),
    ]  # fmt: skip
    assert [step for step, _, _ in curve(client, run.info.run_id, "b")] == [*range(3000), 10_000, 10_001, 10_002]
    assert run.info.status == "FINISHED"
    assert len(client.search_runs([experiment_id(client, "outage")])) == 1
    assert sum("is behind from now on" in record.getMessage() for record in caplog.records) == 3


def test_a_crash_before_the_cursor_is_saved_sends_again_without_doubles(
    feed: MemoryFeed, sink: MlflowSink, client: MlflowClient
) -> None:
    feed.open("run-again", experiment="again", params={"lr": 0.1})
    feed.log("run-again", "loss", [1.0, math.nan, math.inf] * 100)
    feed.forgets_cursors = True
    MirrorService(feed, sink).step(time.monotonic())
    feed.forgets_cursors = False
    feed.log("run-again", "loss", [2.0], first_step=300)
    settle(MirrorService(feed, sink), feed)
    run = run_of(client, feed, "run-again")
    assert [step for step, _, _ in curve(client, run.info.run_id, "loss")] == list(range(301))


def test_attempts_statuses_and_changed_parameters(feed: MemoryFeed, sink: MlflowSink, client: MlflowClient) -> None:
    mirror = MirrorService(feed, sink)
    feed.open("run-more", experiment="attempts", params={"lr": 0.1})
    feed.end("run-more", RunStatus.failed)
    feed.change("run-more", reason="out of memory", error={"type": "OOM", "message": "no room", "rank": 1})
    settle(mirror, feed)
    run = run_of(client, feed, "run-more")
    assert (run.info.status, run.data.tags["orc.error"]) == ("FAILED", "rank 1: OOM: no room")
    feed.change(
        "run-more", status=RunStatus.running, attempt=2, ended=None, error=None, reason="", params={"lr": 0.2, "b": 1}
    )
    settle(mirror, feed)
    run = run_of(client, feed, "run-more")
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.1", "b": "1"}
    assert run.data.tags["orc.param.lr"] == "0.2"
    assert run.data.tags["orc.error"] == ""
    feed.end("run-more", RunStatus.cancelled, at=START + 300)
    settle(mirror, feed)
    run = run_of(client, feed, "run-more")
    assert (run.info.status, run.info.end_time) == ("KILLED", round((START + 300) * 1000))


def test_a_lost_answer_to_the_creation_leaves_one_run(sink: MlflowSink, client: MlflowClient) -> None:
    facts = RunFacts(id="run-double", experiment="doubles", name="x", start_ms=1)
    first = sink.ensure_run(facts)
    experiment = experiment_id(client, "doubles")
    client.create_run(experiment, start_time=1, tags={"orc.run_id": "run-double"})
    client.log_metric(first.id, "loss", 1.0)
    again = sink.ensure_run(facts)
    assert (again.id, again.created) == (first.id, False)
    assert [run.info.run_id for run in client.search_runs([experiment])] == [first.id]


def test_a_run_that_a_person_deleted_stays_deleted(sink: MlflowSink, client: MlflowClient) -> None:
    facts = RunFacts(id="run-deleted", experiment="deleted", name="x", start_ms=1)
    target = sink.ensure_run(facts)
    client.delete_run(target.id)
    with pytest.raises(SinkGone, match="restore it there"):
        sink.set_tags(target, {"a": "b"})
    with pytest.raises(SinkGone) as caught:
        sink.ensure_run(facts)
    assert caught.value.deleted


def test_datasets_of_equal_content_are_one_input_with_both_splits(sink: MlflowSink, client: MlflowClient) -> None:
    target = sink.ensure_run(RunFacts(id="run-data", experiment="data", name="x", start_ms=1))
    data = [
        DatasetFacts(name="digits", fingerprint="sha256:" + "f" * 64, split=split, uri="s3://b/digits")
        for split in ("train", "val")
    ]
    data.append(DatasetFacts(name="no fingerprint", version="3"))
    for _ in range(2):
        sink.log_datasets(target, data)
    inputs = {one.dataset.name: one for one in client.get_run(target.id).inputs.dataset_inputs}
    assert set(inputs) == {"digits", "no fingerprint"}
    assert (inputs["digits"].dataset.digest, inputs["digits"].dataset.source_type) == ("f" * 36, "s3")
    assert [(tag.key, tag.value) for tag in inputs["digits"].tags] == [("mlflow.data.context", "train, val")]
    assert inputs["no fingerprint"].tags == []


def test_a_run_and_its_attempts_are_found_apart_and_link_back(
    mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    sink = MlflowSink(mlflow_server.uri, dashboard="http://ray:8265/")
    facts = RunFacts(id="run-links", experiment="links", name="x", start_ms=1, job="raysubmit_1", attempt=2)
    run = sink.ensure_run(facts)
    attempts = [
        sink.ensure_run(replace(facts, attempt_of="run-links", parent="run-links", attempt=number)) for number in (1, 2)
    ]
    assert len({run.id, *(attempt.id for attempt in attempts)}) == 3
    assert sink.ensure_run(facts).id == run.id
    assert sink.ensure_run(replace(facts, attempt_of="run-links", attempt=2)).id == attempts[1].id
    sink.set_tags(run, sink.tags(facts))
    tags = client.get_run(run.id).data.tags
    assert (tags["orc.job"], tags["orc.dashboard"]) == ("raysubmit_1", "http://ray:8265/#/jobs/raysubmit_1")
    assert client.get_run(attempts[0].id).data.tags["mlflow.parentRunId"] == run.id


def test_a_trial_is_shown_below_its_sweep(sink: MlflowSink, client: MlflowClient) -> None:
    sweep = sink.ensure_run(RunFacts(id="sweep-1", experiment="nested", name="s", start_ms=1))
    trial = sink.ensure_run(RunFacts(id="trial-1", experiment="nested", name="t", parent="sweep-1", start_ms=1))
    assert client.get_run(trial.id).data.tags["mlflow.parentRunId"] == sweep.id


@pytest.mark.parametrize(
    "name",
    [
        "a@b",
        "a//b",
        "/a",
        "a/",
        "..",
        "a/../b",
        ".",
        "x" * 300,
        "ключ/потеря",
        "a\0b",
        "\ud800",
        "🔥",
        "a\nb",
        "",
        "a:b c",
    ],
)
def test_mlflow_takes_every_name_we_give_it(
    mlflow_server: MlflowServer, sink: MlflowSink, client: MlflowClient, name: str
) -> None:
    target = sink.ensure_run(RunFacts(id="run-names", experiment="names", name="x", start_ms=1))
    safe = sink.name_for(name)
    client.log_metric(target.id, safe, 1.0)
    sink.set_tags(target, {sink.name_for(f"orc.nonfinite.{name}"): "1:inf"})
    assert len(safe) <= MAX_NAME
    assert safe in client.get_run(target.id).data.metrics


def test_different_names_stay_different() -> None:
    names = ["a@b", "a#b", "a_b", "a/b", "a//b", "/a/b", "x" * 300, "x" * 301, ".", "..", ""]
    assert len({mlflow_name(name) for name in names}) == len(names)


def test_a_server_that_is_not_there_is_unavailable_at_once() -> None:
    sink = MlflowSink("http://127.0.0.1:1")
    begun = time.monotonic()
    with pytest.raises(SinkUnavailable) as caught:
        sink.ping()
    assert not caught.value.answered
    assert time.monotonic() - begun < 5


def test_a_server_that_never_answers_does_not_hold_a_step(feed: MemoryFeed) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        sink = MlflowSink(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=1)
        mirror = MirrorService(feed, sink)
        feed.open("run-deaf")
        feed.log("run-deaf", "loss", [1.0])
        begun = time.monotonic()
        assert mirror.step(begun)
        assert time.monotonic() - begun < 3
        assert "timed out" in mirror.health()["last_error"]


def test_an_existing_sqlite_database_is_a_sink_too(mlflow_server: MlflowServer, feed: MemoryFeed) -> None:
    sink = MlflowSink(mlflow_server.database)
    feed.open("run-sqlite", experiment="sqlite")
    feed.log("run-sqlite", "loss", [3.0, 2.0])
    feed.end("run-sqlite")
    settle(MirrorService(feed, sink), feed)
    client = MlflowClient(mlflow_server.uri)
    run = run_of(client, feed, "run-sqlite")
    assert [value for _, _, value in curve(client, run.info.run_id, "loss")] == [3.0, 2.0]
    assert feed.links["run-sqlite"]["mlflow"]["url"] == ""
