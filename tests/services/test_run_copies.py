"""Run directories, bundles and removals with a real PostgreSQL."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of
from orchestrator.backends.storage import Storage
from orchestrator.cli import main
from orchestrator.directory import bundle, layout, metrics_file, record
from orchestrator.directory.service import SINK, DirectoryConfig, DirectoryService
from orchestrator.errors import NotFound, RunIsActive, UserError
from orchestrator.records import FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.store.errors import BadRecord, ModelDependsOnRun, RunIsThere
from orchestrator.store.store import Store
from tests.plugins.producers import Producer, fact, series

NOW = 1_760_000_000.0


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return NOW + self.time

    def monotonic(self) -> float:
        return self.time


@pytest.fixture(scope="module")
def urls(postgres: EmbeddedPostgres, template: str) -> Iterator[tuple[str, str]]:
    """Two databases with our schema, emptied for each test: that is quicker than new ones."""
    names = [f"d{os.urandom(5).hex()}" for _ in range(2)]
    for name in names:
        server_of.ensure_database(postgres.url("postgres"), name, template=template)
    yield postgres.url(names[0]), postgres.url(names[1])
    for name in names:
        server_of.drop_database(postgres.url("postgres"), name)


@contextmanager
def emptied(url: str) -> Iterator[Store]:
    store = Store(url, pool_size=4)
    with store._writing() as connection:
        connection.execute(
            "TRUNCATE runs, experiments, sweeps, metric_chunks, metric_summaries, metric_keys, sink_cursors, models"
            " RESTART IDENTITY CASCADE"
        )
    yield store
    store.close()


@pytest.fixture
def store(urls: tuple[str, str]) -> Iterator[Store]:
    with emptied(urls[0]) as made:
        yield made


@pytest.fixture
def other(urls: tuple[str, str]) -> Iterator[Store]:
    """That of another stack."""
    with emptied(urls[1]) as made:
        yield made


def open_run(store: Store, root: Path, **fields: Any) -> RunTicket:
    spec = RunSpec(experiment="digits", storage_url=str(root), lease=1e6, **fields)
    return store.open_attempt(spec, now=NOW, lease_seconds=1e6)


def whole_run(store: Store, root: Path) -> tuple[RunTicket, Producer]:
    """A finished run with something of everything, and files."""
    ticket = open_run(store, root, params={"lr": float("nan"), "n": 2**60}, tags={"team": "a,b\n"}, workers=2)
    producer = Producer(ticket)
    store.commit([producer.points([*series(50), (0, 50, float("nan")), (1, -5, float("-inf"))])])
    store.commit([Producer(ticket, rank=1).points(series(10))])
    checkpoint = {"id": "step-3", "uri": f"{ticket.directory}/checkpoints/step-3", "step": 3, "metrics": {"a": 1.5}}
    store.commit([
        producer.facts(
            fact(FactKind.checkpoint, **checkpoint), fact(FactKind.note, text="odd"),
            fact(FactKind.metric, name="val/accuracy", direction="max"),
            fact(FactKind.artifact, name="a.png", uri=f"{ticket.directory}/artifacts/a.png"),
            fact(FactKind.event, kind="k", message="m", details={"x": [1, None, {"y": 0.1}]}),
        )
    ])  # fmt: skip
    directory = Path(ticket.directory)
    for path, content in (("checkpoints/step-3/model.bin", b"\0\1" * 5000), ("logs/attempt-1/rank-0.log", b"hello\n")):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    store.transition(ticket.run, 1, RunStatus.finished, now=NOW + 60)
    return ticket, producer


def told(store: Store, run: str) -> tuple[record.Record, bytes]:
    with store.snapshot(run) as snapshot:
        return snapshot.record, b"".join(metrics_file.lines(snapshot.chunks()))


# -- the service that writes the directories ---------------------------------------------------------------------------


def service(store: Store, clock: Clock, **more: Any) -> DirectoryService:
    """One that writes at the first look what has ended."""
    return DirectoryService(store, clock=clock, **{"config": DirectoryConfig(settling=0.0), **more})


def test_a_finished_run_can_be_read_without_any_service(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path)
    clock = Clock()
    service(store, clock).step(clock.time)
    directory = Path(ticket.directory)
    found = json.loads((directory / layout.RECORD).read_text())
    assert found["run"]["status"] == "FINISHED"
    assert [row["name"] for row in found["params"]] == ["lr", "n"]
    assert [note["body"] for note in found["notes"]] == ["odd"]
    assert found["checkpoints"][0]["uri"] == "./checkpoints/step-3"
    assert {row["kind"] for row in found["events"]} == {"status", "k"}
    with (directory / layout.METRICS).open("rb") as stream:
        values = np.concatenate([b.values for b in metrics_file.read(stream) if (b.key, b.rank) == ("train/loss", 0)])
    assert values.tobytes() == store.points(ticket.run, "train/loss", rank=0).values.tobytes()
    assert (directory / layout.README).read_text().startswith("# A run")


def test_a_run_that_goes_on_is_written_once_a_minute_and_soon_after_its_end(store: Store, tmp_path: Path) -> None:
    ticket = open_run(store, tmp_path)
    producer, clock = Producer(ticket), Clock()
    writer = service(store, clock, config=DirectoryConfig())
    directory = Path(ticket.directory)

    def counted() -> int:
        return sum(row["count"] for row in json.loads((directory / layout.RECORD).read_text())["summaries"])

    writer.step(clock.time)
    assert not (directory / layout.RECORD).exists(), "a short one is written once, at its end"
    clock.time += 10
    writer.step(clock.time)
    assert counted() == 0
    store.commit([producer.points(series(4))])
    clock.time += 30
    writer.step(clock.time)
    assert counted() == 0
    clock.time += 31
    writer.step(clock.time)
    assert counted() == 4
    assert not (directory / layout.METRICS).exists()
    clock.time += 400  # small runs also get their points now and then
    store.commit([producer.points(series(4, start=4))])
    writer.step(clock.time)
    assert (directory / layout.METRICS).read_text().count("\n") == 9
    store.commit([producer.points(series(4, start=8))])
    store.transition(ticket.run, 1, RunStatus.failed, now=NOW)
    clock.time += 1
    writer.step(clock.time)
    assert counted() == 8, "what is on its way is waited for"
    clock.time += 2
    writer.step(clock.time)
    assert counted() == 12
    late = producer.points(series(4, start=12))
    store.commit([late])
    clock.time += 6
    writer.step(clock.time)
    assert (directory / layout.METRICS).read_text().count("\n") == 17


def test_a_storage_that_fails_is_warned_of_once_and_caught_up(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    broken, fine = (whole_run(store, tmp_path / name)[0] for name in ("broken", "fine"))
    clock, is_broken = Clock(), True

    def open_storage(url: str) -> Storage:
        if is_broken and "broken" in url:
            raise OSError("no space left on device")
        return Storage(url)

    writer = service(store, clock, open_storage=open_storage)
    for _ in range(20):
        writer.step(clock.time)
        clock.time += 3
    assert (Path(fine.directory) / layout.RECORD).exists()
    assert not (Path(broken.directory) / layout.RECORD).exists()
    assert [r.levelname for r in caplog.records if "cannot be written" in r.message] == ["WARNING"]
    assert writer.health()["aside"] == [broken.run]
    is_broken = False
    clock.time += 700
    writer.step(clock.time)
    assert (Path(broken.directory) / layout.RECORD).exists()
    assert [r.message for r in caplog.records if "again" in r.message]


def test_what_a_crash_left_undone_is_done_by_the_next_process(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path)
    clock = Clock()

    class Killed(BaseException):
        pass

    class Dying(Storage):
        def write_bytes(self, path: str, data: bytes) -> None:
            if path == layout.RECORD:
                raise Killed
            super().write_bytes(path, data)

    first = service(store, clock, open_storage=Dying)
    with pytest.raises(Killed):
        first.step(clock.time)
    store.unlock(SINK)
    assert not (Path(ticket.directory) / layout.RECORD).exists()
    service(store, clock).step(clock.time)
    assert (Path(ticket.directory) / layout.METRICS).exists()


def test_a_second_writer_waits_for_the_first(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path)
    assert store.try_lock(SINK)
    second = Store(store._url.render_as_string(hide_password=False))
    try:
        clock = Clock()
        writer = service(second, clock)
        writer.step(clock.time)
        assert not (Path(ticket.directory) / layout.RECORD).exists()
        store.unlock(SINK)
        writer.step(clock.time)
        assert (Path(ticket.directory) / layout.RECORD).exists()
    finally:
        second.close()


# -- removal -----------------------------------------------------------------------------------------------------------


def rows_of(store: Store, ticket: RunTicket) -> dict[str, int]:
    """How many rows each table has that names runs."""
    with store._writing() as connection:
        (number,) = connection.execute("SELECT number FROM runs WHERE id = %s", (ticket.run,)).fetchone()
        tables = connection.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()"
            " AND column_name IN ('run_id', 'run_number') AND table_name IN (SELECT tablename FROM pg_tables)"
        ).fetchall()
        return {
            table: connection.execute(
                f"SELECT count(*) FROM {table} WHERE {column} = %s", (ticket.run if column == "run_id" else number,)
            ).fetchone()[0]
            for table, column in tables
        }


def test_a_removed_run_is_gone_from_every_table_but_its_watermarks(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path)
    kept = whole_run(store, tmp_path)[0]
    before = rows_of(store, kept)
    store.save_cursor("mlflow", ticket.run, store.cursor("mlflow", ticket.run))
    assert min(rows_of(store, ticket)[table] for table in ("metric_chunks", "events", "sink_cursors", "params")) > 0
    store.remove_run(ticket.run, user="ada", now=NOW)
    left = {table: count for table, count in rows_of(store, ticket).items() if count}
    assert set(left) == {"producers"}
    assert rows_of(store, kept) == before
    assert [row.run for row in store.runs()] == [kept.run]
    with pytest.raises(NotFound):
        store.run(ticket.run)
    with pytest.raises(NotFound), store.snapshot(ticket.run):
        pass


def test_what_comes_late_for_a_removed_run_is_acknowledged_and_dropped(store: Store, tmp_path: Path) -> None:
    ticket, producer = whole_run(store, tmp_path)
    kept, other_producer = whole_run(store, tmp_path)
    store.remove_run(ticket.run, user="", now=NOW)
    late = producer.points(series(5))
    ended = producer.facts(fact(FactKind.status, status="FAILED"), fact(FactKind.note, text="late"))
    of_kept = other_producer.points(series(3, start=100))
    never_seen = Producer(ticket, rank=7).points(series(2))
    marks = store.commit([late, ended, of_kept, never_seen])
    assert marks[producer.id, late.stream] == late.last
    assert marks[producer.id, ended.stream] == ended.last
    assert marks[never_seen.producer, never_seen.stream] == never_seen.last
    assert {table for table, count in rows_of(store, ticket).items() if count} == {"producers"}
    assert len(store.points(kept.run, "train/loss", rank=0)) == 28


def test_a_commit_at_the_same_time_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    """Points are committed for as long as the removal takes; whichever of them comes first, nothing is left."""
    for _ in range(5):
        ticket, producer = whole_run(store, tmp_path)
        stop = threading.Event()
        counted: list[int] = []

        def send(producer: Producer = producer, stop: threading.Event = stop, counted: list[int] = counted) -> None:
            while not stop.is_set():
                store.commit([producer.points(series(20))])
                counted.append(1)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            deadline = time.monotonic() + 10
            while not counted and time.monotonic() < deadline:
                stop.wait(0.001)
            store.remove_run(ticket.run, user="", now=NOW)
        finally:
            stop.set()
            sender.join()
        assert counted
        assert {table for table, count in rows_of(store, ticket).items() if count} == {"producers"}


def test_a_run_is_not_removed_under_who_copies_it(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path)
    remover = threading.Thread(target=lambda: store.remove_run(ticket.run, user="", now=NOW))
    with store.snapshot(ticket.run) as snapshot:
        remover.start()
        deadline = time.monotonic() + 10
        while not waits_for_lock(store) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waits_for_lock(store)
        assert sum(len(chunk.values) for chunk in snapshot.chunks()) == snapshot.points
    remover.join(timeout=10)
    with pytest.raises(NotFound):
        store.run(ticket.run)


def test_a_run_whose_removal_fails_still_gets_its_record(store: Store, tmp_path: Path) -> None:
    """Who removes it waits for who copies it; for the time of that nobody else can read the run."""
    ticket, _ = whole_run(store, tmp_path)
    clock = Clock()
    writer = service(store, clock)
    failed: list[Exception] = []

    def remove() -> None:
        try:
            store.remove_run(ticket.run, user="", now=NOW)
        except ModelDependsOnRun as error:
            failed.append(error)

    with store._writing() as connection:
        connection.execute("INSERT INTO models (project, name) VALUES ('p', 'm')")
        connection.execute(
            "INSERT INTO model_versions (model_id, version, run_id, checkpoint_id) SELECT id, 1, %s, 'step-3'"
            " FROM models WHERE name = 'm'",
            (ticket.run,),
        )
    remover = threading.Thread(target=remove)
    with store.snapshot(ticket.run):
        remover.start()
        deadline = time.monotonic() + 10
        while not waits_for_lock(store) and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.step(clock.monotonic())
        assert not (Path(ticket.directory) / layout.RECORD).exists()
    remover.join(timeout=10)
    assert failed
    clock.time += 60
    writer.step(clock.monotonic())
    assert (Path(ticket.directory) / layout.RECORD).exists()
    store.unlock(SINK)


def waits_for_lock(store: Store) -> bool:
    with store._writing() as connection:
        found = connection.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return found.fetchone() != (0,)


def test_an_active_run_is_refused_unless_forced(store: Store, tmp_path: Path) -> None:
    ticket = open_run(store, tmp_path)
    with pytest.raises(RunIsActive):
        store.remove_run(ticket.run, user="", now=NOW)
    store.remove_run(ticket.run, user="", now=NOW, force=True)
    assert store.cancel_requested([ticket.run]) == {ticket.run}
    assert store.running_attempts() == {}


def test_a_run_behind_a_registered_model_stays(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path)
    with store._writing() as connection:
        connection.execute("INSERT INTO models (project, name) VALUES ('default', 'digits')")
        connection.execute(
            "INSERT INTO model_versions (model_id, version, run_id, checkpoint_id)"
            " SELECT id, 1, %s, 'step-3' FROM models",
            (ticket.run,),
        )
    with pytest.raises(ModelDependsOnRun, match="digits version 1"):
        store.remove_run(ticket.run, user="", now=NOW)
    assert len(store.points(ticket.run, "train/loss", rank=0)) == 26


# -- bundles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.tar.gz", "run.tar", "run"])
def test_a_run_travels_as_one_bundle(store: Store, other: Store, tmp_path: Path, name: str) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    before, points = told(store, ticket.run)
    written = bundle.write(store, ticket.run, tmp_path / name)
    assert (written.files, written.points) == (4, 62)
    taken = bundle.read(other, tmp_path / name, str(tmp_path / "there"))
    assert taken.is_new
    assert Path(taken.directory) == tmp_path / "there" / "digits" / ticket.run
    assert (Path(taken.directory) / "checkpoints/step-3/model.bin").read_bytes() == b"\0\1" * 5000
    after, points_after = told(other, ticket.run)
    assert points_after == points
    assert record.likeness(after) == record.likeness(before)
    assert {**after, "run": {**after["run"], "directory": ""}} == {
        **record.placed(record.movable(before), taken.directory), "run": {**before["run"], "directory": ""}
    }  # fmt: skip
    assert other.checkpoints(ticket.run)[0].uri == f"{taken.directory}/checkpoints/step-3"
    assert not list((tmp_path / "there").glob(".import*"))
    assert not bundle.read(other, tmp_path / name, str(tmp_path / "there")).is_new
    other.set_link(ticket.run, "mlflow", {"run_id": "x"})  # a mirror's note makes it no other run
    assert not bundle.read(other, tmp_path / name, str(tmp_path / "there")).is_new
    other.commit([Producer(ticket, rank=3).points(series(1))])
    with pytest.raises(RunIsThere):
        bundle.read(other, tmp_path / name, str(tmp_path / "there"))


VALUES = st.one_of(st.floats(), st.sampled_from([float("nan"), float("inf"), -0.0]))
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(-(2**40), 2**40), VALUES), min_size=1, max_size=30)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)


@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a try takes a tenth of a second, shrinking takes thousands
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batches=st.lists(st.tuples(st.integers(0, 2), ROWS), max_size=4),
    params=st.dictionaries(TEXT, st.one_of(st.floats(), st.integers(-(2**63), 2**63), TEXT, st.none(), st.booleans())),
    tags=st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_export_import_export_gives_the_same(
    store: Store, other: Store, tmp_path: Path, batches: list[Any], params: dict[str, Any], tags: dict[str, str]
) -> None:
    ticket = open_run(store, tmp_path / "here", params=params, tags=tags)
    producers = [Producer(ticket, rank) for rank in range(3)]
    for rank, rows in batches:
        store.commit([producers[rank].points(rows)])
    store.transition(ticket.run, 1, RunStatus.finished, now=NOW + 60)
    bundle.write(store, ticket.run, tmp_path / f"{ticket.run}.tar")
    bundle.read(other, tmp_path / f"{ticket.run}.tar", str(tmp_path / "there"))
    (before, points), (after, points_after) = told(store, ticket.run), told(other, ticket.run)
    assert points_after == points
    for part in record.PARTS:
        if part not in ("run", "metrics"):
            assert after[part] == before[part]
    for key in ("train/loss", "val/accuracy"):
        one, two = store.points(ticket.run, key), other.points(ticket.run, key)
        assert [a.tobytes() for a in (one.steps, one.times, one.values, one.ranks, one.attempts)] == [
            b.tobytes() for b in (two.steps, two.times, two.values, two.ranks, two.attempts)
        ]


def test_a_run_that_goes_on_has_no_bundle(store: Store, tmp_path: Path) -> None:
    ticket = open_run(store, tmp_path / "here")
    with pytest.raises(bundle.StillRunning):
        bundle.write(store, ticket.run, tmp_path / "run.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_checkpoints_can_be_left_out(store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run", with_checkpoints=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "logs").is_dir()


def repacked(source: Path, target: Path, change: Callable[[tarfile.TarInfo, bytes], list[tuple[Any, bytes]]]) -> Path:
    with tarfile.open(source) as old, tarfile.open(target, "w:gz") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            for made, data in change(member, content.read()):
                made.size = len(data)
                new.addfile(made, io.BytesIO(data))
    return target


def named(name: str, member: tarfile.TarInfo, **more: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(made, key, value)
    return made


CHANGES: dict[str, Callable[[tarfile.TarInfo, bytes], list[tuple[Any, bytes]]]] = {
    "a changed file": lambda m, d: [(m, d.replace(b"hello", b"HELLO"))],
    "a file more": lambda m, d: (
        [(named(f"{m.name}.x", m), b""), (m, d)] if m.name.endswith("record.json") else [(m, d)]
    ),
    "a file less": lambda m, d: [] if m.name.endswith("rank-0.log") else [(m, d)],
    "no manifest": lambda m, d: [] if m.name.endswith("manifest.json") else [(m, d)],
    "a manifest of no files": lambda m, d: [
        (m, json.dumps(json.loads(d) | {"files": []}).encode() if m.name.endswith("manifest.json") else d)
    ],
    "a way out": lambda m, d: [(named("../../evil", m), b"x"), (m, d)],
    "a way out below": lambda m, d: [(named(f"{m.name.split('/')[0]}/../../evil", m), b"x"), (m, d)],
    "an absolute path": lambda m, d: [(named("/tmp/evil", m), b"x"), (m, d)],
    "a link": lambda m, d: [(named(f"{m.name}.l", m, type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""), (m, d)],
    "a device": lambda m, d: [(named(f"{m.name}.d", m, type=tarfile.CHRTYPE), b""), (m, d)],
    "a file twice": lambda m, d: [(m, d), (m, d)],
    "another protocol": lambda m, d: [(m, d.replace(b'"protocol": 1', b'"protocol": 9'))],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_bundle_changes_nothing(store: Store, other: Store, tmp_path: Path, change: str) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run.tar.gz")
    bad = repacked(tmp_path / "run.tar.gz", tmp_path / "bad.tar.gz", CHANGES[change])
    refused(other, bad, tmp_path)


def refused(other: Store, bad: Path, tmp_path: Path) -> None:
    with pytest.raises(bundle.BadBundle, match="Nothing was changed"):
        bundle.read(other, bad, str(tmp_path / "there"))
    assert other.runs() == []
    left = [path for path in (tmp_path / "there").rglob("*") if path.is_file()] if (tmp_path / "there").exists() else []
    assert left == []
    assert not list(tmp_path.rglob("evil"))


def test_a_cut_bundle_changes_nothing(store: Store, other: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run.tar.gz")
    whole = (tmp_path / "run.tar.gz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) * 4 // 5):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:length])
        refused(other, tmp_path / "cut.tar.gz", tmp_path)
    (tmp_path / "cut.tar.gz").write_bytes(b"no archive at all")
    refused(other, tmp_path / "cut.tar.gz", tmp_path)


def test_points_that_do_not_fit_the_record_are_refused(store: Store, other: Store, tmp_path: Path) -> None:
    """A bundle that somebody made by hand: every hash is right, the content is not."""
    ticket, _ = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run")
    metrics, manifest = tmp_path / "run" / layout.METRICS, tmp_path / "run" / bundle.MANIFEST
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    about = json.loads(manifest.read_text())
    data = metrics.read_bytes()
    about["files"][layout.METRICS] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(about))
    refused(other, tmp_path / "run", tmp_path)


def test_an_import_that_was_killed_is_repeated(store: Store, other: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run.tar.gz")
    bundle.read(other, tmp_path / "run.tar.gz", str(tmp_path / "there"))
    # Killed between the files and the database: the files are there, the rows are not, half of the next unpacking is.
    other.remove_run(ticket.run, user="", now=NOW)
    other.finish_removal(ticket.run)
    (tmp_path / "there" / f".import-{ticket.run}").mkdir()
    assert bundle.read(other, tmp_path / "run.tar.gz", str(tmp_path / "there")).is_new
    assert told(other, ticket.run)[1] == told(store, ticket.run)[1]
    assert not list((tmp_path / "there").glob(".import*"))


def test_files_of_another_run_are_not_overwritten(store: Store, other: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run.tar.gz")
    mine = tmp_path / "there" / "digits" / ticket.run / "logs" / "attempt-1" / "rank-0.log"
    mine.parent.mkdir(parents=True)
    mine.write_text("something else")
    with pytest.raises(bundle.BadBundle, match="another file"):
        bundle.read(other, tmp_path / "run.tar.gz", str(tmp_path / "there"))
    assert mine.read_text() == "something else"
    assert other.runs() == []


def test_a_spool_that_was_left_adds_nothing_to_an_imported_run(store: Store, tmp_path: Path) -> None:
    ticket, producer = whole_run(store, tmp_path / "here")
    bundle.write(store, ticket.run, tmp_path / "run.tar.gz")
    points = told(store, ticket.run)[1]
    store.remove_run(ticket.run, user="", now=NOW)
    with pytest.raises(RunIsThere, match="orc rm"):
        bundle.read(store, tmp_path / "run.tar.gz", str(tmp_path / "here"))
    store.finish_removal(ticket.run)
    dropped = producer.points(series(5))
    store.commit([dropped])
    bundle.read(store, tmp_path / "run.tar.gz", str(tmp_path / "here"))
    store.commit([dropped])
    assert told(store, ticket.run)[1] == points


def test_a_record_of_a_newer_version_is_refused(store: Store, other: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "here")
    found, _ = told(store, ticket.run)
    for part, row in (("run", found["run"]), ("params", found["params"][0])):
        newer = {**found, part: {**row, "mood": 1}} if part == "run" else {**found, part: [{**row, "mood": 1}]}
        with pytest.raises(BadRecord, match="mood"):
            other.restore_run(newer, [])
    assert other.runs() == []


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def orc(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    home = tmp_path / "home"
    home.mkdir()
    url = store._url.render_as_string(hide_password=False)
    Stack(home=str(home), database_url=url, storage_url=str(home / "runs")).save()

    def call(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main.main(["--home", str(home), *words]) == code
        shown = capsys.readouterr()
        return shown.out if code == 0 else shown.out + shown.err

    return call


def test_rm_says_what_goes_and_asks(orc: Callable[..., str], store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "home" / "runs")
    store.set_link(ticket.run, "mlflow", {"run_id": "m1", "url": "http://mlflow/m1"})
    planned = json.loads(orc("rm", ticket.run, "--dry-run", "--json"))["runs"][0]
    assert (planned["points"], planned["files"], planned["size_bytes"]) == (62, 2, 10_006)
    assert "--yes" in orc("rm", ticket.run, code=2)
    assert store.run(ticket.run).run == ticket.run
    shown = orc("rm", ticket.run, "--yes")
    assert "62 points, 2 files" in shown
    assert "its copy in MLflow stays: http://mlflow/m1" in shown
    assert not Path(ticket.directory).exists()
    assert "There is no run" in orc("rm", ticket.run, "--yes", code=2)


def test_rm_finishes_what_a_crash_left(orc: Callable[..., str], store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "home" / "runs")
    store.remove_run(ticket.run, user="", now=NOW)  # and killed here
    assert Path(ticket.directory).exists()
    assert json.loads(orc("rm", ticket.run, "--yes", "--json"))["runs"][0]["status"] == "REMOVED"
    assert not Path(ticket.directory).exists()
    assert store.half_removed(ticket.run) is None


def test_rm_can_keep_the_files_and_refuses_what_is_active(
    orc: Callable[..., str], store: Store, tmp_path: Path
) -> None:
    ticket, _ = whole_run(store, tmp_path / "home" / "runs")
    active = open_run(store, tmp_path / "home" / "runs")
    assert "orc cancel" in orc("rm", ticket.run, active.run, "--yes", code=2)
    assert store.run(ticket.run).run == ticket.run
    orc("rm", ticket.run, "--keep-files", "--yes")
    assert (Path(ticket.directory) / "logs").exists()
    orc("rm", active.run, "--force", "--yes")
    assert store.runs() == []


def test_export_and_import_are_told_as_documents(orc: Callable[..., str], store: Store, tmp_path: Path) -> None:
    ticket, _ = whole_run(store, tmp_path / "home" / "runs")
    target = str(tmp_path / "run.tar.gz")
    assert json.loads(orc("export", ticket.run, "-o", target, "--json"))["points"] == 62
    assert "exists already" in orc("export", ticket.run, "-o", target, code=2)
    assert not json.loads(orc("import", target, "--json"))["is_new"]
    assert "nothing was changed" in orc("import", target)
    orc("rm", ticket.run, "--yes")
    assert json.loads(orc("import", target, "--json"))["is_new"]
    assert len(store.points(ticket.run, "train/loss", rank=0)) == 26
    assert "is no id" not in orc("import", str(tmp_path / "none"), code=2)


def test_logs_are_read_from_the_directories_when_the_database_is_down(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket, _ = whole_run(store, tmp_path / "runs")
    clock = Clock()
    service(store, clock).step(clock.time)
    url = "postgresql+psycopg://orc@/orc?host=/nowhere"
    Stack(home=str(tmp_path), database_url=url, storage_url=str(tmp_path / "runs")).save()
    for reference in ("last", ticket.run, ticket.run[:15], ticket.name):
        for more in ([], ["--follow"]):
            assert main.main(["--home", str(tmp_path), "logs", reference, *more]) == 0
            shown = capsys.readouterr()
            assert shown.out == "rank-0 | hello\n"
            assert "the database is not up" in shown.err
    assert main.main(["--home", str(tmp_path), "logs", "nobody"]) == 2
    assert "no directory of a run 'nobody'" in capsys.readouterr().err


def test_logs_of_a_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Stack(home=str(tmp_path)).save()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tracker.jsonl").write_text('{"time": 1.5, "level": "INFO", "logger": "a", "message": "up"}\n')
    (tmp_path / "logs" / "mlflow.log").write_text("plain\n")
    assert main.main(["--home", str(tmp_path), "logs", "--service", "tracker"]) == 0
    assert capsys.readouterr().out.endswith(",500 INFO a up\n")
    assert main.main(["--home", str(tmp_path), "logs", "--service", "mlflow"]) == 0
    assert capsys.readouterr().out == "plain\n"
    assert main.main(["--home", str(tmp_path), "logs", "--service", "trackr"]) == 2
    assert "Did you mean 'tracker'" in capsys.readouterr().err


def test_errors_of_this_part_are_the_users_to_mend() -> None:
    assert all(issubclass(kind, UserError) for kind in (bundle.BadBundle, RunIsThere, BadRecord, ModelDependsOnRun))
