"""Runs of this host that stop getting on, or use more than they may: real processes that are stopped, spin, wait for
ever or grow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import RunStatus
from orchestrator.store.views import RunDetail
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT

ORC = ("-m", "orchestrator.cli.main", "run", "--local")
SOON = (
    "failures.hang.least=12",
    "failures.hang.times=3",
    "failures.hang.start=200",
    "failures.backoff=0.1",
    "checkpoints.every_steps=10",
)
"""Twelve seconds without a step are long where one takes a tenth of one."""


@pytest.fixture(scope="module")
def local(schema_url: str) -> Iterator[LocalStack]:
    """With a sample of the machine each second."""
    stack = LocalStack.make(schema_url, monitoring=1.0)
    yield stack
    stack.remove()


def trained(local: LocalStack, *words: str, code: int) -> tuple[RunDetail, str]:
    """A run and what was printed of it."""
    out, err = local.run(*ORC, *words, *SOON, cwd=PROJECT, code=code, timeout=240)
    return local.store.run(local.store.runs(limit=1)[0].run), out + err


def events(local: LocalStack, run: str, kind: str) -> list[Any]:
    return [event for event in local.store.events(run) if event.kind == kind]


def newest_checkpoint(local: LocalStack, run: str) -> int:
    return max(checkpoint.step for checkpoint in local.store.checkpoints(run))


def test_a_stopped_rank_is_found_all_stacks_are_kept_and_the_run_goes_on(local: LocalStack) -> None:
    run, _ = trained(local, "train=stands:train", "ways=stop", "failures.max_restarts=1", code=0)
    first, second = local.store.attempts(run.run)
    assert (first.status, second.status, run.status) == (RunStatus.failed, RunStatus.finished, RunStatus.finished)
    assert first.error is not None
    assert (first.error["kind"], first.error["rank"], first.error["step"] in (30, 31)) == ("hang", 1, True)
    assert first.error["what"].startswith("no progress for ")
    assert "does not answer: it is stopped (SIGSTOP)" in first.error["hint"]
    assert f"All stacks: {run.directory}/logs/attempt-1/rank-*.stack." in first.error["hint"]
    assert "restarted from the newest checkpoint" in first.error["done"]
    waits, silent = (Path(file).read_text() for file in first.error["stacks"])
    assert "stands.py" in waits
    assert "distributed_c10d.py" in waits, "it waits for the other one"
    assert "It does not answer: it is stopped (SIGSTOP)." in silent
    assert [event.attempt for event in events(local, run.run, "hang")] == [1]
    assert events(local, run.run, "stall")[0].attempt == 1
    steps = local.store.points(run.run, "loss", rank=1)
    assert min(steps.steps[steps.attempts == 2]) > 20, "from the checkpoint"
    assert max(steps.steps) == 60


@pytest.mark.parametrize(("way", "where"), [("spin", "spins"), ("lock", "waits_for_a_lock")])
def test_the_line_on_which_a_rank_hangs_is_named(local: LocalStack, way: str, where: str) -> None:
    run, printed = trained(local, "train=stands:train", f"ways={way}", "at=5", code=1)
    assert run.error is not None
    assert (run.status, run.error["kind"], run.error["rank"]) == (RunStatus.failed, "hang", 1)
    assert f"is in {where} at {PROJECT}/stands.py:" in run.error["hint"]
    assert f"in {where}" in run.error["traceback"]
    assert f"in {where}" in Path(run.error["stacks"][1]).read_text()
    assert f"is in {where} at" in printed, "one of the five lines"
    assert "max_restarts is 0" in printed
    shown, _ = local.run("-m", "orchestrator.cli.main", "logs", run.run, "--stacks", "--rank", "1", cwd=PROJECT)
    assert shown.startswith("Rank 1, pid ")
    assert f"in {where}" in shown


def test_a_rank_that_logs_nothing_and_moves_is_left_alone(local: LocalStack) -> None:
    run, printed = trained(local, "train=stands:train", "ways=work", code=0)
    (attempt,) = local.store.attempts(run.run)
    assert attempt.status is RunStatus.finished
    assert events(local, run.run, "stall"), "it stood still"
    assert not events(local, run.run, "hang")
    log = (Path(run.directory) / "logs" / "attempt-1" / "driver.log").read_text()
    assert re.search(r"but rank 1 moves, now in \w+ at .*stands\.py:\d+.*: it gets 60 s more", log), log


def test_a_run_saves_and_ends_when_its_hours_are_used_up_and_has_none_left_afterwards(local: LocalStack) -> None:
    hours = ("resources.limits.hours=0.006", "failures.grace=90")
    words = ("train=stands:train", "ways=none", "steps=100000", "run.name=timed", "failures.max_restarts=5")
    run, _ = trained(local, *words, *hours, code=1)
    (attempt,) = local.store.attempts(run.run)
    assert attempt.error is not None
    assert (run.status, attempt.error["kind"]) == (RunStatus.cancelled, "time_limit")
    assert re.fullmatch(r"limit: 0\.0\d+ of 0.006 hours are used \(resources.limits.hours\)", run.reason), run.reason
    assert "with a higher limit `orc resume` goes on" in attempt.error["done"]
    reached = newest_checkpoint(local, run.run)
    assert reached == max(local.store.points(run.run, "loss", rank=0).steps), "saved where it stopped"
    over = events(local, run.run, "limit")[-1]
    assert (over.level, "it saves and stops" in over.message) == ("warning", True)
    local.run(*ORC[:2], "resume", "--local", run.run, cwd=PROJECT, code=1)
    again = local.store.attempts(run.run)[1]
    assert (again.status, again.error and again.error["kind"]) == (RunStatus.cancelled, "time_limit")
    assert max(local.store.points(run.run, "loss", rank=0).steps) == reached, "it did not begin"


def test_a_rank_that_takes_too_much_memory_is_stopped_with_a_checkpoint(local: LocalStack) -> None:
    run, _ = trained(local, "train=stands:grows", "resources.limits.memory_gb=1.2", "failures.grace=90", code=1)
    (attempt,) = local.store.attempts(run.run)
    assert attempt.error is not None
    assert (run.status, attempt.error["kind"], attempt.error["rank"]) == (RunStatus.cancelled, "limit", 0)
    assert run.reason.startswith("limit: rank 0: ")
    assert "of 1.2 GB of memory (resources.limits.memory_gb)" in run.reason
    assert max(local.store.points(run.run, "system/process/rss_bytes", rank=0).values) > 1.2e9, "it really was"
    assert newest_checkpoint(local, run.run) == max(local.store.points(run.run, "kept", rank=0).steps)
    assert "it saves and stops" in events(local, run.run, "limit")[-1].message


def test_limits_that_nobody_could_keep_to_are_refused(local: LocalStack) -> None:
    _, err = local.run(
        *ORC[:2], "sweep", "--local", "train=stands:train", "resources.limits.hours=1", "at=1,2", cwd=PROJECT, code=2
    )
    assert "resources.limits" in err
    assert "sweep.trial_minutes" in err
