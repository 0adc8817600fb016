"""A sweep whose driver, workers and tracker are killed ends with the table of one that nobody touched."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.plugins.runs import Orc
from tests.plugins.sweep_campaign import Campaign


@pytest.mark.timeout(400)
def test_after_kills_of_everything_the_table_of_trials_is_the_undisturbed_one(orc: Orc, tmp_path: Path) -> None:
    seed = int(os.environ.get("ORC_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"ORC_SEED={seed}")
    # The head takes half a minute to come back; the long campaign kills it, too.
    weights = {"driver": 2, "worker": 2, "group": 1, "tracker": 1}
    campaign = Campaign(orc, tmp_path, random.Random(seed), trials=9, pause=0.1, weights=weights)
    expected = campaign.undisturbed()
    assert len(expected) == 9
    campaign.go(3, expected)
    assert campaign.kills.total() == 3
    assert campaign.problems == []
