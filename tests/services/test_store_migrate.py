"""From nothing to the newest schema, to a file and back."""

from __future__ import annotations

import math
import stat
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of
from orchestrator.errors import ConfigError, SchemaMismatch, ServiceUnavailable
from orchestrator.records import TRANSITIONS, Batch, FactKind, RunSpec, RunStatus, Stream
from orchestrator.store import chunks, migrate
from orchestrator.store.binary import FLOAT8, INT4, elements
from orchestrator.store.store import Store
from orchestrator.store.tables import HEAD, VERSION_TABLE, metadata
from orchestrator.store.views import FeedPosition, SinkCursor
from tests.plugins.producers import NOW, Producer, fact, series


def execute(url: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(server_of.conninfo(url), autocommit=True) as connection:
        cursor = connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


@pytest.mark.filterwarnings("ignore:Did not recognize type 'xid8'")
def test_an_empty_database_is_brought_to_the_head(database_url: str) -> None:
    assert migrate.status(database_url).found == ""
    store = Store(database_url)
    with pytest.raises(SchemaMismatch, match="orc db upgrade"):
        store.check_schema()
    with pytest.raises(SchemaMismatch, match="orc db upgrade"):
        store.runs()
    assert migrate.upgrade(database_url).is_current
    assert migrate.upgrade(database_url).is_current
    store.check_schema()
    assert store.runs() == []
    store.close()
    with create_engine(database_url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, metadata) == []
    moves = execute(database_url, "SELECT old_status, new_status FROM run_transitions")
    assert set(moves) == {(old.value, new.value) for old, allowed in TRANSITIONS.items() for new in allowed}


EARLIER = {
    "steps": [[0, 1, 1], [-3, 0, 2**31 - 5000], [7]],
    "times": [[0, 1000, 0], [0, 0, 5], [0]],
    "values": [[0.5, math.nan, -math.inf], [1e300, 0.0, -0.0], [2.0]],
}
"""Rows of metric_chunks as versions before 0003 had them, of one key; the first difference counts from 100 and NOW."""


def filled_before(url: str) -> str:
    """A run in a database of one of the first two versions."""
    execute(url, "INSERT INTO experiments (project, name) VALUES ('p', 'digits')")
    execute(url, "INSERT INTO runs (id, experiment_id, project, name, status) VALUES ('r', 1, 'p', 'n', 'RUNNING')")
    execute(url, "INSERT INTO attempts (run_id, attempt, status) VALUES ('r', 1, 'RUNNING')")
    execute(url, "INSERT INTO sweeps (id, project, who) VALUES ('s', 'p', 'me')")
    execute(url, "INSERT INTO trials (sweep_id, number, run_id) VALUES ('s', 3, 'r')")
    execute(url, "UPDATE runs SET attempt = 1, sweep_id = 's'")
    execute(url, "INSERT INTO producers (uuid, run_id, attempt, rank, points) VALUES (%s, 'r', 1, 0, 7)", uuid.uuid4())
    execute(url, "INSERT INTO metric_keys (name) VALUES ('train/loss')")
    for steps, times, values in zip(*EARLIER.values(), strict=True):
        packed = [elements(np.array(steps), INT4), elements(np.array(times), INT4), elements(np.array(values), FLOAT8)]
        execute(
            url,
            "INSERT INTO metric_chunks (run_number, producer_id, first_step, last_step, first_time_ms, key_id, attempt,"
            " rank, n, crc, steps, times, values) VALUES (1, 1, 100, %s, %s, 1, 1, 0, %s, %s, %s, %s, %s)",
            100 + sum(steps), int(NOW * 1000), len(steps), chunks.checksum(b"", b"", *packed), steps, times, values,
        )  # fmt: skip
    execute(
        url,
        "INSERT INTO metric_summaries (run_number, key_id, rank, first_attempt, last_attempt, count, nan_count,"
        " inf_count, sum, first_value, first_step, first_time_ms, last_value, last_step, last_time_ms, min_value,"
        " min_step, max_value, max_step) VALUES (1, 1, 0, 1, 1, 7, 1, 1, 1e300, .5, 100, 0, 2, 107, 0, '-inf', 102,"
        " 1e300, 97)",
    )
    return "r"


@pytest.mark.parametrize("version", ["0001", "0002"])
def test_what_an_earlier_schema_holds_stays(
    version: str, owned: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A database of an earlier version, and its backup, become those of this one."""
    url, other = owned
    with monkeypatch.context() as before:
        real = command.upgrade
        before.setattr(command, "upgrade", lambda config, _: real(config, version))
        assert migrate.upgrade(url).found == version
    run = filled_before(url)
    tables = ("runs", "attempts", "producers", "metric_keys", "metric_summaries", "experiments")
    new = "{xid,alive_at,tracker,lost,is_final}"
    rows = {table: f"SELECT to_jsonb(t) - '{new}'::text[] FROM {table} t ORDER BY 1" for table in tables}
    known = {table: execute(url, query) for table, query in rows.items()}
    assert all(known.values())
    assert not migrate.restore(other, migrate.backup(url, tmp_path / "old.dump")).is_current
    starts = zip(*(EARLIER[name] for name in ("steps", "times", "values")), strict=True)
    expected = [
        (100 + int(step), NOW + int(ms) / 1000, value)
        for steps, times, values in starts
        for step, ms, value in zip(np.cumsum(steps), np.cumsum(times), values, strict=True)
    ]
    for each in (url, other):
        assert migrate.upgrade(each).is_current
        store = Store(each)
        store.check_schema()
        assert {table: execute(each, query) for table, query in rows.items()} == known
        sql = "SELECT step::int8, extract(epoch FROM time)::float8, value FROM metric_points"
        for _ in range(2):
            points = store.points(run, "train/loss")
            found = list(zip(points.steps.tolist(), points.times.tolist(), points.values, strict=True))
            assert np.array(found).tobytes() == np.array(expected).tobytes()
            assert Counter(map(repr, execute(each, sql))) == Counter(map(repr, expected))
            arrays = execute(
                each,
                "SELECT crc, first_seq, key_ids, counts, steps, times, values, min_step, max_step FROM metric_chunks",
            )
            for crc, first_seq, *ints, values, low, high in arrays:
                assert chunks.is_intact(crc, first_seq, *map(np.array, ints), np.array(values))
                assert (low, high) != (0, 0)
            assert [(row.number, row.run, row.values) for row in store.sweep_trials("s")] == [(3, run, {})]
            assert execute(each, "SELECT who, decisions, settings::text FROM sweeps") == [("me", 0, "{}")]
            store.transition(run, 1, RunStatus.finished, now=NOW)
            merged = store.merge([1])
        assert (merged.points, len(arrays)) == (0, 1)  # one row, merged already
        assert [chunk.steps.tolist() for chunk in store.chunks_after(run)] == [[row[0] for row in expected]]
        store.close()


def test_a_newer_schema_is_refused(database_url: str) -> None:
    migrate.upgrade(database_url)
    execute(database_url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    store = Store(database_url)
    with pytest.raises(SchemaMismatch, match="newer version") as error:
        store.check_schema()
    store.close()
    assert (error.value.found, error.value.expected) == ("9999", HEAD)
    with pytest.raises(SchemaMismatch, match="newer version"):
        migrate.upgrade(database_url)
    assert migrate.status(database_url).is_newer


def test_two_processes_that_migrate_at_once_do_no_harm(database_url: str) -> None:
    command = "import sys; from orchestrator.store import migrate; print(migrate.upgrade(sys.argv[1]).is_current)"
    processes = [
        subprocess.Popen([sys.executable, "-c", command, database_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, b"True"), err.decode()


def test_an_old_server_and_missing_rights_are_named(database_url: str, role: str) -> None:
    limited = f"{database_url}&options=-crole%3D{role}"
    with pytest.raises(ConfigError, match="GRANT CREATE"):
        migrate.upgrade(limited)
    with pytest.raises(ConfigError, match="only PostgreSQL"):
        migrate.upgrade("sqlite:///x.db")
    with pytest.raises(ServiceUnavailable, match="does not exist"):
        migrate.status(server_of.with_database(database_url, "no_such_database"))


@pytest.fixture
def role(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A role without any special rights."""
    name, admin = f"r{uuid.uuid4().hex[:8]}", postgres.url("postgres")
    execute(admin, f"CREATE ROLE {name} NOSUPERUSER NOCREATEDB NOCREATEROLE")
    yield name
    for (database,) in execute(
        admin, "SELECT datname FROM pg_database JOIN pg_roles r ON datdba = r.oid WHERE rolname = %s", name
    ):
        server_of.drop_database(admin, database)
    execute(admin, f"DROP ROLE {name}")


@pytest.fixture
def owned(postgres: EmbeddedPostgres, role: str) -> tuple[str, str]:
    """URLs of two databases of that role, used with its rights only."""
    urls = []
    for _ in range(2):
        name = f"t{uuid.uuid4().hex[:12]}"
        execute(postgres.url("postgres"), f"CREATE DATABASE {name} OWNER {role}")
        urls.append(f"{postgres.url(name)}&options=-crole%3D{role}")
    return urls[0], urls[1]


def filled(url: str) -> tuple[Store, Producer, list[Batch]]:
    store = Store(url)
    ticket = store.open_attempt(RunSpec(experiment="digits", params={"lr": 0.1}), now=NOW, lease_seconds=30)
    producer = Producer(ticket)
    batches = [producer.points(series(10, start)) for start in (0, 10)]
    for batch in batches:
        store.commit([batch])
    return store, producer, batches


def test_a_backup_brings_everything_back_without_superuser_rights(owned: tuple[str, str], tmp_path: Path) -> None:
    url, other = owned
    migrate.upgrade(url)
    store, producer, batches = filled(url)
    run = producer.ticket.run
    # As if the old server had seen far more transactions than the new one will: a sink has one of two rows.
    execute(url, "UPDATE metric_chunks SET xid = (xid::text::bigint + 1000000000)::text::xid8")
    chunks = store.chunks_after(run) or None
    assert chunks is None, "chunks from the future are held back"
    (position,) = execute(url, "SELECT xid::text::bigint, id FROM metric_chunks ORDER BY xid, id LIMIT 1")
    seen = SinkCursor(position=FeedPosition(xid=position[0], id=position[1]), facts=5, state={"run_id": "m"})
    for name in (run, f"{run}/attempt-1"):
        store.save_cursor("mlflow", name, seen)

    written = migrate.backup(url, tmp_path / "orc.dump")
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [written]
    assert migrate.restore(other, written).is_current

    restored = Store(other)
    restored.check_schema()
    assert restored.run(run) == store.run(run)
    assert restored.params(run) == store.params(run)
    assert restored.summaries(run) == store.summaries(run)
    assert restored.points(run, "train/loss").values.tolist() == store.points(run, "train/loss").values.tolist()
    cursor = restored.cursor("mlflow", run)
    assert (cursor.state, cursor.facts) == ({"run_id": "m"}, 0)
    assert restored.cursor("mlflow", f"{run}/attempt-1") == cursor
    assert [chunk.steps[0] for chunk in restored.chunks_after(run, cursor.position)] == [10, 11]
    assert restored.commit(batches)[producer.id, Stream.points] == 20
    restored.commit([producer.points(series(1, 20)), producer.facts(fact(FactKind.status, status="FINISHED"))])
    assert [chunk.steps[0] for chunk in restored.chunks_after(run, cursor.position)] == [10, 11, 20]
    assert restored.run(run).status is RunStatus.finished
    assert (
        restored.open_attempt(RunSpec(experiment="digits"), now=NOW, lease_seconds=30).name not in producer.ticket.name
    )
    restored.close()

    with pytest.raises(migrate.BackupError, match="not empty"):
        migrate.restore(other, written)
    migrate.restore(other, written, force=True)
    restored = Store(other)
    assert restored.run(run).status is RunStatus.running
    restored.close()
    store.close()


def test_a_restore_that_fails_leaves_the_database_as_it_was(schema_url: str, database_url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.dump"
    broken.write_bytes(migrate.backup(schema_url, tmp_path / "orc.dump").read_bytes()[:-3000])
    with pytest.raises(migrate.BackupError, match="Restore from"):
        migrate.restore(database_url, broken)
    assert migrate.status(database_url).found == ""
    (tmp_path / "text").write_text("no dump")
    for wrong in ("text", "missing"):
        with pytest.raises(migrate.BackupError, match=wrong):
            migrate.restore(database_url, tmp_path / wrong)
    with pytest.raises(migrate.BackupError, match="no tables of ours"):
        migrate.backup(database_url, tmp_path / "x")
    with pytest.raises(migrate.BackupError, match="no directory"):
        migrate.backup(schema_url, tmp_path / "a" / "x")


def test_the_password_is_in_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema_url: str) -> None:
    arguments, environments = [], []

    def run(command: list[str], **options: Any) -> Any:
        arguments.extend(command)
        environments.append(options["env"])
        return subprocess.CompletedProcess(command, 1, "", "pg_dump: error: password geheim is wrong")

    monkeypatch.setattr(migrate.subprocess, "run", run)
    with pytest.raises(migrate.BackupError) as error:
        migrate.backup(schema_url.replace("orc@", "orc:geheim@"), tmp_path / "x")
    assert "geheim" not in " ".join(arguments) + str(error.value)
    assert environments[0]["PGPASSWORD"] == "geheim"
    assert list(tmp_path.iterdir()) == []
