"""How answers travel: what goes in comes out, and what is broken is noticed."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.catalog import headline, wire
from orchestrator.catalog.curves import joined, windows
from orchestrator.catalog.remote import HttpCatalog
from orchestrator.errors import AmbiguousName, NotFound, SchemaMismatch, ServiceUnavailable, UserError
from orchestrator.status import RunStatus
from orchestrator.store.views import ParamRow, Points, RunRow, SummaryRow

RUN = RunRow(
    run="r", name="ünïcode \U0001f9a6", experiment="e", project="p", user="ada", status=RunStatus.failed, reason="",
    attempt=1, workers=2, job="", sweep="", created=1 / 3, started=None, ended=5e-324, tags={"a": "b"},
)  # fmt: skip


def there_and_back(row: object) -> object:
    text = json.dumps(wire.to_json(row), allow_nan=False)
    return wire.from_json(type(row), json.loads(text))


def test_a_row_comes_back_as_it_was() -> None:
    assert there_and_back(RUN) == RUN


@settings(max_examples=50, deadline=None)
@given(st.floats(), st.floats() | st.none(), st.integers(-(2**62), 2**62))
def test_every_number_of_a_summary_comes_back(value: float, minimum: float | None, step: int) -> None:
    row = SummaryRow(
        run="r", key="k", rank=0, unit="", direction="min", reduction="", count=1, nan_count=0, inf_count=0,
        first=value, first_step=step, first_time=0.001, last=-value, last_step=step, last_time=1.0, last_attempt=1,
        minimum=minimum, min_step=None, maximum=None, max_step=None, mean=value,
    )  # fmt: skip
    assert repr(there_and_back(row)) == repr(row)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("float", math.nan), ("float", -math.inf), ("float", 2.0), ("str", "nan"), ("str", "inf"), ("int", 3),
     ("list", ["nan"]), ("null", None)],
)  # fmt: skip
def test_a_parameter_keeps_its_type(kind: str, value: object) -> None:
    row = ParamRow(name="p", type=kind, value=value)
    assert repr(there_and_back(row)) == repr(row)


def test_columns_that_a_newer_server_adds_are_ignored() -> None:
    assert wire.from_json(RunRow, wire.to_json(RUN) | {"colour": "red"}) == RUN


@pytest.mark.parametrize(
    "error",
    [
        NotFound("run", "x", ("y", "z")),
        AmbiguousName("run", "x", ("a", "b")),
        ServiceUnavailable("postgresql", "h/db", "it is away.", "Wait."),
        SchemaMismatch("0001", "0002", False),
    ],
)
def test_an_error_arrives_as_what_it_is(error: UserError) -> None:
    document, status = wire.error_to_json(error)
    arrived = wire.error_from_json(json.loads(json.dumps(document)))
    assert (type(arrived), arrived.args if arrived else (), str(arrived)) == (type(error), error.args, str(error))
    assert 400 <= status < 600


@pytest.mark.parametrize("document", [None, [], {}, {"error": "x"}, {"error": {}}, {"error": {"message": 3}}])
def test_what_is_no_error_of_ours_is_none(document: object) -> None:
    assert wire.error_from_json(document) is None


def test_an_error_with_other_arguments_is_its_text() -> None:
    document = {"error": {"type": "NotFound", "message": "no such thing", "arguments": [1, 2, 3, 4, 5]}}
    assert str(wire.error_from_json(document)) == "no such thing"


def some_points(count: int) -> Points:
    return Points(
        steps=np.arange(count) * 2**40, times=np.arange(count) / 7, values=np.resize([math.nan, -0.0, 0.1], count),
        ranks=np.full(count, -1, np.int32), attempts=np.full(count, 3, np.int32),
    )  # fmt: skip


def pieces(*counts: int) -> Generator[Points]:
    yield from (some_points(count) for count in counts)


@pytest.mark.parametrize("counts", [(), (0,), (1,), (5, 0, 7)])
def test_points_come_back_bit_for_bit(counts: tuple[int, ...]) -> None:
    body = b"".join(wire.blocks(pieces(*counts)))
    found = joined(wire.points_from(io.BytesIO(body)))
    for name, kind in wire.ARRAYS:
        wanted = [getattr(some_points(count), name) for count in counts]
        whole = np.concatenate(wanted).astype(kind) if wanted else np.empty(0, kind)
        assert (getattr(found, name).dtype, getattr(found, name).tobytes()) == (np.dtype(kind), whole.tobytes())


def test_a_shortened_answer_is_noticed_wherever_it_ends() -> None:
    """The last 8 bytes only say once more that nothing follows."""
    body = b"".join(wire.blocks(pieces(5, 7)))
    for end in range(0, len(body) - 8, 7):
        with pytest.raises((EOFError, ValueError, OSError)):
            joined(wire.points_from(io.BytesIO(body[:end])))
    assert len(joined(wire.points_from(io.BytesIO(body[:-8])))) == 12


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises((ValueError, OSError)):
        joined(wire.points_from(io.BytesIO(b"HTTP/1.1 200 and so on")))


@pytest.mark.parametrize("count", [0, 1, 300])
def test_a_curve_comes_back_bit_for_bit(count: int) -> None:
    curve = windows(some_points(count), 100)
    found = wire.curve_from(wire.curve_to_bytes(curve))
    assert (found.attempt, found.rank, found.is_exact) == (curve.attempt, curve.rank, count < 100)
    for name, kind in wire.CURVE_ARRAYS:
        mine, wanted = getattr(found, name), getattr(curve, name)
        assert (mine.dtype, mine.tobytes()) == (np.dtype(kind), wanted.tobytes())


@pytest.mark.parametrize(
    ("directions", "wanted"),
    [
        ({}, None),
        ({"train/loss": "", "val/loss": ""}, "val/loss"),
        ({"train/loss": "min", "val/loss": ""}, "train/loss"),
        ({"zz": "", "train/b": "", "train/a": ""}, "train/a"),
        ({"test": "", "value": ""}, "test"),
        ({"perf/step_time": "min", "system/load": "", "zz": ""}, "zz"),
        ({"perf/step_time": "min", "system/load": ""}, None),
    ],
)
def test_the_main_metric(directions: dict[str, str], wanted: str | None) -> None:
    assert headline.main_key(directions) == wanted


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("host:8600", "http://host:8600"), ("http://host/", "http://host"),
        ("https://me:pw@host/orc/", "https://host/orc"), ("http://[::1]:8600", "http://[::1]:8600"),
    ],
)  # fmt: skip
def test_an_address_is_understood_and_shown_without_a_password(given_url: str, url: str) -> None:
    assert HttpCatalog(given_url, "token").url == url
