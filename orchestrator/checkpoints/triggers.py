"""When to save: values and the time in, reasons out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.checkpoints.policy import CheckpointPolicy, Direction

FULL = "full_every_epochs"
"""The reason to save whole tensors, where ranks hold parts of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """How far a training has come."""

    step: int = 0
    epochs_done: int = 0
    time: float = 0.0
    """Seconds of a clock that never goes back."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: float | None = None
    """The best value of the policy's metric before this moment."""
    optimizer_steps: int = 0
    """Made in this process."""


def reasons_to_save(policy: CheckpointPolicy, now: Moment, last: Moment) -> tuple[str, ...]:
    """Why a checkpoint is due; empty if none is. `last` is the last one saved or restored, or the start."""
    reasons = []
    if policy.every_steps and now.step // policy.every_steps > last.step // policy.every_steps:
        reasons.append("every_steps")
    if policy.every_epochs and now.epochs_done // policy.every_epochs > last.epochs_done // policy.every_epochs:
        reasons.append("every_epochs")
    if (
        policy.full_every_epochs
        and now.epochs_done // policy.full_every_epochs > last.epochs_done // policy.full_every_epochs
    ):
        reasons.append(FULL)
    if policy.every_minutes and now.time - last.time >= policy.every_minutes * 60:
        reasons.append("every_minutes")
    if improved(policy, now):
        reasons.append("improved")
    return tuple(reasons)


def improved(policy: CheckpointPolicy, now: Moment) -> bool:
    """Whether the policy's metric is better than ever before. NaN never is."""
    value = now.metrics.get(policy.best_metric) if policy.best_metric else None
    if value is None or math.isnan(value):
        return False
    return now.best is None or is_better(value, now.best, policy.best_direction)


def is_better(value: float, than: float, direction: Direction) -> bool:
    return value > than if direction == Direction.max else value < than
