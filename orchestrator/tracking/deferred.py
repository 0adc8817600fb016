"""Points whose value is still on an accelerator: copied there at once, fetched together, never waited for in `log`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)

AGE = 0.1
"""Seconds after which a point is fetched, if something is logged then."""
MOST_TOGETHER = 256
"""Points in one transfer."""
MOST_WAITING = 4096
"""Points that may be under way. One more, and the oldest are waited for: a device so far behind fills its memory."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """A point without its value: `tensor` is a copy of it on its device, of shape ()."""

    key: str
    step: int
    time: float
    tensor: Any


class Transfer(Protocol):
    """Values on their way to the host."""

    def is_done(self) -> bool:
        """Asks, and does not wait."""
        ...

    def values(self) -> list[Any]:
        """Waits for them. Raises RuntimeError when the device is broken."""
        ...


class _TorchTransfer:
    """One stack and one copy for each device and type of number; the device's own queue keeps the order."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        import torch

        self._groups: list[tuple[list[int], Any]] = []
        self._events = []
        by_kind: dict[Any, list[int]] = {}
        for number, tensor in enumerate(tensors):
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(number)
        for (device, _), numbers in by_kind.items():
            stacked = torch.stack([tensors[number] for number in numbers])
            # Into pinned memory, so that the copy runs behind us; without events nobody could tell when it is over.
            self._groups.append((numbers, stacked.to("cpu", non_blocking=has_events(device))))
            if has_events(device):
                queue = getattr(torch, device.type)
                event = queue.Event()
                event.record(queue.current_stream(device))
                self._events.append(event)
        self._count = len(tensors)

    def is_done(self) -> bool:
        return all(event.query() for event in self._events)

    def values(self) -> list[Any]:
        for event in self._events:
            event.synchronize()
        found: list[Any] = [None] * self._count
        for numbers, host in self._groups:
            for number, value in zip(numbers, host.tolist(), strict=True):
                found[number] = value
        return found


def has_events(device: Any) -> bool:
    """Whether one can ask the device how far it is, instead of waiting for it."""
    import torch

    return hasattr(getattr(torch, device.type, None), "Event")


class DeferredPoints:
    """Points are added by any thread, and taken by any; each is given out once. In the order in which they came."""

    def __init__(self, begin: Any = _TorchTransfer, can_ask: Any = has_events) -> None:
        self._begin, self._can_ask = begin, can_ask
        self._waiting: deque[Deferred] = deque()
        self._moving: deque[tuple[list[Deferred], Transfer]] = deque()
        self.is_empty = True

    def add(self, point: Deferred) -> None:
        self._waiting.append(point)
        self.is_empty = False

    def arrived(self, now: float) -> list[tuple[Deferred, Any]]:
        """Points that have their values by now. Waits only when there are too many."""
        found: list[tuple[Deferred, Any]] = []
        if self._is_due(now):
            self._start()
        count = len(self._waiting) + sum(len(points) for points, _ in self._moving)
        while self._moving and (self._is_done(self._moving[0][1]) or count > MOST_WAITING):
            some = self._take()
            count -= len(some)
            found += some
        if count > MOST_WAITING:
            found += self.all()
        self._note()
        return found

    def all(self) -> list[tuple[Deferred, Any]]:
        """All points, with their values; waits for them."""
        found: list[tuple[Deferred, Any]] = []
        while self._waiting or self._moving:
            if self._waiting:
                self._start()
            found += self._take()
        self._note()
        return found

    def _is_due(self, now: float) -> bool:
        try:
            oldest = self._waiting[0]
        except IndexError:
            return False
        is_time = len(self._waiting) >= MOST_TOGETHER or now - oldest.time > AGE
        return is_time and self._can_ask(oldest.tensor.device)

    def _start(self) -> None:
        """What waits goes on its way. Another thread may do the same: each point is popped once."""
        points: list[Deferred] = []
        while len(points) < MOST_TOGETHER:
            try:
                points.append(self._waiting.popleft())
            except IndexError:
                break
        if not points:
            return
        try:
            self._moving.append((points, self._begin([point.tensor for point in points])))
        except RuntimeError as error:
            _say_lost(points, error)

    def _take(self) -> list[tuple[Deferred, Any]]:
        try:
            points, transfer = self._moving.popleft()
        except IndexError:
            return []
        try:
            return list(zip(points, transfer.values(), strict=True))
        except RuntimeError as error:
            _say_lost(points, error)
            return []

    @staticmethod
    def _is_done(transfer: Transfer) -> bool:
        try:
            return transfer.is_done()
        except RuntimeError:
            return True  # broken; taking it says so

    def _note(self) -> None:
        self.is_empty = True
        if self._waiting or self._moving:
            self.is_empty = False


def _say_lost(points: Sequence[Deferred], error: RuntimeError) -> None:
    # The device is broken, and the train function hears of it by its own next call; a close must go on.
    logger.error("%d points that were on the device are lost: %s", len(points), error)
