"""How far the committer is behind the log: points, seconds, and points per second of both. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from orchestrator.tracking.wal import Position

INTERVAL = 0.25
"""Seconds between two remembered places in the log."""
_MARKS = 2000
WINDOW = 10.0
"""Seconds over which a rate is taken."""


@dataclass(slots=True)
class Passed:
    """Points that went through, since the beginning."""

    accepted: int = 0
    committed: int = 0


class Progress:
    """Example: progress.accepted(1000, log.synced, now); progress.committed(1000, position, now)."""

    def __init__(self) -> None:
        self._passed = Passed()
        self._marks: deque[tuple[float, Position]] = deque()
        """When the log had grown so far, for what is not committed."""
        self._samples: deque[tuple[float, int, int]] = deque()
        self.empty_at = float("-inf")
        """When the committer last had nothing to do."""

    def accepted(self, points: int, end: Position, now: float) -> None:
        self._passed.accepted += points
        if not self._marks or (now - self._marks[-1][0] >= INTERVAL and end > self._marks[-1][1]):
            self._marks.append((now, end))
        if len(self._marks) > _MARKS:
            # A long outage: half the places are enough, the oldest tells the lag.
            self._marks = deque(mark for number, mark in enumerate(list(self._marks)) if number % 2 == 0)

    def committed(self, points: int, position: Position) -> None:
        self._passed.committed += points
        while self._marks and self._marks[0][1] <= position:
            self._marks.popleft()

    def empty(self, now: float) -> None:
        """Everything in the log is committed."""
        self.empty_at = now
        self._marks.clear()

    def look(self, now: float) -> None:
        """To be called every second or so, for the rates."""
        self._samples.append((now, self._passed.accepted, self._passed.committed))
        while now - self._samples[0][0] > WINDOW:
            self._samples.popleft()

    def lag_points(self) -> int:
        return max(self._passed.accepted - self._passed.committed, 0)

    def lag_seconds(self, now: float) -> float:
        """Age of the oldest that is accepted and not committed, to within INTERVAL."""
        try:
            return max(now - self._marks[0][0], 0.0)
        except IndexError:
            return 0.0

    def rates(self, now: float) -> tuple[float, float]:
        """Points accepted and committed per second."""
        if not self._samples:
            return 0.0, 0.0
        since, accepted, committed = self._samples[0]
        seconds = max(now - since, 1e-9)
        return (self._passed.accepted - accepted) / seconds, (self._passed.committed - committed) / seconds
