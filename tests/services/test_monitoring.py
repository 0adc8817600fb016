"""A run of two ranks without Ray: what is measured of it and its machine, and that this holds nothing up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import orchestrator
from orchestrator.catalog import open_catalog
from orchestrator.records import RunSpec
from orchestrator.tracking.spool import spools
from orchestrator.training.pace import METRICS
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import wait_until

ORC = ("-m", "orchestrator.cli.main")


@pytest.fixture(scope="module")
def local(schema_url: str) -> Iterator[LocalStack]:
    stack = LocalStack.make(schema_url)
    replace(stack.stack, monitoring=0.5).save()
    yield stack
    stack.remove()


RANK = """
import sys, time
from pathlib import Path
from orchestrator.tracking.logger import Logger
logger = Logger(Path(sys.argv[1]), run=sys.argv[2], attempt=1, rank=int(sys.argv[3]))
step = 0
while True:
    logger.log({"count": step}, step)
    step += 1
    time.sleep(0.01)
"""


def test_a_run_has_its_machines_values_also_after_the_sampler_was_killed(local: LocalStack) -> None:
    tracker = local.tracker()
    run = tracker.open_run(RunSpec(experiment="measured", lease=2.5)).run
    where = tracker.describe()["spool_directory"]
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, where, run, str(rank)]) for rank in (0, 1)]
    try:
        wait_until(lambda: len(local.points(run, "system/cpu_percent")) >= 2, 30, "two samples")
        first = tracker.describe()["pid"]
        os.kill(first, signal.SIGKILL)
        killed = time.time()
        wait_until(lambda: tracker.describe()["pid"] != first, 30, "another tracker")
        wait_until(
            lambda: any(at > killed for at in local.store.points(run, "system/cpu_percent").times), 30, "a later sample"
        )
        for rank in (0, 1):
            wait_until(lambda rank=rank: local.points(run, "system/process/rss_bytes", rank), 30, "both processes")
            assert max(local.points(run, "system/process/rss_bytes", rank)) > 10e6, "numpy is in it"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    wait_until(lambda: not list(spools(Path(where))), 20, "everything shipped and removed, the samplers' as well")
    assert local.points(run, "system/memory_percent", rank=1) == [], "the machine's values once"
    steps = local.store.points(run, "system/cpu_percent").steps.tolist()
    assert steps == sorted(steps)
    assert 0 < steps[-1] <= max(local.points(run, "count", rank)[-1] for rank in (0, 1))


def test_a_short_run_has_its_speed_and_the_words_of_a_run_come_first(local: LocalStack, tmp_path: Path) -> None:
    data = TensorDataset(torch.zeros(10, 2))
    with orchestrator.start_run(experiment="speed", home=local.home) as run:
        loader = run.prepare(DataLoader(data, batch_size=4, shuffle=True))
        for _ in run.epochs(2):
            for _batch in loader:
                run.log({"train/loss": 1.0})
    rows = {row.key: row for row in local.store.summaries(run.id)}
    assert {rows[key].count for key in METRICS} == {2}, "the first pass, and what was left at the end"
    assert 0 <= rows["perf/data_wait"].minimum < rows["perf/step_time_max"].maximum
    assert rows["perf/peak_memory_bytes"].last > 50e6
    assert (rows["perf/step_time"].unit, rows["perf/step_time"].reduction) == ("s", "mean")
    with open_catalog(local.home) as catalog:
        assert catalog.main_metrics(run.id)[run.id].key == "train/loss"
    shown, _ = local.run(*ORC, "show", run.id, cwd=tmp_path)
    parts = [shown.index(words) for words in ("metrics\n", "train/loss", "speed and machine\n", "perf/step_time")]
    assert parts == sorted(parts)
