"""A Ray cluster of several nodes on this machine, in a process of its own: `with RayNodes(directory) as nodes: …`.

Each node has a loopback address, raylet, workers and object store of its own. It is `ray.cluster_utils.Cluster`, driven
through a pipe, so that the process of the tests stays without a connection and without the cluster's environment. Run
as a program, this file is the other end of the pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import psutil

HEAD = "127.0.0.2"


@dataclass(frozen=True)
class RayNode:
    """A node that was started."""

    id: str
    address: str
    raylet: int
    """Its process id."""

    @property
    def is_alive(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return is_alive(psutil.Process(self.raylet))
        return False

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the raylet and everything it started, as when the machine loses power. Returns what was killed."""
        raylet = psutil.Process(self.raylet)
        doomed = [raylet, *raylet.children(recursive=True)]
        for process in doomed:
            process.kill()
        wait_for_the_end(doomed, 10)
        return doomed


def wait_for_the_end(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Of all of them; whether somebody has asked how they ended is the same."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class RayNodes:
    """Head and nodes; whatever was started is stopped at the end. The head gives no CPUs. `more`: what the processes
    on them find in their environment besides."""

    def __init__(self, directory: Path, more: Mapping[str, str] = MappingProxyType({})) -> None:
        from cluster import ports  # the other end of the pipe has no use, and no path, for it

        self._directory = directory
        self._doomed: list[Path] = []
        token = directory / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        taken: set[int] = set()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a loopback address stays what it is
            # A dead node is noticed after a second and a half instead of fifteen.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Fixed ports by default, which another head on this machine may have.
            "AUTOSCALER_METRIC_PORT": str(ports.anywhere(taken)),
            "DASHBOARD_METRIC_PORT": str(ports.anywhere(taken)),
        }
        own = directory / "ray"  # where Cluster writes the address of "the current cluster", too
        own.mkdir(mode=0o700)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with (directory / "nodes.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(own)],
                env={**kept, **self.environment, **more, "RAY_TMPDIR": str(directory)}, cwd=directory,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.address = self._ask("head")["address"]

    def add(self, address: str, cpus: int = 2) -> RayNode:
        return RayNode(**self._ask("add", address=address, cpus=cpus))

    @contextlib.contextmanager
    def apart(self, address: str, hidden: Path, cpus: int = 2) -> Iterator[None]:
        """A node on which `hidden` is a directory of its own, as it is on another machine. Needs root."""
        start = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--address", self.address,
                 "--node-ip-address", address, "--num-cpus", str(cpus), "--object-store-memory", str(150 << 20),
                 "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats"]  # fmt: skip
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
                 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(hidden), *start]  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with (self._directory / "apart.log").open("w") as log:
            # `ray start` would refuse to add a node; the address is no 127.0.0.1, so it stays what it is here, too.
            told = self.environment | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
            process = psutil.Popen(words, env=kept | told, cwd=self._directory, stdout=log, stderr=log)
        try:
            yield
        finally:
            tree = [process, *process.children(recursive=True)]
            for part in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    part.kill()
            psutil.wait_procs(tree, timeout=10)

    def remove_at_end(self, directory: Path) -> None:
        """What services on the nodes use to their end: the slab root."""
        self._doomed.append(directory)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        for directory in self._doomed:
            shutil.rmtree(directory, ignore_errors=True)

    def _ask(self, what: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _serve(directory: str) -> None:
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints is no answer
    cluster = Cluster(shutdown_at_exit=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "head":
            cluster.add_node(
                node_ip_address=HEAD, num_cpus=0, temp_dir=directory, include_dashboard=True, dashboard_host=HEAD,
                dashboard_port=0, dashboard_agent_listen_port=None,
            )  # fmt: skip
            answer: dict[str, Any] = {"address": cluster.address}
        else:
            node = cluster.add_node(node_ip_address=asked["address"], num_cpus=asked["cpus"])
            raylet = node.all_processes["raylet"][0].process.pid
            answer = {"id": node.node_id, "address": asked["address"], "raylet": raylet}
        print(json.dumps(answer), file=answers, flush=True)
    for node in [*cluster.worker_nodes, cluster.head_node]:
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
