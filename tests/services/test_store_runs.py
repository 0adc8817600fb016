"""Runs, attempts, states, leases, and the questions people ask about them."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy.dialects import postgresql

from orchestrator.backends.postgres import conninfo
from orchestrator.errors import AmbiguousName, IllegalTransition, NotFound, ServiceUnavailable
from orchestrator.records import TRANSITIONS, RunSpec, RunStatus
from orchestrator.store import reading
from orchestrator.store.store import Store
from orchestrator.store.tables import APPEND_ONLY, ILLEGAL_TRANSITION
from orchestrator.store.views import FeedPosition, SinkCursor

NOW = 1_700_000_000.0


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


@pytest.fixture
def sql(schema_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(conninfo(schema_url), autocommit=True) as connection:
        yield connection


@pytest.fixture
def experiment() -> str:
    """One that no other test uses."""
    return f"e{uuid.uuid4().hex[:8]}"


def test_a_new_run_has_everything_that_the_spec_says(store: Store, experiment: str) -> None:
    parent = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    ticket = store.open_attempt(
        RunSpec(
            experiment=experiment, project="vision", user="ann", description="d\0",
            tags={"team": "red", "nan": "\ud800"},
            params={"lr": 0.1, "layers": [1, 2], "loss": math.inf, "name\0": "x\0y", "n": None, "x" * 3000: 1},
            config={"lr": math.nan, "deep": {"\0": 1}}, config_hash="abc", storage_url="/data/", workers=2, seed=2**62,
            job="raysubmit_1", model={"layers": 3}, dataset={"name": "digits"}, parent=parent.run, sweep="s1",
        ),
        now=NOW + 1, lease_seconds=30,
    )  # fmt: skip
    assert ticket.run > parent.run
    assert ticket.directory == f"/data/{experiment}/{ticket.run}"
    run = store.run(ticket.run)
    assert (run.status, run.attempt, run.user, run.project, run.sweep) == ("RUNNING", 1, "ann", "vision", "s1")
    assert (run.workers, run.seed, run.job, run.config_hash) == (2, 2**62, "raysubmit_1", "abc")
    assert (run.model, run.dataset, run.parents) == ({"layers": 3}, {"name": "digits"}, {parent.run: "parent"})
    assert run.config == {"lr": "NaN", "deep": {"": 1}}
    assert (run.created, run.started, run.ended, run.duration(NOW + 4)) == (NOW + 1, NOW + 1, None, 3)
    assert run.tags == {"nan": "?", "team": "red"}
    params = {param.name: (param.type, param.value) for param in store.params(ticket.run)}
    assert params["loss"] == ("float", math.inf)
    assert params["name"] == ("str", "xy")
    assert params["layers"] == ("list", [1, 2])
    assert len(params) == 6


def test_a_run_that_cannot_be_opened_leaves_nothing_behind(store: Store, experiment: str) -> None:
    with pytest.raises(NotFound):
        store.open_attempt(RunSpec(experiment=experiment, parent="nobody"), now=NOW, lease_seconds=30)
    with pytest.raises(NotFound):
        store.open_attempt(RunSpec(experiment=experiment, run="nobody"), now=NOW, lease_seconds=30)
    assert experiment not in {row.name for row in store.experiments()}


def test_a_restart_is_the_next_attempt_of_the_same_run(store: Store, experiment: str) -> None:
    first = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    store.request_cancel(first.run, user="bob", now=NOW)
    again = store.open_attempt(
        RunSpec(experiment="other", run=first.run, after_attempt=1), now=NOW + 9, lease_seconds=30
    )
    assert (again.run, again.name, again.experiment, again.attempt) == (first.run, first.name, experiment, 2)
    old, new = store.attempts(first.run)
    assert (old.status, old.reason, old.ended) == (RunStatus.crashed, "attempt 2 took its place", NOW + 9)
    assert (new.status, new.lease_until) == (RunStatus.running, NOW + 39)
    assert store.cancel_requested([first.run]) == set()
    assert store.run(first.run).cancel_requested is None
    assert [row for row in store.running_attempts() if row[0] == first.run] == [(first.run, 2)]


def test_the_database_itself_refuses_illegal_moves(store: Store, sql: psycopg.Connection[Any], experiment: str) -> None:
    ticket = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)

    def force(status: RunStatus) -> None:
        sql.execute("ALTER TABLE runs DISABLE TRIGGER runs_status_guard")
        sql.execute("UPDATE runs SET status = %s WHERE id = %s", (status, ticket.run))
        sql.execute("ALTER TABLE runs ENABLE TRIGGER runs_status_guard")

    for old in RunStatus:
        for new in RunStatus:
            force(old)
            move = "UPDATE runs SET status = %s WHERE id = %s"
            if new is old or new in TRANSITIONS[old]:
                sql.execute(move, (new, ticket.run))
            else:
                with pytest.raises(psycopg.Error, match=f"is {old} and cannot become {new}") as error:
                    sql.execute(move, (new, ticket.run))
                assert error.value.sqlstate == ILLEGAL_TRANSITION


def test_transitions_tell_whether_anything_changed(store: Store, experiment: str) -> None:
    ticket = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    run = ticket.run
    assert store.transition(run, 1, RunStatus.crashed, now=NOW + 1)
    assert not store.transition(run, 1, RunStatus.crashed, reason="lease over", error={"type": "E"}, now=NOW + 2)
    assert (store.run(run).reason, store.run(run).error, store.run(run).ended) == ("lease over", {"type": "E"}, NOW + 1)
    assert store.transition(run, 1, RunStatus.finished, user="ann", now=NOW + 3)
    assert (store.run(run).reason, store.run(run).error) == ("", None)
    with pytest.raises(IllegalTransition):
        store.transition(run, 1, RunStatus.paused, now=NOW + 4)
    with pytest.raises(NotFound):
        store.transition("nobody", 1, RunStatus.paused, now=NOW + 4)
    moves = [(event.message, event.level, event.user) for event in store.events(run) if event.kind == "status"]
    assert moves[1:] == [("RUNNING -> CRASHED", "error", ""), ("CRASHED -> FINISHED", "info", "ann")]


def test_events_cannot_be_changed(store: Store, sql: psycopg.Connection[Any], experiment: str) -> None:
    ticket = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    with pytest.raises(psycopg.Error) as error:
        sql.execute("UPDATE events SET message = '' WHERE run_id = %s", (ticket.run,))
    assert error.value.sqlstate == APPEND_ONLY
    (event,) = store.events(ticket.run)
    assert store.events(ticket.run, after=event.id) == []


def test_what_runs_is_known_with_the_length_of_its_lease(store: Store, experiment: str) -> None:
    lengths = (30, 120, 15, 15)
    runs = [store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=n).run for n in lengths]
    store.transition(runs[2], 1, RunStatus.paused, now=NOW)
    store.transition(runs[3], 1, RunStatus.finished, now=NOW)
    found = {run: seconds for (run, _), seconds in store.running_attempts().items() if run in runs}
    assert found == {runs[0]: 30, runs[1]: 120}


def test_who_asked_first_to_cancel_is_remembered(store: Store, experiment: str) -> None:
    ticket = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    store.request_cancel(ticket.run, user="ann", now=NOW + 1)
    store.request_cancel(ticket.run, user="bob", now=NOW + 2)
    run = store.run(ticket.run)
    assert (run.cancel_requested, run.cancel_requested_by) == (NOW + 1, "ann")
    assert store.cancel_requested([ticket.run, "nobody"]) == {ticket.run}
    with pytest.raises(NotFound):
        store.request_cancel("nobody", user="", now=NOW)


def test_runs_are_found_by_id_name_and_beginning(store: Store, experiment: str) -> None:
    one = store.open_attempt(RunSpec(experiment=experiment, name=f"base {experiment}"), now=1e9, lease_seconds=30)
    two = store.open_attempt(RunSpec(experiment=experiment, name=f"base {experiment}"), now=2e9, lease_seconds=30)
    three = store.open_attempt(RunSpec(experiment=experiment), now=3e9, lease_seconds=30)
    assert store.run(one.run).run == one.run
    assert store.run(three.name).run == three.run
    assert store.run(two.run[:-3]).run == two.run
    with pytest.raises(AmbiguousName) as ambiguous:
        store.run(f"base {experiment}")
    assert ambiguous.value.candidates == (two.run, one.run)
    with pytest.raises(NotFound) as missing:
        store.run(three.name + "x")
    assert three.name in missing.value.nearest
    for nothing in ("", "%", "_"):
        with pytest.raises(NotFound):
            store.run(nothing)


def test_lists_are_newest_first_and_can_be_filtered(store: Store, experiment: str) -> None:
    tickets = [
        store.open_attempt(
            RunSpec(experiment=experiment, project=experiment, tags={"seed": str(number % 2), "long": "x" * 5000}),
            now=NOW + number, lease_seconds=30,
        )
        for number in range(4)
    ]  # fmt: skip
    store.transition(tickets[0].run, 1, RunStatus.finished, now=NOW)

    def found(**filters: Any) -> list[int]:
        rows = store.runs(experiment=experiment, **filters)
        return [[ticket.run for ticket in tickets].index(row.run) for row in rows]

    assert found() == [3, 2, 1, 0]
    assert found(limit=2, offset=1) == [2, 1]
    assert found(status=RunStatus.finished) == [0]
    assert found(tags={"seed": "1"}) == [3, 1]
    assert found(tags={"seed": "1", "long": "x" * 5000}) == [3, 1]
    assert found(tags={"long": "x" * 4999}) == []
    assert found(search=tickets[2].name[2:].upper()) == [2]
    assert found(search=tickets[1].run[:-4]) == [1]
    assert found(search="%") == []
    assert found(project="other") == []
    (row,) = [row for row in store.experiments(project=experiment) if row.name == experiment]
    assert (row.runs, row.active, row.last_run) == (4, 3, NOW + 3)


def test_a_page_of_many_runs_is_read_from_an_index(store: Store, sql: psycopg.Connection[Any], experiment: str) -> None:
    store.open_attempt(RunSpec(experiment=experiment, project="many"), now=NOW, lease_seconds=30)
    sql.execute(
        "INSERT INTO runs (id, experiment_id, project, name, status) SELECT 'm' || n, e.id, 'many', 'many-' || n,"
        " CASE n %% 10 WHEN 0 THEN 'FAILED' ELSE 'FINISHED' END FROM generate_series(1, 10000) n, experiments e"
        " WHERE e.name = %s",
        (experiment,),
    )
    sql.execute("ANALYZE runs")
    ids = [row[0] for row in sql.execute("SELECT id FROM experiments WHERE name = %s", (experiment,))]

    def plan(**filters: Any) -> str:
        given: dict[str, Any] = dict.fromkeys(("experiment_ids", "project", "status", "tags", "search"))
        query = reading.runs_query(**(given | filters), limit=50, offset=0)
        compiled = query.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
        rows = sql.execute(f"EXPLAIN {compiled}".replace("%%", "%").encode()).fetchall()
        return "\n".join(row[0] for row in rows)

    for filters in ({}, {"experiment_ids": ids}, {"project": "many"}, {"status": RunStatus.failed}):
        assert "Seq Scan on runs" not in plan(**filters), filters
        assert "Sort" not in plan(**filters), filters
    assert len(store.runs(experiment=experiment, search="ANY-77")) == 50


def test_links_and_cursors_are_kept(store: Store, experiment: str) -> None:
    ticket = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    store.set_link(ticket.run, "mlflow", {"run_id": "1"})
    store.set_link(ticket.run, "wandb", "w")
    assert store.run(ticket.run).links == {"mlflow": {"run_id": "1"}, "wandb": "w"}
    with pytest.raises(NotFound):
        store.set_link("nobody", "x", 1)
    assert store.cursor("mlflow", ticket.run) == SinkCursor()
    for number in (1, 2):
        cursor = SinkCursor(position=FeedPosition(xid=number, id=7), facts=3, state={"a": number})
        store.save_cursor("mlflow", ticket.run, cursor)
        assert store.cursor("mlflow", ticket.run) == cursor


def test_a_server_that_does_not_answer_is_named_without_the_password() -> None:
    store = Store("postgresql://me:geheim@127.0.0.1:1/orc")
    with pytest.raises(ServiceUnavailable) as error:
        store.check_schema()
    assert "127.0.0.1:1/orc" in str(error.value)
    assert "refused" in str(error.value)
    assert "geheim" not in str(error.value)


def test_ping_tells_version_and_latency(store: Store) -> None:
    version, seconds = store.ping()
    assert int(version.split(".")[0]) >= 15
    assert 0 < seconds < 10


def test_the_next_attempt_hears_how_those_before_it_failed(store: Store, experiment: str) -> None:
    ticket = store.open_attempt(RunSpec(experiment=experiment), now=NOW, lease_seconds=30)
    assert ticket.earlier == ()
    error = {"kind": "storage", "what": "x" * 2000, "traceback": "long", "hint": "h", "log": "l", "step": 3}
    decision = {"action": "restart", "changes": {"splits": 2}}
    told = (
        (RunStatus.failed, {**error, "decision": decision}), (RunStatus.crashed, None), (RunStatus.cancelled, error),
        (RunStatus.finished, None), (RunStatus.crashed, {"kind": "node_lost"}),
    )  # fmt: skip
    for attempt, (status, what) in enumerate(told, 1):
        store.transition(ticket.run, attempt, status, error=what, now=NOW)
        ticket = store.open_attempt(RunSpec(experiment=experiment, run=ticket.run), now=NOW, lease_seconds=30)
    first, finished, last = ticket.earlier
    assert first == {
        "attempt": 1, "status": "FAILED",
        "error": {"kind": "storage", "what": "x" * 1000, "step": 3, "decision": decision},
    }  # fmt: skip
    assert (finished["status"], finished["error"]) == ("FINISHED", {})
    assert (last["attempt"], last["error"]) == (5, {"kind": "node_lost"})
