"""When a training ends early by itself: rules that look at one metric, report by report. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.checkpoints.manifest import finite
from orchestrator.checkpoints.policy import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRules:
    """The settings of `stopping`. Patience as Keras' EarlyStopping has it (Prechelt: Early Stopping - But When?, 1998,
    the UP criterion counted in reports), the plateau as Ray Tune's TrialPlateauStopper."""

    metric: str = ""
    """Empty: the judge's first objective, with its direction."""
    direction: str = Direction.min
    patience: int = 0
    """Ends after so many reports of the metric in a row without a better one; 0: never."""
    min_delta: float = 0.0
    """By how much a value must be better to count as such."""
    plateau: int = 0
    """Ends where the standard deviation of the last so many values is at most `plateau_std`; 0: never."""
    plateau_std: float = 0.0
    target: float | None = None
    divergence: bool = False
    """Ends at NaN and infinities."""
    grace: int = 0
    """The first so many reports of the metric end nothing; they count all the same."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> StopRules:
        """From the section `stopping` as a mapping; what it has besides is left out."""
        return cls(**{each.name: settings[each.name] for each in fields(cls) if each.name in settings})

    @property
    def is_active(self) -> bool:
        return bool(self.patience or self.plateau or self.target is not None or self.divergence)


@dataclass(slots=True, kw_only=True)
class Stopping:
    """The rules applied to one training. `state` holds all that the next report depends on."""

    rules: StopRules
    metric: str
    direction: str
    n: int = 0
    """Reports of the metric."""
    best: float = math.nan
    best_at: int = 0
    """The number of the report that had it, from 1."""
    window: list[float] = field(default_factory=list)
    """The last values, as many as the plateau looks at."""

    def reported(self, value: float) -> str:
        """The metric's next value. Gives the reason to end, in words; "" for none."""
        rules = self.rules
        self.n += 1
        if math.isfinite(value) and (math.isnan(self.best) or self._gain(value) > rules.min_delta):
            self.best, self.best_at = value, self.n
        if rules.plateau:
            self.window.append(value)
            del self.window[: -rules.plateau]
        return self._reason(value) if self.n > rules.grace else ""

    def _gain(self, value: float) -> float:
        return value - self.best if self.direction == Direction.max else self.best - value

    def _reason(self, value: float) -> str:
        rules = self.rules
        if rules.divergence and not math.isfinite(value):
            return f"{self.metric} diverged: it is {value}"
        if rules.target is not None and (
            value >= rules.target if self.direction == Direction.max else value <= rules.target
        ):
            return f"{self.metric} reached {value:g}, the target is {rules.target:g}"
        if rules.patience and self.n - self.best_at >= rules.patience:
            best = f"the best is {self.best:g}" if self.best_at else "there was none"
            return f"no better {self.metric} in {self.n - self.best_at} reports: {best}"
        if rules.plateau and len(self.window) == rules.plateau and all(map(math.isfinite, self.window)):
            spread = statistics.pstdev(self.window)
            if spread <= rules.plateau_std:
                return f"{self.metric} hardly changed in {rules.plateau} reports: its standard deviation is {spread:g}"
        return ""

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {
            "n": self.n, **finite({"best": self.best}), "best_at": self.best_at, "window": plain(self.window),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.n, self.best, self.best_at = state["n"], float(state["best"]), state["best_at"]
        self.window = [float(value) for value in state["window"]]
        del self.window[: max(len(self.window) - self.rules.plateau, 0)]


def plain(values: Sequence[float]) -> list[float | str]:
    """As JSON has them, which knows no NaN and no infinity: those as text that `float` reads."""
    return [value if math.isfinite(value) else str(value) for value in values]
