"""Equal work has an equal hash, and only that."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import ABSENT, Change, Settings, canonical_json, config_hash, diff, dump, flatten
from orchestrator.config.settings import NOT_WORK

leaves = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=8)
trees = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def respelled(value: Any) -> Any:
    """Whole floats as integers and small integers as floats."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: respelled(item) for name, item in value.items()}
    return [respelled(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=50, deadline=None)
@given(trees)
def test_hash_knows_no_order_no_formatting_and_no_spelling_of_numbers(tree: dict[str, Any]) -> None:
    text = canonical_json(tree)
    expected = config_hash(tree)
    assert config_hash(reordered(tree)) == expected
    assert config_hash(respelled(tree)) == expected
    assert canonical_json(json.loads(text)) == text
    assert config_hash(json.loads(json.dumps(json.loads(text), indent=4))) == expected
    assert config_hash(yaml.safe_load(yaml.safe_dump(json.loads(text)))) == expected


@settings(max_examples=50, deadline=None)
@given(trees, trees)
def test_different_trees_differ_in_text_and_in_diff(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (canonical_json(a) == canonical_json(b)) == (not diff(a, b) or flatten(a) == flatten(b))


def test_true_is_not_one_and_text_is_not_a_number() -> None:
    assert len({config_hash({"a": value}) for value in (True, 1, "1", None, [1], 1.5)}) == 6
    assert config_hash({"a": 1}) == config_hash({"a": 1.0})


def test_what_is_no_work_does_not_count() -> None:
    plain = dump(Settings())
    for key in NOT_WORK:
        group, _, name = key.partition(".")
        changed = json.loads(json.dumps(plain))
        if name:
            changed[group][name] = "changed"
        else:
            changed[group] = {"anything": "changed"}
        assert config_hash(changed) == config_hash(plain), key


def test_what_is_work_counts() -> None:
    plain = dump(Settings())
    outside = {key.partition(".")[0] for key in NOT_WORK if "." not in key}
    for key in flatten(plain):
        group, _, name = key.partition(".")
        if group in outside or key in NOT_WORK:
            continue
        changed = json.loads(json.dumps(plain))
        if name:
            changed[group][name] = "changed"
        else:
            changed[group] = "changed"
        assert config_hash(changed) != config_hash(plain), key


def test_diff_names_what_came_and_went() -> None:
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "same": 1}
    new = {"a": 2, "b": {"d": [1, 2, 3]}, "e": None, "same": 1.0}
    assert diff(old, new) == [
        Change(key="a", old=1, new=2),
        Change(key="b.c", old=2, new=ABSENT),
        Change(key="b.d", old=[1, 2], new=[1, 2, 3]),
        Change(key="e", old=ABSENT, new=None),
    ]
    assert str(ABSENT) == "(not set)"
