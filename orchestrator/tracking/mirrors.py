"""The sinks of a stack, side by side: each with its own thread, connection, cursors, breaker and lag."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.backends import open_sink
from orchestrator.errors import UserError
from orchestrator.tracking.circuits import Circuits
from orchestrator.tracking.mirror import Feed, MirrorService, Sink

logger = logging.getLogger(__name__)

Sinks = Mapping[str, Mapping[str, Any]]
"""Name of a sink -> what it is opened with; see `backends.open_sink`."""


class Mirrors:
    """Runs a `MirrorService` for every sink. One that cannot be opened, fails or hangs is alone with that.

    `start` returns at once; the other methods may be called from any thread.
    """

    def __init__(
        self,
        open_feed: Callable[[], Feed],
        sinks: Sinks,
        *,
        open_sink: Callable[[str, Mapping[str, Any]], Sink] = open_sink,
        circuits: Circuits | None = None,
    ) -> None:
        self._open_feed, self._sinks, self._open_sink = open_feed, dict(sinks), open_sink
        self._circuits = circuits or Circuits()
        self._services: dict[str, MirrorService] = {}
        self._errors: dict[str, str] = {}
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(name,), name=f"mirror-{name}", daemon=True) for name in sinks
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float = 0.0) -> None:
        """Make every service return after its step; wait for each so many seconds. A sink may hang for ever."""
        self._stopped.set()
        for service in list(self._services.values()):
            service.stop()
        for thread in self._threads:
            thread.join(patience)

    def _run(self, name: str) -> None:
        try:
            sink = self._open_sink(name, self._sinks[name])
            service = MirrorService(self._open_feed(), sink, circuits=self._circuits)
            self._services[name] = service
            if self._stopped.is_set():
                service.stop()
            service.run()
        except Exception as error:
            self._errors[name] = f"{type(error).__name__}: {error}"
            logger.exception("the copies in %s have ended; runs are recorded without it", name)

    def health(self) -> dict[str, dict[str, Any]]:
        """By sink. Never raises."""
        return {name: self._health(name) for name in self._sinks}

    def _health(self, name: str) -> dict[str, Any]:
        if name in self._errors:
            return {"sink": name, "state": "ended", "last_error": self._errors[name]}
        service = self._services.get(name)
        return {"sink": name, "state": "starting", "last_error": ""} if service is None else service.health()

    def behind(self) -> int:
        """Runs that are not copied everywhere; a sink that cannot tell counts as one, one that has ended as none."""
        return sum(self._behind(name) for name in self._sinks if name not in self._errors)

    def _behind(self, name: str) -> int:
        service = self._services.get(name)
        try:
            return 1 if service is None else service.lag().runs
        except UserError:
            return 1
