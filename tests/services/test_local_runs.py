"""Runs without Ray: `orc run --local`, and `start_run` in a plain script."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch

import orchestrator
from orchestrator.errors import ConfigError
from orchestrator.execution.script import RunIsOpen
from orchestrator.records import RunSpec, RunStatus
from orchestrator.store.views import RunDetail
from orchestrator.tracking.logger import Logger
from orchestrator.training.run import RunStopped
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT, wait_until

ORC = ("-m", "orchestrator.cli.main")


def newest(local: LocalStack) -> RunDetail:
    return local.store.run(local.store.runs(limit=1)[0].run)


# -- orc run


def test_a_killed_rank_is_restarted_and_one_warning_says_that_there_is_no_ray(local: LocalStack) -> None:
    words = ("run", "train=trains:dies_once", "failures.max_restarts=1", "run.name=dies once")
    out, err = local.run(*ORC, *words, cwd=PROJECT)
    assert "attempt 2" in out
    assert err.count("no Ray") == 1
    run = newest(local)
    assert run.status is RunStatus.finished
    first, second = local.store.attempts(run.run)
    assert (first.status, first.error["kind"], first.error["rank"]) == (RunStatus.crashed, "worker_killed", 1)
    assert "SIGKILL" in first.error["message"]
    assert second.status is RunStatus.finished
    assert local.points(run.run, "epoch_done", rank=0) == local.points(run.run, "epoch_done", rank=1) == [0, 1, 2, 3]
    assert [event.kind for event in local.store.events(run.run)].count("resumed") == 1
    logs = Path(run.directory) / "logs" / "attempt-1"
    assert {"driver.log", "rank-0.log", "rank-1.log"} <= {path.name for path in logs.iterdir()}


def test_a_killed_driver_takes_its_ranks_with_it_and_leaves_a_crashed_run(local: LocalStack, tmp_path: Path) -> None:
    """Before that, the tracker is killed in mid-run: the driver starts another one."""
    words = ("run", "--local", "train=trains:slow", f"journal={tmp_path}", "tracking.heartbeat=0.5", "tracking.lease=3")
    driver = local.start(*ORC, *words, cwd=PROJECT)
    wait_until(lambda: counted(tmp_path, 0) > 20 and counted(tmp_path, 1) > 20, 60, "both ranks logging")
    tracker = local.tracker().describe()["pid"]
    os.kill(tracker, signal.SIGKILL)
    wait_until(lambda: local.tracker().describe()["pid"] != tracker, 30, "another tracker")
    before = counted(tmp_path, 0)
    wait_until(lambda: counted(tmp_path, 0) > before + 20, 30, "training goes on")
    ranks = [child for child in psutil.Process(driver.pid).children() if "local_rank" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    driver.kill()
    driver.communicate()
    wait_until(lambda: not any(is_alive(rank) for rank in ranks), 10, "no orphan")
    run = newest(local)
    wait_until(lambda: local.store.run(run.run).status is RunStatus.crashed, 20, "CRASHED")
    for rank in (0, 1):
        wait_until(
            lambda rank=rank: len(local.points(run.run, "count", rank)) >= counted(tmp_path, rank), 15, "all points"
        )
        assert local.points(run.run, "count", rank) == list(range(len(local.points(run.run, "count", rank))))


def counted(journal: Path, rank: int) -> int:
    path = journal / f"rank-{rank}"
    return int((path.read_text() if path.exists() else "") or 0)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_cancelled_run_ends_cancelled(local: LocalStack, tmp_path: Path) -> None:
    words = ("run", "--local", "train=trains:slow", "resources.workers=1", f"journal={tmp_path}")
    driver = local.start(*ORC, *words, cwd=PROJECT)
    wait_until(lambda: counted(tmp_path, 0) > 20, 60, "logging")
    run = newest(local)
    local.tracker().cancel(run.run, "me")
    driver.communicate(timeout=40)
    assert driver.returncode == 1
    assert local.store.run(run.run).status is RunStatus.cancelled
    assert local.points(run.run, "count") == list(range(counted(tmp_path, 0)))
    assert min(local.points(run.run, "perf/step_time")) > 0, "measured without being asked, to the end"


def test_a_run_that_gets_no_better_ends_early_and_says_why(local: LocalStack) -> None:
    words = ("run", "--local", "train=orchestrator.examples.digits:train", "epochs=6", "resources.workers=1")
    stopping = ("metric=val/accuracy", "direction=max", "patience=2", "min_delta=2")
    local.run(*ORC, *words, *(f"stopping.{each}" for each in stopping), cwd=PROJECT)
    run = newest(local)
    assert run.status is RunStatus.finished
    assert run.reason.startswith("no better val/accuracy in 2 reports: the best is 0.")
    assert len(local.points(run.run, "val/accuracy")) == 3
    (said,) = [event.message for event in local.store.events(run.run) if event.kind == "stopped-early"]
    assert said == run.reason


def test_what_contradicts_local_mode_is_refused(local: LocalStack) -> None:
    before = len(local.store.runs(limit=100))
    for words, named in (
        (("--local", "ray.enabled=true"), "--local"),
        (("ray.enabled=true",), "no Ray"),
        (("--local", "resources.workers=4096"), "resources.workers"),
    ):
        _, err = local.run(*ORC, "run", "train=trains:slow", *words, cwd=PROJECT, code=2)
        assert named in err
        assert "Traceback" not in err
    assert len(local.store.runs(limit=100)) == before


# -- start_run


def test_the_example_of_a_plain_script_runs(local: LocalStack, tmp_path: Path) -> None:
    out, _ = local.run("-m", "orchestrator.examples.plain_script", "--epochs", "3", cwd=tmp_path)
    run = newest(local)
    assert run.name in out
    assert (run.status, len(local.points(run.run, "loss"))) == (RunStatus.finished, 3)


def test_a_block_is_a_run(local: LocalStack) -> None:
    given = Namespace(lr=0.1, layers=[1, 2], password="canary-93b1")
    with orchestrator.start_run(
        experiment="script", name="plain", params=given, tags={"team": "tests"}, home=local.home
    ) as run:
        for step in range(5):
            run.log({"loss": 1.0 / (step + 1)})
        run.note("a note")
        run.artifact(b"hello", "greeting.txt")
    found = local.store.run(run.id)
    assert (found.status, found.name, found.experiment) == (RunStatus.finished, "plain", "script")
    assert local.points(run.id, "loss") == [1.0 / (step + 1) for step in range(5)]
    params = {param.name: param.value for param in local.store.params(run.id)}
    assert params["lr"] == 0.1
    assert "canary-93b1" not in str(params)
    assert "canary-93b1" not in (Path(run.directory) / "config.json").read_text()
    (attempt,) = local.store.attempts(run.id)
    assert attempt.provenance["host"]


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (ValueError("broken data"), RunStatus.failed, "broken data"),
        (KeyboardInterrupt(), RunStatus.cancelled, "SIGINT"),
        (SystemExit(0), RunStatus.finished, ""),
        (SystemExit(3), RunStatus.failed, "3"),
    ],
)
def test_what_leaves_the_block_says_how_the_run_ended(
    local: LocalStack, raised: BaseException, status: RunStatus, reason: str
) -> None:
    with pytest.raises(type(raised)), orchestrator.start_run(experiment="script", home=local.home) as run:
        raise raised
    found = local.store.run(run.id)
    assert found.status is status
    assert reason in found.reason
    if isinstance(raised, ValueError):
        assert "test_local_runs.py" in found.error["traceback"]


def full(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_block_ends_early_where_it_was_told_to(local: LocalStack) -> None:
    after = []
    with orchestrator.start_run(home=local.home, stopping={"metric": "loss", "patience": 2}) as run:
        for _ in run.epochs(9):
            run.report({"loss": 1.0})
        after.append(run.step)
    assert after == [3]
    found = local.store.run(run.id)
    assert (found.status, "no better" in found.reason) == (RunStatus.finished, True), found.reason
    with orchestrator.start_run(home=local.home, stopping={"metric": "loss", "target": 0.3}) as run:
        for step in range(9):
            run.report({"loss": 1 / (step + 1)})
        raise AssertionError("it goes on")
    assert (local.store.run(run.id).status, local.points(run.id, "loss")[-1]) == (RunStatus.finished, 0.25)
    with pytest.raises(ConfigError, match="patience"), orchestrator.start_run(stopping={"patienze": 2}):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_script_that_is_told_to_go_saves_at_its_next_report(local: LocalStack, number: signal.Signals) -> None:
    with contextlib.suppress(RunStopped), orchestrator.start_run(experiment="script", home=local.home) as run:
        state = run.state(model=torch.nn.Linear(2, 2))
        for step in range(5):
            run.log({"loss": 1.0 / (step + 1)})
        os.kill(os.getpid(), number)
        run.report({"val/loss": 0.5}, state=state)
        raise AssertionError("it goes on")
    found = local.store.run(run.id)
    assert (found.status, found.reason) == (RunStatus.cancelled, f"stopped by {number.name}")
    assert [(each.step, "stop" in each.reasons) for each in local.store.checkpoints(run.id)] == [(5, True)]
    assert len(local.points(run.id, "loss")) == 5
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_goes_wrong_at_the_start_leaves_no_run_that_goes_on(
    local: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(local.store.runs(limit=100))
    wrong = {"every_foo": 1}
    with pytest.raises(TypeError, match="every_foo"), orchestrator.start_run(checkpoints=wrong, home=local.home):
        pass
    assert len(local.store.runs(limit=100)) == before, "refused before it was opened"
    monkeypatch.setattr("orchestrator.execution.script.copy_to_storage", full)
    with pytest.raises(OSError, match="No space"), orchestrator.start_run(home=local.home):
        pass
    assert newest(local).status is RunStatus.failed


def test_the_users_exception_arrives_though_its_end_cannot_be_recorded(
    local: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Logger] = []
    close = Logger.close
    monkeypatch.setattr(Logger, "fact", full)
    monkeypatch.setattr(Logger, "close", lambda logger: (closed.append(logger), close(logger)))
    monkeypatch.setattr("orchestrator.execution.script._Recording._describe", lambda *args: None)
    with pytest.raises(ValueError, match="mine"), orchestrator.start_run(home=local.home):
        raise ValueError("mine")
    assert len(closed) == 1, "its lock is gone: the run will be CRASHED"


FORKS = """
import os, sys, orchestrator
with orchestrator.start_run(name="forks") as run:
    child = os.fork()
    if child == 0:
        sys.exit(0)  # goes through the end of the block
    assert os.waitpid(child, 0)[1] == 0
    run.log({"a": 1.0})
    assert run._recorder.wait_committed(15)
    with orchestrator.open_catalog(os.environ["ORC_HOME"]) as catalog:
        print(catalog.run(run.id).status.value)
"""


def test_a_forked_child_that_leaves_the_block_ends_nothing(local: LocalStack, tmp_path: Path) -> None:
    out, _ = local.run("-c", FORKS, cwd=tmp_path)
    assert out.split() == ["RUNNING"]
    assert (newest(local).name, newest(local).status) == ("forks", RunStatus.finished)


def test_rank_0_opens_the_run_without_waiting_for_the_others(tmp_path: Path) -> None:
    """Many a script records on rank 0 alone: a broadcast would wait, or take part in the model's own."""
    import torch.distributed as dist

    from orchestrator.execution import script

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        script._tell("what rank 0 says")
        assert script._hear(script.World(rank=1, size=2)) == "what rank 0 says"
    finally:
        dist.destroy_process_group()


def test_one_run_at_a_time(local: LocalStack) -> None:
    with orchestrator.start_run(home=local.home) as run:
        with pytest.raises(RunIsOpen, match=run.name), orchestrator.start_run(home=local.home):
            pass
        run.log({"still": 1.0})
    assert local.points(run.id, "still") == [1.0]
    with orchestrator.start_run(home=local.home) as another:
        pass
    assert another.id != run.id


def test_an_interrupted_run_goes_on_as_its_next_attempt(local: LocalStack) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1).item()
    torch.manual_seed(1)

    def train(fails: bool, resume: bool | str) -> str:
        with orchestrator.start_run(experiment="resumed", params={"a": 1}, resume=resume, home=local.home) as run:
            model = torch.nn.Linear(1, 1)
            state = run.state(model=model)
            for epoch in run.epochs(3):
                run.report({"epoch_done": epoch}, state=state)
                if fails and epoch == 1:
                    raise RuntimeError("interrupted")
        return run.id

    assert torch.rand(1).item() == expected
    with pytest.raises(RuntimeError):
        train(fails=True, resume=True)
    first = train(fails=False, resume=True)
    assert [attempt.status for attempt in local.store.attempts(first)] == [RunStatus.failed, RunStatus.finished]
    assert local.points(first, "epoch_done") == [0.0, 1.0, 2.0]
    assert train(fails=False, resume=True) != first, "nothing was left to go on with"
    assert train(fails=False, resume=local.store.run(first).name) == first
    assert len(local.store.attempts(first)) == 3


def test_a_run_that_was_killed_a_moment_ago_goes_on(local: LocalStack) -> None:
    killed = local.tracker().open_run(RunSpec(experiment="killed", lease=2.0, storage_url=str(local.home / "runs")))
    with orchestrator.start_run(resume=killed.run, home=local.home) as run:
        pass
    assert (run.id, run.attempt) == (killed.run, 2)
    assert [each.status for each in local.store.attempts(run.id)] == [RunStatus.crashed, RunStatus.finished]


def test_random_numbers_are_the_scripts_own_unless_a_seed_is_given(local: LocalStack) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    with orchestrator.start_run(home=local.home):
        assert torch.rand(1).item() == expected
    drawn = []
    for _ in range(2):
        with orchestrator.start_run(seed=5, home=local.home):
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != expected


def test_a_tracker_killed_while_a_script_runs_costs_nothing(local: LocalStack) -> None:
    with orchestrator.start_run(home=local.home) as run:
        pid = local.tracker().describe()["pid"]
        run.log({"count": 0.0})
        os.kill(pid, signal.SIGKILL)
        for number in range(1, 2000):
            run.log({"count": float(number)})
    assert local.points(run.id, "count") == [float(number) for number in range(2000)]
    assert local.store.run(run.id).status is RunStatus.finished


def test_the_log_call_of_a_script_is_a_memory_write(local: LocalStack) -> None:
    """Nothing is added to it by local mode: no thread was started by the block."""
    import threading

    before = set(threading.enumerate())
    with orchestrator.start_run(home=local.home) as run:
        run.log({"a": 1.0})
        started = time.perf_counter()
        for _ in range(1000):
            run.log({"a": 1.0})
        assert time.perf_counter() - started < 1.0
        assert set(threading.enumerate()) == before
