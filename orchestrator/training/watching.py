"""The guards of one rank at work: what they look at, whom they tell, and which of their findings end the attempt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.clock import Clock
from orchestrator.training.gradients import GradientNorms
from orchestrator.training.guards import Finding, GuardRules, Guards, Rule

MEMORY_PAUSE = 15.0
"""Seconds between two looks at the memory in use: a leak shows over minutes, what fills up at the start does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is watched for. Survives JSON."""

    warns: tuple[str, ...] = ()
    """Rules whose findings are told, see `guards.Rule`."""
    fails: tuple[str, ...] = ()
    """Rules whose findings end the attempt."""
    losses: tuple[str, ...] = ()
    """Keys of reported metrics; empty: those that are named like a loss."""
    every: int = 50
    """Optimizer steps between two looks at the gradients; 0: none."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Watch | None:
        """From a plan; None where nothing is watched for."""
        values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in told.items()}
        watch = cls(**values)
        return watch if watch.warns or watch.fails else None


class Watching:
    """Made for every rank; `reported` is called on one of them. `tell` records a finding, `memory` gives the bytes in
    use without waiting for a device."""

    def __init__(
        self, watch: Watch, tell: Callable[[Finding], None], memory: Callable[[], float], clock: Clock
    ) -> None:
        self._watch, self._tell, self._memory, self._clock = watch, tell, memory, clock
        self._memory_at = -math.inf
        self._rules = frozenset(Rule(name) for name in (*watch.warns, *watch.fails))
        self._guards = Guards(GuardRules(losses=watch.losses))
        looks = watch.every and self._rules & {Rule.finite, Rule.gradients}
        self._norms = GradientNorms(watch.every) if looks else None

    @property
    def good(self) -> int:
        """The last step at which all was well."""
        return self._guards.good

    def optimizers(self, *things: Any) -> None:
        """Optimizers, or dicts of them, whose gradients are looked at."""
        if self._norms is not None:
            self._norms.watch(*things)

    def reported(self, metrics: Mapping[str, float], step: int) -> str:
        """At a report. Gives why the attempt is to end, in words; '' if it may go on."""
        norms = self._norms.take() if self._norms is not None else []
        fresh = self._guards.reported(metrics, step, norms=norms, memory=self._memory_if_due())
        mine = [finding for finding in fresh if finding.rule in self._rules]
        for finding in mine:
            self._tell(finding)
        return "; ".join(finding.what for finding in mine if finding.rule in self._watch.fails)

    def _memory_if_due(self) -> float | None:
        now = self._clock.monotonic()
        if Rule.memory not in self._rules or now < self._memory_at + MEMORY_PAUSE:
            return None
        self._memory_at = now
        return self._memory()
