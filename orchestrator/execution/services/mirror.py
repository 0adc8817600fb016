"""The mirror's process."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from orchestrator.config.redaction import url_passwords
from orchestrator.directory.service import DirectoryService
from orchestrator.execution.services.logs import health
from orchestrator.json_logs import keep_service_log
from orchestrator.priority import Niceness, give_way
from orchestrator.store import open_store
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.merging import MergeService
from orchestrator.tracking.mirrors import Mirrors, Sinks


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
        give_way(Niceness.copies)
        self._circuits = Circuits("mirror", health(Path(logs)))
        self._directory = DirectoryService(open_store(database_url), circuits=self._circuits)
        threading.Thread(target=self._directory.run, name="directory", daemon=True).start()
        self._mirrors = Mirrors(lambda: open_store(database_url), sinks, circuits=self._circuits)
        self._mirrors.start()
        self._merging = MergeService(open_store(database_url), circuits=self._circuits)
        threading.Thread(target=self._merging.run, name="merging", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "settings": self._settings}

    def health(self) -> dict[str, Any]:
        """By sink, the runs' directories among them; of the merging; and of the services they need."""
        return {
            **self._mirrors.health(), "directory": self._directory.health(), "merging": self._merging.health(),
            "circuits": self._circuits.describe(),
        }  # fmt: skip
