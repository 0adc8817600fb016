"""Storage, the trees and tensor files on it, and the manifest."""

from __future__ import annotations

import ast
import errno
import json
import os
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.backends.storage import Storage, UnsafePath
from orchestrator.checkpoints import tensorfile
from orchestrator.checkpoints.manifest import FileEntry, Manifest, UnknownFormat
from orchestrator.checkpoints.tree import NotStorable, from_inline, inline, pack, unpack
from orchestrator.errors import CheckpointCorrupt, ConfigError

torch.set_num_threads(1)


@pytest.fixture(params=["local", "pyarrow"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root") if request.param == "local" else "mock:///root")


# -- storage -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_listed(storage: Storage) -> None:
    storage.write_bytes("a/b/one", b"1")
    storage.write_bytes("a/two", b"22")
    storage.write_bytes("a/two", b"222")
    assert storage.read_bytes("a/two") == b"222"
    assert [(entry.name, entry.is_dir) for entry in storage.entries("a")] == [("b", True), ("two", False)]
    assert storage.entries("nowhere") == []
    assert storage.size_bytes("a/two") == 3
    assert storage.join("a").read_bytes("b/one") == b"1"


def test_deleting_is_complete_and_may_be_repeated(storage: Storage) -> None:
    storage.write_bytes("a/b/one", b"1")
    for _ in range(2):
        storage.delete("a/b/one")
        storage.delete_dir("a")
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/b/one")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "a\0b", "a\\b", "a/"])
def test_names_that_lead_out_are_refused(storage: Storage, path: str) -> None:
    for action in (storage.read_bytes, storage.delete, storage.delete_dir, storage.entries, storage.join, storage.uri):
        with pytest.raises(UnsafePath):
            action(path)
    with pytest.raises(UnsafePath):
        storage.write_bytes(path, b"")


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafePath):
        Storage(str(tmp_path / "root")).write_bytes("link/x", b"")


def test_the_root_itself_cannot_be_deleted(storage: Storage) -> None:
    with pytest.raises(UnsafePath):
        storage.delete_dir("")


def test_a_file_that_fails_halfway_is_not_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    def write_half() -> None:
        with storage.open_output("a") as output:
            output.write(b"half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_every_file_and_directory_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    Storage(str(tmp_path)).write_bytes("a/b/c", b"x")
    files = [path for path in synced if path.endswith(".partial")]
    assert len(files) == 1
    assert synced.index(files[0]) < len(synced) - 1, "the directory is synced after the file has its name"
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")} <= set(synced)


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    Storage(str(tmp_path / "a" / "b")).check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["/proc/no/such", "file", "nonsense://x"])
def test_storage_that_cannot_be_written_is_named(tmp_path: Path, url: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="storage.url"):
        Storage(str(tmp_path / "file" / "x") if url == "file" else url).check_writable()


def test_passwords_are_not_shown() -> None:
    storage = Storage("s3://key:secret@bucket/runs?region=eu-central-1")
    assert "secret" not in storage.uri("a/b") + repr(storage.join("c"))
    assert storage.uri("a/b") == "s3://key@bucket/runs/a/b?region=eu-central-1"


# -- trees ---------------------------------------------------------------------------------------------------

VALUES = {
    "numbers": [0, -1, 2**80, 0.1, -0.0, True, None, "text"],
    "extremes": [float("inf"), float("-inf")],
    "tuple": (1, (2.5, "x")),
    "int keys": {0: {"a": 1}, 1: {}},
    "dollar": {"$tensor": 1},
    "counter": Counter({3: 2, 7: 1}),
    "bytes": b"\0\xff",
    "torch": [torch.float16, torch.device("cpu")],
    "ordered": OrderedDict(b=1, a=2),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_the_same(name: str) -> None:
    raw = json.loads(json.dumps(pack(VALUES[name], inline), allow_nan=False))
    assert unpack(raw, from_inline) == VALUES[name]


def test_not_a_number_comes_back() -> None:
    assert np.isnan(unpack(pack(float("nan"), inline), from_inline))


@pytest.mark.parametrize("array", [np.arange(6, dtype="<u4").reshape(2, 3)[:, ::-1], np.array(2.5), np.zeros((0, 3))])
def test_arrays_come_back_the_same(array: np.ndarray) -> None:
    back = unpack(json.loads(json.dumps(pack(array, inline))), from_inline)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, np.array(["a"]), torch.zeros(2).to_sparse(), 1j])
def test_what_would_need_pickle_is_refused_by_name(value: Any) -> None:
    with pytest.raises(NotStorable, match=r"outer\.inner"):
        pack({"outer": {"inner": value}}, inline)


# -- tensor files --------------------------------------------------------------------------------------------


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "bytes": torch.arange(11, dtype=torch.uint8),
    }


def test_tensors_come_back_bit_for_bit_and_safetensors_opens_the_file(tmp_path: Path) -> None:
    tensors, storage = tensors_of_all_kinds(), Storage(str(tmp_path))
    with storage.open_output("t.safetensors") as output:
        entry = tensorfile.write(output, "t.safetensors", tensors)
    assert entry.size_bytes == storage.size_bytes("t.safetensors")
    with storage.open_input("t.safetensors") as source:
        ours = tensorfile.read(source, entry, "here")
    theirs = load_file(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        for back in (ours[name], theirs[name]):
            assert back.dtype == tensor.dtype
            assert back.shape == tensor.shape
            assert torch.equal(back, tensor)


def test_every_flipped_byte_of_a_tensor_file_is_noticed(tmp_path: Path) -> None:
    path, storage = tmp_path / "t", Storage(str(tmp_path))
    with storage.open_output("t") as output:
        entry = tensorfile.write(output, "t", tensors_of_all_kinds())
    good = path.read_bytes()
    positions = [*range(0, entry.head_bytes, 97), *range(entry.head_bytes, len(good))]
    for at in positions:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with storage.open_input("t") as source, pytest.raises(CheckpointCorrupt):
            tensorfile.read(source, entry, "here")
    for length in (0, 7, 100, entry.head_bytes, len(good) - 1):
        path.write_bytes(good[:length])
        with storage.open_input("t") as source, pytest.raises(CheckpointCorrupt):
            tensorfile.read(source, entry, "here")


# -- manifest ------------------------------------------------------------------------------------------------


def manifest(**changes: Any) -> Manifest:
    file = FileEntry(path="state.json", size_bytes=2, head_bytes=2, head_xxh3="00")
    plain: dict[str, Any] = {
        "run": "r", "name": "step_00000001-a1", "attempt": 1, "step": 1, "epoch": 0, "epoch_complete": True,
        "world_size": 2, "seed": 0, "config_hash": "", "created": 0.0, "duration": 0.5, "files": (file,),
    }  # fmt: skip
    return Manifest(**{**plain, **changes})


def test_a_manifest_comes_back_the_same_and_is_plain_json() -> None:
    before = manifest(metrics={"a": 1.5, "b": float("inf")}, reasons=("stop",))
    after = Manifest.decode(before.encode(), "here")
    assert after == before
    assert after.digest == before.digest
    raw = json.loads(before.encode(), parse_constant=pytest.fail)
    assert raw["cipher"] is None
    assert raw["key_id"] is None


def test_a_damaged_manifest_is_noticed_whatever_byte_it_is() -> None:
    before = manifest(metrics={"a": 1.5})
    good = before.encode()
    for at in range(len(good)):
        damaged = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        with suppress(CheckpointCorrupt):
            assert Manifest.decode(damaged, "here") == before, "only white space may change unnoticed"
    for length in [*range(0, len(good), 50), len(good) - 1]:
        with pytest.raises(CheckpointCorrupt):
            Manifest.decode(good[:length], "here")


def test_a_manifest_of_a_newer_version_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.checkpoints.manifest.PROTOCOL", 2)
    newer = manifest().encode()
    monkeypatch.undo()
    with pytest.raises(UnknownFormat, match="Upgrade"):
        Manifest.decode(newer, "here")


def test_no_pickle_is_ever_used() -> None:
    root = Path(__file__).parents[2] / "orchestrator"
    files = [
        *(root / "checkpoints").rglob("*.py"),
        *(root / "training").rglob("*.py"),
        root / "backends" / "storage.py",
    ]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, file
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve"} & set(names), file
