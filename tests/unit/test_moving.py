"""When a running attempt is ended to go on elsewhere, or with more workers."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from typing import Any, cast

import pytest

from orchestrator.config import ResourcesConfig, Settings
from orchestrator.execution.draining import notice_of
from orchestrator.execution.moving import Purpose, Surroundings, can_grow, share_done
from orchestrator.execution.place import Notice, Place
from orchestrator.execution.sizing import Room


class Cluster:
    """As far as it is asked here."""

    def __init__(self, free: int) -> None:
        self.free, self.told = free, cast("Notice | None", None)
        self.lacking = ""

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        return Room(workers=min(self.free, wanted.workers))

    def notice(self) -> Notice | None:
        return self.told

    def waits_for(self) -> str:
        return self.lacking


def around(cluster: Cluster, live: Mapping[str, Any], workers: int = 1, least: int = 1) -> Surroundings:
    settings = Settings(resources=ResourcesConfig(workers=4, min_workers=least))
    settings.elastic.look, settings.elastic.every = 10, 60
    params = {"epochs": 10}
    return Surroundings(
        cast(Place, cluster), settings, workers=workers, avoid=(), params=params, live=lambda: live
    )  # fmt: skip


def training(epoch: int) -> dict[str, Any]:
    return {"metrics": {"epoch": {"value": float(epoch)}}, "step": 100 * epoch}


def test_it_grows_once_it_trains_after_a_while_and_by_two_looks() -> None:
    live: dict[str, Any] = {}
    cluster = Cluster(free=3)
    surroundings = around(cluster, live)
    surroundings.step(0)
    live.update(training(1))
    moves = []
    for now in (100, 105, 110, 160, 165, 170):  # it trains since 100, looks every 10
        surroundings.step(now)
        moves.append(surroundings.move)
    assert moves[:5] == [None] * 5
    assert moves[5] is not None
    assert (moves[5].purpose, moves[5].deadline) == (Purpose.resize, math.inf)
    assert moves[5].why == "there is room for 3 of 4 workers now, instead of 1"
    error = moves[5].error(step=7)
    assert (error["kind"], error["step"], error["rank"]) == ("resize", 7, -1)


def test_it_does_not_grow_at_the_end_nor_where_it_has_all_nor_where_it_must_not() -> None:
    for workers, least, epoch in ((1, 1, 9), (4, 1, 1), (1, 0, 1)):
        surroundings = around(Cluster(free=4), training(epoch), workers=workers, least=least)
        for now in range(0, 300, 10):
            surroundings.step(now)
        assert surroundings.move is None
    settings = Settings(resources=ResourcesConfig(workers=4, min_workers=1))
    assert can_grow(settings)
    settings.failures.max_preemptions = 0
    assert not can_grow(settings), "no further attempt is allowed"
    settings.failures.max_preemptions, settings.checkpoints.on_stop = -1, False
    assert not can_grow(settings), "it would not be saved"


def test_ranks_that_wait_for_room_that_others_took_begin_with_fewer_by_two_looks() -> None:
    cluster = Cluster(free=2)
    surroundings = around(cluster, {}, workers=3)
    cluster.free, cluster.lacking = 1, ""
    for now in range(5):
        surroundings.step(now)
    assert surroundings.move is None, "they wait for nothing: they are starting"
    cluster.lacking = "waiting for 3 CPUs"
    surroundings.step(5)
    assert surroundings.move is None
    surroundings.step(6)
    move = surroundings.move
    assert move is not None
    assert (move.purpose, move.has_begun) == (Purpose.resize, False)
    assert move.why == "there is room for 1 of 4 workers now, not for 3"
    cluster.lacking = ""
    surroundings.step(7)
    assert surroundings.move is None, "the room came after all"


def test_ranks_go_on_waiting_where_there_is_room_for_too_few_or_nothing_to_give_up() -> None:
    for workers, least, free in ((3, 2, 1), (3, 2, 3), (2, 2, 1), (4, 0, 1)):
        cluster = Cluster(free=free)
        cluster.lacking = "waiting"
        surroundings = around(cluster, {}, workers=workers, least=least)
        for now in range(5):
            surroundings.step(now)
        assert surroundings.move is None, (workers, least, free)


def test_a_notice_goes_before_a_growth() -> None:
    cluster = Cluster(free=4)
    surroundings = around(cluster, training(1))
    for now in range(0, 100, 10):
        surroundings.step(now)
    cluster.told = Notice(why="n1 is taken away", deadline=5.0)
    surroundings.step(100)
    assert surroundings.move is not None
    assert (surroundings.move.purpose, surroundings.move.deadline) == (Purpose.leave, 5.0)


@pytest.mark.parametrize(
    ("params", "live", "share"),
    [
        ({"epochs": 10}, training(5), 0.5),
        ({"max_steps": 1000}, training(5), 0.5),
        ({"lr": 0.1}, training(5), None),
        ({"epochs": 10, "steps": 100}, {"metrics": {"loss": {"value": 1.0}}, "step": 500}, None),
        ({"steps": 100}, {"metrics": {}, "step": 500}, None),
        ({"epochs": 10}, {"metrics": {"epoch": {"value": math.nan}}, "step": 1}, None),
    ],
)
def test_how_much_is_done_is_read_from_what_the_config_plans(
    params: dict[str, Any], live: dict[str, Any], share: float | None
) -> None:
    assert share_done(params, live) == share


def test_a_notice_names_the_nodes_of_ours_that_go_and_the_earliest_end() -> None:
    now = time.time()
    leaving = {"a": math.inf, "b": now + 30, "other": now + 1}
    told = notice_of(leaving, ["a", "b", "c"], {"a": "gpu-1", "b": "gpu-2"})
    assert told is not None
    assert (told.nodes, told.deadline) == (("b", "a"), now + 30)
    assert told.why.startswith("gpu-2 and gpu-1 are taken away in ")
    assert notice_of(leaving, ["c"], {}) is None
    until_asked = notice_of({"a": math.inf}, ["a"], {})
    assert until_asked is not None
    assert until_asked.why == "a is taken away"
