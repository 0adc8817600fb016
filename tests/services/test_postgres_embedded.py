"""The embedded server: what it survives, where it lives, who may connect."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from cluster import postgres as embedded
from cluster.postgres import EmbeddedPostgres
from orchestrator.backends.postgres import conninfo
from orchestrator.errors import ServiceUnavailable

ROOT = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")


def value(url: str, query: str) -> object:
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        row = connection.execute(query).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for sockets, open for passing through."""
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    yield directory
    for place in directory.rglob("location"):
        shutil.rmtree(place.read_text().strip(), ignore_errors=True)
    for place in directory.rglob("socket"):
        shutil.rmtree(place.read_text().strip(), ignore_errors=True)
    shutil.rmtree(directory)


@pytest.fixture
def server(short: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(short / "pg")
    yield server
    server.stop()


def test_a_fresh_database_takes_a_query(database_url: str) -> None:
    assert value(database_url, "select current_user") == "orc"


def test_starting_again_changes_nothing(postgres: EmbeddedPostgres) -> None:
    before = postgres.pid
    postgres.start()
    assert postgres.pid == before != 0


def test_no_tcp_port_and_a_closed_socket_directory(postgres: EmbeddedPostgres) -> None:
    listening = [c for c in psutil.Process(postgres.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == []
    assert stat.S_IMODE(postgres.socket_directory.stat().st_mode) == 0o700
    assert len(os.fsencode(postgres.socket_directory)) < 100


def test_an_ensured_database_is_kept(postgres: EmbeddedPostgres) -> None:
    postgres.ensure_database("kept")
    with psycopg.connect(conninfo(postgres.url("kept")), autocommit=True) as connection:
        connection.execute("create table if not exists t as select 1")
    postgres.ensure_database("kept")
    assert value(postgres.url("kept"), "select count(*) from t") == 1


@as_root
def test_roots_server_runs_as_somebody_else(postgres: EmbeddedPostgres) -> None:
    assert psutil.Process(postgres.pid).uids().real != 0


def test_an_initdb_that_was_killed_is_done_again(server: EmbeddedPostgres) -> None:
    code = "import sys, pathlib; from cluster.postgres import *; EmbeddedPostgres(pathlib.Path(sys.argv[1])).start()"
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(server.directory)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    half = "data.*.tmp/global"
    while not any(server.directory.glob(half)):
        assert time.monotonic() < deadline
        assert starter.poll() is None
        time.sleep(0.002)
    starter.kill()
    starter.wait()
    assert not (server.directory / "data").exists(), "the kill came too late to prove anything"
    server.start()
    assert value(server.url("postgres"), "select 1") == 1
    # The orphaned initdb may still have been at work when its directory was removed.
    assert not list(server.directory.glob("data.*.tmp/PG_VERSION"))


def test_committed_rows_survive_a_sigkill_and_the_pid_file_it_leaves(server: EmbeddedPostgres) -> None:
    server.start()
    with psycopg.connect(conninfo(server.url("postgres")), autocommit=True) as connection:
        connection.execute("create table t as select 7 as x")
    first = server.pid
    os.kill(first, signal.SIGKILL)
    assert (server.data / "postmaster.pid").exists()
    server.start()
    assert server.pid not in (0, first)
    assert value(server.url("postgres"), "select x from t") == 7
    server.stop()
    # After a reboot the number may belong to any program: here to this very test.
    account = server.data.stat()
    for lock in (server.data / "postmaster.pid", server.socket_directory / ".s.PGSQL.5432.lock"):
        lock.write_text(f"{os.getpid()}\n{server.data}\n1\n5432\n{server.socket_directory}\n\n  1 1\nready\n")
        os.chown(lock, account.st_uid, account.st_gid)
    assert not server.is_up()
    server.start()
    assert value(server.url("postgres"), "select x from t") == 7


def test_a_lost_socket_is_made_again(server: EmbeddedPostgres) -> None:
    server.start()
    (server.socket_directory / ".s.PGSQL.5432").unlink()
    assert not server.is_up()
    server.start()
    assert server.is_up()


def test_a_long_path_gets_its_socket_elsewhere(short: Path) -> None:
    directory = short / ("long-" * 18) / "pg"
    directory.parent.mkdir()
    server = EmbeddedPostgres(directory)
    server.start()
    try:
        assert short not in server.socket_directory.parents
        assert stat.S_IMODE(server.socket_directory.stat().st_mode) == 0o700
        assert value(server.url("postgres"), "select 1") == 1
    finally:
        server.stop()


@as_root
def test_a_directory_that_the_servers_user_cannot_reach_is_left_closed(short: Path) -> None:
    closed = short / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "pg")
    server.start()
    try:
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700
        assert closed not in server.data.parents
        assert stat.S_IMODE(server.base.stat().st_mode) == 0o700
        again = EmbeddedPostgres(closed / "pg")
        assert again.is_up()
        assert again.data == server.data
    finally:
        server.stop()


@as_root
def test_binaries_that_the_servers_user_cannot_reach_are_copied(
    server: EmbeddedPostgres, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = short / "hidden"
    package = embedded.binaries().parent.parent
    shutil.copytree(package / "pginstall18", hidden / package.name / "pginstall18")
    shutil.copytree(package.with_name(package.name + ".libs"), hidden / (package.name + ".libs"))
    hidden.chmod(0o700)
    monkeypatch.setattr(embedded, "binaries", lambda: hidden / package.name / "pginstall18" / "bin")
    server.start()
    assert server.base in Path(psutil.Process(server.pid).exe()).parents


def test_data_of_another_major_version_are_refused_in_words(server: EmbeddedPostgres) -> None:
    server.start()
    server.stop()
    version = server.data / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(ServiceUnavailable, match="PostgreSQL 17, the installed one is 18"):
        server.start()
