"""Every Ray option of every service, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """Arguments of `ray.remote(cls).options`."""

    name: str
    namespace: str
    num_cpus: float = 0  # services must start on a full cluster
    lifetime: str = "detached"  # they outlive the job that started them
    get_if_exists: bool = True
    max_restarts: int = -1  # their state is in files and PostgreSQL, see tracking/wal.py
    max_task_retries: int = 0  # callers send again themselves; Ray's retries come out of order
    max_concurrency: int = 1
    scheduling_strategy: str = "DEFAULT"  # or a trial's placement group would own it
    resources: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)

    def to_ray(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value != {}}


ON_HEAD = {"node:__internal_head__": 0.001}
"""A resource that only the head has: the tracker's log lies on its disk."""
