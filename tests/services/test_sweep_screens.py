"""Sweeps as people meet them afterwards and meanwhile: what a crash costs, where trials come from, terminals, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.status import RunStatus
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import wait_until
from tests.plugins.terminal_screen import OnTerminal

ORC = ("-m", "orchestrator.cli.main")
STUMBLING = """
import os, signal, time
from dataclasses import dataclass
import torch

@dataclass
class Config:
    kind: str = "well"
    epochs: int = 3
    pause: float = 0.0

def train(run, cfg: Config) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    state = run.state(model=model)
    done = 0
    for epoch in run.epochs(cfg.epochs):
        if cfg.kind == "further" and done == 1 or cfg.kind == "stuck" and epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(cfg.pause)
        model.weight.data *= 0.5
        done += 1
        run.report({"loss": model.weight.sum().item()}, state=state)
        if cfg.kind != "well":
            run.save(state, wait=True)
"""
SWEEP = "20261122-000000-0000000b"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stumbling")
    (directory / "stumbling.py").write_text(STUMBLING)
    return directory


@pytest.fixture(scope="module")
def stumbled(local: LocalStack, project: Path) -> dict[str, Any]:
    """A sweep of a trial that dies after each epoch, and one that dies always at the same; what `--json` printed."""
    words = (
        *("train=stumbling:train", "kind=further,stuck", "resources.workers=1", "sweep.objective=[loss:min]"),
        *("sweep.restarts=1", "sweep.concurrency=2", "sweep.prices.cpu_hour=3600", "--run-id", SWEEP, "--json"),
    )
    out, err = local.run(*ORC, "sweep", "--local", *words, cwd=project, timeout=180)
    assert re.search(r"^left: about .* USD for the trial that is left$", err, re.MULTILINE), err
    return dict(json.loads(out))


@pytest.fixture
def asked(local: LocalStack, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a verb prints on stdout, run in this process."""

    def call(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main.main([*words, "--home", str(local.home)]) == code
        return capsys.readouterr().out

    return call


def test_a_trial_that_gets_further_with_each_crash_ends_well_and_one_that_does_not_fails(
    local: LocalStack, stumbled: dict[str, Any]
) -> None:
    assert stumbled["status"] == "FINISHED"
    further, stuck = local.store.sweep_trials(SWEEP)
    assert (further.status, further.resource, further.score) == ("complete", 3.0, 0.25), further.reason
    assert len(local.store.attempts(further.run)) == 3, "two crashes are more than sweep.restarts=1"
    assert stuck.status == "failed"
    assert "not restarted: " in stuck.reason
    assert len(local.store.attempts(stuck.run)) == 2
    (event,) = [each for each in local.store.events(SWEEP) if each.kind == "sweep-estimate"]
    assert "for the trial that is left" in event.message


def test_a_trial_says_where_its_source_is_recorded(
    local: LocalStack, stumbled: dict[str, Any], asked: Callable[..., str]
) -> None:
    further, stuck = local.store.sweep_trials(SWEEP)
    assert all(row.provenance["of"] == row.provenance["sweep"] == SWEEP for row in local.store.attempts(further.run))
    shown = asked("show", further.run)
    assert f"source and packages with sweep {stumbled['name']} ({SWEEP})" in shown
    assert re.search(r"^code +source [0-9a-f]{12} \(no git\)$", shown, re.MULTILINE), shown
    assert re.search(r"^fingerprint +\S", shown, re.MULTILINE)
    assert json.loads(asked("show", further.run, "--json"))["recorded_with"] == SWEEP
    document = json.loads(asked("diff", further.run, stuck.run, "--json", code=1))
    parts = {name: document["parts"][name] for name in ("config", "code", "environment")}
    assert parts == {"config": "differs", "code": "same", "environment": "same"}
    assert document["files"] == {"added": [], "removed": [], "changed": []}, "the archive is the sweep's"
    assert json.loads(asked("diff", further.run, SWEEP, "--json", code=1))["parts"]["code"] == "same"


def test_every_verb_has_one_json_document(
    local: LocalStack, stumbled: dict[str, Any], project: Path, asked: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    for words in (
        *(("show", SWEEP), ("best", SWEEP), ("trials", SWEEP), ("verify", SWEEP), ("watch", SWEEP)),
        *(("--dry-run", "--local", "train=stumbling:train", "kind=well,further", "resources.workers=1"),),
        *(("hold", SWEEP, "1"), ("continue", SWEEP, "1"), ("stop", SWEEP, "1"), ("retry", SWEEP, "0")),
        *(("set", SWEEP, "sweep.concurrency=1"), ("extend", SWEEP, "sweep.budget.hours=9")),
    ):
        found = json.loads(asked("sweep", *words, "--json"))
        assert found, words
    assert json.loads(asked("sweep", "show", SWEEP, "--json"))["left"] is None
    validated = json.loads(asked("config", "validate", "train=stumbling:train", "kind=well,further", "--json"))
    assert validated["sweep"]["trials"] == 2


def test_an_energy_budget_is_refused_when_a_sweep_goes_on_where_nobody_measures_it(
    local: LocalStack, stumbled: dict[str, Any], project: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    before = len(local.store.sweep_requests(SWEEP))
    words = ("sweep", "resume", SWEEP, "--local", "sweep.budget.kwh=1", "--home", str(local.home))
    assert main.main(words) == 2
    assert "measures no energy" in capsys.readouterr().err
    assert len(local.store.sweep_requests(SWEEP)) == before, "nothing is left that the next one would do"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_sweep_that_is_over_is_shown_once_and_its_end_is_told(
    local: LocalStack, stumbled: dict[str, Any], project: Path, columns: int
) -> None:
    words = (*ORC, "--home", str(local.home), "sweep", "watch", SWEEP)
    with OnTerminal(*words, columns=columns, lines=24, cwd=project) as terminal:
        assert terminal.ended(60) == 0
        shown = terminal.screen.shown()
    assert terminal.screen.folded == 0
    assert [line for line in shown if line.startswith(stumbled["name"])] == shown[:1]
    assert "FINISHED" in shown[0]
    assert any(line.split()[:2] == ["0", "complete"] for line in shown)
    assert shown[-1] == f"sweep {stumbled['name']} FINISHED"


def test_a_sweep_of_a_stored_run_on_a_terminal_with_somebody_who_watches(
    local: LocalStack, stumbled: dict[str, Any], project: Path
) -> None:
    sweep = "20261122-000000-0000000c"
    trial = local.store.sweep_trials(SWEEP)[0].run
    words = (
        *(*ORC, "--home", str(local.home), "sweep", "--local", "--from", trial, "epochs=choice(2,2000)"),
        *("kind=well", "pause=0.05", "sweep.points=[{epochs: 2},{epochs: 2000}]", "sweep.samples=1"),
        *("sweep.objective=[loss:min]", "sweep.concurrency=1", "run.name=from-a-trial", "--run-id", sweep),
    )
    with OnTerminal(*words, columns=80, cwd=project) as driver:
        driver.until(lambda screen: any(" left  about" in line for line in screen.shown()), 120, "an estimate")
        watch = (*ORC, "--home", str(local.home), "sweep", "watch", sweep, "--interval", "0.2")
        with OnTerminal(*watch, columns=80, lines=12, cwd=project) as watching:
            watching.until(lambda screen: watching.seen.count("from-a-trial") >= 3, 60, "drawn three times")
            watching.press_ctrl_c()
            assert watching.ended(30) == 130
            shown = [line for line in watching.screen.shown() if line.strip()]
            assert watching.screen.folded == 0
            assert [line for line in shown if "from-a-trial" in line] == shown[:1], "no line of an earlier picture"
            assert shown[-1].endswith("orc: interrupted")
        driver.press_ctrl_c()
        assert driver.ended(60) == 130
        shown = driver.screen.shown()
        assert "Traceback" not in driver.seen
        assert sum(line.split()[:2] == ["trial", "status"] for line in shown) == 1
        assert sum("history" in line for line in shown + driver.screen.gone) <= 1, "no line of an earlier picture"
    run = local.store.run(sweep)
    assert (run.status, run.name) == (RunStatus.cancelled, "from-a-trial")
    first, second = local.store.sweep_trials(sweep)
    assert (first.status, first.resource, dict(first.values)) == ("complete", 2.0, {"epochs": 2})
    assert local.store.run(second.run).config["kind"] == "well", "the rest is the stored run's, or the command line's"
    wait_until(lambda: local.store.run(second.run).status is RunStatus.cancelled, 30, "it saved and stopped")
