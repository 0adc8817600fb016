"""`sweep.warm_start`: what the record knows of runs and sweeps becomes what a searcher begins with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.config import Direction
from orchestrator.config.settings import Score
from orchestrator.errors import NotFound
from orchestrator.execution.earlier import earlier
from orchestrator.records import POINT, Batch, RunSpec, RunStatus, Stream
from orchestrator.store.names import trial_run_id
from orchestrator.store.store import Store
from orchestrator.sweep_records import DecisionRow, JobRow, SweepSpec, SweepStep, TrialRow

NOW = 1_700_000_000.0
LOSS = [("val/loss", Direction.min)]
PRODUCERS = itertools.count(1)


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


def losses(store: Store, run: str, *values: float) -> None:
    points = np.zeros(len(values), dtype=POINT)
    points["step"], points["time"], points["value"] = np.arange(len(values)), NOW, values
    batch = Batch(
        producer=f"{next(PRODUCERS):032x}", run=run, attempt=1, rank=0, stream=Stream.points, first=1,
        count=len(values), keys=("val/loss",), payload=points.tobytes(),
    )  # fmt: skip
    store.commit([batch])


def run_with(store: Store, name: str, lr: float, *values: float) -> str:
    config = {"optim": {"lr": lr}, "kind": "a"}
    run = store.open_attempt(RunSpec(experiment="warm", name=name, config=config), now=NOW, lease_seconds=1e6).run
    losses(store, run, *values)
    store.transition(run, 1, RunStatus.finished, now=NOW + 1)
    return run


def sweep_with(store: Store, name: str, *trials: tuple[float, str, float]) -> str:
    """(lr, status, loss) of each trial."""
    config = {"optim": {"lr": 0.5}, "kind": "b"}
    sweep = store.open_attempt(RunSpec(experiment="warm", name=name, config=config), now=NOW, lease_seconds=1e6).run
    store.open_sweep(SweepSpec(sweep=sweep), "me")
    runs = [trial_run_id(sweep, f"{number}.0") for number in range(len(trials))]
    step = SweepStep(
        sweep=sweep, driver="me", after=-1,
        decisions=[DecisionRow(seq=number, kind="suggest", trial=number) for number in range(len(trials))],
        trials=[
            TrialRow(number=number, values={"optim.lr": lr}, status=status, run=runs[number])
            for number, (lr, status, _) in enumerate(trials)
        ],
        jobs=[JobRow(number=number, trial=number, run=run) for number, run in enumerate(runs)],
        opens=[
            (number, RunSpec(experiment="warm", parent=sweep, sweep=sweep, new_run=run))
            for number, run in enumerate(runs)
        ],
    )  # fmt: skip
    store.sweep_step(step, now=NOW)
    for run, (_, _, loss) in zip(runs, trials, strict=True):
        losses(store, run, loss)
    return sweep


def test_runs_and_trials_are_known_with_their_values_and_scores(store: Store) -> None:
    run = run_with(store, "warm-run", 0.1, 0.9, 0.3, 0.4)
    sweep_with(store, "warm-sweep", (0.01, "complete", 0.2), (0.02, "failed", 0.1))
    catalog = DatabaseCatalog(store)
    found = list(earlier(catalog, ["warm-run", "warm-sweep"], LOSS, Score.best))
    assert [(each.params["optim.lr"], each.params["kind"]) for each in found] == [(0.1, "a"), (0.01, "b"), (0.02, "b")]
    assert [each.metrics for each in found] == [{"val/loss": 0.3}, {"val/loss": 0.2}, {"val/loss": 0.1}]
    assert [each.is_complete for each in found] == [True, True, False]
    (last,) = earlier(catalog, [run], LOSS, Score.last)
    assert last.metrics == {"val/loss": 0.4}


def test_what_there_is_not_is_told(store: Store) -> None:
    with pytest.raises(NotFound):
        list(earlier(DatabaseCatalog(store), ["no-such-run-or-sweep"], LOSS, Score.best))
