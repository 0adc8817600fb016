"""What earlier runs and sweeps teach a new one: `sweep.warm_start`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.catalog import open_catalog
from orchestrator.catalog.questions import Catalog
from orchestrator.config import Direction, flatten
from orchestrator.config.settings import Score
from orchestrator.errors import NotFound
from orchestrator.records import RunStatus
from orchestrator.store.views import SummaryRow
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.template import Template
from orchestrator.sweeps.warm import TOLD, Earlier, Warm, warm, warmed

logger = logging.getLogger(__name__)

_AT_ONCE = 500
"""Runs whose metrics are asked for in one question."""


def warm_start(made: Template, space: Space, home: Path | None) -> Warm:
    """Writes what is known into the sweep's settings, where a sweep that is resumed finds the same. Raises NotFound for
    a run or sweep that there is not, AmbiguousName for one of several."""
    settings = made.base.settings
    sweep = settings.sweep
    if not sweep.warm_start:
        return Warm()
    objectives = sweep.objectives
    if not objectives and settings.checkpoints.best_metric:
        objectives = [(settings.checkpoints.best_metric, settings.checkpoints.best_direction)]
    with open_catalog(home) as catalog:
        found = warm(earlier(catalog, sweep.warm_start, objectives, sweep.score), space, objectives)
    after = warmed(sweep, found)
    made.settle(after)
    found = replace(
        found,
        points=len(after.points) - len(sweep.points),
        told=len(after.searcher_args.get(TOLD, ())) - len(sweep.searcher_args.get(TOLD, ())),
    )
    left_out = ", ".join(f"{count} ({why})" for why, count in found.left_out.items())
    logger.info("%d earlier results are known; left out: %s", len(found.known), left_out or "none")
    return found


def earlier(
    catalog: Catalog, references: Sequence[str], objectives: Sequence[tuple[str, Direction]], score: Score
) -> Iterator[Earlier]:
    """The runs that are named, and the trials of the sweeps that are named."""
    known: dict[str, tuple[Mapping[str, Any], bool]] = {}
    for reference in references:
        try:
            sweep = catalog.sweep(reference).sweep
        except NotFound:
            run = catalog.run(reference)
            known[run.run] = (flatten(run.config), run.status is RunStatus.finished)
            continue
        config = flatten(catalog.run(sweep).config)
        for trial in catalog.trials(sweep):
            if trial.run:
                known[trial.run] = ({**config, **trial.values}, trial.status == "complete")
    runs = list(known)
    metrics: dict[str, dict[str, SummaryRow]] = {}
    for begin in range(0, len(runs), _AT_ONCE):
        for row in catalog.summaries(*runs[begin : begin + _AT_ONCE]):
            if row.rank == 0:
                metrics.setdefault(row.run, {})[row.key] = row
    for run_id, (params, is_complete) in known.items():
        rows = metrics.get(run_id, {})
        values = {metric: _value(rows[metric], way, score) for metric, way in objectives if metric in rows}
        yield Earlier(run=run_id, params=params, metrics=values, is_complete=is_complete)


def _value(row: SummaryRow, direction: Direction, score: Score) -> float | None:
    if score is Score.last:
        return row.last
    return row.minimum if direction is Direction.min else row.maximum
