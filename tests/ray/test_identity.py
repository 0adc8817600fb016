"""From Ray's dashboard to the run and back: names in its State and jobs APIs. They hang on Ray's inner parts (see
orchestrator/execution/ray_names.py): these tests tell when a new Ray has moved them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.store.store import Store
from tests.plugins.runs import Orc, wait_until

NAME = "named after/an otter"


@pytest.fixture(scope="module")
def run(orc: Orc) -> Iterator[str]:
    """The id of a run that trains on all CPUs while these tests look at it."""
    process = orc.start("run", "train=trains:slow", f"run.name={NAME}")
    store = orc.store()
    found = wait_until(lambda: [row.run for row in store.runs(search=NAME)] or process.poll(), 60, "the run")
    wait_until(
        lambda: len({row.rank for row in store.summaries(found[0])}) >= 2 or process.poll() is not None,
        60,
        "both ranks logging",
    )
    yield found[0]
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, out + err


def listed(orc: Orc, what: str) -> list[dict[str, Any]]:
    """Rows of the State API."""
    return orc.dashboard(f"/api/v0/{what}?limit=1000&detail=true")["data"]["result"]["result"]


def job_of(store: Store, run: str) -> str:
    return store.attempts(run)[0].job


def test_actors_groups_and_processes_say_run_attempt_and_rank(orc: Orc, run: str) -> None:
    title, job = f"{NAME}/{run}/attempt-1", job_of(orc.store(), run)
    actors = {row["name"]: row for row in listed(orc, "actors") if row["state"] == "ALIVE" and run in row["name"]}
    assert set(actors) == {f"{title}/{part}" for part in ("controller", "synchronization", "rank-0", "rank-1")}
    groups = [row["name"] for row in listed(orc, "placement_groups") if row["state"] == "CREATED"]
    assert title in groups
    for rank in (0, 1):
        row = actors[f"{title}/rank-{rank}"]
        assert row["job_id"] == job
        process = psutil.Process(row["pid"])
        wait_until(lambda p=process: p.cmdline()[0].strip("\0 "), 5, "a title")
        assert process.cmdline()[0].strip("\0 ") == f"ray::{NAME}/attempt-1/rank-{rank}"


def test_the_job_and_the_run_name_each_other(orc: Orc, run: str) -> None:
    (job,) = [job for job in orc.dashboard("/api/jobs/") if job["job_id"] == job_of(orc.store(), run)]
    said = {name: job["metadata"][name] for name in ("orc.run", "orc.name", "orc.experiment")}
    assert said == {"orc.run": run, "orc.name": NAME, "orc.experiment": "default"}


def test_a_runs_actors_are_not_taken_for_services(orc: Orc, run: str) -> None:
    said = orc("status", "--json")
    assert "orc-tracker" in said
    assert run not in said


def test_who_comes_to_a_full_cluster_says_what_it_waits_for(orc: Orc, run: str) -> None:
    second = orc.start("run", "train=trains:slow", "run.name=second")
    store = orc.store()

    def said() -> str:
        if not store.runs(search="second"):
            return ""
        log = Path(store.run("second").directory) / "logs" / "attempt-1" / "driver.log"
        return log.read_text() if log.exists() else ""

    wait_until(lambda: "waiting for 2 CPUs (2 workers of 1 CPU each); 0 of 2 CPUs free" in said(), 60, "a word")
    second.send_signal(signal.SIGINT)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=60)
    assert store.run("second").status.value == "CANCELLED", out + err
    assert "waiting for 2 CPUs" in out + err
