"""What copies the record into the runs' directories and to sinks such as MLflow: one, on the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from actors.options import ON_HEAD, ActorOptions
from orchestrator.execution.handles import MIRROR, NAMESPACE
from orchestrator.execution.services.mirror import MirrorProcess

OPTIONS = ActorOptions(name=MIRROR, namespace=NAMESPACE, resources=ON_HEAD, max_concurrency=4)


def start(*, database_url: str, sinks: Mapping[str, Any], logs: str, debug: str, settings: str) -> Any:
    """The running mirror, started if there is none. Without `sinks` it writes the runs' directories only."""
    actor = ray.remote(MirrorProcess).options(**OPTIONS.to_ray())
    return actor.remote(database_url, sinks, logs, debug, settings)
