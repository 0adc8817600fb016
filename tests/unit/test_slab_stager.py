"""Saving through shared memory: what is saved is what was there at the return, however training goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.image import SIZES, TensorSpec
from orchestrator.checkpoints.job import Layout, SlotResult
from orchestrator.checkpoints.plan import layout
from orchestrator.checkpoints.slab import Owner, SlabFile, slot_bytes_for
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager
from tests.plugins.slab_saves import job
from tests.plugins.thread_writer import ThreadWriter, slab_root
from tests.unit.test_staging import peak_bytes

OWNER = Owner(run="r1", attempt=1, rank=0, pid=os.getpid())
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.complex64: "C64",
}  # fmt: skip


@pytest.fixture
def root() -> Iterator[Path]:
    with slab_root() as root:
        yield root


@pytest.fixture
def writer(root: Path) -> Iterator[ThreadWriter]:
    writer = ThreadWriter(root)
    yield writer
    writer.close()


@pytest.fixture
def stager(writer: ThreadWriter) -> Iterator[SlabStager]:
    stager = made(writer, [])
    yield stager
    stager.close()


def made(writer: object, said: list[tuple[str, str]], slots: int = 2) -> SlabStager:
    return SlabStager(
        writer, owner=OWNER, fallback=DirectStager(), tell=lambda event, why: said.append((event, why)), slots=slots
    )  # type: ignore[arg-type]


def planned(tensors: Sequence[torch.Tensor]) -> tuple[Layout, tuple[bytes, ...], list[torch.Tensor]]:
    """Layout, heads, and the tensors in the order of the pieces. Names are t0, t1 …"""
    specs = [
        TensorSpec(f"t{n}", NAMES[t.dtype], tuple(t.shape), t.nbytes, is_shared=True) for n, t in enumerate(tensors)
    ]
    made, heads = layout({"model": specs}, {f"model/{spec.name}": 0 for spec in specs}, 0, 1)
    ordered = [tensors[int(piece.name[1:])] for image in made.images for piece in image.pieces]
    return made, heads, ordered


def states() -> list[torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(64, 48)
    return [
        base, base.t(), base[:, ::3], torch.tensor(3.5), torch.empty(0, 4), torch.arange(7),
        torch.randn(5).to(torch.bfloat16), torch.randn(3, 3).to(torch.float8_e4m3fn), torch.tensor([True, False, True]),
        torch.randn(4, dtype=torch.complex64).conj(), torch.randn(9, dtype=torch.float64),
        torch.tensor(5, dtype=torch.int8), torch.randn(8, requires_grad=True), torch.nn.Parameter(torch.randn(2, 2)),
    ]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(storage: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(storage / f"step_{step:08d}-a1" / "model/model-00001-of-00001.safetensors")


def test_what_changes_after_the_return_is_not_saved(writer: ThreadWriter, stager: SlabStager, tmp_path: Path) -> None:
    tensors = states()
    what = planned(tensors)
    stager.expect(*what[:2])
    reservation = stager.reserve(*what[:2], patience=10)
    assert reservation is not None
    assert not reservation.is_direct
    reservation.fill(what[2])
    reservation.seal(job(tmp_path, 1))
    before = [bits(tensor) for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.dtype is torch.bool:
                tensor.logical_not_()
            elif tensor.dtype is torch.float8_e4m3fn:
                tensor.zero_()
            else:
                tensor.add_(1)
    writer.start()
    assert stager.wait(job(tmp_path, 1).save, 20).result is SlotResult.committed
    found = saved(tmp_path, 1)
    assert [bits(found[f"t{n}"]) for n in range(len(tensors))] == before
    assert [found[f"t{n}"].shape for n in range(len(tensors))] == [tensor.shape for tensor in tensors]
    assert before != [bits(tensor) for tensor in tensors]


def test_many_saves_in_turn_each_have_their_own_bits(writer: ThreadWriter, stager: SlabStager, tmp_path: Path) -> None:
    writer.start()
    tensors = [torch.zeros(1000) for _ in range(20)]
    what = planned(tensors)
    for step in range(1, 13):
        for number, tensor in enumerate(tensors):
            tensor.fill_(step * 100 + number)
        reservation = stager.reserve(*what[:2], patience=10)
        assert reservation is not None
        assert not reservation.is_direct
        reservation.fill(what[2])
        reservation.seal(job(tmp_path, step))
    assert stager.wait(f"{12:032x}", 20).result is SlotResult.committed
    others = [*stager.outcomes()]
    deadline = time.monotonic() + 20  # of two saves in hand the later one may be written first
    while len(others) < 11 and time.monotonic() < deadline:
        others += stager.outcomes()
    assert sorted(int(each.save, 16) for each in others) == list(range(1, 12)), "each outcome once"
    assert stager.outcomes() == []
    for step in range(1, 13):
        found = saved(tmp_path, step)
        assert all(bool((found[f"t{n}"] == step * 100 + n).all()) for n in range(20))


def test_without_a_free_slot_there_is_none(writer: ThreadWriter, stager: SlabStager, tmp_path: Path) -> None:
    what = planned([torch.ones(10)])
    for step in (1, 2):
        reservation = stager.reserve(*what[:2], patience=5)
        assert reservation is not None
        reservation.fill(what[2])
        reservation.seal(job(tmp_path, step))
    assert stager.reserve(*what[:2], patience=0) is None
    begun = time.monotonic()
    assert stager.reserve(*what[:2], patience=0.05) is None
    assert time.monotonic() - begun >= 0.05
    with pytest.raises(TimeoutError):
        stager.wait(f"{1:032x}", 0.01)
    writer.start()
    assert stager.reserve(*what[:2], patience=20) is not None


def test_what_is_abandoned_is_free_again(writer: ThreadWriter, stager: SlabStager) -> None:
    what = planned([torch.ones(10)])
    for _ in range(5):
        reservation = stager.reserve(*what[:2], patience=5)
        assert reservation is not None
        reservation.fill(what[2])
        reservation.abandon()
    assert stager.outcomes() == []


def test_another_layout_takes_other_memory(writer: ThreadWriter, stager: SlabStager, tmp_path: Path) -> None:
    """Adam's state comes with the first step: the second save is larger."""
    writer.start()
    for step, size in ((1, 1000), (2, 400_000), (3, 1000)):
        tensors = [torch.full((size,), float(step))]
        what = planned(tensors)
        reservation = stager.reserve(*what[:2], patience=10)
        assert reservation is not None
        assert not reservation.is_direct
        reservation.fill(what[2])
        reservation.seal(job(tmp_path, step))
        assert stager.wait(f"{step:032x}", 20).result is SlotResult.committed
        assert bool((saved(tmp_path, step)["t0"] == step).all())
        assert len(saved(tmp_path, step)["t0"]) == size
    assert writer.service.health()["slab_bytes"] > 0


def test_memory_that_comes_slowly_and_too_small_is_waited_for_and_asked_for_again(
    writer: ThreadWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = writer.lease

    def slow(slot_bytes: int, owner: Owner, *, slots: int = 2) -> SlabFile | None:
        time.sleep(0.3)
        return lease(slot_bytes, owner, slots=slots)

    monkeypatch.setattr(writer, "lease", slow)
    said: list[tuple[str, str]] = []
    stager = made(writer, said)
    stager.expect(*planned([torch.ones(10)])[:2])
    what = planned([torch.ones(1 << 18)])
    reservation = stager.reserve(*what[:2], patience=0.0)
    assert reservation is not None
    assert (reservation.is_direct, said) == (False, [])
    reservation.abandon()
    stager.close()


def test_what_is_expected_is_prepared_before_the_first_save(writer: ThreadWriter, stager: SlabStager) -> None:
    """Views and layout of both slots, also when the layout changes within the memory that is there."""
    first, other = planned([torch.ones(2000)]), planned([torch.ones(1000), torch.ones(500)])
    for what in (first, other):
        stager.expect(*what[:2])
        reservation = stager.reserve(*what[:2], patience=10)
        assert reservation is not None
        reservation.abandon()
        lease = stager._lease
        assert lease is not None
        stager._end_preparing()
        assert {index for index, signature in lease._places if signature == what[0].signature} == {0, 1}
        if what is first:
            assert lease._written == {0: what[0].signature, 1: what[0].signature}


def test_with_one_slot_a_save_is_skipped_or_waits_while_it_is_full(writer: ThreadWriter, tmp_path: Path) -> None:
    tensors = [torch.ones(300_000)]
    what = planned(tensors)
    writer.service._memory_bytes = int(1.5 * slot_bytes_for(what[0]))
    said: list[tuple[str, str]] = []
    stager = made(writer, said)
    first = stager.reserve(*what[:2], patience=10)
    assert first is not None
    assert not first.is_direct
    first.fill(what[2])
    first.seal(job(tmp_path, 1))
    assert stager.reserve(*what[:2], patience=0) is None
    writer.start()
    second = stager.reserve(*what[:2], patience=20)
    assert second is not None
    tensors[0].fill_(2)
    second.fill(what[2])
    second.seal(job(tmp_path, 2))
    assert stager.wait(f"{2:032x}", 20).result is SlotResult.committed
    assert [float(saved(tmp_path, step)["t0"][0]) for step in (1, 2)] == [1.0, 2.0]
    assert said == []
    stager.close()


def test_tensors_of_another_type_are_refused(writer: ThreadWriter, stager: SlabStager) -> None:
    what = planned([torch.ones(10)])
    reservation = stager.reserve(*what[:2], patience=5)
    assert reservation is not None
    reservation.fill(what[2])
    with pytest.raises(ValueError, match="80 bytes"):
        reservation.fill([torch.ones(10, dtype=torch.float64)])
    with pytest.raises(ValueError, match="int32"):
        reservation.fill([torch.ones(10, dtype=torch.int32)])
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        reservation.fill([torch.ones(2, 5)])
    with pytest.raises(ValueError, match="tensors"):
        reservation.fill([])
    reservation.abandon()


def test_without_memory_saves_are_direct_and_it_is_said_once(root: Path, writer: ThreadWriter, tmp_path: Path) -> None:
    writer.service._memory_bytes = 1
    said: list[tuple[str, str]] = []
    stager = made(writer, said)
    what = planned([torch.ones(10)])
    for step in (1, 2):
        reservation = stager.reserve(*what[:2], patience=0)
        assert reservation is not None
        assert reservation.is_direct
        reservation.fill(what[2])
        reservation.seal(job(tmp_path, step))
        assert stager.wait(f"{step:032x}", 0).result is SlotResult.durable
    assert [event for event, _ in said] == ["checkpoint-writer-missing"]
    assert "no memory" in said[0][1]
    stager.close()


def test_with_too_little_memory_a_state_is_streamed(root: Path, writer: ThreadWriter, tmp_path: Path) -> None:
    """A budget of an eighth of it: nothing of the state's size is taken anywhere, in shared memory or of our own."""
    size = 64 << 20
    tensors = [torch.randn(size // 16), torch.randn(size // 32, 4).t(), torch.randn(size // 32, 4)[:, ::2]]
    what = planned(tensors)
    writer.service._memory_bytes = size // 8
    pid = os.fork()  # the peak of a process begins anew with it
    if pid == 0:
        try:
            stager = SlabStager(
                writer, owner=OWNER, fallback=DirectStager(window_bytes=1 << 20), tell=lambda event, why: None
            )  # type: ignore[arg-type]
            peaks = []
            for step, each in ((1, planned([tensor[:2] for tensor in tensors])), (2, what)):
                reservation = stager.reserve(*each[:2], patience=5)
                assert reservation is not None
                reservation.fill(each[2])
                reservation.seal(job(tmp_path, step))
                peaks.append(peak_bytes())
            os._exit(0 if reservation.is_direct and peaks[1] - peaks[0] < size // 4 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sum(path.stat().st_size for path in (root / "slabs").iterdir()) <= size // 8
    found = saved(tmp_path, 2)
    assert all(torch.equal(found[f"t{n}"], tensor) for n, tensor in enumerate(tensors))


def test_without_a_writer_saves_are_direct(writer: ThreadWriter) -> None:
    writer.is_there = False
    said: list[tuple[str, str]] = []
    stager = made(writer, said)
    what = planned([torch.ones(10)])
    reservation = stager.reserve(*what[:2], patience=0)
    assert reservation is not None
    assert reservation.is_direct
    assert said == [("checkpoint-writer-missing", "no writer")]
    stager.close()


def test_a_forked_child_does_not_touch_its_parents_memory(writer: ThreadWriter, stager: SlabStager) -> None:
    what = planned([torch.ones(10)])
    reservation = stager.reserve(*what[:2], patience=5)
    assert reservation is not None
    pid = os.fork()
    if pid == 0:
        try:
            theirs = stager.reserve(*what[:2], patience=0)
            os._exit(0 if theirs is not None and theirs.is_direct else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    reservation.abandon()


def test_what_was_sealed_when_the_stager_closes_is_written(writer: ThreadWriter, tmp_path: Path) -> None:
    stager = made(writer, [])
    what = planned([torch.ones(10)])
    reservation = stager.reserve(*what[:2], patience=5)
    assert reservation is not None
    reservation.fill(what[2])
    reservation.seal(job(tmp_path, 1))
    stager.close()
    while writer.service.step(time.monotonic()):
        pass
    assert Storage(str(tmp_path)).exists("step_00000001-a1/MANIFEST.json")


def test_memory_that_is_taken_away_is_no_silence(
    writer: ThreadWriter, stager: SlabStager, tmp_path: Path, root: Path
) -> None:
    what = planned([torch.ones(10)])
    reservation = stager.reserve(*what[:2], patience=5)
    assert reservation is not None
    reservation.fill(what[2])
    reservation.seal(job(tmp_path, 1))
    for path in (root / "slabs").iterdir():
        path.unlink()
    assert stager.wait(f"{1:032x}", 1).result is SlotResult.failed
    again = stager.reserve(*what[:2], patience=5)
    assert again is not None
    assert not again.is_direct
    again.abandon()


def test_every_type_has_its_size() -> None:
    assert all(SIZES[name] == dtype.itemsize for dtype, name in NAMES.items())
