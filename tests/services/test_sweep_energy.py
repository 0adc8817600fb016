"""What GPUs use for a sweep's trials, from their samplers through the database to the budget."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.clock import ManualClock
from orchestrator.config.settings import BudgetConfig, SweepConfig
from orchestrator.execution.sweep_energy import JOULES, Meter
from orchestrator.monitoring.sampler import SystemSampler
from orchestrator.records import RunSpec, Stream
from orchestrator.store.store import Store
from orchestrator.sweep_records import SweepSpec
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SpoolReader, spools
from tests.plugins.recorded_gpus import WATTS, RecordedGpus
from tests.plugins.sweep_ledger import MemoryLedger, toy_core

HOUR = 3600.0


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


class Machine:
    """A sampler with two GPUs on a directory of spools, an hour between two looks, and all of it committed."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store, self._root, self._clock = store, root, ManualClock()
        self._sent: dict[tuple[str, Stream], int] = {}
        self._sampler = SystemSampler(root, interval=HOUR, clock=self._clock, gpus=RecordedGpus())

    def logger(self, run: str, attempt: int = 1) -> Logger:
        return Logger(self._root, run=run, attempt=attempt, rank=0, max_bytes=1 << 20)

    def pass_by(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self._sampler.step(self._clock.monotonic())
        for path in spools(self._root):
            reader = SpoolReader(path)
            for stream in (Stream.facts, Stream.points):
                batch = reader.next_batch(stream, self._sent.get((path.name, stream), 0))
                if batch is not None:
                    self._store.commit([batch])
                    self._sent[path.name, stream] = batch.last


def test_trials_are_counted_together_over_all_their_attempts_and_end_the_budget(store: Store, tmp_path: Path) -> None:
    (tmp_path / "spools").mkdir()
    machine, experiment = Machine(store, tmp_path / "spools"), f"e{uuid.uuid4().hex[:8]}"

    def opened(**more: object) -> str:
        spec = RunSpec(experiment=experiment, **more)  # type: ignore[arg-type]
        return store.open_attempt(spec, now=0.0, lease_seconds=30).run

    sweep = opened()
    store.open_sweep(SweepSpec(sweep=sweep), "one")
    assert store.sweep_energy(sweep) is None
    first, second = (opened(sweep=sweep, parent=sweep) for _ in range(2))
    stranger = machine.logger(opened())
    meter = Meter(lambda: store.sweep_energy(sweep))
    meter.ask()
    assert meter.kwh is None

    one, two = machine.logger(first), machine.logger(second)
    one.log({"loss": 1.0}, 7)
    machine.pass_by(1.0)
    machine.pass_by(2 * HOUR)
    stranger.close()
    one.close()
    machine.pass_by(HOUR)
    spec = RunSpec(experiment=experiment, run=first, after_attempt=1, sweep=sweep, parent=sweep)
    assert store.open_attempt(spec, now=1.0, lease_seconds=30).attempt == 2
    again = machine.logger(first, attempt=2)
    again.log({"loss": 0.5}, 8)
    machine.pass_by(HOUR)
    two.close()
    again.close()
    machine.pass_by(HOUR)
    machine.pass_by(HOUR)
    # Three share two hours and the one in which two of them ended, then `second` has one alone, then two share one.
    joules = sum(WATTS) * HOUR * (3 * 2 / 3 + 1 + 1)
    assert store.sweep_energy(sweep) == pytest.approx(joules)
    meter.ask()
    assert meter.kwh == pytest.approx(joules / JOULES)

    ledger = MemoryLedger()
    settings = SweepConfig(samples=3, objective=["loss:min"], budget=BudgetConfig(kwh=1.5))
    core = toy_core(settings, ledger)
    assert core.next_job() is not None
    assert core.spend(kwh=meter.kwh) == "budget: 1.6 of 1.5 kWh"
    assert core.next_job() is None
    assert ledger.spent["kwh"] == pytest.approx(1.6)
