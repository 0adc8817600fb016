"""What copies the record into the runs' directories and to MLflow: one on the head, never on the training path."""

from __future__ import annotations

from typing import Any

import ray

from actors.options import ON_HEAD, ActorOptions
from orchestrator.execution.handles import MIRROR, NAMESPACE
from orchestrator.execution.services import MirrorProcess

OPTIONS = ActorOptions(name=MIRROR, namespace=NAMESPACE, resources=ON_HEAD, max_concurrency=4)


def start(*, database_url: str, tracking_uri: str, dashboard: str, logs: str, debug: str, settings: str) -> Any:
    """The running mirror, started if there is none. Without a `tracking_uri` it writes the runs' directories only."""
    actor = ray.remote(MirrorProcess).options(**OPTIONS.to_ray())
    return actor.remote(database_url, tracking_uri, dashboard, logs, debug, settings)
