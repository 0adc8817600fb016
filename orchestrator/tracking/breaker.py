"""When to leave a failing server alone, and when to try it again. Pure: the time comes in, a decision goes out."""

from __future__ import annotations

from enum import StrEnum


class BreakerState(StrEnum):
    closed = "closed"
    """Works; calls go through."""
    open = "open"
    """Failed too often; nothing goes through until the pause is over."""
    half_open = "half-open"
    """The pause is over: one probe may go through."""


class CircuitBreaker:
    """Opens after `threshold` failures in a row; each failed probe doubles the pause up to `longest_pause`; a success
    closes.

    Times are seconds of a clock that never goes back. Not thread-safe: one service owns it.
    """

    def __init__(self, *, threshold: int = 3, first_pause: float = 1.0, longest_pause: float = 30.0) -> None:
        self._threshold = threshold
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._failures = 0
        self._pause = 0.0
        self._opened_at: float | None = None

    def state(self, now: float) -> BreakerState:
        if self._opened_at is None:
            return BreakerState.closed
        return BreakerState.half_open if now >= self._opened_at + self._pause else BreakerState.open

    def allows(self, now: float) -> bool:
        return self.state(now) is not BreakerState.open

    def retry_in(self, now: float) -> float:
        """Seconds until the next probe; 0 when calls may go through."""
        return 0.0 if self._opened_at is None else max(0.0, self._opened_at + self._pause - now)

    def succeeded(self) -> bool:
        """True when this success ends an outage."""
        recovered = self._opened_at is not None
        self._failures, self._opened_at, self._pause = 0, None, 0.0
        return recovered

    def failed(self, now: float) -> bool:
        """True when this failure begins an outage (and only then, so that it is reported once)."""
        self._failures += 1
        if self._opened_at is not None:
            self._pause = min(self._longest_pause, self._pause * 2)
            self._opened_at = now
            return False
        if self._failures < self._threshold:
            return False
        self._pause, self._opened_at = self._first_pause, now
        return True
