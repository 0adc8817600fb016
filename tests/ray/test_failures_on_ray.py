"""What local runs and sweeps do after a failure, on a cluster; and its dashboard, which trainings do not need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator.records import RunStatus
from orchestrator.store.names import run_id
from tests.plugins.runs import PROJECT, Going, Orc, wait_until


def test_a_batch_without_a_number_is_left_out_as_a_local_run_avoids_it(orc: Orc) -> None:
    words = ("train=spoiled:train", "failures.backoff=0.1", "checkpoints.every_epochs=0", "checkpoints.mode=direct")
    avoided, spoilt = run_id(1.0), run_id(2.0)
    orc("run", "--local", f"--run-id={avoided}", *words, "avoids=true")
    orc("run", f"--run-id={spoilt}", *words, "failures.nan=rollback", "checkpoints.every_steps=3")
    store = orc.store()
    broken, _ = store.attempts(spoilt)
    assert broken.error["kind"] == "diverged"
    assert "8 samples of epoch 1 are left out" in broken.error["done"]
    weights = [next(param.value for param in store.params(run) if param.name == "weights") for run in (avoided, spoilt)]
    assert len(weights[0]) == 49
    assert weights[0] == weights[1], "bit for bit"


def test_a_pattern_decides_about_a_trial_on_a_lane(orc: Orc, tmp_path: Path) -> None:
    sweep = run_id(3.0)
    waiting = "{match: 'licence server is away', kind: no_licence, action: restart}"
    patterns = f"failures.patterns=[{waiting}, {{match: 'give it up', action: stop}}]"
    words = ("sweep", f"--run-id={sweep}", "train=mended:searched", "kind=waits,gives_up", "resources.workers=1")
    orc(*words, patterns, f"journal={tmp_path}", "sweep.objective=[loss:min]", "sweep.concurrency=2")
    store = orc.store()
    waits, gives_up = store.sweep_trials(sweep)
    assert (waits.status, gives_up.status) == ("complete", "failed")
    assert gives_up.reason.endswith("(not restarted: failures.patterns says so)")
    first, second = store.attempts(waits.run)
    assert (first.error["kind"], second.status) == ("no_licence", RunStatus.finished)


def test_an_elastic_run_whose_room_was_taken_begins_with_what_is_left(orc: Orc) -> None:
    words = ("train=trains:slow", "seconds=2", "resources.workers={min: 1, max: 2}", "failures.max_restarts=0")
    done = subprocess.run(
        [sys.executable, "raced.py", *words], cwd=PROJECT, capture_output=True, text=True, timeout=150, check=False,
        env={**orc.own.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run, status, attempt = done.stdout.splitlines()[-1].split()
    assert (status, attempt) == ("FINISHED", "2"), done.stderr
    store = orc.store()
    first, second = store.attempts(run)
    assert (first.workers, second.workers) == (2, 1)
    why = "there is room for 1 of 2 workers now, not for 2"
    assert (first.status, first.reason) == (RunStatus.crashed, f"moved: {why}")
    assert first.error["done"] == f"goes on with fewer workers: {why}"
    told = [
        (event.attempt, event.kind) for event in store.events(run) if event.kind in ("resize", "elastic", "failure")
    ]
    assert told == [(1, "resize"), (2, "elastic")]


def test_a_dashboard_that_stands_still_stops_nothing(orc: Orc, going: Callable[..., Going]) -> None:
    run = going()
    home = str(orc.home)
    (dashboard,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.endswith("dashboard.py") for word in process.info["cmdline"] or ())
        and any(home in word for word in process.info["cmdline"])
    ]
    dashboard.suspend()
    try:
        wait_until(lambda: dashboard.status() == psutil.STATUS_STOPPED, 10, "it stands still")
        before = run.counted(0)
        found = {part["name"]: part for part in orc.json("status", code=None)["parts"]}
        assert (found["ray"]["status"], found["dashboard"]["status"]) == ("up", "down")
        wait_until(lambda: run.counted(0) > before + 100, 60, "training goes on")
    finally:
        dashboard.resume()
    orc("cancel", run.run)
    assert run.process.wait(timeout=60) == 1
    assert run.status() == "CANCELLED"
    assert run.stored(0) == list(range(run.counted(0)))
    kinds = {event.kind for event in orc.store().events(run.run)}
    assert not kinds & {"degraded", "recovered"}, "the run did not miss it"
    wait_until(lambda: orc.json("status", code=None)["up"], 60, "it is back")
