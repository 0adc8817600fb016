"""The tracker: one on the head. If it dies Ray starts it again; its log and PostgreSQL have everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from actors.options import ON_HEAD, ActorOptions
from orchestrator.execution.handles import NAMESPACE, TRACKER
from orchestrator.execution.services.tracker import TrackerProcess

OPTIONS = ActorOptions(
    name=TRACKER,
    namespace=NAMESPACE,
    resources=ON_HEAD,
    max_concurrency=16,  # a push waits for its fsync; others must not wait for it
)


def start(
    *,
    log_directory: str,
    database_url: str,
    spool_directory: str,
    lease: float,
    agent_options: Mapping[str, Any],
    monitoring: float,
    writers: int,
    writer_options: Mapping[str, Any],
    writer_settings: Mapping[str, Any],
    redis_url: str,
    logs: str,
    debug: str,
    settings: str,
) -> Any:
    """The running tracker, started if there is none."""
    actor = ray.remote(TrackerProcess).options(**OPTIONS.to_ray())
    return actor.remote(
        log_directory, database_url, spool_directory, lease, agent_options, monitoring, writers, writer_options,
        writer_settings, redis_url, logs, debug, settings,
    )  # fmt: skip
