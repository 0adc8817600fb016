"""Points of a run as `orc metrics` and `orchestrator.metrics` give them: from PostgreSQL, and through an API server."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from pyarrow import parquet

import orchestrator
from orchestrator.catalog import wire
from orchestrator.catalog.curves import Choice
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.catalog.metrics import Reading
from orchestrator.cli import main
from orchestrator.cli import metrics as verb
from orchestrator.errors import NotFound, UserError
from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream, facts_payload
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from tests.plugins.api_server import serving

NOW = 1_760_000_000.0
ODD = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3, 1e22, 3.0]
LONG = 5000
Orc = Callable[..., str]


@dataclass(frozen=True)
class Recorded:
    store: Store
    ticket: RunTicket
    database: Path
    """A data directory whose stack has no API server."""
    server: Path
    """One whose stack has."""


@pytest.fixture(scope="module")
def recorded(schema_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A run of two ranks and two attempts: the second went on at step 60 of 100."""
    store = Store(schema_url, pool_size=2)
    spec = RunSpec(experiment="digits", name="brave-otter", storage_url=str(tmp_path_factory.mktemp("runs")), workers=2)
    first = store.open_attempt(spec, now=NOW, lease_seconds=1e6)
    producers = iter(range(1, 100))

    def log(attempt: int, rank: int, key: str, steps: range, values: Any) -> None:
        points = np.zeros(len(steps), POINT)
        points["step"], points["value"] = steps, values
        points["time"] = NOW + attempt * 1000 + np.arange(len(steps)) / 8 + rank / 1000
        store.commit([
            Batch(producer=f"{next(producers):032x}", run=first.run, attempt=attempt, rank=rank, stream=Stream.points,
                  first=1, count=len(steps), keys=(key,), payload=points.tobytes())
        ])  # fmt: skip

    def log_all(attempt: int, steps: range) -> None:
        for rank in (0, 1):
            log(attempt, rank, "train/loss", steps, loss(attempt, rank, steps))
            log(attempt, rank, "perf/step_time", steps, loss(attempt, rank, steps))
        log(attempt, 0, "epoch", steps[10::20], [step // 20 for step in steps[10::20]])

    log_all(1, range(100))
    log(1, 1, "odd", range(len(ODD)), ODD)
    log(1, 0, "train/long", range(LONG), np.arange(LONG) / 7)
    facts = [
        Fact(kind=FactKind.metric, at=NOW, data={"name": "perf/step_time", "unit": "s", "reduction": "max"}),
        Fact(kind=FactKind.metric, at=NOW, data={"name": "train/loss", "direction": "min"}),
    ]
    store.commit([
        Batch(producer=f"{next(producers):032x}", run=first.run, attempt=1, rank=0, stream=Stream.facts, first=1,
              count=len(facts), payload=facts_payload(facts))
    ])  # fmt: skip
    store.transition(first.run, 1, RunStatus.crashed, now=NOW + 1900)
    store.open_attempt(RunSpec(experiment="digits", run=first.run), now=NOW + 2000, lease_seconds=1e6)
    log_all(2, range(60, 120))
    database, server = (tmp_path_factory.mktemp(name) for name in ("database", "server"))
    Stack(home=str(database), database_url=schema_url).save()
    with serving(Stack(home=str(server), database_url=schema_url)):
        yield Recorded(store, first, database, server)
    store.close()


def loss(attempt: int, rank: int, steps: range) -> np.ndarray:
    return np.array(steps) / 3 + 1000 * attempt + rank / 7 + 1


def canonical(made: Callable[[int, range], np.ndarray]) -> tuple[list[int], list[float]]:
    return list(range(120)), [*made(1, range(60)).tolist(), *made(2, range(60, 120)).tolist()]


@pytest.fixture(params=["database", "server"])
def home(request: pytest.FixtureRequest, recorded: Recorded) -> Path:
    return getattr(recorded, request.param)


@pytest.fixture
def orc(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Orc:
    def call(*words: str, code: int = 0) -> str:
        done = main.main(["--home", str(home), "metrics", "brave-otter", *words])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert done == code, shown.err
        return shown.out if code == 0 else shown.err

    return call


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def as_float(value: float | str) -> float:
    assert not isinstance(value, str) or value in ("nan", "inf", "-inf")
    return float(value)


# -- the canonical curve -----------------------------------------------------------------------------------------------


def test_lines_have_exactly_these_fields_and_go_on_with_the_newest_attempt(orc: Orc) -> None:
    found = lines(orc("train/loss", "--format", "jsonl"))
    assert {tuple(row) for row in found} == {("step", "epoch", "phase", "metric", "value")}
    steps, values = canonical(lambda attempt, steps: loss(attempt, 0, steps))
    assert [row["step"] for row in found] == steps
    assert [row["value"] for row in found] == values
    assert {(row["phase"], row["metric"]) for row in found} == {("train", "loss")}
    assert [row["epoch"] for row in found] == [
        *[None] * 10, *([0] * 20), *([1] * 20), *([2] * 20), *([3] * 20), *([4] * 20), *([5] * 10),
    ]  # fmt: skip


def test_every_float_comes_back_bit_for_bit_and_lines_are_standard_json(orc: Orc, tmp_path: Path) -> None:
    """Also a key that only rank 1 logged, and one without a phase."""
    found = lines(orc("odd", "--format", "jsonl"))
    assert {(row["phase"], row["metric"]) for row in found} == {(None, "odd")}
    read = [as_float(row["value"]) for row in found]
    assert np.array(read).tobytes() == np.array(ODD).tobytes()
    assert [row["value"] for row in found[:3]] == ["nan", "inf", "-inf"]
    assert np.array([float(row["value"]) for row in rows(orc("odd", "-f", "csv"))]).tobytes() == np.array(ODD).tobytes()
    orc("odd", "--output", str(tmp_path / "odd.parquet"))
    table = parquet.read_table(tmp_path / "odd.parquet")
    assert table["value"].to_numpy().tobytes() == np.array(ODD).tobytes()


def test_ranks_are_reduced_as_declared_and_as_told(orc: Orc) -> None:
    for words, made in (
        (["perf/step_time"], lambda attempt, steps: loss(attempt, 1, steps)),
        (["perf/step_time", "--rank", "0"], lambda attempt, steps: loss(attempt, 0, steps)),
        (["train/loss", "--reduce", "mean"], lambda a, steps: (loss(a, 0, steps) + loss(a, 1, steps)) / 2),
        (["train/loss", "--reduce", "skew"],
         lambda a, s: (loss(a, 1, s) - loss(a, 0, s)) / ((loss(a, 0, s) + loss(a, 1, s)) / 2)),
        (["train/loss", "--reduce", "p95"], lambda a, s: 0.05 * loss(a, 0, s) + 0.95 * loss(a, 1, s)),
    ):  # fmt: skip
        found = rows(orc(*words, "--format", "csv"))
        steps, values = canonical(made)  # type: ignore[arg-type]
        assert [int(row["step"]) for row in found] == steps
        np.testing.assert_allclose([float(row["value"]) for row in found], values, rtol=1e-12)
        assert set(found[0]) == {"key", "step", "epoch", "time", "value"}


def test_all_ranks_and_attempts_are_there_with_their_places(orc: Orc) -> None:
    found = lines(orc("train/loss", "--rank", "all", "--attempt", "all", "--format", "jsonl"))
    assert {tuple(row) for row in found} == {
        ("step", "epoch", "phase", "metric", "value", "rank", "attempt", "time")
    }  # fmt: skip
    wanted = [
        (attempt, rank, step, value, NOW + attempt * 1000 + place / 8 + rank / 1000)
        for attempt, steps in ((1, range(100)), (2, range(60, 120)))
        for rank in (0, 1)
        for place, (step, value) in enumerate(zip(steps, loss(attempt, rank, steps).tolist(), strict=True))
    ]
    assert [(row["attempt"], row["rank"], row["step"], row["value"]) for row in found] == [each[:4] for each in wanted]
    np.testing.assert_allclose([row["time"] for row in found], [each[4] for each in wanted], atol=1e-3, rtol=0)
    superseded = [row["epoch"] for row in found if (row["attempt"], row["rank"], row["step"]) == (1, 0, 95)]
    assert superseded == [4]
    of_one = rows(orc("train/loss", "--attempt", "1", "--rank", "1", "--format", "csv"))
    assert [float(row["value"]) for row in of_one] == loss(1, 1, range(100)).tolist()
    both = rows(orc("train/loss", "--rank", "all", "--format", "csv"))
    assert [(row["attempt"], row["rank"]) for row in both] == [
        *[("1", "0")] * 60, *[("1", "1")] * 60, *[("2", "0")] * 60, *[("2", "1")] * 60,
    ]  # fmt: skip


def test_steps_and_each_nth_point(orc: Orc) -> None:
    found = lines(orc("train/loss", "--from", "50", "--to", "70", "--every", "4", "--format", "jsonl"))
    assert [row["step"] for row in found] == [50, 54, 58, 62, 66, 70]
    assert lines(orc("train/loss", "--from", "500", "--format", "jsonl")) == []


def test_patterns_name_several_keys(orc: Orc) -> None:
    found = rows(orc("train/*", "odd", "--format", "csv"))
    assert list(dict.fromkeys(row["key"] for row in found)) == ["train/long", "train/loss", "odd"]
    assert len(found) == LONG + 120 + len(ODD)


# -- forms -------------------------------------------------------------------------------------------------------------


def test_one_document_has_the_columns_of_each_key(orc: Orc, tmp_path: Path) -> None:
    document = json.loads(orc("perf/step_time", "odd", "--json"), parse_constant=refuse)
    assert document["name"] == "brave-otter"
    assert document["curves"]["perf/step_time"] == {"unit": "s", "direction": "", "rank": None, "reduce": "max"}
    assert document["curves"]["odd"] == {"unit": "", "direction": "", "rank": 1, "reduce": None}
    assert set(document["points"]["odd"]) == {"step", "epoch", "time", "value"}
    assert document["points"]["odd"]["value"][:4] == ["nan", "inf", "-inf", -0.0]
    assert json.loads(orc("perf/step_time", "odd", "--format", "json")) == document
    told = json.loads(orc("perf/step_time", "odd", "--output", str(tmp_path / "all.json"), "--json"))
    assert (told["points"], told["format"], told["size_bytes"]) == (
        120 + len(ODD), "json", (tmp_path / "all.json").stat().st_size,
    )  # fmt: skip
    assert json.loads((tmp_path / "all.json").read_text()) == document


def test_a_table_shows_a_long_curve_in_windows_and_says_so(
    recorded: Recorded, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--home", str(home), "metrics", "brave-otter", "train/long"]) == 0
    shown = capsys.readouterr()
    title, header, *body = shown.out.splitlines()
    assert title == "train/long: rank 0, 5,000 points"
    assert header.split() == ["step", "epoch", "time", "points", "mean", "min", "max", "last"]
    assert len(body) <= verb.MOST_WINDOWS
    assert sum(int(line.split()[4]) for line in body) == LONG
    assert body[-1].split()[-1] == f"{(LONG - 1) / 7:.4g}"
    assert "5,000 points of train/long are shown in windows" in shown.err


def test_a_table_shows_a_short_curve_point_by_point(orc: Orc) -> None:
    title, header, *body = orc("perf/step_time", "--to", "79").splitlines()
    assert title == "perf/step_time [s]: max over ranks, attempts up to 2 where each went on, 80 points"
    assert header.split() == ["step", "epoch", "time", "value"]
    assert [int(line.split()[0]) for line in body] == list(range(80))
    assert [body[n].split()[1] for n in (9, 10, 79)] == ["-", "0", "3"]
    assert float(body[70].split()[-1]) == pytest.approx(loss(2, 1, range(70, 71))[0], rel=1e-5)
    each = orc("train/loss", "--rank", "all", "--attempt", "all", "--every", "50")
    assert [line.split()[:3] for line in each.splitlines()[2:]] == [
        ["1", "0", "0"], ["1", "0", "50"], ["1", "1", "0"], ["1", "1", "50"], ["2", "0", "60"], ["2", "0", "110"],
        ["2", "1", "60"], ["2", "1", "110"],
    ]  # fmt: skip


def test_what_makes_no_sense_is_refused_with_a_hint(orc: Orc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "there.csv"
    file.write_text("mine")
    for words, hint in (
        (["train/lose"], "Did you mean 'train/loss'"),
        (["--format", "parquet"], "'*' are all of them"),
        (["--reduce", "mean"], "'*' are all of them"),
        (["odd", "--format", "csv", "--json"], "choose one"),
        (["odd", "--rank", "1", "--reduce", "mean"], "one rank's curve"),
        (["odd", "--reduce", "median"], "p95"),
        (["odd", "--output", str(tmp_path / "x.txt")], "say --format"),
        (["odd", "--output", str(file)], "exists already"),
        (["odd", "--output", str(tmp_path / "no" / "x.csv")], "cannot be written"),
        (["odd", "--every", "0"], "no positive number"),
        (["odd", "--rank", "some"], "no number from 0 up"),
    ):
        assert hint in orc(*words, code=2)
    monkeypatch.setattr(verb, "MOST_IN_DOCUMENT", 5)
    error = orc("odd", "--format", "json", "--output", str(tmp_path / "odd.json"), code=2)
    assert "--format jsonl" in error
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"], "what failed leaves nothing"
    assert file.read_text() == "mine"


def test_progress_is_told_when_it_takes_a_while(orc: Orc, home: Path, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    assert main.main(["--home", str(home), "metrics", "brave-otter", "train/long", "--format", "csv"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(verb, "BORING", 0.0)
    assert main.main(["--home", str(home), "metrics", "brave-otter", "train/long", "--format", "csv"]) == 0
    assert "5,000 of about 5,000 points" in capsys.readouterr().err


# -- tables for notebooks ----------------------------------------------------------------------------------------------


def test_arrow_pandas_and_polars_have_the_same_rows(recorded: Recorded, home: Path) -> None:
    asked = orchestrator.metrics("brave-otter", "train/loss", "odd", rank="all", home=home)
    table = asked.arrow()
    assert table.column_names == ["key", "step", "epoch", "time", "value", "attempt", "rank"]
    assert str(table.schema.field("time").type) == "timestamp[ms, tz=UTC]"
    assert table.num_rows == 240 + len(ODD)
    pandas, polars = asked.pandas(), asked.polars()
    for name in ("key", "step", "attempt", "rank", "epoch"):
        wanted = table[name].to_pylist()
        assert polars[name].to_list() == wanted
        assert [None if value is pandas_missing() else value for value in pandas[name].tolist()] == wanted
    for values in (table["value"].to_numpy(), pandas["value"].to_numpy(), polars["value"].to_numpy()):
        assert values[-len(ODD) :].tobytes() == np.array(ODD).tobytes()
    assert pandas["time"].iloc[0].timestamp() == NOW + 1000
    assert polars["time"].dt.timestamp("ms").to_list() == table["time"].cast("int64").to_pylist()
    assert str(pandas["epoch"].dtype) == "Int64"


def pandas_missing() -> Any:
    import pandas

    return pandas.NA


def test_nothing_is_read_before_it_is_asked_for_and_then_each_time_anew(recorded: Recorded, home: Path) -> None:
    unknown = orchestrator.metrics("no-such-run", "x", home=home)
    with pytest.raises(NotFound):
        unknown.arrow()
    with pytest.raises(UserError, match="Did you mean 'odd'"):
        orchestrator.metrics("brave-otter", "oddd", home=home).arrow()
    with pytest.raises(UserError, match="reduce"):
        orchestrator.metrics("brave-otter", reduce="median", home=home)
    everything = orchestrator.metrics("brave-otter", home=home)
    assert everything.arrow()["key"].unique().to_pylist() == [
        "epoch",
        "odd",
        "perf/step_time",
        "train/long",
        "train/loss",
    ]
    assert everything.arrow().equals(everything.arrow()) is False, "NaN is not equal to itself"
    assert sum(batch.num_rows for batch in everything.batches()) == everything.arrow().num_rows


def test_an_api_server_is_asked_by_its_address(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack.load(recorded.server)
    monkeypatch.setenv("ORC_HOME", str(recorded.server / "nothing"))
    monkeypatch.setenv("ORC_API_TOKEN_PATH", stack.api_token_path)
    table = orchestrator.metrics("brave-otter", "perf/*", start=100, api=stack.api_url).arrow()
    assert table["value"].to_pylist() == loss(2, 1, range(100, 120)).tolist()


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_package_that_is_missing_is_named(recorded: Recorded, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        getattr(orchestrator.metrics("brave-otter", "odd", home=recorded.database), package)()


def test_a_run_without_metrics_gives_an_empty_table(recorded: Recorded) -> None:
    bare = recorded.store.open_attempt(RunSpec(experiment="digits", name="bare"), now=NOW - 10, lease_seconds=1e6)
    assert orchestrator.metrics(bare.run, home=recorded.database).arrow().num_rows == 0


def test_a_long_answer_comes_in_small_pieces(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.catalog import metrics, open_catalog

    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", 64)
    with open_catalog(recorded.database) as catalog:
        reading = Reading(catalog, "brave-otter", ["train/long"], Choice())
        sizes = [len(points) for points in reading.blocks("train/long")]
    assert (sum(sizes), max(sizes)) == (LONG, 64)


# -- what a metric means -----------------------------------------------------------------------------------------------


def test_the_latest_declaration_counts_and_one_that_contradicts_is_an_event(recorded: Recorded) -> None:
    store = recorded.store
    ticket = store.open_attempt(RunSpec(experiment="declared"), now=NOW - 20, lease_seconds=1e6)
    said = [
        {"name": "declared/a", "unit": "s", "direction": "min"},
        {"name": "declared/a", "unit": "s", "reduction": "mean"},
        {"name": "declared/a", "direction": "max"},
    ]
    facts = [Fact(kind=FactKind.metric, at=NOW, data=data) for data in said]
    points = np.zeros(1, POINT)
    for producer, stream, payload, keys in (
        (1, Stream.facts, facts_payload(facts), ()), (1, Stream.points, points.tobytes(), ("declared/a",)),
    ):  # fmt: skip
        store.commit([
            Batch(producer=f"{producer + 5000:032x}", run=ticket.run, attempt=1, rank=0, stream=stream, first=1,
                  count=len(facts) if stream is Stream.facts else 1, keys=keys, payload=payload)
        ])  # fmt: skip
    (row,) = store.summaries(ticket.run)
    assert (row.unit, row.direction, row.reduction, row.best) == ("s", "max", "mean", 0.0)
    (event,) = [event for event in store.events(ticket.run) if event.kind == "metric_redeclared"]
    assert (event.level, event.details["direction"]) == ("warning", ["min", "max"])
    assert event.message == "declared/a: direction was 'min', is now 'max', for all runs"


def test_several_keys_at_once_are_what_each_is_alone(home: Path, recorded: Recorded) -> None:
    """Also those of which there are too many for one URL."""
    known = ["train/loss", "odd", "perf/step_time", "train/long", "epoch"]
    keys = ["no/such/key", *known, *(f"none/{number:0500d}" for number in range(600))]
    with orchestrator.open_catalog(home) as catalog:
        found = catalog.points_of(recorded.ticket.run, keys)
        assert list(found) == keys
        assert [key for key, points in found.items() if len(points)] == known
        for key in keys[:8]:
            alone = catalog.points(recorded.ticket.run, key)
            for name, kind in wire.ARRAYS:
                mine, wanted = getattr(found[key], name), getattr(alone, name)
                assert (mine.dtype, mine.tobytes()) == (np.dtype(kind), wanted.tobytes()), (key, name)
        assert catalog.points_of(recorded.ticket.run, []) == {}
        with pytest.raises(NotFound):
            catalog.points_of("no-such-run", keys)


def test_short_metrics_are_read_together(recorded: Recorded) -> None:
    asked: list[str] = []

    class Counting(DatabaseCatalog):
        def point_blocks(self, run: str, key: str, **which: Any) -> Any:
            asked.append(key)
            return super().point_blocks(run, key, **which)

        def points_of(self, run: str, keys: Sequence[str]) -> Any:
            asked.extend(["together", *keys])
            return super().points_of(run, keys)

    reading = Reading(Counting(recorded.store), "brave-otter", ["train/*", "perf/*", "odd"], Choice(rank="all"))
    found = {key: sum(len(points) for points in reading.blocks(key)) for key in reading.keys}
    assert found == {"train/long": LONG, "train/loss": 240, "perf/step_time": 240, "odd": len(ODD)}
    assert asked == ["together", *reading.keys]
