"""The tracker's process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.redaction import url_passwords
from orchestrator.execution.agents import AgentWatch
from orchestrator.execution.handles import NODE_AGENTS, RemoteAgents
from orchestrator.execution.services.logs import health
from orchestrator.json_logs import keep_service_log
from orchestrator.priority import Niceness, give_way
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.service import TrackerService


class TrackerProcess(TrackerService):
    """The tracker with its loops running. After a crash Ray starts it with the same arguments; its log has the rest.

    Also sees to an agent and `writers` checkpoint writers on every node, with the options (Ray's) and arguments given.
    """

    def __init__(
        self,
        log_directory: str,
        database_url: str,
        spool_directory: str,
        lease: float,
        agent_options: Mapping[str, Any],
        monitoring: float,
        writers: int,
        writer_options: Mapping[str, Any],
        writer_settings: Mapping[str, Any],
        redis_url: str,
        logs: str,
        debug: str,
        settings: str,
    ) -> None:
        secrets = [*url_passwords(database_url), *url_passwords(redis_url)]
        keep_service_log("tracker", [Path(logs)], secrets=secrets, components=debug.split(","))
        self._settings = settings
        give_way(Niceness.records)
        # What only starts the others is loaded now that it gives way.
        from orchestrator.execution.services.agent import NodeProcess
        from orchestrator.execution.services.writer import remote_writers

        # The one before it may still be dying: Ray gives its name away earlier.
        super().__init__(
            log_directory, database_url, spool_directory=spool_directory, lease=lease, log_wait=20.0,
            redis_url=redis_url, circuits=Circuits("tracker", health(Path(logs))),
        )  # fmt: skip
        self.start()
        watch = AgentWatch(
            RemoteAgents(NodeProcess, agent_options, NODE_AGENTS, (spool_directory, debug, monitoring)),
            *remote_writers(writers, writer_options, writer_settings),
            circuits=self.circuits,
        )
        threading.Thread(target=watch.run, name="agents", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": self._settings}
