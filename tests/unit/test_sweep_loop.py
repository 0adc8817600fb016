"""Jobs in threads, with the core in one thread only."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from orchestrator.config.settings import AshaConfig, SweepConfig
from orchestrator.errors import SweepTaken
from orchestrator.sweeps.jobs import Assigned, Ended, Ending
from orchestrator.sweeps.loop import Loop
from orchestrator.sweeps.summary import SweepView
from tests.plugins.sweep_ledger import MemoryLedger, Toy, toy_core


def asha(samples: int = 9) -> SweepConfig:
    return SweepConfig(
        samples=samples, objective=["loss:min"], scheduler="asha", asha=AshaConfig(min=1, max=9, reduction=3)
    )


@pytest.mark.parametrize("size", [1, 3])
def test_it_runs_so_many_at_once_until_the_sweep_is_over(size: int) -> None:
    ledger, toy = MemoryLedger(), Toy()
    lock = threading.Lock()
    running: set[int] = set()
    most = [0]
    # With three lanes each job waits until three run: it would never end if fewer ran at once.
    together = threading.Barrier(size)

    def run_job(job: Assigned) -> Ending:
        with lock:
            running.add(job.job)
            most[0] = max(most[0], len(running))
        if job.rung == 0:
            together.wait(20)
        with lock:
            running.discard(job.job)
        return toy(job)

    Loop(toy_core(asha(), ledger), size, run_job).run()
    assert most[0] == size
    assert ledger.decisions[-1]["kind"] == "over"
    assert len(ledger.trials) == 9


def test_asked_to_stop_it_waits_for_what_runs_and_asks_it_to_stop() -> None:
    ledger = MemoryLedger()
    stop, asked = threading.Event(), threading.Event()
    stopped: list[str] = []

    def run_job(job: Assigned) -> Ending:
        if job.trial < 2:
            return Toy()(job)
        stop.set()
        assert asked.wait(20)
        return Ending(how=Ended.stopped)

    def stop_runs(runs: Sequence[str]) -> None:
        stopped.extend(runs)
        asked.set()

    Loop(toy_core(asha(), ledger), 1, run_job, stop=stop, stop_runs=stop_runs, period=0.01).run()
    assert set(stopped) == {"run-2.0"}
    assert ledger.jobs[2]["status"] == "assigned"
    assert ledger.runs["run-2.0"] == ["CANCELLED"]
    Loop(toy_core(asha(), ledger, driver="d2"), 1, Toy()).run()
    assert ledger.runs["run-2.0"][:2] == ["CANCELLED", "FINISHED"]
    assert len(ledger.trials) == 9


def test_a_defect_of_whoever_runs_jobs_is_raised_and_the_trial_is_not_blamed() -> None:
    ledger = MemoryLedger()

    def run_job(job: Assigned) -> Ending:
        if job.trial == 1:
            raise ZeroDivisionError("ours")
        return Toy()(job)

    with pytest.raises(ZeroDivisionError, match="ours"):
        Loop(toy_core(asha(), ledger), 1, run_job).run()
    assert len(ledger.trials) == 2
    assert ledger.trials[1]["status"] == "running"
    Loop(toy_core(asha(), ledger, driver="d2"), 1, Toy()).run()
    assert len(ledger.trials) == 9


def test_another_driver_ends_it_at_the_next_look() -> None:
    ledger = MemoryLedger()

    def run_job(job: Assigned) -> Ending:
        ledger.driver = "somebody else"
        return Toy()(job)

    with pytest.raises(SweepTaken):
        Loop(toy_core(asha(), ledger), 1, run_job).run()
    assert len(ledger.decisions) == 1


def test_who_watches_sees_requests_carried_out() -> None:
    ledger = MemoryLedger()
    views: list[SweepView] = []
    is_seen = threading.Event()

    def run_job(job: Assigned) -> Ending:
        if job.job == 0:
            ledger.ask("set", concurrency=1)
            assert is_seen.wait(20)
        return Toy()(job)

    def watch(view: SweepView) -> None:
        views.append(view)
        if any(request.answer for request in ledger.requests):
            is_seen.set()

    turns: list[int] = []
    core = toy_core(asha(), ledger)
    Loop(core, 1, run_job, watch=watch, on_turn=lambda: turns.append(1), period=0.01).run()
    assert core.settings.concurrency == 1
    assert ledger.requests[0].answer == "sweep.concurrency: 0 → 1"
    assert any(job.trial == 0 for view in views for job in view.jobs)
    assert len(turns) >= len(ledger.jobs)
