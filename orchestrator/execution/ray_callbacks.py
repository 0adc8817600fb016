"""Hooks in Ray Train's controller. Apart, because Ray keeps their base class in a private module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from orchestrator.execution.ray_names import Identity, LaneIdentity, named_workers
from orchestrator.execution.ray_pointer import forgive_pointers


class NamedWorkers(WorkerGroupCallback):
    """Lives in Ray Train's controller. Whatever goes wrong with the names, the workers start."""

    def __init__(self, identity: Identity | LaneIdentity) -> None:
        self._identity = identity

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        with named_workers(self._identity):
            yield


class ForgivingController(WorkerGroupCallback):
    """Lives in Ray Train's controller, too; see `forgive_pointers`."""

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        with suppress(Exception):  # a Ray that looks different inside: it goes on as it is
            forgive_pointers()
        yield
