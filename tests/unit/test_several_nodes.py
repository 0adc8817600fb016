"""Several nodes, decided without Ray: agents, ranks, what is waited for, who is gone, who ships."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.config import Placement as Strategy
from orchestrator.config import ResourcesConfig
from orchestrator.execution import on_ray
from orchestrator.execution.agents import AgentWatch, to_give_up, to_start
from orchestrator.execution.on_ray import _others
from orchestrator.execution.placement import Node, Placement, lost_ranks, wait_text
from orchestrator.execution.ray_names import rank_of_bundle
from orchestrator.failures.classify import Evidence, FailureKind, first_cause
from orchestrator.records import Ack, RunStatus
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.shipper import Shipper, Turn


def agent(node: str) -> str:
    return f"agent-{node}"


@dataclass
class Cluster:
    """The `Agents` of a cluster in memory."""

    living: set[str]
    agents: set[str] = field(default_factory=set)

    def living_nodes(self) -> set[str]:
        return set(self.living)

    def present(self) -> set[str]:
        return set(self.agents)

    def name_of(self, node_id: str) -> str:
        return agent(node_id)

    def start(self, node_id: str) -> None:
        self.agents.add(agent(node_id))

    def give_up(self, name: str) -> None:
        self.agents.remove(name)


def test_agents_follow_the_nodes() -> None:
    cluster = Cluster({"a", "b"})
    watch = AgentWatch(cluster)
    watch.step()
    assert cluster.agents == {"agent-a", "agent-b"}
    cluster.living = {"b", "c"}
    watch.step()
    assert cluster.agents == {"agent-b", "agent-c"}


def test_each_kind_follows_the_nodes_by_itself() -> None:
    agents, writers = Cluster({"a", "b"}, {"agent-a"}), Cluster({"a", "b"}, {"agent-z"})
    AgentWatch(agents, writers).step()
    assert agents.agents == writers.agents == {"agent-a", "agent-b"}


def test_a_head_that_tells_of_no_nodes_costs_no_agent() -> None:
    cluster = Cluster(set(), {"agent-a"})
    AgentWatch(cluster).step()
    assert cluster.agents == {"agent-a"}


def test_an_agent_that_is_there_is_left_alone() -> None:
    assert to_start({"a", "b"}, {"agent-b"}, agent) == ["a"]
    assert to_give_up({"a", "b"}, {"agent-b"}, agent) == []


@pytest.mark.parametrize(
    ("nodes", "ranks"),
    [
        ({0: "a", 1: "a"}, [0, 1]),
        ({0: "a", 1: "b"}, [0, 1]),
        ({0: "a", 1: "b", 2: "a", 3: "b"}, [0, 2, 1, 3]),
        ({0: "b", 1: "a", 2: "a", 3: "b"}, [0, 2, 3, 1]),
    ],
)
def test_ranks_of_one_node_follow_each_other(nodes: dict[int, str], ranks: list[int]) -> None:
    assert [rank_of_bundle(bundle, nodes) for bundle in sorted(nodes)] == ranks


def test_who_waits_says_for_what() -> None:
    said = wait_text(2, {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 4.0})
    assert said == "waiting for 2 CPUs (2 workers of 1 CPU each); 1 of 4 CPUs free"
    said = wait_text(2, {"GPU": 1.0, "memory": 8e9}, {}, {"GPU": 1.0, "memory": 16e9})
    assert said == "waiting for 2 GPUs and 16 GB (2 workers of 1 GPU and 8 GB each); 0 of 1 GPU free, 0 of 16 GB free"


def node(name: str, *, is_alive: bool = True, cpus: float = 4) -> Node:
    return Node(id=name * 8, host=f"host-{name}", address=f"10.0.0.{ord(name)}", is_alive=is_alive,
                resources={"CPU": cpus})  # fmt: skip


HUNG_UP = Evidence(
    rank=0, type="RuntimeError", at=1.0, traceback='File "train.py", line 41, in train',
    message="[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:20098: "
    "Connection reset by peer. This is typically caused by a remote worker hanging or bugs in the application. Check "
    "the logs of the remote worker before reporting an error. GLHF!",
)  # fmt: skip
"""What Ray Train told of a job whose other node was killed: the surviving rank's exception and nothing else."""

NODE_DIED = """The actor died unexpectedly before finishing this task.
	class_name: RayTrainWorker
	actor_id: a96067df415439a602924ec402000000
	pid: 15739
	name: calm-mesa-1/20261121-111918-4bf256b4/attempt-1/rank-1
	namespace: orc
	ip: 127.0.0.4
The actor died because its node has died. Node Id: 1419f79994e500b942304b67eaf182f26f29d7d0508c612997bfe188
	the actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""
"""Ray's own word for it, which comes when Ray has noticed."""


def test_the_rank_on_a_dead_node_is_the_cause_and_the_node_is_named() -> None:
    lost = lost_ranks([node("a").id, node("b").id], [node("a"), node("b", is_alive=False)])
    finding = first_cause([HUNG_UP, *lost])
    assert (finding.kind, finding.evidence.rank) == (FailureKind.node_lost, 1)
    assert "host-b at 10.0.0.98" in finding.reason


def test_a_node_that_ray_has_forgotten_is_gone() -> None:
    (lost,) = lost_ranks([node("a").id], [])
    assert node("a").id in lost.message


def test_who_watches_the_placement_survives_a_head_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [ConnectionError("the head is away"), OSError("still"), False, True]

    def look(self: Placement) -> bool:
        found = looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(Placement, "PAUSE", 0.001)
    monkeypatch.setattr(Placement, "_look", look)
    with Placement("a run's"):
        deadline = time.monotonic() + 10
        while looks and time.monotonic() < deadline:
            time.sleep(0.001)
    assert looks == []


def test_a_head_that_is_away_costs_nothing_of_what_the_ranks_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> list[Node]:
        raise ConnectionError("the head is away")

    monkeypatch.setattr("orchestrator.execution.placement.nodes", away)
    said = [Evidence(rank=0, type="ValueError", message="bad", traceback="Traceback")]
    assert on_ray.with_lost_nodes(said, Placement("a run's")) == said


def test_rays_text_about_a_dead_node_is_understood() -> None:
    finding = first_cause([HUNG_UP, Evidence(rank=1, type="ActorDiedError", message=NODE_DIED)])
    assert (finding.kind, finding.evidence.rank) == (FailureKind.node_lost, 1)


def test_a_rank_that_only_hears_another_hang_up_is_no_bug_of_the_users() -> None:
    finding = first_cause([HUNG_UP])
    assert finding.kind is FailureKind.worker_killed
    assert "another rank" in finding.reason


def test_a_process_that_cannot_start_says_why_and_is_not_tried_again() -> None:
    message = (
        "The actor died because of an error raised in its creation task, ray::TrainController.__init__() (pid=7)\n"
        "Traceback (most recent call last):\n  File \"a.py\", line 1\nModuleNotFoundError: No module named 'vision'\n"
    )
    finding = first_cause([Evidence(rank=-1, type="ActorDiedError", message=message)])
    assert (finding.kind, finding.status) == (FailureKind.user_bug, RunStatus.failed)
    assert not finding.is_restart_useful
    assert "could not start: ModuleNotFoundError: No module named 'vision'" in finding.reason


def test_a_download_that_is_reset_is_the_users() -> None:
    reset = Evidence(rank=0, type="ConnectionResetError", message="[Errno 104] Connection reset by peer",
                     traceback='File "train.py", line 3, in train')  # fmt: skip
    assert first_cause([reset]).kind is FailureKind.user_bug


def test_only_nodes_on_which_workers_may_be_are_asked_about_the_storage() -> None:
    here, other, small, gone = node("a"), node("b"), node("c", cpus=0), node("d", is_alive=False)
    known = [here, other, small, gone]
    assert _others(known, here, ResourcesConfig()) == [other]
    assert _others(known, here, ResourcesConfig(placement=Strategy.strict_pack)) == []
    assert _others([here], here, ResourcesConfig()) == []


# -- whose turn it is to ship


class Accepting:
    """A tracker that takes everything and remembers it as committed."""

    def __init__(self) -> None:
        self.batches: list[bytes] = []
        self._last: dict[tuple[str, int], Ack] = {}

    def push(self, frames: list[bytes]) -> list[Ack]:
        from orchestrator.records import Batch

        self.batches += frames
        acks = []
        for batch in map(Batch.decode, frames):
            acks.append(Ack(producer=batch.producer, stream=batch.stream, accepted=batch.last, committed=batch.last))
        return acks

    def acknowledged(self, producers: object) -> list[Ack]:
        return []


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process whose turn it is. Its pid."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        Turn(tmp_path).is_mine()
        os.write(write, b"x")
        signal.pause()
        os._exit(0)
    assert os.read(read, 1) == b"x"
    yield child
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    os.close(read)
    os.close(write)


def test_one_of_two_agents_on_a_machine_ships_and_the_other_goes_on_when_it_dies(tmp_path: Path, holder: int) -> None:
    logger = Logger(tmp_path, run="r1", attempt=1, rank=0)
    logger.log({"loss": 1.0})
    logger.close()
    tracker = Accepting()
    shipper = Shipper(tmp_path, tracker)
    shipper.step()
    assert not shipper.is_shipping
    assert tracker.batches == []
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    shipper.step()
    assert shipper.is_shipping
    assert len(tracker.batches) == 1


def test_where_nobody_can_have_the_turn_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("orchestrator.tracking.shipper.fcntl.lockf", no_locks)
    with pytest.raises(OSError, match="No locks"):
        Turn(tmp_path).is_mine()
