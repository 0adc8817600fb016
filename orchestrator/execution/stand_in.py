"""This host in the place of a Ray cluster that does not answer when a run begins (`ray.fallback`).

Where an attempt runs is settled when it begins: its ranks stay here to its end, also when Ray answers again. That is
looked for now and then, and told as an event; `orc resume`, or whatever begins the run's next attempt with a new
driver, asks Ray first.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from orchestrator.execution.local import Locally
from orchestrator.stack import Stack
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.local.client import LocalTracker

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that a cluster has to take a connection when a run begins."""
LOOK, GLANCE = 5.0, 0.2
"""Seconds between two looks whether it is back, at least, and what one may take."""


def why_away(address: str, patience: float = PATIENCE) -> str:
    """Why nobody can speak to the head at HOST:PORT; '' if somebody listens."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=patience):
            return ""
    except (OSError, ValueError) as error:
        return f"{address}: {error}"


class BesideRay(LocalTracker):
    """The local tracker, which also tells the driver how Ray is."""

    def __init__(self, stack: Stack, why: str, look: Callable[[], str]) -> None:
        super().__init__(stack)
        self._circuits, self._look = Circuits("driver"), look
        self._ray = self._circuits.link(
            "ray", lost="Ray does not answer, so the ranks run as processes of this host",
            back="Ray answers again; this attempt stays where it is",
            breaker=CircuitBreaker(threshold=1, first_pause=LOOK, longest_pause=6 * LOOK),
        )  # fmt: skip
        self._ray.failed(why, time.monotonic())
        self._looked = time.monotonic()

    def live(self, run: str) -> dict[str, Any]:
        found = super().live(run)
        now = time.monotonic()
        if self._ray.allows(now) and now - self._looked >= LOOK:
            self._looked = now
            why = self._look()
            self._ray.failed(why, now) if why else self._ray.succeeded(now)
        return {**found, "circuits": [*found.get("circuits", ()), *self._circuits.describe()]} if found else {}


class StandIn(Locally):
    """`Locally`, because Ray is away."""

    def __init__(self, stack: Stack, why: str = "") -> None:
        super().__init__(stack)
        address = stack.ray_address
        self.tracker = BesideRay(stack, why or why_away(address), lambda: why_away(address, GLANCE))
