"""What optimizers and schedulers were made with survives the loading of a state that had other settings.

A state of torch holds both how far a training has come (moments, counters) and the settings that it was made with
(learning rate, betas, the milestones of a schedule). Who continues from another run's checkpoint with settings of its
own, as population based training does, wants the first of the checkpoint and the second of its own configuration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_COUNTERS = frozenset(
    {
        "last_epoch", "_step_count", "_get_lr_called_within_step", "_last_lr",
        "T_cur", "T_i",  # CosineAnnealingWarmRestarts
        "best", "num_bad_epochs", "cooldown_counter",  # ReduceLROnPlateau
    }
)  # fmt: skip
"""How far a scheduler of torch has come; the rest of its state is settings."""
_NESTED = ("_schedulers", "lr_lambdas")
"""Of schedulers: others, looked at by themselves, and what torch itself loads or leaves."""
_CYCLED = ("momentum", "betas")
"""What OneCycleLR and CyclicLR change besides the learning rate, where a group has `base_momentum`."""


@dataclass(slots=True, kw_only=True)
class _Optimizer:
    living: Any
    groups: list[dict[str, Any]]
    """Settings of each group as it was made, without its parameters."""
    schedules: list[_Schedule] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Schedule:
    living: Any
    settings: dict[str, Any]


class Kept:
    """Made before a state is loaded, `restore` called afterwards."""

    def __init__(self, optimizers: Sequence[_Optimizer]) -> None:
        self._optimizers = optimizers

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Kept:
        """Of all optimizers of torch's kind and all of torch's schedulers that are in the parts, at any depth."""
        found = list(_living(parts))
        optimizers = {
            id(each): _Optimizer(living=each, groups=[_settings(group) for group in each.param_groups])
            for each in found
            if not _is_schedule(each)
        }
        for each in filter(_is_schedule, found):
            of = optimizers.get(id(each.optimizer))
            if of is None:  # its optimizer is not part of the state
                of = optimizers[id(each.optimizer)] = _Optimizer(living=each.optimizer, groups=[])
            of.schedules.append(_Schedule(living=each, settings=_made_with(each)))
        return cls(list(optimizers.values()))

    def restore(self) -> None:
        for optimizer in self._optimizers:
            _restore(optimizer)


def _restore(kept: _Optimizer) -> None:
    """The learning rate keeps its place in the schedule: by how much it had changed since the beginning there, it is
    changed here."""
    closed = kept.schedules[0].living if len(kept.schedules) == 1 else None
    theirs = _planned(closed)
    for schedule in kept.schedules:
        schedule.living.__dict__.update(schedule.settings)
    groups = kept.living.param_groups
    rates = [group["lr"] for group in groups]
    starts = [group.get("initial_lr", group["lr"]) for group in groups]
    for group, made in zip(groups, kept.groups, strict=False):
        cycled = [key for key in _CYCLED if key in group and "base_momentum" in group]
        gone = {key: group[key] for key in cycled}
        group.update(copy.deepcopy({key: value for key, value in made.items() if key != "lr"}))
        if "momentum" in gone:
            group["momentum"] = gone["momentum"]
        if "betas" in gone:
            group["betas"] = (gone["betas"][0], *group["betas"][1:])
    ours = _planned(closed)
    for i, (group, made) in enumerate(zip(groups, kept.groups, strict=False)):
        if theirs is not None and ours is not None:
            rate = _scaled(rates[i], ours[i], theirs[i])
        else:
            rate = _scaled(rates[i], made.get("initial_lr", made["lr"]), starts[i])
        if isinstance(made["lr"], torch.Tensor):
            group["lr"] = made["lr"].clone().fill_(rate)
        else:
            group["lr"] = rate
    for schedule in kept.schedules:
        schedule.living._last_lr = [group["lr"] for group in groups]


def _scaled(rate: Any, ours: Any, theirs: Any) -> float:
    rate, ours, theirs = float(rate), float(ours), float(theirs)
    if ours == theirs:
        return rate
    if rate == theirs:
        return ours  # the same, without rounding
    scaled = rate * ours / theirs if theirs else ours
    return scaled if math.isfinite(scaled) else ours


def _planned(schedule: Any) -> Sequence[float] | None:
    """The learning rates that a schedule has in mind for where it stands, where it can say that without its past."""
    if schedule is None or not hasattr(schedule, "_get_closed_form_lr"):
        return None
    rates: Sequence[float] = schedule._get_closed_form_lr()
    return rates


def _made_with(schedule: Any) -> dict[str, Any]:
    return {k: v for k, v in schedule.state_dict().items() if k not in _COUNTERS and k not in _NESTED}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


def _is_schedule(value: Any) -> bool:
    return isinstance(value, LRScheduler | ReduceLROnPlateau)


def _living(value: Any) -> Iterator[Any]:
    if _is_schedule(value):
        yield value
        for inner in getattr(value, "_schedulers", ()):
            yield from _living(inner)
    elif hasattr(value, "param_groups") and hasattr(value, "load_state_dict"):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _living(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _living(item)
