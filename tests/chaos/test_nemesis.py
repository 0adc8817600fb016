"""A job and a sweep under faults of a fixed seed come to what they would have come to in peace."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.plugins.nemesis import Fault, Journal, Nemesis, faults_of, planned
from tests.plugins.runs import Orc

SEED = 42
"""Its first minute: driver, tracker and two workers are killed, the database restarts, three others freeze."""
SECONDS = 60.0
KINDS = ("kill", "freeze", "restart")
"""What needs neither root nor a tool of the host."""


def test_the_same_seed_makes_the_same_plan_and_a_journal_replays_it(tmp_path: Path) -> None:
    plan = planned(random.Random(SEED), 1800.0, KINDS)
    assert plan == planned(random.Random(SEED), 1800.0, KINDS)
    assert plan != planned(random.Random(SEED + 1), 1800.0, KINDS)
    assert len(plan) > 100
    assert {fault.kind for fault in plan} == set(KINDS)
    journal = Journal(tmp_path / "journal")
    journal.write("plan", seed=SEED, seconds=1800.0, plan=[asdict(fault) for fault in plan])
    journal.close()
    assert faults_of(journal.path) == (SEED, plan)


def test_no_target_is_broken_twice_at_once() -> None:
    over: dict[str, Fault] = {}
    for fault in planned(random.Random(SEED), 7200.0):
        before = over.get(fault.target)
        assert before is None or before.at + before.seconds <= fault.at
        over[fault.target] = fault


@pytest.mark.timeout(600)  # two to three minutes, with the undisturbed ones that it is compared with
def test_a_job_and_a_sweep_under_random_faults_end_as_undisturbed_ones(orc: Orc, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    nemesis = Nemesis(orc, tmp_path, journal, epochs=8, trials=5, pause=0.15)
    plan = planned(random.Random(SEED), SECONDS, KINDS, pause=(5, 9), longest=6.0)
    with contextlib.closing(journal), contextlib.closing(nemesis):
        expected = nemesis.undisturbed()
        assert len(expected[1]) == 5
        nemesis.go(plan, 0.0, expected)
        nemesis.after()
    done = [line for line in map(json.loads, journal.path.read_text().splitlines()) if line["what"] == "done"]
    assert len(done) == nemesis.world.landed.total() >= len(plan) - 2, nemesis.world.missed
    assert all(line["proof"] for line in done)
    assert {line["fault"]["kind"] for line in done} == set(KINDS)
    assert nemesis.problems == []
    assert nemesis.job.gave_up + nemesis.sweep.gave_up == []
