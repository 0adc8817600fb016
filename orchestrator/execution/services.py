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

from orchestrator.backends import open_mlflow
from orchestrator.config.redaction import url_passwords
from orchestrator.directory.service import DirectoryService
from orchestrator.execution.agents import AgentWatch
from orchestrator.execution.handles import RemoteAgents, RemoteTracker, node_agent
from orchestrator.execution.shared_storage import read_marker
from orchestrator.json_logs import keep_service_log
from orchestrator.store import open_store
from orchestrator.tracking.mirror import MirrorService
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
        logs: str,
        debug: str,
        settings: str,
    ) -> None:
        keep_service_log("tracker", [Path(logs)], secrets=url_passwords(database_url), components=debug.split(","))
        self._settings = settings
        # The one before it may still be dying: Ray gives its name away earlier.
        super().__init__(log_directory, database_url, spool_directory=spool_directory, lease=lease, log_wait=20.0)
        self.start()
        watch = AgentWatch(RemoteAgents(NodeProcess, agent_options, spool_directory, debug), node_agent)
        threading.Thread(target=watch.run, name="agents", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": self._settings}


class MirrorProcess:
    """What copies the record elsewhere: into the runs' directories and, if there is MLflow (`tracking_uri`), there.

    Each copy has a thread of its own; their progress is in PostgreSQL, so a crash costs nothing but a moment.
    """

    def __init__(
        self, database_url: str, tracking_uri: str, dashboard: str, logs: str, debug: str, settings: str
    ) -> None:
        secrets = [*url_passwords(database_url), *url_passwords(tracking_uri)]
        keep_service_log("mirror", [Path(logs)], secrets=secrets, components=debug.split(","))
        self._settings = settings
        store = open_store(database_url)
        self._directory = DirectoryService(store)
        sink = open_mlflow(tracking_uri, dashboard=dashboard) if tracking_uri else None
        self._mirror = MirrorService(store, sink) if sink else None
        for name, service in (("directory", self._directory), ("mirror", self._mirror)):
            if service is not None:
                threading.Thread(target=service.run, name=name, daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "settings": self._settings}

    def health(self) -> dict[str, Any]:
        """Of the MLflow mirror; `directory` is that of the directories."""
        mirror = self._mirror.health() if self._mirror is not None else {}
        return {**mirror, "directory": self._directory.health()}


class NodeProcess:
    """The agent of one node: ships the node's spools. Outlives the trainers; what it has not shipped when it dies,
    the next one does.
    """

    def __init__(self, spool_directory: str, debug: str = "") -> None:
        name = f"node-{socket.gethostname()}"
        keep_service_log(name, _node_logs(spool_directory), components=debug.split(","))
        self._settings = {"debug": debug, "spool_directory": spool_directory}
        self._shipper = Shipper(Path(spool_directory), RemoteTracker())
        threading.Thread(target=self._shipper.run, name="shipper", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "is_shipping": self._shipper.is_shipping}
        return {**about, **self._settings, **self._shipper.backlog()}

    def read_marker(self, path: str, token: str) -> str:
        """Whether this node sees the file; see shared_storage.py."""
        return read_marker(path, token)
