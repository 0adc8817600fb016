"""What follows failed attempts of a run on this host: from the memory that ran out to a failure that comes again."""

from __future__ import annotations

from orchestrator.records import RunStatus
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT

ORC = ("-m", "orchestrator.cli.main")


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
