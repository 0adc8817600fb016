"""How many of a run's workers there is room for now, and when it is worth to go on with more. Pure.

A number here is one to begin an attempt with: Ray's placement group then takes the room, or waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import Placement, ResourcesConfig, Settings
from orchestrator.config.settings import Batch

_UNITS = 10_000
"""Ray counts resources in parts of this size: ten tenths of a CPU are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """What a living node has, in Ray's names and units."""

    node: str
    """Ray's id."""
    resources: Mapping[str, float]
    """Left now."""
    total: Mapping[str, float]
    """When it is empty."""
    is_leaving: bool = False
    """It is being drained: nothing new is placed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where the next attempt may be, and how large."""

    workers: int
    """The most that fit now, up to what the run wants; 0: not one."""
    without: tuple[str, ...] = ()
    """Ids of nodes that it shall not use."""
    note: str = ""
    """What could not be done as wished, in words."""


def per_worker(wanted: ResourcesConfig) -> dict[str, float]:
    """What one worker takes, in Ray's names and units."""
    named = {
        "CPU": wanted.cpus_per_worker,
        "GPU": wanted.gpus_per_worker,
        "memory": wanted.memory_gb_per_worker * 1e9,
    }
    return {name: amount for name, amount in named.items() if amount or name == "CPU"}


def fitting(each: Mapping[str, float], free: Mapping[str, float]) -> int:
    """How many workers of `each` a node with that much `free` holds."""
    needed = {name: round(amount * _UNITS) for name, amount in each.items()}
    counts = [math.floor(free.get(name, 0) * _UNITS + 0.5) // amount for name, amount in needed.items() if amount > 0]
    return max(min(counts, default=0), 0)


def placeable(each: Mapping[str, float], nodes: Sequence[Free], placement: Placement) -> int:
    """How many workers of `each` fit at once on what the nodes have free."""
    return _together([fitting(each, node.resources) for node in nodes if not node.is_leaving], placement)


def _together(counts: Sequence[int], placement: Placement) -> int:
    if placement is Placement.strict_pack:
        return max(counts, default=0)
    if placement is Placement.strict_spread:
        return sum(count > 0 for count in counts)
    return sum(counts)


def room_for(wanted: ResourcesConfig, nodes: Sequence[Free], avoid: Collection[str] = ()) -> Room:
    """Room for the workers on these nodes, without those to `avoid` where the others, when empty, could do."""
    each, least = per_worker(wanted), wanted.min_workers or wanted.workers
    others = [node for node in nodes if node.node not in avoid]
    avoided = tuple(sorted(node.node for node in nodes if node.node in avoid))
    most = _together([fitting(each, node.total) for node in others if not node.is_leaving], wanted.placement)
    if not avoided or most >= least:
        return Room(workers=min(placeable(each, others, wanted.placement), wanted.workers), without=avoided)
    note = f"{_several(len(avoided), 'node')} could not be avoided: the others can take {_several(most, 'worker')}"
    return Room(workers=min(placeable(each, nodes, wanted.placement), wanted.workers), note=note)


def workers_of_attempt(found: Room, wanted: ResourcesConfig) -> int:
    """With how many workers the next attempt begins. One that finds less than the least room waits for that."""
    return max(found.workers, wanted.min_workers) if wanted.min_workers else wanted.workers


def held(nodes: Sequence[Free], each: Mapping[str, float], nodes_of_ranks: Sequence[str]) -> list[Free]:
    """What would be free if the workers on these nodes were not there."""
    return [
        Free(
            node=node.node,
            is_leaving=node.is_leaving,
            total=node.total,
            resources={
                name: node.resources.get(name, 0) + each.get(name, 0) * nodes_of_ranks.count(node.node)
                for name in {*node.resources, *each}
            },
        )
        for node in nodes
    ]


LOOKS = 2
"""So many looks in a row must find the room: what another job frees for a moment is none."""
LAST = 0.1
"""In this share of the epochs, the last ones, a run is left as it is."""


@dataclass(kw_only=True)
class Growth:
    """When a run that has fewer workers than it wants goes on with more."""

    every: float
    """Seconds that an attempt is left as it is, at least."""
    current: int
    since: float
    """When the attempt began to train, on a monotonic clock."""
    seen: int = 0

    def look(self, workers: int, *, now: float, share: float | None) -> bool:
        """Whether to move to `workers`, as many as there is room for. `share` of the training is done; None: nobody
        knows."""
        if workers <= self.current or now - self.since < self.every or (share is not None and share >= 1 - LAST):
            self.seen = 0
            return False
        self.seen += 1
        return self.seen >= LOOKS


def shares_of(settings: Settings, workers: int) -> int:
    """Of how many workers each of these has the share of a global batch: more than 1 only where the batch of all is to
    be kept, and can be."""
    wanted = settings.resources.workers
    return wanted // workers if settings.elastic.batch is Batch.whole and wanted % workers == 0 else 1


def batch_text(settings: Settings, workers: int) -> str:
    """What becomes of the global batch with so many workers."""
    wanted, shares = settings.resources.workers, shares_of(settings, workers)
    if shares > 1:
        return f"each takes {shares} times as many micro-batches for a step"
    why = f", because {wanted} is no multiple of {workers}" if settings.elastic.batch is Batch.whole else ""
    return f"the batch of all together is {workers}/{wanted} of the usual one{why}"


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
