"""Trainings that go wrong, in real processes: they go back to where all was well, and on without what was to blame."""

from __future__ import annotations

import json

from orchestrator.records import RunStatus
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT

ORC = ("-m", "orchestrator.cli.main")
MODE = "checkpoints.mode=direct"  # a writer may skip one that is due while it is busy


def _weights(local: LocalStack, run: str) -> list[float]:
    return next(param.value for param in local.store.params(run) if param.name == "weights")


def test_a_batch_without_a_number_is_left_out_and_the_rest_is_as_if_it_had_never_been(local: LocalStack) -> None:
    words = ("run", "--local", "train=spoiled:train", "failures.backoff=0.1", "checkpoints.every_epochs=0", MODE)
    local.run(*ORC, *words, "avoids=true", cwd=PROJECT, timeout=180)
    avoided = local.store.runs(limit=1)[0].run
    local.run(*ORC, *words, "failures.nan=rollback", "checkpoints.every_steps=3", cwd=PROJECT, timeout=180)
    run = local.store.run(local.store.runs(limit=1)[0].run)
    assert run.status is RunStatus.finished
    broken, _ = local.store.attempts(run.run)
    events = local.store.events(run.run)
    (step,) = (event.step for event in events if event.kind == "spoilt")
    assert step is not None
    assert step % 3, "nothing is saved in that step: rank 0, which does not have it, sees it in the step after"
    assert broken.error["step"] == step + 1
    error = broken.error
    assert (error["kind"], error["good_step"]) == ("diverged", step - 1)
    first = (step - 9) * 8
    assert error["rollback"] == {"to": (step - 1) // 3 * 3, "batches": [[1, 0, first, first + 8]], "until": step + 1}
    assert error["done"].startswith(f"rolled back to step {(step - 1) // 3 * 3}")
    assert "8 samples of epoch 1 are left out; after" in error["done"]
    assert "restart 1 of 3: failures.max_rollbacks" in error["done"]

    weights = [_weights(local, each) for each in (run.run, avoided)]
    assert len(weights[0]) == 49
    assert weights[0] == weights[1], "bit for bit"
    told = [event.message for event in events if event.kind == "rolled-back"]
    assert told == ["goes on without 8 samples of epoch 1"]


def test_a_learning_rate_that_is_too_high_is_lowered_so_many_times_and_never_gone_on_from(local: LocalStack) -> None:
    words = ("run", "--local", "train=spoiled:climb", "resources.workers=1", "failures.backoff=0.1", MODE)
    often = ("checkpoints.every_steps=1", "checkpoints.every_epochs=0", "checkpoints.keep_last=2")
    rules = ("failures.divergence=rollback", "failures.max_rollbacks=2", "failures.lr_factor=0.98")
    local.run(*ORC, *words, *often, *rules, "failures.max_restarts=1", cwd=PROJECT, code=1, timeout=240)
    run = local.store.run(local.store.runs(limit=1)[0].run)
    first, killed, second, third = local.store.attempts(run.run)
    assert [each.error["kind"] for each in (first, killed, second, third)] == [
        "diverged", "worker_killed", "diverged", "diverged",
    ]  # fmt: skip
    good, to = first.error["good_step"], first.error["rollback"]["to"]
    assert 0 < to <= good < first.error["step"] - 9, "the ten values that were compared are not good"
    assert "the learning rate is multiplied by 0.98" in first.error["done"]
    assert third.error["done"] == "not restarted: all 2 restarts for that (failures.max_rollbacks) are used up"
    assert run.status is RunStatus.failed

    rates = local.store.points(run.run, "base", rank=0)
    by_attempt = dict(zip(rates.attempts.tolist(), rates.values.tolist(), strict=True))
    assert by_attempt == {1: 2.6, 3: 2.6 * 0.98, 4: 2.6 * 0.98 * 0.98}
    steps = local.store.points(run.run, "loss", rank=0)
    began = {attempt: int(steps.steps[steps.attempts == attempt].min()) for attempt in (1, 3, 4)}
    assert began[1] == 1
    assert began[3] == to + 1, "although the attempt between had died before it saved anything"
    out, _ = local.run(*ORC, "checkpoint", "ls", run.run, "--json", cwd=PROJECT)
    listed = {row["step"]: row["state"] for row in json.loads(out) if row["attempt"] == 4}
    assert listed
    assert max(listed) > third.error["good_step"], (listed, third.error)
    for step, state in listed.items():
        assert state == ("bad" if step > third.error["good_step"] else "committed"), listed
