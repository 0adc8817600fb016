"""A disk without room: an error that says so, no SIGBUS, and nothing lost once there is room again.

Needs root, to mount a small disk.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.records import Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SEGMENT_POINTS, SpoolReader, spools
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


def test_logging_on_a_full_disk_raises_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    logger = Logger(small_disk / "spools", run="r1", attempt=1, rank=0)
    step, refused = 0, None
    while refused is None and step < 4 * SEGMENT_POINTS:
        try:
            logger.log({"loss": float(step)}, step=step)
            step += 1
        except OSError as error:
            refused = error
    assert refused is not None
    assert refused.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        logger.log({"loss": float(step)}, step=step)
    make_room(small_disk)
    for _ in range(10):
        logger.log({"loss": float(step)}, step=step)
        step += 1
    assert steps_in(small_disk / "spools") == list(range(step))


def steps_in(root: Path) -> list[int]:
    (directory,) = spools(root)
    reader = SpoolReader(directory)
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
