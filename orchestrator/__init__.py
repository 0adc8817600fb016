"""Experiment orchestrator for PyTorch on Ray.

    import orchestrator

    with orchestrator.start_run(experiment="digits", params={"lr": 0.1}) as run:
        run.log({"loss": 0.5})

Everything here is loaded when it is first used: the import alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.catalog import open_catalog as open_catalog
    from orchestrator.catalog.metrics import metrics as metrics
    from orchestrator.checkpoints.load import load_checkpoint as load_checkpoint
    from orchestrator.errors import OrchestratorError as OrchestratorError
    from orchestrator.errors import UserError as UserError
    from orchestrator.execution.script import start_run as start_run
    from orchestrator.execution.script_callbacks import TrainCallback as TrainCallback
    from orchestrator.execution.script_callbacks import TuneCallback as TuneCallback
    from orchestrator.execution.sweep_api import SweepResult as SweepResult
    from orchestrator.execution.sweep_api import sweep as sweep
    from orchestrator.training.run import Run as Run
    from orchestrator.training.run import RunStopped as RunStopped
    from orchestrator.training.standalone import Checkpoints as Checkpoints

_HOMES = {
    "Checkpoints": "orchestrator.training.standalone",
    "OrchestratorError": "orchestrator.errors",
    "Run": "orchestrator.training.run",
    "RunStopped": "orchestrator.training.run",
    "SweepResult": "orchestrator.execution.sweep_api",
    "TrainCallback": "orchestrator.execution.script_callbacks",
    "TuneCallback": "orchestrator.execution.script_callbacks",
    "UserError": "orchestrator.errors",
    "load_checkpoint": "orchestrator.checkpoints.load",
    "metrics": "orchestrator.catalog.metrics",
    "open_catalog": "orchestrator.catalog",
    "start_run": "orchestrator.execution.script",
    "sweep": "orchestrator.execution.sweep_api",
}
"""The public names, and the module that has each."""

__all__ = [
    "Checkpoints",
    "OrchestratorError",
    "Run",
    "RunStopped",
    "SweepResult",
    "TrainCallback",
    "TuneCallback",
    "UserError",
    "load_checkpoint",
    "metrics",
    "open_catalog",
    "start_run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
