"""How values look to a person, and what JSON makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from orchestrator.cli import text
from orchestrator.records import RunStatus


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (59.4, "59s"),
        (59.9, "1m00s"),
        (3725, "1h02m"),
        (90_000, "1d01h"),
        (-1, "0.0s"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.5, "0s ago"), (61, "1m ago"), (7300, "2h ago"), (200_000, "2d ago"), (None, "-")]
)
def test_an_age_has_one_unit(seconds: float | None, shown: str) -> None:
    assert text.age(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.972222, "0.9722"),
        (3.0, "3"),
        (1e-7, "1e-07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "-"),
        (7, "7"),
        (True, "true"),
    ],
)
def test_a_number_takes_few_characters(value: object, shown: str) -> None:
    assert text.number(value) == shown


def test_columns_are_aligned_without_trailing_blanks() -> None:
    assert text.aligned(("a", "count"), [("long", "1"), ("x", "22")], right=[1]) == [
        "a     count",
        "long      1",
        "x        22",
    ]


@dataclass(frozen=True)
class Sample:
    status: RunStatus
    value: float
    where: Path


def test_everything_we_show_is_strict_json() -> None:
    document = {
        "s": Sample(RunStatus.failed, math.nan, Path("/a")),
        "n": np.float64(0.5),
        "a": np.array([1, 2]),
        "t": (math.inf, True, None),
    }
    assert json.loads(json.dumps(text.jsonable(document), allow_nan=False)) == {
        "s": {"status": "FAILED", "value": "nan", "where": "/a"},
        "n": 0.5,
        "a": [1, 2],
        "t": ["inf", True, None],
    }
