"""Our services as processes of the cluster: plain classes plus the threads that drive them. `actors/` says where they
run.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from orchestrator.backends import open_mlflow
from orchestrator.execution.handles import RemoteTracker
from orchestrator.store import open_store
from orchestrator.tracking.mirror import MirrorService
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


class TrackerProcess(TrackerService):
    """The tracker with its loops running. After a crash Ray starts it with the same arguments; its log has the rest."""

    def __init__(
        self, log_directory: str, database_url: str, spool_directory: str, lease: float, settings: str
    ) -> None:
        _log_to_stderr()
        self._settings = settings
        # The one before it may still be dying: Ray gives its name away earlier.
        super().__init__(log_directory, database_url, spool_directory=spool_directory, lease=lease, log_wait=20.0)
        self.start()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": self._settings}


class MirrorProcess(MirrorService):
    """The MLflow mirror with its loop running. Its progress is in PostgreSQL, so a crash costs nothing but a moment."""

    def __init__(self, database_url: str, tracking_uri: str, settings: str) -> None:
        _log_to_stderr()
        self._settings = settings
        super().__init__(open_store(database_url), open_mlflow(tracking_uri))
        threading.Thread(target=self.run, name="mirror", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "settings": self._settings}


class NodeProcess:
    """The agent of one node: ships the node's spools. Outlives the trainers; what it has not shipped when it dies,
    the next one does.
    """

    def __init__(self, spool_directory: str) -> None:
        _log_to_stderr()
        self._shipper = Shipper(Path(spool_directory), RemoteTracker())
        threading.Thread(target=self._shipper.run, name="shipper", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), **self._shipper.backlog()}
