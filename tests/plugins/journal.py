"""What a producer itself knows of its `log()` calls, and whether PostgreSQL has exactly that.

Each producer keeps two counters in a mapped file of its own, which survive its SIGKILL: how many calls it began, how
many came back. Every value follows from rank and call, so nothing else needs to be written down. What came back must
be stored, once, in order, bit for bit; the one call that was going on may be stored or not; anything else is a phantom.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.records import Fact, FactKind
from orchestrator.store.store import Store

_COUNTERS = struct.Struct("<4Q")
KEYS = ("loss", "train/accuracy")
"""Both in every call, in this order."""
FACT_EVERY = 500
"""Calls; then an event, too."""


def value(rank: int, call: int | np.ndarray, key: int) -> float | np.ndarray:
    return call * 0.5 + rank * 1000 + key / 3


class Journal:
    """The counters of one producer. It is written by that producer alone."""

    def __init__(self, directory: Path, rank: int) -> None:
        path = directory / f"{rank:06d}"
        if not path.exists() or path.stat().st_size < _COUNTERS.size:  # killed while it was made
            path.write_bytes(bytes(_COUNTERS.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.rank = rank

    def log_once(self, logger: object, call: int) -> None:
        """One call, and a fact now and then, between the counters."""
        rank = self.rank
        struct.pack_into("<Q", self._map, 0, call + 1)
        logger.log({key: value(rank, call, place) for place, key in enumerate(KEYS)}, step=call)  # type: ignore[attr-defined]
        struct.pack_into("<Q", self._map, 8, call + 1)
        if call % FACT_EVERY == 0:
            number = call // FACT_EVERY
            struct.pack_into("<Q", self._map, 16, number + 1)
            data = {"kind": "journal", "level": "info", "message": f"{rank}:{number}", "details": {}}
            logger.fact(Fact(kind=FactKind.event, at=float(call), data=data))  # type: ignore[attr-defined]
            struct.pack_into("<Q", self._map, 24, number + 1)

    def counters(self) -> tuple[int, int, int, int]:
        """Calls begun, calls that came back; the same of facts."""
        return _COUNTERS.unpack_from(self._map, 0)


def logged_in(directory: Path) -> int:
    """Points that came back from `log()` so far, by all journals."""
    return sum(len(KEYS) * Journal(directory, int(path.name)).counters()[1] for path in directory.iterdir())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all journals say against what is stored."""

    points: int
    """That came back from `log()`."""
    facts: int
    problems: tuple[str, ...] = ()


def compare(store: Store, run: str, directory: Path) -> Comparison:
    """Of all producers of a run. Call it when everything has arrived."""
    told = {int(path.name): Journal(directory, int(path.name)).counters() for path in sorted(directory.iterdir())}
    problems: list[str] = []
    for place, key in enumerate(KEYS):
        points = store.points(run, key)
        order = np.argsort(points.ranks, kind="stable")
        ranks = points.ranks[order]
        found = set(np.unique(ranks).tolist())
        problems += [f"{key}: rank {rank} never logged and has points" for rank in sorted(found - told.keys())]
        for rank, (begun, returned, _, _) in told.items():
            low, high = np.searchsorted(ranks, (rank, rank + 1))
            mine = order[low:high]
            problems += _differences(key, place, rank, (returned, begun), points.steps[mine], points.values[mine])
    problems += _facts(store, run, told)
    return Comparison(
        points=sum(len(KEYS) * returned for _, returned, _, _ in told.values()),
        facts=sum(returned for *_, returned in told.values()), problems=tuple(problems),
    )  # fmt: skip


def _differences(
    key: str, place: int, rank: int, most: tuple[int, int], steps: np.ndarray, values: np.ndarray
) -> list[str]:
    where, count = f"{key} of rank {rank}", len(steps)
    if len(np.unique(steps)) != count:
        return [f"{where}: {count - len(np.unique(steps))} of {count} points are doubled"]
    if not np.array_equal(steps, np.arange(count)):
        wrong = int(np.flatnonzero(steps != np.arange(count))[0])
        return [f"{where}: a hole or another order at point {wrong} of {count}: step {steps[wrong]}"]
    if count < most[0]:
        return [f"{where}: {most[0] - count} of {most[0]} points are lost"]
    if count > most[1]:
        return [f"{where}: {count - most[1]} points are there that were never logged"]
    if not np.array_equal(values, value(rank, np.arange(count), place)):
        return [f"{where}: values differ from what was logged"]
    return []


def _facts(store: Store, run: str, told: Mapping[int, tuple[int, int, int, int]]) -> list[str]:
    found: dict[int, list[int]] = {rank: [] for rank in told}
    after = 0
    while events := store.events(run, after=after, limit=10_000):
        after = events[-1].id
        for event in events:
            if event.kind == "journal":
                rank, _, number = event.message.partition(":")
                found.setdefault(int(rank), []).append(int(number))
    problems = []
    for rank, numbers in found.items():
        begun, returned = told[rank][2:] if rank in told else (0, 0)
        if numbers != list(range(len(numbers))) or not returned <= len(numbers) <= begun:
            problems.append(f"facts of rank {rank}: {numbers[:20]}… are stored, {returned} to {begun} were said")
    return problems
