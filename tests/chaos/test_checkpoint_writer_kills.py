"""Writers and trainers killed before every single store and every call that changes a file.

Whatever dies where: what was sealed becomes a whole checkpoint, once the next writer comes; what was not, leaves
nothing that a reader would take for one.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints.catalog import scan
from orchestrator.checkpoints.job import KeepRules, Outcome, SlotResult
from orchestrator.checkpoints.reader import verify
from orchestrator.checkpoints.service import ORPHAN, PROMISE, WriterService
from orchestrator.checkpoints.slab import Owner, Ready, SlabFile, State, slot_bytes_for
from orchestrator.clock import ManualClock
from tests.plugins.slab_saves import is_whole, job, plan, put

SIZE = slot_bytes_for(plan()[0])
KEEP = KeepRules(last=2)


@pytest.fixture
def root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield root / "r"
    shutil.rmtree(root)


def dies_at(number: int, what: Callable[[], None]) -> bool:
    """Does it in a child that is killed before its change `number` of a file or of shared memory. False when it came to
    its end before that."""
    pid = os.fork()
    if pid == 0:
        left = number

        def count(*_: str) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        try:
            disk.watch(count)
            slab_file.watch(count)
            what()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def slab_of(root: Path, rank: int) -> SlabFile:
    (root / "slabs").mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    path = root / "slabs" / f"{uuid.uuid4().hex}.slab"
    slab_file.create(path, slots=1, slot_bytes=SIZE, owner=Owner(run="r1", attempt=1, rank=rank, pid=os.getpid()))
    slab = SlabFile(path)
    slab.tell(Ready.ready)
    assert slab.fill()
    return slab


def finish(root: Path, clock: ManualClock) -> None:
    """A writer that lives, until nothing moves any more."""
    service = WriterService(str(root), threads=1, clock=clock)
    for _ in range(40):
        while service.step(clock.monotonic()):
            pass
        clock.advance(0.5)
    service.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_writer_killed_anywhere_is_followed_by_the_next(root: Path, tmp_path: Path, world_size: int) -> None:
    clock = ManualClock()
    slabs = [slab_of(root, rank) for rank in range(world_size)]
    slots = [slab.slots[0] for slab in slabs]
    kills = 0
    for step in itertools.count(1):
        for rank, slot in enumerate(slots):
            put(slot, plan(rank, world_size), seed=step)
            slot.seal(job(tmp_path, step, rank=rank, world_size=world_size, keep=KEEP))
        was_killed = dies_at(step - 1, lambda: finish(root, clock))
        finish(root, clock)
        results = [slot.result(slot.generation) for slot in slots]
        assert [result.result if result else None for result in results] == [
            SlotResult.committed, *[SlotResult.durable] * (world_size - 1)
        ], f"killed at {step - 1}"  # fmt: skip
        storage = Storage(str(tmp_path))
        newest, *others = scan(storage).committed
        assert newest.step == step
        assert len(others) == min(step - 1, KEEP.last - 1)
        for rank in range(world_size):
            assert is_whole(tmp_path / newest.name, plan(rank, world_size), seed=step)
        assert not verify(storage.join(newest.name), newest)
        assert all(slot.state is State.free for slot in slots)
        kills += was_killed
        if not was_killed:
            break
    assert kills >= 30 * world_size, "it was killed at each of its changes"
    for slab in slabs:
        slab.close()
    assert not list(tmp_path.rglob("*.json.partial"))


def test_a_trainer_killed_anywhere_has_saved_what_it_sealed(root: Path, tmp_path: Path) -> None:
    clock = ManualClock()
    saved = []
    for number in itertools.count():
        storage = tmp_path / str(number)

        def train(storage: Path = storage) -> None:
            slab = slab_of(root, 0)
            for step in (1, 2):
                put(slab.slots[0], plan(), seed=step)
                slab.slots[0].seal(job(storage, step))
                if step == 1:
                    slab.slots[0].free(_done(slab))

        was_killed = dies_at(number, train)
        finish(root, clock)
        found = scan(Storage(str(storage))).committed
        assert all(is_whole(storage / manifest.name, plan(), seed=manifest.step) for manifest in found)
        saved.append([manifest.step for manifest in found])
        if not was_killed:
            break
    assert saved[-1] == [2]
    assert saved[0] == []
    assert {tuple(each) for each in saved} <= {(), (1,), (2,)}
    service = WriterService(str(root), threads=1, clock=clock)
    for _ in range(2):
        service.step(clock.monotonic())
        clock.advance(ORPHAN + 1)
    service.close()
    assert not list((root / "slabs").glob("*.slab")), "the memory of the dead is given back"


def _done(slab: SlabFile) -> Outcome:
    return Outcome(save=slab.slots[0].save, name="", result=SlotResult.abandoned)


def test_a_writer_killed_while_it_gives_out_memory(root: Path) -> None:
    clock = ManualClock()
    owner = {"run": "r1", "attempt": 1, "rank": 0, "pid": 1, "host": ""}

    def give(root: Path) -> None:
        service = WriterService(str(root), threads=1, clock=clock)
        service._populate = lambda path: SlabFile(path).tell(Ready.ready)  # type: ignore[method-assign]
        service.lease(SIZE, owner)
        clock.advance(PROMISE + 1)
        service.lease(SIZE, {**owner, "attempt": 2})

    for number in itertools.count():
        was_killed = dies_at(number, partial(give, root / str(number)))
        service = WriterService(str(root / str(number)), threads=1, clock=clock)
        clock.advance(PROMISE + 1)
        given = service.lease(SIZE, {**owner, "attempt": 3})
        slab = SlabFile(Path(given["slab"]))
        assert slab.fill()
        assert slab.owner.attempt == 3
        put(slab.slots[0], plan())
        slab.slots[0].cancel()
        slab.close()
        service.close()
        if not was_killed:
            break
    assert number >= 3
