"""Writing from living tensors: the bytes, the window, and what is told when it fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit, plan, staging, writer
from orchestrator.checkpoints.image import TensorSpec
from orchestrator.checkpoints.job import Layout, SaveJob
from orchestrator.checkpoints.state import Snapshot, specs
from orchestrator.checkpoints.tree import raw

torch.set_num_threads(1)

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4).T,
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.empty(0, 3),
    "d": torch.tensor(7, dtype=torch.int64),
    "e": torch.tensor([True, False]),
    "f": (torch.ones(2, dtype=torch.complex64) * 1j).conj(),
    "g": torch.ones(3).to(torch.float8_e5m2),
    "h": torch.ones(1).expand(5),
    "i": torch.arange(6.0)[::4][:1],
}


def planned(tensors: dict[str, torch.Tensor]) -> tuple[Layout, tuple[bytes, ...], list[torch.Tensor]]:
    groups = specs(Snapshot(tensors={"model": tensors}, tree={}))
    layout, heads = plan.layout(groups, plan.owners(groups, 1), 0, 1, files={"notes": 3, "nothing": 0})
    files = {
        "side/notes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "side/nothing": torch.empty(0, dtype=torch.uint8),
    }
    ordered = [files.get(image.path, tensors.get(p.name)) for image in layout.images for p in image.pieces]
    return layout, heads, [tensor for tensor in ordered if tensor is not None]


def job(storage: Storage, rank: int = 0, world_size: int = 1) -> SaveJob:
    return SaveJob(
        save="0" * 32, storage_url=storage.url, name="step_00000001-a1", run="r", attempt=1, rank=rank,
        world_size=world_size, content={}, texts={"state.json": "{}"},
    )  # fmt: skip


def saved(storage: Storage, tensors: dict[str, torch.Tensor], window_bytes: int = 1 << 20) -> Path:
    layout, heads, ordered = planned(tensors)
    reservation = staging.DirectStager(window_bytes=window_bytes).reserve(layout, heads, patience=0)
    reservation.fill(ordered)
    reservation.seal(job(storage))
    return Path(storage.uri("step_00000001-a1"))


@pytest.mark.parametrize("window_bytes", [1, 8, 1 << 20])
def test_every_bit_is_as_it_is_in_memory(tmp_path: Path, window_bytes: int) -> None:
    directory = saved(Storage(str(tmp_path)), TENSORS, window_bytes)
    loaded = load_file(directory / "model" / "model-00001-of-00001.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert tensor.numel() == 0 or raw(tensor) == raw(loaded[name]), name
    assert (directory / "side" / "notes").read_bytes() == b"\x01\x02\x03"
    assert (directory / "side" / "nothing").read_bytes() == b""


def test_what_is_not_in_one_piece_goes_through_the_window(tmp_path: Path) -> None:
    """No copy of a whole tensor is made, let alone of the state."""
    window_bytes, size = 1 << 20, 48 << 20
    tensors = {
        "turned": torch.randn(size // 12, 3).T, "every other": torch.randn(size // 8, 2)[:, 0],
        "wide": torch.ones(1).expand(3, size // 12), "conj": torch.randn(size // 8, dtype=torch.complex64).conj(),
    }  # fmt: skip
    pid = os.fork()  # the largest size of a process begins anew with it
    if pid == 0:
        try:
            saved(Storage(str(tmp_path)), {name: tensor[..., :9] for name, tensor in tensors.items()}, window_bytes)
            before = peak_bytes()
            saved(Storage(str(tmp_path / "there")), tensors, window_bytes)
            os._exit(0 if peak_bytes() - before < 16 << 20 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    loaded = load_file(tmp_path / "there/step_00000001-a1/model/model-00001-of-00001.safetensors")
    assert all(torch.equal(loaded[name], tensor.resolve_conj()) for name, tensor in tensors.items())


def peak_bytes() -> int:
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index("VmHWM:") + 1])


def test_the_receipt_is_last_and_lists_what_was_written(tmp_path: Path) -> None:
    directory = saved(Storage(str(tmp_path)), TENSORS)
    receipt = commit.receipts(Storage(str(directory)))[0]
    assert {file.path: file.size_bytes for file in receipt.files} == {
        str(path.relative_to(directory)): path.stat().st_size
        for path in directory.rglob("*")
        if path.is_file() and path.name != "rank-0000.json"
    }


def test_a_tensor_that_changed_its_size_is_noticed(tmp_path: Path) -> None:
    layout, heads, ordered = planned(TENSORS)
    reservation = staging.DirectStager(Storage(str(tmp_path))).reserve(layout, heads, patience=0)
    reservation.fill([torch.ones(999), *ordered[1:]])
    with pytest.raises(ValueError, match="its layout says"):
        reservation.seal(job(Storage(str(tmp_path))))
    assert not list(tmp_path.rglob("rank-*.json"))


class Source:
    """Bytes in chunks that know nothing of tensors."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = data, step

    def chunks(self):  # type: ignore[no-untyped-def]
        for start in range(0, len(self._data), self._step):
            yield memoryview(self._data)[start : start + self._step]


@pytest.mark.parametrize("step", [1, 7, 4096, 4100, 1 << 20])
def test_hashes_do_not_depend_on_how_the_bytes_come(tmp_path: Path, step: int) -> None:
    groups = {"model": [TensorSpec(name, "U8", (size,), size, True) for name, size in (("x", 0), ("y", 5), ("z", 9))]}
    layout, heads = plan.layout(groups, plan.owners(groups, 1), 0, 1)
    storage = Storage(str(tmp_path))
    data = heads[0] + b"yyyyyzzzzzzzzz"
    receipt = writer.write_job(job(storage), layout, [Source(data, step)], storage)
    again = writer.write_job(job(storage), layout, [Source(data, 3)], storage)
    assert receipt.files == again.files
    assert (tmp_path / "step_00000001-a1" / "model" / "model-00001-of-00001.safetensors").read_bytes() == data


@pytest.mark.parametrize("data", [b"short", b"yyyyyzzzzzzzzz and more"])
def test_an_image_of_another_length_is_refused(tmp_path: Path, data: bytes) -> None:
    groups = {"model": [TensorSpec("y", "U8", (14,), 14, True)]}
    layout, heads = plan.layout(groups, plan.owners(groups, 1), 0, 1)
    storage = Storage(str(tmp_path))
    with pytest.raises(ValueError, match="layout"):
        writer.write_job(job(storage), layout, [Source(heads[0] + data, 4)], storage)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_rank_that_cannot_write_says_so_to_whoever_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    layout, heads, ordered = planned(TENSORS)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_job", no_space)
    reservation = staging.DirectStager(storage).reserve(layout, heads, patience=0)
    reservation.fill(ordered)
    with pytest.raises(OSError, match="No space"):
        reservation.seal(job(storage, rank=1, world_size=2))
    told = json.loads((tmp_path / "step_00000001-a1" / "rank-0001.failed.json").read_text())
    assert "No space" in told["why"]
    with pytest.raises(commit.CommitRefused, match="No space"):
        commit.finish(storage.join("step_00000001-a1"))
