"""The ranks of an attempt as a TorchTrainer job on the stack's Ray cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.config import Placement as Strategy
from orchestrator.config import ResourcesConfig, Settings, check_resources, redact_text
from orchestrator.errors import ServiceUnavailable
from orchestrator.execution.connection import (
    capacity,
    check_stack,
    connect,
    disconnect,
    is_connected,
    job_id,
    own_node,
    submission_id,
)
from orchestrator.execution.place import Tracker
from orchestrator.execution.placement import Node, Placement, can_take, nodes
from orchestrator.execution.ray_names import Identity, named_controller, tell_submitted_job
from orchestrator.execution.shared_storage import PATIENCE, check_shared, local_path
from orchestrator.execution.worker import Plan, Returned
from orchestrator.failures.classify import Evidence, FailureKind, RankFailed, RanksFailed, first_cause
from orchestrator.stack import Stack

logger = logging.getLogger(__name__)

AGENT_START = 20.0
"""Seconds in which a node that has just joined gets an agent that answers."""
NOTICE = 30.0
"""Seconds in which Ray notices a dead node: five looks, three seconds apart, and some."""


class OnRay:
    """A Place. Connects this process to Ray, unless it is connected already. Raises ServiceUnavailable.

    `metadata` is what the Ray job then says of itself.
    """

    name = "ray"

    def __init__(self, stack: Stack, metadata: Mapping[str, str] | None = None) -> None:
        self._stack = stack
        self._is_ours = not is_connected()
        self.tracker: Tracker = connect(stack, metadata)
        self._placement: Placement | None = None

    @property
    def job(self) -> str:
        return submission_id() or job_id()

    def waits_for(self) -> str:
        return self._placement.waits_for if self._placement else ""

    def check(self, settings: Settings) -> None:
        check_stack(settings, self._stack)
        check_resources(settings, capacity())
        self._check_storage(settings)

    def _check_storage(self, settings: Settings) -> None:
        """Workers on other nodes must see the run's directory. Nothing to ask where there is one node."""
        url = settings.storage.url or self._stack.storage_url
        here = own_node()
        others = {node.id: node for node in _others(nodes(), here, settings.resources)}
        if local_path(url) is None or not others:
            return

        def ask(path: str, token: str) -> dict[str, str]:
            return {others[node].label: why for node, why in _read_everywhere(others, path, token).items()}

        check_shared(url, here.label, ask)

    def resources(self) -> Mapping[str, Any]:
        return asdict(capacity())

    def fit(self, plan: Plan, settings: Settings) -> Returned:
        from orchestrator.execution.trainer import attempt_trainer

        if self._stack.checkpoint_writers:
            plan = replace(plan, slab_directory=self._stack.slab_directory)
        identity = Identity.of(plan.ticket)
        if submission_id():
            tell_submitted_job(submission_id(), plan.ticket)
        trainer = attempt_trainer(
            plan,
            workers=settings.resources.workers,
            resources_per_worker=per_worker(settings.resources),
            placement=settings.resources.placement.value.upper(),
            storage=str(Path(self._stack.home) / "ray" / "train"),
        )
        with Placement(identity.title) as placement, named_controller(identity):
            self._placement = placement
            try:
                returned: Returned = trainer.fit().return_value
                return returned
            except Exception as error:  # Ray Train's, with one exception per rank inside
                evidence = evidence_of(error, plan.secrets)
                for found in evidence:
                    logger.info("Ray Train says of rank %d: %s: %s", found.rank, found.type, found.message)
                raise RanksFailed(with_lost_nodes(evidence, placement)) from error

    def close(self) -> None:
        if self._is_ours:
            disconnect()


def _others(known: Sequence[Node], here: Node, wanted: ResourcesConfig) -> list[Node]:
    """Nodes besides this one on which workers may be while others are elsewhere."""
    if wanted.placement is Strategy.strict_pack:
        return []
    return [node for node in known if node.id != here.id and can_take(node, per_worker(wanted))]


def _read_everywhere(others: Mapping[str, Node], path: str, token: str) -> dict[str, str]:
    """What the node agents say, see shared_storage.py. Raises ServiceUnavailable when one does not answer."""
    from orchestrator.execution import handles

    deadline = time.monotonic() + AGENT_START
    while True:
        answers = handles.ask_agents(list(others), "read_marker", path, token, timeout=PATIENCE + 12)
        silent = {node: answer for node, answer in answers.items() if isinstance(answer, Exception)}
        if not silent:
            return answers
        if time.monotonic() > deadline:
            node, error = next(iter(silent.items()))
            hint = "It starts by itself where this version of orchestrator is installed; `orc status` shows it."
            raise ServiceUnavailable("the node agent", others[node].label, f"{error}.", hint) from error
        time.sleep(0.5)


def per_worker(wanted: ResourcesConfig) -> dict[str, float]:
    """In Ray's names and units."""
    named = {
        "CPU": wanted.cpus_per_worker,
        "GPU": wanted.gpus_per_worker,
        "memory": wanted.memory_gb_per_worker * 1e9,
    }
    return {name: amount for name, amount in named.items() if amount or name == "CPU"}


def with_lost_nodes(evidence: Sequence[Evidence], placement: Placement) -> list[Evidence]:
    """Ray tells of a dead node late, and the ranks elsewhere only that somebody hung up."""
    try:
        lost = placement.lost(NOTICE if _may_be_a_lost_node(evidence, placement) else 0.0)
    except Exception:
        # With the head away nobody can tell; what the ranks said must not be lost for it.
        logger.warning("Ray does not tell whether a node is gone", exc_info=True)
        return list(evidence)
    ranks = {found.rank for found in lost}
    return [*lost, *(found for found in evidence if found.rank not in ranks)]


def _may_be_a_lost_node(evidence: Sequence[Evidence], placement: Placement) -> bool:
    """A process is gone, and not every node on which ranks were says that it is there."""
    if first_cause(evidence).kind not in (FailureKind.worker_killed, FailureKind.node_lost):
        return False
    from orchestrator.execution import handles

    answers = handles.ask_agents(sorted(set(placement.nodes_of_ranks)), "describe", timeout=3)
    return any(isinstance(answer, Exception) for answer in answers.values())


def evidence_of(error: Exception, secrets: Sequence[str]) -> list[Evidence]:
    """Ray Train's exception as evidence of every rank, without secrets."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return [_of_rank(-1, getattr(error, "controller_failure", None) or error, secrets)]
    return [_of_rank(rank, failure, secrets) for rank, failure in failures.items()]


def _of_rank(rank: int, failure: BaseException, secrets: Sequence[str]) -> Evidence:
    if isinstance(failure, RankFailed):
        return failure.evidence
    inner = getattr(failure, "health_check_failure", failure)  # Ray Train's wrapper around the error of the actor
    kind = FailureKind.preemption.value if getattr(inner, "preempted", False) is True else ""
    return Evidence(rank=rank, type=type(failure).__name__, message=redact_text(str(failure), secrets), kind=kind)
