"""What a sweep has used, and what it may use.

`gpu_hours` and `cpu_hours` are what its jobs held, used or not, from the start of a job to its end; `hours` is the
wall-clock of all drivers together; `kwh` is what somebody measured. Money follows from the prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.config.settings import BudgetConfig, PricesConfig

NAMES = ("hours", "gpu_hours", "cpu_hours", "money", "kwh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit, and how much of it is used."""

    name: str
    used: float
    of: float
    unit: str

    @property
    def share(self) -> float:
        return self.used / self.of

    def __str__(self) -> str:
        return f"budget: {self.used:.3g} of {self.of:g} {self.unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """What one job holds while it runs."""

    cpus: float = 1.0
    gpus: float = 0.0

    def used(self, seconds: float) -> dict[str, float]:
        return {"gpu_hours": seconds * self.gpus / 3600, "cpu_hours": seconds * self.cpus / 3600}

    def seconds(self, spent: Mapping[str, float]) -> float:
        """In which jobs that hold this have used so much: `used` the other way round."""
        if self.cpus:
            return 3600 * float(spent.get("cpu_hours", 0.0)) / self.cpus
        return 3600 * float(spent.get("gpu_hours", 0.0)) / self.gpus if self.gpus else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What jobs hold and what they took: all that an estimate of the rest is made of."""

    gang: Gang
    at_once: int = 0
    """Jobs at the same time; 0: not known."""
    lane_seconds: float = 0.0
    """Of all jobs that have ended."""
    prices: PricesConfig = field(default_factory=PricesConfig)


def added(spent: Mapping[str, float], more: Mapping[str, float], prices: PricesConfig) -> dict[str, float]:
    """The sum of both. `money` is made of the GPU and CPU hours in it by the prices."""
    found = {name: float(spent.get(name, 0.0)) + float(more.get(name, 0.0)) for name in NAMES}
    found["money"] = found["gpu_hours"] * prices.gpu_hour + found["cpu_hours"] * prices.cpu_hour
    return found


def limits(spent: Mapping[str, float], budget: BudgetConfig, prices: PricesConfig) -> list[Limit]:
    """Those that are set, the one that is nearest to its end first."""
    units = {"hours": "hours", "gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours", "money": prices.currency}
    found = [
        Limit(name=name, used=float(spent.get(name, 0.0)), of=getattr(budget, name), unit=units.get(name, "kWh"))
        for name in NAMES
        if getattr(budget, name) > 0
    ]
    return sorted(found, key=lambda limit: -limit.share)


def used_up(spent: Mapping[str, float], budget: BudgetConfig, prices: PricesConfig) -> Limit | None:
    """The limit that is reached, if one is."""
    return next((limit for limit in limits(spent, budget, prices) if limit.used >= limit.of), None)


def nearly(spent: Mapping[str, float], budget: BudgetConfig, prices: PricesConfig) -> list[Limit]:
    """The limits of which so much is used that it is worth a warning."""
    return [limit for limit in limits(spent, budget, prices) if limit.share >= budget.warn]
