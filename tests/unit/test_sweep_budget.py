"""What was used is counted once, and nothing starts when a limit is reached."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.clock import ManualClock
from orchestrator.config.settings import BudgetConfig, PricesConfig, SweepConfig
from orchestrator.execution.sweep_energy import UNTOLD, Meter
from orchestrator.sweeps import budget
from orchestrator.sweeps.budget import Gang
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned, Ended, Ending
from tests.plugins.sweep_ledger import MemoryLedger, Toy, toy_core


def settings(**budget: Any) -> SweepConfig:
    return SweepConfig(
        samples=20,
        objective=["loss:min"],
        budget=BudgetConfig(**budget),
        prices=PricesConfig(gpu_hour=2.0, cpu_hour=0.1, currency="EUR"),
    )


def begun(ledger: MemoryLedger, clock: ManualClock, driver: str = "d1", **limits: Any) -> Core:
    return toy_core(settings(**limits), ledger, driver=driver, clock=clock, gang=Gang(cpus=4, gpus=2))


def given(core: Core) -> Assigned:
    job = core.next_job()
    assert job is not None
    return job


def complete(job: Assigned, seconds: float) -> Ending:
    ending = Toy()(job)
    return Ending(how=ending.how, tally=ending.tally, lane_seconds=seconds)


def test_jobs_pay_for_all_that_they_hold() -> None:
    ledger, clock = MemoryLedger(), ManualClock()
    core = begun(ledger, clock)
    job = given(core)
    clock.advance(1800)
    assert core.spent == pytest.approx({"hours": 0.5, "gpu_hours": 1, "cpu_hours": 2, "money": 2.2, "kwh": 0})
    core.ended(job.job, complete(job, 900))
    core.spend(kwh=0.25)
    clock.advance(60)
    core.spend()
    found = {"hours": 1860 / 3600, "gpu_hours": 0.5, "cpu_hours": 1, "money": 1.1, "kwh": 0.25}
    assert ledger.spent == pytest.approx(found)
    clock.advance(7200)
    again = begun(ledger, clock, "d2")
    assert again.spent == pytest.approx(found), "the time between two drivers is nobody's"


def test_at_a_limit_nothing_starts_and_what_runs_is_asked_to_stop() -> None:
    ledger, clock = MemoryLedger(), ManualClock()
    core = begun(ledger, clock, gpu_hours=4)
    first, second = given(core), given(core)
    clock.advance(2800)
    assert core.spend() == ""
    clock.advance(300)
    assert core.spend() == "budget: 3.44 of 4 GPU-hours"
    assert core.spend() == "", "once is enough"
    clock.advance(500)
    assert core.spend() == "budget: 4 of 4 GPU-hours"
    assert core.next_job() is None
    assert core.poll().stops == (first.ticket.run, second.ticket.run)
    core.ended(first.job, Ending(how=Ended.stopped, lane_seconds=3600))
    assert not core.is_over()
    core.ended(second.job, Ending(how=Ended.stopped, lane_seconds=3600))
    assert core.is_over()
    assert [each["kind"] for each in ledger.decisions if each["kind"] in ("budget", "over")] == [
        "budget", "budget", "over"
    ]  # fmt: skip
    assert ledger.decisions[-1]["outcome"]["reason"] == "budget: 4 of 4 GPU-hours"
    assert {row["status"] for row in ledger.jobs.values()} == {"assigned"}, "they can go on"

    core = begun(ledger, clock, "d2", gpu_hours=4)
    assert core.next_job() is None
    assert core.is_over()
    ledger.ask("extend", **{"budget.gpu_hours": 10})
    core.poll()
    assert given(core).job == first.job
    assert begun(ledger, clock, "d3", gpu_hours=4).reason == "", "the larger one is a decision"


def test_energy_limits_where_it_is_measured_and_is_refused_where_it_is_not() -> None:
    ledger, clock = MemoryLedger(), ManualClock()
    core = begun(ledger, clock, kwh=2)
    given(core)
    assert core.spend(kwh=1.9) == "budget: 1.9 of 2 kWh"
    assert core.spend(kwh=0.5) == ""
    assert core.spent["kwh"] == 1.9, "of what was removed nothing is left to measure"
    core.spend(kwh=2.5)
    assert core.next_job() is None
    assert core.reason == "budget: 2.5 of 2 kWh"
    ledger.ask("set", **{"budget.kwh": 5})
    core.poll()
    assert given(core).trial == 1

    blind = MemoryLedger()
    core = toy_core(settings(), blind, clock=clock, unmeasured="this cluster measures no energy: no node has a GPU")
    blind.ask("set", **{"budget.kwh": 5})
    blind.ask("extend", **{"budget.kwh": 5})
    blind.ask("set", **{"budget.kwh": 0})
    core.poll()
    why = "refused: sweep.budget.kwh would limit nothing: this cluster measures no energy: no node has a GPU"
    assert [request.answer for request in blind.requests] == [why, why, "sweep.budget.kwh: 0.0 → 0.0"]


def test_the_meter_counts_joules_and_is_patient(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[float | None | Exception] = [None, ConnectionError("away"), 7.2e6, 3.6e6]
    now = [0.0]

    def measured() -> float | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    meter = Meter(measured, monotonic=lambda: now[0])
    now[0] = UNTOLD + 1
    meter.ask()
    assert "tell no energy" in caplog.text
    meter.ask()
    assert meter.kwh is None
    meter.ask()
    meter.ask()
    assert meter.kwh == 2.0, "a run was removed, what it used was used"


def test_limits_are_said_with_their_units() -> None:
    prices = PricesConfig(gpu_hour=1.0, currency="EUR")
    spent = budget.added({"hours": 1.0}, {"gpu_hours": 3.0}, prices)
    limits = BudgetConfig(hours=10, money=2.5, kwh=1, warn=0.05)
    assert str(budget.used_up(spent, limits, prices)) == "budget: 3 of 2.5 EUR"
    assert [str(each) for each in budget.nearly(spent, limits, prices)] == [
        "budget: 3 of 2.5 EUR",
        "budget: 1 of 10 hours",
    ]
    assert budget.used_up(spent, BudgetConfig(), prices) is None
