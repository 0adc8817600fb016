"""Telling somebody else, Ray Train say, where a run's newest checkpoint is."""

from __future__ import annotations

from typing import Protocol

from orchestrator.checkpoints.manifest import CheckpointInfo


class Pointers(Protocol):
    """Best effort: nothing here raises, and nothing but `close` waits. What was told is never read again by us."""

    def offer(self, info: CheckpointInfo) -> None:
        """On rank 0: this checkpoint is committed."""
        ...

    def due(self, *, is_last: bool = False) -> str:
        """On rank 0: what all ranks shall be given now; "" for nothing."""
        ...

    def put(self, pointer: str) -> None:
        """On all ranks, the same texts in the same order."""
        ...

    def close(self, timeout: float) -> None:
        """Waits until what was put is told."""
        ...
