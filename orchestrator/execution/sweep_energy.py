"""What a sweep's trials use, read from what the samplers of its machines recorded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two questions: a sample comes no more often."""
UNTOLD = 180.0
"""Seconds after the first question by which something must have been recorded."""
JOULES = 3.6e6
"""Of a kWh."""


class Meter:
    """A thread that asks `measured` for the joules of all trials so far, None where nothing is recorded yet.

    Whatever the question costs, it takes at most a twentieth of one core. A question that fails is asked again.
    """

    def __init__(
        self, measured: Callable[[], float | None], *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._measured, self._monotonic = measured, monotonic
        self._over = threading.Event()
        self._began = monotonic()
        self._kwh: float | None = None
        self._has_said = False

    @property
    def kwh(self) -> float | None:
        """In all; None as long as nothing was measured."""
        return self._kwh

    def start(self) -> None:
        self._began = self._monotonic()
        threading.Thread(target=self._run, name="sweep energy", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def ask(self) -> None:
        """Once."""
        try:
            joules = self._measured()
        except Exception:
            logger.debug("nobody tells what the sweep used", exc_info=True)
            return
        if joules is not None:
            # Of runs that were removed nothing is left in the record, and yet it was used.
            self._kwh = max(joules / JOULES, self._kwh or 0.0)
        elif not self._has_said and self._monotonic() - self._began > UNTOLD:
            self._has_said = True
            logger.warning(
                "the GPUs of this sweep tell no energy: sweep.budget.kwh limits nothing as long as they do not"
            )

    def _run(self) -> None:
        pause = 1.0
        while not self._over.wait(pause):
            began = self._monotonic()
            self.ask()
            pause = max(EVERY, 20 * (self._monotonic() - began))
