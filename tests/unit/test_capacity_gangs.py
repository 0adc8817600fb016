"""How many groups of workers a cluster holds at once."""

from __future__ import annotations

import itertools
import random

import pytest

from orchestrator.config import ClusterCapacity, NodeCapacity, Placement, ResourcesConfig, Settings, gangs


def cluster(*cpus: float) -> ClusterCapacity:
    return ClusterCapacity(nodes=tuple(NodeCapacity(cpus=each) for each in cpus))


def asks(**resources: object) -> Settings:
    return Settings(resources=ResourcesConfig(**resources))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "resources", "expected"),
    [
        ((4,), {"workers": 2}, 2),
        ((4,), {"workers": 3}, 1),
        ((4,), {"workers": 5}, 0),
        ((3, 3), {"workers": 2}, 3),
        ((3, 3), {"workers": 2, "placement": Placement.strict_pack}, 2),
        ((3, 1), {"workers": 2, "placement": Placement.strict_spread}, 1),
        ((3, 3, 3), {"workers": 2, "placement": Placement.strict_spread}, 4),
        ((2,), {"workers": 2, "placement": Placement.strict_spread}, 0),
        ((1,), {"workers": 1, "cpus_per_worker": 0.1}, 10),
        ((), {"workers": 1}, 0),
    ],
)
def test_groups_that_fit(nodes: tuple[float, ...], resources: dict[str, object], expected: int) -> None:
    assert gangs(asks(**resources), cluster(*nodes)) == expected


def test_the_scarcest_resource_counts() -> None:
    nodes = (NodeCapacity(cpus=64, gpus=4, memory_gb=100), NodeCapacity(cpus=64, gpus=0))
    wanted = asks(workers=2, gpus_per_worker=1.0, memory_gb_per_worker=30)
    assert gangs(wanted, ClusterCapacity(nodes=nodes)) == 1


def test_spread_groups_are_as_many_as_trying_finds() -> None:
    draw = random.Random(1)
    for _ in range(60):
        room = tuple(draw.randint(0, 3) for _ in range(draw.randint(1, 4)))
        workers = draw.randint(1, 3)
        wanted = asks(workers=workers, placement=Placement.strict_spread)
        assert gangs(wanted, cluster(*map(float, room))) == most_by_trying(room, workers), (room, workers)


def most_by_trying(room: tuple[int, ...], workers: int) -> int:
    best = 0
    for chosen in itertools.combinations(range(len(room)), workers):
        if all(room[node] for node in chosen):
            left = tuple(count - (node in chosen) for node, count in enumerate(room))
            best = max(best, 1 + most_by_trying(left, workers))
    return best
