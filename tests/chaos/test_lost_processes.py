"""Something dies in the middle of a run: training goes on where it can, and nothing that was logged is missing or
doubled.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from tests.plugins.runs import Going, Orc, wait_until


def test_a_killed_driver_leaves_a_crashed_run_with_every_point(going: Callable[..., Going]) -> None:
    run = going()
    run.process.send_signal(signal.SIGKILL)
    assert run.process.wait() == -signal.SIGKILL
    killed = time.monotonic()
    wait_until(lambda: run.status() == "CRASHED", 30, "CRASHED within 30 s of the kill")
    print(f"CRASHED {time.monotonic() - killed:.1f} s after the kill")
    for rank in (0, 1):
        counted = run.counted(rank)
        wait_until(
            lambda rank=rank, counted=counted: len(run.stored(rank)) >= counted, 15, "every logged point in PostgreSQL"
        )
        assert run.stored(rank) == list(range(len(run.stored(rank))))


def test_a_killed_driver_and_orc_resume_reach_the_accuracy_of_an_undisturbed_run(orc: Orc) -> None:
    mlflow = pytest.importorskip("mlflow")
    process = orc.start("run", "experiment=digits", "run.name=interrupted")
    store = orc.store()

    def checkpoints() -> int:
        runs = [row.run for row in store.runs(search="interrupted")]
        return len(store.checkpoints(runs[0])) if runs else 0

    wait_until(lambda: checkpoints() >= 2, 60, "two checkpoints")
    process.kill()
    process.wait()
    wait_until(lambda: store.run("interrupted").status.value == "CRASHED", 30, "CRASHED")
    outcome = orc.json("resume", "interrupted")
    assert (outcome["status"], outcome["attempt"]) == ("FINISHED", 2)
    accuracy = store.points(outcome["run"], "val/accuracy", rank=0)
    assert accuracy.values[-1] >= 0.97
    assert len(set(accuracy.steps.tolist())) == 15, "every epoch once or, where it was repeated, under its own step"
    (resumed,) = [event for event in store.events(outcome["run"]) if event.kind == "resumed"]
    assert resumed.details["is_exact"]
    client = mlflow.MlflowClient(orc.stack.mlflow_uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, filter_string=f"tags.`orc.run_id` = '{outcome['run']}'")
    assert len(found) == 1
    children = f"tags.`mlflow.parentRunId` = '{found[0].info.run_id}'"

    def attempts() -> dict[str, str]:
        return {run.data.tags["orc.attempt"]: run.info.status for run in client.search_runs(experiments, children)}

    wait_until(lambda: attempts() == {"1": "FAILED", "2": "FINISHED"}, 30, "one run with two attempts in MLflow")
    assert "nothing left to resume" in orc("resume", "interrupted", code=2)


def test_stopping_postgresql_mlflow_and_the_tracker_disturbs_nobody(orc: Orc, going: Callable[..., Going]) -> None:
    run = going("seconds=25")
    processes = orc.stack.processes
    before = run.counted(0)
    for name in ("postgres", "mlflow"):
        pid = int(processes[name]["pid"])
        os.kill(pid, signal.SIGQUIT if name == "postgres" else signal.SIGKILL)
        wait_until(lambda pid=pid: not _lives(pid), 20, f"{name} gone")
    tracker = _tracker_pid(orc)
    os.kill(tracker, signal.SIGKILL)
    down = time.monotonic()
    wait_until(lambda: run.counted(0) > before + 600, 20, "training goes on")
    assert time.monotonic() - down < 15
    orc("up")
    out, err = run.process.communicate(timeout=90)
    assert run.process.returncode == 0, out + err
    assert _tracker_pid(orc) != tracker
    wait_until(lambda: run.status() == "FINISHED", 30, "FINISHED")
    for rank in (0, 1):
        assert run.stored(rank) == list(range(run.counted(rank)))


def test_a_lost_ray_head_loses_nothing_that_was_logged(orc: Orc, going: Callable[..., Going]) -> None:
    run = going()
    head = [process for process in psutil.process_iter(["cmdline"]) if _is_ray(process, orc)]
    assert any("gcs_server" in " ".join(process.cmdline()[:1]) for process in head)
    for process in head:
        process.kill()
    psutil.wait_procs(head, timeout=20)
    counted = {rank: run.counted(rank) for rank in (0, 1)}
    orc("up", timeout=180)
    wait_until(lambda: run.status() == "CRASHED", 60, "CRASHED")
    for rank in (0, 1):
        wait_until(lambda rank=rank: len(run.stored(rank)) >= counted[rank], 20, "every logged point in PostgreSQL")
        assert run.stored(rank) == list(range(len(run.stored(rank))))


def _is_ray(process: psutil.Process, orc: Orc) -> bool:
    """A process of this stack's Ray: servers by their session directory, workers and actors by their title."""
    command = " ".join(process.info["cmdline"] or [])
    if str(orc.home / "ray") in command:
        return True
    try:
        return command.startswith("ray::") and process.environ().get("ORC_HOME") == str(orc.home)
    except psutil.Error:
        return False


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _tracker_pid(orc: Orc) -> int:
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith("ray::TrackerProcess") and str(orc.home) in process.environ().get("ORC_HOME", ""):
            return process.pid
    return 0


def test_a_killed_worker_is_named_and_another_attempt_finishes(orc: Orc) -> None:
    outcome = orc.json("run", "train=trains:dies_once", "failures.max_restarts=2")
    assert (outcome["status"], outcome["attempt"]) == ("FINISHED", 2)
    store = orc.store()
    first, second = store.attempts(outcome["run"])
    assert (first.status.value, second.status.value) == ("CRASHED", "FINISHED")
    assert first.error is not None
    assert first.error["kind"] == "worker_killed"
    epochs = store.points(outcome["run"], "epoch_done", rank=0)
    assert epochs.values[epochs.attempts == 1].tolist() == [0.0, 1.0]
    assert epochs.values[epochs.attempts == 2].tolist() == [2.0, 3.0], "it goes on where the checkpoint was"
