"""The database's list of checkpoints: what facts make of it, and how it is made anew from storage alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch

from orchestrator.backends import postgres as server_of
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, index
from orchestrator.checkpoints.catalog import Hold
from orchestrator.checkpoints.commit import QUARANTINED
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointInfo, CheckpointState, Manifest
from orchestrator.errors import NotFound
from orchestrator.records import FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.store.store import Store
from orchestrator.store.views import CheckpointRow
from tests.plugins.checkpoint_files import write
from tests.plugins.producers import NOW, Producer, fact

TENSORS = {"model": {"w": torch.arange(12.0).reshape(3, 4)}, "optim": {"s.0.exp_avg": torch.ones(3, 4)}}


@pytest.fixture
def sql(schema_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server_of.conninfo(schema_url), autocommit=True) as connection:
        yield connection


@pytest.fixture
def store(schema_url: str, sql: psycopg.Connection[Any]) -> Iterator[Store]:
    """Without a run of another test: the list is made anew for every run that there is."""
    store = Store(schema_url, pool_size=2)
    yield store
    store.close()
    sql.execute("DELETE FROM runs")


@pytest.fixture
def ticket(store: Store, tmp_path: Path) -> RunTicket:
    return opened(store, tmp_path)


def opened(store: Store, root: Path) -> RunTicket:
    ticket = store.open_attempt(RunSpec(experiment="digits", storage_url=str(root)), now=NOW, lease_seconds=1e6)
    Path(ticket.directory).mkdir(parents=True)
    return ticket


def saved(ticket: RunTicket, step: int, **fields: Any) -> Manifest:
    said = {"created": NOW + step, "reasons": ("every_steps",), "metrics": {"val/loss": 1 / (1 + step)}, "label": "v0"}
    return write(root_of(ticket), TENSORS, step=step, world_size=2, run=ticket.run, **{**said, **fields})


def root_of(ticket: RunTicket) -> Storage:
    return Storage(ticket.directory).join("checkpoints")


def told(ticket: RunTicket, manifest: Manifest, state: CheckpointState = CheckpointState.committed) -> dict[str, Any]:
    return CheckpointInfo.of(manifest, root_of(ticket).uri(manifest.name), state).to_json()


def rebuilt(store: Store, root: Path, **more: Any) -> index.Rebuilt:
    return index.rebuild(store, str(root), user="ann", now=NOW + 9000, **more)


def states(store: Store, run: str) -> dict[str, str]:
    return {row.id.rpartition("/")[2]: row.state for row in store.checkpoints(run)}


def test_a_fact_tells_how_and_why_it_was_saved(store: Store, ticket: RunTicket) -> None:
    manifest = saved(ticket, 10, kind="weights", resumable=False)
    store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, **told(ticket, manifest)))])
    (row,) = store.checkpoints(ticket.run)
    assert (row.kind, row.resumable, row.world_size, list(row.reasons)) == ("weights", False, 2, ["every_steps"])
    assert row.timings["copy"] == 0.1
    with store.snapshot(ticket.run) as snapshot:
        assert snapshot.record["checkpoints"][0]["reasons"] == ["every_steps"]
        assert snapshot.record["checkpoints"][0]["resumable"] is False


def test_what_an_older_trainer_says_fits_too(store: Store, ticket: RunTicket) -> None:
    store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, id="c1", uri="u", step=5))])
    (row,) = store.checkpoints(ticket.run)
    assert (row.kind, row.resumable, row.world_size, list(row.reasons), row.timings) == ("", True, None, [], {})


@pytest.mark.parametrize("end", [CheckpointState.deleted, CheckpointState.quarantined])
def test_a_late_word_brings_nothing_back(store: Store, ticket: RunTicket, end: CheckpointState) -> None:
    manifest = saved(ticket, 10)
    producer, name = Producer(ticket), manifest.name
    for state in (CheckpointState.committed, end, CheckpointState.committed):
        store.commit([producer.facts(fact(FactKind.checkpoint, **told(ticket, manifest, state)))])
    assert states(store, ticket.run) == {name: end}
    again = {**told(ticket, manifest), "manifest_sha256": "another save under the same name"}
    store.commit([producer.facts(fact(FactKind.checkpoint, **again))])
    assert states(store, ticket.run) == {name: "committed"}


def test_a_word_that_comes_after_the_end_of_its_attempt_counts(store: Store, ticket: RunTicket) -> None:
    """The writer of a killed trainer tells of what that had sealed."""
    store.transition(ticket.run, 1, RunStatus.crashed, now=NOW)
    again = store.open_attempt(RunSpec(run=ticket.run, experiment="digits"), now=NOW, lease_seconds=60)
    manifest = saved(ticket, 10)
    store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, **told(ticket, manifest)))])
    assert again.attempt == 2
    assert [(row.attempt, row.state) for row in store.checkpoints(ticket.run)] == [(1, "committed")]


def test_the_list_is_made_anew_from_storage_alone(
    store: Store, ticket: RunTicket, sql: psycopg.Connection[Any], tmp_path: Path
) -> None:
    manifests = [saved(ticket, step, is_best=step == 20) for step in (10, 20, 30)]
    store.commit([Producer(ticket).facts(*(fact(FactKind.checkpoint, **told(ticket, each)) for each in manifests))])
    known = store.checkpoints(ticket.run)
    assert len(known) == 3
    sql.execute("DELETE FROM checkpoints")
    found = rebuilt(store, tmp_path)
    assert (found.runs, found.checkpoints, found.changed, found.gone, found.unknown) == (1, 3, 3, [], [])
    assert [without_times(row) for row in store.checkpoints(ticket.run)] == [without_times(row) for row in known]
    assert rebuilt(store, tmp_path).changed == 0


def without_times(row: CheckpointRow) -> CheckpointRow:
    return replace(row, created=0.0)


def test_what_is_right_already_is_left_alone(store: Store, ticket: RunTicket, tmp_path: Path) -> None:
    manifest = saved(ticket, 10)
    store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, **told(ticket, manifest)))])
    cursor = store.changed_runs().cursor
    assert rebuilt(store, tmp_path).changed == 0
    assert store.facts_after(ticket.run, cursor).checkpoints == ()


def test_what_is_gone_damaged_or_set_aside_is_called_so(store: Store, ticket: RunTicket, tmp_path: Path) -> None:
    manifests = [saved(ticket, step) for step in (10, 20, 30, 40)]
    rebuilt(store, tmp_path)
    gone, damaged, aside, sound = (manifest.name for manifest in manifests)
    checkpoints = Path(ticket.directory) / "checkpoints"
    shutil.rmtree(checkpoints / gone)
    (checkpoints / damaged / MANIFEST).write_text("{}")
    (checkpoints / aside / MANIFEST).rename(checkpoints / aside / QUARANTINED)
    (checkpoints / "notes").mkdir()
    (checkpoints / "step_00000050-a1").mkdir()
    found = rebuilt(store, tmp_path)
    assert states(store, ticket.run) == {
        gone: "deleted", damaged: "quarantined", aside: "quarantined", sound: "committed",
    }  # fmt: skip
    assert found.gone == [f"{ticket.run}/{gone}"]
    assert [(Path(uri).name, "digest" in why) for uri, why in found.damaged] == [(damaged, True)]
    (checkpoints / aside / QUARANTINED).rename(checkpoints / aside / MANIFEST)
    rebuilt(store, tmp_path)
    assert states(store, ticket.run)[aside] == "committed", "storage is the truth"


def test_a_directory_that_is_not_there_at_all_deletes_no_row(store: Store, ticket: RunTicket, tmp_path: Path) -> None:
    manifest = saved(ticket, 10)
    rebuilt(store, tmp_path)
    Path(ticket.directory).rename(tmp_path / "unmounted")
    assert rebuilt(store, tmp_path).missing == [ticket.directory]
    assert states(store, ticket.run) == {manifest.name: "committed"}


def test_runs_are_named_not_invented(store: Store, ticket: RunTicket, tmp_path: Path) -> None:
    saved(ticket, 10)
    stranger = Path(ticket.directory).with_name(ticket.run[:-8] + "00000000")
    shutil.copytree(ticket.directory, stranger)
    found = rebuilt(store, tmp_path)
    assert found.unknown == [str(stranger)]
    assert [row.run for row in store.runs()] == [ticket.run]
    # A directory that is another run's is not taken for this one's.
    other = opened(store, tmp_path)
    shutil.copytree(Path(ticket.directory) / "checkpoints", Path(other.directory) / "checkpoints")
    (uri, why), = rebuilt(store, tmp_path, run=other.run).damaged  # fmt: skip
    assert uri.startswith(other.directory)
    assert ticket.run in why
    assert store.checkpoints(other.run) == []


def test_one_run_is_rebuilt_without_the_others(store: Store, ticket: RunTicket, tmp_path: Path) -> None:
    other = opened(store, tmp_path)
    saved(ticket, 10)
    saved(other, 10)
    seen: list[tuple[str, int, int]] = []
    found = rebuilt(store, tmp_path, run=other.run, progress=lambda *said: seen.append(said))
    assert (found.runs, found.checkpoints, found.unknown) == (1, 1, [])
    assert seen == [(other.run, 0, 1)]
    assert store.checkpoints(ticket.run) == []


def test_what_is_committed_while_one_looks_is_not_called_gone(
    store: Store, ticket: RunTicket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(ticket, 10)
    real = catalog.scan

    def scan(*given: Any, **more: Any) -> catalog.Scan:
        found = real(*given, **more)
        late = saved(ticket, 20)
        store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, **told(ticket, late)))])
        return found

    monkeypatch.setattr(catalog, "scan", scan)
    assert rebuilt(store, tmp_path).gone == []
    assert set(states(store, ticket.run).values()) == {"committed"}
    assert len(states(store, ticket.run)) == 2


def test_a_pin_is_a_file_and_the_list_follows(store: Store, ticket: RunTicket, tmp_path: Path) -> None:
    manifest = saved(ticket, 10)
    rebuilt(store, tmp_path)
    assert store.pin_checkpoint(ticket.run, manifest.id, True, user="ann", now=NOW)
    assert [row.is_pinned for row in store.checkpoints(ticket.run)] == [True]
    assert rebuilt(store, tmp_path).changed == 1, "nothing in storage says so"
    assert [row.is_pinned for row in store.checkpoints(ticket.run)] == [False]
    catalog.hold(root_of(ticket), manifest.name, Hold.pinned)
    rebuilt(store, tmp_path)
    assert [row.is_pinned for row in store.checkpoints(ticket.run)] == [True]
    assert not store.pin_checkpoint(ticket.run, "nothing", True, user="ann", now=NOW)


def test_rows_of_a_run_that_is_not_there_are_refused(store: Store, ticket: RunTicket) -> None:
    row = told(ticket, saved(ticket, 10)) | {"created": NOW}
    with pytest.raises(NotFound):
        store.put_checkpoints("20200101-000000-00000000", [row], user="ann", now=NOW)
    store.transition(ticket.run, 1, RunStatus.finished, now=NOW)
    store.remove_run(ticket.run, user="ann", now=NOW)
    with pytest.raises(NotFound):
        store.put_checkpoints(ticket.run, [row], user="ann", now=NOW)
