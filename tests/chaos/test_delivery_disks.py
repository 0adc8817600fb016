"""Disks that are full, fail or flip bits under spool and log; batches that come twice, late and in any order; clocks
that jump by a day.
"""

from __future__ import annotations

import errno
import logging
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.tracking import wal
from orchestrator.tracking.spool import spools
from tests.plugins.delivery_processes import Parts
from tests.plugins.journal import Comparison, compare
from tests.plugins.small_delivery import Exited, SmallDelivery, assert_sound

FULL = pytest.mark.host
"""Too long for `make test`, or of the host."""


@pytest.fixture(autouse=True)
def _disk_is_well_in_the_end() -> Iterator[None]:
    yield
    disk.watch(None)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tracker's log: many of them begin and go."""
    defaults = dict(wal.WriteAheadLog.__init__.__kwdefaults__ or {}, segment_bytes=1 << 15)
    monkeypatch.setattr(wal.WriteAheadLog.__init__, "__kwdefaults__", defaults)


class Failing:
    """Call `number` of disk.py of these kinds fails, and so do some after it; then the disk is well again (a producer
    that waits for room waits in the thread that is to give it)."""

    MOST = 20

    def __init__(self, number: int, code: int, kinds: tuple[str, ...]) -> None:
        self.left, self.code, self.kinds = number, code, kinds
        self.fired = 0
        disk.watch(self)

    def __call__(self, call: str, path: str) -> None:
        if call not in self.kinds or self.fired == self.MOST:
            return
        if self.left > 0:
            self.left -= 1
            return
        self.fired += 1
        raise OSError(self.code, "injected", path)

    def mend(self) -> None:
        disk.watch(None)


ROOM = ("write", "fallocate")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=FULL)])
@pytest.mark.parametrize(("code", "kinds"), [(errno.ENOSPC, ROOM), (errno.EIO, ("fsync",))], ids=["full", "failing"])
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("small_segments")
def test_a_disk_that_is_full_or_fails_at_any_call(
    code: int, kinds: tuple[str, ...], every: int, schema_url: str
) -> None:
    """Nothing is acknowledged that is not there; when there is room again, everything goes on."""
    logging.disable(logging.CRITICAL)
    fired = number = 0
    while True:
        with SmallDelivery(schema_url) as here:
            failing = Failing(number, code, kinds)
            _go_through(here)
            failing.mend()
            found = here.settle()
            assert not found.problems, f"{kinds} {number}: {found.problems}"
        fired += bool(failing.fired)
        if not failing.fired:
            break
        number += every
    logging.disable(logging.NOTSET)
    print(f"{fired} of the {number} calls of {kinds} failed")
    assert fired >= 3
    assert_sound(schema_url)


def _go_through(here: SmallDelivery) -> None:
    """Logging stops where it is refused, as training would; agent and tracker go on, or begin anew."""
    is_logging = True
    for _ in range(6):
        if is_logging:
            try:
                here.log_calls(700)
            except OSError:
                is_logging = False
        for _ in range(3):
            with suppress(OSError):
                try:
                    if here.tracker is None:
                        here.start_tracker()
                    here.ship()
                    assert here.tracker is not None
                    here.tracker.commit_step()
                except Exited:
                    here.stop_tracker()


@pytest.mark.parametrize("every", [97, pytest.param(5, marks=FULL)])
@pytest.mark.timeout(900)
def test_any_flipped_byte_of_the_log_costs_nothing(every: int, schema_url: str) -> None:
    """Spools have it still."""
    logging.disable(logging.CRITICAL)
    with SmallDelivery(schema_url) as here:
        here.start_tracker()
        rank = flipped = 0
        size = 1
        while flipped < size:
            for _ in range(3):
                here.log_calls(3, rank)
                here.ship()
            here.stop_tracker()
            (segment,) = here.log.glob("*.log")
            content = bytearray(segment.read_bytes())
            size = len(content)
            content[flipped] ^= 0xFF
            segment.write_bytes(content)
            here.settle()
            here.stop_tracker()
            for path in here.log.iterdir():
                path.unlink()
            here.start_tracker()
            flipped += every
            rank += 1
        found = compare(here.store, here.run, here.journals)
        assert not found.problems, found.problems
        print(f"{rank} of {size} bytes flipped, {found.points} points")
        assert found.points == 2 * 9 * rank
    logging.disable(logging.NOTSET)
    assert_sound(schema_url)


@pytest.mark.parametrize("every", [2003, pytest.param(211, marks=FULL)])
@pytest.mark.timeout(900)
def test_a_flipped_byte_of_a_spool_is_counted_and_stores_nothing_wrong(every: int, schema_url: str) -> None:
    logging.disable(logging.CRITICAL)
    place = lost = stored = 0
    while True:
        with SmallDelivery(schema_url) as here:
            here.start_tracker()
            here.log_calls(200)
            here.close_loggers()
            (spool,) = spools(here.spools)
            files = sorted(path for path in spool.iterdir() if path.name.startswith(("points", "keys")))
            at, where = place, files[0]
            for where in files:
                if at < where.stat().st_size:
                    break
                at -= where.stat().st_size
            else:
                break
            content = bytearray(where.read_bytes())
            content[at] ^= 0x55
            where.write_bytes(content)
            here.settle()
            verdict = here.store.check_integrity(here.run)
            assert verdict.problems == (), f"{where.name} {at}: {verdict.problems}"
            assert verdict.counts.points + verdict.counts.lost == 400, f"{where.name} {at}"
            for place_of_key, key in enumerate(("loss", "train/accuracy")):
                points = here.store.points(here.run, key)
                wanted = points.steps * 0.5 + place_of_key / 3
                assert points.values.tolist() == wanted.tolist(), f"{where.name} {at}"
                assert (points.steps[1:] > points.steps[:-1]).all()
            events = [event for event in here.store.events(here.run) if event.kind == "lost_points"]
            assert bool(events) == bool(verdict.counts.lost)
            lost += verdict.counts.lost
            stored += verdict.counts.points
        place += every
    logging.disable(logging.NOTSET)
    print(f"{place // every} flips: {lost} points lost and counted, {stored} stored")
    assert lost


def test_batches_that_come_again_late_and_in_any_order_count_once(schema_url: str) -> None:
    shuffled = random.Random(4)
    with SmallDelivery(schema_url) as here:
        tracker = here.start_tracker()
        for number in range(12):
            here.log_calls(60, rank=number % 3)
            here.ship()
            for _ in range(3):
                sent = shuffled.sample(here.frames, len(here.frames))
                tracker.push(sent[: len(sent) // 2])
                tracker.push(sent)
            if number % 3 == 1:
                tracker.commit_step()
            if number % 4 == 3:
                here.stop_tracker()
                tracker = here.start_tracker()
        for _ in range(3):
            tracker.push(shuffled.sample(here.frames, len(here.frames)))
            while tracker.commit_step():
                pass
        found = here.settle()
        assert not found.problems, found.problems
        assert found.points == 2 * 12 * 60
    assert_sound(schema_url)


def test_clocks_that_jump_by_a_day_change_no_order_and_end_nobody(schema_url: str) -> None:
    """The producer's, and the tracker's wall clock."""
    with SmallDelivery(schema_url) as here, Parts(here.directory) as parts:
        tracker = here.start_tracker()
        pid = parts.start(
            "producer", spools=str(here.spools), run=here.run, rank=0, journal=str(here.journals), burst=100,
            calls=1000, clock_offset=86_400.0,
        )  # fmt: skip
        for jump in (-86_400.0, 86_400.0, 2 * 86_400.0, -86_400.0):
            here.clock._now += jump
            here.ship()
            tracker.commit_step()
            tracker.lease_step()
        assert parts.wait(pid) == 0, parts.said()
        found = here.settle()
        assert not found.problems, found.problems
        assert found.points == 2000
        times = here.store.points(here.run, "loss").times
        assert times.max() - times.min() > 86_400, "the clock did jump"
        assert here.store.run(here.run).status.value == "RUNNING"
    assert_sound(schema_url)


# -- of the host -------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_a_full_disk_under_the_log_holds_acknowledgements_back_and_nothing_else(schema_url: str) -> None:
    with SmallDelivery(schema_url) as here:
        here.log.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(here.log)], check=True, timeout=10)
        try:
            tracker = here.start_tracker()
            stuck = 0
            while stuck < 3:
                here.log_calls(3000)
                before = here.accepted()
                here.ship()
                stuck = stuck + 1 if here.accepted() == before else 0
            logged = 2 * here._calls[0]
            assert here.accepted() < logged
            subprocess.run(["mount", "-o", "remount,size=64m", str(here.log)], check=True, timeout=10)
            here.ship()
            assert here.accepted() > before
            found = here.settle()
            assert not found.problems, found.problems
            assert found.points == logged
            assert tracker.health()["log_damaged_bytes"] == 0
        finally:
            here.stop_tracker()
            subprocess.run(["umount", "--lazy", str(here.log)], check=True, timeout=10)
    assert_sound(schema_url)


@pytest.mark.host
def test_a_full_disk_under_the_spools_blocks_the_producer_and_loses_nothing(schema_url: str) -> None:
    with SmallDelivery(schema_url) as here, Parts(here.directory) as parts:
        here.spools.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(here.spools)], check=True, timeout=10)
        try:
            pid = parts.start(
                "producer", spools=str(here.spools), run=here.run, rank=0, journal=str(here.journals), burst=10_000,
                pause=0.0, calls=200_000,
            )  # fmt: skip
            deadline = time.monotonic() + 20
            while shutil.disk_usage(here.spools).free > 1 << 20:
                assert time.monotonic() < deadline, "the disk never filled up"
                time.sleep(0.01)
            here.start_tracker()
            found = _drained(here, parts, pid)
            assert not found.problems, found.problems
            assert found.points == 400_000, "the producer waited, and went on when there was room"
        finally:
            subprocess.run(["umount", "--lazy", str(here.spools)], check=True, timeout=10)
    assert_sound(schema_url)


def _drained(here: SmallDelivery, parts: Parts, pid: int) -> Comparison:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert here.tracker is not None
        here.ship()
        here.tracker.commit_step()
        assert time.monotonic() < deadline, "the producer ends"
    assert parts.wait(pid) == 0, parts.said()
    return here.settle()
