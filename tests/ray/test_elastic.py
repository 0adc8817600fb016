"""An elastic run on a cluster whose nodes come and go: a node is lost, another one comes, that one is taken away with
notice. One run of four attempts; takes about two minutes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.store.store import Store
from tests.plugins.ray_nodes import RayNode
from tests.plugins.runs import wait_until
from tests.ray.test_nodes import Nodes, cluster_of

NOTICE = 90
"""Seconds between the word that a node is taken away and its end: none has to pass, the ranks are gone by then."""


@pytest.mark.timeout(570)
def test_a_run_goes_on_with_what_is_left_and_grows_back_and_leaves_in_time(tmp_path: Path) -> None:
    with cluster_of(cpus=1) as cluster, contextlib.ExitStack() as stack:
        store, journal = cluster.orc.store(), tmp_path / "journal"
        journal.mkdir()
        process = cluster.orc.start(
            "run", "train=on_nodes:goes_on", "run.name=elastic", "resources.workers={min: 1, max: 2}",
            "elastic.look=1", "elastic.every=2", "tracking.debug=[driver]", f"journal={journal}",
        )  # fmt: skip
        stack.callback(process.kill)
        run = wait_until(lambda: [row.run for row in store.runs(search="elastic")], 90, "the run")[0]
        trains(store, run, process, attempt=1)
        assert places(store, run, 1) == {cluster.first.id, cluster.second.id}

        assert len(cluster.second.kill()) > 2
        killed = time.time()
        trains(store, run, process, attempt=2)
        assert places(store, run, 2) == {cluster.first.id}

        third = cluster.nodes.add("127.0.0.5", cpus=1)
        trains(store, run, process, attempt=3)
        assert places(store, run, 3) == {cluster.first.id, third.id}

        drain(cluster, third)
        told = time.time()
        trains(store, run, process, attempt=4)
        assert places(store, run, 4) == {cluster.first.id}
        assert third.is_alive, "the ranks had left before it was taken away"
        assert time.time() - told < NOTICE

        (journal / "end").touch()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        check_attempts(store, run)
        check_steps(store, run)
        first_again = next(event.at for event in store.events(run) if event.kind == "placed" and event.attempt == 2)
        print(f"node lost -> ranks run again: {first_again - killed:.1f} s")


def trains(store: Store, run: str, process: subprocess.Popen[str], attempt: int) -> None:
    """Waits until the attempt has saved twice."""

    def has_saved() -> bool:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        return sum(each.attempt == attempt for each in store.checkpoints(run)) >= 2

    try:
        wait_until(has_saved, 150, f"two checkpoints of attempt {attempt}")
    except AssertionError as error:
        logs = Path(store.run(run).directory, "logs").glob("attempt-*/driver.log")
        raise AssertionError(f"{error}\n" + "\n".join(path.read_text()[-4000:] for path in sorted(logs))) from None


def drain(cluster: Nodes, node: RayNode) -> None:
    """As a cloud's agent does it when it hears that the machine is taken back."""
    words = ["drain-node", "--address", cluster.nodes.address, "--node-id", node.id, "--reason",
             "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", str(NOTICE)]  # fmt: skip # noqa: E501
    environment = {**os.environ, **cluster.orc.own.environment}
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], env=environment, check=True, timeout=60)


def places(store: Store, run: str, attempt: int) -> set[str]:
    placed = [event for event in store.events(run) if event.kind == "placed" and event.attempt == attempt]
    assert {event.details["workers"] for event in placed} == {len(placed)}
    return {event.details["node"] for event in placed}


def check_attempts(store: Store, run: str) -> None:
    attempts = store.attempts(run)
    assert [each.status.value for each in attempts] == ["CRASHED", "CRASHED", "CRASHED", "FINISHED"]
    assert [(each.error or {}).get("kind") for each in attempts] == ["node_lost", "resize", "preemption", None]
    assert [each.workers for each in attempts] == [2, 1, 2, 1]
    done = [(each.error or {}).get("done", "") for each in attempts]
    assert "with the workers that there is room for: 1" in done[0]
    assert "more workers" in done[1]
    assert "max_preemptions" in done[2]
    told = [(event.attempt, event.kind) for event in store.events(run) if event.kind in ("resize", "preemption")]
    assert told == [(2, "resize"), (3, "preemption")]


def check_steps(store: Store, run: str) -> None:
    """Every epoch was trained, and those moves that were no accident repeated none."""
    epochs = store.points(run, "epoch_done", rank=0)
    done = [(int(attempt), int(epoch)) for attempt, epoch in zip(epochs.attempts, epochs.values, strict=True)]
    assert sorted({epoch for _, epoch in done}) == list(range(max(epoch for _, epoch in done) + 1))
    of = {number: [epoch for attempt, epoch in done if attempt == number] for number in (1, 2, 3, 4)}
    assert min(of[3]) == max(of[2]) + 1
    assert min(of[4]) == max(of[3]) + 1
    assert min(of[2]) >= max(of[1]) - 1, "at most one checkpoint's epoch is repeated"
