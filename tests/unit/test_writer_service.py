"""The writer step by step: what is sealed is written and committed, or given up for a reason that is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from orchestrator import disk
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit, keeping, writer
from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints.catalog import scan
from orchestrator.checkpoints.job import KeepRules, SlotResult
from orchestrator.checkpoints.reader import verify
from orchestrator.checkpoints.service import ORPHAN, PROMISE, WriterService
from orchestrator.checkpoints.slab import Owner, SlabFile, State, slot_bytes_for
from orchestrator.clock import ManualClock
from tests.plugins.slab_saves import is_whole, job, plan, put

PLAN = plan()


class World:
    """A slab root, a storage and one member, moved by hand."""

    def __init__(self, directory: Path) -> None:
        self.root, self.storage = directory / "root", directory / "storage"
        self.clock = ManualClock()
        self.members: list[WriterService] = []
        self.slabs: list[SlabFile] = []
        self.service = self.member()
        self.steps()

    def member(self, **options: int) -> WriterService:
        member = WriterService(str(self.root), threads=1, clock=self.clock, **options)
        self.members.append(member)
        return member

    def trainer(self, rank: int = 0, *, attempt: int = 1, slots: int = 2, fills: bool = True) -> SlabFile:
        """A rank with memory."""
        owner = Owner(run="r1", attempt=attempt, rank=rank, pid=os.getpid())
        given = self.service.lease(slot_bytes_for(PLAN[0]), owner_json(owner), slots=slots)
        assert given["slots"] == slots
        slab = SlabFile(Path(given["slab"]))
        self.slabs.append(slab)
        if fills:
            assert slab.fill()
            self.service._look_around(self.clock.monotonic())  # sees that it was taken
        return slab

    def steps(self, service: WriterService | None = None, most: int = 50) -> int:
        """Until nothing moves."""
        for count in range(most):
            if not (service or self.service).step(self.clock.monotonic()):
                return count
        raise AssertionError("it moves for ever")

    def close(self) -> None:
        for slab in self.slabs:
            slab.close()
        for member in self.members:
            member.close()


def owner_json(owner: Owner) -> dict[str, object]:
    return {name: getattr(owner, name) for name in ("run", "attempt", "rank", "pid", "host")}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    world = World(root)
    world.storage = tmp_path / "storage"
    yield world
    world.close()
    shutil.rmtree(root)


def test_what_is_sealed_is_written_and_committed(world: World) -> None:
    slot = world.trainer().slots[0]
    generation = put(slot, PLAN)
    assert world.steps() == 0
    slot.seal(job(world.storage, 7))
    assert world.service.step(0.0), "written"
    assert slot.state is State.written
    assert slot.result(generation) is None
    assert world.steps() == 1
    outcome = slot.result(generation)
    assert outcome is not None
    assert outcome.result is SlotResult.committed
    assert (outcome.name, outcome.why) == ("step_00000007-a1", "")
    (manifest,) = scan(Storage(str(world.storage))).committed
    assert (outcome.manifest_sha256, outcome.size_bytes) == (manifest.digest, manifest.size_bytes)
    assert is_whole(world.storage / manifest.name, PLAN)
    assert not verify_damages(world, manifest.name)
    assert slot.state is State.free


def verify_damages(world: World, name: str) -> object:
    storage = Storage(str(world.storage))
    return verify(storage.join(name), next(m for m in scan(storage).committed if m.name == name))


def test_two_slots_are_written_in_the_order_of_their_seals(world: World) -> None:
    first, second = world.trainer().slots
    for step, slot in ((2, first), (1, second)):
        put(slot, PLAN)
        slot.seal(job(world.storage, step))
    assert world.service.step(0.0)
    assert (first.state, second.state) == (State.sealed, State.written)
    world.steps()
    assert len(scan(Storage(str(world.storage))).committed) == 2


def test_other_ranks_slots_are_free_as_soon_as_their_part_is_durable(world: World) -> None:
    main, other = world.trainer(0).slots[0], world.trainer(1).slots[0]
    put(main, plan(0, 2))
    put(other, plan(1, 2))
    main.seal(job(world.storage, 1, rank=0, world_size=2))
    world.steps()
    assert main.state is State.written
    assert not scan(Storage(str(world.storage))).committed
    other.seal(job(world.storage, 1, rank=1, world_size=2))
    world.steps()
    result = other.result(1)
    assert result is not None
    assert result.result is SlotResult.durable
    assert other.state is State.free
    world.clock.advance(1.0)
    world.steps()
    result = main.result(1)
    assert result is not None
    assert result.result is SlotResult.committed
    assert is_whole(world.storage / result.name, plan(0, 2))
    assert is_whole(world.storage / result.name, plan(1, 2))
    assert not verify_damages(world, result.name)


def test_a_commit_that_waits_keeps_no_part_from_being_written(world: World) -> None:
    """One thread, and a commit that is due at every look."""
    main, other = world.trainer(0).slots[0], world.trainer(1).slots[0]
    put(main, plan(0, 2))
    put(other, plan(1, 2))
    main.seal(job(world.storage, 1, rank=0, world_size=2))
    assert world.service.step(world.clock.monotonic())
    other.seal(job(world.storage, 1, rank=1, world_size=2))
    for _ in range(3):
        world.clock.advance(10.0)
        world.service.step(world.clock.monotonic())
    result = main.result(1)
    assert result is not None
    assert result.result is SlotResult.committed


def test_the_commit_is_tried_less_and_less_often(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []
    monkeypatch.setattr(commit, "finish", lambda inside: tries.append(world.clock.monotonic()))
    slot = world.trainer().slots[0]
    put(slot, PLAN)
    slot.seal(job(world.storage, world_size=2, wait_for_ranks=5.0))
    for _ in range(600):
        world.steps()
        world.clock.advance(0.01)
    pauses = [round(later - earlier, 2) for earlier, later in zip(tries, tries[1:], strict=False)]
    assert pauses[:6] == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32], abs=0.011)
    assert pauses[6:] == pytest.approx([0.5] * len(pauses[6:]), abs=0.011)
    result = slot.result(1)
    assert result is not None
    assert result.result is SlotResult.failed
    assert "not all 2 ranks" in result.why
    assert (world.storage / "step_00000001-a1").exists(), "they may still come: the next restore can commit it"


def given_up(world: World, slot: slab_file.Slot, reason: str, result: SlotResult = SlotResult.failed) -> None:
    world.clock.advance(1.0)
    world.steps()
    outcome = slot.result(slot.generation)
    assert outcome is not None
    assert outcome.result is result
    assert reason in outcome.why
    assert slot.state is State.free
    assert not (world.storage / outcome.name).exists(), "its files are gone"


def test_given_up_when_a_rank_died_before_its_part_was_in_memory(world: World) -> None:
    main, dead = world.trainer(0).slots[0], world.trainer(1)
    put(main, plan(0, 2))
    put(dead.slots[0], plan(1, 2))
    main.seal(job(world.storage, rank=0, world_size=2))
    world.steps()
    assert main.state is State.written
    dead.stop_filling()
    given_up(world, main, "rank 1 died")
    assert dead.slots[0].state is State.free


def test_given_up_when_a_rank_died_at_its_seal(world: World) -> None:
    """The save's token lies in the slot already when the word that seals it does not."""

    class Killed(BaseException):
        pass

    def dies(point: str) -> None:
        raise Killed

    main, dead = world.trainer(0).slots[0], world.trainer(1)
    put(main, plan(0, 2))
    put(dead.slots[0], plan(1, 2))
    slab_file.watch(dies)
    with pytest.raises(Killed):
        dead.slots[0].seal(job(world.storage, rank=1, world_size=2))
    slab_file.watch(None)
    dead.stop_filling()
    world.steps()  # what was being filled is free again before anybody asks for it
    assert dead.slots[0].save == job(world.storage).save
    main.seal(job(world.storage, rank=0, world_size=2))
    world.steps()
    given_up(world, main, "rank 1 died")


def test_not_given_up_for_memory_that_a_rank_has_left_behind(world: World) -> None:
    """Adam's state came with the first step: rank 1 has larger memory now, and is about to fill it."""
    main, old, new = world.trainer(0).slots[0], world.trainer(1), world.trainer(1)
    old.stop_filling()
    put(main, plan(0, 2))
    put(new.slots[0], plan(1, 2))
    main.seal(job(world.storage, rank=0, world_size=2))
    world.steps()
    world.clock.advance(1.0)
    world.steps()
    assert main.state is State.written, "it waits for rank 1"
    new.slots[0].seal(job(world.storage, rank=1, world_size=2))
    world.clock.advance(1.0)
    world.steps()
    assert len(scan(Storage(str(world.storage))).committed) == 1


def test_not_given_up_when_the_dead_ranks_part_is_durable(world: World) -> None:
    """Rank 1 had begun its next save when it died; rank 2 is on another host."""
    main, dead = world.trainer(0).slots[0], world.trainer(1)
    put(main, plan(0, 3))
    put(dead.slots[0], plan(1, 3))
    for rank, slot in ((0, main), (1, dead.slots[0])):
        slot.seal(job(world.storage, rank=rank, world_size=3))
    world.steps()
    put(dead.slots[0], plan(1, 3))
    dead.stop_filling()
    world.clock.advance(1.0)
    world.steps()
    assert main.state is State.written, "it waits for rank 2"


def test_given_up_when_a_rank_could_not_write(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = world.trainer(0).slots[0], world.trainer(1).slots[0]
    put(main, plan(0, 2))
    put(other, plan(1, 2))
    main.seal(job(world.storage, rank=0, world_size=2))
    world.steps()
    with failing("write", 28):
        other.seal(job(world.storage, rank=1, world_size=2))
        world.steps()
    result = other.result(1)
    assert result is not None
    assert result.result is SlotResult.failed
    assert "No space" in result.why
    given_up(world, main, "No space")


def test_given_up_when_the_trainer_does_not_want_it(world: World) -> None:
    slot = world.trainer().slots[0]
    put(slot, PLAN)
    slot.seal(job(world.storage, world_size=2))
    world.steps()
    slot.abandon()
    given_up(world, slot, "", SlotResult.abandoned)
    put(slot, PLAN)
    slot.seal(job(world.storage, step=2))
    slot.abandon()
    given_up(world, slot, "", SlotResult.abandoned)


def test_a_full_disk_fails_the_save_and_frees_the_slot(world: World) -> None:
    slot = world.trainer().slots[0]
    put(slot, PLAN)
    slot.seal(job(world.storage))
    with failing("write", 28):
        world.steps()
    result = slot.result(1)
    assert result is not None
    assert result.result is SlotResult.failed
    assert "No space" in result.why
    put(slot, PLAN)
    slot.seal(job(world.storage, 2))
    world.steps()
    result = slot.result(2)
    assert result is not None
    assert result.result is SlotResult.committed
    assert world.service.health()["last_error"]


def test_a_storage_that_does_not_answer_at_the_commit_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = world.trainer().slots[0]
    put(slot, PLAN)
    slot.seal(job(world.storage))
    with monkeypatch.context() as patch:
        patch.setattr(commit, "finish", lambda inside: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        world.steps()
    assert slot.state is State.written
    world.clock.advance(1.0)
    world.steps()
    result = slot.result(1)
    assert result is not None
    assert result.result is SlotResult.committed


def test_a_damaged_slot_is_told_and_freed(world: World) -> None:
    slot = world.trainer().slots[0]
    put(slot, PLAN)
    slot.seal(job(world.storage))
    slot._view[4096] ^= 1
    world.steps()
    result = slot.result(1)
    assert result is not None
    assert result.result is SlotResult.failed
    assert "checksum" in result.why
    assert not world.storage.exists()


def test_retention_that_fails_costs_no_checkpoint(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(keeping.catalog, "remove", fail)
    for step in (1, 2):
        slot = world.trainer(attempt=step).slots[0]
        put(slot, PLAN)
        slot.seal(job(world.storage, step, keep=KeepRules(last=1)))
        world.steps()
    result = slot.result(1)
    assert result is not None
    assert result.result is SlotResult.committed
    assert "Input/output" in result.why


@pytest.mark.parametrize("is_trainer_dead", [False, True])
def test_what_went_for_the_experiments_quota_is_told(world: World, tmp_path: Path, is_trainer_dead: bool) -> None:
    """By the trainer, who gets it with the outcome, or by the writer in its place."""
    neighbour, mine = (tmp_path / "runs" / "digits" / run / "checkpoints" for run in ("r0", "r1"))
    slab = world.trainer()
    (slot, _) = slab.slots
    for step in (1, 2):
        put(slot, PLAN)
        slot.seal(job(neighbour, step, run="r0"))
        world.steps()
    size = scan(Storage(str(neighbour))).committed[0].size_bytes
    put(slot, PLAN)
    keep = KeepRules(last=0, quota_bytes=2 * size + 100)
    slot.seal(job(mine, 3, keep=keep, spools=str(tmp_path / "spools")))
    if is_trainer_dead:
        slab.stop_filling()
    world.steps()
    assert [manifest.step for manifest in scan(Storage(str(neighbour))).committed] == [2]
    result = slot.result(3)
    assert result is not None
    assert "r0/step_00000001-a1" in result.for_quota
    told = b"".join(file.read_bytes() for file in (tmp_path / "spools").rglob("*") if file.is_file())
    assert (b"checkpoint-quota" in told) == is_trainer_dead


def test_what_no_rule_keeps_is_deleted_and_told(world: World) -> None:
    slot = world.trainer().slots[0]
    for step in (1, 2, 3):
        put(slot, PLAN)
        slot.seal(job(world.storage, step, keep=KeepRules(last=2)))
        world.steps()
    result = slot.result(3)
    assert result is not None
    assert result.deleted == ("step_00000001-a1",)
    assert json.loads((world.storage / "latest.json").read_text())["name"] == "step_00000003-a1"


def test_a_member_that_died_is_followed_by_another_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the write, in the middle of it, after the receipt, after the commit: each time the other one ends it, and
    what was ended is not written again."""
    other = world.member()
    real = writer.write_job
    for step, dies_at in enumerate(("writing", "written", "free"), start=1):
        slot = world.trainer(attempt=step).slots[0]
        put(slot, PLAN, seed=step)
        slot.seal(job(world.storage, step))
        with monkeypatch.context() as patch:
            patch.setattr(slab_file.Slot, "_become", dying(dies_at))
            with pytest.raises(Died):
                world.steps()
        forget(world.service)
        with monkeypatch.context() as patch:
            written = Mock(side_effect=real)
            patch.setattr(writer, "write_job", written)
            world.steps(other)
        outcome = slot.result(slot.generation)
        assert outcome is not None
        assert outcome.result is SlotResult.committed
        assert is_whole(world.storage / outcome.name, PLAN, seed=step)
        assert not verify_damages(world, outcome.name)
        assert written.call_count == (1 if dies_at == "writing" else 0)


class Died(BaseException):
    pass


def dying(at: str) -> Callable[[slab_file.Slot, State], None]:
    real = slab_file.Slot._become

    def become(slot: slab_file.Slot, state: State) -> None:
        if state.name == at:
            raise Died
        real(slot, state)

    return become


def forget(service: WriterService) -> None:
    """As the kernel does with the locks of the dead."""
    for held in service._held.values():
        held.slab.release(held.slot.index)
    service._held.clear()


def test_the_dead_trainers_sealed_save_is_committed_and_told(world: World, tmp_path: Path) -> None:
    from orchestrator.tracking.spool import SpoolReader, spools

    slab = world.trainer()
    for slot, is_sealed in zip(slab.slots, (True, False), strict=True):
        put(slot, PLAN)
        if is_sealed:
            slot.seal(job(world.storage, 5, spools=str(tmp_path / "spools")))
    slab.stop_filling()
    world.steps()
    assert [manifest.step for manifest in scan(Storage(str(world.storage))).committed] == [5]
    assert [slot.state for slot in slab.slots] == [State.free, State.free]
    (spool,) = spools(tmp_path / "spools")
    reader = SpoolReader(spool)
    assert (reader.owner.run, reader.owner.attempt, reader.is_owned()) == ("r1", 1, False)
    assert b"step_00000005-a1" in b"".join(file.read_bytes() for file in spool.rglob("*") if file.is_file())
    reader.close()


def test_a_living_trainer_tells_its_record_itself(world: World, tmp_path: Path) -> None:
    slot = world.trainer().slots[0]
    put(slot, PLAN)
    slot.seal(job(world.storage, spools=str(tmp_path / "spools")))
    world.steps()
    assert not (tmp_path / "spools").exists()


def test_memory_stays_warm_for_the_next_attempt(world: World) -> None:
    slab = world.trainer()
    path = slab.path
    slab.stop_filling()
    world.clock.advance(1.0)
    world.steps()
    again = world.trainer(attempt=2)
    assert again.path == path
    assert again.owner.attempt == 2
    other = world.trainer(rank=1)
    assert other.path != path


def test_what_was_given_is_not_given_again_before_it_is_taken(world: World) -> None:
    first = world.trainer(fills=False)
    second = world.trainer(rank=1, fills=False)
    assert first.path != second.path
    world.clock.advance(PROMISE)
    assert world.trainer(rank=2).path in (first.path, second.path)


def test_orphans_are_removed_after_a_while_and_nothing_else_is(world: World) -> None:
    mine, orphan, sealed = world.trainer(0), world.trainer(1), world.trainer(2)
    put(sealed.slots[0], PLAN)
    sealed.slots[0].seal(job(world.storage, world_size=3, wait_for_ranks=1e6))
    for slab in (orphan, sealed):
        slab.stop_filling()
    world.steps()
    world.clock.advance(ORPHAN + 1)
    world.steps()
    assert (mine.path.exists(), orphan.path.exists()) == (True, False)
    assert sealed.path.exists() or sealed.slots[0].result(1) is not None


def test_memory_is_given_within_its_limits(world: World) -> None:
    world.service._memory_bytes = slab_file.slab_bytes(2, slot_bytes_for(PLAN[0])) + slot_bytes_for(PLAN[0]) + 4096
    first = world.trainer(0)
    owner = owner_json(Owner(run="r1", attempt=1, rank=1, pid=1))
    second = world.service.lease(slot_bytes_for(PLAN[0]), owner)
    assert second["slots"] == 1
    slab = SlabFile(Path(second["slab"]))
    assert slab.fill()
    assert slab.slot_count == 1
    world.slabs.append(slab)
    assert world.service.lease(slot_bytes_for(PLAN[0]), owner) == {"slab": "", "slots": 0}
    assert world.service.health()["refused"] == 1
    first.stop_filling()
    world.clock.advance(1.0)
    large = world.service.lease(slot_bytes_for(PLAN[0]) + 4096, owner, slots=1)
    assert large["slots"] == 1
    assert not first.path.exists(), "an orphan makes room for another size"


def test_memory_that_is_not_there_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    is_taken = threading.Event()

    def fail(slab: SlabFile) -> None:
        is_taken.wait(10)
        raise OSError(28, "no memory")

    monkeypatch.setattr(slab_file, "populate", fail)
    slab = world.trainer()
    is_taken.set()
    wait_until(lambda: slab.is_refused() and slab.is_gone())
    assert not slab.is_ready()


def test_only_one_member_serves_and_the_next_takes_over(world: World) -> None:
    other = world.member()
    assert (world.service.number, other.number) == (0, 1)
    other.step(0.0)
    assert (world.service.is_serving, other.is_serving) == (True, False)
    with pytest.raises(ConnectionError):
        other.lease(8192, owner_json(Owner(run="r", attempt=1, rank=0, pid=1)))
    world.members.remove(world.service)
    world.service.close()
    other.step(0.0)
    assert other.is_serving
    world.service = other
    assert world.member().number == 0


def test_a_damaged_slab_is_removed_and_half_a_one_too(world: World) -> None:
    path = world.root / "slabs" / "0123.slab"
    path.write_bytes(b"x" * 5000)
    half = world.root / "slabs" / "0124.new"
    half.write_bytes(b"")
    os.utime(half, (0, 0))
    world.steps()
    assert not path.exists()
    assert not half.exists()


def test_the_writers_side_never_imports_torch() -> None:
    modules = "service writer slab image job commit catalog manifest retention memory pointers keeping local.process"
    code = "; ".join(f"import orchestrator.checkpoints.{name}" for name in [*modules.split(), "local.client"])
    heavy = "torch ray redis sqlalchemy mlflow"
    code += f"; import sys; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class failing:
    """Every call of disk.py of one kind raises."""

    def __init__(self, kind: str, number: int) -> None:
        self._kind, self._number = kind, number

    def __enter__(self) -> None:
        disk.watch(self._raise)

    def __exit__(self, *_: object) -> None:
        disk.watch(None)

    def _raise(self, call: str, path: str) -> None:
        if call == self._kind:
            raise OSError(self._number, os.strerror(self._number), path)


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)
