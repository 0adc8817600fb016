"""Hooks of Ray Train that name what it makes. Apart, because Ray keeps their base class in a private module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from orchestrator.execution.ray_names import Identity, named_workers


class NamedWorkers(WorkerGroupCallback):
    """Lives in Ray Train's controller. Whatever goes wrong with the names, the workers start."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        with named_workers(self._identity):
            yield
