"""What is committed: exactly once, exactly as logged, whatever is sent again, mixed up or cut off."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.backends.postgres import conninfo
from orchestrator.errors import ServiceUnavailable
from orchestrator.records import FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.store import transaction
from orchestrator.store.errors import SequenceGap, UnknownRun
from orchestrator.store.store import Store
from orchestrator.store.views import FeedPosition
from tests.plugins.producers import KEYS, NOW, Producer, fact, series


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


@pytest.fixture
def sql(schema_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(conninfo(schema_url), autocommit=True) as connection:
        yield connection


def opened(store: Store, **more: Any) -> RunTicket:
    return store.open_attempt(RunSpec(experiment="digits", user="ann", **more), now=NOW, lease_seconds=30)


def stored(sql: psycopg.Connection[Any], run: str) -> list[tuple[Any, ...]]:
    query = "SELECT key, rank, step, value FROM metric_points WHERE run = %s ORDER BY key, rank, step"
    return sql.execute(query, (run,)).fetchall()


def test_batches_sent_again_shuffled_and_overlapping_count_once(store: Store, sql: psycopg.Connection[Any]) -> None:
    producer = Producer(opened(store))
    whole = [producer.points(series(10, start)) for start in range(0, 100, 10)]
    shuffled = random.Random(1)
    for upto in range(1, len(whole) + 1):
        sent = whole[:upto] * 2
        shuffled.shuffle(sent)
        assert store.commit(sent)[producer.id, Stream.points] == 10 * upto
    tail = whole[-1].after(95)
    assert tail is not None
    assert store.commit([tail, whole[0]])[producer.id, Stream.points] == 100
    assert store.watermarks([producer.id, uuid.uuid4().hex]) == {
        (producer.id, Stream.points): 100, (producer.id, Stream.facts): 0
    }  # fmt: skip
    assert stored(sql, producer.ticket.run) == sorted((KEYS[key], 0, step, value) for key, step, value in series(100))
    assert {summary.count for summary in store.summaries(producer.ticket.run)} == {50}


def test_a_gap_stops_its_producer_only(store: Store, sql: psycopg.Connection[Any]) -> None:
    ticket = opened(store)
    good, bad = Producer(ticket), Producer(ticket, rank=1)
    bad.points(series(5))
    late = bad.points(series(5, 5))
    with pytest.raises(SequenceGap) as error:
        store.commit([late, bad.facts(fact(FactKind.note, text="x")), good.points(series(4))])
    (gap,) = error.value.gaps
    assert (gap.producer, gap.stream, gap.expected, gap.found) == (bad.id, Stream.points, 1, 6)
    assert error.value.watermarks == {(good.id, Stream.points): 4, (good.id, Stream.facts): 0}
    assert {row[1] for row in stored(sql, ticket.run)} == {0}
    assert store.notes(ticket.run) == []


def test_an_unknown_run_stops_its_producers_only(store: Store) -> None:
    ticket = opened(store)
    good = Producer(ticket)
    lost = Producer(RunTicket(run="gone", name="", experiment="", attempt=1, directory=""))
    with pytest.raises(UnknownRun, match="gone") as error:
        store.commit([lost.points(series(1)), good.points(series(2))])
    assert error.value.producers == (lost.id,)
    assert store.watermarks([good.id])[good.id, Stream.points] == 2


@pytest.mark.parametrize("reply_lost", [False, True])
def test_a_commit_cut_off_before_or_after_it_happened_is_settled_by_trying_again(
    store: Store, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, reply_lost: bool
) -> None:
    producer = Producer(opened(store))
    batches = [producer.points(series(10)), producer.facts(fact(FactKind.note, text="once"))]
    killed: list[Any] = []
    honest = transaction.transact

    def transact(connection: psycopg.Connection[Any], *arguments: Any) -> Any:
        outcome = honest(connection, *arguments)
        if not killed:
            if reply_lost:
                connection.commit()
            killed.append(
                sql.execute("SELECT pg_terminate_backend(%s, 5000)", (connection.info.backend_pid,)).fetchone()
            )
        return outcome

    monkeypatch.setattr(transaction, "transact", transact)
    with contextlib.suppress(ServiceUnavailable):  # where the reply is lost, nothing is left to fail
        store.commit(batches)
    assert killed == [(True,)]
    assert len(stored(sql, producer.ticket.run)) == (10 if reply_lost else 0)
    assert store.commit(batches)[producer.id, Stream.points] == 10
    assert len(stored(sql, producer.ticket.run)) == 10
    assert [note.text for note in store.notes(producer.ticket.run)] == ["once"]


def test_two_trackers_at_once_store_everything_once(
    store: Store, schema_url: str, sql: psycopg.Connection[Any]
) -> None:
    ticket = opened(store)
    producers = [Producer(ticket, rank) for rank in range(4)]
    batches = [producer.points(series(10, start)) for start in range(0, 50, 10) for producer in producers]
    failures: list[BaseException] = []

    def commit_all(seed: int) -> None:
        own, order = Store(schema_url), random.Random(seed)
        try:
            for _ in range(10):
                sent = list(batches)
                order.shuffle(sent)
                own.commit(sent)
        except BaseException as error:
            failures.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=commit_all, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(stored(sql, ticket.run)) == 200
    assert {(summary.rank, summary.count) for summary in store.summaries(ticket.run)} == {(r, 25) for r in range(4)}


def test_values_steps_and_order_come_back_bit_for_bit(store: Store, sql: psycopg.Connection[Any]) -> None:
    producer = Producer(opened(store))
    odd = np.frombuffer(np.uint64(0x7FF8_0000_DEAD_BEEF).tobytes(), np.float64)[0]  # a NaN with a payload
    values = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1, odd]
    steps = [0, -5, 2**63 - 1, -(2**63), -(2**63), 7, 7, 3]
    store.commit([producer.points([(0, step, value) for step, value in zip(steps, values, strict=True)])])
    points = store.points(producer.ticket.run, KEYS[0])
    assert points.steps.tolist() == steps
    assert points.values.tobytes() == np.array(values).tobytes()
    assert points.times.tolist() == [NOW + number for number in range(8)]
    rows = sql.execute(
        "SELECT step, value, extract(epoch FROM time)::float8 FROM metric_points WHERE run = %s ORDER BY time",
        (producer.ticket.run,),
    ).fetchall()
    assert [row[0] for row in rows] == steps
    assert np.array([row[1] for row in rows])[:7].tobytes() == np.array(values)[:7].tobytes()
    assert [row[2] for row in rows] == points.times.tolist()
    (summary,) = store.summaries(producer.ticket.run)
    assert (summary.count, summary.nan_count, summary.inf_count) == (8, 2, 2)
    assert (summary.minimum, summary.min_step) == (-math.inf, 2**63 - 1)
    assert (summary.maximum, summary.max_step) == (math.inf, -5)
    assert len(store.points(producer.ticket.run, "no such key")) == 0


def test_copy_writes_what_a_plain_insert_would(store: Store, sql: psycopg.Connection[Any]) -> None:
    producer = Producer(opened(store))
    store.commit([producer.points([(0, 10, 0.5), (0, 11, 1.5), (0, 13, -2.0)])])
    names = (
        "run_number, producer_id, first_seq, last_seq, first_step, min_step, max_step, first_time_ms, key_id, attempt,"
        " rank, n, crc, is_wide, key_ids, counts"
    )
    own = "run_number = (SELECT number FROM runs WHERE id = %(run)s)"
    sql.execute(
        f"INSERT INTO metric_chunks ({names}, steps, times, values) SELECT {names}, '{{0,1,2}}', '{{0,1000,1000}}',"
        f" '{{0.5,1.5,-2}}' FROM metric_chunks WHERE {own}",
        {"run": producer.ticket.run},
    )
    found = sql.execute(
        f"SELECT count(*), count(DISTINCT (steps, times, values)), min(first_seq), max(last_seq), min(min_step),"
        f" max(max_step), max(n) FROM metric_chunks WHERE {own}",
        {"run": producer.ticket.run},
    ).fetchone()
    assert found == (2, 1, 1, 3, 10, 13, 3)


VALUES = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf, 1.7e308])


@given(st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 5), VALUES), min_size=1, max_size=5), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_summaries_over_many_commits_equal_brute_force(
    store: Store, batches: list[list[tuple[int, int, float]]]
) -> None:
    producer = Producer(opened(store))
    for rows in batches:
        store.commit([producer.points(rows)])
    everything = [row for rows in batches for row in rows]
    found = {summary.key: summary for summary in store.summaries(producer.ticket.run)}
    assert set(found) == {KEYS[key] for key, *_ in everything}
    for number, key in enumerate(KEYS):
        points = [(step, value) for index, step, value in everything if index == number]
        if not points:
            continue
        summary, real = found[key], [(step, value) for step, value in points if not math.isnan(value)]
        finite = [value for _, value in real if math.isfinite(value)]
        assert (summary.count, summary.nan_count) == (len(points), len(points) - len(real))
        assert (summary.first_step, summary.last_step) == (points[0][0], points[-1][0])
        assert np.float64(summary.last).tobytes() == np.float64(points[-1][1]).tobytes()
        lowest = min(real, key=lambda point: point[1], default=(None, None))
        highest = max(real, key=lambda point: point[1], default=(None, None))
        assert (summary.min_step, summary.minimum) == lowest
        assert (summary.max_step, summary.maximum) == highest
        assert (summary.mean is None) == (not finite)
        if finite and max(map(abs, finite)) < 1e300:
            assert summary.mean == pytest.approx(math.fsum(finite) / len(finite), abs=1e-3)


def test_the_last_value_is_the_highest_attempts_even_when_an_earlier_one_arrives_late(store: Store) -> None:
    first = opened(store)
    early = Producer(first)
    late_batch = early.points([(0, 90, 9.0)])
    second = Producer(opened(store, run=first.run, after_attempt=1))
    store.commit([second.points([(0, 50, 5.0)])])
    store.commit([late_batch])
    (summary,) = store.summaries(first.run)
    assert (summary.first, summary.last, summary.last_step, summary.last_attempt) == (9.0, 5.0, 50, 2)
    assert store.points(first.run, KEYS[0], attempt=1).values.tolist() == [9.0]
    assert store.points(first.run, KEYS[0]).attempts.tolist() == [1, 2]


def test_the_feed_waits_for_slow_transactions_and_then_misses_nothing(
    store: Store, schema_url: str, sql: psycopg.Connection[Any]
) -> None:
    ticket = opened(store)
    slow, fast = Producer(ticket, 0), Producer(ticket, 1)
    store.commit([slow.points(series(1)), fast.points(series(1))])
    before = store.chunks_after(ticket.run)
    with psycopg.connect(conninfo(schema_url)) as running:
        running.execute("SELECT pg_current_xact_id()")  # older than the commit below, and still open
        store.commit([fast.points(series(2, 10))])
        assert store.chunks_after(ticket.run, before[-1].position) == []
        assert ticket.run not in store.changed_runs(store.changed_runs().cursor).runs
    (even, odd) = store.chunks_after(ticket.run, before[-1].position)
    assert (even.steps.tolist(), odd.steps.tolist()) == ([10], [11])
    assert even.position == odd.position  # one row: a reader gets it as a whole
    assert store.chunks_after(ticket.run, odd.position) == []
    assert [chunk.position for chunk in store.chunks_after(ticket.run, limit=1)] == [c.position for c in before[:1]]
    assert store.chunks_after(ticket.run, FeedPosition())[0].times.tolist() == [NOW]


def test_changes_are_named_once_they_are_over(store: Store) -> None:
    before = store.changed_runs().cursor
    one, two = opened(store), opened(store)
    changed = store.changed_runs(before)
    assert changed.runs == (one.run, two.run)
    assert store.changed_runs(changed.cursor).runs == ()
    facts = store.facts_after(two.run)
    producer = Producer(two)
    store.commit([producer.facts(fact(FactKind.param, name="lr", value=0.1), fact(FactKind.tag, name="a", value="b"))])
    assert store.changed_runs(changed.cursor).runs == (two.run,)
    news = store.facts_after(two.run, facts.cursor)
    assert ([param.name for param in news.params], news.tags, news.attempts) == (["lr"], {"a": "b"}, ())
    assert store.facts_after(two.run, news.cursor).params == ()


def test_every_kind_of_fact_is_stored(store: Store) -> None:
    ticket = opened(store)
    producer = Producer(ticket)
    store.commit(
        [
            producer.facts(
                fact(FactKind.param, name="lr", value=0.1),
                fact(FactKind.param, name="lr", value=math.nan),
                fact(FactKind.tag, name="team", value="red\0"),
                fact(FactKind.note, text="looks good"),
                fact(FactKind.event, kind="guard", message="m", level="error", step=3, details={"x": math.inf}),
                fact(FactKind.metric, name=KEYS[1], unit="%", direction="max"),
                fact(FactKind.metric, name=KEYS[1], reduction="mean"),
                fact(FactKind.artifact, name="fig", uri="a", size_bytes=3, sha256="00", media_type="image/png"),
                fact(FactKind.artifact, name="fig", uri="b"),
                fact(FactKind.checkpoint, id="c1", uri="u", step=5, epoch=1, state="staged", metrics={"loss": 0.5}),
                fact(FactKind.checkpoint, id="c1", state="committed", size_bytes=2**40, is_best=True, cipher="aes"),
                fact(FactKind.provenance, git={"commit": "abc"}, command="x"),
                fact(FactKind.provenance, hosts=["h1"]),
                fact(FactKind.status, at=NOW + 5, status="FINISHED", reason="done"),
            ),
            producer.points([(1, 1, 0.5), (1, 2, 0.9), (1, 3, 0.7)]),
        ]
    )
    run = ticket.run
    (lr,) = store.params(run)
    assert (lr.type, math.isnan(lr.value)) == ("float", True)
    assert store.tags(run) == {"team": "red"}
    assert [(note.text, note.user) for note in store.notes(run)] == [("looks good", "ann")]
    guard = next(event for event in store.events(run) if event.kind == "guard")
    assert (guard.level, guard.step, guard.details, guard.at) == ("error", 3, {"x": "Infinity"}, NOW)
    (summary,) = store.summaries(run)
    assert (summary.unit, summary.reduction, summary.best, summary.best_step) == ("%", "mean", 0.9, 2)
    (artifact,) = store.artifacts(run)
    assert (artifact.uri, artifact.size_bytes, artifact.media_type) == ("b", 3, "image/png")
    (checkpoint,) = store.checkpoints(run)
    assert (checkpoint.uri, checkpoint.state, checkpoint.step) == ("u", "committed", 5)
    assert (checkpoint.size_bytes, checkpoint.is_best, checkpoint.cipher) == (2**40, True, "aes")
    assert checkpoint.metrics == {"loss": 0.5}
    (attempt,) = store.attempts(run)
    assert attempt.provenance == {"git": {"commit": "abc"}, "command": "x", "hosts": ["h1"]}
    detail = store.run(run)
    assert (detail.status, detail.reason, detail.ended) == (RunStatus.finished, "done", NOW + 5)
    assert not [event for event in store.events(run) if event.kind == "bad_fact"]


BAD = [
    {"kind": "nonsense", "at": NOW, "data": {}},
    {"kind": "param", "at": NOW, "data": {"value": 1}},
    {"kind": "tag", "at": NOW, "data": {"name": 3, "value": "x"}},
    {"kind": "metric", "at": NOW, "data": {"name": "k", "direction": "sideways"}},
    {"kind": "artifact", "at": NOW, "data": {"name": "a", "size_bytes": 2**70}},
    {"kind": "checkpoint", "at": NOW, "data": {"id": "c", "metrics": 3}},
    {"kind": "checkpoint", "at": NOW, "data": {"id": "c", "step": "soon"}},
    {"kind": "status", "at": NOW, "data": {"status": "EXPLODED"}},
    {"kind": "event", "at": "yesterday", "data": {"kind": "x"}},
    {"kind": "note", "at": NOW},
    "no fact at all",
    7,
    None,
]


def test_unusable_facts_become_events_and_hold_nobody_up(store: Store) -> None:
    ticket = opened(store)
    producer = Producer(ticket)
    good = [{"kind": "tag", "at": NOW, "data": {"name": f"t{number}", "value": "v"}} for number in range(len(BAD))]
    mixed = [entry for pair in zip(BAD, good, strict=True) for entry in pair]
    assert store.commit([producer.raw_facts(*mixed)])[producer.id, Stream.facts] == len(mixed)
    assert len(store.tags(ticket.run)) == len(good)
    complaints = [event for event in store.events(ticket.run) if event.kind == "bad_fact"]
    assert len(complaints) == len(BAD)
    assert "nonsense" in complaints[0].details["fact"]
    assert store.checkpoints(ticket.run) == []


def test_a_payload_that_is_no_list_of_facts_does_not_stop_the_stream(store: Store) -> None:
    producer = Producer(opened(store))
    broken = producer.batch(Stream.facts, 2, b"{not json")
    after = producer.facts(fact(FactKind.note, text="still here"))
    assert store.commit([broken, after])[producer.id, Stream.facts] == 3
    assert [note.text for note in store.notes(producer.ticket.run)] == ["still here"]


def test_status_of_an_earlier_attempt_and_illegal_moves_only_warn(store: Store) -> None:
    first = opened(store)
    old = Producer(first)
    new = Producer(opened(store, run=first.run, after_attempt=1))
    store.commit([old.facts(fact(FactKind.status, status="FAILED", reason="late"))])
    assert store.run(first.run).status is RunStatus.running
    assert [attempt.status for attempt in store.attempts(first.run)] == [RunStatus.failed, RunStatus.running]
    store.commit([new.facts(fact(FactKind.status, status="FINISHED"), fact(FactKind.status, status="PAUSED"))])
    assert store.run(first.run).status is RunStatus.finished
    ignored = [event.message for event in store.events(first.run) if event.kind == "status_ignored"]
    assert ignored == [
        "FAILED was not taken: attempt 1 is not the current one",
        "PAUSED was not taken: FINISHED cannot become PAUSED",
    ]


def test_keys_that_the_batch_does_not_name_are_kept_under_telling_names(store: Store) -> None:
    producer = Producer(opened(store))
    store.commit([producer.points([(4_000_000_000, 1, 1.0), (0, 1, 2.0)])])
    assert [summary.key for summary in store.summaries(producer.ticket.run)] == [KEYS[0], "unnamed/4000000000"]
