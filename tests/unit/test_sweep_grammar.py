"""How a searched key is written on the command line and in files, and what is refused."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, UserError
from orchestrator.sweeps.constraints import Constraint
from orchestrator.sweeps.grammar import (
    DOMAINS,
    Condition,
    Expression,
    condition,
    from_config,
    literal,
    parse,
    read_literal,
    same,
)

numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("loguniform(1e-4,1e-1)", "loguniform", (1e-4, 0.1)),
        (" uniform( -1 , +2.5 ) ", "uniform", (-1, 2.5)),
        ("choice(adam,sgd)", "choice", ("adam", "sgd")),
        ("choice(['a','b'])", "choice", (["a", "b"],)),
        ("choice(true,false,null,'true',True,None)", "choice", (True, False, None, "true", True, None)),
        ("choice([1,2],{a: 1, 'b c': [x]})", "choice", ([1, 2], {"a": 1, "b c": ["x"]})),
        ("choice('resnet-18', \"a,b\")", "choice", ("resnet-18", "a,b")),
        ("choice(größe, 'ü')", "choice", ("größe", "ü")),
        ("boolean()", "boolean", ()),
        ("16,32,64", "grid", (16, 32, 64)),
        ("16,32,", "grid", (16, 32)),
        ("(1),(2)", "grid", (1, 2)),
        ("(1,2),3", "grid", ([1, 2], 3)),
        ("[1,2],[3]", "grid", ([1, 2], [3])),
        ("adam, sgd", "grid", ("adam", "sgd")),
        ("'a,b','c'", "grid", ("a,b", "c")),
        ("range(1,5)", "range", (1, 5)),
        ("normal(0,1,-inf,2)", "normal", (0, 1, -math.inf, 2)),
        ("fixed([1,2])", "fixed", ([1, 2],)),
    ],
)
def test_a_domain_is_read(text: str, name: str, arguments: tuple[Any, ...]) -> None:
    assert parse("key", text) == Expression(name=name, arguments=arguments)


@pytest.mark.parametrize(
    "text",
    [
        "0.1", "adam", "[1,2]", "{a: 1}", "'a,b'", '"uniform(0,1)"', "${optim.lr}", "", "a b", "path/to(x)", "f(x)",
        "int(3.2)", "float(1)", "sort(3)", "shuffle(a)", "glob(*)", "sqlite:///x.db", "it's, fine", "(1,2)",
        r"'it\'s, fine'",
    ],
)  # fmt: skip
def test_one_value_is_no_domain(text: str) -> None:
    assert parse("key", text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("when(hidden in [32,64], uniform(0,0.5))", Condition(key="hidden", operator="in", value=[32, 64])),
        ("when(optim.name == adam, uniform(0,0.5))", Condition(key="optim.name", operator="==", value="adam")),
        ("when('layers.0' != null, uniform(0,0.5))", Condition(key="layers.0", operator="!=", value=None)),
    ],
)
def test_a_condition_is_read(text: str, expected: Condition) -> None:
    found = parse("dropout", text)
    assert found == Expression(name="uniform", arguments=(0, 0.5), when=expected)
    assert condition("dropout", str(expected)) == expected


def test_a_condition_compares_as_json_does() -> None:
    assert Condition(key="a", operator="==", value=1).holds(1.0)
    assert not Condition(key="a", operator="==", value=1).holds(True)
    assert Condition(key="a", operator="!=", value=1).holds(True)
    assert Condition(key="a", operator="in", value=[[1], "x"]).holds([1.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loguniforn(1,2)", ["no domain loguniforn", "Did you mean loguniform"]),
        ("Uniform(1,2)", ["Did you mean uniform"]),
        ("log_uniform(1,2)", ["Did you mean loguniform"]),
        ("choices(a,b)", ["Did you mean choice"]),
        ("choice(resnet-18)", ["`resnet-18` at column 8", "quotes"]),
        ("  choice(a, b.c)", ["`b.c` at column 13"]),
        ("choice(ü, x-y)", ["column 11"]),
        ("resnet-18,vgg-16", ["`resnet-18` at column 1", "quotes"]),
        ("1,,2", ["column 3", "quotes"]),
        ("uniform(0,1", ["cannot be read at column", "quotes"]),
        ("uniform(0,1)+1", ["is no domain"]),
        ("uniform(0)", ["does not take 1 values", "uniform(a, b)"]),
        ("uniform(0,1,2,3)", ["does not take 4 values"]),
        ("uniform(low=0,high=1)", ["has a name", "order"]),
        ("uniform(*x)", ["`*x`"]),
        ("choice(uniform(0,1),2)", ["domain within a domain"]),
        ("choice(f(1))", ["`f(1)` at column 8"]),
        ("choice(x if y else z)", ["`x if y else z`"]),
        ("choice(b'x')", ["`b'x'`"]),
        ("choice(1j)", ["`1j`"]),
        ("choice(nan)", ["`nan`"]),
        ("choice(-a)", ["is no number"]),
        ("choice({1: 2})", ["is no name"]),
        ("choice({**a})", ["unpacks"]),
        ("choice(f'{x}')", ["column 8"]),
        ("when(a == 1)", ["when(key == x, domain)"]),
        ("when(a, uniform(0,1))", ["`a` at column 6 is no condition"]),
        ("when(a > 1, uniform(0,1))", ["is no condition"]),
        ("when(1 == a == 2, uniform(0,1))", ["is no condition"]),
        ("when(1 == a, uniform(0,1))", ["is no key"]),
        ("when(a in 3, uniform(0,1))", ["no list"]),
        ("when(a in [], uniform(0,1))", ["no list"]),
        ("when(a == 1, 3)", ["is no domain"]),
        ("when(a == 1, unifrom(0,1))", ["Did you mean uniform"]),
        ("when(a == 1, when(b == 2, uniform(0,1)))", ["condition within a condition"]),
        ("choice(" + "-" * 150 + "1)", ["nested"]),
        ("choice(" + "[" * 500 + "]" * 500 + ")", ["cannot be read"]),
        ("choice('\0')", ["cannot be read"]),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("optim.lr", text)
    assert caught.value.key == "optim.lr"
    for word in words:
        assert word in str(caught.value)


def test_a_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("db.password", "choice(hunter-2)")
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ("choice(a,b)", Expression(name="choice", arguments=("a", "b"))),
        ({"choice": ["a", "b"]}, Expression(name="choice", arguments=("a", "b"))),
        ({"loguniform": [1e-4, 0.1]}, Expression(name="loguniform", arguments=(1e-4, 0.1))),
        ({"fixed": [1, 2]}, Expression(name="fixed", arguments=([1, 2],))),
        ({"boolean": None}, Expression(name="boolean", arguments=())),
        (
            {"uniform": [0, 1], "when": "hidden == 32"},
            Expression(name="uniform", arguments=(0, 1), when=Condition(key="hidden", operator="==", value=32)),
        ),
    ],
)
def test_a_file_may_write_a_mapping(given_value: Any, expected: Expression) -> None:
    assert from_config("key", given_value) == expected


@pytest.mark.parametrize(
    ("given_value", "words"),
    [
        ("adam", "fixed(…)"),
        (0.1, "choice(x, y)"),
        ([1, 2], "choice(x, y)"),
        ({"choise": [1, 2]}, "Did you mean choice?"),
        ({"choice": [1], "grid": [2]}, "a mapping names one"),
        ({}, "a mapping names one"),
        ({"uniform": [1]}, "does not take 1 values"),
        ({"uniform": [0, 1], "when": ["a"]}, "the condition is no text"),
        ({"uniform": [0, 1], "when": "a"}, "is no condition"),
        ({"choice": [object()]}, "no value"),
        ({"choice": [math.nan]}, "no value"),
    ],
)
def test_a_file_that_names_no_domain_is_refused(given_value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_config("model.kind", given_value)
    assert caught.value.key == "model.kind"
    assert words in str(caught.value)


@given(json_values)
@settings(max_examples=40, deadline=None)
def test_any_json_is_read_back_equal(value: Any) -> None:
    text = literal(value)
    assert same(read_literal("key", text), value)
    assert literal(read_literal("key", text)) == text
    assert text.isascii()


@given(
    st.text(max_size=30) | st.from_regex(r"(choice|uniform|when|grid)\([a-c0-9,.\[\](){}'=+-]{0,12}\)?", fullmatch=True)
)
@settings(max_examples=80, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        found = parse("key", text)
        assert found is None or found.name in DOMAINS


# -- constraints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("optim.lr * batch <= 1", {"optim.lr": 0.1, "batch": 10}, True),
        ("optim.lr * batch <= 1", {"optim.lr": 0.1, "batch": 11}, False),
        ("1 < a < b", {"a": 2, "b": 3}, True),
        ("1 < a < b", {"a": 2, "b": 2}, False),
        ("a == 'x' or not b", {"a": "y", "b": True}, False),
        ("a in ['x', 'y'] and b is_ok", None, None),
        ("a in ['x', 'y'] and b != null", {"a": "x", "b": None}, False),
        ("a not in [1, 2]", {"a": 3}, True),
        ("log(a) + sqrt(b) - abs(-1) >= min(a, b) // 7 % 2", {"a": 1, "b": 4}, True),
        ("a ** 2 <= 16", {"a": -4}, True),
        ("1 / a > 0", {"a": 0}, False),
        ("a ** 0.5 >= 0", {"a": -1}, False),
        ("a ** a ** a > 0", {"a": 1000}, False),
        ("log(a) > 0", {"a": -1}, False),
        ("a * b < 1", {"a": 5}, True),
        ('value("optim.lambda") < 1', {"optim.lambda": 2}, False),
    ],
)
def test_a_constraint_is_computed(text: str, values: dict[str, Any] | None, holds: bool | None) -> None:
    if values is None:
        with pytest.raises(ConfigError, match="cannot be read"):
            Constraint(text)
    else:
        assert Constraint(text).holds(values) is holds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a *", "cannot be read"),
        ("a * b", "compares nothing"),
        ("1 < 2", "names no key"),
        ("__import__('os').system('x') == 0", "constraint can compute"),
        ("open('x') == a", "no function open"),
        ("sqr(a) < 1", "Did you mean sqrt?"),
        ("a[0] < 1", "`a[0]`"),
        ("a << 9 < 1", "`a << 9`"),
        ("(lambda: a) == 1", "`lambda: a`"),
        ("a is b", "`a is b`"),
        ("[x for x in a] == b", "constraint can compute"),
    ],
)
def test_a_constraint_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Constraint(text)
    assert caught.value.key == "sweep.constraints"
    assert words in str(caught.value)


def test_a_constraint_on_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean optim.lr"):
        Constraint("optm.lr < 1").check_keys(["optim.lr", "batch"])


@pytest.mark.parametrize("text", ["a * b < 1", "a < b", "-a < 1", "a + a < b"])
def test_text_is_no_number(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be computed for a='x'"):
        Constraint(text).holds({"a": "x", "b": 3})
