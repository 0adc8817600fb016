"""Whether the ranks of an attempt shall go on elsewhere, or with more of them, or begin with fewer: what the driver
asks of the place while it waits. In a thread of its own, because a cluster that does not answer may keep who asks it
waiting.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestrator.config import Settings
from orchestrator.execution.place import Place
from orchestrator.execution.sizing import LOOKS, Growth
from orchestrator.tracking.live import planned

logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two looks for nodes that are taken away, and for what is left while the ranks wait for room."""


class Purpose(StrEnum):
    """Why an attempt ends, where the run is to go on."""

    leave = "preemption"
    """Nodes of theirs are taken away."""
    resize = "resize"
    """There is room for more of them; or for fewer, where they still wait for theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Why an attempt is ended so that the next one can begin."""

    purpose: Purpose
    why: str
    deadline: float = math.inf
    """When the nodes are gone, in seconds since 1970."""
    has_begun: bool = True
    """There are ranks, which save first."""

    def error(self, step: int | None) -> dict[str, Any]:
        """What is stored of the attempt."""
        words = {"type": "Moved", "kind": self.purpose.value, "what": self.why, "message": self.why}
        return {**words, "rank": -1, "step": step}


class Surroundings:
    """Looks around during `place.fit`. `workers` train now; `avoid` are nodes that shall not count. `live` gives the
    run's newest values."""

    def __init__(
        self, place: Place, settings: Settings, *, workers: int, avoid: Collection[str],
        params: Mapping[str, Any], live: Callable[[], Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self._place, self._settings, self._avoid = place, settings, avoid
        self._params, self._live = params, live
        self._can_grow = workers < settings.resources.workers and can_grow(settings)
        self._can_shrink = 0 < settings.resources.min_workers < workers
        self._workers = workers
        self._fewer_seen = 0
        self._growth: Growth | None = None
        self._look_at = 0.0
        self._over = threading.Event()
        self._is_told = False
        self.move: Move | None = None
        """Once there is a reason for one."""

    def start(self) -> None:
        threading.Thread(target=self._run, name="surroundings", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(PAUSE):
            try:
                self.step(time.monotonic())
            except Exception:
                if not self._is_told:
                    logger.warning("the cluster does not tell how it stands; trying again", exc_info=True)
                self._is_told = True

    def step(self, now: float) -> None:
        """A notice goes before a growth that was begun: it may have a deadline."""
        waits = self._can_shrink and bool(self._place.waits_for())
        if self.move is not None and not self.move.has_begun and not waits:
            self.move = None  # the room came after all
        if self.move is None or self.move.purpose is Purpose.resize:
            notice = self._place.notice()
            if notice is not None:
                self.move = Move(purpose=Purpose.leave, why=notice.why, deadline=notice.deadline)
        if self.move is None and waits:
            self._shrink()
        elif self.move is None and self._can_grow:
            self._grow(now)

    def _grow(self, now: float) -> None:
        if now < self._look_at:
            return
        live = self._live()
        if not live.get("metrics"):
            return  # not training yet
        rules = self._settings.elastic
        self._look_at = now + rules.look
        if self._growth is None:
            self._growth = Growth(every=rules.every, current=self._workers, since=now)
        room = self._place.room(self._settings.resources, self._avoid)
        logger.debug("there is room for %d workers, %d train", room.workers, self._workers)
        if self._growth.look(room.workers, now=now, share=share_done(self._params, live)):
            wanted = self._settings.resources.workers
            why = f"there is room for {room.workers} of {wanted} workers now, instead of {self._workers}"
            self.move = Move(purpose=Purpose.resize, why=why)

    def _shrink(self) -> None:
        """Others took the room between the look at it and now: several runs that begin at once see the same."""
        wanted = self._settings.resources
        room = self._place.room(wanted, self._avoid).workers
        self._fewer_seen = self._fewer_seen + 1 if wanted.min_workers <= room < self._workers else 0
        if self._fewer_seen >= LOOKS:
            why = f"there is room for {room} of {wanted.workers} workers now, not for {self._workers}"
            self.move = Move(purpose=Purpose.resize, why=why, has_begun=False)


def can_grow(settings: Settings) -> bool:
    """An attempt that is ended for more workers must save first, and must be allowed to be followed by another."""
    may_go_on = settings.failures.max_preemptions != 0
    return settings.resources.min_workers > 0 and settings.checkpoints.on_stop and may_go_on


def share_done(params: Mapping[str, Any], live: Mapping[str, Any]) -> float | None:
    """How much of the training is done, by the keys that say how long it is; None: they do not, or cannot mean that."""
    steps, epochs = planned(params)
    epoch = live.get("metrics", {}).get("epoch", {}).get("value")
    if epochs:  # beside it, steps may be those of an epoch
        return epoch / epochs if epoch is not None and math.isfinite(epoch) else None
    share = live.get("step", 0) / steps if steps else None
    return share if share is not None and share <= 1 else None
