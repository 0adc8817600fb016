"""Who is still alive. Pure: times in, verdicts out.

A running attempt holds a lease that its driver renews. Deadlines are of the tracker's monotonic clock, so a jump of
the wall clock ends nobody.
"""

from __future__ import annotations

AttemptId = tuple[str, int]


class Leases:
    """Example: leases.renew(("r1", 1), now=0.0); leases.expired(now=20.0) == [("r1", 1)]."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lengths: dict[AttemptId, float] = {}
        self._deadlines: dict[AttemptId, float] = {}

    def begin(self, attempt: AttemptId, now: float, seconds: float | None = None) -> None:
        """`seconds`: how long this attempt may be silent; default, what was given to all."""
        self._lengths[attempt] = seconds or self._seconds
        self.renew(attempt, now)

    def length(self, attempt: AttemptId) -> float:
        return self._lengths.get(attempt, self._seconds)

    def renew(self, attempt: AttemptId, now: float) -> None:
        self._deadlines[attempt] = now + self.length(attempt)

    def end(self, attempt: AttemptId) -> None:
        """The attempt said how it ended; there is nothing to wait for."""
        self._deadlines.pop(attempt, None)
        self._lengths.pop(attempt, None)

    def holds(self, attempt: AttemptId) -> bool:
        return attempt in self._deadlines

    def is_superseded(self, attempt: AttemptId) -> bool:
        """Whether a later attempt of the same run holds a lease."""
        run, number = attempt
        return any(other == run and later > number for other, later in list(self._deadlines))

    def expired(self, now: float) -> list[AttemptId]:
        return [attempt for attempt, deadline in list(self._deadlines.items()) if deadline <= now]

    def remaining(self, now: float) -> dict[AttemptId, float]:
        """Seconds left per attempt; negative once expired."""
        return {attempt: deadline - now for attempt, deadline in list(self._deadlines.items())}
