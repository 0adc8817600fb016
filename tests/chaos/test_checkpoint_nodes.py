"""A node dies while a checkpoint that was handed over is not written yet; the other nodes of the machine write it."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.plugins.gated_runs import end_gated, kill, sealed, start_gated, writer_processes
from tests.plugins.own_stack import OwnStack
from tests.plugins.ray_nodes import RayNode, RayNodes
from tests.plugins.runs import Orc, wait_until


@dataclass(frozen=True)
class Nodes:
    """A head without CPUs and two nodes of two, on one machine: their writers share one slab root."""

    orc: Orc
    first: RayNode
    second: RayNode

    def of(self, node: RayNode, kind: str) -> psutil.Process:
        """The process of a node's service."""
        (found,) = [
            process
            for process in psutil.Process(node.raylet).children(recursive=True)
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{kind}")
        ]
        return found


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    with RayNodes(directory) as nodes, OwnStack() as own:
        own.environment |= nodes.environment
        first, second = nodes.add("127.0.0.3"), nodes.add("127.0.0.4")
        own.orc("up", f"ray.address={nodes.address}", "mlflow.enabled=false")
        orc = Orc(own)
        nodes.remove_at_end(Path(orc.stack.slab_directory))
        yield Nodes(orc, first, second)
    shutil.rmtree(directory)


def three(orc: Orc) -> list[psutil.Process]:
    """The writers of all nodes."""

    def found() -> list[psutil.Process]:
        writers = writer_processes(orc)
        return writers if len(writers) == 3 else []

    return wait_until(found, 60, "a writer on every node")


def test_what_was_handed_over_outlives_writer_agent_and_node(nodes: Nodes, tmp_path: Path) -> None:
    orc = nodes.orc
    run = start_gated(orc, tmp_path, "resources.placement=spread", "failures.max_restarts=2")
    try:
        run.open(1)
        run.saved(1)
        writers = three(orc)
        for process in writers:
            process.send_signal(signal.SIGSTOP)
        run.open(2)
        second = run.saved(2)[0][2]
        assert (sealed(orc), run.is_committed(second)) == (2, False)
        kill([nodes.of(nodes.first, "CheckpointWriterProcess").pid, nodes.of(nodes.first, "NodeProcess").pid])
        for process in writers:
            if process.is_running():
                process.send_signal(signal.SIGCONT)
        wait_until(lambda: run.is_committed(second), 60, "another member wrote it")
        writers = wait_until(
            lambda: writer_processes(orc) if len(writer_processes(orc)) == 3 else [], 60, "three again"
        )

        for process in writers:
            process.send_signal(signal.SIGSTOP)
        run.open(3)
        third = run.saved(3)[0][2]
        assert (sealed(orc), run.is_committed(third)) == (2, False)
        lost = nodes.second.kill()
        assert [process for process in writers if process in lost], "its writer died with it"
        for process in writers:
            if process not in lost:
                process.send_signal(signal.SIGCONT)
        wait_until(lambda: run.is_committed(third), 60, "it lies in this machine's memory, and others write it")
        run.open(4)
        code, said = run.end()
        assert code == 0, said
        assert run.continued_from() == [third]
        assert run.recorded() == [2, 3, 4]
    finally:
        end_gated(run)
