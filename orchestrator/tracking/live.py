"""The newest values of the runs that are going on, kept in memory for watchers. Nothing depends on it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from orchestrator.records import Batch

_MAX_RUNS = 10_000
_MAX_KEYS = 1_000


class LiveValues:
    """Newest value per key of each run, of the lowest rank that logs the key. May be used from many threads."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, batch: Batch) -> None:
        with self._lock:
            self._take(batch)

    def _take(self, batch: Batch) -> None:
        run = self._runs.setdefault(batch.run, {"points": 0, "step": 0, "first": time.monotonic(), "metrics": {}})
        self._runs.move_to_end(batch.run)
        while len(self._runs) > _MAX_RUNS:
            self._runs.popitem(last=False)
        points = batch.points()
        run["points"] += batch.count
        metrics: dict[str, tuple[int, int, float]] = run["metrics"]
        # The last occurrence of each key: unique() of the reversed column gives the first index there.
        keys, back = np.unique(points["key"][::-1], return_index=True)
        for key, index in zip(keys.tolist(), (len(points) - 1 - back).tolist(), strict=True):
            name = batch.keys[key]
            known = metrics.get(name)
            if (known is None and len(metrics) < _MAX_KEYS) or (known is not None and batch.rank <= known[0]):
                metrics[name] = (batch.rank, int(points["step"][index]), float(points["value"][index]))
        run["step"] = max(run["step"], int(points["step"].max()))
        run["rate"] = run["points"] / max(time.monotonic() - run["first"], 1e-3)

    def of(self, run: str) -> dict[str, Any]:
        """{"points", "step", "rate" (points per second), "metrics": {key: {"step", "value", "rank"}}}; {} for an
        unknown run.
        """
        with self._lock:
            known = self._runs.get(run)
            if known is None:
                return {}
            metrics = {
                key: {"rank": rank, "step": step, "value": value}
                for key, (rank, step, value) in known["metrics"].items()
            }
            return {
                "points": known["points"], "step": known["step"], "rate": known.get("rate", 0.0), "metrics": metrics,
            }  # fmt: skip
