"""What is in a run's directory: metrics.csv and record.json lose nothing, and say so where they are damaged."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.backends.storage import Storage
from orchestrator.directory import bundle, files, finder, identity, layout, metrics_file, record, removal
from orchestrator.errors import AmbiguousName
from orchestrator.records import RunStatus, RunTicket
from orchestrator.store.errors import BadRecord
from orchestrator.store.views import ChunkRow, FeedPosition

ODD_NANS = [
    struct.unpack("<d", struct.pack("<Q", bits))[0] for bits in (0xFFF8 << 48, 0x7FF8000000000001, 0x7FF4 << 48)
]
VALUES = st.one_of(st.floats(), st.sampled_from([*ODD_NANS, float("nan"), -0.0, 5e-324]))


def block(key: str, points: list[tuple[int, int, float]], attempt: int = 1, rank: int = 0) -> ChunkRow:
    """(step, milliseconds, value)"""
    return ChunkRow(
        key=key, attempt=attempt, rank=rank, position=FeedPosition(),
        steps=np.array([p[0] for p in points], np.int64),
        times=np.array([p[1] for p in points], np.int64) / 1000.0,
        values=np.array([p[2] for p in points], np.float64),
    )  # fmt: skip


POINTS = st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 253_402_300_799_999), VALUES), min_size=1)
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(blocks=st.lists(st.builds(block, KEYS, POINTS, st.integers(1, 3), st.integers(-1, 2)), max_size=4))
def test_points_come_back_bit_for_bit(blocks: list[ChunkRow]) -> None:
    text = b"".join(metrics_file.lines(blocks))
    back = list(metrics_file.read(io.BytesIO(text)))
    assert b"".join(metrics_file.lines(back)) == text

    def flat(rows: list[ChunkRow]) -> list[tuple[Any, ...]]:
        return [
            (row.key, row.attempt, row.rank, step, round(time * 1000), struct.pack("<d", value))
            for row in rows
            for step, time, value in zip(row.steps.tolist(), row.times.tolist(), row.values.tolist(), strict=True)
        ]

    assert flat(back) == flat(blocks)


def test_many_points_are_read_in_pieces() -> None:
    text = b"".join(metrics_file.lines([block("k", [(n, n, 0.5) for n in range(10_000)])]))
    assert [len(piece.values) for piece in metrics_file.read(io.BytesIO(text))] == [4096, 4096, 1808]


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n", "key,attempt,rank,step,time,value\nk,1,0,x,0.0,1.0\n", "key,attempt,rank,step,time,value\nk,1\n",
     f"key,attempt,rank,step,time,value\nk,1,0,{2**63},0.0,1.0\n"],
)  # fmt: skip
def test_damaged_points_are_refused(text: str) -> None:
    with pytest.raises(BadRecord):
        list(metrics_file.read(io.BytesIO(text.encode())))


def empty_record(**run: Any) -> record.Record:
    about = {
        "id": "20260101-000000-00000001", "name": "r", "experiment": "e", "status": "FINISHED", "directory": "/old/e/r",
        "links": {}, "updated_at": "", **run,
    }  # fmt: skip
    return {"protocol": record.PROTOCOL, **{part: [] for part in record.PARTS}, "run": about}


def test_a_record_is_the_same_wherever_the_run_lies() -> None:
    before = empty_record()
    before["checkpoints"] = [{"uri": "/old/e/r/checkpoints/c1"}, {"uri": "s3://elsewhere/c2"}, {"uri": "/old/e/r2/c3"}]
    text = record.encode(record.movable(before))
    after = record.placed(record.decode(text), "/new/e/r")
    uris = ["/new/e/r/checkpoints/c1", "s3://elsewhere/c2", "/old/e/r2/c3"]
    assert [row["uri"] for row in after["checkpoints"]] == uris
    assert record.likeness(after) == record.likeness(before) == record.likeness(record.decode(text))
    assert record.likeness(empty_record(name="other")) != record.likeness(empty_record())


def test_a_record_has_no_password_of_the_storage() -> None:
    before = empty_record(directory="s3://key:s3cret-canary@bucket/e/r")
    before["checkpoints"] = [{"uri": "s3://key@bucket/e/r/c1"}, {"uri": "s3://key:s3cret-canary@bucket/e/r/c2"}]
    moved = record.movable(before)
    assert b"canary" not in record.encode(moved)
    assert moved["run"]["directory"] == "s3://key@bucket/e/r"
    assert [row["uri"] for row in moved["checkpoints"]] == ["./c1", "./c2"]
    assert record.likeness(before) == record.likeness(moved)


NO_RECORDS = [
    b"", b"[]", b'{"protocol": 99}', record.encode(empty_record(id="../../etc")),
    record.encode(empty_record(experiment=7)), record.encode(empty_record(name=None)),
    record.encode(empty_record() | {"summaries": [{"count": "4"}]}), record.encode(empty_record() | {"notes": ["x"]}),
    record.encode(empty_record() | {"artifacts": [{"uri": None}]}),
]  # fmt: skip


@pytest.mark.parametrize("data", NO_RECORDS)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(BadRecord):
        record.decode(data)


def make(root: Path, run: str, name: str, status: RunStatus, attempt: int = 1) -> None:
    ticket = RunTicket(run=run, name=name, experiment="e", attempt=attempt, directory="")
    (root / "e" / run).mkdir(parents=True)
    (root / "e" / run / layout.IDENTITY).write_bytes(identity.Identity.of(ticket, status, 1.0).encode())


FIRST, SECOND = "20260101-000000-aaaaaaaa", "20260102-000000-bbbbbbbb"


def test_runs_are_found_by_their_directories(tmp_path: Path) -> None:
    make(tmp_path, FIRST, "calm-otter-1", RunStatus.finished)
    make(tmp_path, SECOND, "brisk-heron-2", RunStatus.running)
    (tmp_path / "e" / "notes").mkdir()
    storage = Storage(str(tmp_path))
    for reference in (FIRST, FIRST[:8], "calm-otter-1"):
        assert finder.find(storage, reference).run == FIRST
    assert finder.find(storage, "last").run == SECOND
    assert finder.find(storage, FIRST).is_over
    assert not finder.find(storage, SECOND).is_over
    with pytest.raises(AmbiguousName):
        finder.find(storage, "2026")
    with pytest.raises(finder.NoSuchDirectory, match="calm-otter-1"):
        finder.find(storage, "calm-oter-1")


def test_the_verdict_of_a_tracker_ends_a_run_whose_driver_was_killed(tmp_path: Path) -> None:
    make(tmp_path, FIRST, "n", RunStatus.running, attempt=2)
    storage = Storage(str(tmp_path))
    told = {"name": "n", "experiment": "e", "reason": "", "id": FIRST}
    for attempt, is_over in ((1, False), (2, True)):  # of an earlier attempt it says nothing about this one
        files.write_record(storage.join("e", FIRST), empty_record(**told, status="CRASHED", attempt=attempt))
        assert finder.find(storage, FIRST).is_over is is_over


def test_only_what_is_named_like_the_run_is_removed(tmp_path: Path) -> None:
    make(tmp_path, FIRST, "n", RunStatus.finished)
    for directory in (str(tmp_path), "/", f"/{FIRST}", str(tmp_path / "e" / SECOND)):
        with pytest.raises(removal.NoRunDirectory):
            removal.remove(FIRST, directory)
    assert removal.contents(FIRST, str(tmp_path / "e" / FIRST)).files == 1
    removal.remove(FIRST, str(tmp_path / "e" / FIRST))
    removal.remove(FIRST, str(tmp_path / "e" / FIRST))
    assert not (tmp_path / "e" / FIRST).exists()


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\..\\b", "a\0b", "a/"]
)
def test_a_path_that_leads_elsewhere_is_no_file_of_a_bundle(path: str) -> None:
    assert not bundle.stays_inside(path)
    assert bundle.stays_inside("logs/attempt-1/rank-0.log")
    assert bundle.stays_inside("a..b/...c")
