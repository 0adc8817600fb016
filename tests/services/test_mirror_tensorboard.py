"""Event files: TensorBoard's own reader finds what was logged, whatever happened in between."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util.tensor_util import make_ndarray

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import open_sink
from orchestrator.backends import postgres as server_of
from orchestrator.backends.sinks import RunFacts, Series, SinkUnavailable, Target
from orchestrator.backends.tensorboard import FILE_NAME, TensorboardSink
from orchestrator.directory.service import DirectoryService
from orchestrator.records import RunStatus
from orchestrator.store.store import Store
from orchestrator.tracking.mirror import MirrorService, Sink
from orchestrator.tracking.mirrors import Mirrors
from tests.plugins.mirror_parts import START, MemoryFeed
from tests.plugins.mirror_process import EXPERIMENT
from tests.plugins.mlflow_server import MlflowServer
from tests.plugins.store_producer import Producer, opened, settle

Points = list[tuple[int, float, bytes]]
"""Step, wall time, the 32 bits of the value; in the order of the file."""


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed()


@pytest.fixture
def store(postgres: EmbeddedPostgres, template: str) -> Iterator[Store]:
    """Of the test's own: a mirror copies every run that it finds."""
    name = f"t{uuid.uuid4().hex[:12]}"
    server_of.ensure_database(postgres.url("postgres"), name, template=template)
    store = Store(postgres.url(name))
    yield store
    store.close()
    server_of.drop_database(postgres.url("postgres"), name)


def copied(feed: MemoryFeed, sink: TensorboardSink) -> None:
    """All that is there, by a mirror of its own; then the sink is let go."""
    mirror, begun = MirrorService(feed, sink), time.monotonic()
    while mirror.step(time.monotonic()) or mirror.lag().runs:
        assert time.monotonic() - begun < 30, mirror.health()
        time.sleep(0.01)  # a run with little to copy waits a moment
    mirror.close()


def reader(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def curve(folder: Path, key: str) -> Points:
    return [(e.step, e.wall_time, np.float32(e.value).tobytes()) for e in reader(folder).Scalars(key)]


def expected(values: list[float], first: int = 0) -> Points:
    with np.errstate(over="ignore"):
        return [
            (first + i, round((START + (first + i) / 10) * 1000) / 1000, np.float32(value).tobytes())
            for i, value in enumerate(values)
        ]


def texts(folder: Path, name: str) -> list[str]:
    return [make_ndarray(event.tensor_proto).item().decode() for event in reader(folder).Tensors(name)]


def test_tensorboard_reads_every_point_with_its_step_time_and_value(feed: MemoryFeed, tmp_path: Path) -> None:
    odd = [1 / 3, math.nan, math.inf, -math.inf, 5e-324, -0.0, 1e300, 16777217.0]
    many = [math.sin(i) for i in range(12_000)]
    feed.open("r1", params={"lr": 0.1, "layers": [1, 2], "amp": True}, notes=["A | thought."], config={"lr": 0.1})
    feed.log("r1", "odd", odd)
    for first in range(0, len(many), 3000):
        feed.log("r1", "train/loss", many[first : first + 3000], first_step=first)
    copied(feed, TensorboardSink(tmp_path))
    feed.log("r1", "odd", [1.0], first_step=8)
    feed.end("r1")
    copied(feed, TensorboardSink(tmp_path))
    folder = tmp_path / "digits" / "r1"
    assert curve(folder, "odd") == expected([*odd, 1.0])
    assert curve(folder, "train/loss") == expected(many)
    assert set(reader(folder).Tags()["scalars"]) == {"odd", "train/loss"}
    assert "layers | [1, 2]" in texts(folder, "orc/params")[0]
    running, over = texts(folder, "orc/run")
    assert "RUNNING" in running
    assert "FINISHED" in over
    assert "A \\| thought." in over
    assert texts(folder, "orc/config") == ["    lr: 0.1\n"]
    plugins = reader(folder).PluginTagToContent("hparams")
    begun = hparams.parse_session_start_info_plugin_data(plugins[hparams.SESSION_START_INFO_TAG])
    assert (begun.hparams["lr"].number_value, begun.hparams["amp"].bool_value) == (0.1, True)
    ended = hparams.parse_session_end_info_plugin_data(plugins[hparams.SESSION_END_INFO_TAG])
    assert ended.end_time_secs == START + 100
    assert feed.links["r1"]["tensorboard"]["url"] == str(folder)


def test_attempts_are_runs_below_the_run(feed: MemoryFeed, tmp_path: Path) -> None:
    feed.open("r1")
    feed.log("r1", "loss", [1.0, 2.0, 3.0])
    feed.change("r1", attempt=2)
    feed.log("r1", "loss", [5.0, 6.0], first_step=2, attempt=2)
    feed.end("r1")
    copied(feed, TensorboardSink(tmp_path))
    folder = tmp_path / "digits" / "r1"
    assert curve(folder / "attempt-1", "loss") == expected([1.0, 2.0, 3.0])
    assert curve(folder / "attempt-2", "loss") == expected([5.0, 6.0], first=2)
    assert [step for step, _, _ in curve(folder, "loss")] == [0, 1, 2, 2, 3]


def test_what_was_written_and_not_noted_is_taken_back(feed: MemoryFeed, tmp_path: Path) -> None:
    """A process that died after writing, one that died within a write, and one whose database forgot everything."""
    feed.open("r1", params={"lr": 0.1})
    feed.log("r1", "loss", [1.0, 2.0])
    copied(feed, TensorboardSink(tmp_path))
    file = tmp_path / "digits" / "r1" / FILE_NAME
    noted = file.read_bytes()
    feed.log("r1", "loss", [3.0], first_step=2)
    feed.forgets_cursors = True
    sink = TensorboardSink(tmp_path)
    MirrorService(feed, sink).step(time.monotonic())
    sink.close()
    assert len(file.read_bytes()) > len(noted)
    feed.forgets_cursors = False
    copied(feed, TensorboardSink(tmp_path))
    assert file.read_bytes().startswith(noted)
    assert curve(file.parent, "loss") == expected([1.0, 2.0, 3.0])
    with file.open("ab") as torn:
        torn.write(b"half a record")
    feed.log("r1", "loss", [4.0], first_step=3)
    copied(feed, TensorboardSink(tmp_path))
    assert curve(file.parent, "loss") == expected([1.0, 2.0, 3.0, 4.0])
    feed._cursors.clear()
    copied(feed, TensorboardSink(tmp_path))
    assert curve(file.parent, "loss") == expected([1.0, 2.0, 3.0, 4.0])
    assert len(texts(file.parent, "orc/params")) == 1


@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_a_file_that_somebody_touched_is_written_anew(feed: MemoryFeed, tmp_path: Path, damage: str) -> None:
    feed.open("r1")
    feed.log("r1", "loss", [1.0, 2.0])
    mirror = MirrorService(feed, TensorboardSink(tmp_path))
    mirror.step(time.monotonic())
    file = tmp_path / "digits" / "r1" / FILE_NAME
    assert curve(file.parent, "loss") == expected([1.0, 2.0])
    file.unlink() if damage == "removed" else os.truncate(file, 10)
    feed.log("r1", "loss", [3.0], first_step=2)
    begun = time.monotonic()
    while mirror.step(time.monotonic()) or mirror.lag().runs:
        assert time.monotonic() - begun < 30, mirror.health()
    assert curve(file.parent, "loss") == expected([1.0, 2.0, 3.0])


def test_one_process_writes_and_another_waits_for_it(tmp_path: Path) -> None:
    first, second = TensorboardSink(tmp_path), TensorboardSink(tmp_path)
    first.ping()
    with pytest.raises(SinkUnavailable, match="another process writes"):
        second.ensure_run(RunFacts(id="r1", experiment="digits", name="x"))
    first.close()
    second.ping()
    second.close()


def test_mirrors_that_are_killed_between_two_calls_miss_and_double_nothing(store: Store, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    url = store._url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.mirror_process", url, "tensorboard", str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    runs = [line["run"] for line in lines if "run" in line]
    signals = [line["signal"] for line in lines if "signal" in line]
    assert signals == [signal.SIGKILL] * (len(runs) - 1) + [0], done.stderr
    assert len(runs) > 5
    settle(MirrorService(store, TensorboardSink(tmp_path)), store, "tensorboard")
    for run in runs:
        folder = tmp_path / EXPERIMENT / run
        for where, attempts in ((folder, (1, 2)), (folder / "attempt-1", (1,)), (folder / "attempt-2", (2,))):
            stored = [store.points(run, "lr", rank=0, attempt=attempt) for attempt in attempts]
            assert curve(where, "lr") == [
                (int(step), round(float(at) * 1000) / 1000, np.float32(value).tobytes())
                for points in stored
                for step, at, value in zip(points.steps, points.times, points.values, strict=True)
            ]
            assert len(curve(where, "loss")) == sum(map(len, stored))
            tags = [value.tag for event in events(where) for value in event.summary.value]
            assert tags.count(hparams.SESSION_START_INFO_TAG) == tags.count("orc/params") == (where == folder)


def events(folder: Path) -> list[Any]:
    from tensorboard.compat.proto.event_pb2 import Event

    return [Event.FromString(record) for record in RawEventFileLoader(str(folder / FILE_NAME)).Load()]


class Hanging(TensorboardSink):
    """Every write hangs until `go_on` is set, as on a network disk that is gone."""

    go_on = threading.Event()
    hangs = threading.Event()

    def log_metrics(self, target: Target, series: Any) -> None:
        self.hangs.set()
        self.go_on.wait()
        super().log_metrics(target, series)


def await_(condition: Any, what: Any, patience: float = 30.0) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < patience, what()
        time.sleep(0.05)


@contextmanager
def copying(url: str, mirrors: Mirrors) -> Iterator[DirectoryService]:
    """Mirrors and the runs' directories at work, each in a thread of its own."""
    feed = Store(url)
    directories = DirectoryService(feed)
    thread = threading.Thread(target=directories.run, daemon=True)
    thread.start()
    mirrors.start()
    yield directories
    directories.stop()
    mirrors.stop(patience=30)
    thread.join(30)
    feed.close()


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_sink_that_hangs_or_fails_slows_nobody_and_catches_up(
    trouble: str, store: Store, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    url = store._url.render_as_string(hide_password=False)
    logdir, hanging = tmp_path / "tb", type("OneHanging", (Hanging,), {"go_on": threading.Event()})
    if trouble == "fails":
        logdir.write_text("a file where the directory should be")

    def opener(name: str, settings: Mapping[str, Any]) -> Sink:
        return hanging(**settings) if name == "tensorboard" and trouble == "hangs" else open_sink(name, settings)

    sinks = {"mlflow": {"tracking_uri": mlflow_server.uri}, "tensorboard": {"directory": str(logdir)}}
    stores = [Store(url) for _ in sinks]
    mirrors = Mirrors(iter(stores).__next__, sinks, open_sink=opener)
    ticket = opened(store, f"slow-{trouble}", storage_url=str(tmp_path / "runs"))
    producer, client = Producer(store, ticket), MlflowClient(mlflow_server.uri)
    for first in range(0, 300, 100):
        producer.log({"loss": [float(i) for i in range(first, first + 100)]}, range(first, first + 100))

    def lags() -> dict[str, Any]:
        return {lag.sink: lag for lag in store.sink_lags()}

    def is_in_mlflow(steps: int) -> bool:
        link = store.run(ticket.run).links.get("mlflow")
        return bool(link) and len(client.get_metric_history(link["run_id"], "loss")) == steps

    with copying(url, mirrors) as directories:
        await_(lambda: is_in_mlflow(300), mirrors.health)
        if trouble == "hangs":
            assert hanging.hangs.wait(30)
        else:
            await_(lambda: lags()["tensorboard"].state == "open", mirrors.health)
            assert "File exists" in lags()["tensorboard"].error
        producer.log({"loss": [1.0] * 100}, range(300, 400))
        store.transition(ticket.run, 1, RunStatus.finished, now=START + 90)
        await_(lambda: is_in_mlflow(400), mirrors.health)
        await_(lambda: (Path(ticket.directory) / "metrics.csv").exists(), directories.health)
        assert lags()["mlflow"].state == "closed"
        await_(lambda: (lags()["mlflow"].points, lags()["directory"].points) == (0, 0), lags)
        of_run = {lag.sink: lag for lag in store.sink_lags(ticket.run)}
        assert (of_run["tensorboard"].points, of_run["tensorboard"].runs) == (400, 1)
        assert of_run["tensorboard"].seconds == pytest.approx(39.9)
        hanging.go_on.set()
        if trouble == "fails":
            logdir.unlink()
        await_(lambda: lags()["tensorboard"].runs == 0, mirrors.health, patience=60)
    for one in stores:
        one.close()
    folder = logdir / f"slow-{trouble}" / ticket.run
    assert [step for step, _, _ in curve(folder, "loss")] == list(range(400))


def test_series_of_equal_bytes_are_written_as_they_come(tmp_path: Path) -> None:
    """Two points that are the same are two: nothing here takes one for the other."""
    sink = TensorboardSink(tmp_path)
    target = sink.ensure_run(RunFacts(id="r1", experiment="e", name="x", start_ms=1))
    assert target.created
    assert sink.rewind(target, None)
    one = Series(name="a", steps=np.zeros(2, np.int64), times_ms=np.zeros(2, np.int64), values=np.ones(2))
    sink.log_metrics(target, [one])
    mark = sink.mark(target)
    sink.log_metrics(target, [one])
    assert len(curve(tmp_path / target.id, "a")) == 4
    assert sink.rewind(target, mark)
    assert len(curve(tmp_path / target.id, "a")) == 2
    assert not sink.rewind(target, {"size": 10_000, "texts": {}})
    sink.close()
