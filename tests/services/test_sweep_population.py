"""A population in processes of its own: what a member takes over is what its donor had saved, whoever was killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.execution import sweep_api
from orchestrator.status import RunStatus
from tests.plugins.local_stack import LocalStack
from tests.plugins.populations import assert_taken_over, began, table, taken_over
from tests.plugins.runs import PROJECT, wait_until

SWEEP = "20261122-000000-00000061"
LR = "loguniform(1e-3,1e-1)"
MEMBERS = 4
ORC = ("-m", "orchestrator.cli.main")


def test_members_take_over_weights_and_a_killed_driver_changes_nothing(
    local: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(str(PROJECT))
    peace, war = tmp_path / "peace", tmp_path / "war"
    peace.mkdir()
    war.mkdir()
    result = sweep_api.sweep(
        "searched:member", {"lr": LR}, objective="loss:min", samples=MEMBERS, scheduler="pbt", home=local.home,
        local=True, name="undisturbed", resources__workers=1, sweep__concurrency=2, journal=str(peace), epochs=2,
    )  # fmt: skip
    assert result.status is RunStatus.finished
    expected = table(result.trials)
    assert [row[3] for row in expected] == [2.0] * MEMBERS

    words = (
        *("train=searched:member", "resources.workers=1", "sweep.scheduler=pbt", "sweep.objective=[loss:min]"),
        *(f"lr={LR}", f"sweep.samples={MEMBERS}", "sweep.concurrency=2", f"journal={war}", "epochs=2"),
    )
    driver = local.start(*ORC, "sweep", "--local", *words, "--run-id", SWEEP, cwd=PROJECT)
    wait_until(lambda: len(began(war)) > MEMBERS, 120, "the second generation has begun")
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert local.store.run(SWEEP).status is RunStatus.running, "nobody could say how it ended"
    local.run(*ORC, "sweep", "resume", SWEEP, "--local", cwd=PROJECT, timeout=180)
    assert local.store.run(SWEEP).status is RunStatus.finished
    assert table(local.store.sweep_trials(SWEEP)) == expected
    assert_taken_over(local.store, SWEEP, war)
    assert_taken_over(local.store, result.id, peace)
    donors = [
        {(job.trial, job.rung): job.clone["trial"] for job, _ in taken_over(local.store, sweep, journal)}
        for sweep, journal in ((SWEEP, war), (result.id, peace))
    ]
    assert donors[0] == donors[1]
    capsys.readouterr()
    assert main.main(["sweep", "verify", SWEEP, "--home", str(local.home)]) == 0
    assert main.main(["sweep", "show", SWEEP, "--home", str(local.home)]) == 0
    shown = capsys.readouterr().out
    assert "the same again" in shown
    assert shown.count("took over from trial") == len({trial for trial, _ in donors[0]})
