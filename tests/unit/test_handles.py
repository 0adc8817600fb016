"""Ray's own exceptions end at the handle; and what is called how."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import LocalRayletDiedError, RayError, RpcError

from orchestrator.execution.handles import (
    NODE_AGENTS,
    RemoteTracker,
    checkpoint_writer,
    checkpoint_writers,
    surplus_writers,
)


@pytest.mark.parametrize("error", [RpcError("the head is away", 14), LocalRayletDiedError()])
def test_a_head_that_is_away_is_a_connection_error(monkeypatch: pytest.MonkeyPatch, error: RayError) -> None:
    def away(name: str, namespace: str) -> None:
        raise error

    monkeypatch.setattr(ray, "get_actor", away)
    with pytest.raises(ConnectionError, match="orc-tracker is not there"):
        RemoteTracker().heartbeat("r1", 1)


NODE = "0123456789abcdef0123"


def test_every_node_has_actors_of_its_own_name() -> None:
    assert NODE_AGENTS.name(NODE) == "orc-node-agent-0123456789ab"
    assert checkpoint_writer(NODE, 1) == "orc-checkpoint-writer-0123456789ab-1"
    ours = [checkpoint_writer(NODE, 0), checkpoint_writer(NODE, 1), NODE_AGENTS.name(NODE), "orc-tracker"]
    assert [name for name in ours if checkpoint_writers(1).names(name)] == [checkpoint_writer(NODE, 1)]
    assert [name for name in ours if NODE_AGENTS.names(name)] == [NODE_AGENTS.name(NODE)]
    assert not NODE_AGENTS.names("orc-node-agent-0/20261121-081530-a1b2c3d4/attempt-2/rank-1"), "a run called like it"


def test_writers_that_the_settings_no_longer_want_are_named() -> None:
    names = [checkpoint_writer(NODE, index) for index in (0, 1, 10)] + [NODE_AGENTS.name(NODE), "orc-mirror"]
    assert surplus_writers(names, 1) == [checkpoint_writer(NODE, 1), checkpoint_writer(NODE, 10)]
    assert surplus_writers(names, 0) == sorted(checkpoint_writer(NODE, index) for index in (0, 1, 10))
