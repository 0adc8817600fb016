"""The core on the real ledger: killed and taken over, it leaves what it leaves in memory, and its decisions verify."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.config.settings import AshaConfig, PbtConfig, SweepConfig
from orchestrator.records import RunSpec, RunTicket
from orchestrator.store.names import trial_run_id
from orchestrator.store.store import Store
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned, Ending
from orchestrator.sweeps.replay import verify_stored
from orchestrator.sweeps.rules import scheduler_for
from orchestrator.sweeps.search import RandomSearcher
from orchestrator.sweeps.state import Decision, Kind
from tests.plugins.sweep_ledger import Killed, MemoryLedger, Toy, toy_core, toy_space

NOW = 1_700_000_000.0


class Stored:
    """The store as a ledger; `after` is called when a step is written."""

    def __init__(self, store: Store) -> None:
        self.store, self.steps = store, 0
        self.after: Callable[[int], None] = lambda step: None

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        return self.store.open_sweep(spec, driver)

    def sweep_step(self, step: SweepStep) -> Mapping[int, RunTicket]:
        tickets = self.store.sweep_step(step, now=NOW)
        self.steps += 1
        self.after(self.steps)
        return tickets

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        return self.store.sweep_poll(sweep, driver)


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


@pytest.fixture
def sweep(store: Store) -> str:
    return store.open_attempt(RunSpec(experiment=f"e{uuid.uuid4().hex[:8]}"), now=NOW, lease_seconds=30).run


def core_of(sweep: str, ledger: Stored, settings: SweepConfig, driver: str) -> Core:
    def spec_of(trial: int, repeat: int, values: Mapping[str, Any]) -> RunSpec:
        run = trial_run_id(sweep, f"{trial}.{repeat}")
        return RunSpec(
            experiment="digits", parent=sweep, sweep=sweep, new_run=run, config_hash=f"c{values['x']:.3f}", seed=7
        )

    def searcher(settings: SweepConfig, space: Any) -> RandomSearcher:
        return RandomSearcher(space, seed=3, samples=settings.samples)

    space = toy_space()
    spec = SweepSpec(sweep=sweep, seed=3, settings=dataclasses.asdict(settings), space=space.to_json())
    return Core.open(
        spec, ledger, driver=driver, settings=settings, space=space, searcher=searcher(settings, space),
        spec_of=spec_of, renewed=searcher,
    )  # fmt: skip


def drive(core: Core, train: Callable[[Assigned], Ending]) -> None:
    while (job := core.next_job()) is not None:
        core.ended(job.job, train(job))
    assert core.is_over()


CONFIGS = {
    "asha": SweepConfig(samples=9, objective=["loss:min"], scheduler="asha", asha=AshaConfig(min=1, max=9)),
    "pbt": SweepConfig(samples=4, objective=["loss:min"], scheduler="pbt", pbt=PbtConfig(interval=3, max=9)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_killed_again_and_again_it_leaves_what_it_leaves_in_memory(store: Store, sweep: str, name: str) -> None:
    settings = CONFIGS[name]
    memory = MemoryLedger()
    drive(toy_core(settings, memory), Toy(trouble=0.2))
    ledger, toy, kills = Stored(store), Toy(trouble=0.2), 0
    while True:
        limit = ledger.steps + 5

        def killed(step: int, at: int = limit) -> None:
            if step == at:
                raise Killed

        ledger.after = killed
        try:
            drive(core_of(sweep, ledger, settings, f"d{kills}"), toy)
            break
        except Killed:
            kills += 1
    assert kills > 2
    kept = ("number", "values", "status", "rung", "resource", "score", "n", "scores")
    rows = [dataclasses.asdict(row) for row in store.sweep_trials(sweep)]
    assert [{key: row[key] for key in kept} for row in sorted(rows, key=lambda row: row["number"])] == [
        {key: row[key] for key in kept} for _, row in sorted(memory.trials.items())
    ]
    decisions = [
        Decision(seq=row.seq, kind=Kind(row.kind), trial=row.trial, job=row.job, inputs=row.inputs, outcome=row.outcome)
        for row in store.sweep_decisions(sweep)
    ]
    facts = store.open_sweep(SweepSpec(sweep=sweep), "who verifies").facts
    searcher = RandomSearcher(toy_space(), seed=3, samples=settings.samples)
    assert verify_stored(facts, decisions, scheduler_for(settings, toy_space()), searcher=searcher) == []
    tampered = [
        replace(each, outcome={**each.outcome, "score": 0.0}) if each.kind == Kind.result else each
        for each in decisions
    ]
    assert verify_stored(facts, tampered, scheduler_for(settings, toy_space())) != []


def test_what_is_asked_through_the_store_is_answered(store: Store, sweep: str) -> None:
    settings, ledger = CONFIGS["asha"], Stored(store)
    core = core_of(sweep, ledger, settings, "d1")
    job = core.next_job()
    assert job
    store.ask_sweep(sweep, "hold", {"trials": [0]}, "ann")
    store.ask_sweep(sweep, "extend", {"samples": 3}, "ann")
    assert core.poll().stops == (job.ticket.run,)
    again = core_of(sweep, ledger, settings, "d2")
    assert again.state.settings.samples == 12
    assert again.state.trials[0].is_held
    assert not again.poll().stops, "nobody runs it any more"
    drive(again, Toy())
    assert len(store.sweep_trials(sweep)) == 12
