"""Our services as processes of the cluster: plain classes plus the threads that drive them. `actors/` says where they
run.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.redaction import url_passwords
from orchestrator.directory.service import DirectoryService
from orchestrator.execution.agents import AgentWatch
from orchestrator.execution.handles import RemoteAgents, RemoteTracker, node_agent
from orchestrator.execution.shared_storage import read_marker
from orchestrator.json_logs import keep_service_log
from orchestrator.monitoring.sampler import SystemSampler
from orchestrator.store import open_store
from orchestrator.tracking.merging import MergeService
from orchestrator.tracking.mirrors import Mirrors, Sinks
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper


def _node_logs(spool_directory: str) -> list[Path]:
    """Where an agent's own log goes, on its node: beside the spools in a data directory, else among them."""
    spools = Path(spool_directory)
    return [*([spools.parent / "logs"] if spools.name == "spools" else []), spools / ".logs"]


class TrackerProcess(TrackerService):
    """The tracker with its loops running. After a crash Ray starts it with the same arguments; its log has the rest.

    Also sees to an agent on every node, with `agent_options` (Ray's).
    """

    def __init__(
        self,
        log_directory: str,
        database_url: str,
        spool_directory: str,
        lease: float,
        agent_options: Mapping[str, Any],
        monitoring: float,
        redis_url: str,
        logs: str,
        debug: str,
        settings: str,
    ) -> None:
        secrets = [*url_passwords(database_url), *url_passwords(redis_url)]
        keep_service_log("tracker", [Path(logs)], secrets=secrets, components=debug.split(","))
        self._settings = settings
        # The one before it may still be dying: Ray gives its name away earlier.
        super().__init__(
            log_directory, database_url, spool_directory=spool_directory, lease=lease, log_wait=20.0,
            redis_url=redis_url,
        )  # fmt: skip
        self.start()
        watch = AgentWatch(RemoteAgents(NodeProcess, agent_options, spool_directory, debug, monitoring), node_agent)
        threading.Thread(target=watch.run, name="agents", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": self._settings}


class MirrorProcess:
    """What copies the record elsewhere: into the runs' directories and to the `sinks` of the stack; and merges what
    the tracker committed.

    Each copy has a thread of its own; their progress is in PostgreSQL, so a crash costs nothing but a moment.
    """

    def __init__(self, database_url: str, sinks: Sinks, logs: str, debug: str, settings: str) -> None:
        told = [str(value) for sink in sinks.values() for value in sink.values()]
        secrets = [password for url in (database_url, *told) for password in url_passwords(url)]
        keep_service_log("mirror", [Path(logs)], secrets=secrets, components=debug.split(","))
        self._settings = settings
        self._directory = DirectoryService(open_store(database_url))
        threading.Thread(target=self._directory.run, name="directory", daemon=True).start()
        self._mirrors = Mirrors(lambda: open_store(database_url), sinks)
        self._mirrors.start()
        self._merging = MergeService(open_store(database_url))
        threading.Thread(target=self._merging.run, name="merging", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "settings": self._settings}

    def health(self) -> dict[str, Any]:
        """By sink, the runs' directories among them; and of the merging."""
        return {**self._mirrors.health(), "directory": self._directory.health(), "merging": self._merging.health()}


class NodeProcess:
    """The agent of one node: ships the node's spools and samples the machine every `monitoring` seconds (0: not).
    Outlives the trainers; what it has not shipped when it dies, the next one does.
    """

    def __init__(self, spool_directory: str, debug: str = "", monitoring: float = 0.0) -> None:
        name = f"node-{socket.gethostname()}"
        keep_service_log(name, _node_logs(spool_directory), components=debug.split(","))
        self._settings = {"debug": debug, "spool_directory": spool_directory, "monitoring": monitoring}
        self._shipper = Shipper(Path(spool_directory), RemoteTracker())
        threading.Thread(target=self._shipper.run, name="shipper", daemon=True).start()
        if monitoring:
            # Of several agents on one machine the one that ships samples.
            sampler = SystemSampler(
                Path(spool_directory), interval=monitoring, is_my_turn=lambda: self._shipper.is_shipping
            )
            threading.Thread(target=sampler.run, name="sampler", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "is_shipping": self._shipper.is_shipping}
        return {**about, **self._settings, **self._shipper.backlog()}

    def read_marker(self, path: str, token: str) -> str:
        """Whether this node sees the file; see shared_storage.py."""
        return read_marker(path, token)
