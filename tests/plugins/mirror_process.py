"""Mirrors that die: `python -m tests.plugins.mirror_process DATABASE_URL mlflow|tensorboard PLACE`.

Each one is a process of its own that writes a run with two attempts, copies it, and kills itself with SIGKILL after its
first call of the sink, then after some more (tests/unit/test_mirror_copies.py dies after every one, in memory).
The one that needs fewer calls is the last. Prints a line of JSON for each: how many calls it was given and the run,
then the signal that ended it (0: none).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from orchestrator.backends.mlflow import MlflowSink
from orchestrator.backends.tensorboard import TensorboardSink
from orchestrator.records import Fact, FactKind, RunStatus
from orchestrator.store.store import Store
from orchestrator.store.views import ChangedRuns, SinkCursor, SinkLag
from orchestrator.tracking.mirror import MirrorService
from tests.plugins.mirror_parts import START
from tests.plugins.store_producer import Producer, opened

EXPERIMENT = "killed-mirrors"
CALLS = {
    "mlflow": ("ensure_run", "set_tags", "log_params", "log_metrics", "log_datasets", "upload", "set_status"),
    "tensorboard": ("ensure_run", "rewind", "mark", "set_tags", "log_params", "log_metrics", "set_status"),
}
STRIDE = {"mlflow": 3, "tensorboard": 6}


class OneRun(Store):
    """A feed in which only one run ever changed: the others are left to whoever comes afterwards."""

    only = ""
    noticed = SinkCursor()

    def changed_runs(self, after: int = 0) -> ChangedRuns:
        found = super().changed_runs(after)
        return ChangedRuns(runs=tuple(run for run in found.runs if run == self.only), cursor=found.cursor)

    def cursor(self, sink: str, run: str = "") -> SinkCursor:
        return super().cursor(sink, run) if run else self.noticed

    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None:
        if run:
            super().save_cursor(sink, run, cursor)
        else:
            self.noticed = cursor

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        waiting = {*self.noticed.state.get("runs", ()), *self.changed_runs(self.noticed.facts).runs}
        return [
            SinkLag(sink=sink, points=0, seconds=0.0, runs=len(waiting), state="", error="", updated=0.0)
            for sink in SINKS
        ]


class Dying:
    """A sink that kills its process after so many calls."""

    calls_left = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name == "name" or name not in CALLS[self.name]:
            return found

        def called(*args: Any) -> Any:
            answer = found(*args)
            self.calls_left -= 1
            if self.calls_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return called


class DyingMlflow(Dying, MlflowSink): ...


class DyingTensorboard(Dying, TensorboardSink): ...


SINKS = {"mlflow": DyingMlflow, "tensorboard": DyingTensorboard}


def write_run(store: Store) -> str:
    ticket = opened(store, EXPERIMENT, workers=2, config={"lr": 0.1})
    run = ticket.run
    for attempt, steps in ((1, range(6)), (2, range(4, 10))):
        if attempt == 2:
            store.transition(run, 1, RunStatus.crashed, now=START + 50)
            ticket = opened(store, EXPERIMENT, run=run, workers=2, config={"lr": 0.1})
        ranks = [Producer(store, ticket, rank) for rank in range(2)]
        ranks[0].declare("loss", "mean")
        data = {"name": "digits", "fingerprint": "xxh128:ab", "split": "train"}
        ranks[0].tell(Fact(kind=FactKind.provenance, at=START, data={"datasets": {"digits/train": data}}))
        for rank in (0, 1):
            ranks[rank].log({"loss": [rank + 1 / (3 + step) for step in steps], "lr": [0.1] * len(steps)}, steps)
    store.transition(run, 2, RunStatus.finished, now=START + 190)
    return run


def live_and_die(database_url: str, sink_name: str, place: str, calls: int) -> None:
    store, sink = OneRun(database_url), SINKS[sink_name](place)
    store.only = write_run(store)
    print(json.dumps({"calls": calls, "run": store.only}), flush=True)
    sink.calls_left = calls
    mirror = MirrorService(store, sink)
    while mirror.step(time.monotonic()) or mirror.lag().runs:
        time.sleep(0.01)  # what was committed last is not visible to the feed at once


def main(database_url: str, sink_name: str, place: str) -> None:
    for calls in range(1, 200, STRIDE[sink_name]):
        pid = os.fork()  # no connection and no thread yet: importing MLflow once is what this saves
        if not pid:
            live_and_die(database_url, sink_name, place, calls)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
        print(json.dumps({"calls": calls, "signal": ended_by}), flush=True)
        if ended_by != signal.SIGKILL:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
