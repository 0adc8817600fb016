"""When an alert fires and when it is over."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.alerts.rules import (
    DEFAULTS,
    Count,
    Point,
    Rule,
    State,
    Turn,
    duration,
    ended,
    happened,
    observe,
    parse,
    parse_rules,
    tick,
)
from orchestrator.errors import ConfigError

NAN, INF = math.nan, math.inf


def rule(**raw: Any) -> Rule:
    return parse("r", {"metric": "loss", "cooldown": 0, **raw})


def points(values: list[float], start: int = 0, every: float = 1.0) -> list[Point]:
    return [(start + number, every * (start + number), value) for number, value in enumerate(values)]


def judged(which: Rule, values: list[float], state: State | None = None, every: float = 1.0) -> list[tuple[int, bool]]:
    """(step, fired) of each turn, when the points come one at a time, at their own times."""
    state = state or State()
    found: list[Turn] = []
    for point in points(values, every=every):
        found += observe(which, state, "loss", [point], point[1])
    return [(turn.step or 0, turn.is_firing) for turn in found]


def test_a_threshold_fires_when_it_is_passed_and_is_over_when_it_is_not() -> None:
    assert judged(rule(when="> 5"), [1, 5, 6, 7, 5, 6]) == [(2, True), (4, False), (5, True)]


@pytest.mark.parametrize(("when", "value"), [(">= 5", 5), ("< -1e-3", -1), ("<= 2.5", 2.5), ("== 0", 0), ("!= 1", 2)])
def test_every_comparison_is_what_it_says(when: str, value: float) -> None:
    assert judged(rule(when=when), [value]) == [(0, True)]


def test_several_points_in_a_row_are_needed_and_one_between_begins_anew() -> None:
    assert judged(rule(when="> 5", **{"for": 3}), [6, 6, 1, 6, 6, 6]) == [(5, True)]


def test_it_is_over_only_where_the_lower_threshold_says_so() -> None:
    """Without hysteresis a value at the edge would fire each time."""
    assert judged(rule(when="> 5", clear="< 4"), [6, 4.5, 6, 4.5, 3, 4.5, 6]) == [(0, True), (4, False), (6, True)]


def test_a_length_of_time_is_that_of_the_points() -> None:
    """What comes late, after an outage, all at once, is judged as if it had come in time."""
    which, state = rule(when="< 5", **{"for": "1m"}), State()
    turns = observe(which, state, "loss", points([1] * 10, every=10.0), now=1e6)
    assert [(turn.step, turn.is_firing) for turn in turns] == [(6, True)]


def test_no_two_firings_are_closer_than_the_cooldown() -> None:
    which = rule(when="> 5", cooldown=10)
    assert judged(which, [6, 1, 6, 1, 6, 1, 1, 1, 1, 1, 6]) == [(0, True), (1, False), (10, True)]


def test_what_holds_when_the_cooldown_ends_fires_then() -> None:
    assert judged(rule(when="> 5", cooldown=5), [6, 1, 6, 6, 6, 6, 6]) == [(0, True), (1, False), (5, True)]


def test_a_nan_says_nothing_to_a_threshold() -> None:
    assert judged(rule(when="> 5", **{"for": 2}), [6, NAN, 6, NAN, NAN, 1]) == [(2, True)]
    assert judged(rule(when="< 5"), [NAN]) == []


def test_nan_and_infinity_are_alerts_of_their_own() -> None:
    assert judged(rule(when="nan"), [1, NAN, INF, -INF, 2]) == [(1, True), (4, False)]


def test_a_change_is_measured_against_so_many_points_before() -> None:
    assert judged(rule(when="change > 2 over 2"), [0, 1, 2, 5, 6, 7]) == [(3, True), (5, False)]
    assert judged(rule(when="change < -50%"), [10, 6, 2.9, 2.8]) == [(2, True), (3, False)]
    assert judged(rule(when="change > 1%"), [0, 0, 1]) == [(2, True)], "anything is more than nothing"


def test_what_lies_far_from_its_like_is_unusual() -> None:
    calm = [1.0, 1.1, 0.9, 1.05, 0.95] * 4
    assert judged(rule(when="z > 4 over 20"), [*calm, 3.0, 1.0]) == [(20, True), (21, False)]
    assert judged(rule(when="z > 4 over 20"), [*calm, -3.0]) == [(20, True)], "either way"
    assert judged(rule(when="z < -4 over 20"), [*calm, 3.0]) == []
    assert judged(rule(when="z > 4 over 20"), [1.0, 9.0, 1.0]) == [], "of so few nothing is known"


def test_a_constant_is_left_by_any_other_value_and_by_no_rounding() -> None:
    assert judged(rule(when="z > 3 over 10"), [0.1] * 9 + [0.1 + 1e-17, 0.2]) == [(10, True)]


def test_no_progress_is_noticed_by_the_clock_and_ends_with_the_next_step() -> None:
    which, state = rule(when="no progress for 10m"), State()
    assert observe(which, state, "loss", [(7, 0.0, 1.0)], now=100.0) == []
    assert tick(which, state, "loss", 600.0) is None
    assert observe(which, state, "loss", [(7, 1.0, 1.0)], now=650.0) == [], "the same step is no progress"
    turn = tick(which, state, "loss", 700.0)
    assert turn is not None
    assert (turn.is_firing, turn.step) == (True, 7)
    assert tick(which, state, "loss", 800.0) is None, "it fires once"
    (turn,) = observe(which, state, "loss", [(8, 2.0, 1.0)], now=900.0)
    assert not turn.is_firing


def test_an_event_fires_each_time_but_not_within_the_cooldown() -> None:
    which, state = parse("r", {"event": "spool_*", "cooldown": 60}), State()
    kinds = [("spool_full", 0.0), ("spool_full", 30.0), ("other", 61.0), ("spool_full", 61.0)]
    assert [at for kind, at in kinds if happened(which, state, kind, "", at)] == [0.0, 61.0]
    assert not state.is_firing, "nothing ends what has no end"


def test_an_event_may_end_with_another_one() -> None:
    which, state = parse("r", {"event": "degraded", "until": "recovered", "cooldown": 0}), State()
    seen = [happened(which, state, kind, "redis", 1.0) for kind in ("recovered", "degraded", "degraded", "recovered")]
    assert [turn and turn.is_firing for turn in seen] == [None, True, None, False]


def test_events_are_counted_within_a_time() -> None:
    which, state = parse("r", {"event": "retry", "when": "3 in 1m", "cooldown": 0}), State()
    times = [0.0, 50.0, 100.0, 105.0, 109.0]
    assert [at for at in times if happened(which, state, "retry", "", at)] == [105.0]


def test_the_end_of_a_run_ends_what_fires() -> None:
    state = State()
    assert ended(state, 1.0) is None
    observe(rule(when="> 5"), state, "loss", points([6]), 0.0)
    turn = ended(state, 1.0)
    assert turn is not None
    assert not turn.is_firing


values = st.one_of(st.floats(-10, 10), st.sampled_from([NAN, INF, -INF]))
rules = st.builds(
    lambda when, patience, cooldown: rule(when=when, cooldown=cooldown, **{"for": patience}),
    st.sampled_from(["> 5", "< 0", "nan", "change > 3 over 2", "z > 2 over 6"]),
    st.integers(1, 4),
    st.sampled_from([0, 3, 20]),
)


@settings(max_examples=60, deadline=None)
@given(rules, st.lists(values, max_size=60))
def test_firings_and_ends_take_turns_and_keep_their_distance(which: Rule, given_values: list[float]) -> None:
    state, turns = State(), []
    for point in points(given_values):
        turns += observe(which, state, "loss", [point], point[1])
    assert [turn.is_firing for turn in turns] == [number % 2 == 0 for number in range(len(turns))]
    assert [turn.number for turn in turns] == [number // 2 + 1 for number in range(len(turns))]
    fired = [turn.at for turn in turns if turn.is_firing]
    assert all(later - earlier >= which.cooldown for earlier, later in zip(fired, fired[1:], strict=False))
    assert state.is_firing == (len(turns) % 2 == 1)


@settings(max_examples=40, deadline=None)
@given(rules, st.lists(values, max_size=40), st.lists(st.integers(1, 7), min_size=1, max_size=40))
def test_how_points_are_packed_into_batches_makes_no_difference(
    which: Rule, given_values: list[float], sizes: list[int]
) -> None:
    free = rule(when=str(which.test), **{"for": which.points})
    found: list[list[Turn]] = [[], []]
    for number, cuts in enumerate(([1] * len(given_values), sizes * len(given_values))):
        state, rest = State(), points(given_values)
        for size in cuts:
            found[number] += observe(free, state, "loss", rest[:size], 0.0)
            rest = rest[size:]
    assert [(t.step, t.is_firing) for t in found[0]] == [(t.step, t.is_firing) for t in found[1]]


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({}, "one of `metric` and `event`"),
        ({"metric": "a", "event": "b"}, "one of `metric` and `event`"),
        ({"metric": "a"}, "says nothing to test"),
        ({"metric": "a", "when": "big"}, "is no test"),
        ({"metric": "a", "when": "> 5", "cooldwon": 5}, "Did you mean"),
        ({"metric": "a", "when": "> 5", "for": 0}, "at least 1"),
        ({"metric": "a", "when": "> 5", "for": "soon"}, "no length of time"),
        ({"metric": "a", "when": "> 5", "level": "loud"}, "one of info"),
        ({"metric": "a", "when": "z > 3 over 1"}, "looks back over 2"),
        ({"metric": "a", "when": "no progress for 0s"}, "always hold"),
        ({"metric": "a", "when": "> 5", "until": "b"}, "is for events"),
        ({"event": "a", "clear": "> 5"}, "is for metrics"),
        ({"event": "a", "when": "> 5"}, "no test of events"),
        ({"metric": "a", "when": "> 5", "notify": {"slack": "x"}}, "no name of a notifier"),
        ("> 5", "is no rule"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_its_key(raw: Any, names: str) -> None:
    with pytest.raises(ConfigError, match=r"alerts\.rules\.mine") as caught:
        parse("mine", raw)
    assert names in str(caught.value)


def test_the_default_rules_can_be_changed_and_switched_off() -> None:
    assert {each.name for each in parse_rules({})} == set(DEFAULTS)
    changed = parse_rules({"memory": {"metric": "system/memory_percent", "when": "> 99"}, "disk": False, "cpu": None})
    assert {each.name for each in changed} == set(DEFAULTS) - {"disk", "cpu"}
    assert next(str(each.test) for each in changed if each.name == "memory") == "> 99"
    assert parse_rules({}, defaults=False) == ()


def test_patterns_name_many_metrics() -> None:
    which = next(each for each in parse_rules({}) if each.name == "gpu_memory")
    assert which.sees("system/gpu_11/memory_percent")
    assert not which.sees("system/memory_percent")


def test_lengths_of_time_have_units() -> None:
    assert [duration(given, "k") for given in (5, "90s", "10m", "1.5h", "1d")] == [5, 90, 600, 5400, 86400]
    assert parse("r", {"event": "e", "when": "2 in 5m"}).test == Count(count=2, seconds=300)
