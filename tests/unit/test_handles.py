"""Ray's own exceptions end at the handle."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import LocalRayletDiedError, RayError, RpcError

from orchestrator.execution.handles import RemoteTracker


@pytest.mark.parametrize("error", [RpcError("the head is away", 14), LocalRayletDiedError()])
def test_a_head_that_is_away_is_a_connection_error(monkeypatch: pytest.MonkeyPatch, error: RayError) -> None:
    def away(name: str, namespace: str) -> None:
        raise error

    monkeypatch.setattr(ray, "get_actor", away)
    with pytest.raises(ConnectionError, match="orc-tracker is not there"):
        RemoteTracker().heartbeat("r1", 1)
