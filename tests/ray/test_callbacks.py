"""Scripts of a user's own for Ray Train and Ray Tune, with one line of ours, on the stack's cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from orchestrator.records import RunStatus
from tests.plugins.runs import PROJECT, Orc, wait_until


def scripted(orc: Orc, script: str, *words: str, code: int = 0) -> str:
    """Runs it as its author would: `ray.init()` finds the cluster by the environment that `orc env` prints."""
    environment = {**orc.own.environment, **orc.stack.client_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROJECT / script), *words], env=environment, cwd=PROJECT, timeout=120, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_what_a_trainer_reports_becomes_points_of_each_rank(orc: Orc, tmp_path: Path) -> None:
    scripted(orc, "own_trainer.py", str(tmp_path), "own-trainer")
    store = orc.store()
    (row,) = store.runs(experiment="own-trainer")
    run = wait_until(lambda: (r := store.run(row.run)).status.is_terminal and r, 20, "the end")
    assert (run.status, run.workers) == (RunStatus.finished, 2)
    for rank in (0, 1):
        loss = store.points(run.run, "loss", rank=rank)
        assert (loss.steps.tolist(), loss.values.tolist()) == ([1, 2, 3], [1.0, 0.5, 1 / 3])
        assert store.points(run.run, "rank", rank=rank).values.tolist() == [rank] * 3
    params = {param.name: param.value for param in store.params(run.run)}
    assert params == {"steps": 3, "lr": 0.1, "fails": False, "api_key": "***"}


def test_an_exception_of_a_trainers_worker_is_the_runs(orc: Orc, tmp_path: Path) -> None:
    scripted(orc, "own_trainer.py", str(tmp_path), "own-trainer-fails", "fail", code=1)
    store = orc.store()
    (row,) = store.runs(experiment="own-trainer-fails")
    run = wait_until(lambda: (r := store.run(row.run)).status.is_terminal and r, 20, "the end")
    assert run.status is RunStatus.failed
    assert "the data of rank 1 is broken" in run.reason
    assert (run.error["rank"], run.error["type"]) == (1, "ValueError")
    assert store.points(run.run, "loss", rank=1).steps.tolist() == [1, 2]


def test_trials_are_runs_of_a_sweep_and_a_restored_tuner_goes_on_with_them(orc: Orc, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    scripted(orc, "own_tuner.py", str(tmp_path), "own-tuner", str(mended))
    store = orc.store()

    def ended(count: int) -> list[str]:
        runs = store.runs(experiment="own-tuner")
        return [r.run for r in runs] if len(runs) == count and all(r.status.is_terminal for r in runs) else []

    first = wait_until(lambda: ended(3), 20, "a sweep and two trials")
    by_lr = {store_param(store, run, "lr"): run for run in first}
    assert store.run(by_lr[0.01]).status is RunStatus.finished
    broken = store.run(by_lr[0.1])
    assert broken.status is RunStatus.failed
    assert "the second trial breaks" in broken.reason
    sweep = store.run(by_lr[None])
    assert (sweep.status, sweep.reason) == (RunStatus.finished, "1 of 2 trials failed")
    scores = store.points(by_lr[0.01], "score")
    assert (scores.steps.tolist(), scores.values.tolist()) == ([1, 2, 3], [0.01, 0.02, 0.03])
    assert store.points(by_lr[0.01], "nested/deep").values.tolist() == [0, 1, 2]
    assert {summary.key for summary in store.summaries(by_lr[0.01])} == {"score", "nested/deep"}

    mended.touch()
    scripted(orc, "own_tuner.py", str(tmp_path), "own-tuner", str(mended))
    wait_until(lambda: store.run(by_lr[0.1]).status is RunStatus.finished, 20, "the mended trial")
    assert sorted(wait_until(lambda: ended(3), 20, "the end")) == sorted(first), "the same runs"
    statuses = [attempt.status for attempt in store.attempts(by_lr[0.1])]
    assert statuses == [RunStatus.failed, RunStatus.finished]
    assert len(store.attempts(by_lr[0.01])) == 1, "what was done is not done again"


def store_param(store, run: str, name: str):
    return next((param.value for param in store.params(run) if param.name == name), None)
