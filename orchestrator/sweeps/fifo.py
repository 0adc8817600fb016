"""One trial after the other, each to the end of its function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.sweeps.state import Choice, Continue, New, State


class Fifo:
    """Nothing is stopped and nothing is compared."""

    name = "fifo"
    survives = "everything"

    def next(self, state: State) -> Choice:
        inputs = {"by": self.name, "settings": state.settings.version}
        return begun_or_new(state, inputs) or state.idle()

    def judge(self, state: State, trial: int) -> Mapping[str, Any]:
        return {}


def begun_or_new(state: State, inputs: Mapping[str, Any]) -> Choice | None:
    """What was begun and has no job goes on, lowest number first; then a new trial while there is room."""
    due = state.due()
    if due is not None:
        rung = max(due.rung, 0)
        return Continue(trial=due.number, rung=rung, until=state.settings.until(rung), inputs=inputs)
    if state.has_room():
        count = {"trials": len(state.trials), "of": state.settings.samples}
        return New(until=state.settings.until(0), inputs={**inputs, **count})
    return None
