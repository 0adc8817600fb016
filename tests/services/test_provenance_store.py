"""Provenance in a real database: what ranks and datasets add to it, and `orc diff` on what two runs recorded."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.cli import main
from orchestrator.cli.diff import shortened
from orchestrator.config import ProvenanceConfig
from orchestrator.config.identity import whole_fingerprint
from orchestrator.provenance.datasets import declared
from orchestrator.provenance.fingerprint import data
from orchestrator.provenance.record import record
from orchestrator.records import POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream, facts_payload
from orchestrator.stack import Stack
from orchestrator.store.store import Store

NOW = 1_790_000_000.0
PARTS = {"config": "c" * 64, "code": "k" * 64, "environment": "e" * 64}


@pytest.fixture(scope="module")
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url, pool_size=6)
    yield store
    store.close()


def said(ticket: RunTicket, producer: int, *facts: dict[str, Any], rank: int = 0) -> Batch:
    """Provenance facts of one producer."""
    payload = facts_payload(Fact(kind=FactKind.provenance, at=NOW, data=fact) for fact in facts)
    return Batch(
        producer=f"{producer:032x}", run=ticket.run, attempt=ticket.attempt, rank=rank, stream=Stream.facts, first=1,
        count=len(facts), payload=payload,
    )  # fmt: skip


def opened(store: Store, **spec: Any) -> RunTicket:
    return store.open_attempt(RunSpec(experiment="digits", **spec), now=NOW, lease_seconds=1e6)


def test_what_ranks_say_at_the_same_time_is_all_kept(store: Store) -> None:
    """Each rank is a producer of its own, and its facts may be committed beside those of the others."""
    ticket = opened(store)
    ranks = range(12)
    batches = [
        said(ticket, 100 + rank, {"ranks": {str(rank): {"host": f"h{rank}"}}}, {"ranks": {str(rank): {"pid": rank}}})
        for rank in ranks
    ]
    batches.append(said(ticket, 99, {"git": {"commit": "abc"}, "fingerprint": PARTS}, rank=-1))
    start = threading.Barrier(len(batches))
    problems: list[Exception] = []

    def commit(batch: Batch) -> None:
        try:
            start.wait(10)
            store.commit([batch])
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=commit, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert problems == []
    (attempt,) = store.attempts(ticket.run)
    assert attempt.provenance["ranks"] == {str(rank): {"pid": rank} for rank in ranks}
    assert attempt.provenance["git"] == {"commit": "abc"}
    assert attempt.provenance["fingerprint"] == {**PARTS, "run": whole_fingerprint(PARTS)}


@pytest.mark.parametrize("driver_first", [True, False])
def test_datasets_complete_the_fingerprint_in_any_order(store: Store, driver_first: bool) -> None:
    ticket = opened(store)
    train, test = declared("digits", split="train", fingerprint="xxh128:1"), declared("digits", split="test", uri="/t")
    facts = [
        {"datasets": dict([train]), "fingerprint": {"data": data(dict([train]))}},
        {"datasets": dict([test]), "fingerprint": {"data": data(dict([train, test]))}},
    ]
    driver = said(ticket, 200 + driver_first, {"fingerprint": PARTS, "seed": 3}, rank=-1)
    rank = said(ticket, 210 + driver_first, *facts)
    for batch in (driver, rank) if driver_first else (rank, driver):
        store.commit([batch])
    (attempt,) = store.attempts(ticket.run)
    parts = {**PARTS, "data": data(dict([train, test]))}
    assert attempt.provenance["fingerprint"] == {**parts, "run": whole_fingerprint(parts)}
    assert attempt.provenance["datasets"] == dict([train, test]) == store.run(ticket.run).dataset
    assert attempt.provenance["seed"] == 3


def test_a_superseded_attempt_does_not_change_the_runs_data(store: Store) -> None:
    first = opened(store)
    store.transition(first.run, 1, RunStatus.failed, now=NOW)
    second = opened(store, run=first.run)
    store.commit([said(second, 221, {"datasets": dict([declared("new", uri="/n")])})])
    store.commit([said(first, 220, {"datasets": dict([declared("old", uri="/o")])})])
    assert list(store.run(first.run).dataset) == ["new"]
    assert [list(row.provenance["datasets"]) for row in store.attempts(first.run)] == [["old"], ["new"]]


def test_a_part_that_is_no_object_replaces_and_spoils_nothing(store: Store) -> None:
    ticket = opened(store)
    odd = said(ticket, 230, {"ranks": "none"}, {"ranks": {"0": {"host": "h"}}}, {"fingerprint": [1]})
    store.commit([odd])
    (attempt,) = store.attempts(ticket.run)
    assert attempt.provenance == {"ranks": {"0": {"host": "h"}}, "fingerprint": [1]}
    assert not [event for event in store.events(ticket.run) if event.kind == "bad_fact"]


# -- orc diff


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, schema_url: str, store: Store) -> Path:
    """Two runs, recorded as the driver does it: `first` (two attempts of the same code) and `second` (all differs)."""
    home = tmp_path_factory.mktemp("home")
    Stack(home=str(home), database_url=schema_url, storage_url=str(home / "runs")).save()
    code = home / "code"
    code.mkdir()
    (code / "train.py").write_text("a = 1\nlr = 0.1\n")
    (code / "old.py").write_text("")
    first = opened(store, name="first-run", config={"lr": 0.1}, config_hash="1" * 64, storage_url=str(home / "runs"))
    describe(store, first, code, 300, fingerprint="xxh128:1")
    log(store, first, 310, 0.5)
    store.transition(first.run, 1, RunStatus.failed, now=NOW)
    again = opened(store, run=first.run, config={"lr": 0.1}, config_hash="1" * 64, storage_url=str(home / "runs"))
    describe(store, again, code, 301, fingerprint="xxh128:1")
    log(store, again, 311, 0.75)
    (code / "train.py").write_text("a = 1\nlr = 0.2\n")
    (code / "old.py").unlink()
    (code / "new.py").write_text("")
    second = opened(store, name="second-run", config={"lr": 0.2}, config_hash="2" * 64, storage_url=str(home / "runs"))
    describe(store, second, code, 302, fingerprint="xxh128:2", packages={"torch": "0.1", "made-up": "1"})
    log(store, second, 312, 0.25)
    return home


def describe(
    store: Store,
    ticket: RunTicket,
    code: Path,
    producer: int,
    *,
    fingerprint: str,
    packages: dict[str, str] | None = None,
) -> None:
    given = store.attempts(ticket.run)[-1]
    recorded = record(
        Path(ticket.directory), attempt=ticket.attempt, config=given.config, config_hash=given.config_hash,
        settings=ProvenanceConfig(), code_paths=[str(code)], environ={}, command=["orc", "run"], seed=producer,
    )  # fmt: skip
    values = recorded.values
    if packages is not None:
        values |= {"packages": packages, "fingerprint": {**values["fingerprint"], "environment": "f" * 64}}
    datasets = dict([declared("digits", fingerprint=fingerprint)])
    store.commit([
        said(ticket, producer, values, rank=-1),
        said(ticket, producer + 50, {"datasets": datasets, "fingerprint": {"data": data(datasets)}}),
    ])  # fmt: skip


def log(store: Store, ticket: RunTicket, producer: int, value: float) -> None:
    points = np.zeros(2, dtype=POINT)
    points["step"], points["value"], points["time"] = (1, 2), (0.0, value), NOW
    store.commit([Batch(
        producer=f"{producer:032x}", run=ticket.run, attempt=ticket.attempt, rank=0, stream=Stream.points, first=1,
        count=2, keys=("val/accuracy",), payload=points.tobytes(),
    )])  # fmt: skip


Orc = Callable[..., str]


@pytest.fixture
def orc(home: Path, capsys: pytest.CaptureFixture[str]) -> Orc:
    def call(*words: str, code: int = 0) -> str:
        assert main.main(["--home", str(home), *words]) == code
        shown = capsys.readouterr()
        return shown.err if code == 2 else shown.out

    return call


def test_two_attempts_of_the_same_work_are_the_same(orc: Orc) -> None:
    document = json.loads(orc("diff", "first-run@1", "first-run", "--json"))
    assert document["same"] is True
    assert (document["a"]["attempt"], document["b"]["attempt"]) == (1, 2)
    assert [(row["a"], row["b"]) for row in document["metrics"]] == [(0.5, 0.75)]
    assert [row["key"] for row in document["system"]] == ["seed"]
    assert orc("diff", "first-run@1", "first-run@2").startswith("same: config, code, data, environment\n")


def test_an_attempt_that_logged_nothing_has_no_metrics_of_another(orc: Orc, home: Path, store: Store) -> None:
    begun = opened(store, name="silent-run", storage_url=str(home / "runs"))
    log(store, begun, 320, 0.5)
    store.transition(begun.run, 1, RunStatus.failed, now=NOW)
    opened(store, run=begun.run, storage_url=str(home / "runs"))
    document = json.loads(orc("diff", "silent-run@1", "silent-run@2", "--json", code=1))
    assert [(row["a"], row["b"]) for row in document["metrics"]] == [(0.5, None)]
    newest = json.loads(orc("diff", "silent-run@1", "silent-run", "--json", code=1))
    assert [(row["a"], row["b"]) for row in newest["metrics"]] == [(0.5, 0.5)], "a run's last values are its own"


def test_diff_names_what_differs(orc: Orc) -> None:
    document = json.loads(orc("diff", "first-run", "second-run", "--json", code=1))
    assert set(document["parts"].values()) == {"differs"}
    assert document["config"] == [{"key": "lr", "a": 0.1, "b": 0.2}]
    assert document["files"] == {"added": ["new.py"], "removed": ["old.py"], "changed": ["train.py"]}
    assert [row["key"] for row in document["data"]] == ["digits.fingerprint"]
    assert document["packages"]["added"] == {"made-up": "1"}
    assert document["packages"]["changed"]["torch"][1] == "0.1"
    assert "numpy" in document["packages"]["removed"]
    assert [row["key"] for row in document["code"]] == ["source"]
    shown = orc("diff", "first-run", "second-run", "--code", code=1)
    assert shown.splitlines()[0] == "differs: config, code, data, environment"
    for part in ("first-run@2", "second-run@1", "-lr = 0.1", "+lr = 0.2", "~ train.py", "made-up", "-0.5", "xxh128:2"):
        assert part in shown, part


def test_without_an_archive_diff_says_why_files_are_unknown(orc: Orc, home: Path, store: Store) -> None:
    bare = opened(store, name="bare-run", config={"lr": 0.1}, config_hash="1" * 64, storage_url=str(home / "runs"))
    document = json.loads(orc("diff", "first-run", "bare-run", "--json", code=1))
    assert document["parts"] == {"config": "same", "code": "unknown", "data": "differs", "environment": "unknown"}
    assert document["files"] == {"unknown": "no source archive of bare-run@1"}
    assert bare.run in orc("show", "bare-run")
    for file in Path(store.run(store.runs(search="second-run")[0].run).directory).glob("provenance/*.gz"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert "cannot be read" in orc("diff", "first-run", "second-run", "--code", code=1)
        file.unlink()
        assert "cannot be read" in orc("diff", "first-run", "second-run", code=1)
        file.write_bytes(content)


def test_long_values_are_shown_from_where_they_differ() -> None:
    assert shortened("same " * 30 + "x=1 end", "same " * 30 + "x=2 end", 30) == (
        "…me same same x=1 end",
        "…me same same x=2 end",
    )
    assert shortened("a\nb", "c") == ("a b", "c")


def test_an_attempt_that_is_not_there_is_named(orc: Orc) -> None:
    assert "has no attempt 9. There are: 1, 2." in orc("diff", "first-run@9", "last", code=2)
    assert "There is no run 'nobody'" in orc("diff", "first-run", "nobody", code=2)


def test_show_tells_code_and_fingerprint(orc: Orc) -> None:
    shown = orc("show", "first-run")
    assert "(no git)" in shown
    assert f"config {'1' * 8}, code " in shown
    document = json.loads(orc("show", "first-run", "--json"))
    assert document["dataset"]["digits"]["fingerprint"] == "xxh128:1"
