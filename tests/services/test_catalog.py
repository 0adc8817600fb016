"""One contract for both catalogs: straight from a real PostgreSQL, and over HTTP from the real API server."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.catalog import Catalog, open_catalog, wire
from orchestrator.catalog.curves import joined
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.catalog.headline import main_key
from orchestrator.catalog.remote import HttpCatalog
from orchestrator.errors import AmbiguousName, NotFound, UserError
from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream, facts_payload
from orchestrator.stack import Stack
from orchestrator.store.names import trial_run_id
from orchestrator.store.store import Store
from orchestrator.sweep_records import DecisionRow, JobRow, SweepSpec, SweepStep, TrialRow
from tests.plugins.api_server import client, serving

NOW = 1_760_000_000.0
EVENTS = 2500
"""More than the API gives at once."""
ODD = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3]


@dataclass(frozen=True)
class Recorded:
    """A database with four runs, everything about the first, and both ways to read it."""

    database: DatabaseCatalog
    http: HttpCatalog
    stack: Stack
    rich: RunTicket
    twins: tuple[RunTicket, RunTicket]
    """Two runs of one name."""
    bare: RunTicket


@pytest.fixture(scope="module")
def recorded(schema_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    home = tmp_path_factory.mktemp("home")
    store = Store(schema_url, pool_size=2)
    storage = str(home / "runs")
    rich = store.open_attempt(
        RunSpec(
            experiment="digits/ünïcode 1",
            name="brave-otter",
            user="ada",
            description="what a\nrun",
            tags={"team": "vision", "a=b": "c=d&e", "empty": ""},
            params={"lr": 0.1, "worst": -math.inf, "none": None, "deep": {"x": [1, 2.5]}, "layers": 3, "on": True},
            config={"optim": {"lr": 0.1, "best": "nan"}, "names": ["ä", "\U0001f9a6"]},
            config_hash="abc",
            storage_url=storage,
            workers=2,
            seed=2**40,
        ),
        now=NOW,
        lease_seconds=60,
    )
    store.commit([_points(rich, 0, 1, ODD), _points(rich, 1, 2, [1.0, 2.0]), _facts(rich)])
    error = {"type": "ValueError", "message": "bad shape", "rank": 1}
    store.transition(rich.run, 1, RunStatus.crashed, reason="rank 1", error=error, now=NOW + 100)
    store.open_attempt(RunSpec(experiment="digits/ünïcode 1", run=rich.run), now=NOW + 200, lease_seconds=1e6)
    store.commit([_points(rich, 0, 3, [7.0] * 5000, attempt=2)])
    first, second, bare = (
        store.open_attempt(RunSpec(experiment="speech", name=name), now=NOW + 300 + place, lease_seconds=1e6)
        for place, name in enumerate(("twin", "twin", "bare-run"))
    )
    store.transition(first.run, 1, RunStatus.finished, now=NOW + 400)
    with serving(Stack(home=str(home), database_url=schema_url, storage_url=storage)) as stack:
        server = client(stack)
        yield Recorded(DatabaseCatalog(store), server, stack, rich, (second, first), bare)
        server.close()
    store.close()


def _points(ticket: RunTicket, rank: int, producer: int, values: list[float], attempt: int = 1) -> Batch:
    points = np.zeros(len(values), dtype=POINT)
    points["step"] = np.arange(len(values)) * 3
    points["time"] = NOW + np.arange(len(values)) / 1000
    points["value"] = values
    return Batch(
        producer=f"{producer:032x}", run=ticket.run, attempt=attempt, rank=rank, stream=Stream.points, first=1,
        count=len(values), keys=("val/loss",), payload=points.tobytes(),
    )  # fmt: skip


def _facts(ticket: RunTicket) -> Batch:
    checkpoint = {
        "id": "step-3", "uri": f"{ticket.directory}/checkpoints/step-3", "step": 3, "epoch": 1, "size_bytes": 4096,
        "state": "committed", "metrics": {"val/loss": math.inf}, "is_best": True, "duration": 0.2, "kind": "sharded",
        "world_size": 2, "reasons": ["improved", "every_epochs"], "timings": {"copy": 0.1}, "resumable": False,
    }  # fmt: skip
    said: list[tuple[FactKind, dict[str, Any]]] = [
        (FactKind.metric, {"name": "val/loss", "direction": "min", "unit": "nats"}),
        (FactKind.checkpoint, checkpoint),
        (FactKind.artifact, {"name": "c.png", "uri": "/c.png", "size_bytes": 10, "media_type": "image/png"}),
        (FactKind.note, {"text": "looks odd \U0001f440"}),
        (FactKind.provenance, {"git": {"commit": "abc", "dirty": True}}),
        *((FactKind.event, {"kind": "note", "message": f"event {n}", "level": "info"}) for n in range(EVENTS)),
    ]
    facts = [Fact(kind=kind, at=NOW + n / 10, data=data) for n, (kind, data) in enumerate(said)]
    return Batch(
        producer=f"{9:032x}", run=ticket.run, attempt=1, rank=0, stream=Stream.facts, first=1, count=len(facts),
        payload=facts_payload(facts),
    )  # fmt: skip


@pytest.fixture(params=["database", "http"])
def catalog(request: pytest.FixtureRequest, recorded: Recorded) -> Catalog:
    return getattr(recorded, request.param)


def test_runs_are_listed_newest_first_and_in_pages(catalog: Catalog, recorded: Recorded) -> None:
    newest, oldest = recorded.bare.run, recorded.rich.run
    everything = [row.run for row in catalog.runs()]
    assert everything == [newest, *(twin.run for twin in recorded.twins), oldest]
    assert [row.run for row in catalog.runs(limit=2, offset=1)] == everything[1:3]
    assert [row.run for row in catalog.runs(limit=10_000_000)] == everything
    assert catalog.runs(limit=0) == []
    assert catalog.runs(offset=4) == []


def test_runs_are_filtered(catalog: Catalog, recorded: Recorded) -> None:
    assert [row.name for row in catalog.runs(experiment="digits/ünïcode 1")] == ["brave-otter"]
    assert [row.name for row in catalog.runs(status=RunStatus.finished)] == ["twin"]
    assert [row.name for row in catalog.runs(tags={"a=b": "c=d&e", "empty": ""})] == ["brave-otter"]
    assert catalog.runs(tags={"a=b": "c"}) == []
    assert [row.name for row in catalog.runs(search="are-r")] == ["bare-run"]
    assert catalog.runs(search="100%") == []


def test_an_unknown_experiment_names_the_nearest(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as refused:
        catalog.runs(experiment="speach")
    assert refused.value.args == ("experiment", "speach", ("speech",))


def test_experiments_say_how_their_runs_stand(catalog: Catalog) -> None:
    found = {row.name: (row.runs, row.active, row.last_run) for row in catalog.experiments()}
    assert found == {"speech": (3, 2, NOW + 302), "digits/ünïcode 1": (1, 1, NOW)}


def test_a_run_is_found_by_id_name_and_last(catalog: Catalog, recorded: Recorded) -> None:
    for reference in (recorded.rich.run, "brave-otter"):
        assert catalog.run(reference).run == recorded.rich.run
    assert catalog.run("last").run == recorded.bare.run
    found = catalog.run("brave-otter")
    assert (found.status, found.attempt, found.seed) == (RunStatus.running, 2, 2**40)
    assert found.tags == {"team": "vision", "a=b": "c=d&e", "empty": ""}
    assert found.directory == recorded.rich.directory


@pytest.mark.parametrize("reference", ["brave-oter", "", "a/b?c#d%2e", "../runs"])
def test_no_such_run_names_the_nearest(catalog: Catalog, reference: str) -> None:
    with pytest.raises(NotFound) as refused:
        catalog.run(reference)
    assert refused.value.nearest == (("brave-otter",) if reference == "brave-oter" else ())


def test_a_name_of_two_runs_is_ambiguous(catalog: Catalog, recorded: Recorded) -> None:
    with pytest.raises(AmbiguousName) as refused:
        catalog.run("twin")
    assert refused.value.candidates == tuple(twin.run for twin in recorded.twins)


def test_params_have_their_types_back(catalog: Catalog, recorded: Recorded) -> None:
    found = {row.name: row.value for row in catalog.params(recorded.rich.run)}
    wanted = {"lr": 0.1, "worst": -math.inf, "none": None, "deep": {"x": [1, 2.5]}, "layers": 3, "on": True}
    assert found == wanted
    assert {name: type(value) for name, value in found.items()} == {name: type(v) for name, v in wanted.items()}


def test_facts_of_a_run(catalog: Catalog, recorded: Recorded) -> None:
    run = recorded.rich.run
    assert [(row.attempt, row.status) for row in catalog.attempts(run)] == [
        (1, RunStatus.crashed), (2, RunStatus.running),
    ]  # fmt: skip
    assert catalog.attempts(run)[0].provenance["git"] == {"commit": "abc", "dirty": True}
    assert [row.text for row in catalog.notes(run)] == ["looks odd \U0001f440"]
    assert [row.id for row in catalog.checkpoints(run)] == ["step-3"]
    assert [row.name for row in catalog.artifacts(run)] == ["c.png"]
    assert catalog.notes(recorded.bare.run) == []


@pytest.mark.parametrize("newest", [0, 1, 10, 1000, 1001, EVENTS - 1, 100_000])
def test_the_newest_events_are_given_oldest_first(catalog: Catalog, recorded: Recorded, newest: int) -> None:
    every = recorded.database.events(recorded.rich.run, newest=10**6)
    assert len(every) >= EVENTS
    assert catalog.events(recorded.rich.run, newest=newest) == (every[-newest:] if newest else [])


def test_summaries_are_of_the_runs_asked_for(catalog: Catalog, recorded: Recorded) -> None:
    found = catalog.summaries(recorded.rich.run, recorded.bare.run)
    assert [(row.run, row.key, row.rank, row.last) for row in found] == [
        (recorded.rich.run, "val/loss", 0, 7.0), (recorded.rich.run, "val/loss", 1, 2.0),
    ]  # fmt: skip
    assert math.isnan(found[0].first)
    assert (found[0].nan_count, found[0].inf_count, found[0].minimum) == (1, 2, -math.inf)
    assert catalog.summaries() == []
    many = [recorded.rich.run, *(f"no-such-run-{n}" for n in range(1200))]
    assert len(catalog.summaries(*many)) == 2


def test_the_main_metric_is_the_one_of_the_rule(catalog: Catalog, schema_url: str) -> None:
    """The database chooses; the rule for people and `orc show` is `main_key`."""
    keys = ["test", "val/a", "val/z", "valid/É", "train/b", "Val/a", "train", "x/val/a", "x", "évaluation", "zz"]
    store = Store(schema_url, pool_size=1)
    chosen: dict[str, str | None] = {}
    for number in range(1, len(keys) + 1):
        ticket = store.open_attempt(RunSpec(experiment="main", name=f"main-{number}"), now=NOW, lease_seconds=1e6)
        for rank in (1, 0):
            points = np.zeros(number, dtype=POINT)
            points["key"], points["value"] = np.arange(number), rank
            store.commit([
                Batch(producer=uuid.uuid4().hex, run=ticket.run, attempt=1, rank=rank,
                      stream=Stream.points, first=1, count=number, keys=tuple(keys[-number:]), payload=points.tobytes())
            ])  # fmt: skip
        chosen[ticket.run] = main_key(dict.fromkeys(keys[-number:], ""))
    try:
        found = catalog.main_metrics(*chosen)
        assert {run: row.key for run, row in found.items()} == chosen
        assert {row.rank for row in found.values()} == {0}
        assert len(set(chosen.values())) > 3
    finally:
        for run in chosen:
            store.remove_run(run, user="test", now=time.time(), force=True)
        store.close()


def test_a_declared_direction_comes_first(catalog: Catalog, recorded: Recorded) -> None:
    found = catalog.main_metrics(recorded.rich.run, recorded.bare.run)
    assert {run: (row.key, row.direction) for run, row in found.items()} == {recorded.rich.run: ("val/loss", "min")}
    assert catalog.main_metrics() == {}


def test_points_are_bit_for_bit_what_was_logged(catalog: Catalog, recorded: Recorded) -> None:
    points = catalog.points(recorded.rich.run, "val/loss", rank=0, attempt=1)
    assert points.values.tobytes() == np.array(ODD).tobytes()
    assert points.steps.tolist() == [3 * n for n in range(len(ODD))]
    assert len(catalog.points(recorded.rich.run, "val/loss")) == len(ODD) + 2 + 5000
    assert catalog.points(recorded.rich.run, "val/loss", attempt=2).ranks.tolist() == [0] * 5000
    assert len(catalog.points(recorded.rich.run, "no/such/key")) == 0
    with pytest.raises(NotFound):
        catalog.points("no-such-run", "val/loss")


def test_points_come_in_pieces_and_other_questions_may_follow(catalog: Catalog, recorded: Recorded) -> None:
    pieces = catalog.point_blocks(recorded.rich.run, "val/loss", rank=0)
    first = next(pieces)
    pieces.close()
    assert first.values[: len(ODD)].tobytes() == np.array(ODD).tobytes()
    whole = joined(catalog.point_blocks(recorded.rich.run, "val/loss", rank=0))
    assert len(whole) == len(ODD) + 5000
    assert whole.values.tobytes() == catalog.points(recorded.rich.run, "val/loss", rank=0).values.tobytes()
    assert list(catalog.point_blocks(recorded.rich.run, "no/such/key")) == []
    with pytest.raises(NotFound):
        next(catalog.point_blocks("no-such-run", "val/loss"))


def test_a_curve_is_exact_where_it_is_short_and_in_windows_where_it_is_long(
    catalog: Catalog, recorded: Recorded
) -> None:
    run = recorded.rich.run
    short = catalog.curve(run, "val/loss", attempt=1)
    assert (short.attempt, short.rank, short.is_exact, len(short)) == (1, 0, True, len(ODD))
    assert short.first.tobytes() == np.array(ODD).tobytes()
    long = catalog.curve(run, "val/loss", most=100)
    assert (long.attempt, long.is_exact, int(long.counts.sum())) == (2, False, 5000)
    assert 20 <= len(long) <= 100
    assert set(long.mean.tolist()) == {7.0}
    part = catalog.curve(run, "val/loss", attempt=2, start=-5, stop=30)
    assert part.steps.tolist() == list(range(0, 31, 3))
    assert len(catalog.curve(run, "val/loss", rank=1, attempt=2)) == 0
    assert catalog.curve(run, "no/such/key").attempt == 0
    with pytest.raises(NotFound):
        catalog.curve("no-such-run", "val/loss")


def test_live_is_what_is_committed_where_there_is_no_redis(catalog: Catalog, recorded: Recorded) -> None:
    live = catalog.live(recorded.rich.run)
    assert (live.source, live.state.attempt, live.state.points) == ("database", 2, len(ODD) + 2 + 5000)
    assert [(value.key, value.rank, value.value) for value in live.values] == [
        ("val/loss", 0, 7.0), ("val/loss", 1, 2.0)
    ]  # fmt: skip
    assert [checkpoint.id for checkpoint in live.checkpoints] == ["step-3"]
    assert catalog.live(recorded.rich.run, after=live.cursor, wait=0.01) == live
    assert catalog.live(recorded.rich.run, after="1-0", wait=5.0) == live
    assert catalog.live(recorded.bare.run).values == ()
    with pytest.raises(NotFound):
        catalog.live("no-such-run")


def test_both_give_the_very_same_live_run_and_lags(recorded: Recorded) -> None:
    assert recorded.http.live(recorded.rich.run) == recorded.database.live(recorded.rich.run)
    assert recorded.http.sink_lags() == recorded.database.sink_lags()
    assert recorded.http.alerts(only_firing=False) == recorded.database.alerts(only_firing=False)
    assert recorded.http.notifications() == recorded.database.notifications()


def test_logs_are_read_from_any_offset(catalog: Catalog, recorded: Recorded) -> None:
    directory = Path(recorded.rich.directory) / "logs" / "attempt-2"
    directory.mkdir(parents=True, exist_ok=True)
    content = "zéro\n".encode() + b"x" * (3 << 20) + b"\xff\n"
    (directory / "rank-10.log").write_bytes(content)
    for name in ("driver", "rank-2"):
        (directory / f"{name}.log").write_bytes(b"hello\n")
    (directory / "rank-2.stack").write_bytes(b"Thread 1\n")
    (directory / "notes.txt").write_text("no log")
    logs = catalog.logs(recorded.rich.run)
    assert logs.attempts() == [2]
    assert logs.sources(2) == {"driver": 6, "rank-2": 6, "rank-10": len(content), "rank-2.stack": 9}
    assert list(logs.sources(2)) == ["driver", "rank-2", "rank-10", "rank-2.stack"]
    assert logs.read(2, "rank-2.stack", 0, 100) == b"Thread 1\n"
    assert logs.sources(7) == {}
    read = b""
    while piece := logs.read(2, "rank-10", len(read), 1 << 20):
        read += piece
    assert read == content
    assert logs.read(2, "driver", 3, 2) == b"lo"
    assert logs.read(2, "driver", 100, 10) == b""
    assert logs.uri(2, "driver") == str(directory / "driver.log")


@pytest.mark.parametrize(
    "source", ["rank-7", "notes.txt", "../../config", "..", "", "driver.log", "/etc/passwd", "rank-1\0", "rank-1/../x"]
)
def test_what_is_no_log_of_the_run_is_not_read(catalog: Catalog, recorded: Recorded, source: str) -> None:
    with pytest.raises(NotFound):
        catalog.logs(recorded.rich.run).read(2, source, 0, 10)


def test_a_link_out_of_the_directory_is_not_followed(catalog: Catalog, recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    directory = Path(recorded.rich.directory) / "logs" / "attempt-3"
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / "rank-0.log"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "secret")
    try:
        with pytest.raises(UserError, match="no path inside"):
            catalog.logs(recorded.rich.run).read(3, "rank-0", 0, 10)
    finally:
        link.unlink()
        directory.rmdir()


def test_logs_of_no_run(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        catalog.logs("no-such-run")


QUESTIONS: list[Callable[[Catalog, str], Any]] = [
    lambda c, run: c.experiments(),
    lambda c, run: c.runs(),
    lambda c, run: c.run(run),
    lambda c, run: c.attempts(run),
    lambda c, run: c.params(run),
    lambda c, run: c.notes(run),
    lambda c, run: c.checkpoints(run),
    lambda c, run: c.artifacts(run),
    lambda c, run: c.events(run, newest=30),
    lambda c, run: c.summaries(run),
    lambda c, run: c.main_metrics(run),
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_both_give_the_very_same_values(recorded: Recorded, question: Callable[[Catalog, str], Any]) -> None:
    """Compared as text, because NaN is not equal to itself; the text tells the types, too."""
    for ticket in (recorded.rich, recorded.bare):
        assert repr(question(recorded.http, ticket.run)) == repr(question(recorded.database, ticket.run))


def test_threads_may_share_a_catalog(catalog: Catalog, recorded: Recorded) -> None:
    with ThreadPoolExecutor(max_workers=6) as pool:
        asked = [pool.submit(catalog.points, recorded.rich.run, "val/loss", attempt=n % 3 + 1) for n in range(60)]
        assert [len(future.result()) for future in asked] == [len(ODD) + 2, 5000, 0] * 20


def test_both_give_the_very_same_points(recorded: Recorded) -> None:
    ours, theirs = (c.points(recorded.rich.run, "val/loss") for c in (recorded.http, recorded.database))
    for name, _ in wire.ARRAYS:
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        assert (mine.dtype, mine.tobytes()) == (wanted.dtype, wanted.tobytes())


def test_both_give_the_very_same_curve(recorded: Recorded) -> None:
    ours, theirs = (c.curve(recorded.rich.run, "val/loss", most=50) for c in (recorded.http, recorded.database))
    for name, _ in wire.CURVE_ARRAYS:
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        assert (mine.dtype, mine.tobytes()) == (wanted.dtype, wanted.tobytes())


def test_a_stack_is_asked_through_its_server_and_without_one_directly(recorded: Recorded, tmp_path: Path) -> None:
    with open_catalog(Path(recorded.stack.home)) as catalog:
        assert isinstance(catalog, HttpCatalog)
        assert catalog.run("last").run == recorded.bare.run
    raw = json.loads((Path(recorded.stack.home) / "stack.json").read_text())
    closed = raw | {"api_url": "http://127.0.0.1:9"}
    dead = raw | {"processes": {"api": raw["processes"]["api"] | {"pid": 2**22 + 1}}}
    refused = raw | {"api_token_path": str(tmp_path / "none")}
    for changed in (closed, dead, refused):
        (tmp_path / "stack.json").write_text(json.dumps(changed))
        with open_catalog(tmp_path) as catalog:
            assert isinstance(catalog, DatabaseCatalog)
            assert catalog.run("last").run == recorded.bare.run


def test_another_version_is_told_and_the_database_asked_instead(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "protocol", lambda: "1.another")
    with pytest.raises(UserError, match="of version .* Install the same version"):
        recorded.http.check()
    with open_catalog(Path(recorded.stack.home)) as catalog:
        assert isinstance(catalog, DatabaseCatalog)


def test_a_sweep_and_all_of_it(catalog: Catalog, recorded: Recorded, schema_url: str) -> None:
    """Its rows are the very same from both, its trials are left out of lists where they are not wanted."""
    store = Store(schema_url, pool_size=1)
    name = f"sweep-{uuid.uuid4().hex[:8]}"
    parent = store.open_attempt(RunSpec(experiment="tuning", name=name), now=NOW + 1000, lease_seconds=1e6)
    sweep, run = parent.run, trial_run_id(parent.run, "0.0")
    store.open_sweep(SweepSpec(sweep=sweep, seed=7, settings={"z": 1.0, "a": 1e23}, space={"b": [1], "a": [2]}), "me")
    spec = RunSpec(experiment="tuning", name=f"{name}/0", new_run=run, parent=sweep, sweep=sweep)
    count = wire.SWEEP_ROWS_AT_ONCE + 10
    step = SweepStep(
        sweep=sweep, driver="me", after=-1, opens=((0, spec),), spent={"hours": 0.25}, facts={"unit": "epoch"},
        decisions=[
            DecisionRow(seq=seq, kind="suggest", trial=seq, inputs={"n": seq}, outcome={"score": math.nan})
            for seq in range(count)
        ],
        trials=[
            TrialRow(
                number=number, values={"lr": 1e-5, "b": [True, None]}, status="complete" if number % 2 else "waiting",
                score=0.1 * number, ended_at=NOW + 0.5,
            )
            for number in range(count)
        ],
        jobs=[JobRow(number=0, trial=0, run=run, reports=[[1.0, 0.5], [2.0, None]], until=3.0)],
    )  # fmt: skip
    store.sweep_step(step, now=NOW + 1001)
    store.ask_sweep(sweep, "hold", {"trials": [1]}, "ann")
    store.close()
    found = catalog.sweep(name)
    assert (found.sweep, found.name, found.experiment, found.status) == (sweep, name, "tuning", RunStatus.running)
    assert repr((found.settings, found.space)) == repr(({"z": 1.0, "a": 1e23}, {"b": [1], "a": [2]}))
    assert (found.seed, found.driver, found.decisions, found.facts) == (7, "me", count, {"unit": "epoch"})
    assert (found.trials, found.runs) == ({"complete": count // 2, "waiting": count // 2}, 1)
    assert catalog.sweep(sweep[:-1]) == found == recorded.database.sweep(sweep)
    assert catalog.sweeps(limit=1)[0].sweep == catalog.sweep("last").sweep
    trials = catalog.trials(sweep)
    assert [trial.number for trial in trials] == list(range(count))
    assert trials == recorded.database.trials(sweep)
    assert (trials[0].run, trials[1].values, trials[1].score) == ("", {"lr": 1e-5, "b": [True, None]}, 0.1)
    assert [trial.number for trial in catalog.trials(sweep, status="complete", limit=3)] == [1, 3, 5]
    decisions = catalog.decisions(sweep)
    assert decisions == recorded.database.decisions(sweep)
    assert [decision.seq for decision in catalog.decisions(sweep, after=count - 3)] == [count - 2, count - 1]
    assert (decisions[5].inputs, decisions[5].outcome) == ({"n": 5}, {"score": "NaN"})
    (job,) = catalog.sweep_jobs(sweep)
    assert (job.run, job.attempt, job.reports, job.until) == (run, 1, [[1.0, 0.5], [2.0, None]], 3.0)
    (request,) = catalog.sweep_requests(sweep)
    assert (request.kind, request.details, request.who, request.answer) == ("hold", {"trials": [1]}, "ann", "")
    assert {row.run for row in catalog.runs(experiment="tuning", search=name)} == {sweep, run}
    assert [row.run for row in catalog.runs(experiment="tuning", search=name, trials=False)] == [sweep]
    with pytest.raises(NotFound, match="sweep"):
        catalog.sweep(recorded.bare.run)
