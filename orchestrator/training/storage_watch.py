"""Tells a run when its checkpoints cannot be saved, and when they can be again: once per outage, not once per save."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.clock import Clock
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuit, News, Outages

STORAGE = "storage"


class StorageWatch:
    """Of one rank, which hears what became of each save; `tell` gets the news. Costs nothing while all is well."""

    def __init__(self, tell: Callable[[News], None], clock: Clock) -> None:
        self._tell, self._clock = tell, clock
        self._circuit = Circuit(STORAGE, clock=clock)
        self._saves = self._circuit.link(
            lost="checkpoints cannot be saved, training goes on", back="checkpoints can be saved again",
            breaker=CircuitBreaker(threshold=1),
        )  # fmt: skip
        self._outages = Outages()

    def failed(self, why: object) -> None:
        now = self._clock.monotonic()
        self._saves.failed(why, now)
        self._look(now)

    def succeeded(self) -> None:
        if self._outages.away:
            self._saves.succeeded(self._clock.monotonic())

    def look(self) -> None:
        """Whether it has worked for long enough. To be called now and then."""
        if self._outages.away:
            self._look(self._clock.monotonic())

    def end(self) -> None:
        """No save comes any more: whether it works is what the last one said."""
        if self._outages.away:
            self._look(math.inf)

    def _look(self, now: float) -> None:
        state = self._circuit.described(now)
        for news in self._outages.news([state]) if state is not None else ():
            self._tell(news)
