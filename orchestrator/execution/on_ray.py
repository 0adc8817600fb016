"""The ranks of an attempt as a TorchTrainer job on the stack's Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.config import Settings, check_resources, redact_text
from orchestrator.execution.connection import capacity, check_stack, connect, disconnect, is_connected
from orchestrator.execution.place import Tracker
from orchestrator.execution.worker import Plan
from orchestrator.failures.classify import Evidence, RankFailed, RanksFailed
from orchestrator.stack import Stack


class OnRay:
    """A Place. Connects this process to Ray, unless it is connected already. Raises ServiceUnavailable."""

    name = "ray"

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._is_ours = not is_connected()
        self.tracker: Tracker = connect(stack)

    def check(self, settings: Settings) -> None:
        check_stack(settings, self._stack)
        check_resources(settings, capacity())

    def resources(self) -> Mapping[str, Any]:
        return asdict(capacity())

    def fit(self, plan: Plan, settings: Settings) -> str:
        from orchestrator.execution.trainer import torch_trainer

        per_worker: dict[str, float] = {"CPU": settings.resources.cpus_per_worker}
        if settings.resources.gpus_per_worker:
            per_worker["GPU"] = settings.resources.gpus_per_worker
        if settings.resources.memory_gb_per_worker:
            per_worker["memory"] = settings.resources.memory_gb_per_worker * 1e9
        trainer = torch_trainer(
            plan,
            workers=settings.resources.workers,
            resources_per_worker=per_worker,
            placement=settings.resources.placement.value.upper(),
            storage=str(Path(self._stack.home) / "ray" / "train"),
        )
        try:
            return trainer.fit().return_value
        except Exception as error:  # Ray Train's, with one exception per rank inside
            raise RanksFailed(_evidence(error, plan.secrets)) from error

    def close(self) -> None:
        if self._is_ours:
            disconnect()


def _evidence(error: Exception, secrets: Sequence[str]) -> list[Evidence]:
    """Ray Train's exception as evidence of every rank, without secrets."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return [_of_rank(-1, getattr(error, "controller_failure", None) or error, secrets)]
    return [_of_rank(rank, failure, secrets) for rank, failure in failures.items()]


def _of_rank(rank: int, failure: BaseException, secrets: Sequence[str]) -> Evidence:
    if isinstance(failure, RankFailed):
        return failure.evidence
    return Evidence(rank=rank, type=type(failure).__name__, message=redact_text(str(failure), secrets))
