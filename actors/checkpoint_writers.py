"""The checkpoint writers: some per node, pinned to it. If one dies Ray starts it again on the same node; what was
sealed meanwhile lies in the memory of the node, and it goes on with that.

The tracker's process starts them where nodes join later; see orchestrator/execution/agents.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.options import ActorOptions
from orchestrator.execution.handles import NAMESPACE, RemoteAgents, checkpoint_writer
from orchestrator.execution.services.writer import remote_writers

OPTIONS = ActorOptions(
    name=checkpoint_writer("<node id>", 0),  # name and label_selector are filled in per node and number
    namespace=NAMESPACE,
    max_concurrency=4,  # trainers never call it; who asks for its health must not wait for another who does
)


def settings(root: str, memory_gb: float, spool_directory: str, debug: str) -> dict[str, Any]:
    """What a writer is started with, and then says of itself."""
    return {
        "root": root, "memory_bytes": int(memory_gb * 1e9), "spool_directory": spool_directory, "debug": debug,
    }  # fmt: skip


def writers(count: int, told: Mapping[str, Any]) -> list[RemoteAgents]:
    """Those of this cluster, by their number on each node, and how one is started. `told`: see `settings`."""
    return remote_writers(count, OPTIONS.to_ray(), told)
