"""A node that has another disk under the storage path: the job is refused before there is a run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import ray_head
from tests.plugins.own_stack import OwnStack
from tests.plugins.ray_nodes import RayNodes
from tests.plugins.runs import Orc, wait_until

pytestmark = pytest.mark.host

APART = "127.0.0.6"


@pytest.fixture
def orc() -> Iterator[Orc]:
    """A stack on two nodes; one of them sees an empty directory of its own where the runs are."""
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    with RayNodes(directory) as nodes, OwnStack() as own:
        own.environment |= nodes.environment
        nodes.add("127.0.0.3", cpus=1)
        own.orc("up", f"ray.address={nodes.address}", "mlflow.enabled=false")
        nodes.remove_at_end(Path(Orc(own).stack.slab_directory))
        runs = own.home / "runs"
        runs.mkdir(exist_ok=True)
        with nodes.apart(APART, hidden=runs, cpus=1):
            orc = Orc(own)
            wait_until(lambda: len(_agents(orc, nodes)) == 3, 60, "an agent on the node that joined")
            yield orc
    shutil.rmtree(directory)


def _agents(orc: Orc, nodes: RayNodes) -> list[str]:
    states = ray_head.services(orc.stack.ray_dashboard, nodes.environment["RAY_AUTH_TOKEN_PATH"])
    return [name for name, state in states.items() if "agent" in name and state == "ALIVE"]


def test_a_path_that_one_node_does_not_share_is_refused(orc: Orc, tmp_path: Path) -> None:
    job = ("run", "train=on_nodes:averages", "epochs=1")
    said = orc(*job, code=2)
    for word in ("storage.url", str(orc.home / "runs"), APART, "s3://", "strict_pack"):
        assert word in said, said
    assert orc.json("ls") == []
    assert list((orc.home / "runs").iterdir()) == []
    shared = orc.json(*job, f"storage.url={tmp_path}/shared")
    assert shared["status"] == "FINISHED"
