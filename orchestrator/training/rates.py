"""Learning rates lowered from outside, where a schedule goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from orchestrator.training.steps import optimizers

_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
_OF_SCHEDULERS = ("base_lrs", "max_lrs", "_last_lr")


def cut(factor: float, *things: Any) -> int:
    """Multiplies the learning rates of optimizers, and what torch's schedulers make them of, by `factor`. Things are
    optimizers, schedulers, and dicts and lists of them; the rest is left alone. Gives how many optimizers it found."""
    count = 0
    for optimizer in optimizers(things):
        count += 1
        for group in optimizer.param_groups:
            for key in _OF_GROUPS:
                if key in group:
                    group[key] = _times(group[key], factor)
    for scheduler in _schedulers(things):
        for name in _OF_SCHEDULERS:
            rates = getattr(scheduler, name, None)
            if isinstance(rates, list):
                setattr(scheduler, name, [_times(rate, factor) for rate in rates])
    return count


def _schedulers(things: Any) -> Iterator[Any]:
    for thing in things:
        if isinstance(thing, Mapping):
            yield from _schedulers(thing.values())
        elif isinstance(thing, list | tuple):
            yield from _schedulers(thing)
        elif isinstance(getattr(thing, "_schedulers", None), list):
            yield thing
            yield from _schedulers(thing._schedulers)
        elif hasattr(thing, "_last_lr") or hasattr(thing, "base_lrs"):
            yield thing


def _times(rate: Any, factor: float) -> Any:
    """A tensor keeps its identity: a captured graph reads it."""
    return rate.mul_(factor) if isinstance(rate, torch.Tensor) else rate * factor
