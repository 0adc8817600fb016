"""A node, or a process that every node has, dies at chosen points of a save. The other nodes of the machine end what
was handed over, and nothing else is ever seen.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.plugins.gated_runs import end_gated, kill, sealed, start_gated, writer_processes
from tests.plugins.halted_saves import POINTS, Halts, Noted, assert_halted, start_noted
from tests.plugins.own_stack import OwnStack
from tests.plugins.ray_nodes import RayNode, RayNodes, wait_for_the_end
from tests.plugins.runs import Orc, wait_until

SERVICES = ("NodeProcess", "CheckpointWriterProcess")
FULL = pytest.mark.host
MEMBERS = 3


@dataclass(frozen=True)
class Nodes:
    """A head without CPUs and two nodes of two, on one machine: their writers share one slab root."""

    orc: Orc
    nodes: RayNodes
    halts: Halts
    living: list[RayNode]
    addresses: Iterator[int]

    def add(self) -> None:
        self.living.append(self.nodes.add(f"127.0.0.{next(self.addresses)}"))

    def replace(self, node: RayNode) -> None:
        self.living.remove(node)
        self.add()

    def complete(self) -> None:
        """Two again, where a test before this one failed in between."""
        for node in [each for each in self.living if not each.is_alive]:
            self.replace(node)

    def of(self, node: RayNode, kind: str) -> psutil.Process:
        """The process of a node's service, or of an agent of Ray's, once there is one."""

        def found() -> list[psutil.Process]:
            return [each for each in psutil.Process(node.raylet).children(recursive=True) if is_of(each, kind)]

        (process,) = wait_until(found, 60, f"{kind} on {node.address}")
        return process

    def that_has(self, pid: int) -> RayNode:
        """The node that started this process."""
        raylets = {parent.pid for parent in psutil.Process(pid).parents()}
        (found,) = [node for node in self.living if node.raylet in raylets]
        return found

    def writers(self) -> list[psutil.Process]:
        """Those of all nodes, once each has one."""

        def found() -> list[psutil.Process]:
            writers = writer_processes(self.orc)
            return writers if len(writers) == MEMBERS else []

        return wait_until(found, 60, "a writer on every node")


def is_of(process: psutil.Process, kind: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return (process.cmdline() or [""])[0].startswith(f"ray::{kind}")
    return False


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    halts = Halts(directory / "points")
    with RayNodes(directory, more=halts.environment) as started, OwnStack() as own:
        own.environment |= started.environment
        nodes = Nodes(Orc(own), started, halts, [], itertools.count(3))
        nodes.add()
        nodes.add()
        own.orc("up", f"ray.address={started.address}", "mlflow.enabled=false")
        started.remove_at_end(Path(nodes.orc.stack.slab_directory))
        yield nodes
    shutil.rmtree(directory)


@contextlib.contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def test_what_was_handed_over_outlives_writer_agent_and_node(nodes: Nodes, tmp_path: Path) -> None:
    orc = nodes.orc
    nodes.complete()
    nodes.writers()  # before the first save asks for memory: without it the ranks would save by themselves
    run = start_gated(orc, tmp_path, "resources.placement=spread", "failures.max_restarts=2")
    try:
        run.open(1)
        run.saved(1)
        first, second = nodes.living
        with stopped(nodes.writers()):
            run.open(2)
            saved = run.saved(2)[0][2]
            assert (sealed(orc), run.is_committed(saved)) == (2, False)
            kill([nodes.of(first, kind).pid for kind in SERVICES])
        wait_until(lambda: run.is_committed(saved), 60, "another member wrote it")

        writers = nodes.writers()
        with stopped(writers):
            run.open(3)
            saved = run.saved(3)[0][2]
            assert (sealed(orc), run.is_committed(saved)) == (2, False)
            lost = second.kill()
            assert [process for process in writers if process in lost], "its writer died with it"
        wait_until(lambda: run.is_committed(saved), 60, "it lies in this machine's memory, and others write it")
        nodes.replace(second)
        run.open(4)
        code, said = run.end()
        assert code == 0, said
        assert run.continued_from() == [saved]
        assert run.recorded() == [2, 3, 4]
    finally:
        end_gated(run)


@pytest.mark.parametrize(
    ("victims", "ranks", "points"),
    [
        (("raylet",), 2, ("second-file",)),
        (SERVICES, 1, ("manifest", "seal")),
        *[
            pytest.param(victims, ranks, POINTS, marks=FULL)
            for victims in (("raylet",), ("DashboardAgent",), ("RuntimeEnvAgent",), SERVICES)
            for ranks in (1, 2)
        ],
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.timeout(900)
def test_processes_of_a_node_killed_anywhere_in_a_save_cost_at_most_that_save(
    nodes: Nodes, tmp_path: Path, victims: tuple[str, ...], ranks: int, points: tuple[str, ...]
) -> None:
    """Ray's own agents take their raylet with them, and that its workers; ours come back beside the training."""
    nodes.complete()
    last = len(points) + 2
    run = start_noted(nodes.orc, tmp_path, ranks, last, "resources.placement=spread", "failures.max_restarts=9")
    attempt, continued = 1, []
    try:
        run.open(1)
        for step, point in enumerate(points, 2):
            begun = run.begun(attempt)
            run.wait(lambda step=step: run.is_settled(step - 1), "the save before it")
            before = run.newest()
            trainers = [pid for pid, *_ in begun]
            node = nodes.that_has(trainers[step % ranks])
            with halted_on(node, nodes, run, point, step, attempt, trainers):
                is_node_lost = killed(nodes, node, victims)
                assert run.newest() == ((step, attempt) if point == "result" else before)
            if not is_node_lost:
                assert all(map(psutil.pid_exists, trainers))
                run.wait(lambda step=step: run.is_settled(step), "the next writer ends it")
                assert run.newest() == (step, attempt)
                continue
            nodes.replace(node)
            if point != "seal":
                run.wait(lambda step=step: run.is_settled(step), "the writers of other nodes end it")
                before = step, attempt
            attempt += 1
            given = [(at, digest) for _, at, digest in run.begun(attempt)]
            assert given == [(before[0], digest) for digest in run.saving(*before)], "each rank goes on with its own"
            continued.append(f"step_{before[0]:08d}-a{before[1]}")
        run.open(last)
        code, said = run.end()
        assert code == 0, said
        wait_until(lambda: run.is_settled(last), 60, "the last one")
        assert run.newest() == (last, attempt)
        assert run.continued_from() == continued
        statuses = [each.status.value for each in run.store.attempts(run.run)]
        assert statuses == ["CRASHED"] * len(continued) + ["FINISHED"]
        there = {path.parent.name for path in run.checkpoints.glob("*/MANIFEST.json")}
        assert len(there) == 3, "as many as are kept"
        wait_until(lambda: run.recorded() == there, 60, "the record knows what there is")
    finally:
        run.close()


@contextlib.contextmanager
def halted_on(
    node: RayNode, nodes: Nodes, run: Noted, point: str, step: int, attempt: int, trainers: Sequence[int]
) -> Iterator[None]:
    """The save of that step has come to that point on that node: by its trainer or by its writer. The other nodes'
    writers do nothing until the end of the block."""
    halts, writers = nodes.halts, nodes.writers()
    own = nodes.of(node, "CheckpointWriterProcess")
    with stopped([process for process in writers if process != own]):
        halts.arm(point, node.raylet)
        try:
            run.open(step)
            run.wait(lambda: halts.reached(point), f"{point} is reached")
            assert set(halts.reached(point)) <= (set(trainers) if point == "seal" else {own.pid})
            assert_halted(run, point, step, attempt)
            yield
        finally:
            halts.release(point)


def killed(nodes: Nodes, node: RayNode, victims: Sequence[str]) -> bool:
    """SIGKILL; whether the node went with them. Returns when all that had to die is dead.

    A node dies with all its processes; so what outlives its raylet, which may finish what it is at, dies too.
    """
    raylet = psutil.Process(node.raylet)
    workers = raylet.children(recursive=True)
    doomed = [raylet if kind == "raylet" else nodes.of(node, kind) for kind in victims]
    for process in doomed:
        process.kill()
    wait_for_the_end(doomed, 10)
    if victims == SERVICES:
        assert raylet.is_running()
        return False
    wait_for_the_end([raylet], 40)
    for process in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_for_the_end(workers, 10)
    return True
