"""What a sweep may learn from earlier runs before its first trial. Values in, values out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.config.settings import Direction, SweepConfig
from orchestrator.sweeps.space import Space

MOST = 1000
"""Earlier runs that are told to a searcher, the best of them."""
MOST_POINTS = 5
"""Of a searcher that learns nothing so many of the best are tried again."""
TOLD = "told"
"""In `sweep.searcher_args`: what a library's searcher begins with, as [[values, scores], …]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """A run that ended. Example: Earlier(run="r1", params={"optim.lr": 0.1}, metrics={"val/loss": 0.3})."""

    run: str
    params: Mapping[str, Any]
    """Dotted key -> value, of the whole configuration."""
    metrics: Mapping[str, float | None]
    """The value of each metric that counts: the best or the last."""
    is_complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """What of it can be used."""

    known: Sequence[tuple[Mapping[str, Any], Sequence[float]]] = ()
    """(values, one score per objective), the best by the first objective first."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why -> how many."""
    points: int = 0
    """How many of them are tried again."""
    told: int = 0
    """How many the searcher begins with."""


def warm(earlier: Iterable[Earlier], space: Space, objectives: Sequence[tuple[str, Direction]]) -> Warm:
    """Those whose values lie in the space and that have a score for every objective. Without objectives there are none:
    which metric counts is not known before the first report."""
    found: list[tuple[Mapping[str, Any], Sequence[float]]] = []
    left_out: Counter[str] = Counter()
    for run in earlier:
        values = space.active({key: run.params[key] for key in _keys(space) if key in run.params})
        scores = [run.metrics.get(metric) for metric, _ in objectives]
        numbers = [score for score in scores if score is not None and math.isfinite(score)]
        why = space.contains(values)
        if not run.is_complete:
            left_out["did not finish"] += 1
        elif not objectives:
            left_out["no objective is named (sweep.objective)"] += 1
        elif len(numbers) < len(objectives):
            left_out[f"no value of {', '.join(metric for metric, _ in objectives)}"] += 1
        elif why:
            left_out[f"outside the space: {why}"] += 1
        else:
            found.append((values, numbers))
    if objectives:
        sign = -1 if objectives[0][1] == Direction.max else 1
        found.sort(key=lambda pair: sign * pair[1][0])
    if len(found) > MOST:
        left_out[f"more than {MOST}"] += len(found) - MOST
    return Warm(known=tuple(found[:MOST]), left_out=dict(left_out))


def warmed(settings: SweepConfig, known: Warm) -> SweepConfig:
    """The settings with what is known written into them, so that a sweep that is resumed begins with the same.

    Searchers that learn are told; of the others the best are tried first, after the user's own points."""
    if not known.known:
        return settings
    if settings.searcher == "optuna" or settings.searcher.startswith("tune:"):
        told = [[dict(values), list(scores)] for values, scores in known.known]
        return replace(settings, searcher_args={**settings.searcher_args, TOLD: told})
    room = MOST_POINTS
    if settings.scheduler == "pbt":
        room = min(room, (settings.pbt.population or settings.samples) - len(settings.points))
    more = [dict(values) for values, _ in known.known[: max(room, 0)]]
    return replace(settings, points=[*settings.points, *more])


def _keys(space: Space) -> list[str]:
    return [each.key for each in space.dimensions]
