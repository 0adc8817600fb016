"""A node's checkpoint writer."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.service import WriterService
from orchestrator.execution.handles import RemoteAgents, checkpoint_writers
from orchestrator.execution.services.logs import node_logs
from orchestrator.json_logs import keep_service_log
from orchestrator.priority import Niceness, give_way

logger = logging.getLogger(__name__)

TRY_AGAIN = 10.0
"""Seconds between two tries of a checkpoint writer to use its directory."""


class CheckpointWriterProcess:
    """A checkpoint writer of one node: gives trainers memory under `root`, takes what they sealed there to the storage.

    All state is in that memory and in the storage: what one that dies had begun, the next one ends, also after its
    trainers are gone. Several under one root (of one node, or of several nodes of one machine) divide the work.
    `memory_bytes` is what all memory under `root` may be together; 0: what the machine has.
    """

    def __init__(self, root: str, memory_bytes: int, spool_directory: str, debug: str) -> None:
        keep_service_log(
            f"checkpoint-writer-{socket.gethostname()}", node_logs(spool_directory), components=debug.split(",")
        )
        self._settings = {
            "root": root, "memory_bytes": memory_bytes, "spool_directory": spool_directory, "debug": debug,
        }  # fmt: skip
        self._service: WriterService | None = None
        self._why = ""
        give_way(Niceness.checkpoints)
        self._open()
        threading.Thread(target=self._run, name="writer-0", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "why": self._why}
        return {**(self._service.describe() if self._service else {}), **about, **self._settings}

    def health(self) -> dict[str, Any]:
        """As WriterService's; where its directory cannot be used, only `last_error`."""
        return self._service.health() if self._service else {"pending": 0, "oldest": 0.0, "last_error": self._why}

    def _open(self) -> None:
        """A directory that cannot be used is said, not raised: Ray would start us again every second."""
        try:
            service = WriterService(str(self._settings["root"]), memory_bytes=int(str(self._settings["memory_bytes"])))
        except OSError as error:
            if not self._why:
                logger.warning("no checkpoint goes through memory on this node: %s", error)
            self._why = str(error)
            return
        service.serve()
        self._service, self._why = service, ""

    def _run(self) -> None:
        while self._service is None:
            time.sleep(TRY_AGAIN)
            self._open()
        threading.Thread(
            target=self._watch, args=(Path(str(self._settings["root"])),), name="watch", daemon=True
        ).start()
        self._service.run()
        os._exit(1)  # somebody asked it to stop: Ray starts it again, if the node shall have one

    def _watch(self, root: Path) -> None:
        """Without its directory a writer is deaf; Ray starts one that makes it again."""
        while root.is_dir():
            time.sleep(1.0)
        logger.warning("%s was removed; beginning anew", root)
        os._exit(1)


def remote_writers(count: int, options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[RemoteAgents]:
    """The checkpoint writers of the cluster, one kind for each of a node's numbers. `settings` are the arguments of
    CheckpointWriterProcess."""
    arguments = [settings[name] for name in ("root", "memory_bytes", "spool_directory", "debug")]
    return [
        RemoteAgents(CheckpointWriterProcess, options, checkpoint_writers(index), arguments) for index in range(count)
    ]
