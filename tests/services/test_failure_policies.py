"""What follows failed attempts of a run on this host: from the memory that ran out to a failure that comes again."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.records import RunStatus
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT, wait_until

ORC = ("-m", "orchestrator.cli.main")
SWEEP = "20261122-000000-0000000f"


def test_each_failure_is_answered_by_its_kind_until_one_comes_again(local: LocalStack) -> None:
    words = ("run", "--local", "train=mended:train", "failures.max_restarts=5", "failures.backoff=0.1")
    every_step = ("checkpoints.every_steps=1", "checkpoints.every_epochs=0")
    local.run(*ORC, *words, *every_step, cwd=PROJECT, code=1, timeout=180)
    run = local.store.run(local.store.runs(limit=1)[0].run)
    attempts = local.store.attempts(run.run)
    told = [(attempt.error["kind"], attempt.error["done"]) for attempt in attempts]
    assert [kind for kind, _ in told] == ["device_out_of_memory", "device_fault", "device_fault"], told
    full, lost, again = attempts
    assert [attempt.error["rank"] for attempt in attempts] == [1, 1, 1], "the first cause, not who waited for it"
    assert full.error["done"].startswith("restarted from the newest checkpoint with half the micro-batch after ")
    assert "restart 1 of 5: failures.max_halvings" in full.error["done"]
    assert "restart 1 of 5: failures.max_restarts" in lost.error["done"]
    why = "not restarted: the same failure at step 6 twice (failures.max_repeats is 2)"
    assert (again.error["done"], run.status) == (why, RunStatus.failed)

    curve = local.store.points(run.run, "samples", rank=1)
    assert set(curve.values.tolist()) == {8.0}, "the batch is kept"
    assert curve.steps[curve.attempts == 2].tolist() == [1, 2, 3, 4, 5, 6]
    halved = local.store.points(run.run, "perf/micro_batch", rank=0)
    assert dict(zip(halved.attempts.tolist(), halved.values.tolist(), strict=True))[2] == 4.0
    events = [event for event in local.store.events(run.run) if event.kind == "policy"]
    assert [event.details["action"] for event in events] == ["halve", "restart", "stop"]
    assert events[0].details["changes"] == {"splits": 2}


def test_budgets_and_remedies_go_on_after_a_killed_driver_and_a_stop_closes_the_account(
    local: LocalStack, tmp_path: Path
) -> None:
    every = ("resources.workers=1", "failures.max_restarts=1", "failures.backoff=0.1", "checkpoints.at_end=false")
    soon = ("tracking.heartbeat=0.5", "tracking.lease=3", f"journal={tmp_path}")
    driver = local.start(*ORC, "run", "--local", "train=mended:scripted", *every, *soon, cwd=PROJECT)
    wait_until(lambda: (tmp_path / "attempt-3").exists() or driver.poll() is not None, 300, "the third attempt")
    driver.kill()
    said = driver.communicate()
    assert (tmp_path / "attempt-3").exists(), "\n".join(said)
    run = local.store.runs(limit=1)[0].run
    wait_until(lambda: local.store.run(run).status is RunStatus.crashed, 60, "CRASHED")
    local.run(*ORC, "resume", run, "--local", cwd=PROJECT, code=1, timeout=180)
    local.run(*ORC, "resume", run, "--local", cwd=PROJECT, timeout=180)

    attempts = local.store.attempts(run)
    done = [attempt.error["done"] if attempt.error else attempt.status for attempt in attempts]
    assert [word if isinstance(word, RunStatus) else word.rpartition("(")[2] for word in done] == [
        "restart 1 of 5: failures.max_halvings)",
        "restart 1 of 1: failures.max_restarts)",
        RunStatus.crashed,
        "failures.max_restarts) are used up",
        "restart 1 of 1: failures.max_restarts)",
        RunStatus.finished,
    ], done
    assert attempts[3].error["decision"]["action"] == "stop"
    assert (tmp_path / "splits").read_text() == "122222", "the micro-batch stays halved"


def test_the_users_function_has_the_last_word_if_it_says_one_in_time(local: LocalStack, tmp_path: Path) -> None:
    words = ("run", "--local", "train=mended:unlucky", "resources.workers=1", f"journal={tmp_path}")
    policy = (
        *("failures.backoff=0.1", "failures.function=mended:last_word", "failures.limits={no_luck: 5}"),
        "failures.max_repeats=0",
    )
    local.run(*ORC, *words, *policy, cwd=PROJECT, code=1, timeout=180, TOLD=str(tmp_path / "told"))
    run = local.store.runs(limit=1)[0].run
    first, second = local.store.attempts(run)
    assert "restart 1 of 5: failures.limits.no_luck" in first.error["done"]
    assert second.error["done"] == "not restarted: failures.function says so"
    said = [event.message for event in local.store.events(run) if event.kind == "policy"]
    assert "failures.function was not followed: it has not answered within 5 seconds" in said
    told = json.loads((tmp_path / "told").read_text())
    failure, decision = told
    assert (failure["kind"], failure["attempt"], failure["rank"], failure["step"]) == ("no_luck", 2, 0, 1)
    assert any("black cat" in line for line in failure["log"])
    assert decision["words"].endswith("restart 2 of 5: failures.limits.no_luck)")


def test_a_pattern_of_the_users_decides_about_a_trial(local: LocalStack, tmp_path: Path) -> None:
    waiting = "{match: 'licence server is away', kind: no_licence, action: restart}"
    patterns = f"failures.patterns=[{waiting}, {{match: 'give it up', action: stop}}]"
    words = ("sweep", "--local", "train=mended:searched", "kind=waits,gives_up", "resources.workers=1")
    more = ("--run-id", SWEEP, patterns, f"journal={tmp_path}", "sweep.objective=[loss:min]")
    local.run(*ORC, *words, *more, "sweep.concurrency=2", cwd=PROJECT, timeout=180)
    waits, gives_up = local.store.sweep_trials(SWEEP)
    assert (waits.status, gives_up.status) == ("complete", "failed")
    assert gives_up.reason.endswith("(not restarted: failures.patterns says so)")
    first, second = local.store.attempts(waits.run)
    assert (first.error["kind"], second.status) == ("no_licence", RunStatus.finished)
    assert "restart 1 of 3: sweep.restarts" in first.error["done"]
    assert [attempt.error["kind"] for attempt in local.store.attempts(gives_up.run)] == ["device_fault"]
