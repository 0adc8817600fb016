"""`orc keep` beside a real head: its control store alone is killed, then all of it, under a run and a sweep."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from cluster import ray_head
from orchestrator.errors import NotFound
from orchestrator.status import RunStatus
from orchestrator.store.store import Store
from tests.plugins.own_stack import OwnStack
from tests.plugins.runs import PROJECT, Orc, wait_until

RUN = ("train=searched:train", "epochs=150", "pause=0.3", "run.keep=true", "tracking.perf=false")
SWEEP = (
    *("sweep", "train=searched:train", "lr=uniform(0.01,0.1)", "sweep.samples=3", "epochs=12", "pause=0.3"),
    *("sweep.objective=[loss:min]", "sweep.concurrency=1", "run.keep=true"),
)
SMALL = ("resources.workers=1", "resources.cpus_per_worker=0.5", "--detach")


@pytest.fixture(scope="module")
def orc() -> Iterator[Orc]:
    """A stack of this module's own: its head is killed."""
    with OwnStack() as own:
        own.orc("up", "ray.num_cpus=2", "mlflow.enabled=false", "api.enabled=false")
        yield Orc(own)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(PROJECT / "searched.py", tmp_path)
    return tmp_path


def head(orc: Orc) -> dict[str, psutil.Process]:
    found = {}
    for process in ray_head.parts(orc.home):
        with suppress(psutil.NoSuchProcess):
            found[process.name()] = process
    return found


def test_a_run_and_a_sweep_outlive_control_store_and_head(orc: Orc, project: Path) -> None:
    run = orc.json("submit", *RUN, *SMALL, cwd=project)["run"]
    sweep = orc.json("submit", *SWEEP, *SMALL, cwd=project)["run"]
    keeper = orc.start("keep", "--json", "--interval=1", cwd=project)
    with closing(orc.store()) as store:
        try:
            wait_until(lambda: logged(store, run) > 2 and has_trials(store, sweep), 300, "both train")
            before = head(orc)
            before["gcs_server"].kill()
            psutil.wait_procs([before["gcs_server"]], timeout=10)
            wait_until(lambda: "gcs_server" in head(orc), 180, "the control store is back")
            wait_until(lambda: set(services(orc).values()) == {"ALIVE"}, 180, "the services answer by name")
            count = logged(store, run)
            wait_until(lambda: logged(store, run) > count + 2, 180, "the run goes on")
            assert head(orc)["raylet"].pid == before["raylet"].pid
            assert [attempt.attempt for attempt in store.attempts(run)] == [1]

            doomed = ray_head.parts(orc.home)
            for process in doomed:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            assert not psutil.wait_procs(doomed, timeout=20)[1]
            assert store.run(run).status is RunStatus.running, "it was killed before its end"
            assert store.run(sweep).status is RunStatus.running
            for each in (run, sweep):
                wait_until(lambda each=each: store.run(each).status is RunStatus.finished, 300, f"{each} ends")
        finally:
            keeper.send_signal(signal.SIGINT)
            said, told = keeper.communicate(timeout=30)
        assert keeper.returncode == 130, said + told
        assert [attempt.attempt for attempt in store.attempts(run)] == [1, 2], said
        assert store.attempts(run)[1].job == f"orc-{run}-2"
        assert [attempt.attempt for attempt in store.attempts(sweep)] == [1, 2], said
        trials = store.sweep_trials(sweep)
        assert [(trial.number, trial.status) for trial in trials] == [(0, "complete"), (1, "complete"), (2, "complete")]
        assert len({trial.run for trial in trials}) == 3
        lines = [json.loads(line) for line in said.splitlines()]
        assert sum(line["kind"] == "resume" and line["ok"] for line in lines) == 2, said
        assert json.loads(orc("status", "--json"))["up"]


def logged(store: Store, run: str) -> int:
    """How many epochs; a job that was submitted makes its run when it begins."""
    try:
        return len(store.points(run, "loss").values)
    except NotFound:
        return 0


def has_trials(store: Store, sweep: str) -> bool:
    try:
        return bool(store.sweep_trials(sweep))
    except NotFound:
        return False


def services(orc: Orc) -> dict[str, str]:
    return ray_head.services(orc.stack.ray_dashboard, orc.stack.ray_token_path)
