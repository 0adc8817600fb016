"""Where an optimizer stands: how many steps it has made, and whether one is under way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet


class OptimizerSteps:
    """Counts the steps of the optimizers that it watches. Costs each step two calls."""

    def __init__(self) -> None:
        self.count = 0
        """Finished steps of all of them together."""
        self.is_inside = False
        """One has begun and not ended: parameters may be half new. Stays so if it raised."""
        self._watched: WeakSet[Any] = WeakSet()

    def watch(self, *things: Any) -> None:
        """Optimizers, or dicts of them; whatever else there is among them has no steps to count."""
        for optimizer in optimizers(things):
            if optimizer not in self._watched:
                self._watched.add(optimizer)
                optimizer.register_step_pre_hook(self._begin)
                optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.is_inside = True

    def _end(self, *_: Any) -> None:
        self.is_inside = False
        self.count += 1


def optimizers(things: Any) -> Iterator[Any]:
    """Those among `things`, and in dicts among them."""
    for thing in things:
        if isinstance(thing, Mapping):
            yield from optimizers(thing.values())
        elif hasattr(thing, "register_step_pre_hook") and hasattr(thing, "register_step_post_hook"):
            yield thing
