"""Optuna behind our protocol: what it suggests follows from what the sweep has recorded, whatever was killed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
import pytest

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.execution.searchers import OptunaSearcher, _param, _value, library
from orchestrator.sweeps.search import searcher_for
from orchestrator.sweeps.space import Kind, Space, space
from orchestrator.sweeps.values import Past, Telling, Told

SPACE = space(
    {
        "lr": "loguniform(1e-4, 1e-1)",
        "size": "qrandint(8, 64, 8)",
        "kind": 'choice(a, b, [1, 2], true, 1)',
        "spread": "normal(0, 2)",
        "grown": "lognormal(0, 1)",
        "coarse": "qloguniform(0.25, 64, 0.25)",
        "deep": "when(kind == a, randint(1, 9))",
        "always": "fixed(3)",
    },
    ["lr * size <= 2"],
)  # fmt: skip


def settings(**more: Any) -> SweepConfig:
    return SweepConfig(
        **{
            "searcher": "optuna",
            "samples": 30,
            "objective": ["loss:min"],
            "searcher_args": {"n_startup_trials": 5},
            **more,
        }
    )


def scores(values: Mapping[str, Any]) -> list[float]:
    return [abs(math.log10(values["lr"]) + 2) + values["size"] / 64 + abs(values["spread"]) / 8]


class Record:
    """What the sweep's decisions say: the truth about a searcher."""

    def __init__(self) -> None:
        self.past: dict[int, Past] = {}
        self.seq = 0

    def suggested(self, number: int, values: Mapping[str, Any], origin: str) -> None:
        self.past[number] = Past(number=number, values=values, origin=origin, seq=self._next())

    def told(self, number: int, resource: float, result: Sequence[float] | None, state: Told) -> None:
        known = self.past[number]
        telling = Telling(
            seq=self._next(), resource=resource, scores=None if result is None else tuple(result), state=state
        )
        self.past[number] = Past.from_json(
            {**known.to_json(), "tellings": [each.to_json() for each in (*known.tellings, telling)]}
        )

    def _next(self) -> int:
        self.seq += 1
        return self.seq


class Sweep:
    """A driver with two trials at once: each is pruned at 1 or goes on to 3, some fail."""

    def __init__(self, url: str, name: str, config: SweepConfig | None = None, where: Space = SPACE) -> None:
        self.config, self.where = config or settings(), where
        self.url, self.name, self.record = url, name, Record()
        self.searcher = self.opened()
        self.searcher.rebuild(())

    def opened(self) -> Any:
        made = library(database_url=self.url, sweep=self.name)
        return searcher_for(self.config, self.where, 5, library=made)

    def restart(self) -> Any:
        """As after a kill: what was written so far is there, nothing is written any more."""
        if self.url:
            self.searcher.flush()
        self.searcher = self.opened()
        return self.searcher.rebuild(list(self.record.past.values()))

    def begin(self, number: int) -> None:
        found = self.searcher.suggest(number)
        self.record.suggested(number, found.values, found.origin)

    def hear(self, number: int, resource: float, result: Sequence[float] | None, state: Told) -> None:
        self.record.told(number, resource, result, state)
        self.searcher.told(number, self.record.past[number].values, resource, result, state)

    def finish(self, number: int) -> None:
        result = scores(self.record.past[number].values)
        if number % 7 == 3:
            self.hear(number, 1, None, Told.failed)
            return
        self.hear(number, 1, result, Told.pruned)
        if number % 2:
            self.hear(number, 3, [each * 0.9 for each in result], Told.complete)

    def values(self) -> list[Mapping[str, Any]]:
        return [past.values for past in self.record.past.values()]


def run(
    sweep: Sweep, trials: int, *, restarts: Sequence[int] = (), lost: Sequence[int] = ()
) -> list[Mapping[str, Any]]:
    """`restarts`: before these trials the driver is killed; `lost`: after it has asked for them, before that is
    recorded."""
    sweep.begin(0)
    for number in range(1, trials):
        if number in lost:
            sweep.searcher.suggest(number)
        if number in lost or number in restarts:
            assert sweep.restart().is_exact
        sweep.begin(number)
        sweep.finish(number - 1)
    return sweep.values()


@pytest.fixture(scope="module")
def undisturbed() -> list[Mapping[str, Any]]:
    return run(Sweep("", "undisturbed"), 30)


def test_suggestions_are_in_the_space_and_get_better(undisturbed: list[Mapping[str, Any]]) -> None:
    assert [SPACE.contains(values) for values in undisturbed] == [""] * 30
    first, last = ([scores(values)[0] for values in part] for part in (undisturbed[:5], undisturbed[-15:]))
    assert sum(last) / 15 < sum(first) / 5


def test_every_value_is_one_of_the_study_and_comes_back_from_it() -> None:
    seen = set()
    for number in range(200):
        for key, value in SPACE.draw(0, number).items():
            each = SPACE[key]
            if each.kind is Kind.fixed:
                continue
            param = _param(each, value)
            again = _value(each, param)
            assert each.why_not(again) == ""
            assert _param(each, again) == param
            if key not in ("spread", "grown"):  # of those the study has a fine lattice
                assert again == value
            seen.add((key, repr(value)))
    assert {("kind", item) for item in ("[1, 2]", "True", "1", "'a'", "'b'")} <= seen


def test_kills_at_any_place_change_no_suggestion(database_url: str, undisturbed: list[Mapping[str, Any]]) -> None:
    sweep = Sweep(database_url, "killed")
    assert run(sweep, 30, restarts=[1, 12], lost=[2, 20]) == undisturbed
    sweep.searcher.flush()
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        kept = connection.execute("SELECT state, count(*) FROM optuna.trials GROUP BY state").fetchall()
    assert ("RUNNING", 1) in kept, "only the last trial has not been heard of"


def test_a_study_that_heard_what_nobody_recorded_is_filled_again(
    database_url: str, undisturbed: list[Mapping[str, Any]]
) -> None:
    sweep = Sweep(database_url, "ahead")
    run(sweep, 8)
    sweep.searcher.told(7, sweep.record.past[7].values, 1, [-100.0], Told.complete)
    assert sweep.restart().is_exact
    for number in range(8, 14):
        sweep.begin(number)
        sweep.finish(number - 1)
    assert sweep.values() == undisturbed[:14]


def test_a_study_that_is_gone_is_filled_again(database_url: str, undisturbed: list[Mapping[str, Any]]) -> None:
    sweep = Sweep(database_url, "gone")
    run(sweep, 8)
    sweep.searcher.flush()
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        connection.execute("DROP SCHEMA optuna CASCADE")
    assert sweep.restart().is_exact
    for number in range(8, 14):
        sweep.begin(number)
        sweep.finish(number - 1)
    assert sweep.values() == undisturbed[:14]


def test_without_its_database_it_goes_on_and_says_so(
    caplog: pytest.LogCaptureFixture, undisturbed: list[Mapping[str, Any]]
) -> None:
    url = "postgresql://somebody:topsecret@127.0.0.1:9/nowhere"
    with caplog.at_level(logging.WARNING):
        sweep = Sweep(url, "away")
        sweep.searcher.flush()
    assert "kept in memory" in caplog.text
    assert "topsecret" not in caplog.text
    assert run(sweep, 6, restarts=[3]) == undisturbed[:6]


def test_points_and_known_results_are_learnt_from() -> None:
    known = [[dict(SPACE.draw(1, number)), [float(number)]] for number in range(12)]
    config = settings(points=[{"lr": 0.01}], searcher_args={"told": known, "n_startup_trials": 2})
    sweep = Sweep("", "warm", config)
    first = run(sweep, 8, restarts=[2, 5])
    assert first[0]["lr"] == 0.01
    assert sweep.searcher.total == 31
    assert run(Sweep("", "warm", config), 8) == first
    assert run(Sweep("", "cold", settings(points=[{"lr": 0.01}])), 8) != first


def test_several_objectives() -> None:
    config = settings(objective=["loss:min", "speed:max"])
    sweep = Sweep("", "several", config)
    for number in range(9):
        sweep.begin(number)
        values = sweep.record.past[number].values
        sweep.hear(number, 3, [*scores(values), values["size"]], Told.complete)
        if number == 6:
            assert sweep.restart().is_exact
    again = Sweep("", "again", config)
    for number in range(9):
        again.begin(number)
        values = again.record.past[number].values
        again.hear(number, 3, [*scores(values), values["size"]], Told.complete)
    assert again.values() == sweep.values()


def test_a_changed_space_goes_on_and_says_that_it_is_not_the_same(database_url: str) -> None:
    narrow = space({"lr": "uniform(0.1, 1)", "kind": "choice(a, b)"})
    wide = space({"lr": "uniform(0.5, 2)", "kind": "choice(a, b, c)"})
    sweep = Sweep(database_url, "changed", where=narrow)
    for number in range(4):
        sweep.begin(number)
        sweep.hear(number, 1, [sweep.record.past[number].values["lr"]], Told.complete)
    sweep.where = wide
    rebuilt = sweep.restart()
    assert not rebuilt.is_exact
    assert rebuilt.why
    sweep.begin(4)
    assert wide.contains(sweep.values()[-1]) == ""


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"objective": []}, "sweep.objective"),
        ({"searcher_args": {"sampler": "TPSampler"}}, "sweep.searcher_args.sampler"),
        ({"searcher_args": {"n_startup": 3}}, "sweep.searcher_args"),
    ],
)
def test_what_optuna_cannot_do_is_refused(more: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptunaSearcher(settings(**more), SPACE, 0, samples=3)
    assert caught.value.key == key
