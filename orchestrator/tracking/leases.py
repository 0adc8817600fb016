"""Who is still alive. Pure: times in, verdicts out.

A running attempt holds a lease that its driver renews. Deadlines are of the tracker's monotonic clock, so a jump of
the wall clock ends nobody.
"""

from __future__ import annotations

import threading
from heapq import heapify, heappop, heappush

AttemptId = tuple[str, int]


class Leases:
    """Renewing costs the same however many there are, a look for the expired ones only what is due. Safe for threads.

    Example: leases.begin(("r1", 1), now=0.0); leases.expired(now=20.0) == [("r1", 1)].
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._lengths: dict[AttemptId, float] = {}
        self._deadlines: dict[AttemptId, float] = {}
        self._due: list[tuple[float, AttemptId]] = []
        """A heap with an entry for each lease, no later than its deadline; some are of leases that ended."""
        self._of_run: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def begin(self, attempt: AttemptId, now: float, seconds: float | None = None) -> None:
        """`seconds`: how long this attempt may be silent; default, what was given to all."""
        run, number = attempt
        with self._lock:
            self._of_run[run] = (*(each for each in self._of_run.get(run, ()) if each != number), number)
            self._lengths[attempt] = seconds or self._seconds
            self._deadlines[attempt] = now + self._lengths[attempt]
            heappush(self._due, (self._deadlines[attempt], attempt))
            if len(self._due) > 2 * len(self._deadlines) + 1000:
                self._due = [(deadline, each) for each, deadline in self._deadlines.items()]
                heapify(self._due)

    def length(self, attempt: AttemptId) -> float:
        return self._lengths.get(attempt, self._seconds)

    def renew(self, attempt: AttemptId, now: float) -> bool:
        """False: it holds no lease."""
        with self._lock:
            if attempt not in self._deadlines:
                return False
            self._deadlines[attempt] = now + self._lengths[attempt]
            return True

    def renew_all(self, now: float) -> None:
        for attempt in list(self._deadlines):
            self.renew(attempt, now)

    def end(self, attempt: AttemptId) -> None:
        """The attempt said how it ended; there is nothing to wait for."""
        run, number = attempt
        with self._lock:
            self._deadlines.pop(attempt, None)
            self._lengths.pop(attempt, None)
            left = tuple(each for each in self._of_run.pop(run, ()) if each != number)
            if left:
                self._of_run[run] = left

    def holds(self, attempt: AttemptId) -> bool:
        return attempt in self._deadlines

    def is_superseded(self, attempt: AttemptId) -> bool:
        """Whether a later attempt of the same run holds a lease."""
        run, number = attempt
        return any(later > number for later in self._of_run.get(run, ()))

    def expired(self, now: float) -> list[AttemptId]:
        """Each of them again and again, until it is renewed or ended."""
        found: dict[AttemptId, float] = {}
        with self._lock:
            while self._due and self._due[0][0] <= now:
                _, attempt = heappop(self._due)
                deadline = self._deadlines.get(attempt)
                if deadline is None or attempt in found:
                    continue
                if deadline <= now:
                    found[attempt] = deadline
                else:
                    heappush(self._due, (deadline, attempt))
            for attempt, deadline in found.items():
                heappush(self._due, (deadline, attempt))
        return list(found)
