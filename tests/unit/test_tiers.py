"""What pytest and pytest-xdist ask of our folders of tests."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.plugins.tiers import TierClock, is_on_ray, tier_of

TESTS = Path(__file__).parents[1]


def test_no_two_files_of_tests_have_one_name() -> None:
    # The folders are no packages: pytest refuses to collect the second file of a name.
    names = Counter(path.name for path in TESTS.glob("*/test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_who_starts_a_cluster_is_known_to_do_so() -> None:
    for path in TESTS.glob("*/test_*.py"):
        text = path.read_text()
        if re.search(r"from tests\.plugins\.(ray_nodes|runs import [\w, ]*\bOrc\b)", text):
            assert is_on_ray(f"tests/{path.parent.name}/{path.name}::test"), path


def test_a_test_belongs_to_the_folder_below_tests() -> None:
    assert tier_of("tests/ray/test_up.py::test_it") == "ray"
    assert tier_of("conftest.py") == "other"


def test_a_tier_takes_what_its_tests_and_their_fixtures_take() -> None:
    clock = TierClock()
    for when, seconds in (("setup", 25.0), ("call", 10.0), ("teardown", 1.0)):
        clock.count(
            pytest.TestReport("tests/unit/test_a.py::test_b", ("", 0, ""), {}, "passed", None, when, duration=seconds)
        )
    tier = clock.tiers["unit"]
    assert (tier.seconds, tier.tests, tier.outcomes) == (36.0, 1, {"passed": 1})
    assert clock.lines()[0].endswith("TOO SLOW for two cores")
