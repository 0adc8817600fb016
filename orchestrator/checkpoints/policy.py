"""Settings: when checkpoints are saved and which are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.errors import UserError

_BEST = re.compile(r"([^:]+)(?::(min|max)(?::([1-9]\d*))?)?")


class Direction(StrEnum):
    """Which way a metric gets better."""

    min = "min"
    max = "max"


class Mode(StrEnum):
    """How a save leaves the training's hands."""

    eager = "eager"
    """Copied into shared memory; another process writes it. Where there is no such memory: as `direct`."""
    overlap = "overlap"
    """The same, and the copy goes on while the next step computes, up to `optimizer.step`."""
    direct = "direct"
    """Written before training goes on."""


@dataclass(kw_only=True)
class CheckpointPolicy:
    """Each trigger works by itself; 0 or "" switches it off. They are looked at in `run.report(…, state=…)`. What is
    kept is the union of what each `keep_…` says. Raises UserError for a setting that makes no sense."""

    every_steps: int = 0
    every_epochs: int = 1
    every_minutes: float = 15.0
    best_metric: str = ""
    """Save when this metric, as given to `run.report`, is better than ever before."""
    best_direction: Direction = Direction.max
    on_stop: bool = True
    """Save before the run ends because it was asked to."""
    on_exception: bool = True
    """Save when the train function raises, if the state is whole then; see `Run.rescue`."""
    at_end: bool = True
    """Save when the train function returns, if steps were made since the last checkpoint."""
    full_every_epochs: int = 0
    """Of sharded (FSDP) state, save whole tensors every so many epochs. Where ranks hold the same, all are whole."""
    keep_last: int = 3
    """How many of the newest are kept; 0 keeps all of them."""
    keep_best: int = 1
    """How many of the best by `best_metric` are kept besides (without one: of those saved with `best=True`)."""
    also_best: list[str] = field(default_factory=list)
    """Further metrics whose best are kept: "val/loss:min:1" is metric, direction and how many."""
    keep_every_steps: int = 0
    """Keep the first at or after each multiple of so many steps."""
    keep_hours: float = 0.0
    """Keep what is younger."""
    quota_gb: float = 0.0
    """What all checkpoints of the experiment may take together, in 10^9 bytes; 0: no limit."""
    label: str = "v{epoch}.{step}"
    """What a checkpoint is called besides its name; knows `{epoch}`, `{step}` and `{attempt}`."""
    max_gb: float = 0.0
    """Refuse to save more than this at once, in 10^9 bytes; 0: no limit."""
    wait: float = 600.0
    """Seconds that a save which must not be skipped waits for room, and then until it is durable."""

    mode: Mode = Mode.eager
    window_mb: int = 64
    """Memory, in MiB, through which a rank that writes by itself streams what lies on a GPU."""

    def __post_init__(self) -> None:
        if self.mode not in tuple(Mode):
            raise UserError(f"checkpoints.mode is {self.mode!r}; it is {', '.join(Mode)}.")
        if self.window_mb < 1:
            raise UserError(f"checkpoints.window_mb is {self.window_mb}; it is at least 1.")
        self.mode = Mode(self.mode)
        label_of(self.label, epoch=0, step=0, attempt=1)
        for text in self.also_best:
            also_best(text)


def label_of(template: str, *, epoch: int, step: int, attempt: int) -> str:
    """Example: label_of("v{epoch}.{step}", epoch=3, step=1200, attempt=1) == "v3.1200". Raises UserError."""
    try:
        return template.format(epoch=epoch, step=step, attempt=attempt)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"checkpoints.label is {template!r}: only {{epoch}}, {{step}} and {{attempt}} are known there ({error!r})."
        ) from error


def also_best(text: str) -> tuple[str, Direction, int]:
    """Metric, direction and count of "val/loss:min:2"; what is left out is `max` and 1. Raises UserError."""
    found = _BEST.fullmatch(text)
    if found is None:
        raise UserError(
            f"checkpoints.also_best: {text!r} is not a metric, then min or max, then how many: 'val/loss:min:1'."
        )
    metric, direction, count = found.groups()
    return metric, Direction(direction or "max"), int(count or 1)
