"""The ways in which memory shared between processes goes wrong: each letter is a trap of the spool's design."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator import disk
from orchestrator.errors import BadMetric
from orchestrator.records import Stream, WhenFull
from orchestrator.tracking.deferred import MOST_WAITING, DeferredPoints
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SEGMENT_POINTS, SpoolReader, SpoolUnusable, file_system_of, prepare_root
from tests.plugins.spool_contents import logged, readers


@pytest.fixture
def logger(tmp_path: Path) -> Logger:
    return Logger(tmp_path / "spools", run="r1", attempt=2, rank=3)


def events(reader: SpoolReader, kind: str) -> list[dict[str, Any]]:
    batch = reader.next_batch(Stream.facts, 0)
    assert batch is not None
    return [fact.data["details"] for fact in batch.facts() if fact.data["kind"] == kind]


# Traps (a), the lock, (b), threads, and (c), forks, need processes: tests/services/test_spool_processes.py.


def test_trap_f_network_file_systems_are_refused(tmp_path: Path) -> None:
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path.resolve()} nfs4 rw 0 0\n"
    assert file_system_of(tmp_path / "spools", mounts) == "nfs4"
    with pytest.raises(SpoolUnusable, match="nfs4"):
        prepare_root(tmp_path / "spools", mounts)


# -- (d) a full disk under a mapping is a SIGBUS: blocks are reserved before they are used


class Disk:
    """A disk that has no room while it `is_full`."""

    def __init__(self) -> None:
        self.is_full = False
        self.refused = 0

    def __call__(self, call: str, path: str) -> None:
        if self.is_full and call in ("fallocate", "write"):
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full() -> Iterator[Disk]:
    found = Disk()
    disk.watch(found)
    yield found
    disk.watch(None)


def test_trap_d_logging_waits_for_room_on_the_disk(tmp_path: Path, logger: Logger, full: Disk) -> None:
    logger.log({"x": 0.0}, step=0)
    full.is_full = True
    done = threading.Event()

    def make_room() -> None:
        while full.refused < 3:
            done.wait(0.005)
        full.is_full = False

    threading.Thread(target=make_room, daemon=True).start()
    for step in range(1, 1000):
        logger.log({"x": 0.0}, step=step)
    assert full.refused >= 3
    assert [step for _, step, _ in logged(readers(tmp_path)[0])] == list(range(1000))


def test_trap_d_a_gap_is_counted_and_recorded(tmp_path: Path, full: Disk) -> None:
    logger = Logger(tmp_path / "spools", run="r", attempt=1, rank=0, when_full=WhenFull.gap)
    logger.log({"x": 0.0}, step=0)
    full.is_full = True
    for step in range(1, 1000):
        logger.log({"x": 0.0}, step=step)
    full.is_full = False
    logger._spool._retry_at = 0.0
    logger.log({"x": 0.0}, step=1000)
    (reader,) = readers(tmp_path)
    kept = [step for _, step, _ in logged(reader)]
    (said,) = events(reader, "dropped_points")
    assert kept == [*range(kept[-2] + 1), 1000], "no number is used up by what was dropped"
    assert said["count"] == 1001 - len(kept) > 0
    assert (said["first_step"], said["last_step"]) == (kept[-2] + 1, 999)


def test_trap_d_what_is_dropped_until_the_end_is_said_by_close(tmp_path: Path) -> None:
    logger = Logger(tmp_path / "spools", run="r", attempt=1, rank=0, max_bytes=1, when_full=WhenFull.gap)
    for step in range(SEGMENT_POINTS * 2):
        logger.log({"x": 0.0}, step=step)
    (reader,) = readers(tmp_path)
    assert len(events(reader, "spool_full")) == 1, "said at once, however the process ends"
    logger.close()
    (said,) = events(SpoolReader(reader.directory), "dropped_points")
    assert said["count"] + reader.logged(Stream.points) == SEGMENT_POINTS * 2


def test_trap_d_a_new_key_waits_for_room_too(tmp_path: Path, logger: Logger, full: Disk) -> None:
    full.is_full = True

    def make_room() -> None:
        while full.refused < 3:
            time.sleep(0.005)
        full.is_full = False

    threading.Thread(target=make_room, daemon=True).start()
    logger.log({"x": 1.0, "y": 2.0}, step=0)
    assert full.refused >= 3
    assert logged(readers(tmp_path)[0]) == [("x", 0, 1.0), ("y", 0, 2.0)]


def test_trap_d_a_point_whose_key_has_no_room_is_counted(tmp_path: Path, full: Disk) -> None:
    logger = Logger(tmp_path / "spools", run="r", attempt=1, rank=0, when_full=WhenFull.gap)
    logger.log({"old": 0.0}, step=0)
    full.is_full = True
    for step in range(1, 6):
        logger.log({"old": 1.0, "new": 1.0}, step=step)
    full.is_full = False
    logger._spool._retry_at = 0.0
    logger.log({"new": 2.0}, step=6)
    (reader,) = readers(tmp_path)
    assert logged(reader) == [("old", 0, 0.0), *(("old", step, 1.0) for step in range(1, 6)), ("new", 6, 2.0)]
    (said,) = events(reader, "dropped_points")
    assert (said["count"], said["first_step"], said["last_step"]) == (5, 1, 5)


def test_trap_d_the_agent_reserves_the_next_segment_ahead(tmp_path: Path, logger: Logger, full: Disk) -> None:
    for step in range(200):
        logger.log({"x": 0.0}, step=step)
    (reader,) = readers(tmp_path)
    reader.logged(Stream.points)
    reader.reserve_ahead()
    full.is_full = True
    for step in range(200, 300):
        logger.log({"x": 0.0}, step=step)
    assert full.refused == 0, "the producer only had to take it"
    assert len(logged(reader)) == 300


def test_trap_d_a_node_that_is_full_holds_back_only_those_who_hold_something(tmp_path: Path, logger: Logger) -> None:
    from orchestrator.tracking.spool_root import Node

    spool = logger._spool
    Node(tmp_path / "spools").tell(2 << 20, 1 << 20)
    assert spool._may_hold(1 << 16, 1 << 15), "nothing waits to be committed"
    logger.log({"x": 0.0})
    assert not spool._may_hold(1 << 16, 1 << 15)
    Node(tmp_path / "spools").tell(0, 1 << 20)
    assert spool._may_hold(1 << 16, 1 << 15)


# -- (e) a tensor that changes after it was logged, holds a graph, or is on an accelerator


class OnDevice:
    """A tensor on an accelerator, as far as `log` looks at it: it tells when somebody waits for it."""

    waited = 0
    shape = ()

    def __init__(self, value: float, graph: bool = True) -> None:
        self.device, self.value, self.graph = SimpleNamespace(type="cuda"), value, graph

    def numel(self) -> int:
        return 1

    def detach(self) -> OnDevice:
        return OnDevice(self.value, graph=False)

    def reshape(self, shape: tuple[int, ...]) -> OnDevice:
        return self

    def clone(self) -> OnDevice:
        return OnDevice(self.value, self.graph)

    def item(self) -> float:
        OnDevice.waited += 1
        return self.value

    __float__ = item


class Moving:
    """A transfer that is over when the test says so."""

    begun: list[Moving] = []
    is_over = False
    broken = False

    def __init__(self, tensors: list[OnDevice]) -> None:
        assert not any(tensor.graph for tensor in tensors), "no graph is held"
        self.tensors, self.waited = tensors, 0
        Moving.begun.append(self)

    def is_done(self) -> bool:
        return Moving.is_over

    def values(self) -> list[float]:
        self.waited += not Moving.is_over
        if Moving.broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return [tensor.value for tensor in self.tensors]


@pytest.fixture
def device(logger: Logger) -> type[Moving]:
    logger._deferred = DeferredPoints(begin=Moving, can_ask=lambda device: True)
    Moving.begun, Moving.is_over, Moving.broken, OnDevice.waited = [], False, False, 0
    return Moving


def test_trap_e_log_never_waits_for_the_device_and_keeps_order_step_and_time(
    tmp_path: Path, logger: Logger, device: type[Moving]
) -> None:
    values = [OnDevice(float(step)) for step in range(300)]
    for step, value in enumerate(values):
        logger.log({"loss": value}, step=step)
        value.value = -1.0
    (reader,) = readers(tmp_path)
    assert logged(reader) == []
    assert device.begun, "one transfer of many is under way"
    assert OnDevice.waited == sum(moving.waited for moving in device.begun) == 0
    device.is_over = True
    logger.log({"other": 1.0}, step=7)
    assert logger.flush(0.0) is False
    found = logged(reader)
    assert [(key, step, value) for key, step, value in found if key == "loss"] == [
        ("loss", step, float(step)) for step in range(300)
    ]
    assert len(device.begun) == 2
    batch = reader.next_batch(Stream.points, 0)
    assert batch is not None
    times = batch.points()["time"]
    assert times[0] < times[len(times) - 1], "each has the time at which it was logged"


def test_trap_e_a_device_that_is_far_behind_is_waited_for(logger: Logger, device: type[Moving]) -> None:
    for step in range(MOST_WAITING + 300):
        logger.log({"loss": OnDevice(1.0)}, step=step)
    assert sum(moving.waited for moving in device.begun) > 0


def test_trap_e_what_a_thread_logs_from_the_device_keeps_its_key(
    tmp_path: Path, logger: Logger, device: type[Moving]
) -> None:
    logger.log({"main": 1.0}, step=0)
    thread = threading.Thread(target=lambda: logger.log({"thread": OnDevice(2.0)}, step=1))
    thread.start()
    thread.join()
    logger.flush(0.0)
    assert [point for reader in readers(tmp_path) for point in logged(reader)] == [("main", 0, 1.0), ("thread", 1, 2.0)]


def test_trap_e_a_broken_device_does_not_keep_a_logger_from_closing(
    tmp_path: Path, logger: Logger, device: type[Moving]
) -> None:
    logger.log({"loss": OnDevice(1.0)}, step=0)
    device.broken = True
    logger.log({"loss": 1.0}, step=1)
    logger.flush(0.0)
    logger.close()
    (reader,) = readers(tmp_path)
    assert logged(reader) == [("loss", 1, 1.0)]
    assert not reader.is_owned()


def test_an_integer_that_no_float_holds_is_refused_from_an_array_too(logger: Logger) -> None:
    with pytest.raises(BadMetric, match="exactly"):
        logger.log({"x": np.int64(2**53 + 1)})


def test_a_spool_begins_small(tmp_path: Path, logger: Logger) -> None:
    logger.log({"x": 1.0})
    used = sum(path.stat().st_blocks * 512 for path in logger._spool.directory.iterdir())
    assert used <= 32 * 1024
    assert os.stat(tmp_path / "spools" / ".node").st_size < 1 << 20
