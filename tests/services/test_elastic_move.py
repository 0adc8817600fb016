"""A run that leaves a node in time and grows back, with real ranks, spools and tracker; what a cluster would tell is
told by the test. On Ray: tests/ray/test_elastic.py.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

import pytest

from orchestrator.config import Placement, ResourcesConfig, compose
from orchestrator.execution.driver import Outcome, train
from orchestrator.execution.local import Locally
from orchestrator.execution.place import Notice
from orchestrator.execution.sizing import Room
from orchestrator.records import RunStatus
from orchestrator.stack import Stack
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT, wait_until


class Cluster(Locally):
    """This host, as if it had room for `free` workers and its node could be taken away."""

    free = 2
    told: Notice | None = None

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        return Room(workers=min(self.free, wanted.workers))

    def notice(self) -> Notice | None:
        return self.told


def test_a_run_leaves_in_time_goes_on_smaller_and_grows_back_without_losing_or_repeating_a_step(
    local: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    cluster: list[Cluster] = []
    job = compose(
        ["train=on_nodes:goes_on", "resources.workers={min: 1, max: 2}", "resources.cpus_per_worker=0.5",
         "elastic.look=1", "elastic.every=0", f"journal={tmp_path}"],
    )  # fmt: skip
    assert job.settings.resources.placement is Placement.pack

    def place(stack: Stack) -> Cluster:
        cluster.append(Cluster(stack))
        return cluster[0]

    outcomes: list[Outcome] = []
    driver = threading.Thread(target=lambda: outcomes.append(train(job, home=local.home, open_place=place)))
    driver.start()
    store = local.store

    def attempt(number: int) -> str:
        """The run, once that attempt has saved."""
        assert driver.is_alive(), outcomes
        runs = store.runs(limit=1)
        saved = runs and any(each.attempt == number for each in store.checkpoints(runs[0].run))
        return runs[0].run if saved else ""

    run = wait_until(lambda: attempt(1), 100, "a checkpoint of the first attempt")
    cluster[0].free, cluster[0].told = 1, Notice(why="this host is taken away in 60 s")
    wait_until(lambda: len(store.attempts(run)) == 2, 60, "the first attempt has left")
    cluster[0].told = None
    wait_until(lambda: attempt(2), 100, "a checkpoint of the second attempt")
    cluster[0].free = 2
    wait_until(lambda: attempt(3), 100, "a checkpoint of the third attempt")
    (tmp_path / "end").touch()
    driver.join(100)
    (outcome,) = outcomes
    assert (outcome.status, outcome.attempt) == (RunStatus.finished, 3)

    attempts = store.attempts(run)
    assert [each.workers for each in attempts] == [2, 1, 2]
    assert [(each.error or {}).get("kind") for each in attempts] == ["preemption", "resize", None]
    assert [each.reason for each in attempts[:2]] == [
        "moved: this host is taken away in 60 s",
        "moved: there is room for 2 of 2 workers now, instead of 1",
    ]
    events = [(event.attempt, event.kind) for event in store.events(run)]
    assert [each for each in events if each[1] in ("preemption", "resize", "elastic", "cancel", "failure")] == [
        (1, "preemption"), (2, "elastic"), (2, "resize"),
    ]  # fmt: skip
    epochs = store.points(run, "epoch_done", rank=0)
    assert epochs.values.tolist() == list(map(float, range(len(epochs.values)))), "none twice, none left out"
    assert sorted(set(epochs.attempts.tolist())) == [1, 2, 3]
    assert store.points(run, "workers", rank=0).values.tolist()[-1] == 2
    stops = [each for each in store.checkpoints(run) if "stop" in each.reasons]
    assert {each.attempt for each in stops} >= {1, 2}, "each was saved when it was asked to go"
