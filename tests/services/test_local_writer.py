"""The writer as a process: shared, killed, taken over, left alone, and trainers that are killed around a seal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.catalog import scan
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.slab import Owner, SlabFile, State, slot_bytes_for
from tests.plugins.slab_saves import is_whole, job, plan, put

PLAN = plan()
SIZE = slot_bytes_for(PLAN[0])
TRAINER = """
import os, sys
from pathlib import Path
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.slab import Owner, slot_bytes_for
from tests.plugins.slab_saves import job, plan, put
root, storage, seals = sys.argv[1:]
slab = SlabClient(root, may_start=False).lease(
    slot_bytes_for(plan()[0]), Owner(run="r1", attempt=1, rank=0, pid=os.getpid())
)
put(slab.slots[0], plan(), seed=1)
if seals == "yes":
    slab.slots[0].seal(job(storage, 1))
print(slab.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield root / "r"
    client = SlabClient(str(root / "r"), may_start=False)
    while (pid := serving(client)) is not None:
        client.stop()
        wait_until(lambda pid=pid: not is_alive(pid), "the writer ends")  # type: ignore[misc]
    shutil.rmtree(root)


def serving(client: SlabClient) -> int | None:
    try:
        return client.describe()["pid"] if client.ensure() else None
    except OSError:
        return None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what: Callable[[], object], why: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.01)


def me(rank: int = 0) -> Owner:
    return Owner(run="r1", attempt=1, rank=rank, pid=os.getpid())


def leased(client: SlabClient, rank: int = 0) -> SlabFile:
    slab = client.lease(SIZE, me(rank))
    assert slab is not None
    wait_until(slab.is_ready, "its pages exist")
    return slab


def committed(storage: Path) -> list[int]:
    return [manifest.step for manifest in scan(Storage(str(storage))).committed]


def test_two_callers_start_one_writer_and_a_killed_one_is_followed(root: Path, tmp_path: Path) -> None:
    clients = [SlabClient(str(root), may_start=True) for _ in range(4)]
    threads = [threading.Thread(target=client.ensure) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({client.describe()["pid"] for client in clients}) == 1
    client = clients[0]
    slab = leased(client)
    put(slab.slots[0], PLAN, seed=1)
    slab.slots[0].seal(job(tmp_path, 1))
    assert client.ring() == 1
    wait_until(lambda: slab.slots[0].result(1), "the first one writes it")

    first = client.describe()["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: client.ring() == 0, "nobody hears it")
    put(slab.slots[1], PLAN, seed=2)
    slab.slots[1].seal(job(tmp_path, 2))
    assert client.ensure()
    assert client.describe()["pid"] != first
    wait_until(lambda: slab.slots[1].result(1), "the next one writes it")
    assert committed(tmp_path) == [2, 1]
    assert is_whole(tmp_path / "step_00000002-a1", PLAN, seed=2)
    slab.close()


@pytest.mark.parametrize("seals", ["yes", "no"])
def test_a_killed_trainers_save_counts_from_its_seal_on(root: Path, tmp_path: Path, seals: str) -> None:
    client = SlabClient(str(root), may_start=True)
    assert client.ensure()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(root), str(tmp_path), seals], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    path = Path(trainer.stdout.readline().strip())
    slab = SlabFile(path)
    assert slab.has_filler()
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    client.ring()
    wait_until(lambda: slab.slots[0].state is State.free, "it is written, or given up")
    assert committed(tmp_path) == ([1] if seals == "yes" else [])
    if seals == "yes":
        assert is_whole(tmp_path / "step_00000001-a1", PLAN, seed=1)
    slab.close()
    again = leased(client)
    assert again.path == path, "its memory is still warm for the next attempt"
    again.close()


def test_one_that_has_nothing_to_do_ends_and_leaves_no_memory(root: Path, tmp_path: Path) -> None:
    client = SlabClient(str(root), may_start=True, idle=0.2)
    slab = leased(client)
    pid = client.describe()["pid"]
    put(slab.slots[0], PLAN)
    slab.slots[0].seal(job(tmp_path, 1))
    client.ring()
    wait_until(lambda: slab.slots[0].result(1), "it is written")
    assert is_alive(pid), "while a trainer has memory it stays"
    slab.close()
    wait_until(lambda: not is_alive(pid), "it ends")
    assert list(places.slabs(root).iterdir()) == []
    assert places.bells(root) == []
    assert not places.request_socket(root).exists()
    assert committed(tmp_path) == [1]


def test_a_second_member_takes_over_the_requests(root: Path) -> None:
    client = SlabClient(str(root), may_start=True)
    assert client.ensure()
    first = client.describe()
    code = [sys.executable, "-m", "orchestrator.checkpoints.local.process", "--root", str(root)]
    second = subprocess.Popen(code, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(places.bells(root)) == 2, "it joined")
    assert client.describe()["pid"] == first["pid"]
    os.kill(first["pid"], signal.SIGKILL)
    waiting = SlabClient(str(root), may_start=False)
    wait_until(lambda: serving(waiting) == second.pid, "it answers now")
    slab = leased(waiting)
    slab.close()
    second.terminate()
    assert second.wait(30) == 0


def test_nobody_may_be_started_where_it_is_forbidden(root: Path) -> None:
    places.prepare(root)
    with pytest.raises(ConnectionError):
        SlabClient(str(root), may_start=False).lease(SIZE, me(), timeout=0.1)
    assert not SlabClient(str(root / "x"), may_start=False).ensure()


def test_a_long_path_has_its_sockets_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / ("d" * 120)
    client = SlabClient(str(root), may_start=True, idle=0.2)
    slab = leased(client)
    assert len(os.fsencode(places.request_socket(root))) < 108
    pid = client.describe()["pid"]
    slab.close()
    wait_until(lambda: not is_alive(pid), "it ends")
