"""`orc ls`, `show`, `metrics`, `logs`, `experiments`, `cancel` and `db` against a real database."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.cli import main
from orchestrator.errors import NotFound
from orchestrator.execution import connection
from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream, facts_payload
from orchestrator.stack import Stack
from orchestrator.store import migrate
from orchestrator.store.store import Store

NOW = time.time()


class Orc(Protocol):
    def __call__(self, *words: str, code: int = 0) -> str:
        """Runs `orc` on the recorded data directory; gives stdout, or stderr where an exit code is expected."""
        ...


@dataclass(frozen=True)
class Recorded:
    """A data directory whose database holds three runs: two of `digits` (one failed, one running), one of `speech`."""

    home: Path
    store: Store
    failed: RunTicket
    running: RunTicket


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, postgres: EmbeddedPostgres) -> Iterator[Recorded]:
    """Shared: the tests read. What they write (a wish to cancel, log files) the others do not look at."""
    home = tmp_path_factory.mktemp("home")
    postgres.ensure_database("recorded")
    database_url = postgres.url("recorded")
    Stack(home=str(home), database_url=database_url, storage_url=str(home / "runs")).save()
    migrate.upgrade(database_url)
    store = Store(database_url, pool_size=2)
    storage = str(home / "runs")
    other = RunSpec(experiment="speech", name="old-heron", storage_url=storage)
    finished = store.open_attempt(other, now=NOW - 9000, lease_seconds=60)
    store.transition(finished.run, 1, RunStatus.finished, now=NOW - 8000)
    spec = RunSpec(
        experiment="digits",
        name="brave-otter",
        tags={"team": "vision"},
        params={"optim.lr": 0.01},
        config={"optim": {"lr": 0.01}, "run": {"experiment": "digits"}},
        storage_url=storage,
        workers=2,
    )
    failed = store.open_attempt(spec, now=NOW - 7200, lease_seconds=60)
    store.commit([*_points(failed), _facts(failed)])
    store.transition(failed.run, 1, RunStatus.failed, reason="rank 1: ValueError: bad shape", now=NOW - 3600)
    fresh = RunSpec(experiment="digits", name="calm-finch", storage_url=storage)
    running = store.open_attempt(fresh, now=NOW - 60, lease_seconds=1e6)
    yield Recorded(home, store, failed, running)
    store.close()
    server_of.drop_database(postgres.url("postgres"), "recorded")


def _points(ticket: RunTicket) -> list[Batch]:
    """20 steps of two keys on two ranks."""
    batches = []
    for rank in (0, 1):
        points = np.zeros(40, dtype=POINT)
        points["key"] = np.tile([0, 1], 20)
        points["step"] = np.repeat(np.arange(20), 2)
        points["time"] = NOW - 7000 + np.arange(40)
        points["value"] = np.where(points["key"] == 0, points["step"] / 20, 1 - points["step"] / 40) + rank
        points["value"][-1] = math.nan
        batches.append(
            Batch(
                producer=f"{rank + 1:032x}",
                run=ticket.run,
                attempt=1,
                rank=rank,
                stream=Stream.points,
                first=1,
                count=40,
                keys=("val/accuracy", "train/loss"),
                payload=points.tobytes(),
            )
        )
    return batches


def _facts(ticket: RunTicket) -> Batch:
    checkpoint = {
        "id": "step-19",
        "uri": f"{ticket.directory}/checkpoints/step-19",
        "step": 19,
        "epoch": 1,
        "size_bytes": 4096,
        "state": "committed",
        "metrics": {"val/accuracy": 0.95},
        "manifest_sha256": "",
        "label": "",
        "is_best": True,
        "duration": 0.2,
    }
    artifact = {"name": "confusion.png", "uri": "/c.png", "size_bytes": 10, "sha256": "", "media_type": "image/png"}
    said: list[tuple[FactKind, dict[str, Any]]] = [
        (FactKind.metric, {"name": "val/accuracy", "direction": "max"}),
        (FactKind.checkpoint, checkpoint),
        (FactKind.artifact, artifact),
        (FactKind.note, {"text": "looks odd"}),
        *((FactKind.event, {"kind": "note", "message": f"event {n}", "level": "info"}) for n in range(12)),
    ]
    facts = [Fact(kind=kind, at=NOW - 5000 + n, data=data) for n, (kind, data) in enumerate(said)]
    return Batch(
        producer=f"{9:032x}",
        run=ticket.run,
        attempt=1,
        rank=0,
        stream=Stream.facts,
        first=1,
        count=len(facts),
        payload=facts_payload(facts),
    )


@pytest.fixture
def orc(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> Orc:
    def call(*words: str, code: int = 0) -> str:
        assert main.main(["--home", str(recorded.home), *words]) == code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return shown.out if code == 0 else shown.err

    return call


def test_ls_lists_the_newest_first_with_status_and_main_metric(orc: Orc) -> None:
    header, *lines = orc("ls").splitlines()
    assert header.split() == ["status", "name", "id", "experiment", "age", "duration", "metric", "last", "best"]
    assert [line.split()[:2] for line in lines] == [
        ["RUNNING", "calm-finch"],
        ["FAILED", "brave-otter"],
        ["FINISHED", "old-heron"],
    ]
    assert lines[1].split()[-3:] == ["val/accuracy", "0.95", "0.95"]
    assert "1h00m" in lines[1]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--experiment", "digits"], ["calm-finch", "brave-otter"]),
        (["--status", "failed"], ["brave-otter"]),
        (["--tag", "team=vision"], ["brave-otter"]),
        (["--limit", "1"], ["calm-finch"]),
        (["--all"], ["calm-finch", "brave-otter", "old-heron"]),
        (["heron"], ["old-heron"]),
        (["--status", "queued"], []),
    ],
)
def test_ls_filters(orc: Orc, options: list[str], names: list[str]) -> None:
    assert [row["name"] for row in json.loads(orc("ls", *options, "--json"))] == names


def test_an_unknown_experiment_or_run_names_the_nearest(orc: Orc) -> None:
    assert "Did you mean digits?" in orc("ls", "--experiment", "digts", code=2)
    assert "brave-otter" in orc("show", "brave-oter", code=2)


def test_show_finds_a_run_by_id_beginning_name_and_last(orc: Orc, recorded: Recorded) -> None:
    for reference in (recorded.failed.run, "brave-otter"):
        assert json.loads(orc("show", reference, "--json"))["run"] == recorded.failed.run
    assert json.loads(orc("show", "last", "--json"))["run"] == recorded.running.run
    assert json.loads(orc("show", "--json"))["run"] == recorded.running.run


def test_show_tells_the_whole_story(orc: Orc, recorded: Recorded) -> None:
    document = json.loads(orc("show", "brave-otter", "--json"))
    assert (document["status"], document["reason"]) == ("FAILED", "rank 1: ValueError: bad shape")
    assert document["params"] == {"optim.lr": 0.01}
    assert document["tags"] == {"team": "vision"}
    accuracy = next(row for row in document["summaries"] if (row["key"], row["rank"]) == ("val/accuracy", 0))
    assert (accuracy["last"], accuracy["minimum"], accuracy["maximum"], accuracy["best"]) == (0.95, 0, 0.95, 0.95)
    assert [attempt["attempt"] for attempt in document["attempts"]] == [1]
    assert [checkpoint["id"] for checkpoint in document["checkpoints"]] == ["step-19"]
    assert [artifact["name"] for artifact in document["artifacts"]] == ["confusion.png"]
    assert [note["text"] for note in document["notes"]] == ["looks odd"]
    assert len(document["events"]) == 10
    assert "event 11" in [event["message"] for event in document["events"]]
    assert document["links"]["directory"] == recorded.failed.directory
    shown = orc("show", "brave-otter")
    for part in (
        "val/accuracy",
        "optim.lr",
        "step-19",
        "confusion.png",
        "looks odd",
        "event 11",
        "next: orc resume",
    ):
        assert part in shown


def test_metrics_without_a_key_gives_a_summary_of_each(orc: Orc) -> None:
    rows = list(csv.DictReader(io.StringIO(orc("metrics", "brave-otter", "--format", "csv"))))
    assert [row["key"] for row in rows].count("val/accuracy") == 2
    assert {row["nan_count"] for row in rows if row["key"] == "train/loss"} == {"1"}
    assert "(1 NaN)" in orc("metrics", "brave-otter")
    assert "has no metrics" in orc("metrics", "calm-finch")
    document = json.loads(orc("metrics", "brave-otter", "--rank", "1", "--json"))
    assert [(row["key"], row["rank"], row["best"]) for row in document["metrics"]] == [
        ("train/loss", 1, None), ("val/accuracy", 1, 1.95),
    ]  # fmt: skip


def test_experiments_are_listed_with_their_runs(orc: Orc) -> None:
    rows = {row["name"]: row for row in json.loads(orc("experiments", "--json"))}
    assert (rows["digits"]["runs"], rows["digits"]["active"], rows["speech"]["runs"]) == (2, 1, 1)
    assert "digits" in orc("experiments")


def test_logs_are_read_from_the_run_directory(orc: Orc, recorded: Recorded) -> None:
    logs = Path(recorded.failed.directory) / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    (logs / "driver.log").write_text("starting\n")
    for rank in (0, 1):
        (logs / f"rank-{rank}.log").write_text(f"hello from {rank}\nbye from {rank}\n")
    assert orc("logs", "brave-otter").splitlines() == [
        "driver | starting",
        "rank-0 | hello from 0",
        "rank-0 | bye from 0",
    ]
    assert orc("logs", "brave-otter", "--rank", "1", "--tail", "1") == "bye from 1\n"
    assert "rank-1 | bye from 1" in orc("logs", "brave-otter", "--rank", "all")
    assert orc("logs", "brave-otter", "--follow", "--rank", "0") == "hello from 0\nbye from 0\n"
    document = json.loads(orc("logs", "brave-otter", "--rank", "1", "--json"))
    assert document["logs"][0]["lines"] == ["hello from 1", "bye from 1"]
    assert "no log of rank 7" in orc("logs", "brave-otter", "--rank", "7", code=2)
    assert "There are: 1." in orc("logs", "brave-otter", "--attempt", "3", code=2)


def test_a_run_without_logs_says_so(orc: Orc) -> None:
    assert "has no logs in" in orc("logs", "calm-finch", code=2)


def test_cancel_asks_the_tracker(orc: Orc, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Tracker:
        def cancel(self, run: str, user: str) -> None:
            asked.append(run)

    monkeypatch.setattr(connection, "connect", lambda stack: Tracker())
    assert json.loads(orc("cancel", "calm-finch", "--json"))["through"] == "tracker"
    assert asked == [recorded.running.run]


def test_cancel_leaves_the_wish_in_the_database_when_ray_is_down(orc: Orc, recorded: Recorded) -> None:
    document = json.loads(orc("cancel", "calm-finch", "--json"))
    assert document["through"] == "database"
    assert recorded.store.cancel_requested([recorded.running.run]) == {recorded.running.run}
    assert "nothing to cancel" in orc("cancel", "brave-otter", code=2)


def test_a_database_is_upgraded_saved_and_restored(
    orc: Orc, recorded: Recorded, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "orc.backup", tmp_path / "other"
    assert json.loads(orc("db", "backup", str(file), "--json"))["size_bytes"] == file.stat().st_size
    assert "exists already" in orc("db", "backup", str(file), code=2)
    other.mkdir()
    Stack(home=str(other), database_url=database_url).save()
    fresh = ["--home", str(other), "--json"]
    assert main.main([*fresh, "db", "status"]) == 1
    assert json.loads(capsys.readouterr().out)["schema"]["found"] == ""
    assert main.main([*fresh, "ls"]) == 2
    assert "orc db upgrade" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main.main([*fresh, "db", "restore", str(file)]) == 0
    assert main.main([*fresh, "db", "upgrade"]) == 0
    capsys.readouterr()
    assert main.main([*fresh, "ls"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {"calm-finch", "brave-otter", "old-heron"}
    assert main.main([*fresh, "db", "restore", str(file)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_config_can_be_based_on_a_run_and_compared_with_one(orc: Orc) -> None:
    shown = json.loads(orc("config", "show", "--from", "brave-otter", "optim.lr=0.5", "--json"))
    assert shown["config"]["optim"]["lr"] == 0.5
    assert shown["config"]["run"]["experiment"] == "digits"
    assert json.loads(orc("config", "diff", "brave-otter", "brave-otter", "--json")) == []
    changes = {row["key"]: row for row in json.loads(orc("config", "diff", "brave-otter", "calm-finch", "--json"))}
    assert changes["optim.lr"] == {"key": "optim.lr", "old": 0.01}
    assert "optim.lr" in orc("config", "diff", "brave-otter", "run.seed=3")
    assert "There is no run 'nobody'" in orc("config", "diff", "nobody", code=2)


def test_a_server_that_is_away_is_named_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "postgresql+psycopg://ada:s3cret-canary@127.0.0.1:9/orc"
    Stack(home=str(tmp_path), database_url=url).save()
    for words in (["ls"], ["show"], ["db", "status"], ["ls", "--debug"]):
        assert main.main(["--home", str(tmp_path), *words]) == 2
        shown = capsys.readouterr()
        assert "127.0.0.1:9" in shown.err
        assert "s3cret-canary" not in shown.err + shown.out


def test_last_of_nothing_is_an_error(database_url: str) -> None:
    migrate.upgrade(database_url)
    store = Store(database_url, pool_size=1)
    try:
        with pytest.raises(NotFound):
            DatabaseCatalog(store).run("last")
    finally:
        store.close()
