"""How much of the difference between trials one searched key explains.

A one-way analysis of variance per key: scores are replaced by their ranks, so that no outlier rules, trials are put
into bins by the key's value (quarters of a number, each item of a choice), and the share of the ranks' variance that
lies between the bins is estimated without the bias that many bins bring: omega squared (Hays, Statistics, 1963).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST = 10
"""Fewer scores say nothing."""
QUARTERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """`shares` is empty where `why` says why."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Key -> 0 … 1. They need not add up to 1: keys act together, and chance acts too."""
    n: int = 0
    """Of how many trials."""
    why: str = ""

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """The most important first, of equal ones by name."""
        return sorted(self.shares.items(), key=lambda each: (-each[1], each[0]))


def importance(tables: Sequence[Sequence[tuple[Mapping[str, Any], float]]], keys: Sequence[str]) -> Importance:
    """Of the first of the tables that has enough scores. A table is the (values, score) of the trials of one rung;
    scores are finite."""
    table = next((each for each in tables if len(each) >= LEAST), None)
    if table is None:
        most = max((len(each) for each in tables), default=0)
        return Importance(n=most, why=f"too few: {most} scores, {LEAST} are needed")
    ranks = _ranks([score for _, score in table])
    shares = {key: _share([values.get(key) for values, _ in table], ranks) for key in keys}
    return Importance(shares=shares, n=len(table))


def _share(values: Sequence[Any], ranks: Sequence[float]) -> float:
    bins: dict[str, list[float]] = {}
    for name, rank in zip(_bins(values), ranks, strict=True):
        bins.setdefault(name, []).append(rank)
    count, groups = len(ranks), len(bins)
    if groups < 2 or count <= groups:
        return 0.0
    mean = sum(ranks) / count
    total = sum((rank - mean) ** 2 for rank in ranks)
    between = sum(len(each) * (sum(each) / len(each) - mean) ** 2 for each in bins.values())
    within = (total - between) / (count - groups)
    if total + within == 0:
        return 0.0
    return min(max((between - (groups - 1) * within) / (total + within), 0.0), 1.0)


def _bins(values: Sequence[Any]) -> list[str]:
    """A name per value. Trials without one, because the key's condition did not hold, are a bin of their own."""
    numbers = sorted(value for value in values if _is_number(value))
    if len(set(numbers)) <= QUARTERS:
        return ["" if value is None else json.dumps(value, sort_keys=True) for value in values]
    cuts = [numbers[len(numbers) * part // QUARTERS] for part in range(1, QUARTERS)]
    return [
        str(sum(value >= cut for cut in cuts)) if _is_number(value) else f"={json.dumps(value, sort_keys=True)}"
        for value in values
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ranks(scores: Sequence[float]) -> list[float]:
    """From 0; equal scores share the mean of their places."""
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    found = [0.0] * len(scores)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and scores[order[last + 1]] == scores[order[first]]:
            last += 1
        for place in order[first : last + 1]:
            found[place] = (first + last) / 2
        first = last + 1
    return found
