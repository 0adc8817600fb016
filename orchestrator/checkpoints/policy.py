"""Settings: when checkpoints are saved and which are kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Which way a metric gets better."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class CheckpointPolicy:
    """Each trigger works by itself; 0 or "" switches it off. They are looked at in `run.report(…, state=…)`."""

    every_steps: int = 0
    every_epochs: int = 1
    every_minutes: float = 15.0
    best_metric: str = ""
    """Save when this metric, as given to `run.report`, is better than ever before."""
    best_direction: Direction = Direction.max
    on_stop: bool = True
    """Save before the run ends because it was asked to."""
    at_end: bool = True
    """Save when the train function returns, if steps were made since the last checkpoint."""
    keep_last: int = 3
    """How many of the newest are kept; 0 keeps all of them."""
    keep_best: int = 1
    """How many of the best by `best_metric` are kept besides (without one: of those saved with `best=True`)."""
