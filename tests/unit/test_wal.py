"""The tracker's log keeps what was synced, through torn tails, damage and full disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.tracking.wal import LogInUse, Position, SyncFailed, WriteAheadLog


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
    for index in range(len(intact)):
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
    fired = []

    def half(fd: int, pieces: Sequence[bytes], offset: int) -> int:
        return os.pwrite(fd, b"".join(pieces)[:50], offset)

    def full(fd: int, data: bytes, offset: int) -> int:
        fired.append(os.fstat(fd).st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "00000001.log"
    before = path.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", half)
        patch.setattr(disk, "pwrite", lambda fd, data, offset, path: full(fd, data, offset))
        with pytest.raises(OSError, match="No space"):
            log.append(b"x" * 100)
    assert fired == [before + 50]
    assert path.stat().st_size == before
    log.append(b"after")
    log.sync()
    assert frames(reopened(log)) == [b"kept", b"after"]


@pytest.fixture
def fsyncs() -> Iterator[list[Callable[[], None]]]:
    """What happens at each fsync of a segment from now on: the first entry of the list, which then goes."""
    plans: list[Callable[[], None]] = []

    def seen(call: str, path: str) -> None:
        if call == "fsync" and path.endswith(".log") and plans:
            plans.pop(0)()

    disk.watch(seen)
    yield plans
    disk.watch(None)


def broken() -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_calls_at_the_same_time_share_an_fsync(tmp_path: Path, fsyncs: list[Callable[[], None]]) -> None:
    log = WriteAheadLog(tmp_path)
    began, go_on, counted = threading.Event(), threading.Event(), []

    def slow() -> None:
        counted.append(len(done))
        began.set()
        assert go_on.wait(10)

    done: list[int] = []

    def sync() -> None:
        log.sync()
        done.append(len(frames(log)))

    fsyncs += [slow, *[lambda: counted.append(len(done))] * 20]
    log.append(b"first")
    threads = [threading.Thread(target=sync)]
    threads[0].start()
    assert began.wait(10)
    for number in range(10):  # too late for the fsync that is going on
        log.append(b"%d" % number)
        threads.append(threading.Thread(target=sync))
        threads[-1].start()
    assert frames(log) == []
    assert done == []
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(counted) == 2, "one for the first, one for all others"
    assert sorted(done) == [done[0], *[11] * 10] or sorted(done) == [11] * 11
    log.close()


def test_after_a_failed_fsync_nothing_is_ever_called_durable(tmp_path: Path, fsyncs: list[Callable[[], None]]) -> None:
    log = WriteAheadLog(tmp_path)
    log.append(b"a")
    fsyncs.append(broken)
    for _ in range(2):
        with pytest.raises(SyncFailed):
            log.sync()
    assert fsyncs == []
    assert frames(log) == []


def test_a_full_segment_that_cannot_be_synced_is_a_failed_fsync(
    tmp_path: Path, fsyncs: list[Callable[[], None]]
) -> None:
    log = WriteAheadLog(tmp_path, segment_bytes=60)
    log.append(b"x" * 40)
    fsyncs.append(broken)
    with pytest.raises(SyncFailed):
        log.append(b"y" * 40)
    assert fsyncs == []


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
    for garbage in (
        "", "{", "[]", "7", '{"segment": 1}', '{"segment": 1, "offset": -5}', '{"segment": -1, "offset": 9}',
        '{"segment": 1, "offset": Infinity}', '{"segment": "x", "offset": 9}', "[" * 100_000, "\0" * 40, "\udcff",
    ):  # fmt: skip
        (tmp_path / "cursor.json").write_text(garbage, errors="surrogateescape")
        assert log.load_cursor() == log.start(), garbage


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
        assert frames(log) == [b"x" * 40]
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
