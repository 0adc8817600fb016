"""What is done otherwise after a training went wrong. Pure.

The first time the batches are left out in which it did, where these are known; from the second time on, and at once
where they are not, the learning rate is lowered as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LeftOut = tuple[int, int, int, int]
"""Samples of a pass over the data, counted over all ranks: epoch, pass, the first and the one behind the last."""
KEYS = ("skip", "lr", "until", "good_step")
"""Of the changes of an attempt, those that are ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """A failed attempt, as far as going back is concerned."""

    is_known: bool = True
    """Whether a guard has said what follows; else the newest checkpoint is all that can be gone back to."""
    to: int | None = None
    """The step of the newest good checkpoint; None: there is none."""
    good_step: int | None = None
    """The last step at which all was well."""
    until: int = 0
    """The step at which it was found."""
    batches: tuple[LeftOut, ...] = ()
    """In which it went wrong; empty where nobody knows."""
    skipped: tuple[LeftOut, ...] = ()
    """What was left out already."""
    lr: float = 1.0
    """By what the learning rates were multiplied already."""

    @classmethod
    def of(cls, error: Mapping[str, Any], changes: Mapping[str, Any], *, if_told: bool = False) -> Rollback | None:
        """Of an attempt's stored error and what that attempt did otherwise; None where no guard wants to go back.
        `if_told`: also where the train function itself has called it diverged (`run.fail`)."""
        told = error.get("rollback")
        skipped, lr = _samples(changes.get("skip")), float(changes.get("lr", 1.0))
        if told:
            return cls(
                to=told.get("to"), good_step=error.get("good_step"), until=int(told.get("until", 0)),
                batches=_samples(told.get("batches")), skipped=skipped, lr=lr,
            )  # fmt: skip
        if if_told and error.get("kind") == "diverged" and "good_step" not in error:
            return cls(is_known=False, until=int(error.get("step") or 0), skipped=skipped, lr=lr)
        return None

    def changes(self, *, is_first: bool, may_skip: bool, lr_factor: float) -> dict[str, Any]:
        """What the next attempt does otherwise, all that earlier ones did included."""
        skips = bool(self.batches) and may_skip
        skip = sorted({*self.skipped, *(self.batches if skips else ())})
        lr = self.lr if is_first and skips else self.lr * lr_factor
        found: dict[str, Any] = {"until": self.until, "good_step": self.good_step}
        return found | ({"skip": [list(each) for each in skip]} if skip else {}) | ({"lr": lr} if lr != 1 else {})

    def words(self, changes: Mapping[str, Any]) -> str:
        if not self.is_known:
            to = "the newest checkpoint"
        elif self.to is None:
            to = "the beginning: there is no good checkpoint"
        else:
            to = f"step {self.to:,}"
            if self.good_step is not None and self.good_step != self.to:
                to += f", the newest good checkpoint (all was well until step {self.good_step:,})"
        parts = [f"rolled back to {to}"]
        if fresh := set(_samples(changes.get("skip"))) - set(self.skipped):
            count = sum(last - first for _, _, first, last in fresh)
            epochs = ", ".join(str(epoch) for epoch in sorted({each[0] for each in fresh}))
            parts.append(f"{count:,} samples of epoch {epochs} are left out")
        if (factor := changes.get("lr", 1.0) / self.lr) != 1:
            parts.append(f"the learning rate is multiplied by {factor:g}")
        if len(parts) == 1:
            parts.append("nothing is changed")
        return "; ".join(parts) + ";"


def _samples(told: Any) -> tuple[LeftOut, ...]:
    return tuple((int(epoch), int(passes), int(first), int(last)) for epoch, passes, first, last in told or ())
