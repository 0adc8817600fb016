"""How many slots a trainer gets."""

from __future__ import annotations

import pytest

from orchestrator.checkpoints.memory import NO_LIMIT, grant

GB = 1 << 30


@pytest.mark.parametrize(
    ("free_shm", "available", "cgroup", "limit", "slots"),
    [
        (100 * GB, 100 * GB, None, NO_LIMIT, 2),
        (100 * GB, 100 * GB, None, 19 * GB, 1),
        (100 * GB, 100 * GB, None, 20 * GB, 2),
        (100 * GB, 100 * GB, None, 9 * GB, 0),
        (100 * GB, 100 * GB, None, 0, 0),
        (100 * GB, 100 * GB, None, -GB, 0),
        (20 * GB, 100 * GB, None, NO_LIMIT, 1),
        (11 * GB, 100 * GB, None, NO_LIMIT, 0),
        (100 * GB, 12 * GB, None, NO_LIMIT, 1),
        (100 * GB, 0, None, NO_LIMIT, 0),
        (100 * GB, 100 * GB, (90 * GB, 100 * GB), NO_LIMIT, 0),
        (100 * GB, 100 * GB, (88 * GB, 100 * GB), NO_LIMIT, 1),
        (100 * GB, 100 * GB, (10 * GB, 100 * GB), NO_LIMIT, 2),
        (100 * GB, 100 * GB, (110 * GB, 100 * GB), NO_LIMIT, 0),
    ],
)
def test_the_tightest_of_all_limits_counts(
    free_shm: int, available: int, cgroup: tuple[int, int] | None, limit: int, slots: int
) -> None:
    assert grant(10 * GB, free_shm=free_shm, available=available, cgroup=cgroup, limit=limit) == slots


def test_no_memory_is_no_reason_to_fail() -> None:
    assert grant(0, free_shm=GB, available=GB, cgroup=None) == 2
    assert grant(1, free_shm=0, available=0, cgroup=None) == 0
