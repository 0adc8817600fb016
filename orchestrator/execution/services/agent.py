"""A node's agent."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.execution import network, stacks
from orchestrator.execution.handles import RemoteTracker
from orchestrator.execution.services.logs import health, node_logs
from orchestrator.execution.shared_storage import read_marker
from orchestrator.json_logs import keep_service_log
from orchestrator.monitoring.sampler import SystemSampler
from orchestrator.priority import Niceness, give_way
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.shipper import Shipper


class NodeProcess:
    """The agent of one node: ships the node's spools and samples the machine every `monitoring` seconds (0: not).
    Outlives the trainers; what it has not shipped when it dies, the next one does.
    """

    def __init__(self, spool_directory: str, debug: str = "", monitoring: float = 0.0) -> None:
        name = f"node-{socket.gethostname()}"
        keep_service_log(name, node_logs(spool_directory), components=debug.split(","))
        self._settings = {"debug": debug, "spool_directory": spool_directory, "monitoring": monitoring}
        give_way(Niceness.records)
        self._spools = Path(spool_directory)
        logs = node_logs(spool_directory)[0]
        self._circuits = Circuits(name, health(logs) if logs.name == "logs" else None)
        self._shipper = Shipper(Path(spool_directory), RemoteTracker(), circuits=self._circuits)
        threading.Thread(target=self._shipper.run, name="shipper", daemon=True).start()
        if monitoring:
            # Of several agents on one machine the one that ships samples.
            sampler = SystemSampler(
                Path(spool_directory), interval=monitoring, is_my_turn=lambda: self._shipper.is_shipping
            )
            threading.Thread(target=sampler.run, name="sampler", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "is_shipping": self._shipper.is_shipping}
        return {**about, **self._settings, **self._shipper.backlog(), "circuits": self._circuits.describe()}

    def stacks(self, run: str, attempt: int) -> list[dict[str, Any]]:
        """Where the ranks of an attempt are that are on this node, see stacks.py."""
        return stacks.to_json(stacks.here(self._spools, run, attempt))

    def end_ranks(self, run: str, attempt: int) -> list[int]:
        """Kills the ranks of an attempt that are on this node."""
        return stacks.end_here(self._spools, run, attempt)

    def listen(self, address: str) -> int:
        """For what other nodes' `reach` sends, see network.py."""
        return network.listen(address)

    def reach(self, targets: Sequence[tuple[str, str, int]]) -> dict[str, float | str]:
        """Whether this node reaches others."""
        return network.reach(targets)

    def read_marker(self, path: str, token: str) -> str:
        """Whether this node sees the file; see shared_storage.py."""
        return read_marker(path, token)
