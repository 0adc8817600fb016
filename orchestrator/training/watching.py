"""The guards of one rank at work: what they look at, whom they tell, and which of their findings end the attempt."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.clock import Clock
from orchestrator.training.gradients import GradientNorms
from orchestrator.training.guards import Finding, GuardRules, Guards, Look, Rule

MEMORY_PAUSE = 15.0
"""Seconds between two looks at the memory in use: a leak shows over minutes, what fills up at the start does not."""
GRADIENTS_PAUSE = 0.2
"""Seconds between two looks at the gradients, if not each step's are looked at: a look costs a tenth of a millisecond,
which is more than nothing where steps take one."""
REMEMBERED = 512
"""Reports and looks of which is known where in the data they were."""

_NEVER = 1 << 62
Place = tuple[int, ...]
"""Epoch, pass, and samples used of it: where in the data a training is; () where nobody knows."""


class Wrong(NamedTuple):
    """Why the attempt is to end."""

    what: str
    good: int
    """The last step at which it had not begun."""
    is_rollback: bool
    """Whether another attempt is to go on from before it."""
    last: Place = ()
    """Where in the data it had begun; () where nobody knows."""
    is_seen_in_gradients: bool = False
    """Whether gradients that looked well vouch for all before them."""


class _Trail(NamedTuple):
    """Where all was well."""

    step: int
    place: Place
    is_look: bool
    """At gradients, which are those of all ranks; else the report of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is watched for. Survives JSON."""

    warns: tuple[str, ...] = ()
    """Rules whose findings are told, see `guards.Rule`."""
    fails: tuple[str, ...] = ()
    """Rules whose findings end the attempt."""
    rolls: tuple[str, ...] = ()
    """Those among them after which another attempt goes on from before it began."""
    losses: tuple[str, ...] = ()
    """Keys of reported metrics; empty: those that are named like a loss."""
    every: int = 50
    """Optimizer steps between two looks at the gradients, at least; 0: none."""
    close_until: int = 0
    """Up to this step the gradients of each step are looked at and waited for: there an attempt before went wrong, and
    nobody knows at which batch."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Watch | None:
        """From a plan; None where nothing is watched for."""
        values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in told.items()}
        watch = cls(**values)
        return watch if watch.warns or watch.fails else None


class Watching:
    """Made for every rank. Rank 0 calls `reported`; the others, who are not asked, may call `heard`. `tell` records a
    finding, `memory` gives the bytes in use without waiting for a device, `where` step and place of the run."""

    def __init__(
        self,
        watch: Watch,
        tell: Callable[[Finding], None],
        memory: Callable[[], float],
        clock: Clock,
        where: Callable[[], tuple[int, Place]] = lambda: (0, ()),
    ) -> None:
        self._watch, self._tell, self._memory, self._clock, self._where = watch, tell, memory, clock, where
        self._memory_at = -math.inf
        self._rules = frozenset(Rule(name) for name in (*watch.warns, *watch.fails))
        self._fails = frozenset(map(Rule, watch.fails))
        self._guards = Guards(GuardRules(losses=watch.losses))
        looks = (watch.every or watch.close_until) and self._rules & {Rule.finite, Rule.gradients}
        every = 1 if watch.close_until else watch.every
        self._norms = GradientNorms(every, where, GRADIENTS_PAUSE, clock.monotonic) if looks else None
        self._is_close = watch.close_until > 0
        self._trail: deque[_Trail] = deque(maxlen=REMEMBERED)
        self._own = GuardRules(losses=watch.losses)
        self._own_good, self._own_bad = 0, _NEVER

    @property
    def must_be_finite(self) -> bool:
        """Whether weights that are no numbers are to end the attempt."""
        return Rule.finite in self._fails

    @property
    def vouched(self) -> int:
        """The newest step that no rule which ends the attempt can find fault with any more; -1 where none does."""
        return self._guards.vouched(self._fails) if self._fails else -1

    @property
    def own(self) -> tuple[int, int]:
        """Of the losses of this very rank: the last step at which none was nan or infinite, and the first one after it
        at which one was."""
        return self._own_good, self._own_bad

    def begins(self) -> None:
        """The training begins or goes on here, and all is taken to be well."""
        step, place = self._where()
        self._guards = Guards(self._own, since=step)
        self._own_good, self._own_bad = step, _NEVER
        self._trail.clear()
        self._trail.append(_Trail(step, place, False))

    def optimizers(self, *things: Any) -> None:
        """Optimizers, or dicts of them, whose gradients are looked at."""
        if self._norms is not None:
            self._norms.watch(*things)

    def heard(self, metrics: Mapping[str, float], step: int) -> None:
        """At a report of a rank whose numbers do not count."""
        if not self._fails:
            return
        for key, value in metrics.items():
            if not math.isfinite(value) and self._guards.is_loss(key):
                self._own_bad = min(self._own_bad, step)
                return
        self._own_good, self._own_bad = step, _NEVER

    def reported(self, metrics: Mapping[str, float], step: int) -> Wrong | None:
        """At a report. Gives why the attempt is to end; None if it may go on."""
        looks = self._norms.take(wait=self._is_close) if self._norms is not None else []
        fresh = self._guards.reported(metrics, step, looks=looks, memory=self._memory_if_due())
        self.heard(metrics, step)
        if fresh:
            mine = [finding for finding in fresh if finding.rule in self._rules]
            for finding in mine:
                self._tell(finding)
            if fatal := [finding for finding in mine if finding.rule in self._fails]:
                return self._wrong(fatal, looks)
        if self._fails:
            if looks:
                self._trail.extend(_Trail(each.step, each.place, True) for each in looks)
            self._trail.append(_Trail(step, self._where()[1], False))
        if self._is_close and step > self._watch.close_until and self._norms is not None:
            self._is_close, self._norms.every = False, self._watch.every
        return None

    def spoilt(self, what: str) -> Wrong:
        """The weights are found to be no numbers, at a step whose report looked well."""
        if len(self._trail) > 1:
            self._trail.pop()  # that report
        finding = Finding(Rule.finite, "weights", what)
        self._tell(finding)
        return self._wrong([finding], [], good=max((each.step for each in self._trail), default=0))

    def window(self, wrong: Wrong, good: int, bad: int) -> tuple[Place, Place]:
        """Behind which place in the data it began, and where it had begun, when the ranks vouch for no more than step
        `good` and one of them had seen it at step `bad`; () where nobody knows."""
        last = min([wrong.last, *(each.place for each in self._trail if not each.is_look and each.step == bad)])
        places = [
            each.place
            for each in self._trail
            if (each.step <= good or (each.is_look and wrong.is_seen_in_gradients)) and each.place < last
        ]
        return max(places, default=()), last

    def _wrong(self, fatal: list[Finding], looks: list[Look], good: int | None = None) -> Wrong:
        """What is no number in the gradients stays so: they tell exactly where it began. The rest began at some step
        that reports tell."""
        good = self._guards.good_before(fatal) if good is None else good
        last = self._where()[1]
        are_no_numbers = all(finding.rule is Rule.finite for finding in fatal)
        if are_no_numbers:
            for look in looks:
                if not math.isfinite(look.norm):
                    last = look.place
                    break
                self._trail.append(_Trail(look.step, look.place, True))
        rolls = frozenset(map(Rule, self._watch.rolls))
        return Wrong(
            "; ".join(finding.what for finding in fatal), good,
            is_rollback=all(finding.rule in rolls for finding in fatal),
            last=last, is_seen_in_gradients=are_no_numbers,
        )  # fmt: skip

    def _memory_if_due(self) -> float | None:
        now = self._clock.monotonic()
        if Rule.memory not in self._rules or now < self._memory_at + MEMORY_PAUSE:
            return None
        self._memory_at = now
        return self._memory()
