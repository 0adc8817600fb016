"""What is drawn for a searched key, how grids and conditions combine, and what is refused before anything starts."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, UserError
from orchestrator.seeding import derive
from orchestrator.sweeps.grammar import literal, same
from orchestrator.sweeps.space import Dimension, Kind, Space, dimension, searched, space

EVENLY = [(place + 0.5) / 2000 for place in range(2000)]


def values_of(text: str) -> list[Any]:
    """As evenly spread as draws could be: shares of values are those of the distribution."""
    found = dimension("x", text)
    return [found.value(r) for r in EVENLY]


def share(values: list[Any], below: float) -> float:
    return sum(value < below for value in values) / len(values)


# -- one key -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize(
    "text",
    [
        "uniform(-1,2)", "interval(0,1)", "loguniform(1e-4,1e-1)", "loguniform(5e-324,1e308)", "quniform(0,0.3,0.1)",
        "quniform(0.25,0.95,0.1)", "qloguniform(1e-3,1,0.01)", "randint(1,8)", "randint(-3,-1)", "lograndint(1,1024)",
        "qrandint(3,17,5)", "normal(0,1)", "normal(0,1,-1,0.5)", "normal(0,1,2)", "qnormal(10,3,0.5)",
        "qnormal(10,3,2,5,11)", "lognormal(0,1)", "lognormal(0,1,0.5,2)", "choice(1,2,3)", "boolean()", "fixed(3)",
        "uniform(1e-320,2e-320)", "uniform(-8e307,8e307)", "randint(-4503599627370496,4503599627370495)",
    ],
)  # fmt: skip
def test_every_draw_is_in_its_domain(text: str, r: float) -> None:
    found = dimension("x", text)
    assert found.why_not(found.value(r)) == ""
    assert found.why_not(found.middle()) == ""
    assert all(found.why_not(value) == "" for value in found.probes())


def test_uniform_is_even() -> None:
    values = values_of("uniform(2,4)")
    assert all(isinstance(value, float) for value in values)
    assert [round(share(values, edge), 3) for edge in (2.5, 3.0, 3.9)] == [0.25, 0.5, 0.95]


def test_loguniform_is_even_in_the_logarithm() -> None:
    values = values_of("loguniform(1e-4,1)")
    assert [round(share(values, edge), 3) for edge in (1e-3, 1e-2, 1e-1)] == [0.25, 0.5, 0.75]


def test_both_ends_of_randint_are_as_likely_as_the_others() -> None:
    assert Counter(values_of("randint(1,8)")) == dict.fromkeys(range(1, 9), 250)


def test_lograndint_is_even_in_the_logarithm() -> None:
    counts = Counter(values_of("lograndint(1,7)"))
    assert sorted(counts) == list(range(1, 8))
    for value, count in counts.items():
        assert count / 2000 == pytest.approx(math.log((value + 1) / value) / math.log(8), abs=0.001)


def test_a_step_gives_multiples_inside_the_ends() -> None:
    assert sorted(set(values_of("quniform(0.25,0.95,0.1)"))) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert sorted(set(values_of("quniform(0,0.3,0.1)"))) == [0.0, 0.1, 0.2, 0.3]
    assert sorted(set(values_of("qrandint(3,17,5)"))) == [5, 10, 15]
    assert all(isinstance(value, int) for value in values_of("qrandint(3,17,5)"))
    assert sorted(set(values_of("qloguniform(0.5,4,1)"))) == [1.0, 2.0, 3.0, 4.0]
    assert set(values_of("qnormal(0,1,0.5,-1,1)")) == {-1.0, -0.5, 0.0, 0.5, 1.0}


def test_normal_has_its_mean_and_spread() -> None:
    values = values_of("normal(3,2)")
    assert statistics.mean(values) == pytest.approx(3, abs=0.01)
    assert statistics.stdev(values) == pytest.approx(2, abs=0.01)
    cut = values_of("normal(3,2,3)")
    assert min(cut) >= 3
    assert statistics.median(cut) == pytest.approx(3 + 2 * 0.6745, abs=0.01)


def test_lognormal_is_normal_in_the_logarithm() -> None:
    logs = [math.log(value) for value in values_of("lognormal(1,0.5)")]
    assert statistics.mean(logs) == pytest.approx(1, abs=0.01)
    assert statistics.stdev(logs) == pytest.approx(0.5, abs=0.01)
    assert all(0.5 <= value <= 2 for value in values_of("lognormal(0,1,0.5,2)"))


def test_choice_takes_each_item_as_often() -> None:
    assert Counter(map(literal, values_of("choice(a,[1,2],null,true)"))) == {
        "'a'": 500, "[1, 2]": 500, "null": 500, "true": 500,
    }  # fmt: skip


def test_an_item_that_a_trial_changes_stays_as_it_was() -> None:
    found = dimension("x", "choice([[1],[2]])")
    found.value(0.0).append(9)
    found.middle().append(9)
    assert found.items == ([1], [2])


def test_draws_from_seeds_are_spread_like_the_distribution() -> None:
    """Kolmogorov-Smirnov at 1 in 10,000, on numbers as the sweep derives them."""
    drawn = sorted(space({"x": "uniform(0,1)"}).draw(7, number)["x"] for number in range(1000))
    distance = max(abs((place + 0.5) / 1000 - value) for place, value in enumerate(drawn))
    assert distance < 2.23 / math.sqrt(1000)


def test_the_middle_is_geometric_for_logarithms() -> None:
    assert dimension("x", "loguniform(1e-4,1)").middle() == pytest.approx(0.01)
    assert dimension("x", "uniform(0,0.5)").middle() == 0.25
    assert dimension("x", "randint(1,8)").middle() == 4
    assert dimension("x", "grid(16,32)").middle() == 16
    assert dimension("x", "normal(3,1)").middle() == 3.0


def test_ranges_count_as_hydra_does() -> None:
    assert dimension("x", "range(1,5)").items == (1, 2, 3, 4)
    assert dimension("x", "range(3)").items == (0, 1, 2)
    assert dimension("x", "range(5,0,-2)").items == (5, 3, 1)
    assert dimension("x", "range(0,0.4,0.1)").items == (0, 0.1, 0.2, 0.3)


def test_a_file_and_the_command_line_mean_the_same() -> None:
    assert dimension("x", {"choice": ["a", "b"]}) == dimension("x", "choice(a,b)") == dimension("x", "choice([a,b])")
    assert dimension("x", "16,32") == dimension("x", {"grid": [16, 32]})
    assert searched("x", "16,32") == dimension("x", "16,32")
    assert searched("x", "16") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loguniform(1e-4,1e-1)", "loguniform 0.0001 … 0.1"),
        ("randint(1,8)", "randint 1 … 8"),
        ("16,32,64", "grid 16, 32, 64"),
        ("choice(adam,null)", "choice adam, null"),
        ("quniform(0,1,0.1)", "quniform 0 … 1 in steps of 0.1"),
        ("normal(0,2,-1)", "normal 0 ± 2, -1 … inf"),
        ("when(hidden in [32,64], uniform(0,0.5))", "uniform 0 … 0.5 when hidden in [32, 64]"),
    ],
)
def test_a_domain_is_told_in_words(text: str, words: str) -> None:
    assert dimension("x", text).words == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uniform(1,1)", "is empty: 1.0 is not below 1.0. Use fixed"),
        ("uniform(2,1)", "Did you mean uniform(1.0, 2.0)?"),
        ("randint(8,1)", "Did you mean randint(1, 8)?"),
        ("loguniform(0,1)", "has no logarithm: 0.0 is not above 0. Use uniform."),
        ("loguniform(-1,1)", "has no logarithm"),
        ("lograndint(0,8)", "Use randint."),
        ("quniform(0,1,0)", "the step 0 is not above 0"),
        ("quniform(0,1,-0.1)", "is not above 0"),
        ("quniform(0.1,0.4,0.5)", "no multiple of 0.5 lies between 0.1 and 0.4"),
        ("qrandint(6,9,5)", "no multiple of 5 lies between 6 and 9"),
        ("quniform(0,1,1e-12)", "too fine"),
        ("qnormal(0,1,5,1,2)", "no multiple of 5"),
        ("qnormal(0,1,0)", "the step 0 is not above 0"),
        ("normal(0,0)", "the standard deviation 0 is not above 0"),
        ("lognormal(0,-1)", "is not above 0"),
        ("normal(0,1,2,2)", "is empty"),
        ("normal(0,1,40,50)", "next to nothing"),
        ("lognormal(0,1,-1)", "is never negative"),
        ("lognormal(800,1)", "of the logarithm"),
        ("uniform(0,inf)", "inf is not finite"),
        ("uniform(-1e308,1e308)", "too wide"),
        ("uniform(0," + "9" * 400 + ")", "beyond what a float can hold"),
        ("randint(0," + "9" * 400 + ")", "too wide"),
        ("randint(0,1.5)", "1.5 is no whole number. Use uniform."),
        ("uniform(a,1)", "'a' is no number"),
        ("uniform(true,2)", "true is no number"),
        ("choice()", "nothing to choose from"),
        ("choice([])", "nothing to choose from"),
        ("grid()", "nothing to choose from"),
        ("choice(a,b,a)", "'a' is there twice"),
        ("choice(1,1.0)", "1.0 is there twice"),
        ("1,2,1", "1 is there twice"),
        ("choice(1,inf)", "inf is not finite"),
        ("range(1,1)", "is empty"),
        ("range(1,5,-1)", "is empty"),
        ("range(1,5,0)", "the step is 0"),
        ("range(0,1000000)", "more than 100000"),
        ("choice('${optim.lr}',1)", "plain values"),
        ("adam", "is one value, no domain"),
    ],
)
def test_a_domain_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dimension("optim.lr", text)
    assert caught.value.key == "optim.lr"
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["run.seed", "sweep.samples", "storage.root", "tracking.perf", "mlflow.uri"])
def test_what_is_one_for_all_trials_is_not_searched(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*cannot be searched"):
        dimension(key, "1,2")


@pytest.mark.parametrize("key", ["", "a..b", ".a"])
def test_a_key_has_names(key: str) -> None:
    with pytest.raises(ConfigError, match="is no key"):
        dimension(key, "1,2")


# -- several keys --------------------------------------------------------------------------------------------

SEVERAL = {
    "optim.lr": "loguniform(1e-4,1e-1)",
    "hidden": "16,32,64",
    "dropout": "when(hidden in [32,64], uniform(0,0.5))",
    "layers": "randint(1,8)",
}


def test_a_draw_is_pinned() -> None:
    """These numbers may never change: a resumed sweep would draw others."""
    assert derive(0, "suggest", 0, 0, "optim.lr") == 6814148793501262947
    values = space(SEVERAL).draw(0, 1)
    assert values == {
        "optim.lr": pytest.approx(0.0001721822865879146, rel=1e-12),  # exp and log differ in the last bit
        "hidden": 32,
        "dropout": 0.4061933772922715,
        "layers": 1,
    }
    assert list(values) == list(SEVERAL)


def test_a_retry_draws_anew_from_its_own_seed() -> None:
    free, tight = space({"a": "uniform(0,1)"}), space({"a": "uniform(0,1)"}, ["a < 0.1"])
    number = next(number for number in range(100) if free.draw(0, number)["a"] >= 0.1)
    values, retry = tight.drawn(0, number)
    assert retry > 0
    assert values["a"] == random.Random(derive(0, "suggest", number, retry, "a")).random()


def test_draws_of_one_key_do_not_depend_on_the_others() -> None:
    full, less = space(SEVERAL), space({"layers": SEVERAL["layers"], "optim.lr": SEVERAL["optim.lr"]})
    for number in range(50):
        one, other = full.draw(3, number), less.draw(3, number)
        assert {key: one[key] for key in other} == other


def test_other_seeds_and_numbers_draw_other_values() -> None:
    found = space({"x": "uniform(0,1)"})
    assert len({found.draw(seed, number)["x"] for seed in range(10) for number in range(10)}) == 100


def test_a_key_whose_condition_does_not_hold_is_absent() -> None:
    found = space(SEVERAL)
    drawn = [found.draw(0, number) for number in range(100)]
    assert {("dropout" in values) == (values["hidden"] != 16) for values in drawn} == {True}
    assert {values["hidden"] for values in drawn} == {16, 32, 64}
    assert all(found.contains(values) == "" for values in drawn)


def test_active_leaves_out_what_no_condition_holds_for() -> None:
    values = {"dropout": 0.1, "layers": 3, "hidden": 16, "unknown": 1}
    assert space(SEVERAL).active(values) == {"hidden": 16, "layers": 3}
    assert list(space(SEVERAL).active({**values, "hidden": 32})) == ["hidden", "dropout", "layers"]


def test_conditions_chain() -> None:
    found = space({"c": "when(b == true, fixed(1))", "b": "when(a == x, boolean())", "a": "choice(x,y)"})
    drawn = [found.draw(0, number) for number in range(60)]
    assert {tuple(values) for values in drawn} == {("a",), ("b", "a"), ("c", "b", "a")}


def test_a_condition_reads_the_configured_value_where_the_key_is_not_drawn() -> None:
    given_values = {"a": "choice(x,y)", "b": "when(a == x, choice(1,2))", "c": "when(b == 2, fixed(1))"}
    found = space(given_values, configured={"b": 2})
    drawn = [found.draw(0, number) for number in range(60)]
    assert all(("c" in values) == (values.get("b", 2) == 2) for values in drawn)
    assert any("b" not in values for values in drawn)


def test_the_grids_last_key_is_the_fastest() -> None:
    found = space({"a": "1,2", "lr": "uniform(0,1)", "b": "x,y,z"})
    assert [tuple(point.values()) for point in found.grid()] == [
        (1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z"),
    ]  # fmt: skip


def test_a_grid_key_without_effect_makes_no_further_points() -> None:
    found = space({"a": "1,2", "b": "when(a == 2, grid(x,y))"})
    assert found.grid() == [{"a": 1}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


def test_the_grid_leaves_out_what_the_constraints_refuse() -> None:
    found = space({"a": "1,2,3", "b": "1,2,3", "k": "fixed(4)"}, ["a * b <= k"])
    assert [tuple(point.values()) for point in found.grid()] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)]
    assert space({"a": "uniform(0,1)"}).grid() == [{}]


def test_constraints_hold_for_every_draw() -> None:
    found = space({"a": "uniform(0,1)", "b": "uniform(0,1)"}, ["a + b <= c"], configured={"c": 0.5})
    drawn = [found.drawn(1, number) for number in range(100)]
    assert all(values["a"] + values["b"] <= 0.5 for values, _ in drawn)
    assert max(retry for _, retry in drawn) > 5
    assert min(retry for _, retry in drawn) == 0


def test_constraints_that_never_hold_are_refused_with_their_rates() -> None:
    with pytest.raises(UserError) as caught:
        space({"a": "uniform(0,1)", "b": "uniform(0,1)"}, ["a > 2", "b < 2"])
    assert "of 1000 draws `a > 2` refused 1000" in str(caught.value)
    assert "b < 2" not in str(caught.value)
    with pytest.raises(UserError, match="of 1 draws"):
        space({"a": "fixed(1)"}, ["a > 2"])


@pytest.mark.parametrize(
    ("given_values", "constraints", "key", "words"),
    [
        ({"a": "when(a == 1, grid(1,2))"}, [], "a", "about itself"),
        ({"a": "when(hiden == 1, uniform(0,1))", "hidden": "1,2"}, [], "a", "Did you mean hidden?"),
        ({"a": "when(q == 1, uniform(0,1))"}, [], "a", "about q: not searched"),
        ({"a": "when(b == 1, grid(1,2))", "b": "when(a == 1, grid(1,2))"}, [], "a", "a circle: a → b → a"),
        (
            {"z": "when(a == 1, grid(1,2))", "a": "when(b == 1, grid(1,2))", "b": "when(a == 1, grid(1,2))"},
            [],
            "a",
            "a circle",
        ),
        ({"a": "when(b == adm, uniform(0,1))", "b": "adam,sgd"}, [], "a", "Did you mean adam?"),
        ({"a": "when(b == 9, uniform(0,1))", "b": "randint(1,8)"}, [], "a", "is outside 1 … 8"),
        ({"a": "uniform(0,1)"}, ["aa < 1"], "sweep.constraints", "aa is neither searched nor configured"),
        ({"a": "1,2"}, ["a > 2"], "sweep.constraints", "leave nothing of the grid"),
        ({"a": "uniform(0,1)", "b": "choice(x,y)"}, ["a < b"], "sweep.constraints", "cannot be computed"),
        ({f"k{n}": "range(100)" for n in range(3)}, [], "k0, k1, k2", "1000000 combinations"),
    ],
)
def test_a_space_that_contradicts_itself_is_refused(
    given_values: dict[str, str], constraints: list[str], key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        space(given_values, constraints)
    assert caught.value.key == key
    assert words in str(caught.value)


def test_a_key_is_searched_once() -> None:
    one = dimension("a", "1,2")
    with pytest.raises(ConfigError, match="searched twice"):
        Space(dimensions=(one, one))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"optim.lr": 0.01, "hidden": 16, "layers": 3}, ""),
        ({"optim.lr": 0.01, "hidden": 32, "layers": 3.0, "dropout": 0}, ""),
        ({"optim.lr": 0.01, "hidden": 32, "layers": 3}, "dropout is missing."),
        ({"optim.lr": 0.01, "hidden": 16, "layers": 3, "dropout": 0.1}, "dropout has a value, but"),
        ({"optim.lr": 1.0, "hidden": 16, "layers": 3}, "optim.lr=1.0 is outside 0.0001 … 0.1."),
        ({"optim.lr": True, "hidden": 16, "layers": 3}, "optim.lr=true is no number."),
        ({"optim.lr": math.nan, "hidden": 16, "layers": 3}, "optim.lr=nan is not finite."),
        ({"optim.lr": 0.01, "hidden": 17, "layers": 3}, "hidden=17 is none of 16, 32, 64."),
        ({"optim.lr": 0.01, "hidden": 16, "layers": 3.5}, "layers=3.5 is no whole number."),
        ({"optim.lr": 0.01, "hidden": 16, "layer": 3}, "layer is not searched. Did you mean layers?"),
        ({"optim.lr": 0.1, "hidden": 16, "layers": 8}, "optim.lr * layers < 0.5 does not hold."),
    ],
)
def test_a_space_says_why_a_configuration_is_not_in_it(values: dict[str, Any], why: str) -> None:
    found = space(SEVERAL, ["optim.lr * layers < 0.5"]).contains(values)
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_a_multiple_may_be_off_by_what_floats_are() -> None:
    found = dimension("x", "quniform(0,1,0.1)")
    assert found.why_not(0.1 + 0.2) == ""
    assert found.why_not(0.35) == "is no multiple of 0.1."


@pytest.mark.parametrize(
    "text", ["choice(hunter,hunter)", "uniform(hunter,1)", "when(b == 1, choice(hunter,'x-y'))", "'${hunter}',1"]
)
def test_a_secret_is_not_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space({"db.password": text})
    assert "hunter" not in str(caught.value)


def test_a_searched_secret_is_not_shown() -> None:
    found = space({"db.password": "choice(hunter,b)"})
    assert "hunter" not in found["db.password"].words + found.contains({"db.password": "c"})


# -- there and back ------------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6).map(lambda number: float(f"{number:.9g}"))
leaves = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | finite | st.text(max_size=6)
items = st.lists(
    leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.text(max_size=3), leaves, max_size=2),
    min_size=1,
    max_size=4,
    unique_by=lambda item: repr(item) if not isinstance(item, int | float) or isinstance(item, bool) else float(item),
).filter(lambda found: not any(same(a, b) for n, a in enumerate(found) for b in found[:n]))


@st.composite
def domains(draw: st.DrawFn) -> str:
    low, width = draw(finite), draw(st.floats(1e-3, 1e6))
    whole, size = draw(st.integers(-1000, 1000)), draw(st.integers(1, 1000))
    positive = abs(low) + 1e-3
    written = [literal(item) for item in draw(items)]
    return draw(
        st.sampled_from(
            [
                f"uniform({low!r}, {low + width!r})",
                f"loguniform({positive!r}, {positive + width!r})",
                f"quniform({low!r}, {low + width!r}, {width / 7!r})",
                f"qloguniform({positive!r}, {positive + width!r}, {width / 7!r})",
                f"randint({whole}, {whole + size})",
                f"lograndint({abs(whole) + 1}, {abs(whole) + 1 + size})",
                f"qrandint({whole}, {whole + size + 3}, 3)",
                f"normal({low!r}, {width!r})",
                f"normal({low!r}, {width!r}, {low!r})",
                f"qnormal({low!r}, {width!r}, {width / 3!r}, -inf, {low + width!r})",
                f"lognormal(0, 0.5, 0, {positive + 1!r})",
                f"choice([{', '.join(written)}])",
                f"grid([{', '.join(written)}])",
                "boolean()",
                "range(0, 5, 2)",
                f"fixed({written[0]})",
            ]
        )
    )


@given(st.lists(domains(), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_space_survives_text_and_json(texts: list[str], number: int) -> None:
    given_values: dict[str, Any] = {f"section.k{place}": text for place, text in enumerate(texts)}
    given_values |= {"flag": "boolean()", "extra": f"when(flag == true, {texts[0]})"}
    before = space(given_values, ["value('flag') == true or flag == false"], configured={"extra": [math.inf, "\0ü", 1]})
    stored = json.dumps(before.to_json(), allow_nan=False)
    after = Space.from_json(json.loads(stored))
    assert json.dumps(after.to_json()) == stored
    assert after == before
    assert after.hash == before.hash
    values = before.draw(1, number)
    assert literal(after.draw(1, number)) == literal(values)
    assert before.contains(values) == ""
    assert all(dimension(each.key, each.text) == each for each in before.dimensions)


def test_other_spaces_have_other_hashes() -> None:
    texts = ["uniform(0,1)", "uniform(0,2)", "0,1", "choice(0,1)", "fixed(1)", "fixed(true)"]
    assert len({space({"a": text}).hash for text in texts}) == len(texts)
    assert space({"a": "1,2", "b": "1,2"}).hash != space({"b": "1,2", "a": "1,2"}).hash
    assert space({"a": "uniform(0,1)"}).hash == space({"a": {"interval": [0, 1.0]}}).hash


def test_every_kind_is_covered_by_the_words_and_the_text() -> None:
    for kind in Kind:
        found = Dimension(
            key="x", kind=kind, low=1.0, high=2.0, step=0.0, items=(1,) if kind in "choice grid fixed" else ()
        )
        assert found.words.startswith(kind)
        assert found.text.startswith(f"{kind}(")
