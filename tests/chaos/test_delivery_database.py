"""PostgreSQL goes away inside COPY, before and after COMMIT, waits for a lock, is slow or full, for any time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from cluster.postgres import EmbeddedPostgres
from orchestrator.store import migrate
from orchestrator.tracking.spool import spools
from tests.plugins.delivery_processes import Parts, wait_for
from tests.plugins.journal import compare
from tests.plugins.postgres_proxy import AFTER_COMMIT, BEFORE_COMMIT, COPY, PostgresProxy
from tests.plugins.small_delivery import SmallDelivery, assert_sound, crash

OUTAGE = float(os.environ.get("ORC_OUTAGE_SECONDS", "600"))


@pytest.fixture
def proxy(postgres: EmbeddedPostgres) -> Iterator[PostgresProxy]:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    with PostgresProxy(postgres.socket_directory, directory) as proxy:
        yield proxy
    postgres.start()  # also after a test that failed
    shutil.rmtree(directory)


@pytest.mark.parametrize("place", [COPY, BEFORE_COMMIT, AFTER_COMMIT])
def test_a_server_that_stops_at_once_inside_a_commit(
    place: str, proxy: PostgresProxy, postgres: EmbeddedPostgres, schema_url: str
) -> None:
    with SmallDelivery(schema_url, proxy.url(schema_url)) as here:
        tracker = here.start_tracker()
        here.log_calls(300)
        here.ship()
        while tracker.commit_step():
            pass
        before = len(here.store.points(here.run, "loss").values)
        here.log_calls(700)
        here.ship()
        proxy.at(place, lambda: crash(postgres))
        assert not tracker.commit_step()
        assert proxy.fault() == [place]
        here.log_calls(100)
        here.ship()  # the tracker takes it without a database
        assert here.accepted() == 2200
        postgres.start()
        stored = len(here.store.points(here.run, "loss").values)
        assert stored == (1000 if place == AFTER_COMMIT else before), "all of the transaction or nothing"
        found = here.settle()
        assert not found.problems, found.problems
        assert found.points == 2200
    assert_sound(schema_url)


def test_a_lost_answer_to_commit_doubles_nothing(proxy: PostgresProxy, schema_url: str) -> None:
    """Only the connection goes; the server has it."""
    with SmallDelivery(schema_url, proxy.url(schema_url)) as here:
        tracker = here.start_tracker()
        for number in range(5):
            here.log_calls(200, rank=number % 2)
            here.ship()
            proxy.at(AFTER_COMMIT, lambda: None)
            tracker.commit_step()
            assert proxy.fault() == [AFTER_COMMIT] * (number + 1)
        found = here.settle()
        assert not found.problems, found.problems
    assert_sound(schema_url)


def test_a_database_that_waits_for_a_lock_holds_nobody_up(schema_url: str) -> None:
    with SmallDelivery(schema_url) as here:
        tracker = here.start_tracker()
        here.log_calls(100)
        here.ship()
        tracker.start()  # its committer, which will wait
        plain = schema_url.replace("+psycopg", "")
        with psycopg.connect(plain) as other:
            other.execute("LOCK TABLE producers, metric_chunks IN ACCESS EXCLUSIVE MODE")
            for _ in range(20):
                here.log_calls(500)
                here.ship()
            waiting = (
                "SELECT count(*) FROM pg_locks WHERE NOT granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            deadline = time.monotonic() + 10
            while other.execute(waiting).fetchone() == (0,):
                assert time.monotonic() < deadline, "the committer waits for the lock"
                time.sleep(0.01)
            assert here.accepted() == 2 * 10_100, "accepted without the database"
        found = here.settle()
        assert not found.problems, found.problems
    assert_sound(schema_url)


def test_a_slow_database_only_lags(proxy: PostgresProxy, schema_url: str) -> None:
    with SmallDelivery(schema_url, proxy.url(schema_url)) as here:
        tracker = here.start_tracker()
        here.log_calls(100)
        here.ship()
        proxy.delay = 0.1
        tracker.start()
        for _ in range(20):
            here.log_calls(500)
            here.ship()
        accepted, stored = here.accepted(), 2 * len(here.store.points(here.run, "loss").values)
        assert accepted == 2 * 10_100 > stored
        found = here.settle()
        assert proxy.delayed > 5
        assert not found.problems, found.problems
    assert_sound(schema_url)


# -- of the host -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_server() -> Iterator[tuple[EmbeddedPostgres, Path]]:
    """A server on a disk of 160 MB, and that disk."""
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    disk = directory / "d"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,mode=0711", "none", str(disk)], check=True, timeout=10)
    server = EmbeddedPostgres(disk / "pg")
    server.start()
    yield server, disk
    subprocess.run(["mount", "-o", "remount,size=640m", str(disk)], check=True, timeout=10)
    server.start()
    server.stop()
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=10)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.host
def test_a_full_database_only_lags(small_server: tuple[EmbeddedPostgres, Path]) -> None:
    server, disk = small_server
    server.ensure_database("full")
    url = server.url("full")
    migrate.upgrade(url)
    with SmallDelivery(url) as here:
        tracker = here.start_tracker()
        here.log_calls(100)
        here.ship()
        assert tracker.commit_step()
        _fill(disk)
        for _ in range(60):
            here.log_calls(2000)
            here.ship()
            if not tracker.commit_step():
                break
        else:
            raise AssertionError("the disk never filled up")
        here.log_calls(1000)
        here.ship()
        assert here.accepted() % 2 == 0
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=640m", str(disk)], check=True, timeout=10)
        server.start()  # it may have ended itself, when its own log had no room
        found = here.settle(60)
        assert not found.problems, found.problems
    assert_sound(url)


def _fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    assert shutil.disk_usage(disk).free < 1 << 20


@pytest.mark.host
@pytest.mark.timeout(4 * 600 + OUTAGE)
def test_a_database_that_is_gone_for_long_while_much_is_logged(postgres: EmbeddedPostgres, schema_url: str) -> None:
    """50,000 points a second; ORC_OUTAGE_SECONDS for another time than ten minutes."""
    with SmallDelivery(schema_url) as here, Parts(here.directory) as parts:
        socket, database = str(here.directory / "socket"), schema_url
        tracker = parts.start(
            "tracker", log=str(here.log), database_url=database, socket=socket, segment_bytes=64 << 20
        )
        parts.start("shipper", spools=str(here.spools), socket=socket)
        producers = [
            parts.start(
                "producer", spools=str(here.spools), run=here.run, rank=rank, journal=str(here.journals), rate=12_500,
            )
            for rank in range(2)
        ]  # fmt: skip
        wait_for(lambda: len(here.store.points(here.run, "loss")) > 1000, "the first points are stored")
        before, begun = here.logged(), time.monotonic()
        crash(postgres)
        wait_for(lambda: time.monotonic() - begun >= OUTAGE, "the outage is over", OUTAGE + 60)
        seconds, logged = time.monotonic() - begun, here.logged() - before
        memory = psutil.Process(tracker).memory_info().rss
        postgres.start()
        for pid in producers:
            parts.kill(pid)
        back = time.monotonic()
        wait_for(lambda: not list(spools(here.spools)), f"everything arrives: {parts.said()}", 3 * OUTAGE + 120)
        print(
            f"{logged} points in {seconds:.0f} s without a database ({logged / seconds:.0f}/s), all stored "
            f"{time.monotonic() - back:.0f} s after it was back; the tracker had {memory >> 20} MiB"
        )
        assert logged / seconds > 40_000
        found = compare(here.store, here.run, here.journals)
        assert not found.problems, found.problems
    assert_sound(schema_url)
