"""Which checkpoints are deleted: the union of what each rule keeps, stays."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction


def to_delete(
    checkpoints: Sequence[Manifest], policy: CheckpointPolicy, pinned: Collection[str] = ()
) -> list[Manifest]:
    """Those that no rule keeps, oldest first. `checkpoints` are committed ones, newest first; `pinned` are names."""
    if not policy.keep_last:
        return []
    kept = {checkpoint.name for checkpoint in checkpoints[: policy.keep_last]}
    kept |= {checkpoint.name for checkpoint in best(checkpoints, policy)}
    kept |= set(pinned)
    return [checkpoint for checkpoint in reversed(checkpoints) if checkpoint.name not in kept]


def best(checkpoints: Sequence[Manifest], policy: CheckpointPolicy) -> list[Manifest]:
    """The `keep_best` best ones, best first; of equal ones the newer."""
    if not policy.best_metric:
        return [checkpoint for checkpoint in checkpoints if checkpoint.is_best][: policy.keep_best]
    sign = -1.0 if policy.best_direction == Direction.max else 1.0
    measured = [c for c in checkpoints if not math.isnan(c.metrics.get(policy.best_metric, math.nan))]
    return sorted(measured, key=lambda c: sign * c.metrics[policy.best_metric])[: policy.keep_best]
