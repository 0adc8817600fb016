"""Spools under real processes, signals, forks and threads, damaged everywhere: what takes longer than an instant."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.records import Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SEGMENT_POINTS, SpoolReader
from orchestrator.tracking.spool_root import Node
from tests.plugins.spool_contents import FACTS, POINTS, facts_of, left_spool, logged, points_of, readers, wanted


@pytest.fixture
def logger(tmp_path: Path) -> Logger:
    return Logger(tmp_path / "spools", run="r1", attempt=2, rank=3)


def test_a_signal_handler_may_log_in_the_middle_of_a_log(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from orchestrator.tracking.logger import Logger\n"
        "import itertools\n"
        "logger, count = Logger(Path(sys.argv[1]), run='r', attempt=1, rank=0), itertools.count(1)\n"
        "def handler(*_): logger.log({'handler': 1.0}, step=next(count))\n"
        "signal.signal(signal.SIGALRM, handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)\n"
        "for i in range(100_000): logger.log({'main': 1.0}, step=i)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0); print(next(count) - 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "spools")], timeout=60, check=True, capture_output=True, text=True
    )
    found = logged(readers(tmp_path)[0])
    assert int(done.stdout) > 20
    assert sorted(step for key, step, _ in found if key == "handler") == list(range(1, int(done.stdout) + 1))
    assert [step for key, step, _ in found if key == "main"] == list(range(100_000))


def test_what_was_logged_survives_sigkill_and_the_lock_falls(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.tracking.logger import Logger\n"
        "logger = Logger(Path(sys.argv[1]), run='r', attempt=1, rank=0)\n"
        "for i in range(1000): logger.log({'x': float(i)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "spools")], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (reader,) = readers(tmp_path)
    assert [value for _, _, value in logged(reader)] == [float(i) for i in range(1000)]
    assert not reader.is_owned()


def test_a_living_producer_owns_its_spool(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.tracking.logger import Logger\n"
        "logger = Logger(Path(sys.argv[1]), run='r', attempt=1, rank=0); print('up', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "spools")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (reader,) = readers(tmp_path)
    assert reader.is_owned()
    process.communicate()
    assert not reader.is_owned()


def test_a_full_spool_blocks_until_something_is_committed(tmp_path: Path) -> None:
    done = threading.Event()

    def fill() -> None:
        own = Logger(tmp_path / "spools", run="full", attempt=1, rank=0, max_bytes=1)
        for i in range(SEGMENT_POINTS * 3):
            own.log({"x": 1.0}, step=i)
        done.set()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    reader, stands = None, 0
    while not done.is_set():
        assert time.monotonic() < deadline
        reader = reader or next(iter(readers(tmp_path)), None)
        count = reader.logged(Stream.points) if reader else 0
        if reader is not None and 0 < count == stands < SEGMENT_POINTS * 3:
            assert reader.held_bytes < 128 * SEGMENT_POINTS, "bounded"
            reader.acknowledge(Stream.points, count, count)
        stands = count
        done.wait(0.05)
    assert [step for _, step, _ in logged_after(reader)] == list(range(SEGMENT_POINTS * 3))[
        -len(logged_after(reader)) :
    ]


def logged_after(reader: SpoolReader) -> list[tuple[str, int, float]]:
    """What is there and not committed."""
    found: list[tuple[str, int, float]] = []
    start = reader.committed(Stream.points)
    while (batch := reader.next_batch(Stream.points, start + len(found))) is not None:
        found += [(batch.keys[p["key"]], int(p["step"]), float(p["value"])) for p in batch.points()]
    return found


def test_ten_thousand_keys_and_many_segments(tmp_path: Path, logger: Logger) -> None:
    names = [f"layer/{i}/gradient_norm" for i in range(10_000)]
    for step in range(7):
        logger.log(dict.fromkeys(names, float(step)), step=step)
    found = logged(readers(tmp_path)[0])
    assert len(found) == 70_000 > 2 * SEGMENT_POINTS
    assert found[-1] == (names[-1], 6, 6.0)


# -- (a) the lock: a second descriptor in the same process is granted it, and closing that one frees it


def test_trap_a_a_process_that_reads_its_own_spool_keeps_its_lock(tmp_path: Path, logger: Logger) -> None:
    logger.log({"x": 1.0})
    (reader,) = readers(tmp_path)
    assert reader.is_owned()
    assert not reader.is_done()
    reader.acknowledge(Stream.points, 1, 1)
    reader.close()
    code = (
        "import sys; from pathlib import Path; from orchestrator.tracking.spool import SpoolReader\n"
        "print(SpoolReader(Path(sys.argv[1])).is_owned())\n"
    )
    asked = [sys.executable, "-c", code, str(reader.directory)]
    assert subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout == "True\n"
    logger.close()
    assert subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout == "False\n"


# -- (b) threads would tear a shared position; (c) forked workers share the mapping


def test_trap_b_every_thread_has_a_spool_of_its_own(tmp_path: Path, logger: Logger) -> None:
    def work(start: int) -> None:
        for i in range(2000):
            logger.log({"x": 1.0}, step=start + i)

    threads = [threading.Thread(target=work, args=(10_000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = sorted(step for reader in readers(tmp_path) for _, step, _ in logged(reader))
    assert steps == sorted(10_000 * n + i for n in range(4) for i in range(2000))


def _log_in_child(logger: Logger) -> None:
    for i in range(100):
        logger.log({"child": 1.0}, step=i)
    os._exit(0)


def test_trap_c_a_forked_child_does_not_write_into_its_parents_spool(tmp_path: Path, logger: Logger) -> None:
    logger.log({"parent": 1.0}, step=0)
    child = multiprocessing.get_context("fork").Process(target=_log_in_child, args=(logger,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    logger.log({"parent": 2.0}, step=1)
    by_keys = sorted(tuple(sorted({key for key, _, _ in logged(reader)})) for reader in readers(tmp_path))
    assert by_keys == [("child",), ("parent",)]
    assert sorted(len(logged(reader)) for reader in readers(tmp_path)) == [2, 100]


def flipped(path: Path, offset: int, bits: int) -> Iterator[None]:
    with path.open("r+b") as file:
        file.seek(offset)
        (before,) = file.read(1)
        file.seek(offset)
        file.write(bytes([before ^ bits]))
        file.flush()
        yield
        file.seek(offset)
        file.write(bytes([before]))


def used_bytes(path: Path) -> list[int]:
    """Offsets of a file up to its last byte that is not zero."""
    return list(range(len(path.read_bytes().rstrip(b"\0"))))


def check_every(directory: Path, each: int, bits: int) -> int:
    """Flips every `each`-th byte of every file, one at a time. How often something was lost."""
    lost = 0
    for path in sorted(directory.iterdir()):
        for offset in used_bytes(path)[::each]:
            for _ in flipped(path, offset, bits):
                where = f"{path.name} byte {offset}"
                points, facts = points_of(directory), facts_of(directory)
                assert len(points) >= POINTS, where
                assert all(point is None or point == want for point, want in zip(points, wanted(), strict=False)), where
                assert all(point is None for point in points[POINTS:]), where
                assert len(facts) == FACTS, where
                assert all(fact in (None, f"t{number}") for number, fact in enumerate(facts)), where
                lost += (None in points) + (None in facts)
    return lost


def test_a_byte_flipped_anywhere_is_never_a_wrong_value(tmp_path: Path) -> None:
    assert check_every(left_spool(tmp_path), each=41, bits=0x10) > 100


def test_threads_that_come_and_go_leave_nothing_open(tmp_path: Path, logger: Logger) -> None:
    def work(step: int) -> None:
        logger.log({"x": 1.0}, step=step)

    for step in range(50):
        thread = threading.Thread(target=work, args=(step,))
        thread.start()
        thread.join()
    found = sorted(len(logged(reader)) for reader in readers(tmp_path))
    assert found == [0, 50], "one spool, one thread after the other"


def test_bells_may_ring_while_the_agent_listens(tmp_path: Path) -> None:
    node = Node(tmp_path)
    child = os.fork()
    if child == 0:
        bells = Node(tmp_path)._bells
        while True:
            bells[::97] ^= 1
    try:
        assert any(node.rung() for _ in range(5000))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
