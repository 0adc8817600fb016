"""Whether a training still goes well: rules over single numbers as they are reported. Pure: numbers in, findings out.

Nothing here looks at a device or waits for one. A finding is told once, and again only after the rule had been content.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any, NamedTuple

from orchestrator.errors import OrchestratorError

_LOSS = ("loss", "perplexity")
"""What has one of these in its name is watched where no key is named."""


class Diverged(OrchestratorError):
    """The training went wrong. Raised by `run.report` on all ranks, without saving."""

    failure_kind = "diverged"

    def __init__(self, what: str, step: int, good: int, found: Mapping[str, Any] | None = None) -> None:
        super().__init__(what, step, good, found)
        self.what, self.step = what, step
        self.good = good
        """The last step at which all was well."""
        self.failure_details: Mapping[str, Any] = {"good_step": good, **(found or {})}
        """Part of the attempt's stored error; see `training.run.Run` for what is found."""

    def __str__(self) -> str:
        return f"{self.what} (step {self.step}; all was well at step {self.good})"


class Rule(StrEnum):
    finite = "finite"
    """The loss and the gradients are numbers."""
    divergence = "divergence"
    """The loss does not grow to a multiple."""
    gradients = "gradients"
    """The gradients do not explode."""
    memory = "memory"
    """The memory in use does not grow for ever."""


class Look(NamedTuple):
    """At the gradients, before a step of an optimizer."""

    norm: float
    step: int = 0
    """The run's step then."""
    place: tuple[int, ...] = ()
    """Where in the data the batch that made them ends."""


class Finding(NamedTuple):
    """Example: Finding(Rule.finite, "train/loss", "train/loss is nan")."""

    rule: Rule
    key: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRules:
    """What counts as going wrong."""

    losses: Sequence[str] = ()
    """Keys of reported metrics. Empty: all that have `loss` or `perplexity` in their names."""
    window: int = 5
    """Values whose mean is compared with the mean of as many before."""
    factor: float = 2.0
    """Of the earlier mean, beyond which the loss diverges."""
    explosion: float = 100.0
    """Of the median of the earlier gradient norms, beyond which they explode."""
    memory_share: float = 0.25
    """Growth of memory over the window, as a share of what there was, that is worth a word."""
    memory_bytes: int = 256 << 20
    """Less growth than this is none."""

    def is_loss(self, key: str) -> bool:
        return key in self.losses if self.losses else any(word in key.lower() for word in _LOSS)


class Divergence:
    """Mean of the last `window` values > `factor` times the mean of those before, once there are so many of both. Where
    the earlier mean is negative the distance counts: it grew by (factor - 1) of its size."""

    def __init__(self, window: int, factor: float, since: int = 0) -> None:
        """`since` is the step at which the training began or went on."""
        self._window, self._factor = window, factor
        self._values: deque[float] = deque(maxlen=2 * window)
        self._steps: deque[int] = deque([since], maxlen=2 * window + 1)

    @property
    def good(self) -> int:
        """The last step before the values that are compared: wherever among them it began, it had not by then."""
        return self._steps[0]

    def reported(self, value: float, step: int = 0) -> str:
        """The next value. Gives what is wrong, in words; '' for nothing. What is no number is left to others."""
        if not math.isfinite(value):
            return ""
        self._values.append(value)
        self._steps.append(step)
        if len(self._values) < 2 * self._window:
            return ""
        values = list(self._values)
        before, now = sum(values[: self._window]) / self._window, sum(values[self._window :]) / self._window
        if before == 0 or now - before <= (self._factor - 1) * abs(before):
            return ""
        return f"the mean of its last {self._window} values is {now:.4g}, of the {self._window} before {before:.4g}"


class Explosion:
    """Three norms in a row beyond `factor` times the median of up to 50 before them, of which there must be ten."""

    IN_A_ROW, LEAST, KEPT = 3, 10, 50

    def __init__(self, factor: float, since: int = 0) -> None:
        self._factor = factor
        self._calm: deque[float] = deque(maxlen=self.KEPT)
        self._beyond = 0
        self.good = since
        """The last step before which the gradients were as usual."""

    def reported(self, norm: float, step: int = 0) -> str:
        """The next norm, a finite one. Gives what is wrong, in words; '' for nothing."""
        usual = statistics.median(self._calm) if len(self._calm) >= self.LEAST else math.inf
        if norm <= self._factor * usual:
            self._calm.append(norm)
            self._beyond, self.good = 0, step
            return ""
        self._beyond += 1
        if self._beyond < self.IN_A_ROW:
            return ""
        return f"the gradients' norm is {norm:.4g}, usually {usual:.4g}"


class MemoryGrowth:
    """The memory in use rises steadily: by the median of the slopes between all pairs of the last `WINDOW` values (H.
    Theil, 1950; P. K. Sen, 1968), which a few peaks do not move, and in nine of ten pairs."""

    WINDOW = 20
    STEADY = 0.9

    def __init__(self, share: float, least: int) -> None:
        self._share, self._least = share, least
        self._values: deque[tuple[float, float]] = deque(maxlen=self.WINDOW)

    def reported(self, step: float, size: float) -> str:
        """Bytes in use at a step. Gives what is wrong, in words; '' for nothing."""
        self._values.append((step, size))
        if len(self._values) < self.WINDOW:
            return ""
        slopes = [(b - a) / (y - x) for (x, a), (y, b) in combinations(self._values, 2) if y > x]
        if not slopes or sum(slope > 0 for slope in slopes) < self.STEADY * len(slopes):
            return ""
        slope, (first, size_then) = statistics.median(slopes), self._values[0]
        grown = slope * (step - first)
        if grown < max(self._share * size_then, self._least):
            return ""
        return (
            f"the memory in use grew by {grown / 1e6:.0f} MB in {step - first:g} steps ({slope / 1e6:.3g} MB a step), "
            f"to {size / 1e6:.0f} MB"
        )


class Guards:
    """All rules over one training, on one rank."""

    def __init__(self, rules: GuardRules, since: int = 0) -> None:
        """`since` is the step at which the training began or went on: there all is taken to be well."""
        self._rules, self._since = rules, since
        self._losses: dict[str, Divergence] = {}
        self._explosion = Explosion(rules.explosion, since)
        self._memory = MemoryGrowth(rules.memory_share, rules.memory_bytes)
        self._is_loss: dict[str, bool] = {}
        self._standing: set[tuple[Rule, str]] = set()
        self._well = dict.fromkeys((Rule.finite, Rule.divergence, Rule.gradients), since)
        """The newest step at which nothing was wrong by that rule."""

    @property
    def good(self) -> int:
        """The newest step at which nothing was wrong with loss and gradients."""
        return min(self._well.values())

    def good_before(self, found: Iterable[Finding]) -> int:
        """The newest step at which what was found had not begun, as far as anybody can tell."""
        return min((self._good(rule, key) for rule, key, _ in found if rule in self._well), default=self.good)

    def vouched(self, rules: Collection[Rule]) -> int:
        """The newest step that none of these rules can find fault with any more, whatever comes."""
        known: list[tuple[Rule, str]] = [(rule, "") for rule in rules if rule in (Rule.finite, Rule.gradients)]
        known += [(Rule.divergence, key) for key in self._losses] if Rule.divergence in rules else []
        return min((self._good(rule, key) for rule, key in known), default=self._since)

    def _good(self, rule: Rule, key: str) -> int:
        if rule is Rule.divergence and key in self._losses:
            return self._losses[key].good
        return self._explosion.good if rule is Rule.gradients else self._well[rule]

    def reported(
        self, metrics: Mapping[str, float], step: int, *, looks: Sequence[Look] = (), memory: float | None = None
    ) -> list[Finding]:
        """What is wrong since this report. `looks` are those at the gradients since the last one, `memory` the bytes in
        use."""
        wrong = self._of_losses(metrics, step)
        if looks:
            wrong += self._of_gradients(looks)
        if memory is not None and (what := self._memory.reported(step, memory)):
            wrong.append(Finding(Rule.memory, "memory", what))
        if not wrong and not self._standing:
            self._well = dict.fromkeys(self._well, step)
            return wrong
        fresh = [each for each in wrong if (each.rule, each.key) not in self._standing]
        looked_at = {*metrics, *(["gradients"] if looks else []), *(["memory"] if memory is not None else [])}
        kept = {each for each in self._standing if each[1] not in looked_at}
        self._standing = kept | {(each.rule, each.key) for each in wrong}
        standing = {rule for rule, _ in self._standing}
        for rule in self._well:
            if rule not in standing:
                self._well[rule] = step
        return fresh

    def is_loss(self, key: str) -> bool:
        if (found := self._is_loss.get(key)) is None:
            found = self._is_loss[key] = self._rules.is_loss(key)
        return found

    def _of_losses(self, metrics: Mapping[str, float], step: int) -> list[Finding]:
        found = []
        for key, value in metrics.items():
            if not self.is_loss(key):
                continue
            if not math.isfinite(value):
                found.append(Finding(Rule.finite, key, f"{key} is {value}"))
                continue
            if (rule := self._losses.get(key)) is None:
                rule = self._losses[key] = Divergence(self._rules.window, self._rules.factor, self._since)
            if what := rule.reported(value, step):
                found.append(Finding(Rule.divergence, key, f"{key} diverges: {what}"))
        return found

    def _of_gradients(self, looks: Iterable[Look]) -> list[Finding]:
        found: dict[Rule, Finding] = {}
        for norm, step, _ in looks:
            if not math.isfinite(norm):
                found[Rule.finite] = Finding(Rule.finite, "gradients", f"the gradients' norm is {norm}")
            elif what := self._explosion.reported(norm, step):
                found[Rule.gradients] = Finding(Rule.gradients, "gradients", what)
        return list(found.values())
