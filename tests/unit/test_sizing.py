"""How many workers there is room for, which nodes are avoided, and when a run grows back."""

from __future__ import annotations

import pytest

from orchestrator.config import Placement, ResourcesConfig, Settings
from orchestrator.config.settings import Batch, ElasticConfig
from orchestrator.execution.sizing import (
    Free,
    Growth,
    batch_text,
    fitting,
    held,
    placeable,
    room_for,
    shares_of,
    workers_of_attempt,
)


def node(name: str, cpus: float, *, total: float = 4, gpus: float = 0, is_leaving: bool = False) -> Free:
    resources = {"CPU": cpus, "GPU": gpus}
    return Free(node=name, resources=resources, total={"CPU": total, "GPU": gpus}, is_leaving=is_leaving)


def elastic(workers: int = 4, least: int = 1, placement: Placement = Placement.pack) -> ResourcesConfig:
    return ResourcesConfig(workers=workers, min_workers=least, placement=placement)


@pytest.mark.parametrize(
    ("each", "free", "count"),
    [
        ({"CPU": 1.0}, {"CPU": 3.0}, 3),
        ({"CPU": 0.1}, {"CPU": 0.3}, 3),  # 0.3 / 0.1 is 2.9999… in binary
        ({"CPU": 0.1}, {"CPU": 0.1 + 0.2}, 3),
        ({"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}, 2),
        ({"CPU": 1.0, "GPU": 0.5}, {"CPU": 8.0}, 0),
        ({"CPU": 1.0, "memory": 4e9}, {"CPU": 8.0, "memory": 9e9}, 2),
        ({"CPU": 1.0}, {"CPU": -1.0}, 0),
    ],
)
def test_a_node_holds_so_many(each: dict[str, float], free: dict[str, float], count: int) -> None:
    assert fitting(each, free) == count


@pytest.mark.parametrize(
    ("placement", "count"),
    [(Placement.pack, 5), (Placement.spread, 5), (Placement.strict_pack, 3), (Placement.strict_spread, 2)],
)
def test_the_placement_is_kept_to(placement: Placement, count: int) -> None:
    nodes = [node("a", 3), node("b", 2), node("c", 0), node("d", 4, is_leaving=True)]
    assert placeable({"CPU": 1.0}, nodes, placement) == count


def test_what_an_attempt_of_our_own_holds_counts_as_free() -> None:
    nodes = held([node("a", 0), node("b", 1)], {"CPU": 1.0}, ["a", "a", "b"])
    assert [each.resources["CPU"] for each in nodes] == [2, 2]
    assert room_for(elastic(), nodes).workers == 4


def test_an_elastic_run_begins_with_what_there_is_room_for_and_waits_for_the_least() -> None:
    for free, workers in ((9, 4), (3, 3), (2, 2), (1, 2), (0, 2)):
        found = room_for(elastic(least=2), [node("a", free, total=9)])
        assert workers_of_attempt(found, elastic(least=2)) == workers
    nothing = room_for(ResourcesConfig(workers=4), [])
    assert (nothing.workers, workers_of_attempt(nothing, ResourcesConfig(workers=4))) == (0, 4)


def test_nodes_are_avoided_where_the_others_could_take_the_run_even_if_they_are_busy_now() -> None:
    busy = [node("a", 4), node("b", 1)]
    found = room_for(elastic(least=2), busy, {"a"})
    assert (found.workers, found.without, found.note) == (1, ("a",), "")
    alone = room_for(elastic(least=1), [node("a", 4), node("gone", 4, is_leaving=True)], {"a"})
    assert (alone.workers, alone.without) == (4, ())
    assert alone.note == "1 node could not be avoided: the others can take 0 workers"
    fixed = room_for(ResourcesConfig(workers=6), [node("a", 4), node("b", 4)], {"a"})
    assert "the others can take 4 workers" in fixed.note, "all of them, where the run is not elastic"
    assert room_for(elastic(), [node("a", 4)], {"of another cluster"}).without == ()


def test_a_run_grows_after_two_looks_not_too_early_and_not_at_the_end() -> None:
    growth = Growth(every=100, current=1, since=0)
    looks = [(50, 2, None), (110, 2, None), (120, 1, None), (130, 2, 0.5), (140, 2, 0.95), (150, 2, 0.5), (160, 3, 0.5)]
    assert [growth.look(workers, now=now, share=share) for now, workers, share in looks] == [False] * 6 + [True]


def test_the_global_batch_is_kept_by_whole_numbers_only() -> None:
    settings = Settings(resources=elastic(4), elastic=ElasticConfig(batch=Batch.whole))
    assert [shares_of(settings, now) for now in (4, 3, 2, 1)] == [1, 1, 2, 4]
    assert "2 times as many micro-batches" in batch_text(settings, 2)
    assert "3/4 of the usual one, because 4 is no multiple of 3" in batch_text(settings, 3)
    of_a_worker = Settings(resources=elastic(4))
    assert shares_of(of_a_worker, 2) == 1
    assert batch_text(of_a_worker, 2) == "the batch of all together is 2/4 of the usual one"
