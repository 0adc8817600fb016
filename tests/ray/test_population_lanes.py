"""A population on lanes: members go on with what their donors had, also on another lane's workers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from tests.plugins.populations import assert_taken_over, table
from tests.plugins.runs import PROJECT, Orc

WORDS = (
    *("train=searched:member", "lr=loguniform(1e-3,1e-1)", "epochs=2", "pause=0", "sweep.scheduler=pbt"),
    *("sweep.samples=3", "resources.workers=2", "resources.cpus_per_worker=0.5", "sweep.objective=[loss:min]"),
    "sweep.concurrency=2",
)
pytestmark = pytest.mark.timeout(300)


def test_members_go_on_with_the_weights_of_better_ones(orc: Orc, tmp_path: Path) -> None:
    sweep = "20261122-000000-00000070"
    orc("sweep", *WORDS, f"journal={tmp_path}", f"--run-id={sweep}", cwd=PROJECT, timeout=270)
    with closing(orc.store()) as store:
        assert_taken_over(store, sweep, tmp_path)
        assert [row[3] for row in table(store.sweep_trials(sweep))] == [2.0] * 3
