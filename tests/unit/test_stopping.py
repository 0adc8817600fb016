"""When the rules of `stopping` end a training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.training.stopping import Stopping, StopRules

NAN, INF = math.nan, math.inf


def rules(direction: str = "min", **settings: Any) -> Stopping:
    return Stopping(rules=StopRules(**settings), metric="val/loss", direction=direction)


def ends_at(stopping: Stopping, values: Sequence[float]) -> int | None:
    """The number of the report that ends it, from 1."""
    for number, value in enumerate(values, 1):
        if stopping.reported(value):
            return number
    return None


@pytest.mark.parametrize(
    ("settings", "direction", "values", "at"),
    [
        ({"patience": 2}, "min", [3, 2, 2, 2, 1], 4),
        ({"patience": 2}, "min", [3, 2, 2, 1, 1, 1], 6),
        ({"patience": 2}, "max", [1, 2, 2, 2, 3], 4),
        ({"patience": 2}, "min", [3, 2, 1, 0], None),
        ({"patience": 2, "min_delta": 0.5}, "min", [3, 2.8, 2.6, 1], 3),
        ({"patience": 3, "min_delta": 0.5}, "min", [3, 2.8, 2.4, 2.3, 1.8], None),
        ({"patience": 2}, "min", [3, NAN, NAN, 1], 3),
        ({"patience": 2}, "min", [NAN, NAN, 1], 2),
        ({"patience": 2}, "min", [INF, 5, 6, 6], 4),
        ({"patience": 2, "grace": 5}, "min", [3, 3, 3, 3, 3, 3], 6),
        ({"patience": 2, "grace": 5}, "min", [3, 3, 3, 3, 3, 2], None),
        ({"plateau": 3, "plateau_std": 0.1}, "min", [3, 1, 1.1, 1.1], 4),
        ({"plateau": 3, "plateau_std": 0.0}, "min", [1, 1, 1], 3),
        ({"plateau": 3, "plateau_std": 9.0}, "min", [1, NAN, 1, 1, 1], 5),
        ({"target": 0.9}, "max", [0.5, 0.9], 2),
        ({"target": 0.1}, "min", [0.5, 0.11, 0.05], 3),
        ({"target": 0.1, "grace": 2}, "min", [0.05, 0.05, 0.5, 0.05], 4),
        ({"divergence": True}, "min", [1, INF], 2),
        ({"divergence": True}, "max", [1, NAN], 2),
        ({"divergence": False, "target": 0.0}, "min", [1, NAN, INF], None),
    ],
)
def test_a_rule_ends_the_training_at_its_report(
    settings: dict[str, Any], direction: str, values: list[float], at: int | None
) -> None:
    assert ends_at(rules(direction, **settings), values) == at


def test_the_reason_names_metric_and_numbers() -> None:
    patient = rules(patience=2)
    assert [patient.reported(value) for value in (0.5, 0.6, 0.7)][
        -1
    ] == "no better val/loss in 2 reports: the best is 0.5"
    assert rules("max", target=0.9).reported(0.95) == "val/loss reached 0.95, the target is 0.9"
    assert rules(divergence=True).reported(NAN) == "val/loss diverged: it is nan"


def test_after_any_report_the_state_gives_the_same_end() -> None:
    values = [5.0, NAN, 4.0, 4.0, INF, 4.2, 4.1, 4.1, 4.1, 3.0]
    settings: dict[str, Any] = {"patience": 6, "plateau": 3, "plateau_std": 0.01, "grace": 1}
    whole = ends_at(rules(**settings), values)
    assert whole == 9
    for cut in range(whole):
        first, second = rules(**settings), rules(**settings)
        for value in values[:cut]:
            first.reported(value)
        second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert ends_at(second, values[cut:]) == whole - cut


def test_settings_are_taken_by_name_and_say_whether_anything_is_on() -> None:
    assert not StopRules.of({"metric": "a", "grace": 3, "something": 1}).is_active
    assert StopRules.of({"target": 0.0}).is_active
    assert StopRules.of({"patience": 3}) == StopRules(patience=3)
