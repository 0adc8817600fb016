"""Where a training's points and facts go. Implemented by tracking/logger.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.records import Fact


class Recorder(Protocol):
    """Takes what one rank records. `log` and `fact` return at once; neither waits for a network or a disk."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...

    def fact(self, fact: Fact) -> None: ...

    def stop_requested(self) -> bool: ...

    def flush(self, timeout: float) -> bool:
        """True when all that was logged is accepted by the tracker."""
        ...
