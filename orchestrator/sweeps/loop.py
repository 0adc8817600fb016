"""Runs a sweep's jobs in threads of the driver: for local mode, for tests, and for lanes where Tune is not between."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from orchestrator.errors import SweepTaken
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned, Ended, Ending
from orchestrator.sweeps.summary import SweepView

logger = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks at requests and budgets."""
WATCH_SHARE = 20
"""After a look of t seconds of a core for who watches, there is none for so many times t."""


class Loop:
    """`size` jobs at once, each `run_job(assigned)` in a thread of its own that says how it ended.

    All calls of the core come from the thread that calls `run`. `stop_runs` asks the ranks of runs to stop; it is
    called again with the same ones as long as they run, and must not wait. `watch` gets the view after a look: after
    each of them, or as often as a twentieth of one core allows, for ten thousand trials take a while to look at.
    `on_turn` is called after each look and each ending, `kwh` is what was measured in all. An exception of `run_job` is
    a defect: its job counts as lost, nothing starts any more, and `run` raises it when all has ended.
    """

    def __init__(
        self,
        core: Core,
        size: int,
        run_job: Callable[[Assigned], Ending],
        *,
        stop: threading.Event | None = None,
        stop_runs: Callable[[Sequence[str]], None] | None = None,
        watch: Callable[[SweepView], None] | None = None,
        on_turn: Callable[[], None] | None = None,
        kwh: Callable[[], float | None] | None = None,
        period: float = POLL,
    ) -> None:
        self._core, self._size, self._run_job = core, size, run_job
        self._stop, self._stop_runs, self._watch, self._on_turn = stop, stop_runs, watch, on_turn
        self._kwh, self._period = kwh, period
        self._jobs: queue.SimpleQueue[Assigned | None] = queue.SimpleQueue()
        self._endings: queue.SimpleQueue[tuple[int, Ending]] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._show_at = 0.0

    def run(self) -> None:
        """Until the sweep is over, or was stopped and nothing runs. Raises SweepTaken, and what the core raises."""
        threads = [
            threading.Thread(target=self._lane, name=f"sweep-job-{place}", daemon=True) for place in range(self._size)
        ]
        for thread in threads:
            thread.start()
        try:
            self._drive()
        finally:
            for _ in threads:
                self._jobs.put(None)
        if self._broken is not None:
            raise self._broken

    def _drive(self) -> None:
        core, busy, looked, is_stopped = self._core, 0, -self._period, False
        while True:
            now = time.monotonic()
            if self._stop is not None and self._stop.is_set() and not is_stopped:
                is_stopped = True
                core.stop("asked to stop")
                looked = now - self._period  # what runs hears of it now
            if now - looked >= self._period:
                self._look()
                looked = now
            while busy < self._size and (assigned := core.next_job()) is not None:
                self._jobs.put(assigned)
                busy += 1
            if not busy and core.is_over():
                return
            try:
                job, ending = self._endings.get(timeout=max(looked + self._period - time.monotonic(), 0.0))
            except queue.Empty:
                continue
            busy -= 1
            if self._broken is not None:
                core.stop(f"a defect: {self._broken}")
            core.ended(job, ending)
            self._turn()

    def _look(self) -> None:
        polled = self._core.poll()
        if polled.is_taken:
            raise SweepTaken(self._core.sweep, "another driver")
        if polled.stops and self._stop_runs is not None:
            self._stop_runs(polled.stops)
        said = self._core.spend(kwh=self._kwh() if self._kwh else None)
        if said:
            logger.warning("%s", said, extra={"sweep": self._core.sweep})
        now = time.monotonic()
        if self._watch is not None and now >= self._show_at:
            began = time.thread_time()
            self._watch(self._core.view())
            self._show_at = now + WATCH_SHARE * (time.thread_time() - began)
        self._turn()

    def _turn(self) -> None:
        if self._on_turn is not None:
            self._on_turn()

    def _lane(self) -> None:
        while (assigned := self._jobs.get()) is not None:
            try:
                ending = self._run_job(assigned)
            except BaseException as error:  # raised again by the thread that waits for it
                self._broken = self._broken or error
                ending = Ending(how=Ended.lost, reason=f"{type(error).__name__}: {error}")
            self._endings.put((assigned.job, ending))
