"""Answers to `Catalog.live` where Redis and the database are: from Redis as long as it has the run, else by polling."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from orchestrator.backends import open_live
from orchestrator.errors import ServiceUnavailable
from orchestrator.live_records import LiveCheckpoint, LiveRun, LiveState, LiveValue
from orchestrator.store.store import Store
from orchestrator.store.views import CheckpointRow, RunDetail, SummaryRow
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.live import CHECKPOINTS, planned

if TYPE_CHECKING:
    from orchestrator.backends.redis import LiveRedis

POLL = 0.5
"""Seconds between two looks into the database."""
DATABASE = "database:"
"""What a cursor begins with that means nothing to Redis."""


class LiveAnswers:
    """As safe to share between threads as the store is."""

    def __init__(self, store: Store, redis_url: str = "") -> None:
        self._store = store
        self._redis_url = redis_url
        self._redis: LiveRedis | None = None
        self._breaker = CircuitBreaker(threshold=1, first_pause=1.0, longest_pause=10.0)

    def of(self, run: str, after: str, wait: float, *, redis: bool) -> LiveRun:
        """See `Catalog.live`."""
        deadline = time.monotonic() + wait
        while True:
            left = max(0.0, deadline - time.monotonic())
            found = (self._from_redis(run, after, left) if redis else None) or from_database(self._store, run)
            left = deadline - time.monotonic()
            if found.cursor != after or left <= 0:
                return found
            if found.source != "redis":  # which has waited itself
                time.sleep(min(POLL, left))

    def _from_redis(self, run: str, after: str, wait: float) -> LiveRun | None:
        if not self._redis_url or not self._breaker.allows(time.monotonic()):
            return None
        try:
            if self._redis is None:
                self._redis = open_live(self._redis_url)
            if after and not after.startswith(DATABASE):
                found = self._redis.changes(run, after, wait)
            else:
                found = self._redis.read(run)
        except ServiceUnavailable:
            self._breaker.failed(time.monotonic())
            return None
        self._breaker.succeeded()
        return found


def from_database(store: Store, run: str) -> LiveRun:
    """What is committed of a run. Raises NotFound."""
    detail = store.run(run)
    params = {row.name: row.value for row in store.params(run)}
    return live_run(detail, store.summaries_of([run]), store.checkpoints(run), planned(params))


def live_run(
    run: RunDetail, summaries: list[SummaryRow], checkpoints: list[CheckpointRow], totals: tuple[int, int]
) -> LiveRun:
    """Pure; `totals` are steps and epochs."""
    newest = sorted(checkpoints, key=lambda row: row.created, reverse=True)[:CHECKPOINTS]
    points = sum(row.count for row in summaries)
    changed = max([row.last_time for row in summaries], default=run.started or run.created)
    cursor = f"{DATABASE}{run.attempt}.{run.status}.{points}.{len(checkpoints)}.{changed!r}"
    state = LiveState(
        status=run.status, attempt=run.attempt, points=points, points_per_second=0.0, steps_per_second=0.0,
        step=max((row.last_step for row in summaries), default=0),
        steps=totals[0], epochs=totals[1], sweep=run.sweep, time=changed,
    )  # fmt: skip
    return LiveRun(
        run=run.run, state=state, source="database", cursor=cursor,
        values=tuple(
            LiveValue(key=row.key, rank=row.rank, step=row.last_step, time=row.last_time, value=row.last)
            for row in summaries
        ),
        checkpoints=tuple(
            LiveCheckpoint(
                id=row.id, uri=row.uri, state=row.state, label=row.label, step=row.step, epoch=row.epoch,
                size_bytes=row.size_bytes, is_best=row.is_best, time=row.created,
            )
            for row in newest
        ),
    )  # fmt: skip
