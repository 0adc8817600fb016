"""The sections `sweep` and `stopping`: what they refuse, that they change no run's hash, and what they search with."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config import Direction, Settings, SweepConfig, build, config_hash, dump
from orchestrator.errors import ConfigError
from orchestrator.sweeps.search import searcher_for, total
from orchestrator.sweeps.space import space
from orchestrator.sweeps.warm import MOST_POINTS, Earlier, warm, warmed

SPACE = space({"lr": "uniform(0, 1)", "size": "grid(1, 2)"})
LOSS = [("loss", Direction.min)]


def test_a_run_has_the_hash_that_it_had_before_there_were_sweeps() -> None:
    plain = dump(Settings())
    before = {name: value for name, value in plain.items() if name not in ("sweep", "stopping")}
    assert config_hash(plain) == config_hash(before)
    plain["sweep"]["samples"] = 10
    assert config_hash(plain) == config_hash(before)
    plain["stopping"]["patience"] = 3
    assert config_hash(plain) != config_hash(before)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"objective": ["loss:smallest"]}, "sweep.objective"),
        ({"objective": ["loss:min", "loss:max"]}, "sweep.objective"),
        ({"asha": {"min": 9, "max": 3}}, "sweep.asha.max"),
        ({"asha": {"reduction": 1}}, "sweep.asha.reduction"),
        ({"pbt": {"factors": [0.0]}}, "sweep.pbt.factors"),
        ({"pbt": {"quantile": 0.6}}, "sweep.pbt.quantile"),
        ({"budget": {"money": 5}}, "sweep.budget.money"),
        ({"samples": -1}, "sweep.samples"),
    ],
)
def test_what_contradicts_itself_is_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(SweepConfig, given, key="sweep")
    assert caught.value.key == key


def test_an_objective_without_a_direction_has_its_natural_one() -> None:
    settings = SweepConfig(objective=["val/Loss", "val/accuracy", "perf/step:min"])
    assert settings.objectives == [
        ("val/Loss", Direction.min), ("val/accuracy", Direction.max), ("perf/step", Direction.min),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "trials"),
    [
        ({"samples": 5}, 10),
        ({"samples": 5, "points": [{"lr": 0.5}]}, 11),
        ({"samples": 5, "searcher": "optuna"}, 5),
        ({"samples": 5, "searcher": "tune:hyperopt", "points": [{"lr": 0.5}]}, 6),
        ({"samples": 5, "scheduler": "pbt"}, 5),
        ({"samples": 5, "scheduler": "pbt", "pbt": {"population": 7}, "points": [{"lr": 0.5}, {"lr": 0.6}]}, 7),
    ],
)
def test_number_of_trials(given: dict[str, Any], trials: int) -> None:
    settings = build(SweepConfig, given)
    assert total(settings, SPACE) == trials
    if settings.searcher == "random":
        searcher = searcher_for(settings, SPACE, 0)
        assert searcher.suggest(trials - 1) is not None
        assert searcher.suggest(trials) is None


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "sweep.samples"),
        ({"searcher": "optuna"}, "sweep.samples"),
        ({"searcher": "randon", "samples": 1}, "sweep.searcher"),
        ({"searcher": "grid"}, "lr"),
        ({"scheduler": "pbt", "samples": 1}, "sweep.pbt.population"),
        ({"scheduler": "pbt", "samples": 2, "points": [{}, {}, {}]}, "sweep.pbt.population"),
        ({"samples": 1, "points": [{"lr": 2.0}]}, "sweep.points[0].lr"),
    ],
)
def test_a_search_without_sense_is_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        total(build(SweepConfig, given), SPACE)
    assert caught.value.key == key


def earlier(run: str, lr: float, loss: float | None, **more: Any) -> Earlier:
    return Earlier(run=run, params={"lr": lr, "size": 1, "other": "x"}, metrics={"loss": loss}, **more)


def test_earlier_runs_that_fit_are_known_best_first_and_others_are_counted() -> None:
    found = warm(
        [
            earlier("a", 0.5, 0.3), earlier("b", 0.6, 0.1), earlier("c", 7.0, 0.1), earlier("d", 0.1, None),
            earlier("e", 0.2, 0.0, is_complete=False), earlier("f", 0.2, float("nan")),
        ],
        SPACE,
        LOSS,
    )  # fmt: skip
    assert [(values["lr"], scores) for values, scores in found.known] == [(0.6, [0.1]), (0.5, [0.3])]
    assert sum(found.left_out.values()) == 4
    assert any("outside the space" in why for why in found.left_out)


def test_what_is_known_is_written_into_the_settings() -> None:
    found = warm([earlier(str(n), n / 20, n / 10) for n in range(1, 11)], SPACE, LOSS)
    points = warmed(SweepConfig(samples=2, points=[{"lr": 0.9}]), found).points
    assert points[0] == {"lr": 0.9}
    assert [point["lr"] for point in points[1:]] == [n / 20 for n in range(1, MOST_POINTS + 1)]
    members = warmed(SweepConfig(samples=3, scheduler="pbt"), found)
    assert total(members, SPACE) == 3
    told = warmed(SweepConfig(samples=2, searcher="optuna"), found)
    assert len(told.searcher_args["told"]) == 10
    assert build(SweepConfig, dump(told)) == told
