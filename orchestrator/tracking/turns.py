"""Whose turn it is: which runs a sink looks at now, which ones wait. Pure: the time comes in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEISURE = 4.0
"""Small visits take at most one part in so many of the time. A request costs a server about 20 ms, however few points
it carries; so where many runs log a little, each is visited less often and brings more."""
SETTLING = 0.5
"""Seconds after its end was noticed in which a run is not visited for it: what was on its way then comes, too."""


@dataclass(slots=True)
class _Aside:
    until: float
    pause: float


class Turns:
    """Runs that are not visited for a while: those just visited, those whose points may come yet, those that the sink
    refused. Times are seconds of a clock that never goes back.
    """

    def __init__(self, *, linger: float, aside: float) -> None:
        self._linger = linger
        self._first_pause = aside
        self._visited: dict[str, float] = {}
        self._next: dict[str, float] = {}
        self._aside: dict[str, _Aside] = {}
        self._waiting: set[str] = set()

    @property
    def aside(self) -> list[str]:
        """Runs that the sink refused, or that make it fail."""
        return sorted(self._aside)

    def due(self, runs: Iterable[str], now: float) -> list[str]:
        """In the order given; who was visited last stands last in it."""
        self._next = {run: at for run, at in self._next.items() if at > now}
        self._visited = {run: at for run, at in self._visited.items() if at > now - self._linger}
        return [run for run in runs if run not in self._next and not self._is_aside(run, now)]

    def resting(self, runs: Iterable[str], now: float) -> list[str]:
        """Those that are not due because they were just visited."""
        return [run for run in runs if self._next.get(run, now) > now and run not in self._waiting]

    def ended(self, runs: Iterable[str], now: float) -> None:
        """Of these nothing more is to be waited for."""
        for run in runs:
            self._next[run] = min(self._next.get(run, now), now + SETTLING)

    def is_any_ready(self, runs: Iterable[str], now: float) -> bool:
        """Whether another step would come further at once."""
        return any(
            run not in self._waiting and self._next.get(run, now) <= now and not self._is_aside(run, now)
            for run in runs
        )

    def visited(self, run: str, now: float, *, seconds: float, is_small: bool, waits: bool) -> None:
        """A visit of so many seconds is over. `is_small`: it filled no request. `waits`: for points that may come."""
        self._aside.pop(run, None)
        (self._waiting.add if waits else self._waiting.discard)(run)
        self._visited[run] = now
        if is_small:
            others = len(self._visited) - 1
            self._next[run] = now + min(self._linger, LEISURE * seconds * others)

    def put_aside(self, run: str, now: float) -> bool:
        """For a minute at first, then for growing pauses up to an hour. True when that begins."""
        before = self._aside.get(run)
        pause = self._first_pause if before is None else min(3600.0, before.pause * 2)
        self._aside[run] = _Aside(now + pause, pause)
        self._waiting.discard(run)
        return before is None

    def forget(self, run: str) -> None:
        """It is not there any more."""
        self._visited.pop(run, None)
        self._next.pop(run, None)
        self._aside.pop(run, None)
        self._waiting.discard(run)

    def forget_waiting(self) -> None:
        self._waiting.clear()

    def _is_aside(self, run: str, now: float) -> bool:
        aside = self._aside.get(run)
        return aside is not None and now < aside.until
