"""Our services as processes of the cluster: plain classes plus the threads that drive them. `actors/` says where they
run.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.service import WriterService
from orchestrator.config.redaction import url_passwords
from orchestrator.directory.service import DirectoryService
from orchestrator.execution import network, stacks
from orchestrator.execution.agents import AgentWatch
from orchestrator.execution.handles import NODE_AGENTS, RemoteAgents, RemoteTracker, checkpoint_writers
from orchestrator.execution.shared_storage import read_marker
from orchestrator.json_logs import keep_service_log
from orchestrator.monitoring.sampler import SystemSampler
from orchestrator.priority import Niceness, give_way
from orchestrator.store import open_store
from orchestrator.tracking.circuits import Circuits, directory_of
from orchestrator.tracking.merging import MergeService
from orchestrator.tracking.mirrors import Mirrors, Sinks
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper

logger = logging.getLogger(__name__)

TRY_AGAIN = 10.0
"""Seconds between two tries of a checkpoint writer to use its directory."""


def _node_logs(spool_directory: str) -> list[Path]:
    """Where the own log of what every node has goes: beside the spools in a data directory, else among them."""
    spools = Path(spool_directory)
    return [*([spools.parent / "logs"] if spools.name == "spools" else []), spools / ".logs"]


def _health(logs: Path) -> Path:
    """Where a service says which others are away: beside the logs of its data directory."""
    return directory_of(logs.parent)


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
        # The one before it may still be dying: Ray gives its name away earlier.
        super().__init__(
            log_directory, database_url, spool_directory=spool_directory, lease=lease, log_wait=20.0,
            redis_url=redis_url, circuits=Circuits("tracker", _health(Path(logs))),
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
        self._circuits = Circuits("mirror", _health(Path(logs)))
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


class NodeProcess:
    """The agent of one node: ships the node's spools and samples the machine every `monitoring` seconds (0: not).
    Outlives the trainers; what it has not shipped when it dies, the next one does.
    """

    def __init__(self, spool_directory: str, debug: str = "", monitoring: float = 0.0) -> None:
        name = f"node-{socket.gethostname()}"
        keep_service_log(name, _node_logs(spool_directory), components=debug.split(","))
        self._settings = {"debug": debug, "spool_directory": spool_directory, "monitoring": monitoring}
        give_way(Niceness.records)
        self._spools = Path(spool_directory)
        logs = _node_logs(spool_directory)[0]
        self._circuits = Circuits(name, _health(logs) if logs.name == "logs" else None)
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


class CheckpointWriterProcess:
    """A checkpoint writer of one node: gives trainers memory under `root`, takes what they sealed there to the storage.

    All state is in that memory and in the storage: what one that dies had begun, the next one ends, also after its
    trainers are gone. Several under one root (of one node, or of several nodes of one machine) divide the work.
    `memory_bytes` is what all memory under `root` may be together; 0: what the machine has.
    """

    def __init__(self, root: str, memory_bytes: int, spool_directory: str, debug: str) -> None:
        keep_service_log(
            f"checkpoint-writer-{socket.gethostname()}", _node_logs(spool_directory), components=debug.split(",")
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
