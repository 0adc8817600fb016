"""Runs and points straight into the store, as the tracker's committer writes them; and what a sink should have of
them."""

from __future__ import annotations

import functools
import operator
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunTicket, Stream, facts_payload
from orchestrator.store.store import Store
from orchestrator.tracking.decimation import Decimator
from orchestrator.tracking.mirror import MirrorService, lag_of
from tests.plugins.mirror_parts import START

LARGEST = float(np.finfo(np.float64).max)


def added(values: Sequence[float]) -> float:
    """In the order of ranks; Python's own `sum` corrects its rounding from 3.12 on."""
    return functools.reduce(operator.add, map(float, values))


REDUCERS: Mapping[str, Callable[[Any], float]] = {
    "mean": lambda values: added(values) / len(values),
    "sum": added,
    "min": np.min,
    "max": np.max,
}


class Producer:
    """One process that logs, straight into the store."""

    def __init__(self, store: Store, ticket: RunTicket, rank: int = 0) -> None:
        self._store, self._ticket, self._rank = store, ticket, rank
        self._id, self._next = uuid.uuid4().hex, {Stream.points: 1, Stream.facts: 1}

    def _commit(self, stream: Stream, count: int, keys: Sequence[str], payload: bytes) -> None:
        batch = Batch(
            producer=self._id, run=self._ticket.run, attempt=self._ticket.attempt, rank=self._rank, stream=stream,
            first=self._next[stream], count=count, keys=tuple(keys), payload=payload,
        )  # fmt: skip
        self._store.commit([batch])
        self._next[stream] += count

    def log(self, values: Mapping[str, Sequence[float]], steps: Sequence[int]) -> None:
        """Interleaved, as a train loop does: all keys of a step, then the next step. Ranks are a few ms apart, attempts
        a minute.
        """
        keys, count = list(values), len(steps)
        points = np.zeros(count * len(keys), POINT)
        points["key"] = np.tile(np.arange(len(keys)), count)
        points["step"] = np.repeat(np.array(steps, np.int64), len(keys))
        points["time"] = START + points["step"] / 10 + 0.001 * (1 + self._rank) + 60 * (self._ticket.attempt - 1)
        points["value"] = np.column_stack([values[key] for key in keys]).ravel()
        self._commit(Stream.points, len(points), keys, points.tobytes())

    def tell(self, *facts: Fact) -> None:
        self._commit(Stream.facts, len(facts), (), facts_payload(facts))

    def declare(self, key: str, reduction: str) -> None:
        self.tell(Fact(kind=FactKind.metric, at=START, data={"name": key, "reduction": reduction}))


def opened(store: Store, experiment: str, run: str = "", **fields: Any) -> RunTicket:
    spec = RunSpec(experiment=experiment, run=run, params={"lr": 0.1}, tags={"team": "a"}, user="ada", **fields)
    return store.open_attempt(spec, now=START, lease_seconds=60)


def settle(mirror: MirrorService, store: Store, sink: str = "mlflow", patience: float = 60.0) -> None:
    """Step until nothing is behind."""
    begun = time.monotonic()
    while mirror.step(mirror._clock.monotonic()) or lag_of(store, sink).runs:
        assert time.monotonic() - begun < patience, mirror.health()
        time.sleep(0.02)  # the real servers' time: the loop ends when all has arrived


Curve = list[tuple[int, int, str]]
"""Step, time in ms, value as Python writes it, sorted."""


def canonical(store: Store, run: str, key: str, attempt: int | None = None, complete: int = 10_000) -> Curve:
    """Our own answer to what the plain key of a sink shows: the declared reduction over ranks, else the lowest rank's
    points, in the order of attempts; beyond `complete` of them decimated; ±inf as MLflow clips it.
    """
    rows = [row for row in store.summaries(run) if row.key == key]
    points = store.points(run, key, attempt=attempt)
    kind = rows[0].reduction
    found: list[tuple[int, int, float]] = []
    for number in np.unique(points.attempts):
        of_attempt = points.attempts == number
        if not kind:
            of_attempt &= points.ranks == min(row.rank for row in rows)
            found += _plain(points, of_attempt)
            continue
        for step in np.unique(points.steps[of_attempt]):
            at_step = of_attempt & (points.steps == step)
            latest = max(time_ms for _, time_ms, _ in _plain(points, at_step))
            found.append((int(step), latest, float(REDUCERS[kind](points.values[at_step]))))
    decimator = Decimator(complete=complete)
    steps, times, values = (np.array(column) for column in zip(*found, strict=True))
    parts = [decimator.add(steps, times, values), decimator.flush()]
    return sorted(
        (int(step), int(at), repr(float(np.clip(value, -LARGEST, LARGEST))))
        for part in parts
        for step, at, value in zip(*part, strict=True)
    )


def _plain(points: Any, chosen: np.ndarray) -> list[tuple[int, int, float]]:
    columns = points.steps[chosen], points.times[chosen], points.values[chosen]
    return [(int(step), round(float(at) * 1000), float(value)) for step, at, value in zip(*columns, strict=True)]
