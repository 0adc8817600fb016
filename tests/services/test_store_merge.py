"""Merging changes how points are stored and nothing else: every reader gets the same before, after and meanwhile."""

from __future__ import annotations

import math
import random
import struct
import threading
import time
import tracemalloc
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psycopg
import pytest

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of
from orchestrator.backends.postgres import conninfo
from orchestrator.clock import ManualClock
from orchestrator.errors import ServiceUnavailable
from orchestrator.records import LOST, POINT, Batch, FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.store import levels, merge, portable, reading
from orchestrator.store.store import Store
from orchestrator.store.views import FeedPosition, SinkCursor
from orchestrator.tracking.merging import MergeConfig, MergeService
from tests.plugins.producers import NOW, fact
from tests.plugins.producers import Producer as PlainProducer

VALUES = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308]


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


@pytest.fixture
def own_url(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The URL of a database with our schema, of the test's own."""
    name = f"t{uuid.uuid4().hex[:12]}"
    server_of.ensure_database(postgres.url("postgres"), name, template=template)
    yield postgres.url(name)
    server_of.drop_database(postgres.url("postgres"), name)


@pytest.fixture
def sql(schema_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(conninfo(schema_url), autocommit=True) as connection:
        yield connection


def opened(store: Store, **more: Any) -> RunTicket:
    return store.open_attempt(RunSpec(experiment="digits", user="ann", **more), now=NOW, lease_seconds=30)


def finished(store: Store, ticket: RunTicket) -> None:
    store.transition(ticket.run, ticket.attempt, RunStatus.finished, now=NOW)


def number_of(sql: psycopg.Connection[Any], ticket: RunTicket) -> int:
    row = sql.execute("SELECT number FROM runs WHERE id = %s", (ticket.run,)).fetchone()
    assert row is not None
    return row[0]


def merged(store: Store, number: int) -> int:
    """Merges all that is due and gives how many points that were."""
    done = 0
    while True:
        step = store.merge([number])
        done += step.points
        if number not in step.more:
            return done


class Producer(PlainProducer):
    """Logs points with keys, steps and times of its own choice."""

    def log(self, keys: Sequence[str], rows: np.ndarray) -> Batch:
        """`rows`: dtype POINT, `key` an index of `keys`."""
        first = self.sent[Stream.points] + 1
        self.sent[Stream.points] += len(rows)
        return Batch(
            producer=self.id, run=self.ticket.run, attempt=self.ticket.attempt, rank=self.rank, stream=Stream.points,
            first=first, count=len(rows), keys=tuple(keys), payload=rows.tobytes(),
        )  # fmt: skip

    def wide(self, keys: int, steps: range, values: np.ndarray | None = None) -> Batch:
        """All keys at each step, as a train loop does it."""
        rows = np.zeros(keys * len(steps), POINT)
        rows["key"] = np.tile(np.arange(keys), len(steps))
        rows["step"] = np.repeat(steps, keys)
        rows["time"] = NOW + rows["step"] / 10
        rows["value"] = np.sin(np.arange(len(rows)) + steps.start) if values is None else values
        return self.log([f"k{key}" for key in range(keys)], rows)


def random_rows(chance: np.random.Generator, keys: int, count: int) -> np.ndarray:
    """Steps that repeat, go back and jump further than four bytes reach; clocks that jump by years; odd values."""
    rows = np.zeros(count, POINT)
    rows["key"] = chance.integers(0, keys, count)
    steps = chance.integers(-2, 5, count)
    steps[chance.random(count) < 0.01] = chance.integers(-(2**40), 2**40)
    rows["step"] = np.cumsum(steps)
    times = NOW + np.cumsum(chance.random(count))
    times[chance.random(count) < 0.01] = 5.0
    rows["time"] = times
    rows["value"] = chance.normal(size=count)
    odd = chance.random(count) < 0.1
    rows["value"][odd] = chance.choice(VALUES, odd.sum())
    return rows


Everything = dict[tuple[str, int, int], bytes]


def everything(store: Store, ticket: RunTicket) -> Everything:
    """All points of the run by key, attempt and rank, in their order and bit for bit."""
    found = {}
    for key in {row.key for row in store.summaries(ticket.run)}:
        points = store.points(ticket.run, key)
        for attempt in np.unique(points.attempts).tolist():
            for rank in np.unique(points.ranks).tolist():
                own = (points.attempts == attempt) & (points.ranks == rank)
                columns = (points.steps[own], points.times[own], points.values[own])
                if own.any():
                    found[key, attempt, rank] = b"".join(column.tobytes() for column in columns)
    return found


def through_feed(store: Store, ticket: RunTicket, limit: int = 7) -> Everything:
    """The same through the feed, from its beginning."""
    parts: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
    position = FeedPosition()
    while chunks := store.chunks_after(ticket.run, position, limit=limit):
        for chunk in chunks:
            parts[chunk.key, chunk.attempt, chunk.rank].append((chunk.steps, chunk.times, chunk.values))
        assert chunks[-1].position > position
        position = chunks[-1].position
    return {
        of: b"".join(np.concatenate(column).tobytes() for column in zip(*pieces, strict=True))
        for of, pieces in parts.items()
    }  # fmt: skip


def through_view(sql: psycopg.Connection[Any], ticket: RunTicket) -> list[tuple[Any, ...]]:
    query = (
        "SELECT key, attempt, rank, step::int8, (extract(epoch FROM time) * 1000)::int8, float8send(value)"
        " FROM metric_points WHERE run = %s"
    )
    return sorted(sql.execute(query, (ticket.run,)).fetchall())


class Sent:
    """What was logged, as the readers above give it."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int, int], list[np.ndarray]] = defaultdict(list)

    def add(self, batch: Batch) -> None:
        points = batch.points()
        for index in np.unique(points["key"]).tolist():
            self._parts[batch.keys[index], batch.attempt, batch.rank].append(points[points["key"] == index])

    def _columns(self, of: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points = np.concatenate(self._parts[of])
        return points["step"], np.rint(points["time"] * 1000).astype(np.int64), points["value"]

    def everything(self) -> Everything:
        columns = {of: self._columns(of) for of in self._parts}
        return {
            of: steps.tobytes() + (ms / 1000.0).tobytes() + values.tobytes()
            for of, (steps, ms, values) in columns.items()
        }  # fmt: skip

    def rows(self) -> list[tuple[Any, ...]]:
        rows = []
        for of in self._parts:
            steps, ms, values = self._columns(of)
            sent = (struct.pack(">d", value) for value in values.tolist())
            rows += [(*of, *each) for each in zip(steps.tolist(), ms.tolist(), sent, strict=True)]
        return sorted(rows)


@pytest.mark.parametrize("seed", range(4))
def test_merging_leaves_every_point_as_it_was(store: Store, sql: psycopg.Connection[Any], seed: int) -> None:
    """Several producers, attempts and ranks; merged now and then while they log, and at the end."""
    chance, order = np.random.default_rng(seed), random.Random(seed)
    first = opened(store)
    number, sent = number_of(sql, first), Sent()
    for attempt in (1, 2):
        ticket = first if attempt == 1 else opened(store, run=first.run, after_attempt=1)
        producers = [Producer(ticket, rank) for rank in range(3)]
        for turn in range(30):
            producer = order.choice(producers)
            if order.random() < 0.5:
                batch = producer.wide(6, range(turn * 10, turn * 10 + order.randrange(1, 40)))
            else:
                batch = producer.log(["a", "k1", "b"], random_rows(chance, 3, order.randrange(1, 300)))
            store.commit([batch])
            sent.add(batch)
            if turn % 11 == 5:
                with pytest.MonkeyPatch.context() as often:
                    often.setattr(merge, "MANY_ROWS", 3)
                    often.setattr(merge, "LONG", 150)
                    often.setattr(merge, "LARGE", 3000)
                    assert merged(store, number) > 0
                assert everything(store, first) == sent.everything()
                assert through_view(sql, first) == sent.rows()
                assert through_feed(store, first) == sent.everything()
    sums = repr(store.summaries(first.run))
    finished(store, ticket)
    with pytest.MonkeyPatch.context() as short:
        short.setattr(merge, "LONG", 150)
        merged(store, number)
    assert sql.execute("SELECT count(*) FROM metric_chunks_live WHERE run_number = %s", (number,)).fetchone() == (0,)
    assert everything(store, first) == sent.everything()
    assert through_view(sql, first) == sent.rows()
    assert through_feed(store, first) == sent.everything()
    assert store.settle([number]) == {number}
    assert repr(store.summaries(first.run)) == sums
    rows = sql.execute(
        "SELECT producer_id, sum(n), min(first_seq), max(last_seq) FROM metric_chunks WHERE run_number = %s GROUP BY 1",
        (number,),
    ).fetchall()
    told = sql.execute("SELECT id, points, 1, points FROM producers WHERE run_id = %s", (first.run,)).fetchall()
    assert sorted(rows) == sorted(row for row in told if row[1])


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_copy_of_the_run_has_every_point(
    store: Store, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, is_merged: bool
) -> None:
    """Short curves are read together and long ones alone, whatever row they stand in."""
    chance = np.random.default_rng(3)
    ticket, sent, questions = opened(store), Sent(), []
    for rank in range(2):
        producer = Producer(ticket, rank)
        batches = [producer.wide(40, range(turn, turn + 5)) for turn in range(0, 30, 5)]
        batches += [producer.log(["k3", "long", "b"], random_rows(chance, 3, 3000))]
        store.commit(batches)
        for batch in batches:
            sent.add(batch)
    finished(store, ticket)
    if is_merged:
        merged(store, number_of(sql, ticket))
    monkeypatch.setattr(portable, "LONG", 1500)
    monkeypatch.setattr(portable, "MOST_TOGETHER", 5000)
    for name in ("chunk_rows_of_key", "chunk_rows_of_keys"):
        honest = getattr(portable, name)
        monkeypatch.setattr(
            portable, name, lambda *given, honest=honest, name=name: questions.append(name) or honest(*given)
        )
    found: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
    order = []
    with store.snapshot(ticket.run) as snapshot:
        for chunk in snapshot.chunks():
            found[chunk.key, chunk.attempt, chunk.rank].append((chunk.steps, chunk.times, chunk.values))
            order.append((chunk.key, chunk.attempt, chunk.rank))
    joined = {
        of: b"".join(np.concatenate(column).tobytes() for column in zip(*parts, strict=True))
        for of, parts in found.items()
    }  # fmt: skip
    assert joined == sent.everything()
    assert order == sorted(order)
    assert set(questions) == {"chunk_rows_of_key", "chunk_rows_of_keys"}
    assert len(questions) < 8


def test_what_comes_after_the_end_is_merged_and_summed_up_too(store: Store, sql: psycopg.Connection[Any]) -> None:
    ticket = opened(store)
    producer, number = Producer(ticket), number_of(sql, ticket)
    store.commit([producer.wide(3, range(100))])
    finished(store, ticket)
    assert merged(store, number) == 300
    assert store.settle([number]) == {number}
    late = producer.wide(3, range(100, 150))
    store.commit([late])
    assert {row.count for row in store.summaries(ticket.run)} == {150}
    assert len(store.summaries(ticket.run)) == 3
    whole = everything(store, ticket)
    assert merged(store, number) == 150
    assert store.settle([number]) == {number}
    assert (everything(store, ticket), through_feed(store, ticket)) == (whole, whole)
    assert store.commit([late])[producer.id, Stream.points] == 450
    assert {row.count for row in store.summaries(ticket.run)} == {150}
    tables = "SELECT tableoid::regclass::text, count(*) FROM metric_summaries WHERE run_number = %s GROUP BY 1"
    assert sql.execute(tables, (number,)).fetchall() == [("metric_summaries_final", 3)]


def test_a_reader_gets_each_point_once_whatever_is_merged_meanwhile(
    store: Store, schema_url: str, sql: psycopg.Connection[Any]
) -> None:
    """Commits, merges and reads in random order; the reader saves its cursor before it reads, and now and then."""
    for seed in range(3):
        chance = random.Random(seed)
        ticket = opened(store)
        number, sink = number_of(sql, ticket), f"reader{seed}"
        producers = [Producer(ticket, rank) for rank in range(3)]
        got: dict[int, list[float]] = defaultdict(list)
        position, unsaved = FeedPosition(), FeedPosition()
        store.save_cursor(sink, ticket.run, SinkCursor())
        sent: dict[int, list[float]] = defaultdict(list)
        merges = 0
        for turn in range(120):
            act = chance.choice(["commit", "commit", "read", "merge", "save", "die"])
            if act == "commit":
                producer = chance.choice(producers)
                batch = producer.wide(2, range(turn, turn + chance.randrange(1, 5)))
                store.commit([batch])
                sent[producer.rank] += batch.points()["value"][batch.points()["key"] == 0].tolist()
            elif act == "read":
                for chunk in store.chunks_after(ticket.run, unsaved, limit=chance.randrange(1, 4)):
                    if chunk.key == "k0":
                        got[chunk.rank] += [(float(v), chunk.position) for v in chunk.values]  # type: ignore[misc]
                    unsaved = chunk.position
            elif act == "merge":
                with pytest.MonkeyPatch.context() as often:
                    often.setattr(merge, "MANY_ROWS", 2)
                    merges += store.merge([number]).rows
            elif act == "save":
                position = unsaved
                store.save_cursor(sink, ticket.run, SinkCursor(position=position))
            else:  # what was not saved is read again
                unsaved = position
                for rank, values in got.items():
                    got[rank] = [each for each in values if each[1] <= position]  # type: ignore[index]
        while chunks := store.chunks_after(ticket.run, unsaved):
            for chunk in chunks:
                if chunk.key == "k0":
                    got[chunk.rank] += [(float(v), chunk.position) for v in chunk.values]  # type: ignore[misc]
            unsaved = chunks[-1].position
        assert merges > 0
        assert {rank: [each[0] for each in values] for rank, values in got.items()} == sent  # type: ignore[index]


def test_a_reader_that_is_behind_holds_merging_and_one_that_is_gone_does_not(
    store: Store, sql: psycopg.Connection[Any]
) -> None:
    ticket = opened(store)
    producer, number = Producer(ticket), number_of(sql, ticket)
    store.commit([producer.wide(2, range(10))])
    seen = store.chunks_after(ticket.run)[-1].position
    store.commit([producer.wide(2, range(10, 20))])
    finished(store, ticket)
    store.save_cursor("slow", ticket.run, SinkCursor(position=seen))
    done = store.merge([number])
    assert (done.points, done.waiting) == (20, {number})
    assert len(store.chunks_after(ticket.run, seen)) == 2
    assert store.merge([number]).waiting == {number}
    store.save_cursor("slow", f"{ticket.run}/attempt-1", SinkCursor())  # a second copy, at its beginning
    store.save_cursor("slow", ticket.run, SinkCursor(position=store.chunks_after(ticket.run, seen)[-1].position))
    assert store.merge([number]).waiting == {number}
    sql.execute("UPDATE sink_cursors SET updated_at = now() - interval '2 days' WHERE sink = 'slow'")
    assert store.merge([number]).points == 20


def test_a_merge_that_is_cut_off_leaves_everything_as_it_was(
    store: Store, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = opened(store)
    producer, number = Producer(ticket), number_of(sql, ticket)
    for start in range(0, 40, 10):
        store.commit([producer.wide(4, range(start, start + 10))])
    finished(store, ticket)
    before = everything(store, ticket)
    killed: list[Any] = []
    honest = merge._sum_up

    def cut(cursor: psycopg.Cursor[Any], new: Any) -> None:
        honest(cursor, new)
        pid = cursor.connection.info.backend_pid
        killed.append(sql.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,)).fetchone())

    with monkeypatch.context() as cutting:
        cutting.setattr(merge, "_sum_up", cut)
        with pytest.raises(ServiceUnavailable):
            store.merge([number])
    assert killed == [(True,)]
    count = "SELECT count(*), max(level) FROM metric_chunks WHERE run_number = %s"
    assert sql.execute(count, (number,)).fetchone() == (4, 0)
    assert everything(store, ticket) == before
    assert store.merge([number]).points == 160
    assert everything(store, ticket) == before


def test_commits_removals_and_merges_at_once_lose_and_double_nothing(
    store: Store, schema_url: str, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MANY_ROWS", 2)
    tickets = [opened(store) for _ in range(4)]
    numbers = [number_of(sql, ticket) for ticket in tickets]
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Any) -> None:
        own = Store(schema_url)
        try:
            work(own)
        except BaseException as error:
            failures.append(error)
        finally:
            own.close()

    def merge_all(own: Store) -> None:
        while not stop.is_set():
            own.merge(numbers)
            own.settle(numbers)

    def commit_all(own: Store) -> None:
        producers = [Producer(ticket) for ticket in tickets]
        for turn in range(40):
            own.commit([producer.wide(3, range(turn * 5, turn * 5 + 5)) for producer in producers])
            if turn == 20:
                finished(own, tickets[3])
                own.remove_run(tickets[3].run, user="", now=NOW)
                finished(own, tickets[2])

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (merge_all, merge_all)]
    for thread in threads:
        thread.start()
    guarded(commit_all)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    for ticket in tickets[:3]:
        assert {row.count for row in store.summaries(ticket.run)} == {200}
        assert len(store.summaries(ticket.run)) == 3
        for key in ("k0", "k1", "k2"):
            assert store.points(ticket.run, key).steps.tolist() == list(range(200))
    for table in ("metric_chunks", "metric_levels", "metric_summaries"):
        left = sql.execute(f"SELECT count(*) FROM {table} WHERE run_number = %s", (numbers[3],)).fetchone()
        assert left == (0,)


def test_damaged_points_are_counted_and_told_and_not_stored(store: Store, sql: psycopg.Connection[Any]) -> None:
    producer = Producer(opened(store))
    batch = producer.wide(2, range(5))
    rows = batch.points().copy()
    rows[3:6] = (0, LOST, 0, 0.0, 0.0)
    damaged = Batch(
        producer=batch.producer, run=batch.run, attempt=1, rank=0, stream=Stream.points, first=1, count=10,
        keys=batch.keys, payload=rows.tobytes(),
    )  # fmt: skip
    only = producer.log([], np.array([(0, LOST, 0, 0.0, 0.0)] * 2, POINT))
    assert store.commit([damaged, only])[producer.id, Stream.points] == 12
    assert store.commit([damaged, only])[producer.id, Stream.points] == 12
    found = sql.execute("SELECT points, lost FROM producers WHERE run_id = %s", (producer.ticket.run,)).fetchone()
    assert found == (12, 5)
    assert sum(row.count for row in store.summaries(producer.ticket.run)) == 7
    told = [event for event in store.events(producer.ticket.run) if event.kind == "lost_points"]
    assert [(event.level, event.details["first"], event.details["last"], event.details["count"]) for event in told] == [
        ("error", 4, 6, 3), ("error", 11, 12, 2),
    ]  # fmt: skip


# -- charts ------------------------------------------------------------------------------------------------------------


def windows_of(curve: Any, values: np.ndarray) -> None:
    """Every window of the curve is what its points sum up to."""
    ends = np.cumsum(curve.counts)
    starts = ends - curve.counts
    assert ends[-1] == len(values)
    is_nan, is_finite = np.isnan(values), np.isfinite(values)
    has_none = np.logical_and.reduceat(is_nan, starts)
    assert curve.nans.tolist() == np.add.reduceat(is_nan, starts, dtype=np.int64).tolist()
    assert curve.first.tobytes() == values[starts].tobytes()
    assert curve.last.tobytes() == values[ends - 1].tobytes()
    least = np.minimum.reduceat(np.where(is_nan, np.inf, values), starts)
    most = np.maximum.reduceat(np.where(is_nan, -np.inf, values), starts)
    np.testing.assert_array_equal(curve.minimum, np.where(has_none, np.nan, least))
    np.testing.assert_array_equal(curve.maximum, np.where(has_none, np.nan, most))
    finite = np.add.reduceat(is_finite, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(is_finite, values, 0.0), starts)
    mean = np.divide(total, finite, out=np.full(len(starts), np.nan), where=finite > 0)
    np.testing.assert_allclose(curve.mean, mean, rtol=1e-9, atol=1e-12)


def test_a_chart_shows_every_spike_of_a_long_curve(
    store: Store, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to brute force, with what is merged, what is not and what lies between in one curve; and when it is
    over."""
    monkeypatch.setattr(merge, "MANY_ROWS", 4)
    monkeypatch.setattr(merge, "LONG", 1024)
    chance = np.random.default_rng(7)
    ticket = opened(store)
    producer, number = Producer(ticket), number_of(sql, ticket)
    values = chance.normal(size=150_000)
    odd = chance.integers(0, len(values), 40)
    values[odd] = chance.choice([math.nan, math.inf, -math.inf, 1e12], 40)
    values[5000:9000] = math.nan
    edges = [0, *np.sort(chance.choice(len(values), 60, replace=False)).tolist(), len(values)]
    for turn, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        store.commit([producer.wide(1, range(begin, end), values[begin:end])])
        if turn % 5 == 4 and turn < 56:
            merged(store, number)
    check_charts(store, ticket, values)
    finished(store, ticket)
    assert merged(store, number) > 0
    check_charts(store, ticket, values)
    depth = sql.execute("SELECT max(level) FROM metric_levels WHERE run_number = %s", (number,)).fetchone()
    assert depth is not None
    assert depth[0] >= 2


def check_charts(store: Store, ticket: RunTicket, values: np.ndarray) -> None:
    for most in (1, 10, 300, 2000, 10_000):
        curve = store.curve(ticket.run, "k0", most=most)
        assert len(curve) <= most
        assert (len(curve) >= min(most, 1000) // 8, curve.is_exact) == (True, False)
        windows_of(curve, values)
        assert curve.steps.tolist() == (np.cumsum(curve.counts) - curve.counts).tolist()
    exact = store.curve(ticket.run, "k0", start=70_000, stop=70_499)
    assert exact.is_exact
    assert exact.first.tobytes() == values[70_000:70_500].tobytes()
    assert exact.steps.tolist() == list(range(70_000, 70_500))
    part = store.curve(ticket.run, "k0", start=20_000, stop=99_999, most=500)
    begin = int(part.steps[0])
    assert 20_000 - levels.WINDOW * 64 < begin <= 20_000
    assert 20 < len(part) <= 500
    windows_of(part, values[begin : begin + int(part.counts.sum())])
    assert begin + int(part.counts.sum()) >= 100_000


def test_a_long_curve_that_nobody_merged_is_not_in_memory_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNKS_AT_ONCE", 2)
    ticket = opened(store)
    producer = Producer(ticket)
    values = np.random.default_rng(1).normal(size=400_000)
    values[123_456] = 1e6
    for begin in range(0, len(values), 20_000):
        store.commit([producer.wide(1, range(begin, begin + 20_000), values[begin : begin + 20_000])])
    tracemalloc.start()
    try:
        curve = store.curve(ticket.run, "k0", most=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(values)
    assert 125 < len(curve) <= 500
    windows_of(curve, values)
    assert curve.steps.tolist() == (np.cumsum(curve.counts) - curve.counts).tolist()
    part = store.curve(ticket.run, "k0", start=100_001, stop=100_400, most=500)
    assert (part.steps.tolist(), part.is_exact) == (list(range(100_001, 100_401)), True)


def test_charts_of_short_curves_are_exact_and_of_the_newest_attempt(store: Store) -> None:
    first = opened(store)
    store.commit([Producer(first).wide(2, range(50))])
    again = opened(store, run=first.run, after_attempt=1)
    store.commit([Producer(again).wide(2, range(20, 30))])
    newest, older = store.curve(first.run, "k1"), store.curve(first.run, "k1", attempt=1)
    assert (newest.attempt, newest.steps.tolist(), newest.is_exact) == (2, list(range(20, 30)), True)
    assert older.steps.tolist() == list(range(50))
    assert older.first.tobytes() == store.points(first.run, "k1", attempt=1).values.tobytes()
    assert older.times.tolist() == store.points(first.run, "k1", attempt=1).times.tolist()
    assert len(store.curve(first.run, "k1", rank=3)) == len(store.curve(first.run, "no such key")) == 0


# -- the service -------------------------------------------------------------------------------------------------------


def test_nothing_is_left_to_do_for_a_run_that_was_removed(store: Store, sql: psycopg.Connection[Any]) -> None:
    ended, forced = opened(store), opened(store)
    store.commit([Producer(ticket).wide(2, range(5)) for ticket in (ended, forced)])
    before = store.committed_since(1 << 62).cursor
    finished(store, ended)
    numbers = [number_of(sql, ticket) for ticket in (ended, forced)]
    for ticket in (ended, forced):
        store.remove_run(ticket.run, user="", now=NOW, force=True)
    assert set(store.committed_since(before).ended) == set(numbers)
    assert store.merge(numbers).points == 0
    assert store.settle([*numbers, 1 << 40]) == {*numbers, 1 << 40}


def test_only_an_owner_tidies_and_nobody_else_is_disturbed(
    own_url: str,
) -> None:
    role = f"r{uuid.uuid4().hex[:8]}"
    with psycopg.connect(conninfo(own_url), autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {role}".encode())
        owner.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}".encode())
        owner.execute(
            "INSERT INTO metric_chunks_live (run_number, producer_id, first_seq, last_seq, first_step, min_step,"
            " max_step, first_time_ms, key_id, attempt, rank, n, crc, is_wide, key_ids, counts, steps, times, values)"
            " SELECT n, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, false, '{1}', '{1}', '{0}', '{0}', '{0}'"
            " FROM generate_series(1, 10000) AS n"
        )
        owner.execute("DELETE FROM metric_chunks_live")
        owner.execute("VACUUM metric_chunks_live")
        other, store = Store(f"{own_url}&options=-crole%3D{role}"), Store(own_url)
        assert other.tidy() == ()
        assert "metric_chunks_live" in store.tidy()
        assert store.tidy() == ()
        for each in (other, store):
            each.close()
        owner.execute(f"DROP OWNED BY {role}".encode())
        owner.execute(f"DROP ROLE {role}".encode())


class Untouched:
    """Nobody asks it anything."""

    def __init__(self) -> None:
        self.given_back: list[str] = []

    def unlock(self, sink: str) -> None:
        self.given_back.append(sink)


def test_readers_say_that_they_live_before_merging_begins() -> None:
    source = Untouched()
    service = MergeService(source, config=MergeConfig(head_start=3600.0))  # type: ignore[arg-type]
    thread = threading.Thread(target=service.run)
    thread.start()
    service.stop()
    thread.join(timeout=60)
    assert source.given_back == ["merging"]
    assert service.health()["last_error"] == ""


def test_the_service_merges_what_is_due_and_finds_it_again_after_a_crash(own_url: str) -> None:
    store, clock = Store(own_url), ManualClock()
    sql = psycopg.connect(conninfo(own_url), autocommit=True)
    config = MergeConfig(after_end=0.0, tidy_every=0.0)
    service = MergeService(store, config=config, clock=clock)
    assert service.step(clock.monotonic()) is False
    goes_on, ends = opened(store), opened(store)
    producer, other = Producer(goes_on), Producer(ends)
    for start in range(merge.MANY_ROWS):
        store.commit([producer.wide(2, range(start, start + 1)), other.wide(2, range(start, start + 1))])
        if start % 8 == 0:
            service.step(clock.monotonic())
    live = "SELECT count(*) FROM metric_chunks_live WHERE run_number = %s"
    assert sql.execute(live, (number_of(sql, goes_on),)).fetchone() == (merge.MANY_ROWS,)
    store.commit([other.facts(fact(FactKind.status, status="FINISHED"))])
    # What is committed is seen as soon as no older transaction of the server goes on, its own (autovacuum) included.
    deadline = time.monotonic() + 30
    while sql.execute(live, (number_of(sql, ends),)).fetchone() != (0,):
        assert time.monotonic() < deadline
        service.step(clock.monotonic())
    assert sql.execute("SELECT count(*) FROM metric_summaries_final").fetchone() == (2,)
    after_crash = MergeService(store, config=config, clock=clock)
    assert after_crash.step(clock.monotonic()) is False, "the other one holds the lock in this session, too"
    assert sql.execute(live, (number_of(sql, goes_on),)).fetchone() == (0,)
    assert store.points(goes_on.run, "k1").steps.tolist() == list(range(merge.MANY_ROWS))
    assert after_crash.health() == {
        "working": True, "merged_points": 2 * merge.MANY_ROWS, "merged_rows": merge.MANY_ROWS, "behind_runs": 0,
        "last_error": "",
    }  # fmt: skip
    sql.close()
    store.close()


def test_merged_points_take_less_room(own_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """How much it is is printed."""
    store, sql = Store(own_url), psycopg.connect(conninfo(own_url), autocommit=True)
    tables = [
        "metric_chunks_live",
        "metric_chunks_merged",
        "metric_levels",
        "metric_summaries_live",
        "metric_summaries_final",
    ]
    chance = np.random.default_rng(0)
    for runs, steps in ((5, 1000), (500, 10)):
        specs = [RunSpec(experiment="digits", user="ann", lease=30)] * runs
        producers = [Producer(ticket) for ticket in store.open_attempts(specs, now=NOW)]
        for start in range(0, steps, 10):
            rows = range(start, start + 10)
            store.commit([producer.wide(10, rows, chance.random(100)) for producer in producers])
        numbers = [number_of(sql, producer.ticket) for producer in producers]
        sizes = []
        for _ in range(2):
            for table in tables:
                sql.execute(f"VACUUM {table}".encode())
            store.tidy()
            row = sql.execute(
                "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname = ANY(%s)", (tables,)
            ).fetchone()
            assert row is not None
            sizes.append(int(row[0]))
            sql.execute("UPDATE runs SET status = 'FINISHED'")
            store.merge(numbers)
            assert store.settle(numbers) >= set(numbers)
        points = runs * steps * 10
        with capsys.disabled():
            before, after = (size / points for size in sizes)
            print(f"\n{points} points, {steps} per key: {before:.1f} bytes each as committed, {after:.1f} merged")
        assert sizes[1] < sizes[0]
        sql.execute("TRUNCATE metric_chunks, metric_levels, metric_summaries, runs CASCADE")
    sql.close()
    store.close()
