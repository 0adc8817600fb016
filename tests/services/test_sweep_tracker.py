"""What a sweep's driver asks of the tracker: what it opens is looked after, whoever answers and whatever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.clock import ManualClock
from orchestrator.errors import NotFound, SweepTaken
from orchestrator.records import RunSpec, RunStatus, RunTicket
from orchestrator.store import migrate
from orchestrator.store.names import trial_run_id
from orchestrator.store.store import Store
from orchestrator.sweep_records import DecisionRow, JobRow, RunEnd, SweepSpec, SweepStep, TrialRow
from orchestrator.sweeps.jobs import Ledger
from orchestrator.tracking.service import TrackerService
from tests.plugins.local_stack import LocalStack

LEASE = 15.0


class World:
    """A tracker whose clock stands still, and the store to look into."""

    def __init__(self, directory: Path, url: str) -> None:
        self.clock, self.store = ManualClock(), Store(url)
        self.tracker = TrackerService(directory / "wal", url, clock=self.clock)
        self.parent = self.tracker.open_run(RunSpec(experiment="digits", lease=1e6)).run

    def pass_by(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            self.tracker.lease_step()


@pytest.fixture
def world(tmp_path: Path, database_url: str) -> Iterator[World]:
    migrate.upgrade(database_url)
    world = World(tmp_path, database_url)
    yield world
    world.tracker.stop()
    world.store.close()


def beginning(sweep: str, seq: int, trial: int, driver: str = "one") -> SweepStep:
    run = trial_run_id(sweep, f"{trial}.0")
    spec = RunSpec(experiment="digits", parent=sweep, sweep=sweep, new_run=run, lease=LEASE)
    return SweepStep(
        sweep=sweep, driver=driver, after=seq - 1,
        decisions=(DecisionRow(seq=seq, kind="assign", trial=trial, job=trial, inputs={"n": 1e23}),),
        trials=(TrialRow(number=trial, values={"lr": 1.0}, status="running", run=run),),
        jobs=(JobRow(number=trial, trial=trial, run=run),),
        opens=((trial, spec),),
    )  # fmt: skip


def ending(step: SweepStep, ticket: RunTicket) -> SweepStep:
    """The step after that one: its job is done."""
    decision = replace(step.decisions[0], seq=step.after + 2, kind="result", inputs={})
    end = RunEnd(run=ticket.run, attempt=ticket.attempt, status="FINISHED", reason="complete")
    job = replace(step.jobs[0], status="complete", attempt=ticket.attempt, ended_at=1.0)
    return replace(step, after=step.after + 1, decisions=(decision,), jobs=(job,), opens=(), closes=(end,))


def test_an_attempt_of_a_trial_lives_as_long_as_somebody_speaks_for_it(world: World) -> None:
    world.tracker.open_sweep(SweepSpec(sweep=world.parent), "one")
    steps = [beginning(world.parent, trial, trial) for trial in range(3)]
    kept, ended, silent = (world.tracker.sweep_step(step)[trial] for trial, step in enumerate(steps))
    end = ending(steps[1], ended)
    world.tracker.sweep_step(replace(end, after=2, decisions=(replace(end.decisions[0], seq=3),)))
    for _ in range(int(LEASE) + 3):
        assert world.tracker.heartbeats([(kept.run, 1)]) == [False]
        world.pass_by(1)
    statuses = {ticket.run: world.store.run(ticket.run).status for ticket in (kept, ended, silent)}
    assert statuses == {
        kept.run: RunStatus.running, ended.run: RunStatus.finished, silent.run: RunStatus.crashed,
    }  # fmt: skip
    assert world.tracker.health()["running"] == 2, "the parent and the one that is kept"


def test_a_trial_that_somebody_cancels_hears_of_it_until_its_next_attempt(world: World) -> None:
    world.tracker.open_sweep(SweepSpec(sweep=world.parent), "one")
    step = beginning(world.parent, 0, 0)
    (ticket,) = world.tracker.sweep_step(step).values()
    world.tracker.cancel(ticket.run, "ann")
    assert world.tracker.heartbeats([(ticket.run, 1)]) == [True]
    assert world.tracker.sweep_poll(world.parent, "one").stops == (ticket.run,)
    again = replace(
        step, after=0, decisions=(DecisionRow(seq=1, kind="retry", trial=0, job=0),),
        opens=((0, RunSpec(experiment="digits", run=ticket.run, after_attempt=1, lease=LEASE)),),
    )  # fmt: skip
    (second,) = world.tracker.sweep_step(again).values()
    assert world.tracker.heartbeats([(ticket.run, 1), (second.run, 2)]) == [True, False], "the first is superseded"


def test_a_step_whose_answer_was_lost_is_looked_after_by_the_next_tracker(world: World, tmp_path: Path) -> None:
    world.tracker.open_sweep(SweepSpec(sweep=world.parent), "one")
    step = beginning(world.parent, 0, 0)
    first = world.store.sweep_step(step, now=world.clock.now())  # committed, and then the tracker died
    assert world.tracker.sweep_step(step) == first
    world.pass_by(LEASE - 2)
    assert world.store.run(first[0].run).status is RunStatus.running
    world.pass_by(4)
    assert world.store.run(first[0].run).status is RunStatus.crashed, "nobody spoke for it"


def test_the_local_tracker_says_the_same(local: LocalStack) -> None:
    """Over a socket, and over the death of the process that answers."""
    tracker = local.tracker()
    ledger: Ledger = tracker
    parent = tracker.open_run(RunSpec(experiment="digits"))
    space = {"z": 1.0, "a": [1e23, None], "big": 10**20}
    record = ledger.open_sweep(SweepSpec(sweep=parent.run, space=space, settings={"samples": 2}), "one")
    assert repr(record.spec.space) == repr(space)
    step = beginning(parent.run, 0, 0)
    (ticket,) = ledger.sweep_step(step).values()
    os.kill(tracker.describe()["pid"], signal.SIGKILL)
    assert ledger.sweep_step(step) == {0: ticket}, "the next tracker knows it"
    assert tracker.heartbeats([(parent.run, 1), (ticket.run, 1)]) == [False, False]
    request = tracker.ask_sweep(parent.run, "hold", {"trials": [0]}, "ann")
    poll = ledger.sweep_poll(parent.run, "one")
    assert [(each.id, each.kind, each.details, each.who) for each in poll.requests] == [
        (request, "hold", {"trials": [0]}, "ann")
    ]  # fmt: skip
    assert not poll.is_taken
    taken = ledger.open_sweep(SweepSpec(sweep=parent.run), "two")
    assert [(decision.seq, decision.kind) for decision in taken.decisions] == [(0, "assign")]
    assert [(job.number, job.run, job.attempt) for job in taken.jobs] == [(0, ticket.run, 1)]
    with pytest.raises(SweepTaken, match="two"):
        ledger.sweep_step(ending(step, ticket))
    ledger.sweep_step(replace(ending(step, ticket), driver="two"))
    assert local.store.run(ticket.run).status is RunStatus.finished
    with pytest.raises(NotFound):
        tracker.ask_sweep("nobody", "stop", {})
    first, second = tracker.open_runs([RunSpec(experiment="digits"), RunSpec(experiment="digits")])
    for run in (first, second, parent):
        local.store.transition(run.run, 1, RunStatus.finished, now=1.0)
