"""Bytes per point in PostgreSQL after merging: tables, TOAST and indexes of everything that metrics need.

Runs are committed, merged and vacuumed one after another as in a long-lived stack, so room that merging frees is used
again. Values are float32 losses with noise, as PyTorch logs them; fully random float64 values are printed beside them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import numpy as np
import psycopg
from environment import BenchStack, Peers, progress
from rows import Row, at_most, printed

from orchestrator.backends.postgres import conninfo
from orchestrator.records import POINT, Batch, RunSpec, RunStatus, Stream
from orchestrator.store import migrate, open_store
from orchestrator.tracking.merging import MergeService

OURS, THEIRS = r"(metric_.*|producers)", r"(metrics|latest_metrics)"
"""Tables (partitions count on their own), as regular expressions."""
SHAPES = {"1,000 points per key": (40, 100, 1000, 12.0), "10 points per key": (8000, 10, 10, 40.0)}
"""Runs, keys, points per key, bar."""
ROWS_PER_BATCH = 50


def measure(stack: BenchStack, peers: Peers) -> Iterator[Row]:
    for name, (runs, keys, points, bar) in SHAPES.items():
        for values in ("losses", "random float64"):
            found = _ours(stack, runs, keys, points, values)
            text = f"bytes per point, {name}, {values}"
            yield at_most(text, found, bar, "B") if values == "losses" else printed(text, found, "B")
        database = _database(stack)
        taken = peers.ask("stored", "mlflow", database, str(keys), str(points))
        yield printed(f"MLflow on PostgreSQL: bytes per point, {name}", _size(database, THEIRS) / taken["points"], "B")


def _database(stack: BenchStack) -> str:
    """A new database on the stack's server."""
    name = f"bench_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(conninfo(stack.stack.database_url), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    head, _, query = stack.stack.database_url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}?{query}"


def _ours(stack: BenchStack, runs: int, keys: int, points: int, values: str) -> float:
    database = _database(stack)
    migrate.upgrade(database)
    store = open_store(database)
    merging = MergeService(store)
    random = np.random.default_rng(7)
    for number in progress(f"{points:,} points per key, {values}", range(runs)):
        ticket = store.open_attempt(
            RunSpec(experiment="bytes", name=f"run {number}"), now=time.time(), lease_seconds=60
        )
        store.commit(list(_batches(ticket.run, keys, points, values, random)))
        store.transition(ticket.run, 1, RunStatus.finished, now=time.time())
        if number % 20 == 19 or number == runs - 1:
            for hour in range(3):  # noticed, merged, tidied up: each waits for its turn, so the clock runs ahead
                while merging.step(time.monotonic() + 3600 * (3 * number + hour)):
                    pass
    store.close()
    return _size(database, OURS) / (runs * keys * points)


def _batches(run: str, keys: int, points: int, values: str, random: np.random.Generator) -> Iterator[Batch]:
    """All keys at each step, a step every 50 ms with some jitter, in batches as a shipper sends them."""
    producer, seq, now = uuid.uuid4().hex, 1, time.time()
    names = tuple(f"train/metric_{number}" for number in range(keys))
    for start in range(0, points, ROWS_PER_BATCH):
        steps = np.arange(start, min(start + ROWS_PER_BATCH, points))
        batch = np.zeros(len(steps) * keys, POINT)
        batch["key"] = np.tile(np.arange(keys), len(steps))
        batch["step"] = np.repeat(steps, keys)
        batch["time"] = np.repeat(now + steps * 0.05 + random.uniform(0, 0.003, len(steps)), keys)
        noise = random.standard_normal(len(batch))
        losses = (np.exp(-batch["step"] / points) * (1 + 0.1 * noise)).astype(np.float32)
        batch["value"] = losses if values == "losses" else noise
        yield Batch(
            producer=producer, run=run, attempt=1, rank=0, stream=Stream.points, first=seq, count=len(batch),
            keys=names, payload=batch.tobytes(),
        )  # fmt: skip
        seq += len(batch)


def _vacuum(database: str) -> None:
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")


def _size(database: str, tables: str) -> int:
    """With TOAST and indexes."""
    _vacuum(database)
    with psycopg.connect(conninfo(database)) as connection:
        query = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relname ~ %s"
        return int(connection.execute(query, [f"^{tables}$"]).fetchone()[0])  # type: ignore[index]
