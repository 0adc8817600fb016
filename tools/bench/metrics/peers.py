"""The same work given to other trackers: `python peers.py log|sustained|stored TOOL …`, in the peers' own environment.

Each is used as its documentation shows, with what its users would have: wandb offline, an Aim repository, MLflow with
its default SQLite store (no server, which would only add time). Prints one JSON object. Standard library and the peer
only.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

logging.disable(logging.WARNING)
ONE = {"train/loss": 0.5}
TEN = {f"train/metric_{number}": number / 7 for number in range(10)}


class Wandb:
    calls, rows = 2000, 20_000

    def __init__(self, directory: Path) -> None:
        import wandb

        os.environ.update({"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"})
        settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True)
        self.run = wandb.init(mode="offline", project="bench", dir=str(directory), settings=settings)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


class TensorboardX:
    calls, rows = 2000, 10_000

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(directory))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self.writer.close()


class Aim:
    calls, rows = 2000, 5_000

    def __init__(self, directory: Path) -> None:
        import aim

        self.run = aim.Run(repo=str(directory), system_tracking_interval=None, capture_terminal_logs=False)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.track(metrics, step=step)

    def finish(self) -> None:
        self.run.close()


class Mlflow:
    calls, rows = 200, 3_000

    def __init__(self, directory: Path) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_tracking_uri(f"sqlite:///{directory}/mlflow.db")
        self.run = mlflow.start_run()

    def log(self, metrics: dict[str, float], step: int) -> None:
        if len(metrics) == 1:
            ((key, value),) = metrics.items()
            self.mlflow.log_metric(key, value, step=step)
        else:
            self.mlflow.log_metrics(metrics, step=step)

    def finish(self) -> None:
        self.mlflow.end_run()


TOOLS = {"wandb": Wandb, "tensorboardX": TensorboardX, "aim": Aim, "mlflow": Mlflow}


def cost(call: Callable[[int], None], calls: int, block: int = 20) -> dict[str, float]:
    """Microseconds per call: the median over blocks of calls (one call of the fastest is shorter than the clock's own),
    and the 99.9th percentile of single calls."""
    for step in range(calls // 10):
        call(step)
    clock = time.perf_counter_ns
    blocks, singles = [], []
    for start in range(0, calls, block):
        began = clock()
        for step in range(start, start + block):
            call(step)
        blocks.append((clock() - began) / 1000 / block)
    for step in range(calls):
        began = clock()
        call(step)
        singles.append((clock() - began) / 1000)
    singles.sort()
    return {"median": statistics.median(blocks), "p999": singles[int(len(singles) * 0.999)]}


def log_cost(tool: str, directory: Path) -> dict[str, dict[str, float]]:
    kind = TOOLS[tool]
    found = {}
    for name, metrics in (("one", ONE), ("ten", TEN)):
        place = directory / name
        place.mkdir()
        peer = kind(place)
        found[name] = cost(lambda step, peer=peer, metrics=metrics: peer.log(metrics, step), kind.calls)
        peer.finish()
    return found


def sustained(tool: str, directory: Path) -> dict[str, float]:
    """Points per second until they are durable: on disk and fsynced."""
    kind = TOOLS[tool]
    peer = kind(directory)
    started = time.perf_counter()
    if tool == "mlflow":
        points = _log_batches(peer)
    else:
        for step in range(kind.rows):
            peer.log(TEN, step)
        points = kind.rows * len(TEN)
    peer.finish()
    os.sync()
    return {"points": points, "seconds": time.perf_counter() - started}


def _log_batches(peer: Mlflow) -> int:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client, now = MlflowClient(), int(time.time() * 1000)
    for start in range(0, peer.rows * 10, 1000):  # few keys and many steps: its fastest shape, at its largest size
        batch = [Metric("train/loss", 0.5, now + step, step) for step in range(start, start + 1000)]
        client.log_batch(peer.run.info.run_id, metrics=batch)
    return peer.rows * 10


def stored(database: str, keys: int, points: int) -> dict[str, int]:
    """Gives MLflow a PostgreSQL database and logs one run's points into it."""
    import mlflow
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(database)
    client, now = MlflowClient(), int(time.time() * 1000)
    runs = max(1, 20_000 // (keys * points))
    for number in range(runs):
        run = client.create_run("0", run_name=f"run {number}").info.run_id
        batch: list[Metric] = []
        for key in range(keys):
            batch += [Metric(f"train/metric_{key}", (step + 0.1) / 7, now + 50 * step, step) for step in range(points)]
            while len(batch) >= 1000 or (batch and key == keys - 1):
                client.log_batch(run, metrics=batch[:1000])
                batch = batch[1000:]
    return {"points": runs * keys * points}


def main() -> None:
    what, tool, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.chdir(directory)
        if what == "stored":
            found: object = stored(more[0], int(more[1]), int(more[2]))
        else:
            found = {"log": log_cost, "sustained": sustained}[what](tool, Path(directory))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
