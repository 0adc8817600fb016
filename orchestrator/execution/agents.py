"""An agent, and each checkpoint writer, on every node: started where one joins, given up where one is gone. Run by the
tracker's process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits

logger = logging.getLogger(__name__)


class Agents(Protocol):
    """What there is of one kind, and what can be done about it; `handles.RemoteAgents`. Any call may raise."""

    def living_nodes(self) -> set[str]: ...
    def present(self) -> set[str]: ...
    def name_of(self, node_id: str) -> str: ...
    def start(self, node_id: str) -> Any: ...
    def give_up(self, name: str) -> None: ...


def to_start(living: Iterable[str], present: Iterable[str], name_of: Callable[[str], str]) -> list[str]:
    """Nodes without an agent. Ray itself starts an agent again that died on a living node."""
    known = set(present)
    return sorted(node for node in living if name_of(node) not in known)


def to_give_up(living: Iterable[str], present: Iterable[str], name_of: Callable[[str], str]) -> list[str]:
    """Names of agents whose node is gone. A node that comes back has another id, and gets another agent."""
    wanted = {name_of(node) for node in living}
    return sorted(set(present) - wanted)


class AgentWatch:
    """Keeps one actor of each kind on every living node. `step` looks once; `run` repeats it until `stop`."""

    PAUSE = 1.0
    """Seconds between looks: how long a node that joins may be without an agent."""

    def __init__(self, *kinds: Agents, circuits: Circuits | None = None) -> None:
        self._kinds = kinds
        self._stop = threading.Event()
        self._ray = (circuits or Circuits()).link(
            "ray", lost="Ray does not answer, so the nodes' agents are not looked after; training goes on where it is",
            back="Ray answers again", breaker=CircuitBreaker(threshold=1),
        )  # fmt: skip

    def run(self) -> None:
        while not self._stop.wait(self.PAUSE):
            try:
                self.step()
                self._ray.succeeded(time.monotonic())
            except Exception as error:
                # The head may be away, or Ray in the middle of something: the next look may find it in order.
                logger.debug("the nodes' agents could not be looked after; trying again", exc_info=True)
                self._ray.failed(error, time.monotonic())

    def stop(self) -> None:
        self._stop.set()

    def step(self) -> None:
        for agents in self._kinds:
            _look_after(agents)


def _look_after(agents: Agents) -> None:
    # In this order: an agent that starts in between belongs to a node that is counted as living.
    present = agents.present()
    living = agents.living_nodes()
    for node in to_start(living, present, agents.name_of):
        logger.info("starting %s", agents.name_of(node))
        agents.start(node)
    if living:
        for name in to_give_up(living, present, agents.name_of):
            logger.info("the node of %s is gone", name)
            agents.give_up(name)
