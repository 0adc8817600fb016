"""What became of a population's members: from their rows, their checkpoints, and the words of `searched:member`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.store.store import Store
from orchestrator.sweep_records import JobRow, TrialRow
from tests.plugins.runs import wait_until


def table(trials: Iterable[TrialRow]) -> list[Any]:
    """What must depend neither on lanes nor on what was killed."""
    return [
        (row.number, dict(row.values), row.status, row.resource, row.score, dict(row.scores), row.spread)
        for row in trials
    ]


def began(journal: Path) -> list[dict[str, Any]]:
    """What each attempt found at its beginning, in order."""
    file = journal / "began"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def taken_over(store: Store, sweep: str, journal: Path) -> list[tuple[JobRow, Mapping[str, Any]]]:
    """Each job that began with another member's checkpoint, with what its function found."""
    found, before = [], dict[str, int]()
    for job in sorted(store.sweep_jobs(sweep), key=lambda each: each.number):
        mine = [
            each
            for each in began(journal)
            if each["run"] == job.run and before.get(job.run, 0) < each["attempt"] <= job.attempt
        ]
        before[job.run] = job.attempt
        if job.clone:
            assert mine, f"job {job.number} has begun"
            found += [(job, each) for each in mine if each["step"] == job.clone["step"]]
    return found


def assert_taken_over(store: Store, sweep: str, journal: Path) -> None:
    """Weights and momentum are the donor's to the bit; the learning rate is the member's own, and is recorded."""
    learned = {row.number: row.values["lr"] for row in store.sweep_trials(sweep)}
    last = {job.run: (job, line) for job, line in taken_over(store, sweep, journal)}
    assert last, "somebody learned from another one"
    for job, line in last.values():
        donor = store.run(job.clone["run"])
        saved = load_checkpoint(f"{donor.directory}/checkpoints/{job.clone['name']}")
        assert line["weights"] == saved.model["weight"].flatten().tolist()
        assert line["momentum"] == saved.optimizer["state"][0]["momentum_buffer"].flatten().tolist()
        assert line["lr"] != saved.optimizer["param_groups"][0]["lr"]
        assert line["lr"] == learned[job.trial]
        assert store.run(job.run).parents[donor.run] == "fork"
        assert {each.name: each.value for each in store.params(job.run)}["lr"] == learned[job.trial]
        name = job.clone["name"]
        wait_until(lambda run=job.run, name=name: _is_told(store, run, name), 20, f"{job.run} tells of {name}")


def _is_told(store: Store, run: str, checkpoint: str) -> bool:
    return any(checkpoint in event.message for event in store.events(run) if event.kind == "cloned")
