"""A key that rules the score is important, one that does nothing is not; and how a sweep is shown."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.config.settings import AshaConfig, PricesConfig, SweepConfig
from orchestrator.sweep_records import TrialRow
from orchestrator.sweeps.budget import Gang, Work
from orchestrator.sweeps.importance import importance
from orchestrator.sweeps.summary import (
    SweepView,
    best_of,
    ended_line,
    history,
    left,
    lines,
    planned_resource,
    rungs,
    sparkline,
    to_json,
)  # fmt: skip
from tests.plugins.sweep_ledger import MemoryLedger, Toy, toy_core


def table(count: int, seed: int = 0) -> list[tuple[Mapping[str, Any], float]]:
    """`lr` rules on a scale of its own, `kind` a little, `noise` not at all."""
    stream = random.Random(seed)
    rows: list[tuple[Mapping[str, Any], float]] = []
    for _ in range(count):
        lr, kind, noise = 10 ** stream.uniform(-4, -1), stream.choice("abc"), stream.random()
        score = (math.log10(lr) + 2.5) ** 2 + (0.3 if kind == "b" else 0.0) + 0.05 * stream.random()
        rows.append(({"lr": lr, "kind": kind, "noise": noise}, 1e6 if score > 2.2 else score))
    return rows


def test_what_rules_comes_first_and_what_does_nothing_is_near_zero() -> None:
    for seed in range(5):
        found = importance([table(200, seed)], ["noise", "kind", "lr"])
        assert [key for key, _ in found.ranked][0] == "lr"
        assert found.shares["lr"] > 0.6
        assert found.shares["noise"] < 0.05
        assert found.n == 200


def test_the_first_table_with_enough_scores_counts() -> None:
    assert importance([table(9), table(10)], ["lr"]).n == 10
    few = importance([table(9)], ["lr"])
    assert few.shares == {}
    assert few.why == "too few: 9 scores, 10 are needed"
    assert importance([], ["lr"]).n == 0


def test_a_value_that_most_trials_lack_and_a_constant_are_no_trouble() -> None:
    rows: list[tuple[Mapping[str, Any], float]] = [
        ({"a": 1, "b": 0.1 * n} if n % 3 else {"a": 1}, n) for n in range(12)
    ]
    found = importance([rows], ["a", "b", "never"])
    assert found.shares["a"] == found.shares["never"] == 0.0
    assert 0 < found.shares["b"] <= 1
    assert importance([[({"a": n}, 1.0) for n in range(12)]], ["a"]).shares == {"a": 0.0}, "all scores are equal"


def test_a_key_that_says_it_all_has_all() -> None:
    rows: list[tuple[Mapping[str, Any], float]] = [({"a": n % 2}, float(n % 2)) for n in range(20)]
    assert importance([rows], ["a"]).shares["a"] > 0.99


def trial(number: int, score: float | None, **more: Any) -> TrialRow:
    rung = [] if score is None else [[0, 1.0, score, 1]]
    given: dict[str, Any] = {"values": {"lr": 0.1 * number}, "status": "complete", "resource": 1.0, "n": 1}
    return TrialRow(number=number, score=score, scores={"rungs": rung}, **{**given, **more})


def view(*trials: TrialRow, **more: Any) -> SweepView:
    return SweepView(
        sweep="s", objectives=(("acc", "max"),), unit="epoch", samples=8, trials=trials, keys=("lr",), **more
    )


def test_the_best_by_direction_and_of_equal_ones_the_lower_number() -> None:
    shown = view(trial(0, 0.5), trial(1, 0.9), trial(2, None, status="failed"), trial(3, 0.9))
    assert [each.number for each in best_of(shown, 9)] == [1, 3, 0]
    assert history(shown) == [0.5, 0.9, 0.9]
    assert sparkline(history(shown)) == "▁██"
    assert sparkline([]) == ""
    assert len(sparkline(range(1000), 20)) == 20


def work(lane_seconds: float, **prices: Any) -> Work:
    return Work(
        gang=Gang(cpus=4, gpus=2), at_once=2, lane_seconds=lane_seconds,
        prices=PricesConfig(gpu_hour=2.0, currency="EUR") if not prices else PricesConfig(**prices),
    )  # fmt: skip


def test_what_is_left_follows_from_what_was_measured() -> None:
    done = view(trial(0, 0.5, resource=2.0), trial(1, None, status="running"), work=work(900.0))
    assert planned_resource(done) == 16.0
    rest = left(done)
    assert rest is not None
    assert (rest.trials, rest.seconds, rest.gpu_hours, rest.cpu_hours) == (7, 7 * 900 / 2, 7 * 0.5, 7 * 1.0)
    assert str(rest) == "about 52 min and 7.00 EUR for the 7 trials that are left"
    assert str(left(replace(done, work=work(900.0, gpu_hour=0.0)))).startswith("about 52 min and 3.50 GPU-hours")
    assert left(view(trial(0, None, status="running"), work=work(0.0))) is None, "nothing was measured"
    assert left(replace(done, work=None)) is None
    assert left(replace(done, samples=1)) is None, "nothing is left to do"
    one = left(replace(done, samples=2, work=replace(work(36.0), at_once=0)))
    assert str(one) == "about 0.04 EUR for the trial that is left", "nobody says how many run at once"
    assert any("about 52 min and 7.00 EUR" in line for line in lines(done))
    assert to_json(done)["left"]["money"] == 7.0


def test_with_rungs_and_populations_the_rest_is_counted_in_the_resource() -> None:
    waiting = [trial(n, 0.5, status="waiting", resource=1.0) for n in range(4)]
    rungs_of = {"milestones": (1.0, 3.0), "reduction": 3, "work": work(40.0)}
    rest = left(view(*waiting, **rungs_of))
    assert rest is not None
    assert rest.seconds == pytest.approx((8 + 2 * 2 - 4) * 10 / 2), "8 trials at 1, 2 of them go on for 2 more"
    population = left(view(*waiting, ends_at=5.0, work=work(40.0)))
    assert population is not None
    assert population.seconds == (8 * 5 - 4) * 10 / 2


def test_the_table_of_a_sweep_that_runs() -> None:
    ledger = MemoryLedger()
    config = SweepConfig(
        samples=12, objective=["loss:min"], scheduler="asha", asha=AshaConfig(min=1, max=9, reduction=3)
    )
    core = toy_core(config, ledger)
    toy = Toy(trouble=0.2)
    for _ in range(9):
        job = core.next_job()
        assert job
        core.ended(job.job, toy(job))
    job = core.next_job()
    assert job
    shown = core.view()
    text = lines(shown, width=100, lanes=("1 trial 3",))
    assert all(len(line) <= 100 for line in text)
    assert "asha" in text[0]
    assert "1 running" in text[0]
    assert any(line.split()[:3] == ["rung", "epochs", "done"] for line in text)
    first = rungs(shown)[0]
    assert sum(rung.done for rung in rungs(shown)) >= 9, "a function that returned early is in higher ones as well"
    assert 0 < first.promoted < first.done
    assert json.loads(json.dumps(to_json(shown)))["counts"]["running"] == 1
    best = best_of(shown)[0]
    assert ended_line(shown, best).startswith(f"trial {best.number}  ")
    while job is not None:
        core.ended(job.job, toy(job))
        job = core.next_job()
    assert core.is_over()
    assert any("importance" in line for line in lines(core.view()))
    assert {row["status"] for row in ledger.trials.values()} <= {"complete", "stopped", "failed"}
