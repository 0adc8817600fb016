"""Sweeps without Ray: to their end, killed and resumed, stopped by ctrl-C. The processes are the real ones."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.execution import sweep_api
from orchestrator.status import RunStatus
from orchestrator.sweep_records import TrialRow
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT, wait_until

ORC = ("-m", "orchestrator.cli.main")
WORDS = (
    *("train=searched:train", "resources.workers=1", "epochs=3", "pause=0", "lr=loguniform(1e-3,1e-1)"),
    *("sweep.samples=3", "sweep.scheduler=asha", "sweep.objective=[loss:min]", "sweep.concurrency=1"),
)


def table(trials: list[TrialRow]) -> list[Any]:
    """What must not depend on what was killed."""
    return [
        (trial.number, dict(trial.values), trial.status, trial.resource, trial.score, trial.scores.get("rungs"))
        for trial in trials
    ]


def began(journal: Path) -> list[dict[str, Any]]:
    file = journal / "began"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def asked(local: LocalStack, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a verb that only looks or asks prints on both streams, in this process: it takes no training."""

    def call(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main.main([*words, "--home", str(local.home)]) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


def test_a_sweep_whose_driver_is_killed_goes_on_to_the_same_table(
    local: LocalStack, asked: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undisturbed one is run from Python: it is the same sweep."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(str(PROJECT))
    result = sweep_api.sweep(
        "searched:train", {"lr": "loguniform(1e-3,1e-1)"}, objective="loss:min", samples=3, scheduler="asha",
        home=local.home, local=True, name="undisturbed", resources__workers=1, sweep__concurrency=1, epochs=3, pause=0,
    )  # fmt: skip
    assert (result.status, result.name) == (RunStatus.finished, "undisturbed")
    expected = table(list(result.trials))
    assert len(expected) == 3
    assert result.best is not None
    assert result.best.score == min(row[4] for row in expected)
    assert result.run(result.best.number).sweep == result.id

    killed = "20261122-000000-00000002"
    driver = local.start(*ORC, "sweep", "--local", *WORDS, f"journal={tmp_path}", "--run-id", killed, cwd=PROJECT)
    wait_until(lambda: len(began(tmp_path)) >= 2, 120, "the second trial has begun")
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert local.store.run(killed).status is RunStatus.running, "nobody could say how it ended"
    first = {line["run"] for line in began(tmp_path)}
    out, _ = local.run(*ORC, "sweep", "resume", killed, "--local", cwd=PROJECT, timeout=180)
    assert "loguniform 0.001 … 0.1" in out, "the plan is shown first"
    assert table(list(local.store.sweep_trials(killed))) == expected
    assert local.store.run(killed).status is RunStatus.finished
    began_again = [line["run"] for line in began(tmp_path)]
    done_before = [line for line in began(tmp_path) if line["attempt"] == 1]
    assert len({line["run"] for line in done_before}) == 3, "no run was made twice"
    assert first <= set(began_again)

    assert json.loads(asked("sweep", "show", killed, "--json"))["status"] == "FINISHED"
    assert "the same again" in asked("sweep", "verify", killed)
    (winner,) = json.loads(asked("sweep", "best", killed, "--json"))
    assert winner["score"] == min(row[4] for row in expected)
    assert os.path.isdir(winner["checkpoint"] or "nowhere")
    for run in (killed, winner["run"]):
        assert "orc sweep resume" in asked("resume", run, "--local", code=2)


DIES_FIRST = """
import os, sys
from orchestrator.cli.main import main
from orchestrator.sweeps.core import Core
Core.open = lambda *_, **__: os._exit(9)
sys.exit(main(sys.argv[1:]))
"""


def test_a_sweep_whose_driver_dies_before_it_says_what_the_sweep_is_made_of_is_resumed(
    local: LocalStack, asked: Callable[..., str], tmp_path: Path
) -> None:
    sweep = "20261122-000000-00000009"
    words = ("sweep", "--local", *WORDS, f"journal={tmp_path}", "--run-id", sweep)
    local.run("-c", DIES_FIRST, *words, cwd=PROJECT, code=9)
    assert (local.store.sweep(sweep).settings, began(tmp_path)) == ({}, [])
    wait_until(lambda: local.store.run(sweep).status is RunStatus.crashed, 60, "its lease is over")
    assert "orc sweep resume" in asked("sweep", "show", sweep)
    assert "orc sweep resume" in asked("resume", sweep, "--local", code=2)
    out, _ = local.run(*ORC, "sweep", "resume", sweep, "--local", cwd=PROJECT, timeout=180)
    assert "loguniform 0.001 … 0.1" in out
    assert local.store.run(sweep).status is RunStatus.finished
    trials = {trial.run for trial in local.store.sweep_trials(sweep)}
    assert len(trials) == 3
    assert not trials & {row.sweep for row in local.store.sweeps()}, "they are none themselves"
    assert local.store.sweep(sweep).settings


def test_bad_trials_fail_alone_and_a_sweep_of_nothing_else_says_why(local: LocalStack) -> None:
    sweep = "20261122-000000-00000004"
    words = (
        *("train=searched:bad", "resources.workers=1", "kind=raises,exits,hangs", "sweep.objective=[loss:min]"),
        *("sweep.hang=10", "sweep.restarts=0", "sweep.concurrency=2", "--run-id", sweep),
    )
    out, err = local.run(*ORC, "sweep", "--local", *words, cwd=PROJECT, code=1, timeout=180)
    assert "all 3 trials failed" in out + err
    assert local.store.run(sweep).status is RunStatus.failed
    trials = list(local.store.sweep_trials(sweep))
    assert [trial.status for trial in trials] == ["failed"] * 3
    for trial, why in zip(trials, ("cannot be trained", "exit code 3", "no progress for 10 seconds"), strict=True):
        assert why in trial.reason
    assert re.search(r"Rank 0 .* is in \w+ at \S+searched\.py:\d+", trials[2].reason)


def test_a_sweep_is_steered_while_it_runs_and_extended_afterwards(
    local: LocalStack, asked: Callable[..., str], tmp_path: Path
) -> None:
    sweep = "20261122-000000-00000005"
    words = (
        *("train=searched:train", "resources.workers=1", "epochs=4000", "pause=0.05", "lr=uniform(0.01,0.1)"),
        *("sweep.samples=2", "sweep.objective=[loss:min]", "sweep.concurrency=1", f"journal={tmp_path}"),
    )
    driver = local.start(*ORC, "sweep", "--local", *words, "--run-id", sweep, cwd=PROJECT)
    try:
        wait_until(lambda: len(began(tmp_path)) == 1, 120, "the first trial has begun")
        first = began(tmp_path)[0]["run"]
        assert "refused: there is no trial 7" in asked("sweep", "hold", sweep, "7", code=1)
        assert "sweep.concurrency: 1 → 2" in asked("sweep", "set", sweep, "sweep.concurrency=2")
        wait_until(lambda: len(began(tmp_path)) == 2, 120, "the second one runs beside it")
        assert local.store.run(first).status is RunStatus.running
        asked("sweep", "stop", sweep, "0")
        wait_until(lambda: local.store.run(first).status.is_terminal, 60, "the first one stops alone")
        second = began(tmp_path)[1]["run"]
        wait_until(lambda: len(local.points(second, "loss")) > 2, 60, "the second one reports")
        driver.send_signal(signal.SIGINT)
        out, err = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 130, f"{out}\n{err}"
    assert {local.store.run(run).status for run in (sweep, second)} == {RunStatus.cancelled}
    assert local.store.checkpoints(second), "it saved before it stopped"
    assert next(iter(local.store.sweep_trials(sweep))).status == "cancelled"
    assert "orc sweep resume" in asked("sweep", "extend", sweep, "+1")
    driver = local.start(*ORC, "sweep", "resume", sweep, "--local", cwd=PROJECT)
    try:
        wait_until(lambda: len(began(tmp_path)) == 4, 120, "the second one goes on, the third begins")
        driver.send_signal(signal.SIGINT)
        wait_until(lambda: local.store.run(sweep).cancel_requested is not None, 30, "the first ctrl-C is heard")
        driver.send_signal(signal.SIGINT)
        driver.communicate(timeout=60)
    finally:
        driver.kill()
    runs = [(line["run"], line["attempt"]) for line in began(tmp_path)]
    assert len(set(runs)) == 4, "each attempt once"
    assert sorted(attempt for run, attempt in runs if run != first) == [1, 1, 2]
