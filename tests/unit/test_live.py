"""The newest values are read while others are taken."""

from __future__ import annotations

import sys
import threading

import numpy as np

from orchestrator.records import POINT, Batch, Stream
from orchestrator.tracking.live import LiveValues


def batch(key: str) -> Batch:
    return Batch(
        producer="ab" * 16, run="r", attempt=1, rank=0, stream=Stream.points, first=1, count=1, keys=(key,),
        payload=np.zeros(1, POINT).tobytes(),
    )  # fmt: skip


def test_new_keys_may_come_while_somebody_watches() -> None:
    live, broken, done = LiveValues(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                live.of("r")
            except RuntimeError as error:
                broken.append(error)
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        watchers = [threading.Thread(target=watch) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        for number in range(1000):
            live.take(batch(f"key/{number}"))
        done.set()
        for watcher in watchers:
            watcher.join()
    finally:
        sys.setswitchinterval(before)
    assert not broken
    assert len(live.of("r")["metrics"]) == 1000
