"""What users log is made fit for PostgreSQL; identities of runs."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.records import TRANSITIONS, Batch, Stream, facts_payload
from orchestrator.store.cleaning import clean_json, clean_name, clean_text, typed, untyped
from orchestrator.store.connection import parse, redacted, scrubbed
from orchestrator.store.errors import Gap, SequenceGap
from orchestrator.store.migrations.versions import __path__ as versions
from orchestrator.store.names import ADJECTIVES, NOUNS, path_safe, run_directory, run_id, run_name
from orchestrator.store.tables import HEAD, REVISIONS
from orchestrator.store.transaction import missing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_clean_json_is_strict_json_without_nul(value: object) -> None:
    text = json.dumps(clean_json(value), allow_nan=False, ensure_ascii=False)
    assert "\\u0000" not in text
    text.encode()


def test_text_loses_nul_and_lone_surrogates() -> None:
    assert clean_text("a\0b\ud800c") == "ab?c"


def test_json_that_is_nested_too_deep_becomes_text() -> None:
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    json.dumps(clean_json(deep))


def test_long_names_stay_different_and_fit_an_index() -> None:
    first, second = clean_name("ä" * 5000 + "1"), clean_name("ä" * 5000 + "2")
    assert first != second
    assert len(first.encode()) <= 500


@pytest.mark.parametrize(
    ("value", "kind", "number"),
    [(True, "bool", 1.0), (3, "int", 3.0), (0.5, "float", 0.5), ("x", "str", None), (None, "null", None)]
    + [([1], "list", None), ({"a": 1}, "dict", None), (10**400, "int", None), (math.inf, "float", math.inf)],
)
def test_params_have_types(value: object, kind: str, number: float | None) -> None:
    found, stored, comparable = typed(value)
    assert (found, comparable) == (kind, number)
    assert untyped(found, stored) == value


def test_run_ids_sort_by_time_and_names_can_be_said() -> None:
    assert re.fullmatch(r"20231114-221320-[0-9a-f]{8}", run_id(1_700_000_000.0))
    assert run_id(1.0) < run_id(2.0)
    assert re.fullmatch(r"[a-z]+-[a-z]+-142", run_name(142))
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", ".", "..", "ünï", "a b", "x" * 300, "-rf", "a?b#c%d"])
def test_directories_stay_below_the_storage_and_apart(name: str) -> None:
    safe = path_safe(name)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", safe)
    assert safe not in (".", "..")
    assert path_safe("plain-1.0") == "plain-1.0"
    assert path_safe("a/b") != path_safe("a_b") != path_safe("a?b")
    assert run_directory("s3://bucket/x/", name, "r1") == f"s3://bucket/x/{safe}/r1"


def test_addresses_show_no_password() -> None:
    url = parse("postgres://me:geheim@db.example:5433/orc?password=geheim2")
    assert redacted(url) == "db.example:5433/orc"
    assert scrubbed("bad geheim and geheim2", url) == "bad *** and ***"
    for wrong in ("sqlite:///x.db", "nonsense", "mysql://me:geheim@x/y"):
        with pytest.raises(ConfigError) as error:
            parse(wrong)
        assert "geheim" not in str(error.value)


def facts(first: int, count: int) -> Batch:
    return Batch(
        producer="0" * 32, run="r", attempt=1, rank=0, stream=Stream.facts, first=first, count=count,
        payload=b"[" + b",".join(b"%d" % i for i in range(first, first + count)) + b"]",
    )  # fmt: skip


@given(st.permutations([facts(1, 3), facts(1, 5), facts(4, 4), facts(6, 5), facts(2, 2)]), st.integers(0, 12))
def test_what_is_missing_follows_the_watermark_without_holes_or_doubles(sent: list[Batch], committed: int) -> None:
    rest = missing(sent, {Stream.points: 0, Stream.facts: committed})
    assert [n for batch in rest for n in json.loads(batch.payload)] == list(range(committed + 1, 11))


def test_a_gap_names_producer_expected_and_found() -> None:
    gap = Gap(producer="6f", stream=Stream.points, expected=41, found=50)
    assert str(SequenceGap((gap,), {})) == "producer 6f: points 41 must come next, got 50"
    assert facts_payload([]) == b"[]"


def test_the_newest_revision_is_the_last_migration() -> None:
    from pathlib import Path

    found = sorted(path.name[:4] for path in Path(next(iter(versions))).glob("[0-9]*.py"))
    assert tuple(found) == REVISIONS
    assert REVISIONS[-1] == HEAD
    assert set(TRANSITIONS) >= {new for allowed in TRANSITIONS.values() for new in allowed}
