"""Sweeps on a real cluster of two CPUs: Tune, lanes, and what must not disturb them."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import ray_head
from orchestrator.store.names import run_id, trial_run_id
from tests.plugins.runs import Orc, wait_until

SMALL = ("resources.workers=2", "resources.cpus_per_worker=0.5", "sweep.objective=[loss:min]")
CURVE = ("train=searched:train", "lr=loguniform(1e-3,1.0)", "width=choice(4,8,16)")


pytestmark = pytest.mark.timeout(600)  # each starts several groups of workers


class Sweeps:
    """Starts sweeps and reads what became of their trials."""

    def __init__(self, orc: Orc) -> None:
        self.orc, self.store, self._last = orc, orc.store(), 0

    def start(self, *words: str) -> tuple[str, subprocess.Popen[str]]:
        self._last = max(int(time.time()), self._last + 1)
        sweep = run_id(float(self._last))
        return sweep, self.orc.start("sweep", f"--run-id={sweep}", *SMALL, *words)

    def end(self, process: subprocess.Popen[str], code: int = 0) -> str:
        try:
            out, err = process.communicate(timeout=270)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError("\n".join(process.communicate())) from None
        assert process.returncode == code, f"{out}\n{err}"
        return out + err

    def run(self, *words: str, code: int = 0) -> str:
        sweep, process = self.start(*words)
        self.end(process, code)
        return sweep

    def rows(self, sweep: str) -> list[Any]:
        return list(self.store.sweep_trials(sweep))

    def table(self, sweep: str) -> list[tuple[Any, ...]]:
        return [
            (row.number, json.dumps(row.values, sort_keys=True), row.status, row.rung, row.resource, repr(row.score))
            for row in self.rows(sweep)
        ]

    def points(self, sweep: str, key: str) -> list[list[float]]:
        """Of each trial, on rank 0. What the agents still have is waited for."""
        found = []
        for row in self.rows(sweep):
            run = trial_run_id(sweep, f"{row.number}.0")
            wait_until(lambda run=run: len(self.store.points(run, key, rank=0).values), 20, f"{key} of {run}")
            found.append(self.store.points(run, key, rank=0).values.tolist())
        return found

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in ray_head.parts(self.orc.home):
            with suppress(psutil.Error):
                if (process.cmdline() or [""])[0].startswith(title):
                    found.append(process)
        return found

    def kill(self, title: str) -> None:
        doomed = self.processes(title)
        assert doomed, f"there is no {title}"
        for process in doomed:
            process.kill()
        psutil.wait_procs(doomed, timeout=10)


@pytest.fixture(scope="module")
def sweeps(orc: Orc) -> Sweeps:
    return Sweeps(orc)


def test_a_lane_gives_the_numbers_that_fresh_workers_give(sweeps: Sweeps) -> None:
    words = ("train=searched:exact", "width=4,8,16", "epochs=2", "sweep.concurrency=1")
    kept, fresh = sweeps.run(*words, "sweep.lanes=auto"), sweeps.run(*words, "sweep.lanes=off")
    assert len(sweeps.rows(kept)) == 3
    assert sweeps.table(kept) == sweeps.table(fresh)
    for key in ("loss", "weights", "leftovers"):
        assert sweeps.points(kept, key) == sweeps.points(fresh, key)


def test_a_bad_trial_fails_alone_and_says_why(sweeps: Sweeps) -> None:
    kinds = ["raises", "good", "silent", "no_number", "exits", "memory", "hangs", "last"]
    sweep = sweeps.run(
        "train=searched:bad", f"kind={','.join(kinds)}", "sweep.hang=20", "sweep.restarts=0", "sweep.concurrency=2"
    )
    rows = {row.values["kind"]: row for row in sweeps.rows(sweep)}
    assert {kind for kind, row in rows.items() if row.status == "complete"} >= {"good", "last"}
    assert rows["good"].score == rows["last"].score == 0.5
    failed = {kind: row for kind, row in rows.items() if row.status == "failed"}
    assert failed.keys() >= {"raises", "silent", "exits", "memory", "hangs"}
    assert "this trial cannot be trained" in failed["raises"].reason
    assert all(row.reason for row in failed.values())
    # `score=best`: the NaN came after a good value.
    assert rows["no_number"].status == "complete" or rows["no_number"].reason


def test_dead_trainables_and_a_dead_desk_lose_no_trial_and_repeat_none(sweeps: Sweeps, tmp_path: Path) -> None:
    words = (*CURVE, "epochs=3", "pause=0.5", "sweep.samples=5", "sweep.concurrency=1")
    peace = sweeps.run(*words)
    journal = tmp_path / "began"

    def begun() -> set[str]:
        lines = journal.read_text().splitlines() if journal.exists() else []
        return {json.loads(line)["run"] for line in lines if line.endswith("}")}

    sweep, process = sweeps.start(*words, f"journal={tmp_path}")
    wait_until(lambda: len(begun()) >= 1 and sweeps.processes("ray::LaneTrainable"), 60, "a trial")
    sweeps.kill("ray::LaneTrainable")
    wait_until(lambda: len(begun()) >= 2, 60, "the next trial")
    sweeps.kill("ray::LaneDesk")
    sweeps.end(process)
    assert sweeps.table(sweep) == sweeps.table(peace)
    attempts = [len(sweeps.store.attempts(trial_run_id(sweep, f"{number}.0"))) for number in range(5)]
    assert attempts[0] == 1, "the lane worked on while its Trainable was replaced"
    assert sum(attempts) <= 6, "only what was running when the desk died was begun again"


def test_two_sweeps_share_the_cluster_and_do_not_touch_each_other(sweeps: Sweeps) -> None:
    words = (*CURVE, "epochs=2", "sweep.samples=3", "sweep.concurrency=1", "--name=same")
    alone = sweeps.run(*words)
    (first, one), (second, two) = sweeps.start(*words), sweeps.start(*words)
    sweeps.end(one)
    sweeps.end(two)
    assert sweeps.table(first) == sweeps.table(second) == sweeps.table(alone)


class Core:
    """Only what `Exchange` keeps; nobody asks it here."""

    def __init__(self, secret: str) -> None:
        self.secret = secret


def test_tune_writes_nothing_of_ours_into_its_files(tmp_path: Path) -> None:
    """`Tuner` pickles its searcher and its scheduler; what stands behind ours knows the user's secrets."""
    import pickle

    from ray import tune

    from orchestrator.execution.bridge import LaneTrainable, Quiet, SweepSearch
    from orchestrator.execution.tuner import Exchange

    secret = "canary-7f3a9c2e51"
    exchange = Exchange(Core(secret), None)  # type: ignore[arg-type]
    assert secret.encode() in pickle.dumps(exchange), "it would be written if somebody pickled it"
    tune.Tuner(
        LaneTrainable,
        tune_config=tune.TuneConfig(search_alg=SweepSearch(exchange, "t"), scheduler=Quiet(exchange)),
        run_config=tune.RunConfig(name="n", storage_path=str(tmp_path)),
    )
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"SweepSearch" in content for content in written), "it is still pickled at all"
    assert not any(secret.encode() in content for content in written)
