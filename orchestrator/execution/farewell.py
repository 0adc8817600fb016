"""What a script's run does when its process is told to go: SIGTERM and SIGUSR1, which clusters and clouds send before
they take a machine away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

HEARD = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 20.0
"""Seconds for the next `report`, as `failures.grace` gives the ranks of a run."""


class Farewell:
    """Listens in the main thread, where nobody else does. `ask` asks the run to save and stop at its next report;
    False: it has nothing to save.

    The first signal is an order to save. Where nothing can be saved, with a second signal or after the grace time, the
    signal does what it would have done without a run.
    """

    def __init__(self, ask: Callable[[], bool], grace: float = GRACE) -> None:
        self._ask, self._grace = ask, grace
        self._process = os.getpid()
        self._ours: list[signal.Signals] = []
        self._timer: threading.Timer | None = None
        self.heard = ""
        """The signal's name."""

    def listen(self) -> None:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in HEARD:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._hear)
                    self._ours.append(number)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._let_go()

    def _let_go(self) -> None:
        while self._ours:
            number = self._ours.pop()
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) == self._hear:
                    signal.signal(number, signal.SIG_DFL)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.heard = signal.Signals(number).name
        self._let_go()
        if os.getpid() != self._process or not self._ask():  # a forked child has inherited the handler
            os.kill(os.getpid(), number)
            return
        self._timer = threading.Timer(self._grace, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()
