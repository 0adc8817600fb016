"""The file that a trainer fills and a writer empties: states, locks, and what is noticed when it is damaged."""

from __future__ import annotations

import gc
import multiprocessing
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints.job import Outcome, SlotResult
from orchestrator.checkpoints.slab import Owner, Ready, SlabDamaged, SlabFile, State, slot_bytes_for
from tests.plugins.slab_saves import content, job, plan, put

OWNER = Owner(run="r1", attempt=1, rank=0, pid=os.getpid())
DONE = Outcome(save="", name="", result=SlotResult.committed)


def made(directory: Path, *, slots: int = 2, slot_bytes: int = 0) -> Path:
    path = directory / f"{uuid.uuid4().hex}.slab"
    slab_file.create(path, slots=slots, slot_bytes=slot_bytes or slot_bytes_for(plan()[0]), owner=OWNER)
    return path


@pytest.fixture
def slab(tmp_path: Path) -> Iterator[SlabFile]:
    slab = SlabFile(made(tmp_path))
    yield slab
    slab.close()


def test_what_is_sealed_is_found_again(slab: SlabFile) -> None:
    first, second = slab.slots
    assert (first.state, second.state) == (State.free, State.free)
    assert put(first, plan(), seed=1) == 1
    assert first.state is State.filling
    first.seal(job("/somewhere", 7))
    assert (first.state, second.state) == (State.sealed, State.free)
    layout, found = first.job()
    assert (layout, found) == (plan()[0], job("/somewhere", 7))
    for image, source, head in zip(layout.images, first.images(layout), plan()[1], strict=True):
        expected = head + b"".join(content(piece.name, piece.size_bytes, 1) for piece in image.pieces)
        assert b"".join(map(bytes, source.chunks())) == expected


def test_images_lie_at_pages_of_memory(slab: SlabFile) -> None:
    import numpy as np

    put(slab.slots[1], plan())
    images = slab.slots[1].images(plan()[0])
    assert len(images) == 2
    assert all(np.frombuffer(next(image.chunks()), np.uint8).ctypes.data % 4096 == 0 for image in images)


def test_a_slot_is_used_again_and_each_filling_has_its_own_result(slab: SlabFile) -> None:
    slot = slab.slots[0]
    for step in (1, 2, 3):
        generation = put(slot, plan(), seed=step)
        assert generation == step
        slot.seal(job("/s", step))
        assert slot.result(generation) is None
        slot.begin_writing()
        slot.is_written()
        outcome = Outcome(save=slot.save, name=f"s{step}", result=SlotResult.committed, deleted=("a", "b"))
        slot.free(outcome)
        assert (slot.state, slot.result(generation)) == (State.free, outcome)
        assert slot.result(generation - 1) is None


def test_two_slots_hold_two_generations_at_once(slab: SlabFile) -> None:
    for step, slot in enumerate(slab.slots, start=1):
        put(slot, plan(), seed=step)
        slot.seal(job("/s", step))
    assert [slot.job()[1].name for slot in slab.slots] == ["step_00000001-a1", "step_00000002-a1"]


def test_the_layout_of_a_slot_may_change(slab: SlabFile) -> None:
    slot = slab.slots[0]
    put(slot, plan())
    slot.seal(job("/s", 1))
    slot.free(DONE)
    put(slot, plan(count=3))
    slot.seal(job("/s", 2))
    assert slot.job()[0] == plan(count=3)[0]
    slot.free(DONE)
    slot.begin()
    with pytest.raises(ValueError, match="do not fit"):
        slot.write_layout(*plan(count=700))


def test_a_job_larger_than_its_room_lies_beside_the_slab(slab: SlabFile) -> None:
    slot = slab.slots[0]
    large = replace(job("/s", 1), content="x" * 400_000)
    put(slot, plan())
    slot.seal(large)
    (beside,) = slab.path.parent.glob("*.job")
    assert slot.job()[1] == large
    damaged = bytearray(beside.read_bytes())
    damaged[200_000] ^= 1
    beside.write_bytes(damaged)
    with pytest.raises(SlabDamaged, match="checksum"):
        slot.job()
    slot.free(DONE)
    assert not list(slab.path.parent.glob("*.job"))


def test_a_state_that_is_torn_promises_nothing(slab: SlabFile) -> None:
    slot = slab.slots[0]
    put(slot, plan())
    slot.seal(job("/s", 1))
    for word in (State.sealed.value, State.sealed.value << 32, 2**64 - 1, slab_file._word(9)):
        slot._words[0] = word
        assert slot.state is State.filling
    slot._words[0] = slab_file._word(State.sealed)
    assert slot.state is State.sealed


def test_a_result_that_is_torn_is_no_result(slab: SlabFile) -> None:
    slot = slab.slots[0]
    generation = put(slot, plan())
    slot.seal(job("/s", 1))
    slot.free(replace(DONE, why="it was"))
    at = slab_file._RESULT // 8
    right = slot._words[at]
    slot._words[at] = right ^ 1
    assert slot.result(generation) is None
    slot._words[at] = right
    slot._view[slab_file._OUTCOME_AT + 12] ^= 1
    assert slot.result(generation) is None


def test_every_byte_of_what_was_sealed_is_checked(slab: SlabFile) -> None:
    slot = slab.slots[0]
    put(slot, plan())
    slot.seal(job("/s", 1))
    meta_at = 4096 + slab_file.rounded_up(len(plan()[0].encode()))
    covered = [
        *range(16, 24), *range(64, 124), *range(4096, 4096 + len(plan()[0].encode())),
        *range(meta_at, meta_at + len(job("/s", 1).encode())),
    ]  # fmt: skip
    for at in covered:
        slot._view[at] ^= 0x40
        with pytest.raises(SlabDamaged):
            slot.job()
        slot._view[at] ^= 0x40
    slot.job()


def test_every_byte_of_the_first_page_is_checked(tmp_path: Path) -> None:
    path = made(tmp_path)
    page = path.read_bytes()[:4096]
    ready = range(32, 48)  # two states of it are right
    with path.open("r+b") as file:
        for at in set(range(4096)) - set(ready):
            file.seek(at)
            file.write(bytes([page[at] ^ 0x10]))
            file.flush()
            with pytest.raises(SlabDamaged):
                SlabFile(path)
            file.seek(at)
            file.write(page[at : at + 1])
            file.flush()
    SlabFile(path).close()


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 8192, 20000])
def test_a_slab_cut_short_is_noticed(tmp_path: Path, size: int) -> None:
    path = made(tmp_path)
    os.truncate(path, size)
    with pytest.raises(SlabDamaged):
        SlabFile(path)


def test_one_under_another_name_or_of_another_boot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path)
    other = path.rename(tmp_path / f"{uuid.uuid4().hex}.slab")
    with pytest.raises(SlabDamaged, match="name"):
        SlabFile(other)
    path = made(tmp_path)
    monkeypatch.setattr(slab_file, "boot_id", lambda: b"b" * 16)
    with pytest.raises(SlabDamaged, match="started"):
        SlabFile(path)


def test_words_of_readiness(slab: SlabFile) -> None:
    assert not slab.is_ready()
    assert not slab.is_refused()
    slab_file.populate(slab)
    slab.tell(Ready.ready)
    assert slab.is_ready()
    assert not slab.is_refused()
    slab.tell(Ready.refused)
    assert slab.is_refused()
    assert not slab.is_ready()
    assert os.stat(slab.path).st_blocks * 512 >= slab.size_bytes


def test_another_trainer_gets_it_warm(slab: SlabFile) -> None:
    put(slab.slots[0], plan())
    slab.slots[0].cancel()
    slab.tell(Ready.ready)
    slab.hand_over(Owner(run="r1", attempt=2, rank=0, pid=1))
    again = SlabFile(slab.path)
    assert (again.owner.attempt, again.is_ready()) == (2, True)
    assert again.slots[0].begin() == 2, "a generation is never used twice"
    again.close()


def test_locks_within_one_process(slab: SlabFile) -> None:
    """Trainer and writer in one process: the kernel would grant both everything."""
    writer = SlabFile(slab.path)
    assert not writer.has_filler()
    assert slab.fill()
    assert writer.has_filler()
    assert not writer.fill()
    assert writer.try_claim(0)
    assert not slab.try_claim(0)
    assert slab.try_claim(1)
    writer.release(0)
    writer.close()
    assert slab.has_filler(), "closing one must not cost the other its lock"
    assert seen_from_outside(slab.path) == (True, False, True)
    slab.stop_filling()
    assert seen_from_outside(slab.path) == (False, False, True)


def test_a_removed_slab_is_not_filled(slab: SlabFile) -> None:
    slab_file.remove(slab.path)
    assert slab.is_gone()
    assert not slab.fill()


def test_a_forked_child_may_not_fill(slab: SlabFile) -> None:
    assert slab.fill()
    assert slab.is_mine()
    pid = os.fork()
    if pid == 0:
        slab.close()  # a DataLoader's worker at its end
        os._exit(1 if slab.is_mine() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert seen_from_outside(slab.path)[0], "a child's end must not cost the trainer its lock"


def test_a_view_that_outlived_an_earlier_opening_does_not_take_the_locks_with_it(tmp_path: Path) -> None:
    path = made(tmp_path)
    first = SlabFile(path)
    assert first.fill()
    view = memoryview(first.mapping)
    first.close()
    again = SlabFile(path)
    assert again.fill()
    again.slots[0].begin()
    view.release()
    del view, first
    gc.collect()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if SlabFile(path).has_filler() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    again.close()
    assert not slab_file._lingering


def test_the_end_of_a_process_gives_its_locks_back(slab: SlabFile) -> None:
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(slab.path, theirs))
    process.start()
    assert ours.recv() == "held"
    assert slab.has_filler()
    assert not slab.try_claim(0)
    assert not slab.fill()
    process.kill()
    process.join()
    assert not slab.has_filler()
    assert slab.try_claim(0)
    assert slab.fill()


def test_what_nobody_can_open_is_removed_unless_it_is_locked(tmp_path: Path) -> None:
    path = made(tmp_path)
    slab = SlabFile(path)
    assert not slab_file.remove_unused(path), "open in this process"
    slab.close()
    os.truncate(path, 100)
    assert slab_file.remove_unused(path)
    assert not path.exists()


def test_sizes_follow_the_layout() -> None:
    small, large = slot_bytes_for(plan()[0]), slot_bytes_for(plan(size=1 << 20)[0])
    assert small % 4096 == 0
    assert large % (2 << 20) == 0
    assert large > plan(size=1 << 20)[0].size_bytes
    assert struct.calcsize("hhqqi4x") == 32


def seen_from_outside(path: Path) -> tuple[bool, bool, bool]:
    """Filler, slot 0 and slot 1: locked? As another process sees it."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_look, args=(path, theirs))
    process.start()
    seen = ours.recv()
    process.join()
    return seen


def _look(path: Path, connection: Connection) -> None:
    slab = SlabFile(path)
    connection.send((slab.has_filler(), *(not slab.try_claim(index) for index in (0, 1))))
    os._exit(0)


def _hold(path: Path, connection: Connection) -> None:
    slab = SlabFile(path)
    assert slab.fill()
    assert slab.try_claim(0)
    connection.send("held")
    connection.recv()
