"""A cluster of several nodes, each a raylet with a loopback address of its own: one job over two of them, one of which
is lost, or stands still. Takes about three minutes.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import ray_head
from orchestrator.store.store import Store
from tests.plugins.own_stack import OwnStack
from tests.plugins.ray_nodes import RayNode, RayNodes
from tests.plugins.runs import Orc, wait_until


@dataclass(frozen=True)
class Nodes:
    """Two nodes of a few CPUs, a head of none, and our stack on them: somebody else's cluster, for `orc up`."""

    nodes: RayNodes
    first: RayNode
    second: RayNode
    orc: Orc

    def agents(self) -> set[str]:
        """Nodes whose agent and whose checkpoint writer live, by the beginning of their id."""
        agents = {name.rpartition("-")[2] for name in self._living() if "agent" in name}
        return agents & {name.split("-")[3] for name in self._living() if "checkpoint-writer" in name}

    def anyone(self) -> set[str]:
        """Nodes of which there is an agent or a writer."""
        return {word for name in self._living() for word in name.split("-")}

    def _living(self) -> list[str]:
        token = self.nodes.environment["RAY_AUTH_TOKEN_PATH"]
        states = ray_head.services(self.orc.stack.ray_dashboard, token)
        return [name for name, state in states.items() if state == "ALIVE"]


@contextlib.contextmanager
def cluster_of(cpus: int = 2) -> Iterator[Nodes]:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    with RayNodes(directory) as nodes, OwnStack() as own:
        own.environment |= nodes.environment
        first, second = nodes.add("127.0.0.3", cpus), nodes.add("127.0.0.4", cpus)
        own.orc("up", f"ray.address={nodes.address}", "mlflow.enabled=false")
        nodes.remove_at_end(Path(Orc(own).stack.slab_directory))
        yield Nodes(nodes, first, second, Orc(own))
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with cluster_of() as nodes:
        yield nodes


def test_every_node_has_an_agent_and_a_writer_also_one_that_joins_later_and_none_when_it_is_gone(
    cluster: Nodes,
) -> None:
    assert {cluster.first.id[:12], cluster.second.id[:12]} < cluster.agents()
    late = cluster.nodes.add("127.0.0.5", cpus=0)
    wait_until(lambda: late.id[:12] in cluster.agents(), 30, "an agent and a writer on the node that joined")
    assert late.kill()
    wait_until(lambda: late.id[:12] not in cluster.anyone(), 30, "neither of them where there is no node")


def test_a_worker_that_is_stopped_and_one_that_comes_late_are_told_from_the_outside(cluster: Nodes) -> None:
    """Ray itself would wait ten minutes for the first one."""
    orc, store = cluster.orc, cluster.orc.store()
    orc(
        "run", "train=stands:train", "ways=stop-late", "at=15", "steps=50", "run.name=stands",
        "checkpoints.every_steps=10", "resources.placement=spread", "failures.max_restarts=2", "failures.backoff=0.1",
        "failures.hang.least=12", "failures.hang.times=1.2", "failures.collective_timeout=30", timeout=400,
    )  # fmt: skip
    run = store.run(store.runs(search="stands")[0].run)
    stopped, late, last = store.attempts(run.run)
    assert [each.status.value for each in (stopped, late, last)] == ["FAILED", "FAILED", "FINISHED"]
    assert stopped.error is not None
    assert (stopped.error["kind"], stopped.error["rank"]) == ("hang", 1)
    assert "does not answer: it is stopped (SIGSTOP)" in stopped.error["hint"]
    waits, silent = (Path(file).read_text() for file in stopped.error["stacks"])
    assert "distributed_c10d.py" in waits, "it waits for the other one"
    assert "It does not answer: it is stopped (SIGSTOP)." in silent
    hang = next(event for event in store.events(run.run) if event.kind == "hang")
    begins = next(each.at for each in store.events(run.run) if each.attempt == 2)
    assert begins - hang.at < 60, "its group was ended, not waited for"
    assert late.error is not None
    assert late.error["kind"] == "collective_timeout"
    assert late.error["network"].startswith("All 2 nodes reach each other now, the slowest in ")
    assert late.error["network"] in late.error["hint"]
    steps = store.points(run.run, "loss", rank=1)
    assert min(steps.steps[steps.attempts == 2]) > 10, "from the checkpoint"


def test_a_run_survives_the_loss_of_one_of_its_two_nodes(cluster: Nodes, tmp_path: Path) -> None:
    orc, store = cluster.orc, cluster.orc.store()
    journal = tmp_path / "journal"
    journal.mkdir()
    process = orc.start(
        "run", "train=on_nodes:averages", "run.name=spread", "resources.placement=spread", "failures.max_restarts=2",
        "epochs=16", "pause=0.02", f"journal={journal}",
    )  # fmt: skip
    run = wait_until(lambda: [row.run for row in store.runs(search="spread")], 60, "the run")[0]
    wait_until(lambda: len(store.checkpoints(run)) >= 3 or process.poll() is not None, 60, "three checkpoints")
    assert process.poll() is None
    assert _places(store, run, attempt=1) == {"127.0.0.3": cluster.first.id, "127.0.0.4": cluster.second.id}

    assert len(cluster.second.kill()) > 2, "the raylet, its worker, its agent"
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err

    first, second = store.attempts(run)
    assert (first.status.value, second.status.value) == ("CRASHED", "FINISHED")
    assert first.error is not None
    assert first.error["kind"] == "node_lost"
    assert "127.0.0.4" in first.error["host"]
    assert cluster.second.id in first.error["message"]
    assert _places(store, run, attempt=2) == {"127.0.0.3": cluster.first.id}
    for attempt in (1, 2):
        for rank in (0, 1):
            logged = int((journal / f"attempt-{attempt}-rank-{rank}").read_text())
            stored = wait_until(lambda a=attempt, r=rank, n=logged: _counts(store, run, a, r, n), 20, "every point")
            assert stored == list(range(len(stored)))
    resumed = [event for event in store.events(run) if event.kind == "resumed"]
    assert len(resumed) == 1
    epochs = store.points(run, "epoch_done", rank=0)
    assert sorted(set(epochs.values.tolist())) == [float(epoch) for epoch in range(16)]
    assert min(epochs.values[epochs.attempts == 2]) >= 2, "it goes on where a checkpoint was"


def _places(store: Store, run: str, attempt: int) -> dict[str, str]:
    """Address -> Ray's node id, as the ranks of an attempt say."""
    placed = [event for event in store.events(run) if event.kind == "placed" and event.attempt == attempt]
    assert {event.rank for event in placed} == {0, 1}
    return {event.details["address"]: event.details["node"] for event in placed}


def _counts(store: Store, run: str, attempt: int, rank: int, logged: int) -> list[int]:
    """What is stored of a rank, once that is at least what it says it logged."""
    points = store.points(run, "count", rank=rank)
    stored = [int(value) for value in points.values[points.attempts == attempt]]
    return stored if len(stored) >= logged else []
