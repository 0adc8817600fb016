"""`orc fsck`: what is wrong in the database and in the files is named, and mended where that can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from orchestrator.cli.main import main
from orchestrator.errors import NotFound
from orchestrator.records import POINT, Batch, RunSpec, RunStatus, Stream
from orchestrator.stack import Stack
from orchestrator.store.integrity import Trouble
from orchestrator.store.store import Store
from orchestrator.tracking import fsck
from orchestrator.tracking.fsck import Place
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import spools
from tests.plugins.producers import NOW, Producer, series


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


@pytest.fixture
def sql(schema_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(schema_url.replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


def opened(store: Store) -> Producer:
    return Producer(store.open_attempt(RunSpec(experiment="fsck"), now=NOW, lease_seconds=60))


def filled(store: Store, batches: int = 3) -> Producer:
    producer = opened(store)
    for number in range(batches):
        store.commit([producer.points(series(40, 40 * number))])
    return producer


def problems(store: Store, producer: Producer) -> list[Trouble]:
    return [problem.trouble for problem in store.check_integrity(producer.ticket.run).problems]


def mend(store: Store, producer: Producer) -> list[bool]:
    return [p.is_repaired for p in store.repair_integrity([producer.ticket.run], user="me", now=NOW)]


def number_of(sql: psycopg.Connection, producer: Producer) -> int:
    return sql.execute("SELECT number FROM runs WHERE id = %s", (producer.ticket.run,)).fetchone()[0]  # type: ignore[index]


def test_a_sound_run_has_counts_and_no_problem(store: Store) -> None:
    producer = filled(store)
    verdict = store.check_integrity(producer.ticket.run)
    assert verdict.problems == ()
    assert (verdict.counts.runs, verdict.counts.producers, verdict.counts.points) == (1, 1, 120)
    with pytest.raises(NotFound):
        store.check_integrity("nothing")


def test_values_that_are_no_numbers_and_several_attempts_are_sound(store: Store) -> None:
    ticket = store.open_attempt(RunSpec(experiment="fsck"), now=NOW, lease_seconds=60)
    first, second = Producer(ticket), Producer(ticket)
    odd = [float("nan"), float("inf"), -0.0, 1e308, 1e308, float("-inf"), 5e-324]
    store.commit([first.points([(n % 2, n, value) for n, value in enumerate(odd)])])
    store.commit([second.points([(0, 3, float("nan"))]), first.points([(1, 1 << 40, 2.0), (1, 0, 1.0)])])
    again = store.open_attempt(RunSpec(experiment="fsck", run=ticket.run, after_attempt=1), now=NOW, lease_seconds=60)
    store.commit([Producer(again).points([(0, 1, 0.5)])])
    assert store.check_integrity(ticket.run).problems == ()


def test_lost_points_are_counted_and_no_problem(store: Store) -> None:
    producer = opened(store)
    batch = producer.points(series(10))
    points = batch.points().copy()
    points["flags"][3:5] = 1
    lost = Batch(
        producer=batch.producer, run=batch.run, attempt=1, rank=0, stream=Stream.points, first=1, count=10,
        keys=batch.keys, payload=points.astype(POINT).tobytes(),
    )  # fmt: skip
    store.commit([lost])
    verdict = store.check_integrity(producer.ticket.run)
    assert verdict.problems == ()
    assert (verdict.counts.points, verdict.counts.lost) == (8, 2)


def test_a_missing_row_is_named_and_then_counted_as_lost(store: Store, sql: psycopg.Connection) -> None:
    producer = filled(store)
    sql.execute("DELETE FROM metric_chunks WHERE run_number = %s AND first_seq = 41", (number_of(sql, producer),))
    found = store.check_integrity(producer.ticket.run).problems
    assert {problem.trouble for problem in found} == {Trouble.missing_points, Trouble.summary}
    (gone,) = [problem for problem in found if problem.trouble is Trouble.missing_points]
    assert "40 of 120" in gone.what
    assert producer.id in gone.where
    assert mend(store, producer) == [True, True]
    verdict = store.check_integrity(producer.ticket.run)
    assert (verdict.problems, verdict.counts.lost, verdict.counts.points) == ((), 40, 80)
    events = [event for event in store.events(producer.ticket.run) if event.kind == "repaired"]
    assert any("40 of 120" in event.message and event.level == "error" for event in events)
    assert {row.key: row.count for row in store.summaries(producer.ticket.run)} == {
        "train/loss": 40,
        "val/accuracy": 40,
    }


def test_doubled_rows_are_named_and_never_deleted(store: Store, sql: psycopg.Connection) -> None:
    producer = filled(store)
    number = number_of(sql, producer)
    columns = [
        row[0]
        for row in sql.execute(
            "SELECT column_name FROM information_schema.columns"
            " WHERE table_name = 'metric_chunks' AND column_name <> 'id'"
        )
    ]
    names = ", ".join(f'"{name}"' for name in columns)
    sql.execute(
        f"INSERT INTO metric_chunks ({names}) SELECT {names} FROM metric_chunks"
        " WHERE run_number = %s AND first_seq = 41", (number,),
    )  # fmt: skip
    found = store.check_integrity(producer.ticket.run).problems
    doubled = [problem for problem in found if problem.trouble is Trouble.doubled_points]
    assert [problem.repair for problem in doubled] == ["", ""]
    assert any("41 to 80" in problem.what for problem in doubled)
    mend(store, producer)
    assert sql.execute("SELECT count(*) FROM metric_chunks WHERE run_number = %s", (number,)).fetchone() == (4,)
    assert Trouble.doubled_points in problems(store, producer)


def test_a_watermark_that_is_too_low_is_raised(store: Store, sql: psycopg.Connection) -> None:
    producer = filled(store)
    sql.execute("UPDATE producers SET points = 80 WHERE uuid = %s::uuid", (producer.id,))
    assert problems(store, producer) == [Trouble.watermark]
    assert mend(store, producer) == [True]
    assert problems(store, producer) == []
    assert store.watermarks([producer.id])[producer.id, Stream.points] == 120


def test_changed_values_differ_from_their_checksum(store: Store, sql: psycopg.Connection) -> None:
    producer = filled(store)
    number = number_of(sql, producer)
    changed = "UPDATE metric_chunks SET values[3] = 99 WHERE run_number = %s AND first_seq = 41"
    sql.execute(changed, (number,))
    found = store.check_integrity(producer.ticket.run).problems
    assert [problem.trouble for problem in found] == [Trouble.checksum], "its summary would only say the same again"
    assert "points 41 to 80" in found[0].where
    assert mend(store, producer) == [True]
    assert problems(store, producer) == [Trouble.summary]
    mend(store, producer)
    assert problems(store, producer) == []
    assert [e.level for e in store.events(producer.ticket.run) if e.kind == "repaired"] == ["error", "warning"]
    sql.execute("UPDATE metric_chunks SET counts = counts || 7 WHERE run_number = %s AND first_seq = 1", (number,))
    (unreadable,) = store.check_integrity(producer.ticket.run).problems
    assert "cannot be read" in unreadable.what
    assert unreadable.repair == ""


@pytest.mark.parametrize("column", ["count", "sum", "max_value", "last_value", "first_step", "nan_count"])
def test_a_wrong_summary_is_computed_again(column: str, store: Store, sql: psycopg.Connection) -> None:
    producer = filled(store)
    before = store.summaries(producer.ticket.run)
    sql.execute(
        f"UPDATE metric_summaries SET {column} = {column} + 1 WHERE run_number = %s", (number_of(sql, producer),)
    )
    assert problems(store, producer) == [Trouble.summary]
    assert mend(store, producer) == [True]
    assert problems(store, producer) == []
    assert [(r.key, r.count, r.maximum, r.max_step, r.last) for r in store.summaries(producer.ticket.run)] == [
        (r.key, r.count, r.maximum, r.max_step, r.last) for r in before
    ]


def merged(store: Store, sql: psycopg.Connection) -> Producer:
    """30 rows of 16,384 points, merged for good, with windows of two levels above the points."""
    producer = opened(store)
    for number in range(30):
        store.commit([producer.points([(0, n, n / 7) for n in range(16_384 * number, 16_384 * (number + 1))])])
    store.transition(producer.ticket.run, 1, RunStatus.finished, now=NOW)
    while store.merge([number_of(sql, producer)]).rows:
        pass
    return producer


CHANGES = {
    "a value": "UPDATE metric_levels SET max[2] = 1e9 WHERE run_number = %s AND level = 1",
    "a count": "UPDATE metric_levels SET n = n - 1 WHERE run_number = %s AND level = 2",
    "a row": "DELETE FROM metric_levels WHERE run_number = %s AND level = 1 AND id ="
    " (SELECT min(id) FROM metric_levels WHERE level = 1)",
}


def test_windows_that_differ_are_computed_again(store: Store, sql: psycopg.Connection) -> None:
    producer = merged(store, sql)
    number = number_of(sql, producer)
    everything = "SELECT * FROM metric_levels WHERE run_number = %s ORDER BY level, id"
    before = sql.execute(everything, (number,)).fetchall()
    assert {row[9] for row in before} >= {1, 2}
    assert problems(store, producer) == []
    for what, change in CHANGES.items():
        assert sql.execute(change, (number,)).rowcount > 0
        assert problems(store, producer) == [Trouble.windows], what
        assert mend(store, producer) == [True]
        assert problems(store, producer) == [], what
        assert sql.execute(everything, (number,)).fetchall() == before


def test_a_removed_run_and_its_late_points_are_no_problem(store: Store) -> None:
    producer = filled(store)
    run = producer.ticket.run
    store.remove_run(run, user="me", now=NOW, force=True)
    store.commit([producer.points(series(5))])
    everything = store.check_integrity()
    assert not [p for p in everything.problems if p.run == run or p.trouble is Trouble.stray_points]
    with pytest.raises(NotFound):
        store.check_integrity(run)


def test_points_of_no_run_are_told(store: Store, sql: psycopg.Connection) -> None:
    producer = filled(store, 1)
    number = number_of(sql, producer)
    sql.execute("UPDATE metric_chunks SET run_number = 999999 WHERE run_number = %s", (number,))
    (stray,) = [p for p in store.check_integrity().problems if p.trouble is Trouble.stray_points]
    assert "40 points" in stray.what
    sql.execute("UPDATE metric_chunks SET run_number = %s WHERE run_number = 999999", (number,))


def test_an_imported_run_is_sound(store: Store) -> None:
    producer = filled(store)
    run = producer.ticket.run
    other = Producer(producer.ticket)  # of the same rank: a thread
    store.commit([other.points(series(7))])
    with store.snapshot(run) as snapshot:
        record, points = snapshot.record, list(snapshot.chunks())
    store.remove_run(run, user="me", now=NOW, force=True)
    store.finish_removal(run)
    store.restore_run(record, points)
    verdict = store.check_integrity(run)
    assert (verdict.problems, verdict.counts.points) == ((), 127)


# -- files of the host -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(spools=tmp_path / "spools", log=tmp_path / "log")


def left_behind(store: Store, place: Place, url: str) -> str:
    """A dead producer with 200 points, of which 100 are in a dead tracker's log and none is committed."""
    ticket = store.open_attempt(RunSpec(experiment="fsck"), now=NOW, lease_seconds=60)
    logger = Logger(place.spools, run=ticket.run, attempt=1, rank=0)
    for step in range(100):
        logger.log({"loss": float(step)}, step=step)
    tracker = TrackerService(place.log, url)
    agent = Shipper(place.spools, tracker)
    agent.step()
    for step in range(100, 200):
        logger.log({"loss": float(step)}, step=step)
    logger.close()
    agent.stop()
    agent.run()
    tracker.stop()
    return ticket.run


def test_what_dead_processes_left_is_told_and_delivered(store: Store, place: Place, schema_url: str) -> None:
    run = left_behind(store, place, schema_url)
    report = fsck.check(store, [place], run=run)
    told = {problem.trouble: problem.what for problem in report.problems}
    assert "200 entries of rank 0" in told[Trouble.spool]
    assert "100 accepted entries" in told[Trouble.log]
    mended = fsck.repair(store, [place], database_url=schema_url, user="me", run=run)
    assert mended.is_sound
    assert {problem.trouble for problem in mended.problems if problem.is_repaired} == {Trouble.spool, Trouble.log}
    assert store.points(run, "loss").steps.tolist() == list(range(200))
    assert fsck.check(store, [place], run=run).problems == ()


def test_damaged_frames_of_a_log_are_told_and_sent_again(store: Store, place: Place, schema_url: str) -> None:
    run = left_behind(store, place, schema_url)
    (segment,) = place.log.glob("*.log")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 0xFF
    content += content[8:]  # an intact frame may follow, so this is no torn end
    segment.write_bytes(content)
    assert Trouble.log in {problem.trouble for problem in fsck.check(store, [place]).problems}
    fsck.repair(store, [place], database_url=schema_url, user="me")
    assert store.points(run, "loss").steps.tolist() == list(range(200))


def test_an_unreadable_spool_is_put_aside_and_nothing_in_it_is_lost(
    store: Store, place: Place, schema_url: str
) -> None:
    left_behind(store, place, schema_url)
    (spool,) = spools(place.spools)
    for name in ("control", "keys"):
        (spool / name).write_bytes(b"\0" * 64)
    points = sorted(path.read_bytes() for path in spool.glob("points-*"))
    (found,) = [p for p in fsck.check(store, [place]).problems if p.trouble is Trouble.spool]
    assert "cannot be read" in found.what
    fsck.repair(store, [place], database_url=schema_url, user="me")
    assert list(spools(place.spools)) == []
    (aside,) = place.spools.glob(".*.unreadable")
    assert sorted(path.read_bytes() for path in aside.glob("points-*")) == points
    shutil.rmtree(place.spools)


def test_a_spool_of_an_unknown_run_is_told_and_kept(store: Store, place: Place, schema_url: str) -> None:
    logger = Logger(place.spools, run="20200101-000000-abcdef01", attempt=1, rank=0)
    logger.log({"loss": 1.0}, step=1)
    logger.close()
    (found,) = [p for p in fsck.check(store, [place]).problems if p.trouble is Trouble.spool]
    assert "does not know" in found.what
    assert found.repair == ""
    assert len(list(spools(place.spools))) == 1


def test_the_command_tells_people_and_programs(
    store: Store, schema_url: str, sql: psycopg.Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    producer = filled(store)
    home = tmp_path / "home"
    home.mkdir()
    Stack(home=str(home), database_url=schema_url).save()
    run = producer.ticket.run
    assert main(["--home", str(home), "fsck", run]) == 0
    assert "everything is there and fits together: 120 points" in capsys.readouterr().out
    sql.execute("UPDATE producers SET points = 80 WHERE uuid = %s::uuid", (producer.id,))
    assert main(["--home", str(home), "fsck", run, "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["problems"]
    assert (told["trouble"], told["run"], told["repair"]) == ("watermark", run, "the watermark becomes 120")
    assert main(["--home", str(home), "fsck", run]) == 1
    assert "orc fsck --repair" in capsys.readouterr().out
    assert main(["--home", str(home), "fsck", run, "--repair"]) == 0
    assert "mended" in capsys.readouterr().out
