"""The ranks of an attempt as a TorchTrainer job on the stack's Ray cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
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
from orchestrator.execution.draining import draining, notice_of
from orchestrator.execution.network import Peer, check
from orchestrator.execution.place import Notice, Tracker
from orchestrator.execution.placement import Node, Placement, available, can_take, nodes
from orchestrator.execution.ray_names import Identity, named_controller, tell_submitted_job
from orchestrator.execution.shared_storage import PATIENCE, check_shared, local_path
from orchestrator.execution.sizing import Free, Room, held, per_worker, room_for
from orchestrator.execution.stacks import Dump, from_json
from orchestrator.execution.worker import Plan, Returned
from orchestrator.failures.classify import Evidence, FailureKind, RankFailed, RanksFailed, first_cause
from orchestrator.records import RunTicket
from orchestrator.stack import Stack

logger = logging.getLogger(__name__)

STACKS = 25.0
"""Seconds in which an agent tells where the ranks on its node are: some for their answer, some for py-spy."""
AGENT_START = 20.0
"""Seconds in which a node that has just joined gets an agent that answers."""
NOTICE = 30.0
"""Seconds in which Ray notices a dead node: five looks, three seconds apart, and some."""
RELEASE = 10.0
"""Seconds in which the room of an attempt that has ended is free again, as far as Ray tells."""
SETTLED = 0.5
"""Seconds between two looks at what is free that must agree."""


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
        self._is_fitting = False

    @property
    def job(self) -> str:
        return submission_id() or job_id()

    def waits_for(self) -> str:
        return self._placement.waits_for if self._placement else ""

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        if self._is_fitting:
            return room_for(wanted, self._free(wanted), _ids(avoid))
        deadline = time.monotonic() + RELEASE
        before: Room | None = None
        while True:
            is_released = self._placement is None or self._placement.is_released()
            found = room_for(wanted, self._free(wanted), _ids(avoid))
            is_settled = is_released and (self._placement is None or found == before)
            if is_settled or found.workers == wanted.workers or time.monotonic() > deadline:
                return found
            before = found if is_released else None
            time.sleep(SETTLED)

    def _free(self, wanted: ResourcesConfig) -> list[Free]:
        """The living nodes; what a running attempt of ours holds counts as free."""
        free, leaving = available(), draining()
        living = [
            Free(node=node.id, resources=free.get(node.id, {}), total=node.resources, is_leaving=node.id in leaving)
            for node in nodes()
            if node.is_alive
        ]
        if not self._is_fitting or self._placement is None:
            return living
        return held(living, per_worker(wanted), self._placement.nodes_of_ranks)

    def notice(self) -> Notice | None:
        ours = self._placement.nodes_of_ranks if self._is_fitting and self._placement else ()
        leaving = draining() if ours else {}
        return notice_of(leaving, ours, {node.id: node.label for node in nodes()} if leaving else {})

    is_watched = True

    def stacks(self, ticket: RunTicket) -> Sequence[Dump]:
        from orchestrator.execution import handles

        answers = handles.ask_agents(self._nodes(), "stacks", ticket.run, ticket.attempt, timeout=STACKS)
        for node, answer in answers.items():
            if isinstance(answer, Exception):
                logger.warning("the agent of node %s does not tell where its ranks are: %s", node, answer)
        told = [dump for answer in answers.values() if not isinstance(answer, Exception) for dump in from_json(answer)]
        by_rank = {dump.rank: dump for dump in told}  # several nodes of one machine have the same spools
        return [by_rank[rank] for rank in sorted(by_rank)]

    def end(self, ticket: RunTicket) -> None:
        from orchestrator.execution import handles

        if self.waits_for():
            handles.end_actors([Identity.of(ticket).part("controller")])  # its placement group goes with it
            return
        answers = handles.ask_agents(self._nodes(), "end_ranks", ticket.run, ticket.attempt, timeout=AGENT_START)
        ended = {rank for answer in answers.values() if not isinstance(answer, Exception) for rank in answer}
        known = range(len(self._placement.nodes_of_ranks) if self._placement else 0)
        handles.end_actors(Identity.of(ticket).part(f"rank-{rank}") for rank in known if rank not in ended)

    def network(self) -> str:
        from orchestrator.execution import handles

        return check(self._peers, handles.ask_each)

    def _peers(self) -> list[Peer]:
        ours = set(self._nodes())
        return [Peer(id=node.id, address=node.address, label=node.label) for node in nodes() if node.id in ours]

    def _nodes(self) -> list[str]:
        """Where the ranks are, as far as that is known; else they may be anywhere."""
        placed = self._placement.nodes_of_ranks if self._placement else ()
        return sorted(set(placed)) or [node.id for node in nodes() if node.is_alive]

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
            without=plan.without,
            storage=str(Path(self._stack.home) / "ray" / "train"),
        )
        with Placement(identity.title) as placement, named_controller(identity):
            self._placement, self._is_fitting = placement, True
            try:
                returned: Returned = trainer.fit().return_value
                return returned
            except Exception as error:  # Ray Train's, with one exception per rank inside
                evidence = evidence_of(error, plan.secrets)
                for found in evidence:
                    logger.info("Ray Train says of rank %d: %s: %s", found.rank, found.type, found.message)
                raise RanksFailed(_on_nodes(with_lost_nodes(evidence, placement), placement.nodes_of_ranks)) from error
            finally:
                self._is_fitting = False

    def close(self) -> None:
        if self._is_ours:
            disconnect()


def _on_nodes(evidence: Sequence[Evidence], nodes_of_ranks: Sequence[str]) -> list[Evidence]:
    """With the node of each rank, where that is known."""
    known = dict(enumerate(nodes_of_ranks))
    return [replace(each, node=each.node or known.get(each.rank, "")) for each in evidence]


def _ids(named: Collection[str]) -> frozenset[str]:
    """Ids of the nodes that are meant: by their id, name or address."""
    if not named:
        return frozenset()
    return frozenset(node.id for node in nodes() if {node.id, node.host, node.address, node.label} & set(named))


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
