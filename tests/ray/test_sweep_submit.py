"""Sweeps as Ray jobs: submitted by us, and by plain Ray tooling through `jobs/sweep.py`."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.status import RunStatus
from tests.plugins.runs import PROJECT, Orc

WORDS = (
    *("train=searched:train", "lr=uniform(0.01,0.1)", "sweep.samples=2", "epochs=2", "pause=0", "resources.workers=1"),
    *("resources.cpus_per_worker=0.5", "sweep.objective=[loss:min]", "sweep.concurrency=1"),
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(PROJECT / "searched.py", tmp_path)
    return tmp_path


def test_a_submitted_sweep_runs_as_a_job_and_a_submitted_resume_extends_it(orc: Orc, project: Path) -> None:
    told = orc.json("submit", "sweep", *WORDS, "--name", "submitted", cwd=project)
    assert (told["status"], told["exit_code"]) == ("SUCCEEDED", 0)
    sweep = told["run"]
    with closing(orc.store()) as store:
        run = store.run(sweep)
        assert (run.status, run.name) == (RunStatus.finished, "submitted")
        assert [trial.status for trial in store.sweep_trials(sweep)] == ["complete", "complete"]
        assert "Which sweep?" in orc("submit", "sweep", "resume", cwd=project, code=2)
        orc("sweep", "extend", sweep, "+1", cwd=project)
        resumed = orc.json("submit", "sweep", "resume", sweep, cwd=project)
        assert (resumed["status"], resumed["exit_code"]) == ("SUCCEEDED", 0)
        assert [trial.status for trial in store.sweep_trials(sweep)] == ["complete"] * 3
        assert [run.attempt for run in store.attempts(sweep)] == [1, 2]
