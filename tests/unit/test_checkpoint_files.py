"""Storage, the trees and tensor files on it, and the manifest."""

from __future__ import annotations

import ast
import errno
import json
import os
import traceback
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from orchestrator import disk
from orchestrator.backends import storage as storage_module
from orchestrator.backends.storage import Storage, UnsafePath
from orchestrator.checkpoints import tensorfile
from orchestrator.checkpoints.image import SIZES, TensorSpec, file_entry, image, raw_image
from orchestrator.checkpoints.job import BestRule, KeepRules, Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.manifest import FileEntry, Manifest, TensorEntry, UnknownFormat
from orchestrator.checkpoints.policy import Direction
from orchestrator.checkpoints.tensorfile import NAMES
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


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root" / "inner")
    storage = Storage(str(tmp_path / "root"))
    storage.write_bytes("link/deeper/x", b"1")
    assert storage.read_bytes("inner/deeper/x") == b"1"
    (tmp_path / "root" / "inner" / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UnsafePath):
        storage.write_bytes("link/out/x", b"")


def test_a_hint_waits_for_no_disk(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    calls: list[str] = []
    disk.watch(lambda call, path: calls.append(call))
    try:
        storage.write_bytes("hint", b"1", is_durable=False)
        assert "fsync" not in calls
        storage.write_bytes("sure", b"1")
        assert "fsync" in calls
    finally:
        disk.watch(None)
    assert storage.read_bytes("hint") == b"1"


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


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://key:hushhush@bucket/x?nonsense=1", "nonsense"),
        ("s3://key:hush/hush@bucket/x?region=here", "has to be written as %2F"),
        ("s3://key:hush%2Fhush@bucket/x?region=here&connect_timeout=soon", "could not convert"),
        ("gs://user:hushhush@bucket/x", "takes its credentials from GOOGLE_APPLICATION_CREDENTIALS"),
        ("gcs://user:hushhush@bucket/x", "gs://bucket/path"),
        ("abfs://account/x?client_secret=hushhush", "abfs://container@account.dfs.core.windows.net/path"),
        ("abfss://c:hushhush@a.dfs.core.windows.net/x?client_secret=hushhush&foo=1", "AZURE_CLIENT_ID"),
        ("nonsense://key:hushhush@x", "Known are local paths"),
    ],
)
def test_a_url_that_cannot_be_opened_is_explained_without_its_password(url: str, what: str) -> None:
    with pytest.raises(ConfigError, match="storage.url") as raised:
        Storage(url)
    told = "".join(traceback.format_exception(raised.value))
    assert what in told
    assert "cannot be opened (" in told
    assert "hush" not in told


def test_what_a_url_hides_and_what_it_shows() -> None:
    for url, told in {
        "/a/b": "/a/b",
        "s3://bucket/runs": "s3://bucket/runs",
        "s3://key:secret@bucket/a@b?region=x&token=y": "s3://key@bucket/a@b?region=x&token=***",
        "abfs://container@a.dfs.core.windows.net/x?client_secret=y": (
            "abfs://container@a.dfs.core.windows.net/x?client_secret=***"
        ),
        "s3://key:sec/ret@bucket/x": "s3://key@bucket/x",
    }.items():
        assert storage_module.shown(url) == told


@pytest.mark.parametrize("error", [pyarrow.ArrowInvalid("no token"), pyarrow.ArrowException("no token")])
def test_what_pyarrow_raises_at_a_store_is_an_os_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Refusing:
        type_name = "abfs"

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: Any, **__: Any) -> Any:
                raise error

            return refuse

    storage = Storage("mock:///runs")
    storage._files = storage_module._RemoteFiles(Refusing())
    for ask in (
        storage.entries, storage.exists, storage.modified, lambda: list(storage.files()), lambda: storage.delete("a"),
        lambda: storage.delete_dir("a"), lambda: storage.read_bytes("a"), lambda: storage.write_bytes("a", b""),
    ):  # fmt: skip
        with pytest.raises(OSError, match="no token"):
            ask()
    with pytest.raises(ConfigError, match="cannot be written to"):
        storage.check_writable()


def test_google_is_not_asked_for_a_quarter_of_an_hour() -> None:
    assert storage_module._with_patience("gs://bucket/x") == "gs://bucket/x?retry_limit_seconds=60"
    assert storage_module._with_patience("gs://b/x?scheme=http") == "gs://b/x?scheme=http&retry_limit_seconds=60"
    for url in ("gs://b/x?retry_limit_seconds=5", "abfs://c@a.dfs.core.windows.net/x", "s3://bucket/x"):
        assert storage_module._with_patience(url) == url


@pytest.mark.parametrize("url", ["mock:///a/b/c", "LOCAL/a/b/c"])
def test_what_lies_above(url: str, tmp_path: Path) -> None:
    storage = Storage(url.replace("LOCAL", str(tmp_path)))
    storage.write_bytes("x", b"1")
    assert storage.parts[-2:] == ("b", "c")
    outer = storage.above(2)
    assert outer is not None
    assert outer.read_bytes("b/c/x") == b"1"
    assert outer.join("b", "c").uri() == storage.join("x").above(1).uri()  # type: ignore[union-attr]
    assert storage.above(50) is None


def test_entries_say_when_they_changed_and_storage_says_what_is_free(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "root"))
    assert storage.free_bytes(), "of the directory that is there"
    assert storage.modified() == 0.0
    storage.write_bytes("a/b/c", b"x")
    for path, when in (("a/b/c", 3000.0), ("a/b", 2000.0), ("a", 1000.0), (".", 500.0)):
        os.utime(tmp_path / "root" / path, (when, when))
    assert [(entry.name, entry.modified) for entry in storage.entries()] == [("a", 1000.0)]
    assert [entry.modified for entry in storage.entries("a/b")] == [3000.0]
    assert storage.modified() == storage.modified("a") == storage.modified("a/b/c") == 3000.0
    assert Storage("mock:///root").free_bytes() is None


def test_what_vanishes_while_it_is_listed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert [entry.name for entry in Storage(str(tmp_path)).entries()] == ["there"]


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path) -> None:
    """On NFS a client may remember for a while that there was none, or that there was one."""
    vanished: list[str] = []

    def remove_once(call: str, path: str) -> None:
        if call == "mkdir" and path.endswith("/b") and not vanished:
            vanished.append(path)
            os.rmdir(tmp_path / "a")

    disk.watch(remove_once)
    try:
        Storage(str(tmp_path)).write_bytes("a/b/c", b"x")
    finally:
        disk.watch(None)
    assert vanished
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"


def test_s3_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def file_system(**options: Any) -> str:
        made.append(options)
        return "s3"

    monkeypatch.setattr("orchestrator.backends.storage.arrow_fs.S3FileSystem", file_system)
    url = (
        "s3://key:se%2Fcret@bucket/some/runs?region=eu-central-1&scheme=http&endpoint_override=here:9&request_timeout=5"
        "&attempts=7"
    )
    assert storage_module._s3(url) == ("s3", "bucket/some/runs")
    (options,) = made
    assert (options["access_key"], options["secret_key"]) == ("key", "se/cret")
    assert (options["region"], options["scheme"], options["endpoint_override"]) == ("eu-central-1", "http", "here:9")
    assert (options["connect_timeout"], options["request_timeout"]) == (10.0, 5.0)
    assert options["retry_strategy"].max_attempts == 7
    assert storage_module._s3("s3://bucket/runs?region=x&allow_bucket_creation=true") is None, "pyarrow's own way"
    assert storage_module._s3("gs://bucket/runs") is None


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


def written(storage: Storage, path: str, tensors: dict[str, torch.Tensor]) -> FileEntry:
    specs = [TensorSpec(name, NAMES[one.dtype], tuple(one.shape), one.nbytes, True) for name, one in tensors.items()]
    made, head = image(path, specs)
    data = [tensors[piece.name].reshape(-1).view(torch.uint8).numpy().tobytes() for piece in made.pieces]
    storage.write_bytes(path, head + b"".join(data))
    return file_entry(made, xxhash.xxh3_128_hexdigest(head), [xxhash.xxh3_128_hexdigest(each) for each in data])


def read_all(source: Any, file: FileEntry) -> dict[str, torch.Tensor]:
    tensors = {entry.name: tensorfile.empty(entry.shape, entry.dtype) for entry in file.tensors}
    (part,) = tensorfile.parts(file)
    tensorfile.read_part(source, part, "here", lambda entry: tensorfile.Into(tensorfile.data(tensors[entry.name])))
    return tensors


def test_tensors_come_back_bit_for_bit_and_safetensors_opens_the_file(tmp_path: Path) -> None:
    tensors, storage = tensors_of_all_kinds(), Storage(str(tmp_path))
    entry = written(storage, "t.safetensors", tensors)
    assert entry.size_bytes == storage.size_bytes("t.safetensors")
    with storage.open_input("t.safetensors") as source:
        ours = read_all(source, entry)
    theirs = load_file(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        for back in (ours[name], theirs[name]):
            assert back.dtype == tensor.dtype
            assert back.shape == tensor.shape
            assert torch.equal(back, tensor)


def test_every_flipped_byte_of_a_tensor_file_is_noticed(tmp_path: Path) -> None:
    path, storage = tmp_path / "t", Storage(str(tmp_path))
    entry = written(storage, "t", tensors_of_all_kinds())
    good = path.read_bytes()
    positions = [*range(0, entry.head_bytes, 97), *range(entry.head_bytes, len(good))]
    for at in positions:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with storage.open_input("t") as source, pytest.raises(CheckpointCorrupt):
            read_all(source, entry)
    for length in (0, 7, 100, entry.head_bytes, len(good) - 1):
        path.write_bytes(good[:length])
        with storage.open_input("t") as source, pytest.raises(CheckpointCorrupt):
            read_all(source, entry)


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
    for protocol, word in ((3, "Upgrade"), (0, "older version")):
        monkeypatch.setattr("orchestrator.checkpoints.manifest.PROTOCOL", protocol)
        other = manifest().encode()
        monkeypatch.undo()
        with pytest.raises(UnknownFormat, match=word):
            Manifest.decode(other, "here")


def test_parts_of_tensors_come_back_in_a_manifest() -> None:
    tensors = (
        TensorEntry(name="w", dtype="F32", shape=(1, 2), size_bytes=8, xxh3="0", offsets=(1, 0), full_shape=(2, 2)),
        TensorEntry(name="b", dtype="F32", shape=(), size_bytes=4, xxh3="1"),
    )
    file = FileEntry(path="model/a", size_bytes=4108, head_bytes=4096, head_xxh3="2", tensors=tensors)
    before = manifest(files=(file,), save="a" * 32, kind="full", timings={"copy": 0.5}, size_logical=12)
    assert Manifest.decode(before.encode(), "here") == before
    assert "offsets" not in json.loads(before.encode())["files"][0]["tensors"][1]


# -- images and jobs -----------------------------------------------------------------------------------------


def specs() -> list[TensorSpec]:
    return [
        TensorSpec("flags", "BOOL", (3,), 3, True),
        TensorSpec("b", "F32", (2, 2), 16, True),
        TensorSpec("a", "F32", (), 4, True),
        TensorSpec("empty", "F64", (0, 4), 0, False),
    ]


def test_an_image_is_a_safetensors_file(tmp_path: Path) -> None:
    made, head = image("model/x.safetensors", specs())
    assert [piece.name for piece in made.pieces] == ["empty", "a", "b", "flags"]
    assert made.head_bytes == len(head) == 4096
    assert (made.size_bytes, made.room_bytes) == (4096 + 23, 8192)
    assert [piece.start for piece in made.pieces] == [4096, 4096, 4100, 4116]
    (tmp_path / "x").write_bytes(head + np.arange(5, dtype="<f4").tobytes() + b"\1\0\1")
    tensors = load_file(tmp_path / "x")
    assert tensors["b"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert tensors["flags"].tolist() == [True, False, True]
    assert tensors["empty"].shape == (0, 4)


def test_an_image_names_where_parts_of_split_tensors_belong() -> None:
    part = TensorSpec("w", "F32", (1, 2), 8, True, offsets=(1, 0), full_shape=(2, 2))
    made, head = image("x", [part, TensorSpec("b", "F32", (2,), 8, True)])
    header = json.loads(head[8:])
    info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    assert info == {"w": {"saved_offsets": [1, 0]}, "b": {"saved_offsets": [0]}}, "every tensor of the file is in it"
    entry = file_entry(made, "h", ["1", "2"])
    assert [(tensor.name, tensor.offsets, tensor.full_shape) for tensor in entry.tensors] == [
        ("b", None, None), ("w", (1, 0), (2, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tensors",
    [
        [TensorSpec("a", "F128", (1,), 16, True)],
        [TensorSpec("a", "F32", (2,), 4, True)],
        [TensorSpec("a", "F32", (1,), 4, True), TensorSpec("a", "U8", (1,), 1, True)],
        [TensorSpec("a", "F32", (1,), 4, True, offsets=(0,))],
    ],
)
def test_an_image_of_what_cannot_be_is_refused(tensors: list[TensorSpec]) -> None:
    with pytest.raises(ValueError, match="x: "):
        image("x", tensors)


def test_types_of_images_are_those_of_tensor_files() -> None:
    assert {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in tensorfile.NAMES.items()} == dict(SIZES)


def test_what_travels_to_the_writer_comes_back_the_same() -> None:
    made = Layout.of((image("model/a", specs())[0], raw_image("side/b", 5), image("optim/c", specs()[:1])[0]))
    assert made.starts == (0, 8192, 12288)
    assert made.size_bytes == 12288 + 8192
    back = Layout.decode(made.encode())
    assert back == made
    assert back.signature == made.signature != Layout.of(made.images[:1]).signature
    job = SaveJob(
        save="a" * 32, storage_url="/x", name="step_00000001-a1", run="r", attempt=1, rank=0, world_size=2,
        content={"n": [1, None]}, texts={"state.json": "{}"}, draft={"step": 1},
        keep=KeepRules(best=(BestRule(metric="loss", direction=Direction.min),), every_steps=5), sealed_at=1.5,
    )  # fmt: skip
    assert SaveJob.decode(job.encode()) == job
    outcome = Outcome(save="a" * 32, name="n", result=SlotResult.failed, why="full", deleted=("x",))
    assert Outcome.decode(outcome.encode()) == outcome


def test_an_outcome_always_fits() -> None:
    deleted = tuple(f"step_{number:08d}-a1" for number in range(500))
    for why in ("", "ä" * 100_000):
        outcome = Outcome(save="a" * 32, name="n", result=SlotResult.committed, why=why, deleted=deleted)
        assert len(outcome.encode()) <= 3072
        assert Outcome.decode(outcome.encode()).result is SlotResult.committed


@pytest.mark.parametrize("kind", [Layout, SaveJob, Outcome])
@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"protocol": 3}', b"\xff"])
def test_what_is_no_message_is_a_value_error(kind: Any, data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of json, of unicode or ours: all say what was wrong
        kind.decode(data)


@pytest.mark.parametrize(
    "damage", [("starts", [0, 4096, 12288]), ("starts", [0, 8193, 12288]), ("size_bytes", 12288), ("starts", [0])]
)
def test_a_layout_whose_files_overlap_is_refused(damage: tuple[str, Any]) -> None:
    made = Layout.of((image("model/a", specs())[0], raw_image("side/b", 5), image("optim/c", specs()[:1])[0]))
    raw = {**json.loads(made.encode()), damage[0]: damage[1]}
    with pytest.raises(ValueError, match="begin|fit|longer|shorter"):
        Layout.decode(json.dumps(raw).encode())


def test_no_pickle_is_ever_used() -> None:
    root = Path(__file__).parents[2] / "orchestrator"
    files = [
        *(root / "checkpoints").rglob("*.py"),
        *(root / "training").rglob("*.py"),
        root / "backends" / "storage.py",
    ]
    assert files
    for file in files:
        # Only an export may write what torch pickles; nothing reads it.
        banned = {("torch", "load"), ("torch", "save")} - ({("torch", "save")} if file.name == "export.py" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in banned, file
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve"} & set(names), file
