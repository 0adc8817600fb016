"""SIGKILL of every part of delivery, at random and at every change of a file; frozen trackers; two trackers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.postgres import EmbeddedPostgres
from orchestrator.records import Stream
from orchestrator.store.store import Store
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import SpoolReader, SpoolUnusable, spools
from tests.plugins.campaign import Campaign, report
from tests.plugins.delivery_processes import Parts, drain, state_of, wait_for
from tests.plugins.journal import compare
from tests.plugins.small_delivery import assert_sound, new_run

FULL = pytest.mark.host
"""Too long for `make test`."""


@pytest.fixture
def directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))  # short: sockets live in it
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def parts(directory: Path) -> Iterator[Parts]:
    with Parts(directory) as parts:
        yield parts


@pytest.mark.parametrize(("kills", "points"), [(100, 0), pytest.param(1000, 1_000_000, marks=FULL)])
@pytest.mark.timeout(1800)
def test_random_kills_lose_and_double_nothing(
    kills: int, points: int, directory: Path, parts: Parts, postgres: EmbeddedPostgres, schema_url: str
) -> None:
    seed, begun = int(os.environ.get("ORC_SEED", random.SystemRandom().randrange(1 << 32))), time.monotonic()
    campaign = Campaign(directory, postgres, schema_url, parts, random.Random(seed))
    while campaign.kills.total() < kills or campaign.logged() < points:
        campaign.go(kills=campaign.kills.total() + 10, seconds=60)
    found = campaign.settle()
    print(report(campaign, found, seed, time.monotonic() - begun))
    assert not found.problems, f"ORC_SEED={seed}: {found.problems}"
    assert found.points >= points
    assert min(campaign.kills[part] for part in ("tracker", "shipper", "producer")) > 10
    assert_sound(schema_url)


# -- at every write, fsync, rename, unlink, truncate and reservation ---------------------------------------------------


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=FULL)])
@pytest.mark.timeout(900)
def test_a_death_of_everything_before_any_change_of_a_file(
    every: int, directory: Path, parts: Parts, schema_url: str
) -> None:
    """Producer, agent and tracker are one process here, which dies before its change number n; then others go on."""
    store, died, number = Store(schema_url), 0, 0
    while True:
        here = directory / str(number)
        (here / "journals").mkdir(parents=True)
        run = new_run(store)
        pid = parts.start(
            "everything", directory=str(here), database_url=schema_url, run=run, rank=0,
            journal=str(here / "journals"), die=number,
        )  # fmt: skip
        ended = parts.wait(pid)
        assert ended in (0, -signal.SIGKILL), parts.said()
        died += ended == -signal.SIGKILL
        _recover(here, schema_url)
        found = compare(store, run, here / "journals")
        assert not found.problems, f"killed before change {number}: {found.problems}"
        shutil.rmtree(here)
        if ended == 0:
            break
        number += every
    store.close()
    print(f"{died} deaths, before one of every {every} of {number} changes")
    assert died > 5
    assert_sound(schema_url)


def _recover(here: Path, url: str) -> None:
    tracker = TrackerService(here / "log", url)
    drain(tracker, Shipper(here / "spools", tracker), here / "spools")
    tracker.stop()


SYSTEM_CALLS = (
    "write", "pwrite64", "pwritev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat",
    "rmdir", "ftruncate", "fallocate", "mkdir", "mkdirat",
)  # fmt: skip
"""By which files change, come and go."""


@FULL
@pytest.mark.timeout(1800)
def test_a_death_before_any_system_call_that_changes_a_file(directory: Path, parts: Parts, schema_url: str) -> None:
    """As above, but strace finds the calls, also those that do not go through disk.py."""
    store, deaths = Store(schema_url), Counter[str]()
    for call in SYSTEM_CALLS:
        while _dies_before(call, deaths[call] + 1, directory / f"{call}-{deaths[call]}", parts, schema_url, store):
            deaths[call] += 1
    store.close()
    print(f"{deaths.total()} deaths: {dict(deaths)}")
    assert min(deaths[call] for call in ("pwrite64", "fsync", "rename", "unlink", "fallocate")) > 1
    assert deaths.total() > 80
    assert_sound(schema_url)


def _dies_before(call: str, number: int, here: Path, parts: Parts, url: str, store: Store) -> bool:
    """False: there are fewer calls of that name."""
    (here / "journals").mkdir(parents=True)
    run = new_run(store)
    pid = parts.start(
        "everything", directory=str(here), database_url=url, run=run, rank=0, journal=str(here / "journals"),
        stopped=True,
    )  # fmt: skip
    wait_for(lambda: state_of(pid) == "T", "it waits")
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}"]
    strace = subprocess.Popen(["strace", "-qq", "-p", str(pid), "-o", "/dev/null", *inject])
    wait_for(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text(), "strace watches it")
    os.kill(pid, signal.SIGCONT)
    ended = parts.wait(pid)
    strace.wait(timeout=30)
    assert ended in (0, -signal.SIGKILL), parts.said()
    _recover(here, url)
    found = compare(store, run, here / "journals")
    assert not found.problems, f"killed before {call} {number}: {found.problems}"
    shutil.rmtree(here)
    return ended != 0


@pytest.mark.parametrize("victim", ["tracker", "shipper", "producer"])
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=FULL)])
@pytest.mark.timeout(900)
def test_a_death_of_one_part_before_any_of_its_changes(
    every: int, victim: str, directory: Path, parts: Parts, schema_url: str
) -> None:
    """The others go on; it comes back."""
    store, died, number = Store(schema_url), 0, 0
    while True:
        fired = _with_a_death(victim, number, directory / str(number), parts, schema_url, store)
        died += fired
        if not fired:
            break
        number += every
    store.close()
    print(f"{died} deaths of the {victim}, before one of every {every} of {number} changes")
    assert died
    assert_sound(schema_url)


def _with_a_death(victim: str, number: int, here: Path, parts: Parts, url: str, store: Store) -> bool:
    journals = here / "journals"
    journals.mkdir(parents=True)
    run, socket = new_run(store), str(here / "socket")
    arguments = {
        "tracker": {"log": str(here / "log"), "database_url": url, "socket": socket, "segment_bytes": 1 << 15},
        "shipper": {"spools": str(here / "spools"), "socket": socket},
        "producer": {
            "spools": str(here / "spools"), "run": run, "rank": 0, "journal": str(journals), "burst": 9000,
            "calls": 18_000, "pause": 0.1,
        },
    }  # fmt: skip
    pids = {
        part: parts.start(part, **given, **({"die": number} if part == victim else {}))
        for part, given in arguments.items()
    }
    producer, fired = pids.pop("producer"), False
    left = {producer}

    def is_over() -> bool:
        nonlocal fired
        for part, pid in list(pids.items()):
            if part == victim and not fired and state_of(pid) == "Z":
                assert parts.wait(pid) == -signal.SIGKILL, parts.said()
                fired = True
                pids[part] = parts.start(part, **arguments[part])
        if producer in left and state_of(producer) == "Z":
            ended = parts.wait(producer)
            assert ended in (0, -signal.SIGKILL), parts.said()
            fired |= ended == -signal.SIGKILL
            left.clear()
        return not left and not list(spools(here / "spools"))

    wait_for(is_over, f"everything shipped after a death of the {victim} at {number}: {parts.said()}")
    for pid in pids.values():
        parts.kill(pid)
    found = compare(store, run, journals)
    assert not found.problems, f"the {victim} killed before change {number}: {found.problems}"
    shutil.rmtree(here)
    return fired


# -- frozen, and two at once -------------------------------------------------------------------------------------------


def test_a_second_tracker_takes_over_from_a_frozen_one_which_then_wakes_up(
    directory: Path, parts: Parts, schema_url: str
) -> None:
    store = Store(schema_url)
    run, journals, socket = new_run(store), directory / "journals", str(directory / "socket")
    journals.mkdir()
    first = {"log": str(directory / "log"), "database_url": schema_url, "socket": socket}
    frozen = parts.start("tracker", **first)
    shipper = parts.start("shipper", spools=str(directory / "spools"), socket=socket, timeout=0.5)
    producer = parts.start(
        "producer", spools=str(directory / "spools"), run=run, rank=0, journal=str(journals), burst=50
    )
    wait_for(lambda: _accepted(directory) > 1000, "the first tracker accepts")
    os.kill(frozen, signal.SIGSTOP)
    wait_for(lambda: state_of(frozen) == "T", "it is frozen")
    rival = parts.start("tracker", **first, wait=0.2)
    assert parts.wait(rival) == 1
    assert "is in use by another tracker" in parts.said(), "nobody else may write its log"
    at_freeze = _accepted(directory)
    second = parts.start("tracker", **{**first, "log": str(directory / "log2")})
    wait_for(lambda: _accepted(directory) > at_freeze + 2000, "the second one accepts")
    os.kill(frozen, signal.SIGCONT)
    awake = _accepted(directory)
    wait_for(lambda: _accepted(directory) > awake + 2000, "both live")
    parts.kill(second)
    parts.kill(frozen)
    parts.start("tracker", **first)
    parts.kill(producer)
    wait_for(lambda: not list(spools(directory / "spools")), f"everything arrived: {parts.said()}")
    parts.kill(shipper)
    found = compare(store, run, journals)
    assert not found.problems, found.problems
    store.close()
    assert_sound(schema_url)


def _accepted(directory: Path) -> int:
    found = 0
    for spool in spools(directory / "spools"):
        try:
            reader = SpoolReader(spool)
        except SpoolUnusable:
            continue
        found += reader.accepted(Stream.points)
        reader.close()
    return found
