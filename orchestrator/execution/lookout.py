"""Looks after an attempt while it trains, and acts on what the watch finds: events, stacks of all ranks, the end of a
group that hangs, the wish that the run save and stop at its limit.

The driver calls `step` in its loop. What takes long, asking all ranks where they are, has a thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from orchestrator.execution import stacks
from orchestrator.execution.stacks import Dump
from orchestrator.execution.watch import Alarm, AlarmKind, Watch, ranks_of
from orchestrator.failures.classify import Evidence, FailureKind, Finding, first_cause
from orchestrator.records import RunTicket

logger = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks."""
AGAIN = 60.0
"""Seconds for which an attempt that cannot be judged, because nobody tells of it, is left alone."""
ENDING = 120.0
"""Seconds in which a place notices that its ranks were ended."""
PATIENCE = 3
"""Times that this is done."""
LOOKS, BETWEEN = 4, 2.0
"""Looks, and seconds from one to the next, at ranks that are at work in code of the user's: only then it shows whether
they move."""
MOVING = 5
"""Times its limit that an attempt gets whose ranks log nothing and move: an evaluation, an index that is built."""

_EVENTS = {
    AlarmKind.stall: "stall",
    AlarmKind.near_limit: "limit",
    AlarmKind.over_limit: "limit",
    AlarmKind.slow_rank: "slow-rank",
}


class Ranks(Protocol):
    """What can be done about the ranks of an attempt; a Place. Both may raise."""

    def stacks(self, ticket: RunTicket) -> Sequence[Dump]:
        """Where those that answer are, and those of whom only that is known that they do not. Takes seconds."""
        ...

    def end(self, ticket: RunTicket) -> None:
        """Kills them, so that `fit` raises."""
        ...


class Tell(Protocol):
    """Records an event of the run."""

    def __call__(self, kind: str, level: str, message: str, details: Mapping[str, Any]) -> None: ...


class Lookout:
    """Of one attempt. `live` asks the tracker ({}: no answer). `stop` is called when a limit is reached; `logs` is
    where stacks go, `saving` how many seconds a save may take."""

    def __init__(
        self,
        watch: Watch,
        ranks: Ranks,
        ticket: RunTicket,
        *,
        live: Callable[[], Mapping[str, Any]],
        logs: Path,
        saving: float,
        tell: Tell,
        stop: Callable[[Alarm], None],
    ) -> None:
        self._watch, self._ranks, self._ticket, self._logs, self._saving = watch, ranks, ticket, logs, saving
        self._live, self._tell, self._stop = live, tell, stop
        self._now = self._look_at = 0.0
        self._put_off = self._steps = 0
        self._seen: list[Sequence[Dump]] = []
        """Where the ranks were at each look since the standstill began, or since there was last a doubt."""
        self._asking: threading.Thread | None = None
        self._behind = 0
        self._step: int | None = None
        self.hang: Finding | None = None
        """Once the group is ended for it."""
        self._ended_at = 0.0
        self.files: tuple[str, ...] = ()
        """With the stacks of all ranks."""

    @property
    def is_overdue(self) -> bool:
        """The group was ended long ago, and its place has not noticed."""
        return self.hang is not None and self._now - self._ended_at > ENDING

    def step(self, now: float, *, is_quiet: bool) -> None:
        """One look, if it is time for one."""
        self._now = now
        if now < self._look_at or self.hang is not None:
            return
        self._look_at = now + LOOK
        ranks = ranks_of(self._live())
        if ranks:
            self._behind = min(ranks, key=lambda each: (each.time, each.rank)).rank
            self._step = max(each.step for each in ranks)
        for alarm in self._watch.step(now, ranks, is_quiet=is_quiet):
            self._heed(alarm)
        if self._watch.steps != self._steps:
            self._steps, self._put_off, self._seen = self._watch.steps, 0, []

    def _heed(self, alarm: Alarm) -> None:
        logger.warning("%s", alarm.what)
        if alarm.kind is AlarmKind.hang:
            self._asking = threading.Thread(target=self._ask, args=(alarm,), name="stacks", daemon=True)
            self._asking.start()
            return
        details = {**alarm.details, "rank": alarm.rank} if alarm.rank >= 0 else dict(alarm.details)
        words = alarm.what
        if alarm.kind is AlarmKind.over_limit:
            words += "; it saves and stops"
        self._tell(_EVENTS[alarm.kind], "warning", words, details)
        if alarm.kind is AlarmKind.over_limit:
            self._stop(alarm)

    # -- in a thread

    def _ask(self, alarm: Alarm) -> None:
        try:
            self._judge(alarm)
        except Exception:
            # Whatever it is, a group that hangs must not stay for it.
            logger.exception("the hanging ranks could not be looked into")
            self._end(alarm, [])
        finally:
            self._asking = None

    def _judge(self, alarm: Alarm) -> None:
        dumps = list(self._ranks.stacks(self._ticket))
        if not self._watch.is_hanging:
            logger.info("it goes on after all")
            return
        if why := self._doubt(dumps, alarm):
            self._put_off += 1
            logger.warning("%s, but %s: it gets %.0f s more", alarm.what, why, AGAIN)
            self._watch.put_off(self._now, AGAIN)
            self._seen = [dumps]
        elif len(self._seen) < LOOKS - 1 and stacks.at_work(dumps):
            self._watch.put_off(self._now, BETWEEN)
            self._seen.append(dumps)
        else:
            self._end(alarm, dumps)

    def _doubt(self, dumps: Sequence[Dump], alarm: Alarm) -> str:
        """Why this may be no hang; "" if it is one."""
        limit = float(alarm.details.get("limit", 0.0))
        if any(dump.why == stacks.HELD for dump in dumps):
            return "a debugger holds one of its ranks"
        if busy := next(filter(None, map(stacks.occupation, dumps)), ""):
            return busy if self._put_off * AGAIN < 2 * self._saving + limit else ""
        if moving := next(filter(None, (stacks.movement(before, dumps) for before in self._seen)), ""):
            return moving if self._put_off * AGAIN < MOVING * limit else ""
        if self._put_off >= PATIENCE:
            return ""
        if any(dump.is_late for dump in dumps):
            return "there are points that nobody has collected"
        return "" if dumps else "nobody tells where its ranks are"

    def _end(self, alarm: Alarm, dumps: Sequence[Dump]) -> None:
        where, files = "", []
        try:
            where = stacks.words(dumps, self._behind)
            files = stacks.write(self._logs, dumps, time.time())
        except OSError as error:
            logger.warning("the stacks could not be written: %s", error)
        self.files = tuple(str(file) for file in files)
        found = stacks.suspect(dumps, self._behind)
        hint = " ".join(filter(None, [where, f"All stacks: {self._logs}/rank-*.stack." if files else ""]))
        details = {**alarm.details, "stacks": list(self.files), "where": where}
        self._tell("hang", "error", f"{alarm.what}. {where}".strip(), details)
        evidence = Evidence(
            rank=self._behind if found is None else found.rank,
            type="Hang",
            message=alarm.what,
            host="" if found is None else found.host,
            traceback="" if found is None else _said(found),
            at=time.time(),
            step=self._step,
            kind=FailureKind.hang.value,
        )
        self._ended_at = self._now
        self.hang = replace(first_cause([evidence]), what=alarm.what, hint=hint)
        self._ranks.end(self._ticket)


def _said(dump: Dump) -> str:
    """The thread that runs the user's function, as the stored error has it: outermost first, like any traceback."""
    frames = stacks.working(dump.text)
    return "\n".join(f'  File "{each.file}", line {each.line}, in {each.function}' for each in reversed(frames))
