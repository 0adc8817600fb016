"""The node agents: one per node, pinned to it. If one dies Ray starts it again on the same node.

The tracker's process starts them where nodes join later; see orchestrator/execution/agents.py.
"""

from __future__ import annotations

from actors.options import ActorOptions
from orchestrator.execution.handles import NAMESPACE, NODE_AGENTS, RemoteAgents, node_agent
from orchestrator.execution.services.agent import NodeProcess

OPTIONS = ActorOptions(
    name=node_agent("<node id>"),  # name and label_selector are filled in per node
    namespace=NAMESPACE,
    max_concurrency=4,  # a look at its backlog must not wait for a look at a slow disk
)


def agents(spool_directory: str, debug: str = "", monitoring: float = 0.0) -> RemoteAgents:
    """Those of this cluster, and how one is started."""
    return RemoteAgents(NodeProcess, OPTIONS.to_ray(), NODE_AGENTS, (spool_directory, debug, monitoring))
