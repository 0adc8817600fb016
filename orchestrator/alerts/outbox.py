"""Sends what the outbox holds, outside of everybody's way.

`step` claims what is due and gives each to a thread of its own, at most one per channel and `MOST` in all; a later step
settles what came back. A channel that does not answer holds up nobody but itself. What is sent and not settled when the
process dies is sent again under the same key.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.alert_records import Claimed, Notice, NotSent
from orchestrator.alerts.addresses import Addresses
from orchestrator.backends import send_notice
from orchestrator.clock import Clock

logger = logging.getLogger(__name__)

TRIES = 8
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
PATIENCE = 45.0
"""Seconds after which a try counts as failed, whatever its thread still waits for."""
LEASE = 90.0
"""Seconds for which a claim holds: longer than `PATIENCE`, or the same one would be sent twice at once."""
MOST = 8
"""Sent at the same time."""
AGAIN = 0.2
"""Seconds between two looks at an outbox that has something."""

Send = Callable[[str, Mapping[str, Any], Notice], None]


class Box(Protocol):
    """The store, as far as it is needed here."""

    def claim_notifications(self, place: str, *, now: float, lease: float, busy: Any, most: int) -> list[Claimed]: ...
    def release_notifications(self, place: str, *, now: float) -> None: ...
    def next_notification(self, place: str) -> float | None: ...
    def notification_sent(self, claimed: Claimed, *, now: float) -> None: ...
    def notification_failed(self, claimed: Claimed, error: str, *, now: float, again_at: float | None) -> None: ...


def pause(tries: int, key: str, asked: float = 0.0, *, first: float = FIRST_PAUSE) -> float:
    """Seconds before the next try: doubled each time, spread by the key so that many do not come at once. Pure.

    Example: 0.75 <= pause(1, "r1") <= 1.25.
    """
    spread = 0.75 + 0.5 * (sum(key.encode()) % 101) / 100
    return max(min(first * 2.0 ** (tries - 1), LONGEST_PAUSE) * spread, asked)


@dataclass(slots=True)
class _Try:
    """One that is being sent."""

    claimed: Claimed
    began: float
    """Monotonic seconds."""
    is_over: bool = False
    error: NotSent | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Outbox:
    """One thread calls `step`, again and again. Raises what the store raises; nothing is lost by that."""

    def __init__(
        self,
        box: Box,
        addresses: Addresses,
        clock: Clock,
        *,
        send: Send = send_notice,
        tries: int = TRIES,
        first_pause: float = FIRST_PAUSE,
        patience: float = PATIENCE,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called, in another thread, when a try is over."""
        self._box, self._addresses, self._clock, self._send = box, addresses, clock, send
        self._tries, self._first_pause, self._patience, self._changed = tries, first_pause, patience, changed
        self._going: list[_Try] = []
        self._is_released = False
        self._due: float | None = 0.0
        """When something may be due, seconds since 1970; None: nothing is, until somebody says so."""
        self.sent = self.failed = 0

    def look(self) -> None:
        """Something was put into it."""
        self._due = 0.0

    @property
    def is_busy(self) -> bool:
        return bool(self._going)

    @property
    def is_expecting(self) -> bool:
        """Something waits, or may."""
        return self._due is not None

    def waiting(self, now: float) -> float | None:
        """Seconds until the next step has something to do; None: nothing is known to come."""
        if self._due is None:
            return None
        return max(self._due - now, 0.0)

    def step(self) -> None:
        self._settle()
        now = self._clock.now()
        if self._due is None or now < self._due or len(self._going) >= MOST:
            return
        if not self._is_released:
            self._box.release_notifications(self._addresses.place, now=now)
            self._is_released = True
        busy = [each.claimed.channel for each in self._going]
        found = self._box.claim_notifications(
            self._addresses.place, now=now, lease=LEASE, busy=busy, most=MOST - len(self._going)
        )
        for claimed in found:
            self._begin(claimed)
        # Of a channel that is busy the next one is looked for when its try is over.
        due = now if found else self._box.next_notification(self._addresses.place)
        self._due = None if due is None else max(due, now + AGAIN)

    def _begin(self, claimed: Claimed) -> None:
        channel = self._addresses.find(claimed.channel)
        one = _Try(claimed=claimed, began=self._clock.monotonic())
        self._going.append(one)
        if channel is None:
            one.error, one.is_over = NotSent("its address is not known here any more", is_final=True), True
            return

        def work() -> None:
            error: NotSent | None = None
            try:
                self._send(channel.kind, channel.options, claimed.notice)
            except NotSent as problem:
                error = problem
            except Exception as problem:
                # A defect of ours; its text may have an address in it.
                logger.error("the notifier %s failed with %s", channel.kind, type(problem).__name__)
                error = NotSent(f"{type(problem).__name__} in the notifier")
            one.error, one.is_over = error, True
            self._changed()

        threading.Thread(target=work, name="notify", daemon=True).start()

    def _settle(self) -> None:
        """Writes down what became of tries. One that takes too long counts as failed, and its thread is left alone."""
        for one in list(self._going):
            late = self._clock.monotonic() - one.began > self._patience
            if not one.is_over and not late:
                continue
            error = one.error if one.is_over else NotSent(f"no answer within {self._patience:g} s")
            now, claimed = self._clock.now(), one.claimed
            if error is None:
                self._box.notification_sent(claimed, now=now)
                self.sent += 1
            elif error.is_final or claimed.tries >= self._tries:
                logger.warning(
                    "%s could not be told of %r: %s", claimed.notifier, claimed.notice.title, error,
                    extra={"run": claimed.notice.run},
                )  # fmt: skip
                self._box.notification_failed(claimed, error.why, now=now, again_at=None)
                self.failed += 1
            else:
                again = now + pause(claimed.tries, claimed.notice.key, error.wait, first=self._first_pause)
                self._box.notification_failed(claimed, error.why, now=now, again_at=again)
            self._going.remove(one)
            self._due = 0.0
