"""Schedulers of Ray Tune on lanes: HyperBand's brackets survive its driver, and PB2 hands real weights over."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.store.names import run_id
from orchestrator.store.store import Store
from tests.plugins.populations import assert_taken_over
from tests.plugins.runs import PROJECT, Orc, wait_until

LANE = ("resources.workers=1", "resources.cpus_per_worker=0.5", "sweep.objective=[loss:min]", "sweep.concurrency=1")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def store(orc: Orc) -> Iterator[Store]:
    with closing(orc.store()) as opened:
        yield opened


def test_brackets_survive_a_driver_that_is_killed(orc: Orc, store: Store, tmp_path: Path) -> None:
    """HyperBand of at most 4 epochs, halving: a bracket of 3 that all get 4, one of 3 that are asked at 2."""
    sweep = run_id(time.time() + 1)
    words = (*LANE, "train=searched:train", "lr=loguniform(1e-3,1.0)", "epochs=4", "pause=0.1", "sweep.samples=6")
    tuned = ("sweep.scheduler=tune:hyperband", "sweep.scheduler_args={max_t: 4, reduction_factor: 2}")
    process = orc.start("sweep", f"--run-id={sweep}", *words, *tuned, f"journal={tmp_path}", cwd=PROJECT)
    began = tmp_path / "began"
    wait_until(lambda: began.exists() and len(began.read_text().splitlines()) >= 4, 60, "the fourth job")
    process.kill()
    process.wait()
    orc("sweep", "resume", sweep, cwd=PROJECT, timeout=120)

    rows = store.sweep_trials(sweep)
    assert Counter(row.status for row in rows) == {"complete": 5, "stopped": 1}
    (stopped,) = (row for row in rows if row.status == "stopped")
    assert stopped.resource == 2
    at_two = {row.number: score for row in rows for _, at, score, _ in row.scores["rungs"] if at == 2}
    assert at_two[stopped.number] == max(score for score in at_two.values() if score is not None)
    assert all(row.resource == 4 for row in rows if row.status == "complete")
    verified = orc.json("sweep", "verify", sweep)
    assert verified["differences"] == []
    assert verified["kinds"]["tune"] == sum(len(row.scores["rungs"]) for row in rows)
    lines = [json.loads(line) for line in began.read_text().splitlines()]
    assert len({(line["run"], line["attempt"]) for line in lines}) == len(lines)


def test_pb2_gives_members_the_weights_of_better_ones(orc: Orc, store: Store, tmp_path: Path) -> None:
    sweep = run_id(time.time() + 2)
    words = (*LANE, "train=searched:member", "lr=loguniform(1e-3,1e-1)", "epochs=3", "pause=0", "sweep.samples=3")
    orc(
        *("sweep", f"--run-id={sweep}", *words, "sweep.scheduler=tune:pb2", f"journal={tmp_path}"),
        *("sweep.scheduler_args={perturbation_interval: 1, synch: true}",),
        cwd=PROJECT, timeout=120,
    )  # fmt: skip
    assert_taken_over(store, sweep, tmp_path)
    rows = store.sweep_trials(sweep)
    assert [(row.status, row.resource) for row in rows] == [("complete", 3.0)] * 3
    assert all(1e-3 <= row.values["lr"] <= 1e-1 for row in rows)
