"""From the settings of a sweep to what its schedulers are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.config.names import did_you_mean
from orchestrator.config.settings import Resource, Score, SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.sweeps.asha import AshaScheduler, milestones
from orchestrator.sweeps.fifo import Fifo
from orchestrator.sweeps.median import MedianStopping
from orchestrator.sweeps.population import PopulationScheduler, checked
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.state import Asha, Direction, Median, Population, Scheduler, Settings, Tune
from orchestrator.tracking.live import planned

NAMES = ("fifo", "asha", "median", "pbt")
"""Ours; `tune:NAME` names one of Tune's."""
TUNE = "tune:"
CHANGING = ("pbt", "tune:pbt", "tune:pb2")
"""Those that change a trial's values while it trains."""


class Library(Protocol):
    """Makes the schedulers that need a library: `tune:NAME`."""

    def __call__(self, settings: SweepConfig, space: Space) -> Scheduler:
        """Raises ConfigError for what there is not, or what it does not take."""
        ...


def scheduler_for(settings: SweepConfig, space: Space, *, library: Library | None = None) -> Scheduler:
    """Raises ConfigError for a name that nobody knows, and for `tune:NAME` where no library makes it."""
    match settings.scheduler:
        case "fifo":
            return Fifo()
        case "asha":
            return AshaScheduler()
        case "median":
            return MedianStopping()
        case "pbt":
            return PopulationScheduler(space)
    if settings.scheduler.startswith(TUNE):
        if library is None:
            raise ConfigError("sweep.scheduler", settings.scheduler, "needs Ray Tune, and this place has none.")
        return library(settings, space)
    near = did_you_mean(settings.scheduler, NAMES) or f"There are {', '.join(NAMES)}, and tune:NAME."
    raise ConfigError("sweep.scheduler", settings.scheduler, "there is no such scheduler.", near)


def rules_for(settings: SweepConfig, *, samples: int, seed: int, params: Mapping[str, Any]) -> Settings:
    """What the schedulers are told at the start. `samples` is the number of trials in all; `params` are those of the
    base configuration, which say where a train function ends by itself. Raises ConfigError where that is not to be
    found, or no rungs can be made."""
    found = Settings(
        samples=samples,
        seed=seed,
        direction=Direction(settings.objectives[0][1].value) if settings.objectives else Direction.min,
        repeats=settings.seeds,
        median=Median(grace=settings.median.grace, trials=settings.median.trials, every=settings.median.every),
    )
    if settings.scheduler == "asha":
        rule = settings.asha
        most = rule.max or own_end("sweep.asha.max", settings, params)
        rungs = milestones(rule.min, max(most, rule.min), rule.reduction)
        return dataclasses.replace(found, asha=Asha(milestones=rungs, reduction=rule.reduction, is_open=not rule.max))
    if settings.scheduler == "pbt":
        pbt = settings.pbt
        population = Population(
            interval=pbt.interval, max=pbt.max or own_end("sweep.pbt.max", settings, params), is_open=not pbt.max,
            quantile=pbt.quantile, resample=pbt.resample, factors=tuple(pbt.factors), is_sync=pbt.sync,
            mutate=tuple(pbt.mutate),
        )  # fmt: skip
        return dataclasses.replace(found, population=checked(population, samples))
    if settings.scheduler.startswith(TUNE):
        if settings.seeds > 1:
            why = f"{settings.scheduler} knows one run per trial."
            raise ConfigError("sweep.seeds", settings.seeds, why, "Use sweep.seeds=1, or a scheduler of ours.")
        steps, epochs = planned(params)
        end = {Resource.step: steps, Resource.report: 0}.get(settings.resource, epochs)
        return dataclasses.replace(found, tune=Tune(name=settings.scheduler, max=float(end or 0)))
    return found


def own_end(key: str, settings: SweepConfig, params: Mapping[str, Any]) -> float:
    """Where the train function ends by itself, by what its configuration calls epochs or steps. ConfigError for `key`
    if it does not say so."""
    steps, epochs = planned(params)
    found = steps if settings.resource == Resource.step else epochs
    if settings.resource == Resource.report or not found:
        unit = "steps" if settings.resource == Resource.step else "epochs"
        why = f"the configuration does not say how many {unit} there are (a key like `{unit}: 10`)."
        raise ConfigError(key, 0, why, f"Give {key}.")
    return float(found)


def score_of(settings: SweepConfig) -> Score:
    """Which value of a job's reports counts. Where jobs end at milestones it is the one there."""
    is_last = settings.scheduler in ("asha", "pbt") or settings.scheduler.startswith(TUNE)
    return Score.last if is_last else settings.score


def to_json(rules: Settings) -> dict[str, Any]:
    return dataclasses.asdict(rules)


def from_json(raw: Mapping[str, Any]) -> Settings:
    asha, population, tune = raw["asha"], raw["population"], raw.get("tune")
    return Settings(
        **{
            **raw,
            "direction": Direction(raw["direction"]),
            "median": Median(**raw["median"]),
            "asha": Asha(**{**asha, "milestones": tuple(asha["milestones"])}) if asha else None,
            "population": Population(
                **{**population, "factors": tuple(population["factors"]), "mutate": tuple(population["mutate"])}
            )
            if population
            else None,
            "tune": Tune(**tune) if tune else None,
        }
    )
