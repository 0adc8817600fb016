"""A disk without room: an error that says so, no SIGBUS, and nothing lost once there is room again.

Needs root, to mount a small disk.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.records import Stream, WhenFull
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SEGMENT_POINTS, SpoolReader, spools
from orchestrator.tracking.spool_root import reserve_file
from orchestrator.tracking.wal import WriteAheadLog

pytestmark = pytest.mark.host


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.5 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2560k", "none", str(disk)], check=True, timeout=10)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=10)


def make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, timeout=10)


def test_logging_on_a_full_disk_waits_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    logger = Logger(small_disk / "spools", run="r1", attempt=1, rank=0)
    count = 4 * SEGMENT_POINTS
    done = threading.Event()

    def log() -> None:
        own = Logger(small_disk / "spools", run="r2", attempt=1, rank=0)
        for step in range(count):
            own.log({"loss": float(step)}, step=step)
        done.set()

    threading.Thread(target=log, daemon=True).start()
    deadline = time.monotonic() + 60
    while not is_full(small_disk):
        assert time.monotonic() < deadline
        assert not done.is_set()
        time.sleep(0.01)
    logger.log({"loss": 0.0}, step=0)  # what is reserved is there, full or not: no SIGBUS
    make_room(small_disk)
    assert done.wait(60)
    assert steps_in(small_disk / "spools", "r2") == list(range(count))
    assert steps_in(small_disk / "spools", "r1") == [0]


def is_full(disk: Path) -> bool:
    """No room for another segment of full size."""
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize < 1 << 20 and not make_segment(disk)


def make_segment(disk: Path) -> bool:
    try:
        reserve_file(disk / "probe", 1 << 20)
    except OSError:
        return False
    finally:
        (disk / "probe").unlink(missing_ok=True)
    return True


def test_a_gap_on_a_full_disk_is_counted(small_disk: Path) -> None:
    logger = Logger(small_disk / "spools", run="r1", attempt=1, rank=0, when_full=WhenFull.gap)
    count = 4 * SEGMENT_POINTS
    for step in range(count):
        logger.log({"loss": float(step)}, step=step)
    make_room(small_disk)
    logger.close()
    (directory,) = spools(small_disk / "spools")
    reader = SpoolReader(directory)
    told = reader.next_batch(Stream.facts, 0)
    assert told is not None
    dropped = [fact.data["details"]["count"] for fact in told.facts() if fact.data["kind"] == "dropped_points"]
    kept = steps_in(small_disk / "spools", "r1")
    assert 0 < len(kept) < count
    assert kept == list(range(len(kept)))
    assert dropped == [count - len(kept)]


def steps_in(root: Path, run: str) -> list[int]:
    (reader,) = [reader for reader in map(SpoolReader, spools(root)) if reader.owner.run == run]
    found: list[int] = []
    while (batch := reader.next_batch(Stream.points, len(found))) is not None:
        found += batch.points()["step"].tolist()
    return found


def test_the_trackers_log_keeps_whole_frames_on_a_full_disk(small_disk: Path) -> None:
    log = WriteAheadLog(small_disk / "wal")
    frames = [bytes([number]) * 100_000 for number in range(200)]
    written = 0
    with suppress(OSError):
        for frame in frames:
            log.append(frame)
            log.sync()
            written += 1
    assert 0 < written < len(frames)
    with pytest.raises(OSError, match="No space left"):
        log.append(frames[written])
    make_room(small_disk)
    log.append(b"after")
    log.sync()
    assert [payload for _, payload in log.read(log.start(), 1 << 40)] == [*frames[:written], b"after"]
    assert log.damaged_bytes == 0
