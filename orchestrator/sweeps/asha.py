"""Asynchronous successive halving with promotion.

Li, Jamieson, Rostamizadeh, Gonina, Ben-tzur, Hardt, Recht, Talwalkar: A System for Massively Parallel Hyperparameter
Tuning, MLSys 2020, algorithm 2. Whoever is free asks for work: the highest rung with a trial among the best 1/eta of
those that have ended there, and not promoted from there yet, gives a promotion; where there is none, a new trial
begins at the lowest rung. Nobody waits for a rung to fill.

Two things the paper leaves open: a trial that failed, or whose score is no finite number, counts as one that ended in
its rung, as the worst; and one whose function returned early counts in its rung and in all higher ones.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.sweeps.fifo import begun_or_new
from orchestrator.sweeps.state import Choice, Promote, State

KEPT_ENTRIES = 64
"""Of a rung's table in a decision's inputs; the digest speaks for the rest."""


class AshaScheduler:
    """Promotes; what is not promoted keeps waiting, and may be promoted once the sweep was extended."""

    name = "asha"
    survives = "everything: rungs, scores and promotions are rows"

    def next(self, state: State) -> Choice:
        """Promotions first, from the highest rung down; then what was begun and has no job; then a new trial."""
        read: list[dict[str, Any]] = []
        for rung in range(state.settings.top - 1, -1, -1):
            table, candidates, found = _read(state, rung)
            read.append(table)
            if found is not None:
                inputs = {**self._inputs(state, read), "candidates": candidates, "cut": found[1]}
                return Promote(trial=found[0], rung=rung + 1, until=state.settings.until(rung + 1), inputs=inputs)
        return begun_or_new(state, self._inputs(state, read)) or state.idle()

    def judge(self, state: State, trial: int) -> Mapping[str, Any]:
        return {}

    def _inputs(self, state: State, read: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"by": self.name, "settings": state.settings.version, "rungs": list(read)}


def _read(state: State, rung: int) -> tuple[dict[str, Any], list[list[Any]], tuple[int, list[Any]] | None]:
    """What a rung says, the best entries of it, and (trial, the last entry of the cut) if one may be promoted."""
    assert state.settings.asha is not None
    entries = state.rungs[rung]
    take = len(entries.ranked) // state.settings.asha.reduction
    table = {"rung": rung, "done": len(entries.ranked), "take": take, "digest": entries.digest}
    place = bisect.bisect_left(entries.ranked, entries.free[0]) if entries.free else take
    if place >= take:
        return table, [], None
    # Those around it: which ones stood better and had gone already, and where the cut was.
    near = entries.ranked[max(0, place + 1 - KEPT_ENTRIES) : place + 1]
    candidates = [[number, _score(state, number, rung)] for _, _, number in near]
    last = entries.ranked[min(take, entries.finite) - 1][2]
    return table, candidates, (entries.free[0][2], [last, _score(state, last, rung)])


def _score(state: State, number: int, rung: int) -> float:
    results = state.trials[number].results
    return results[max(k for k in results if k <= rung)].score


def milestones(lowest: float, highest: float, reduction: int) -> tuple[float, ...]:
    """`lowest` times powers of `reduction` below `highest`, then `highest`. Example: milestones(1, 15, 3) is
    (1, 3, 9, 15). ConfigError where they cannot be."""
    if reduction < 2:
        raise ConfigError("sweep.asha.reduction", reduction, "must be 2 or more:", "one in so many is promoted.")
    if lowest <= 0:
        raise ConfigError("sweep.asha.min", lowest, "must be above 0:", "it is where the lowest rung ends.")
    if highest < lowest:
        raise ConfigError(
            "sweep.asha.max", highest, f"is below sweep.asha.min = {lowest:g}.", "Raise it, or lower min."
        )
    found = []
    at = float(lowest)
    while at < highest:
        found.append(at)
        at *= reduction
    return (*found, float(highest))


def extended(before: Sequence[float], lowest: float, highest: float, reduction: int) -> tuple[float, ...]:
    """The milestones for a larger `highest`: those there were stay, so that what was scored at them still compares.
    ConfigError if it is not larger."""
    if highest <= before[-1]:
        raise ConfigError(
            "sweep.asha.max", highest, f"may only grow, and is {before[-1]:g} now.", "Start another sweep for less."
        )
    return (*before, *(at for at in milestones(lowest, highest, reduction) if at > before[-1]))
