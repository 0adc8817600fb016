"""The ledger of sweeps: one driver decides, a lost answer changes nothing, what was decided comes back as it was."""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestrator.backends.postgres import conninfo
from orchestrator.cli import main
from orchestrator.directory import record
from orchestrator.errors import NotFound, RunIsActive, SweepTaken
from orchestrator.records import RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.store.errors import BadRecord, SweepHasTrials
from orchestrator.store.names import is_run_id, trial_run_id
from orchestrator.store.store import Store
from orchestrator.store.tables import APPEND_ONLY
from orchestrator.sweep_records import DecisionRow, JobRow, RunEnd, SweepSpec, SweepStep, TrialRow

NOW = 1_700_000_000.0
EXACT = {"z": 1.0, "a": 1e23, "m": [1, 1.0, 1e-7, "1e-7"], "b": None, "c": {"y": 1, "x": 2}}
"""jsonb would sort its keys and make whole numbers of some."""


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
def sweep(store: Store) -> str:
    """A sweep that driver `one` has, of an experiment that no other test uses."""
    parent = store.open_attempt(RunSpec(experiment=f"e{uuid.uuid4().hex[:8]}"), now=NOW, lease_seconds=30)
    store.open_sweep(SweepSpec(sweep=parent.run, settings={"samples": 9}, space=EXACT, seed=2**62), "one")
    return parent.run


def spec_of(sweep: str, trial: int, attempt: int = 0) -> RunSpec:
    """The trial's next attempt; the one before it was `attempt`."""
    run = trial_run_id(sweep, f"{trial}.0")
    known = {"run": run, "after_attempt": attempt} if attempt else {"new_run": run}
    return RunSpec(experiment="digits", parent=sweep, sweep=sweep, config_hash=f"c{trial}", lease=15.0, **known)  # type: ignore[arg-type]


def assigning(sweep: str, seq: int, trial: int, *, driver: str = "one", job: int | None = None) -> SweepStep:
    """A new trial and its first job, with the two decisions `seq` and the one behind it."""
    job, run = trial if job is None else job, trial_run_id(sweep, f"{trial}.0")
    return SweepStep(
        sweep=sweep, driver=driver, after=seq - 1,
        decisions=(
            DecisionRow(seq=seq, kind="suggest", trial=trial, inputs=EXACT, outcome={"values": {"lr": 0.1 * trial}}),
            DecisionRow(seq=seq + 1, kind="assign", trial=trial, job=job, inputs={"n": seq}, outcome={"until": 3.0}),
        ),
        trials=(TrialRow(number=trial, values={"lr": 0.1 * trial, "b": 1}, status="running", run=run, rung=0),),
        jobs=(JobRow(number=job, trial=trial, until=3.0, run=run, judge={"until": 3.0}),),
        opens=((job, spec_of(sweep, trial)),),
    )  # fmt: skip


def ending(sweep: str, seq: int, trial: int, ticket: RunTicket, score: float, *, driver: str = "one") -> SweepStep:
    run = ticket.run
    return SweepStep(
        sweep=sweep, driver=driver, after=seq - 1,
        decisions=(DecisionRow(seq=seq, kind="result", trial=trial, job=trial, outcome={"score": score}),),
        trials=(TrialRow(number=trial, values={"lr": 0.1}, status="complete", run=run, score=score, ended_at=NOW + 9),),
        jobs=(
            JobRow(
                number=trial, trial=trial, run=run, attempt=ticket.attempt, status="complete", score=score,
                reports=[[1.0, score], [2.0, None]], ended_at=NOW + 9,
            ),
        ),
        closes=(RunEnd(run=run, attempt=ticket.attempt, status="FINISHED", reason="complete"),),
        spent={"hours": 0.5},
    )  # fmt: skip


def test_what_a_step_says_is_all_there(store: Store, sweep: str) -> None:
    (ticket,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    assert (ticket.run, ticket.attempt) == (trial_run_id(sweep, "0.0"), 1)
    run = store.run(ticket.run)
    assert (run.status, run.sweep, run.parents) == (RunStatus.running, sweep, {sweep: "parent"})
    assert run.tags == {"orc.sweep": sweep, "orc.trial": "0", "orc.rung": "0"}
    store.sweep_step(ending(sweep, 2, 0, ticket, 0.25), now=NOW + 9)
    assert (store.run(ticket.run).status, store.run(ticket.run).reason) == (RunStatus.finished, "complete")
    (trial,), (job,) = store.sweep_trials(sweep), store.sweep_jobs(sweep)
    assert (trial.score, trial.status, trial.run, trial.ended_at) == (0.25, "complete", ticket.run, NOW + 9)
    assert (job.attempt, job.status, job.reports, job.ended_at) == (1, "complete", [[1.0, 0.25], [2.0, None]], NOW + 9)
    assert [decision.kind for decision in store.sweep_decisions(sweep)] == ["suggest", "assign", "result"]
    assert [decision.seq for decision in store.sweep_decisions(sweep, after=0, limit=1)] == [1]
    detail = store.sweep(sweep)
    assert (detail.decisions, detail.driver, detail.spent, detail.trials) == (3, "one", {"hours": 0.5}, {"complete": 1})
    assert sweep in {row.sweep for row in store.sweeps(limit=1000)}


def test_json_comes_back_as_it_was(store: Store, sweep: str) -> None:
    store.sweep_step(assigning(sweep, 0, 0), now=NOW)
    record = store.open_sweep(SweepSpec(sweep=sweep, settings={"samples": 1}), "two")
    assert repr(record.spec.space) == repr(EXACT), "the order of keys and the kinds of numbers"
    assert (record.spec.settings, record.spec.seed) == ({"samples": 9}, 2**62), "as at the start"
    assert repr(store.sweep_decisions(sweep)[0].inputs) == repr(EXACT)
    assert all(decision.inputs == {} for decision in record.decisions), "only who verifies needs them"
    assert list(store.sweep_trials(sweep)[0].values) == ["lr", "b"]


def test_numbers_that_json_lacks_are_text(store: Store, sweep: str) -> None:
    step = assigning(sweep, 0, 0)
    decision = replace(step.decisions[0], outcome={"score": math.nan, "low": -math.inf, "text": "a\0b"})
    row = replace(step.trials[0], score=math.inf)
    store.sweep_step(replace(step, decisions=(decision, step.decisions[1]), trials=(row,)), now=NOW)
    assert store.sweep_decisions(sweep)[0].outcome == {"score": "NaN", "low": "-Infinity", "text": "ab"}
    assert store.sweep_trials(sweep)[0].score is None


def test_the_same_step_again_gives_the_same_and_changes_nothing(
    store: Store, sweep: str, sql: psycopg.Connection[Any]
) -> None:
    step = assigning(sweep, 0, 0)
    first = store.sweep_step(step, now=NOW)
    rows = sql.execute("SELECT ctid, xmin FROM runs UNION ALL SELECT ctid, xmin FROM sweep_jobs").fetchall()
    assert store.sweep_step(step, now=NOW + 5) == first
    assert sql.execute("SELECT ctid, xmin FROM runs UNION ALL SELECT ctid, xmin FROM sweep_jobs").fetchall() == rows
    assert len(store.attempts(first[0].run)) == 1
    other = replace(step, decisions=(replace(step.decisions[0], outcome={"values": {"lr": 7}}), step.decisions[1]))
    for wrong in (other, replace(step, decisions=step.decisions[:1])):
        with pytest.raises(SweepTaken):  # somebody with our name decided otherwise
            store.sweep_step(wrong, now=NOW)
    with pytest.raises(SweepTaken):  # of a database that is older than the driver thinks
        store.sweep_step(assigning(sweep, 5, 1), now=NOW)
    assert store.sweep(sweep).decisions == 2


def test_a_driver_that_lost_the_sweep_decides_nothing_any_more(store: Store, sweep: str) -> None:
    store.sweep_step(assigning(sweep, 0, 0), now=NOW)
    record = store.open_sweep(SweepSpec(sweep=sweep), "two")
    assert [decision.seq for decision in record.decisions] == [0, 1]
    assert [(job.number, job.status, job.attempt) for job in record.jobs] == [(0, "assigned", 1)]
    assert store.sweep_poll(sweep, "one").is_taken
    assert not store.sweep_poll(sweep, "two").is_taken
    for step in (assigning(sweep, 2, 1), SweepStep(sweep=sweep, driver="one", after=1, spent={"hours": 9.0})):
        with pytest.raises(SweepTaken, match="two"):
            store.sweep_step(step, now=NOW)
    assert store.sweep(sweep).spent == {}
    store.sweep_step(assigning(sweep, 2, 1, driver="two"), now=NOW)
    assert store.sweep(sweep).trials == {"running": 2}


def test_of_two_drivers_at_once_one_goes_on(store: Store, sweep: str) -> None:
    """Ten take the sweep from each other and decide: each number is given once."""
    accepted: dict[str, int] = {}
    start = threading.Barrier(10)

    def drive(name: str) -> None:
        start.wait()
        for _ in range(3):
            record = store.open_sweep(SweepSpec(sweep=sweep), name)
            seq = len(record.decisions)
            try:
                store.sweep_step(assigning(sweep, seq, seq // 2, driver=name), now=NOW)
            except SweepTaken:
                continue
            accepted[name] = accepted.get(name, 0) + 1

    threads = [threading.Thread(target=drive, args=(f"driver {n}",)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decisions = store.sweep_decisions(sweep)
    assert [decision.seq for decision in decisions] == list(range(2 * sum(accepted.values())))
    assert len(store.sweep_trials(sweep)) == sum(accepted.values()) >= 1


def test_a_step_that_cannot_be_leaves_nothing(store: Store, sweep: str) -> None:
    step = assigning(sweep, 0, 0)
    with pytest.raises(ValueError, match="do not follow"):
        store.sweep_step(replace(step, after=3), now=NOW)
    with pytest.raises(ValueError, match="decides nothing"):
        store.sweep_step(replace(step, decisions=()), now=NOW)
    with pytest.raises(NotFound):
        store.sweep_step(replace(step, opens=((0, RunSpec(experiment="digits", run="nobody")),)), now=NOW)
    assert (store.sweep(sweep).decisions, store.sweep_trials(sweep)) == (0, ())
    with pytest.raises(NotFound):
        store.open_sweep(SweepSpec(sweep="20261121-000000-00000000"), "one")
    with pytest.raises(NotFound):
        store.sweep_step(replace(step, sweep="nobody"), now=NOW)


def test_a_trial_goes_on_in_its_next_attempt(store: Store, sweep: str) -> None:
    """A promotion, and what a killed driver left running; a checkpoint of another trial makes a fork of it."""
    (first,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    (donor,) = store.sweep_step(assigning(sweep, 2, 1), now=NOW).values()
    again = replace(assigning(sweep, 4, 0), opens=((0, replace(spec_of(sweep, 0), run=first.run, new_run="")),))
    with pytest.raises(RunIsActive):
        store.sweep_step(again, now=NOW)
    promoted = SweepStep(
        sweep=sweep, driver="one", after=3,
        decisions=(DecisionRow(seq=4, kind="promote", trial=0, job=2),),
        jobs=(JobRow(number=2, trial=0, rung=1, clone={"run": donor.run, "name": "step-7", "step": 7}),),
        opens=((2, spec_of(sweep, 0, attempt=1)),),
        closes=(RunEnd(run=first.run, attempt=1, status="FINISHED", reason="waits at rung 0"),),
    )  # fmt: skip
    (second,) = store.sweep_step(promoted, now=NOW).values()
    assert (second.run, second.attempt) == (first.run, 2)
    run = store.run(first.run)
    assert (run.status, run.tags["orc.rung"], run.parents) == (
        RunStatus.running, "1", {sweep: "parent", donor.run: "fork"}
    )  # fmt: skip
    assert [(each.status, each.reason) for each in store.attempts(first.run)] == [
        (RunStatus.finished, "waits at rung 0"), (RunStatus.running, "")
    ]  # fmt: skip
    # What ends late, twice or otherwise changes nothing; of a removed run nothing is asked.
    store.sweep_step(
        SweepStep(
            sweep=sweep, driver="one", after=4,
            closes=(
                RunEnd(run=first.run, attempt=1, status="FAILED"),
                RunEnd(run=second.run, attempt=2, status="FINISHED"),
                RunEnd(run=second.run, attempt=2, status="FAILED"),
                RunEnd(run="nobody", attempt=1, status="FAILED"),
            ),
        ),
        now=NOW,
    )  # fmt: skip
    assert [each.status for each in store.attempts(first.run)] == [RunStatus.finished] * 2


def test_decisions_cannot_be_changed_or_removed(store: Store, sweep: str, sql: psycopg.Connection[Any]) -> None:
    store.sweep_step(assigning(sweep, 0, 0), now=NOW)
    for statement in ("UPDATE sweep_decisions SET kind = 'x' WHERE sweep_id = %s", "DELETE FROM sweep_decisions"):
        with pytest.raises(psycopg.Error) as refused:
            sql.execute(statement, (sweep,) if "%s" in statement else None)
        assert refused.value.sqlstate == APPEND_ONLY


def test_what_is_asked_is_answered_once(store: Store, sweep: str) -> None:
    first = store.ask_sweep(sweep, "hold", {"trials": [3]}, "ann")
    second = store.ask_sweep(sweep, "stop", {})
    assert [(each.id, each.kind, each.details, each.who) for each in store.sweep_poll(sweep, "one").requests] == [
        (first, "hold", {"trials": [3]}, "ann"), (second, "stop", {}, "")
    ]  # fmt: skip
    step = SweepStep(
        sweep=sweep, driver="one", after=-1, answered=((first, "trial 3 waits"),),
        decisions=(DecisionRow(seq=0, kind="request", outcome={"request": first}),),
    )  # fmt: skip
    store.sweep_step(step, now=NOW)
    assert [each.id for each in store.sweep_poll(sweep, "one").requests] == [second]
    answered, waiting = store.sweep_requests(sweep)
    assert (answered.answer, answered.done_at is not None, waiting.done_at) == ("trial 3 waits", True, None)
    with pytest.raises(NotFound):
        store.ask_sweep("nobody", "stop", {})


def test_a_poll_tells_which_trials_somebody_stopped(store: Store, sweep: str) -> None:
    (ticket,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    assert store.sweep_poll(sweep, "one").stops == ()
    store.request_cancel(ticket.run, user="ann", now=NOW)
    assert store.sweep_poll(sweep, "one").stops == (ticket.run,)
    store.sweep_step(ending(sweep, 2, 0, ticket, 0.5), now=NOW)
    assert store.sweep_poll(sweep, "one").stops == ()


def test_a_list_of_runs_may_leave_trials_out(store: Store, sweep: str) -> None:
    (ticket,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    assert {sweep, ticket.run} <= {row.run for row in store.runs(limit=1000)}
    without = {row.run for row in store.runs(limit=1000, trials=False)}
    assert sweep in without
    assert ticket.run not in without


def test_a_sweep_is_removed_when_its_trials_are(store: Store, sweep: str, sql: psycopg.Connection[Any]) -> None:
    (ticket,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    store.sweep_step(ending(sweep, 2, 0, ticket, 0.5), now=NOW)
    store.transition(sweep, 1, RunStatus.finished, now=NOW)
    with pytest.raises(SweepHasTrials, match="--trials"):
        store.remove_run(sweep, user="ann", now=NOW)
    assert store.trial_runs(sweep) == [ticket.run]
    store.remove_run(ticket.run, user="ann", now=NOW)
    assert (store.sweep_trials(sweep)[0].run, store.sweep_jobs(sweep)[0].run) == ("", ""), "what it came to stays"
    store.remove_run(sweep, user="ann", now=NOW)
    with pytest.raises(NotFound):
        store.sweep(sweep)
    for table in ("sweeps WHERE id", "trials WHERE sweep_id", "sweep_jobs WHERE sweep_id",
                  "sweep_decisions WHERE sweep_id"):  # fmt: skip
        assert sql.execute(f"SELECT count(*) FROM {table} = %s", (sweep,)).fetchone() == (0,)


def test_ids_of_trials_differ_within_a_sweep() -> None:
    sweep = "20261121-081530-a1b2c3d4"
    ids = {trial_run_id(sweep, f"{trial}.{repeat}") for trial in range(20_000) for repeat in range(5)}
    assert len(ids) == 100_000
    assert all(is_run_id(one) for one in list(ids)[:100])
    assert is_run_id(trial_run_id(sweep, "1_00000"))


@pytest.mark.parametrize("is_sweep_first", [True, False])
def test_a_sweep_travels_with_its_ledger(
    is_sweep_first: bool, store: Store, sweep: str, sql: psycopg.Connection[Any]
) -> None:
    """Its runs find their places in it, in whatever order they come."""
    (ticket,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    store.sweep_step(ending(sweep, 2, 0, ticket, 0.5), now=NOW)
    store.ask_sweep(sweep, "stop", {"why": "n"}, "ann")
    store.transition(sweep, 1, RunStatus.finished, now=NOW)
    tables = ("sweeps WHERE id", "trials WHERE sweep_id", "sweep_jobs WHERE sweep_id", "sweep_decisions WHERE sweep_id")

    def contents() -> list[Any]:
        passing = "'{id,driver,driver_since}'::text[]"
        return [
            sql.execute(f"SELECT to_jsonb(t) - {passing} FROM {table.replace(' ', ' t ', 1)} = %s ORDER BY 1", (sweep,))
            .fetchall() for table in tables
        ]  # fmt: skip

    before, requests = contents(), [replace(each, id=0) for each in store.sweep_requests(sweep)]
    records = {}
    for run in (sweep, ticket.run):
        with store.snapshot(run) as snapshot:
            ledger = snapshot.ledger()
            assert bool(ledger) is (run == sweep)
            whole = {**snapshot.record, "protocol": 2, "ledger": ledger} if ledger else snapshot.record
            records[run] = record.decode(record.encode(whole))
    for run in (ticket.run, sweep):
        store.remove_run(run, user="ann", now=NOW)
    assert not any(contents())
    odd = records[sweep] | {"ledger": records[sweep]["ledger"] | {"decisions": [{"seq": 0, "odd": 1}]}}
    with pytest.raises(BadRecord, match="decisions"):
        store.restore_run(odd, [])
    order = (sweep, ticket.run) if is_sweep_first else (ticket.run, sweep)
    missing = [store.restore_run(records[run], []) for run in order]
    assert missing == ([(), ()] if is_sweep_first else [(sweep,), ()])
    assert contents() == before
    assert [replace(each, id=0) for each in store.sweep_requests(sweep)] == requests
    assert store.open_sweep(SweepSpec(sweep=sweep), "three").spec.settings == {"samples": 9}


def test_orc_rm_takes_a_sweep_with_its_trials(
    store: Store, schema_url: str, sweep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ticket,) = store.sweep_step(assigning(sweep, 0, 0), now=NOW).values()
    store.sweep_step(ending(sweep, 2, 0, ticket, 0.5), now=NOW)
    store.transition(sweep, 1, RunStatus.finished, now=NOW)
    Stack(home=str(tmp_path), database_url=schema_url, storage_url=str(tmp_path / "runs")).save()
    assert main.main(["--home", str(tmp_path), "rm", sweep, "--yes"]) == 2
    assert "orc rm --trials" in capsys.readouterr().err
    assert main.main(["--home", str(tmp_path), "rm", "--trials", sweep, "--yes"]) == 0
    assert store.whereabouts([sweep, ticket.run]) == {}
    assert store.sweep_decisions(sweep) == ()
