"""The node agents: one per node, pinned to it. If one dies Ray starts it again on the same node."""

from __future__ import annotations

from typing import Any

import ray

from actors.options import ActorOptions
from orchestrator.execution.handles import NAMESPACE, node_agent
from orchestrator.execution.services import NodeProcess


def options(node_id: str) -> ActorOptions:
    return ActorOptions(
        name=node_agent(node_id),
        namespace=NAMESPACE,
        label_selector={"ray.io/node-id": node_id},
        max_concurrency=4,
    )


def start(node_id: str, *, spool_directory: str) -> Any:
    """The agent of a node, started if there is none."""
    return ray.remote(NodeProcess).options(**options(node_id).to_ray()).remote(spool_directory)


def alive_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]
