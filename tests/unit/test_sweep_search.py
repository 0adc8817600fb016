"""Which configuration a trial gets from the random and the grid searcher and from the user's own points."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, UserError
from orchestrator.sweeps.search import GridSearcher, Heard, PointsFirst, RandomSearcher, Searcher, check_name, in_order
from orchestrator.sweeps.space import space
from orchestrator.sweeps.values import Past, Rebuilt, Suggestion, Telling, Told

SPACE = space({"lr": "loguniform(1e-4,1e-1)", "a": "1,2", "b": "x,y,z"})
GRID = space({"a": "1,2", "b": "x,y,z", "c": "fixed(0)"})


def all_of(searcher: Searcher) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while suggestion := searcher.suggest(len(found)):
        found.append(dict(suggestion.values))
    return found


def test_the_grid_is_gone_through_once_per_sample() -> None:
    searcher = RandomSearcher(SPACE, seed=1, samples=2)
    trials = all_of(searcher)
    assert searcher.total == len(trials) == 12
    turn = [(1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")]
    assert [(trial["a"], trial["b"]) for trial in trials] == turn + turn
    assert len({trial["lr"] for trial in trials}) == 12


def test_more_samples_append_trials() -> None:
    few, many = (all_of(RandomSearcher(SPACE, seed=1, samples=samples)) for samples in (2, 5))
    assert many[: len(few)] == few


def test_without_samples_the_grid_is_tried_once() -> None:
    assert len(all_of(RandomSearcher(GRID, seed=0, samples=0))) == 6
    assert all_of(RandomSearcher(space({"a": "fixed(1)"}), seed=0, samples=0)) == [{"a": 1}]


def test_drawing_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sweep.samples = 0: lr would be drawn") as caught:
        RandomSearcher(SPACE, seed=0, samples=0)
    assert "sweep.samples=20" in str(caught.value)


def test_a_combination_that_the_constraints_leave_nothing_for_is_refused() -> None:
    found = space({"batch": "1,10", "lr": "uniform(0.2,1)"}, ["lr * batch <= 1"])
    with pytest.raises(UserError, match=r"with batch=10 meets.*lr \* batch <= 1` refused 1000"):
        RandomSearcher(found, seed=0, samples=1)


def test_a_conditional_grid_does_not_decide_what_it_depends_on() -> None:
    found = space({"kind": "choice(p,q)", "depth": "when(kind == p, grid(1,2))"})
    trials = all_of(RandomSearcher(found, seed=0, samples=30))
    assert len(trials) == 60
    assert {trial["kind"] for trial in trials} == {"p", "q"}
    assert all(("depth" in trial) == (trial["kind"] == "p") for trial in trials)


def test_the_grid_searcher_tries_each_combination_once() -> None:
    searcher = GridSearcher(GRID)
    assert [tuple(trial.values()) for trial in all_of(searcher)] == [
        (1, "x", 0), (1, "y", 0), (1, "z", 0), (2, "x", 0), (2, "y", 0), (2, "z", 0),
    ]  # fmt: skip
    assert searcher.suggest(6) is None
    first = searcher.suggest(0)
    assert first is not None
    assert first.origin == "grid"


def test_the_grid_searcher_draws_nothing() -> None:
    with pytest.raises(ConfigError, match=r"lr.*is drawn at random.*lr=grid"):
        GridSearcher(SPACE)


def test_points_come_first_and_the_rest_is_drawn() -> None:
    rest = RandomSearcher(SPACE, seed=1, samples=1, first=3)
    points: list[dict[str, Any]] = [{"lr": 0.01, "a": 2, "b": "z"}, {"lr": 0.02}, {}]
    searcher = PointsFirst(points, rest, space=SPACE, seed=1)
    trials = all_of(searcher)
    assert len(trials) == 9
    assert trials[0] == points[0]
    assert trials[1]["lr"] == 0.02
    assert all(SPACE.contains(trial) == "" for trial in trials)
    assert trials[1] == {**SPACE.draw(1, 1), "lr": 0.02}
    assert trials[2] == SPACE.draw(1, 2)
    origins = [suggestion.origin for number in range(4) if (suggestion := searcher.suggest(number))]
    assert origins == ["point", "point", "point", "random"]


def test_a_partial_point_keeps_its_conditional_value() -> None:
    found = space({"hidden": "choice(16,32,64)", "dropout": "when(hidden in [32,64], uniform(0,0.5))"})
    rest = RandomSearcher(found, seed=0, samples=1, first=20)
    for trial in all_of(PointsFirst([{"dropout": 0.25}] * 20, rest, space=found, seed=0))[:20]:
        assert trial["dropout"] == 0.25
        assert trial["hidden"] in (32, 64)


@pytest.mark.parametrize(
    ("point", "key", "words"),
    [
        ({"hiden": 16}, "sweep.points[1].hiden", "Did you mean hidden?"),
        ({"qqq": 16}, "sweep.points[1].qqq", "Searched are hidden, dropout"),
        ({"hidden": 17}, "sweep.points[1].hidden", "is none of 16, 32"),
        ({"dropout": 0.9}, "sweep.points[1].dropout", "is outside 0 … 0.5"),
        ({"hidden": 16, "dropout": 0.1}, "sweep.points[1].dropout", "only when hidden == 32"),
        ({"hidden": 32, "dropout": 0.45}, "sweep.points[1]", "`dropout < 0.4` refused"),
    ],
)
def test_a_point_outside_the_space_is_refused(point: dict[str, Any], key: str, words: str) -> None:
    found = space({"hidden": "choice(16,32)", "dropout": "when(hidden == 32, uniform(0,0.5))"}, ["dropout < 0.4"])
    rest = RandomSearcher(found, seed=0, samples=1, first=2)
    with pytest.raises(ConfigError) as caught:
        PointsFirst([{}, point], rest, space=found, seed=0)
    assert caught.value.key == key
    assert words in str(caught.value)


def searchers() -> list[Searcher]:
    rest = RandomSearcher(SPACE, seed=5, samples=4, first=2)
    return [
        RandomSearcher(SPACE, seed=5, samples=4),
        GridSearcher(GRID, seed=5),
        PointsFirst([{"lr": 0.01}, {"a": 2}], rest, space=SPACE, seed=5),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_asking_twice_gives_the_same_suggestion(kind: int) -> None:
    searcher = searchers()[kind]
    assert searcher.suggest(3) == searcher.suggest(3)
    assert searcher.suggest(1) == searcher.suggest(1)


@pytest.mark.parametrize("kind", range(3))
@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from([1.0, 3.0, 9.0]),
            st.none() | st.tuples(st.floats()),
            st.sampled_from(Told),
        ),
        max_size=8,
    )
)
def test_a_rebuilt_searcher_goes_on_with_the_same_suggestions(kind: int, told: list[tuple]) -> None:
    before, after = searchers()[kind], searchers()[kind]
    suggested = {number: before.suggest(number) for number in range(5)}
    tellings: dict[int, list[Telling]] = {number: [] for number in suggested}
    for seq, (number, resource, scores, state) in enumerate(told):
        suggestion = suggested[number]
        assert suggestion is not None
        before.told(number, suggestion.values, resource, scores, state)
        tellings[number].append(Telling(seq=seq, resource=resource, scores=scores, state=state))
    history = [
        Past(number=number, values=suggestion.values, origin=suggestion.origin, tellings=tuple(tellings[number]))
        for number, suggestion in suggested.items()
        if suggestion is not None
    ]
    stored = json.dumps([past.to_json() for past in history], allow_nan=False)
    read = [Past.from_json(past) for past in json.loads(stored)]
    assert after.rebuild(list(reversed(read))) == Rebuilt(is_exact=True)
    assert after.suggest(5) == before.suggest(5)
    assert [telling.seq for _, telling in in_order(read)] == list(range(len(told)))


def test_what_was_told_is_an_input() -> None:
    searcher = RandomSearcher(SPACE, seed=5, samples=4)
    before = searcher.suggest(3)
    searcher.told(0, {}, 1.0, [0.5], Told.pruned)
    after = searcher.suggest(3)
    assert before is not None
    assert after is not None
    assert after.values == before.values
    assert (before.inputs["n_told"], after.inputs["n_told"]) == (0, 1)
    assert before.inputs["told"] != after.inputs["told"]
    assert after.inputs["seed"] == 5
    assert after.inputs["number"] == 3
    assert after.inputs["space"] == SPACE.hash


def test_the_digest_tells_results_and_orders_apart() -> None:
    told = [(0, 1, [0.5], Told.pruned), (0, 1, [math.nan], Told.pruned), (1, 1, None, Told.failed)]
    digests = set()
    for sequence in ([0], [1], [2], [0, 1], [1, 0], [0, 0], []):
        heard = Heard()
        for place in sequence:
            heard.add(*told[place])
        digests.add(heard.digest)
    assert len(digests) == 7


def test_values_survive_json() -> None:
    suggestion = RandomSearcher(SPACE, seed=5, samples=4).suggest(3)
    assert suggestion is not None
    assert Suggestion.from_json(json.loads(json.dumps(suggestion.to_json()))) == suggestion
    telling = Telling(seq=1, resource=3.0, scores=(math.inf, -math.inf, 0.1), state=Told.complete)
    assert Telling.from_json(json.loads(json.dumps(telling.to_json(), allow_nan=False))) == telling


def test_a_mistyped_searcher_is_refused() -> None:
    for name in ("random", "grid", "optuna", "tune:hyperopt"):
        check_name(name)
    with pytest.raises(ConfigError, match="Did you mean random"):
        check_name("randm")
    with pytest.raises(ConfigError, match="tune:NAME"):
        check_name("xyz")
