"""Gives a sweep finished trials without training them: `finished.py HOME SWEEP`. The core, the tracker and the database
do all that they do for real ones; only the place where a job runs answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from orchestrator.catalog import open_catalog
from orchestrator.config import Settings
from orchestrator.execution.on_ray import OnRay
from orchestrator.execution.sweep_api import run_sweep
from orchestrator.execution.worker import DONE, Plan, Returned
from orchestrator.stack import Stack
from orchestrator.sweeps.template import template

TALLY = {
    "objectives": [["score", "max"]], "unit": "report", "resource": 1.0, "last": {"score": 0.5}, "best": {"score": 0.5},
    "reports": [[1.0, 0.5]], "n_reports": 1, "has_state": False, "verdict": "go", "reason": "", "compared": {},
    "checkpoint": {},
}  # fmt: skip


class AtOnce:
    """A Place whose trials have ended as soon as they begin. Not called `ray`: jobs would then come on lanes."""

    name = "local"

    def __init__(self, stack: Stack) -> None:
        self._inner = OnRay(stack)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fit(self, plan: Plan, settings: Settings) -> Returned:
        return Returned(how=DONE, tally=TALLY)


def main() -> None:
    home, sweep = Path(sys.argv[1]), sys.argv[2]
    with open_catalog(home) as catalog:
        config = catalog.sweep(sweep).run.config
    made, space = template((), base=config, keeps_sweep=True)
    outcome = run_sweep(made, space, home=home, run=sweep, open_place=AtOnce)
    if outcome.error:
        sys.exit(f"{outcome.error}")


if __name__ == "__main__":
    main()
