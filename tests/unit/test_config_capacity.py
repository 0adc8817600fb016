"""Resource requests that no cluster of that size can ever place are refused, others are not."""

from __future__ import annotations

import pytest

from orchestrator.config import ClusterCapacity, NodeCapacity, Placement, ResourcesConfig, Settings, check_resources
from orchestrator.errors import ConfigError

TWO_NODES = ClusterCapacity(nodes=(NodeCapacity(cpus=4, memory_gb=8), NodeCapacity(cpus=4, gpus=2, memory_gb=16)))


def asks(**resources: object) -> Settings:
    return Settings(resources=ResourcesConfig(**resources))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wanted",
    [
        {"workers": 8},
        {"workers": 2, "cpus_per_worker": 4},
        {"workers": 40, "cpus_per_worker": 0.2},
        {"workers": 80, "cpus_per_worker": 0.1},
        {"workers": 4, "gpus_per_worker": 0.5, "cpus_per_worker": 1},
        {"workers": 4, "placement": Placement.strict_pack},
        {"workers": 2, "placement": Placement.strict_spread},
        {"workers": 6, "memory_gb_per_worker": 4},
    ],
)
def test_what_fits_passes(wanted: dict[str, object]) -> None:
    check_resources(asks(**wanted), TWO_NODES)


@pytest.mark.parametrize(
    ("wanted", "key", "words"),
    [
        ({"workers": 9}, "resources.workers", ["9 workers of 1 CPU", "2 nodes", "resources.workers=8"][:1]),
        ({"workers": 9}, "resources.workers", ["The nearest that fits is resources.workers=8"]),
        (
            {"workers": 3, "cpus_per_worker": 3},
            "resources.workers",
            ["resources.workers=2", "resources.cpus_per_worker=2"],
        ),
        ({"workers": 3, "gpus_per_worker": 1}, "resources.workers", ["1 CPU and 1 GPU", "resources.workers=2"]),
        ({"cpus_per_worker": 6}, "resources.cpus_per_worker", ["largest has 4 CPUs", "resources.cpus_per_worker=4"]),
        ({"gpus_per_worker": 3}, "resources.gpus_per_worker", ["largest has 2 GPUs", "resources.gpus_per_worker=2"]),
        ({"memory_gb_per_worker": 32}, "resources.memory_gb_per_worker", ["16 GB"]),
        ({"workers": 5, "placement": Placement.strict_pack}, "resources.workers", ["on one node", "workers=4"]),
        (
            {"workers": 3, "placement": Placement.strict_spread},
            "resources.workers",
            ["nodes of their own", "workers=2"],
        ),
    ],
)
def test_what_can_never_fit_is_refused_with_numbers(wanted: dict[str, object], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resources(asks(**wanted), TWO_NODES)
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


def test_no_gpu_anywhere_says_so() -> None:
    with pytest.raises(ConfigError, match="resources.gpus_per_worker=0"):
        check_resources(asks(gpus_per_worker=1), ClusterCapacity(nodes=(NodeCapacity(cpus=4),)))


def test_parts_that_only_exist_apart_are_refused() -> None:
    apart = ClusterCapacity(nodes=(NodeCapacity(cpus=16), NodeCapacity(cpus=1, gpus=1)))
    with pytest.raises(ConfigError, match="at the same time"):
        check_resources(asks(cpus_per_worker=4, gpus_per_worker=1), apart)


def test_empty_cluster_is_refused() -> None:
    with pytest.raises(ConfigError, match="no nodes"):
        check_resources(asks(), ClusterCapacity(nodes=()))


def test_of_an_elastic_run_the_least_must_fit() -> None:
    check_resources(asks(workers=40, min_workers=8), TWO_NODES)
    with pytest.raises(ConfigError) as caught:
        check_resources(asks(workers=40, min_workers=9), TWO_NODES)
    assert (caught.value.key, caught.value.value) == ("resources.min_workers", 9)
    assert "resources.min_workers=8" in str(caught.value)
    with pytest.raises(ConfigError, match=r"resources\.min_workers=2"):
        asks(workers=2, min_workers=3)
