"""The tracker's log keeps what was synced, through torn tails, damage and full disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.tracking.wal import LogInUse, Position, WriteAheadLog


def frames(log: WriteAheadLog) -> list[bytes]:
    return [payload for _, payload in log.read(log.start(), 1 << 40)]


def reopened(log: WriteAheadLog) -> WriteAheadLog:
    log.close()
    return WriteAheadLog(log.directory)


def test_what_was_synced_is_there_after_reopening(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path)
    payloads = [bytes([i]) * (i * 7) for i in range(20)]
    for payload in payloads:
        log.append(payload)
    log.sync()
    assert frames(reopened(log)) == payloads


def test_what_was_not_synced_is_not_read(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"a")
    log.sync()
    log.append(b"b")
    assert frames(log) == [b"a"]


def test_segments_rotate_and_are_removed_behind_the_reader(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path, segment_bytes=1000)
    for i in range(50):
        log.append(f"{i:0100d}".encode())
    log.sync()
    assert len(list(tmp_path.glob("*.log"))) > 5
    positions = [position for position, _ in log.read(log.start(), 1 << 40)]
    log.remove_before(positions[30])
    assert [int(f) for f in frames(log)][-19:] == list(range(31, 50))
    assert [int(payload) for _, payload in log.read(positions[30], 1 << 40)] == list(range(31, 50))


def test_reading_goes_on_from_any_position(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path, segment_bytes=200)
    for i in range(20):
        log.append(f"{i:050d}".encode())
    log.sync()
    position, seen = log.start(), []
    while True:
        piece = list(log.read(position, 60))
        if not piece:
            break
        seen += [int(payload) for _, payload in piece]
        position = piece[-1][0]
    assert seen == list(range(20))


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_tail_is_cut_and_writing_goes_on(tmp_path: Path, cut: int) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"whole")
    log.append(b"this one will be torn, somewhere")
    log.sync()
    path = tmp_path / "00000001.log"
    log.close()
    os.truncate(path, path.stat().st_size - cut)
    again = WriteAheadLog(tmp_path)
    assert frames(again) == [b"whole"]
    again.append(b"next")
    again.sync()
    assert frames(again) == [b"whole", b"next"]


def test_every_byte_flipped_loses_at_most_its_own_frame(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path / "intact")
    payloads = [b"first", b"second", b"third"]
    for payload in payloads:
        log.append(payload)
    log.sync()
    intact = (tmp_path / "intact" / "00000001.log").read_bytes()
    for index in range(8, len(intact)):
        directory = tmp_path / str(index)
        directory.mkdir()
        damaged = bytearray(intact)
        damaged[index] ^= 0xFF
        (directory / "00000001.log").write_bytes(damaged)
        other = WriteAheadLog(directory)
        found = frames(other)
        other.close()
        assert len(found) >= len(payloads) - 1, index
        assert all(frame in payloads for frame in found), index


def test_a_full_disk_leaves_no_partial_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"kept")
    log.sync()
    real, fired = os.pwrite, []

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) > 100:
            return real(fd, data[:50], offset)
        if len(data) > 40:
            fired.append(len(data))
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        log.append(b"x" * 100)
    monkeypatch.setattr(os, "pwrite", real)
    assert fired
    log.append(b"after")
    log.sync()
    assert frames(reopened(log)) == [b"kept", b"after"]


def test_discarding_forgets_only_what_was_not_synced(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"kept")
    log.sync()
    log.append(b"gone")
    log.discard_unsynced()
    log.append(b"next")
    log.sync()
    assert frames(log) == [b"kept", b"next"]


def test_two_trackers_cannot_write_one_log(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            WriteAheadLog(tmp_path)
        except LogInUse:
            os._exit(17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    log.close()


def test_the_cursor_comes_back_and_a_damaged_one_means_the_start(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"a")
    log.sync()
    ((position, _),) = log.read(log.start(), 1)
    log.save_cursor(position)
    assert log.load_cursor() == position == Position(1, log.synced.offset)
    (tmp_path / "cursor.json").write_text("{")
    assert log.load_cursor() == log.start()


def test_a_disk_that_is_full_at_the_end_of_a_segment_stops_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = WriteAheadLog(tmp_path, segment_bytes=60)
    log.append(b"x" * 40)
    log.sync()
    fired = []

    def full(*arguments: object) -> int:
        fired.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("open", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                log.append(b"y" * 40)
        log.discard_unsynced()
    assert len(fired) == 2
    log.append(b"z" * 40)
    log.sync()
    assert [path.name for path in sorted(tmp_path.glob("*.log"))] == ["00000001.log", "00000002.log"]
    assert frames(reopened(log)) == [b"x" * 40, b"z" * 40]


def test_a_cursor_behind_the_end_of_the_log_means_the_start(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"a")
    log.sync()
    log.save_cursor(Position(7, 12345))
    assert log.load_cursor() == log.start()


def test_a_tracker_waits_for_the_one_before_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.tracking.wal import WriteAheadLog\n"
        "log = WriteAheadLog(Path(sys.argv[1])); print('up', flush=True); sys.stdin.read(1)\n"
    )
    before = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert before.stdout is not None
    assert before.stdout.readline() == "up\n"
    with pytest.raises(LogInUse):
        WriteAheadLog(tmp_path)
    ending = threading.Timer(0.3, before.kill)
    ending.start()
    WriteAheadLog(tmp_path, wait=30).close()
    before.communicate()
