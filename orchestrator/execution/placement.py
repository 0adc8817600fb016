"""Where Ray puts the ranks of an attempt: what they wait for, on which nodes they are, which of these are gone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.execution.ray_names import rank_of_bundle
from orchestrator.failures.classify import Evidence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster, as Ray knows it."""

    id: str
    host: str
    address: str
    is_alive: bool
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Example: gpu-7 at 10.0.0.7."""
        return f"{self.host} at {self.address}" if self.host else self.address


def nodes() -> list[Node]:
    """All nodes that were ever there."""
    import ray

    return [
        Node(
            id=row["NodeID"],
            host=row["NodeManagerHostname"],
            address=row["NodeManagerAddress"],
            is_alive=row["Alive"],
            resources=row["Resources"],
        )
        for row in ray.nodes()
    ]


def available() -> dict[str, dict[str, float]]:
    """What is free on each node, by Ray's id; a moment old."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def can_take(node: Node, wanted: Mapping[str, float]) -> bool:
    """Whether one worker fits on the node when it is empty."""
    return node.is_alive and all(node.resources.get(name, 0) + 1e-6 >= amount for name, amount in wanted.items())


def wait_text(workers: int, each: Mapping[str, float], free: Mapping[str, float], total: Mapping[str, float]) -> str:
    """Example: waiting for 4 CPUs (2 workers of 2 CPUs each); 1 of 8 CPUs is free."""
    asked = " and ".join(_amount(name, workers * amount) for name, amount in each.items())
    per_worker = " and ".join(_amount(name, amount) for name, amount in each.items())
    there = ", ".join(
        f"{_number(name, free.get(name, 0))} of {_amount(name, total.get(name, 0))} free" for name in each
    )
    return f"waiting for {asked} ({workers} workers of {per_worker} each); {there}"


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{_number(name, amount)} GB"
    return f"{_number(name, amount)} {name}{'' if amount == 1 else 's'}"


def _number(name: str, amount: float) -> str:
    return f"{amount / 1e9:.3g}" if name == "memory" else f"{amount:g}"


def lost_ranks(nodes_of_ranks: Sequence[str], nodes: Sequence[Node]) -> list[Evidence]:
    """What to say for the ranks whose node is gone."""
    living = {node.id for node in nodes if node.is_alive}
    labels = {node.id: node.label for node in nodes}
    return [
        Evidence(
            rank=rank,
            type="NodeDiedError",
            message=f"the node {labels.get(node, node)} died (Ray's id {node})",
            host=labels.get(node, node),
            node=node,
        )
        for rank, node in enumerate(nodes_of_ranks)
        if node not in living
    ]


class Placement:
    """Watches one placement group by its name, in a thread, from before it exists until it has its place."""

    PAUSE = 0.5
    PATIENCE = 3.0
    """Seconds of waiting that are not worth a word."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._since = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="placement", daemon=True)
        self.waits_for = ""
        """What is missing, in words; '' while the ranks start or run."""
        self.nodes_of_ranks: tuple[str, ...] = ()
        """Ray's node id for each rank, once all are placed."""

    def __enter__(self) -> Placement:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def is_released(self) -> bool:
        """After the attempt: Ray has given back what the ranks held."""
        from ray.util import placement_group_table

        groups = [group for group in placement_group_table().values() if group["name"] == self._title]
        return all(group["state"] == "REMOVED" for group in groups)

    def lost(self, patience: float) -> list[Evidence]:
        """Ranks whose node is dead; waits up to `patience` seconds for Ray to notice that one is."""
        deadline = time.monotonic() + patience
        while True:
            found = lost_ranks(self.nodes_of_ranks, nodes())
            if found or not self.nodes_of_ranks or time.monotonic() >= deadline:
                return found
            time.sleep(0.25)

    def _run(self) -> None:
        is_told = False
        while not self._over.wait(self.PAUSE):
            try:
                if self._look():
                    return
            except Exception:
                # Only the words about waiting and lost nodes are at stake. The head may just be starting again.
                if not is_told:
                    logger.warning("Ray does not tell where the ranks are placed; trying again", exc_info=True)
                is_told = True

    def _look(self) -> bool:
        """True once all ranks have their place."""
        from ray.util import placement_group_table

        groups = [group for group in placement_group_table().values() if group["name"] == self._title]
        placed = [group for group in groups if group["state"] == "CREATED"]
        if placed:
            where = placed[-1]["bundles_to_node_id"]
            by_rank = {rank_of_bundle(bundle, where): node for bundle, node in where.items()}
            self.nodes_of_ranks = tuple(by_rank[rank] for rank in sorted(by_rank))
            self.waits_for = ""
            return True
        pending = [group for group in groups if group["state"] in ("PENDING", "PREPARED", "RESCHEDULING")]
        if pending and time.monotonic() - self._since > self.PATIENCE:
            self.waits_for = _what_is_missing(pending[-1]["bundles"])
        return False


def _what_is_missing(bundles: Mapping[int, Mapping[str, Any]]) -> str:
    import ray

    each = {name: float(amount) for name, amount in next(iter(bundles.values())).items()}
    return wait_text(len(bundles), each, ray.available_resources(), ray.cluster_resources())
