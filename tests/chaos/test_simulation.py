"""Delivery as a simulation: thousands of schedules of faults, and broken variants that must be found out."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.plugins import simulation

SCHEDULES = int(os.environ.get("ORC_SCHEDULES", "20000"))
"""More for a night: ORC_SCHEDULES=1000000."""
FIRST_SEED = int(os.environ.get("ORC_SEED", "0"))
FOUND_WITHIN = 3000
"""Schedules in which every mutant must be found."""


def test_no_schedule_of_faults_loses_doubles_or_reorders_anything() -> None:
    workers = min(os.cpu_count() or 1, 2)
    seeds = range(FIRST_SEED, FIRST_SEED + SCHEDULES, -(-SCHEDULES // workers))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(simulation.search, seeds, [min(seeds.step, seeds.stop - seed) for seed in seeds]))
    for found in results:
        again = f"python -m tests.plugins.simulation --seed {found.failed_seed}"
        assert found.failed_seed is None, "\n".join([*found.history, found.why, f"Again: {again}"])
    schedules, points = sum(found.schedules for found in results), sum(found.points for found in results)
    assert (schedules, points > 5 * SCHEDULES) == (SCHEDULES, True), "and they do something"
    seconds = sum(found.seconds for found in results)
    print(f"{schedules} schedules from seed {FIRST_SEED}, {points} points: {seconds:.1f} s of CPU")


@pytest.mark.parametrize("mutant", simulation.MUTANTS)
def test_a_broken_variant_is_found_out(mutant: str) -> None:
    found = simulation.search(0, FOUND_WITHIN, mutant)
    assert found.failed_seed is not None, f"{mutant} went unnoticed for {FOUND_WITHIN} schedules"
    print(f"{mutant}: after {found.schedules} schedules: {found.why}")


def test_a_seed_gives_the_same_schedule_again() -> None:
    with simulation.virtual():
        assert simulation.run(7).history == simulation.run(7).history
