"""Live values and a real Redis: what its user may, what is kept how long, and that its end disturbs nobody."""

from __future__ import annotations

import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from cluster import redis_server
from orchestrator.backends import open_live
from orchestrator.backends.redis import CHANGES, TTL, probe
from orchestrator.catalog import Catalog
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.catalog.remote import HttpCatalog
from orchestrator.errors import ServiceUnavailable
from orchestrator.live_records import LiveRun, LiveState
from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream, facts_payload
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from orchestrator.tracking.live import LiveChange, LivePublisher, LiveValues
from orchestrator.tracking.service import TrackerService
from tests.plugins.api_server import client, serving
from tests.plugins.own_redis import OwnRedis, own_redis
from tests.plugins.runs import wait_until

STATE = LiveState(
    status=RunStatus.running, attempt=1, step=0, points=0, points_per_second=0.0, steps_per_second=0.0, steps=0,
    epochs=0, sweep="", time=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[OwnRedis]:
    with own_redis() as server:
        yield server


@pytest.fixture
def fragile() -> Iterator[OwnRedis]:
    with own_redis() as server:
        yield server


def batch(value: float, *, run: str, keys: int = 1, first: int = 1, producer: str = "ab" * 16) -> Batch:
    points = np.zeros(keys, POINT)
    points["key"], points["step"], points["time"], points["value"] = np.arange(keys), first, time.time(), value
    return Batch(
        producer=producer, run=run, attempt=1, rank=0, stream=Stream.points, first=first, count=keys,
        keys=tuple(f"key/{number}" for number in range(keys)), payload=points.tobytes(),
    )  # fmt: skip


@contextmanager
def publishing(url: str) -> Iterator[LiveValues]:
    """Live values with their thread."""
    live = LiveValues()
    publisher = LivePublisher(live, lambda: open_live(url))
    thread = threading.Thread(target=publisher.run, daemon=True)
    thread.start()
    yield live
    publisher.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()


def newest(url: str, run: str, key: str = "key/0") -> float | None:
    """As a watcher sees it who asks just now; None when nobody answers, or nothing is there."""
    reader = open_live(url)
    try:
        found = reader.read(run)
    except ServiceUnavailable:
        return None
    finally:
        reader.close()
    value = found.newest(key) if found else None
    return value.value if value else None


def within(what: Callable[[], object]) -> None:
    wait_until(what, 30, "live values")


# -- the server


@pytest.mark.parametrize(
    "command",
    ["EVAL 'return 1' 0", "SCRIPT LOAD x", "CONFIG GET maxmemory", "FLUSHALL", "KEYS *", "DEBUG SLEEP 1", "SHUTDOWN",
     "ACL LIST", "REPLICAOF 127.0.0.1 1", "MODULE LIST", "SAVE", "MONITOR", "CLIENT LIST", "SET other 1"],
)  # fmt: skip
def test_its_user_may_nothing_but_read_and_write_live_values(server: OwnRedis, command: str) -> None:
    with pytest.raises(NoPermissionError):
        server.client().execute_command(*command.split(" "))


def test_without_the_password_nothing_is_told(server: OwnRedis) -> None:
    socket = str(server.home / "redis" / "s" / "socket")
    once = Retry(NoBackoff(), 0)
    with pytest.raises(redis.AuthenticationError, match="Authentication required"):
        redis.Redis(unix_socket_path=socket, protocol=2, retry=once).execute_command("GET", "orc:x")
    with pytest.raises(redis.AuthenticationError, match="WRONGPASS|invalid username-password"):
        redis.Redis(unix_socket_path=socket, username="orc", password="wrong", protocol=2, retry=once).ping()


def test_it_listens_on_a_private_socket_alone_and_is_not_root(server: OwnRedis) -> None:
    place = server.home / "redis"
    modes = {name: stat.S_IMODE((place / name).stat().st_mode) for name in ("s", "s/socket", "password")}
    assert modes == {"s": 0o700, "s/socket": 0o600, "password": 0o600}
    assert server.process.net_connections("tcp") == []
    assert server.process.uids().effective != 0
    words = [*server.process.cmdline(), *server.process.environ().values()]
    assert not any((place / "password").read_text() in word for word in words)


def test_a_home_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    if redis_server.program() is None:
        pytest.skip("there is no redis-server here")
    home = tmp_path / ("long" * 25)
    home.mkdir()
    _, url = redis_server.start(home)
    assert probe(url)[0]
    place = Path((home / "redis" / "location").read_text().strip())
    assert redis_server.stop(home)
    assert not place.exists()
    with pytest.raises(ServiceUnavailable, match="redis at socket"):
        probe(url)


def test_a_program_in_a_private_place_is_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = redis_server.program()
    if program is None:
        pytest.skip("there is no redis-server here")
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    shutil.copy(program, private)
    monkeypatch.setattr(redis_server, "program", lambda: private / program.name)
    with own_redis() as server:
        assert probe(server.url)[0]
        assert server.process.uids().effective != 0


# -- what is written


def test_values_are_there_with_everything_about_them_and_go_by_themselves(server: OwnRedis) -> None:
    run, sweep = uuid.uuid4().hex, uuid.uuid4().hex
    with publishing(server.url) as live:
        ticket = RunTicket(run=run, name="n", experiment="e", attempt=1, directory="")
        live.opened(ticket, RunSpec(experiment="e", sweep=sweep, params={"epochs": 7}))
        saved = Fact(kind=FactKind.checkpoint, at=1.0, data={"id": "step-1", "uri": "/c", "step": 1, "size_bytes": 5})
        live.take(Batch(
            producer="cd" * 16, run=run, attempt=1, rank=0, stream=Stream.facts, first=1, count=1,
            payload=facts_payload([saved]),
        ))  # fmt: skip
        for value in (0.5, float("nan"), float("-inf")):
            live.take(batch(value, run=run, keys=3))
        within(lambda: newest(server.url, run) == float("-inf"))
    found = open_live(server.url).read(run)
    assert found is not None
    assert {value.key for value in found.values} == {"key/0", "key/1", "key/2"}
    assert (found.state.epochs, found.state.sweep, found.checkpoints[0].id) == (7, sweep, "step-1")
    client = server.client()
    keys = [f"orc:run:{run}", f"orc:run:{run}:changes", f"orc:sweep:{sweep}", f"orc:sweep:{sweep}:changes"]
    assert all(0 < client.ttl(key) <= TTL for key in keys)
    assert client.hkeys(f"orc:sweep:{sweep}") == [run.encode()]
    assert all(client.ttl(key) > 0 for key in client.scan_iter())


def test_changes_are_told_in_order_and_waited_for(server: OwnRedis) -> None:
    run, reader = uuid.uuid4().hex, open_live(server.url)
    assert reader.read(run) is None
    assert reader.watched([run]) == frozenset()
    assert reader.changes(run, "0-0", 0.0) is None
    assert reader.watched([run, "another"]) == {run}
    with publishing(server.url) as live:
        live.take(batch(1.0, run=run))
        within(lambda: newest(server.url, run) == 1.0)
        before = reader.read(run)
        assert before is not None
        told: list[float] = []
        waiting = threading.Thread(
            target=lambda: told.extend(value.value for value in reader.changes(run, before.cursor, 30.0).values)
        )  # type: ignore[union-attr]
        waiting.start()
        live.take(batch(2.0, run=run))
        waiting.join(timeout=20)
        assert told == [2.0]
    after = reader.changes(run, before.cursor, 0.0)
    assert after is not None
    assert [value.value for value in after.values] == [2.0]
    nothing = reader.changes(run, after.cursor, 0.01)
    assert nothing is not None
    assert (nothing.values, nothing.cursor) == ((), after.cursor)


def test_the_change_feed_is_capped(server: OwnRedis) -> None:
    run, writer = uuid.uuid4().hex, open_live(server.url)
    change = LiveChange(run=run, state=STATE, values=[("a", 0, 1, 1.0, 0.5)], checkpoints=None)
    for _ in range(10):
        writer.write([change] * 250, "t")
    kept = server.client().xlen(f"orc:run:{run}:changes")
    assert CHANGES <= kept < 2 * CHANGES
    large = LiveChange(
        run=f"{run}x", state=STATE, values=[("k" * 500, rank, 1, 1.0, 0.5) for rank in range(1000)], checkpoints=None
    )  # fmt: skip
    for _ in range(40):
        writer.write([large], "t")
    assert server.client().xlen(f"orc:run:{run}x:changes") < 30


def test_poisoned_values_are_left_out(server: OwnRedis) -> None:
    run, client, reader = uuid.uuid4().hex, server.client(), open_live(server.url)
    reader.write([LiveChange(run=run, state=STATE, values=[("a", 0, 1, 1.0, 0.5)], checkpoints=None)], "t")
    poison = {"value:0:b": "{", "value:0:c": b"\xff\xfe", "value:0:d": '{"key":"d"}', "checkpoints": '[{"id":1}]'}
    client.hset(f"orc:run:{run}", mapping=poison)
    client.xadd(f"orc:run:{run}:changes", {"state": "[]", "values": '[1,{"key":"a"}]'})
    found = reader.read(run)
    assert found is not None
    assert ([value.key for value in found.values], found.checkpoints) == (["a"], ())
    changed = reader.changes(run, "0-0", 0.0)
    assert changed is not None
    assert [value.key for value in changed.values] == ["a"]
    client.hset(f"orc:run:{run}", "state", '{"status":"DANCING"}')
    assert reader.read(run) is None
    client.set(f"orc:run:{run}z", "a string")
    assert reader.read(f"{run}z") is None


# -- watchers


@pytest.mark.parametrize("kind", ["database", "http"])
def test_both_catalogs_read_it_and_wait_for_changes(
    server: OwnRedis, schema_url: str, tmp_path: Path, kind: str
) -> None:
    store = Store(schema_url, pool_size=1)
    ticket = store.open_attempt(RunSpec(experiment="e", params={"steps": 9}), now=1e9, lease_seconds=1e6)
    with ExitStack() as opened:
        catalog: Catalog = DatabaseCatalog(store, server.url)
        if kind == "http":
            there = Stack(home=str(tmp_path), database_url=schema_url, redis_url=server.url)
            catalog = client(opened.enter_context(serving(there)))
        before = catalog.live(ticket.run)
        assert (before.source, before.state.steps, before.values) == ("database", 9, ())
        with publishing(server.url) as live:
            live.take(batch(float("nan"), run=ticket.run))
            within(lambda: catalog.live(ticket.run, after=before.cursor, wait=5.0).source == "redis")
            first = catalog.live(ticket.run)
            assert [value.key for value in first.values] == ["key/0"]
            told: list[LiveRun] = []
            waiting = threading.Thread(
                target=lambda: told.append(catalog.live(ticket.run, after=first.cursor, wait=5.0))
            )
            waiting.start()
            live.take(batch(2.0, run=ticket.run))
            waiting.join(timeout=20)
            assert [value.value for value in told[0].values] == [2.0]
        nothing = catalog.live(ticket.run, after=told[0].cursor, wait=0.01)
        assert (nothing.values, nothing.cursor) == ((), told[0].cursor)
        assert catalog.live(ticket.run, redis=False).source == "database"
        if isinstance(catalog, HttpCatalog):
            catalog.close()
    store.close()


def test_a_password_that_is_gone_is_no_fault_of_the_catalog(schema_url: str, tmp_path: Path) -> None:
    store = Store(schema_url, pool_size=1)
    run = store.open_attempt(RunSpec(experiment="e"), now=1e9, lease_seconds=1e6).run
    url = f"unix://orc@/nowhere?password_file={tmp_path}/none"
    assert DatabaseCatalog(store, url).live(run).source == "database"
    store.close()


# -- what may happen to it


def test_while_it_stands_still_nobody_waits_and_then_the_newest_is_there(fragile: OwnRedis) -> None:
    with publishing(fragile.url) as live:
        live.take(batch(0.0, run="r"))
        within(lambda: newest(fragile.url, "r") == 0.0)
        fragile.freeze()
        for value in range(1, 5000):
            live.take(batch(float(value), run="r", keys=3))
        assert live.of("r")["metrics"]["key/2"]["value"] == 4999.0
        assert newest(fragile.url, "r") is None  # it still stands still
        fragile.thaw()
        within(lambda: newest(fragile.url, "r") == 4999.0)


def test_after_its_death_the_values_of_quiet_runs_come_back_too(fragile: OwnRedis) -> None:
    with publishing(fragile.url) as live:
        live.take(batch(7.0, run="quiet"))
        within(lambda: newest(fragile.url, "quiet") == 7.0)
        fragile.kill()
        live.take(batch(8.0, run="busy"))
        assert newest(fragile.url, "quiet") is None
        fragile.start()
        within(lambda: (newest(fragile.url, "quiet"), newest(fragile.url, "busy")) == (7.0, 8.0))


def test_after_it_was_emptied_everything_comes_back(fragile: OwnRedis) -> None:
    with publishing(fragile.url) as live:
        live.take(batch(7.0, run="quiet"))
        within(lambda: newest(fragile.url, "quiet") == 7.0)
        fragile.empty()
        within(lambda: newest(fragile.url, "quiet") == 7.0)
        assert fragile.client().ttl("orc:run:quiet") > 0


def _fill(client: redis.Redis) -> None:
    for number in range(10_000):  # small ones: a large one that does not fit leaves room
        client.set(f"orc:ballast:{number}", "x" * 1000)


def test_a_full_one_is_left_alone_and_used_again_when_there_is_room() -> None:
    with own_redis("4mb") as server, publishing(server.url) as live:
        client = server.client()
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            _fill(client)
        live.take(batch(1.0, run="r"))
        with pytest.raises(ServiceUnavailable, match="maxmemory"):
            open_live(server.url).write([LiveChange(run="o", state=STATE, values=[], checkpoints=None)], "t")
        assert newest(server.url, "r") is None
        for key in client.scan_iter("orc:ballast:*"):
            client.unlink(key)
        within(lambda: newest(server.url, "r") == 1.0)


def test_more_than_fits_drops_the_oldest_not_the_newest() -> None:
    with own_redis("4mb") as server:
        writer = open_live(server.url)
        values = [(f"key/{n}", 0, 1, 1.0, 0.5) for n in range(20)]
        for number in range(1500):
            writer.write([LiveChange(run=f"r{number}", state=STATE, values=values, checkpoints=None)], "t")
        oldest_100, newest_100 = (
            sum(writer.read(f"r{number}") is not None for number in numbers)
            for numbers in (range(100), range(1400, 1500))
        )
        # Redis takes the oldest of a sample, so that one of them may have luck.
        assert oldest_100 < 20
        assert newest_100 > 80


@pytest.mark.parametrize("fault", ["frozen", "dead", "never there"])
def test_the_tracker_takes_and_commits_whatever_redis_does(
    fragile: OwnRedis, schema_url: str, tmp_path: Path, fault: str
) -> None:
    url = fragile.url if fault != "never there" else "redis://127.0.0.1:1/0"
    tracker = TrackerService(tmp_path, schema_url, redis_url=url)
    tracker.start()
    try:
        if fault == "frozen":
            fragile.freeze()
        elif fault == "dead":
            fragile.kill()
        run = tracker.open_run(RunSpec(experiment="e")).run
        producer = uuid.uuid4().hex
        for first in range(1, 200):
            (ack,) = tracker.push([batch(float(first), run=run, first=first, producer=producer).encode()])[-1:]
            assert ack.accepted == first
        within(lambda: tracker.acknowledged([(producer, run, 1)])[0].committed == 199)
        assert tracker.live(run)["metrics"]["key/0"]["value"] == 199.0
        assert newest(url, run) is None  # it was away all the time
    finally:
        if fault == "frozen":
            fragile.thaw()
        tracker.stop()
