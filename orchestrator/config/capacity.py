"""Can the cluster ever place what a run asks for? Pure: the numbers come in, the answer goes out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.settings import Placement, ResourcesConfig, Settings
from orchestrator.errors import ConfigError

_ROUNDING = 1e-6  # Ray counts in 1/10000; ten tenths of a CPU are one


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCapacity:
    """All that one node can ever give. Example: NodeCapacity(cpus=4, gpus=0, memory_gb=16)."""

    cpus: float
    gpus: float = 0.0
    memory_gb: float = math.inf
    """10^9 bytes that Ray may hand out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCapacity:
    """The nodes of a cluster, with those that an autoscaler could add."""

    nodes: tuple[NodeCapacity, ...]


def check_resources(settings: Settings, cluster: ClusterCapacity) -> None:
    """Raises ConfigError if the cluster, even when empty, can never place the workers; of an elastic run the least of
    them. Names the nearest that fits."""
    wanted = settings.resources
    key = "resources.min_workers" if wanted.min_workers else "resources.workers"
    workers = wanted.min_workers or wanted.workers
    if not cluster.nodes:
        raise ConfigError(key, workers, "the cluster has no nodes.", "`orc status` shows the cluster.")
    for name, unit, asked, largest in _worker_limits(wanted, cluster):
        if asked > largest + _ROUNDING:
            too_much = f"resources.{name}"
            why = f"no node of the cluster has that much: the largest has {largest:g} {unit} ({_shape(cluster)})."
            near = f"The nearest that fits is {too_much}={_floor(largest):g}." if largest > 0 else _without(name)
            raise ConfigError(too_much, asked, why, near)
    fitting = [_fit(node, wanted) for node in cluster.nodes]
    possible = _placeable(fitting, wanted.placement)
    if possible == 0:
        why = f"no node has {_worker(wanted)} at the same time: the cluster has {_shape(cluster)}."
        raise ConfigError("resources", None, why, "Ask for less of one of them per worker.")
    if workers <= possible:
        return
    rule = {Placement.strict_pack: " on one node", Placement.strict_spread: " on nodes of their own"}.get(
        wanted.placement, ""
    )
    why = (
        f"the cluster can never place {workers} workers of {_worker(wanted)} each{rule}: "
        f"it has {_shape(cluster)}, room for {possible}."
    )
    hint = f"The nearest that fits is {key}={possible}"
    hint += _smaller_workers(wanted, workers, cluster)
    raise ConfigError(key, workers, why, hint + ".")


def gangs(settings: Settings, cluster: ClusterCapacity) -> int:
    """How many groups of workers like this the empty cluster holds at once, 0 if not one.

    The workers of one group may lie on several nodes, except with `strict_pack`; with `strict_spread` they must.
    """
    wanted = settings.resources
    room = [_fit(node, wanted) for node in cluster.nodes]
    if wanted.placement is Placement.strict_pack:
        return sum(count // wanted.workers for count in room)
    if wanted.placement is Placement.strict_spread:
        return _spread_gangs(room, wanted.workers)
    return sum(room) // wanted.workers


def _spread_gangs(room: Sequence[int], workers: int) -> int:
    """The most groups of which no two workers share a node: one group takes at most one place of each node."""
    fewest, most = 0, sum(room) // workers
    while fewest < most:  # k groups fit where the nodes hold k x workers, none of them counted more than k times
        middle = (fewest + most + 1) // 2
        if sum(min(count, middle) for count in room) >= middle * workers:
            fewest = middle
        else:
            most = middle - 1
    return fewest


def _worker_limits(wanted: ResourcesConfig, cluster: ClusterCapacity) -> list[tuple[str, str, float, float]]:
    return [
        ("gpus_per_worker", "GPUs", wanted.gpus_per_worker, max(node.gpus for node in cluster.nodes)),
        ("cpus_per_worker", "CPUs", wanted.cpus_per_worker, max(node.cpus for node in cluster.nodes)),
        ("memory_gb_per_worker", "GB", wanted.memory_gb_per_worker, max(node.memory_gb for node in cluster.nodes)),
    ]


def _fit(node: NodeCapacity, wanted: ResourcesConfig) -> int:
    """How many such workers the node holds."""
    shares = [
        (node.cpus, wanted.cpus_per_worker),
        (node.gpus, wanted.gpus_per_worker),
        (node.memory_gb, wanted.memory_gb_per_worker),
    ]
    counts = [math.floor(has / asked + _ROUNDING) for has, asked in shares if asked > 0 and math.isfinite(has)]
    return min(counts, default=0)


def _placeable(fitting: list[int], placement: Placement) -> int:
    if placement is Placement.strict_pack:
        return max(fitting)
    if placement is Placement.strict_spread:
        return sum(1 for count in fitting if count)
    return sum(fitting)


def _smaller_workers(wanted: ResourcesConfig, workers: int, cluster: ClusterCapacity) -> str:
    """A second way out: the same number of workers with fewer CPUs each, where that alone would do."""
    for cpus in (4.0, 2.0, 1.0, 0.5):
        if cpus < wanted.cpus_per_worker:
            smaller = ResourcesConfig(
                workers=workers,
                cpus_per_worker=cpus,
                gpus_per_worker=wanted.gpus_per_worker,
                memory_gb_per_worker=wanted.memory_gb_per_worker,
                placement=wanted.placement,
            )
            if _placeable([_fit(node, smaller) for node in cluster.nodes], wanted.placement) >= workers:
                return f", or resources.cpus_per_worker={cpus:g}"
    return ""


def _worker(wanted: ResourcesConfig) -> str:
    parts = [_count(wanted.cpus_per_worker, "CPU")]
    if wanted.gpus_per_worker:
        parts.append(_count(wanted.gpus_per_worker, "GPU"))
    if wanted.memory_gb_per_worker:
        parts.append(f"{wanted.memory_gb_per_worker:g} GB")
    return " and ".join(parts)


def _shape(cluster: ClusterCapacity) -> str:
    """`2 nodes of 4 CPUs and 1 GPU, 1 node of 8 CPUs`."""
    kinds = Counter((node.cpus, node.gpus) for node in cluster.nodes)
    shapes = []
    for (cpus, gpus), nodes in kinds.items():
        contents = [_count(cpus, "CPU"), *([_count(gpus, "GPU")] if gpus else [])]
        shapes.append(f"{_count(nodes, 'node')} of {' and '.join(contents)}")
    return ", ".join(shapes)


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _floor(number: float) -> float:
    return math.floor(number) if number >= 1 else number


def _without(name: str) -> str:
    is_gpu = name == "gpus_per_worker"
    return "Ask for none: resources.gpus_per_worker=0." if is_gpu else "`orc status` shows what the nodes have."
