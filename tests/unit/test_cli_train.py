"""`orc run`: what is refused before anything starts, what is shown, and the exit code. The driver is a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.execution import choice, driver
from orchestrator.records import RunStatus, RunTicket

TRAIN = """
print("imported")

def train(run, cfg):
    pass
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a train function."""
    (tmp_path / "my_digits.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_digits", raising=False)
    return tmp_path


class Driver:
    """Stands for execution.driver.train: tells its progress, then ends as it was told to."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.status, self.reason = RunStatus.finished, ""

    def train(
        self, job: Any, *, home: Path, progress: Any, run: str = "", new_run: str = "", open_place: Any = None
    ) -> driver.Outcome:
        self.jobs.append(job)
        progress.phase("starting workers")
        progress.started(RunTicket(run="r1", name="brave-otter", experiment="digits", attempt=1, directory="/r1"))
        view = driver.LiveView(run="r1", epoch=1, step=7, metrics={"train/loss": 0.5}, rate=10.0, elapsed=1.0)
        progress.update(view)
        outcome = driver.Outcome(
            run="r1",
            name="brave-otter",
            experiment="digits",
            attempt=1,
            status=self.status,
            reason=self.reason,
            directory="/r1",
            summaries={"val/accuracy": 0.975},
            links={"directory": "/r1", "mlflow": "http://127.0.0.1:5000"},
            elapsed=12.0,
        )
        progress.finished(outcome)
        return outcome


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(driver, "train", stand_in.train)
    monkeypatch.setattr(choice, "choose_place", lambda *given, **named: None)
    return stand_in


def test_a_run_shows_its_progress_its_result_and_where_to_look(
    project: Path, stand_in: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "train=my_digits:train", "resources.workers=1", "--name", "brave otter, 2", "optim.lr=0.01"]
    assert main.main(words) == 0
    shown = capsys.readouterr().out
    parts = ("starting workers", "epoch 1  step 7  train/loss=0.5", "FINISHED", "val/accuracy", "0.975", "12s")
    for part in (*parts, "http://127.0.0.1:5000", "orc show r1"):
        assert part in shown
    job = stand_in.jobs[0]
    assert (job.settings.run.name, job.settings.resources.workers) == ("brave otter, 2", 1)
    assert job.params == {"optim.lr": 0.01}


def test_with_json_progress_and_prints_of_the_users_module_go_to_stderr(
    project: Path, stand_in: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["run", "train=my_digits:train", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["status"] == "FINISHED"
    assert "imported" in shown.err
    assert "step 7" in shown.err


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        (RunStatus.failed, "rank 1: ValueError", 1),
        (RunStatus.cancelled, "cancelled", 1),
        (RunStatus.cancelled, "stopped by SIGINT", 130),
    ],
)
def test_a_run_that_did_not_finish_tells_by_its_exit_code(
    status: RunStatus, reason: str, code: int, project: Path, stand_in: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.status, stand_in.reason = status, reason
    assert main.main(["run", "train=my_digits:train"]) == code
    assert f"{status}: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "train"),
        (["train=my_digits:trian"], "my_digits:train"),
        (["train=my_digts:train"], "Did you mean my_digits"),
        (["train=my_digits:train", "resources.wrokers=2"], "resources.workers"),
        (["train=my_digits:train", "resources.workers=two"], "resources.workers"),
        (["train=my_digits:train", "--config-dir", "nowhere"], "nowhere"),
        (["train=my_digits:train", "--from", "last"], "orc up"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    words: list[str], message: str, project: Path, stand_in: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["run", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("orc: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert stand_in.jobs == []
    assert not (project / "home").exists()


def test_config_validate_says_what_orc_run_would_say(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "validate", "train=my_digits:train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"] == "my_digits:train"
    assert main.main(["config", "validate", "train=my_digits:trian"]) == 2
    assert "my_digits:train" in capsys.readouterr().err


def test_config_show_hides_secrets(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-canary")
    assert main.main(["config", "show", "+hub.token=${oc.env:MY_TOKEN}", "+hub.user=ada"]) == 0
    shown = capsys.readouterr().out
    assert "user: ada" in shown
    assert "s3cret-canary" not in shown
