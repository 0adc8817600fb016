"""The driver of a run, one of whose CPUs is taken by somebody between its look at the room and the ranks' start:
`python raced.py OVERRIDE…`. Prints how the run ended."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from orchestrator.config import ResourcesConfig, compose
from orchestrator.execution.driver import train
from orchestrator.execution.on_ray import OnRay
from orchestrator.execution.sizing import Room


class Raced(OnRay):
    taken: Any = None

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        from ray.util import placement_group

        found = super().room(wanted, avoid)
        if self.taken is None:
            self.taken = placement_group([{"CPU": 1}])
            assert self.taken.wait(30)
        return found


if __name__ == "__main__":
    outcome = train(compose(sys.argv[1:]), open_place=Raced)
    print(outcome.run, outcome.status.value, outcome.attempt)
