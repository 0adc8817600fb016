"""Reading and verifying what N ranks wrote: every damaged byte is noticed, named, and never given out."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, load, pointers, reader, tensorfile
from orchestrator.checkpoints.engine import CheckpointEngine, Unreadable
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.load import NoCheckpoint, load_checkpoint
from orchestrator.checkpoints.manifest import MANIFEST, Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction
from orchestrator.checkpoints.reader import read, read_manifest, verify
from orchestrator.checkpoints.state import CheckpointMismatch, TrainState
from orchestrator.clock import ManualClock
from orchestrator.errors import CheckpointCorrupt, NotFound
from tests.plugins import checkpoint_files

torch.set_num_threads(1)

PAGE = 4096
Tensors = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run" / "checkpoints"))


def tensors_and_checkpoint(root: Storage, **arguments: Any) -> tuple[Tensors, Manifest, Storage]:
    tensors = checkpoint_files.random_tensors(rows=60)
    manifest = checkpoint_files.write(root, tensors, **{"world_size": 2, "files": {"vocab.txt": b"a b c"}, **arguments})
    return tensors, manifest, root.join(manifest.name)


def whole(inside: Storage, manifest: Manifest, rank: int = 0, **arguments: Any) -> reader.Stored:
    return read(inside, manifest, rank=rank, world_size=manifest.world_size, **arguments)


def contents(directory: str) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and when it was written."""
    found = (Path(at) / name for at, _, names in os.walk(directory) for name in names)
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


# -- what is right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("part_bytes", [1, 5000, 32 << 20])
def test_all_of_it_comes_back(root: Storage, monkeypatch: pytest.MonkeyPatch, threads: int, part_bytes: int) -> None:
    monkeypatch.setattr(reader, "_PART_BYTES", part_bytes)
    tensors, manifest, inside = tensors_and_checkpoint(root)
    stored = whole(inside, manifest, 1, threads=threads)
    for group, named in tensors.items():
        assert stored.snapshot.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(stored.snapshot.tensors[group][name].float(), tensor.float())
    assert stored.snapshot.files == {"vocab.txt": b"a b c"}
    assert stored.rank == {"rank": 1}
    assert verify(inside, manifest, threads=threads) == []


def test_it_is_read_from_an_object_store_too() -> None:
    tensors, manifest, inside = tensors_and_checkpoint(Storage("mock:///run").join("checkpoints"))
    stored = whole(inside, manifest)
    assert torch.equal(stored.snapshot.tensors["model"]["fc.weight"], tensors["model"]["fc.weight"])
    assert verify(inside, manifest) == []
    file = "optim/optim-00002-of-00002.safetensors"
    inside.write_bytes(file, inside.read_bytes(file)[:-1] + b"\x99")
    assert [damage.file for damage in verify(inside, manifest)] == [file]
    with pytest.raises(CheckpointCorrupt, match="optim"):
        whole(inside, manifest)


def test_every_byte_is_read_once(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, inside = tensors_and_checkpoint(root)
    read_bytes = 0
    real = Storage.open_input

    class Counted(io.FileIO):
        def readinto(self, place: Any) -> int:
            nonlocal read_bytes
            count = super().readinto(place)
            read_bytes += count or 0
            return count  # type: ignore[return-value]

    @contextmanager
    def counted(self: Storage, path: str) -> Iterator[Any]:
        with real(self, path) as source:
            yield Counted(source.name)

    monkeypatch.setattr(Storage, "open_input", counted)
    whole(inside, manifest)
    texts = {"rank-0001.json"}
    wanted = sum(file.size_bytes for file in manifest.files if file.tensors and file.path not in texts)
    assert read_bytes == wanted


def test_one_group_can_be_read_alone(root: Storage) -> None:
    _, manifest, inside = tensors_and_checkpoint(root)
    for file in manifest.files:
        if file.path.startswith("optim/"):
            inside.write_bytes(file.path, b"x" * file.size_bytes)
    stored = whole(inside, manifest, groups=["model"])
    assert "fc.weight" in stored.snapshot.tensors["model"]
    assert stored.snapshot.tensors["optim"] == {}


def test_progress_ends_at_the_whole(root: Storage) -> None:
    _, manifest, inside = tensors_and_checkpoint(root)
    seen: list[tuple[int, int]] = []
    verify(inside, manifest, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)


# -- damage --------------------------------------------------------------------------------------------------

SPLITS = {"whole tensors": (), "in parts": ("model/fc.weight", "optim/optimizer.state.0.exp_avg")}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_page_that_is_flipped_is_noticed_and_its_file_is_named(root: Storage, split: tuple[str, ...]) -> None:
    _, manifest, inside = tensors_and_checkpoint(root, split=split)
    pages = 0
    for file in manifest.files:
        path = Path(inside.uri(file.path))
        good = path.read_bytes()
        for page in range(0, len(good), PAGE):
            at = page + (page // PAGE * 1009) % min(PAGE, len(good) - page)
            path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
            assert {damage.file for damage in verify(inside, manifest)} == {file.path}
            for rank in (0, 1):
                if file.path == f"rank-{1 - rank:04d}.json":
                    continue  # another rank's own; that one reads it
                with pytest.raises(CheckpointCorrupt) as corrupt:
                    whole(inside, manifest, rank)
                assert corrupt.value.file.startswith(file.path)
            pages += 1
        path.write_bytes(good)
    assert pages >= 15
    assert verify(inside, manifest) == []


def test_every_page_of_the_manifest_that_is_flipped_is_noticed(root: Storage) -> None:
    _, _, inside = tensors_and_checkpoint(root)
    path = Path(inside.uri(MANIFEST))
    good = path.read_bytes()
    letters = [at for at in range(len(good)) if good[at : at + 1].isalnum()]
    for at in letters[:: len(letters) // 100]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(CheckpointCorrupt):
            read_manifest(inside)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_file_cut_at_any_byte_of_its_header_is_noticed(root: Storage, split: tuple[str, ...]) -> None:
    """Even if its length is right: a crash may leave a file of the right length whose end was never written."""
    _, manifest, inside = tensors_and_checkpoint(root, split=split)
    file = manifest.file("model/model-00001-of-00002.safetensors")
    assert file is not None
    good = inside.read_bytes(file.path)
    (part,) = tensorfile.parts(file)
    for length in range(file.head_bytes):
        with pytest.raises(CheckpointCorrupt):
            tensorfile.read_part(io.BytesIO(good[:length]), part, "here", lambda tensor: None)
        if length % 16 == 0:
            with pytest.raises(CheckpointCorrupt):
                tensorfile.read_part(
                    io.BytesIO(good[:length].ljust(len(good), b"\0")), part, "here", lambda tensor: None
                )


def test_a_manifest_cut_at_any_byte_is_noticed(root: Storage) -> None:
    _, _, inside = tensors_and_checkpoint(root)
    good = inside.read_bytes(MANIFEST)
    for length in range(len(good)):
        with pytest.raises(CheckpointCorrupt):
            Manifest.decode(good[:length], "here")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "shortened": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_no_file_may_be_missing_or_of_another_size(root: Storage, damage: str, split: tuple[str, ...]) -> None:
    _, manifest, inside = tensors_and_checkpoint(root, split=split)
    for file in manifest.files:
        path = Path(inside.uri(file.path))
        good = path.read_bytes()
        DAMAGES[damage](path)
        found = verify(inside, manifest)
        assert {each.file for each in found} == {file.path}
        assert "bytes" in found[0].expected
        with pytest.raises(CheckpointCorrupt, match=file.path):
            whole(inside, manifest)
        path.write_bytes(good)


def test_an_extra_file_is_nobodys_business(root: Storage) -> None:
    _, manifest, inside = tensors_and_checkpoint(root)
    inside.write_bytes("model/notes.txt", b"mine")
    inside.write_bytes("rank-0002.json", b"left over")
    assert verify(inside, manifest) == []
    whole(inside, manifest)


def test_verify_names_all_that_is_wrong(root: Storage) -> None:
    _, manifest, inside = tensors_and_checkpoint(root)
    before = contents(root.uri())
    weights = next(f for f in manifest.files if any(tensor.name == "fc.weight" for tensor in f.tensors))
    data = bytearray(inside.read_bytes(weights.path))
    at = weights.head_bytes
    for tensor in weights.tensors:
        if tensor.name in ("fc.weight", "half") and tensor.size_bytes:
            data[at + tensor.size_bytes - 1] ^= 1
        at += tensor.size_bytes
    data[20] ^= 1
    Path(inside.uri(weights.path)).write_bytes(data)
    inside.write_bytes("state.json", b"{}")
    Path(inside.uri("rank-0001.json")).unlink()
    wanted = {
        (weights.path, ""),
        *((weights.path, tensor.name) for tensor in weights.tensors if tensor.name in ("fc.weight", "half")),
        ("state.json", ""),
        ("rank-0001.json", ""),
    }
    found = verify(inside, manifest)
    assert {(damage.file, damage.tensor) for damage in found} == wanted
    assert next(str(damage) for damage in found if damage.file == "rank-0001.json").startswith(
        "rank-0001.json: no file"
    )
    assert contents(root.uri()).keys() | {inside.uri("rank-0001.json")} == before.keys(), "nothing is moved aside"


@pytest.mark.parametrize("action", [whole, verify])
def test_a_storage_that_does_not_answer_is_no_damage(
    root: Storage, monkeypatch: pytest.MonkeyPatch, action: Callable[..., Any]
) -> None:
    _, manifest, inside = tensors_and_checkpoint(root)
    real = Storage.open_input

    class Failing(io.FileIO):
        def readinto(self, place: Any) -> int:
            raise OSError(errno.EIO, "the disk is on fire")

    @contextmanager
    def failing(self: Storage, path: str) -> Iterator[Any]:
        with real(self, path) as source:
            yield Failing(source.name) if path.startswith("optim") else source

    before = contents(root.uri())
    monkeypatch.setattr(Storage, "open_input", failing)
    with pytest.raises(OSError, match="on fire"):
        action(inside, manifest)
    monkeypatch.undo()
    assert contents(root.uri()) == before
    assert action(inside, manifest) is not None


# -- load_checkpoint -----------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(root: Storage, step: int, **fields: Any) -> nn.Module:
    """Saves a new model, which differs from step to step."""
    model, optimizer = trained(step)
    state = TrainState(model=model, optimizer=optimizer, best=step / 2, files={"vocab.txt": b"a b"})
    checkpoint_files.write_state(root, state, step=step, world_size=2, **fields)
    return model


def damage(root: Storage, step: int, file: str = "model/model-00002-of-00002.safetensors") -> None:
    path = Path(root.uri(f"step_{step:08d}-a1/{file}"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")


def test_a_model_is_loaded_from_wherever_its_checkpoint_is_named(root: Storage) -> None:
    model = save(root, 3, metrics={"loss": 0.25}, epoch=2)
    run = Path(root.uri()).parent
    for source in (
        run,
        root.uri(),
        root.uri("step_00000003-a1"),
        f"file://{run}",
        Storage(str(run)).uri("checkpoints"),
    ):
        twin = network()
        twins = torch.optim.Adam(twin.parameters())
        loaded = load_checkpoint(source, model=twin, optimizer=twins)
        for name, tensor in model.state_dict().items():
            assert torch.equal(twin.state_dict()[name], tensor)
            assert torch.equal(loaded.model[name], tensor)
        assert twins.state_dict()["state"][0]["step"] == 1
        assert (loaded.step, loaded.epoch, loaded.metrics) == (3, 2, {"loss": 0.25})
        assert loaded.extra == {"best": 1.5}
        assert loaded.files == {"vocab.txt": b"a b"}
        assert loaded.is_resumable
        assert loaded.info.uri == root.uri("step_00000003-a1")


def test_a_run_is_found_by_its_name(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    save(root, 1, is_best=True)
    save(root, 2)
    directory = str(Path(root.uri()).parent)
    asked: list[Any] = []

    @contextmanager
    def known(home: Path | None) -> Iterator[Any]:
        asked.append(home)
        yield SimpleNamespace(run=lambda name: SimpleNamespace(directory={"otter": directory}[name]))

    monkeypatch.setattr("orchestrator.catalog.open_catalog", known)
    assert load_checkpoint("otter").step == 2
    assert load_checkpoint("otter@best", home="/somewhere").step == 1
    assert load_checkpoint("otter@step_00000001-a1").step == 1
    assert load_checkpoint("otter", which="best").step == 1
    assert asked == [None, Path("/somewhere"), None, None]
    with pytest.raises(NotFound):
        load_checkpoint("no/such/directory")


def test_a_damaged_one_is_passed_over_named_and_left_where_it_is(root: Storage) -> None:
    for step in (1, 2, 3, 4):
        save(root, step)
    damage(root, 3)
    damage(root, 4, MANIFEST)
    before = contents(root.uri())
    loaded = load_checkpoint(root.uri())
    assert loaded.step == 2
    assert [reason.split(":")[0] for reason in loaded.skipped] == ["step_00000004-a1", "step_00000003-a1"]
    assert contents(root.uri()) == before
    with pytest.raises(CheckpointCorrupt, match="model-00002"):
        load_checkpoint(root.uri(), which="step_00000003-a1")
    with pytest.raises(CheckpointCorrupt, match="model-00002"):
        load_checkpoint(root.uri("step_00000003-a1"))
    for step in (1, 2):
        damage(root, step)
    with pytest.raises(NoCheckpoint, match=r"Damaged: step_00000004-a1.*step_00000001-a1"):
        load_checkpoint(root.uri())


def test_the_best_is_what_the_pointer_says_or_else_what_was_called_so(root: Storage) -> None:
    for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        save(root, step, is_best=step == 1, metrics={"loss": loss})
    assert load_checkpoint(root.uri(), which="best").step == 1
    committed = catalog.scan(root).committed
    rules = KeepRules(best=(BestRule(metric="loss", direction=Direction.min), BestRule(metric="loss")))
    pointers.update(root, committed, rules, now=0.0)
    assert load_checkpoint(root.uri(), which="best").step == 2
    assert load_checkpoint(root.uri(), which="best-2").step == 1
    root.write_bytes("best.json", b'{"name": "step_00000009-a1"}')
    assert load_checkpoint(root.uri(), which="best").step == 1, "a pointer is a hint"
    with pytest.raises(NoCheckpoint, match="'best-7'"):
        load_checkpoint(root.uri(), which="best-7")


def test_weights_without_the_rest_can_be_loaded_but_not_into_an_optimizer(root: Storage) -> None:
    model, optimizer = trained()
    snapshot = TrainState(model=model, optimizer=optimizer).capture(weights_only=True)
    checkpoint_files.write(root, snapshot.tensors, tree=snapshot.tree, kind="weights", resumable=False)
    twin = network()
    loaded = load_checkpoint(root.uri(), model=twin)
    assert torch.equal(twin[0].weight, model[0].weight)  # type: ignore[index]
    assert not loaded.is_resumable
    assert loaded.optimizer is None
    with pytest.raises(CheckpointMismatch, match="optimizer"):
        load_checkpoint(root.uri(), optimizer=torch.optim.Adam(twin.parameters()))


def test_another_model_is_a_mismatch_and_stays_as_it_was_if_the_bytes_are_wrong(root: Storage) -> None:
    save(root, 1)
    with pytest.raises(CheckpointMismatch):
        load_checkpoint(root.uri(), model=nn.Linear(1, 1))
    damage(root, 1)
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NoCheckpoint):
        load_checkpoint(root.uri(), model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_where_nothing_was_saved_it_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="orc checkpoint ls"):
        load_checkpoint(f"file://{tmp_path}")
    with pytest.raises(NoCheckpoint):
        load_checkpoint(tmp_path)


def test_what_is_being_written_or_was_put_aside_is_no_checkpoint(root: Storage) -> None:
    save(root, 1)
    checkpoint_files.write(root, checkpoint_files.random_tensors(), step=2, is_committed=False)
    save(root, 3)
    catalog.quarantine(root, "step_00000003-a1", "a test", now=0.0)
    assert load_checkpoint(root.uri()).step == 1
    with pytest.raises(CheckpointCorrupt, match="put aside"):
        load_checkpoint(root.uri("step_00000003-a1"))
    with pytest.raises(NoCheckpoint):
        load_checkpoint(root.uri(), which="step_00000002-a1")


def test_a_storage_that_fails_is_not_passed_over(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    save(root, 1)
    save(root, 2)

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "the disk is on fire")

    monkeypatch.setattr(load, "read", failing)
    with pytest.raises(OSError, match="on fire"):
        load_checkpoint(root.uri())


# -- two ranks together --------------------------------------------------------------------------------------


class Ranks:
    """Two ranks in two threads; what one says, the other hears."""

    def __init__(self) -> None:
        self.barrier, self.said = threading.Barrier(2), ["", ""]

    def restore(self, root: Storage) -> list[tuple[int | None, str, list[str]]]:
        """What each rank gets: step, error, events."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: self._restore(root, rank), range(2)))

    def _restore(self, root: Storage, rank: int) -> tuple[int | None, str, list[str]]:
        events: list[str] = []
        diary = SimpleNamespace(checkpoint=lambda info: None, event=lambda kind, message, **_: events.append(kind))
        engine = CheckpointEngine(
            root, run="r1", attempt=2, group=Rank(self, rank), policy=CheckpointPolicy(), clock=ManualClock(),
            diary=diary,
        )  # fmt: skip
        state = TrainState(model=nn.Linear(2, 2))
        try:
            stored = engine.restore(state)
        except Unreadable as error:
            return None, str(error), events
        return None if stored is None else stored.manifest.step, "", events


class Rank:
    world_size = 2

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def gather(self, text: str) -> list[str]:
        self.ranks.said[self.rank] = text
        self.ranks.barrier.wait(30)
        said = list(self.ranks.said)
        self.ranks.barrier.wait(30)
        return said

    def share(self, text: str) -> str:
        return self.gather(text)[0]

    def lowest(self, value: int) -> int:
        return min(map(int, self.gather(str(value))))


def two_of_two_ranks(root: Storage) -> None:
    for step in (1, 2):
        checkpoint_files.write_state(root, TrainState(model=nn.Linear(2, 2)), step=step, world_size=2)


def test_what_only_one_rank_finds_damaged_is_put_aside_once_and_both_take_the_older_one(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_of_two_ranks(root)
    damage(root, 2, "rank-0001.json")
    put_aside: list[str] = []
    real = catalog.quarantine

    def seen(storage: Storage, name: str, why: str, *, now: float) -> None:
        put_aside.append(name)
        real(storage, name, why, now=now)

    monkeypatch.setattr(catalog, "quarantine", seen)
    first, second = Ranks().restore(root)
    assert (first[0], second[0]) == (1, 1)
    assert first[2] == ["checkpoint-quarantined", "checkpoint-fallback"]
    assert second[2] == []
    assert put_aside == ["step_00000002-a1"]
    assert [each[0] for each in Ranks().restore(root)] == [1, 1]
    assert put_aside == ["step_00000002-a1"], "it is not looked at again"


def test_a_storage_that_does_not_answer_one_rank_stops_both_and_puts_nothing_aside(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_of_two_ranks(root)
    before = contents(root.uri())
    real = Storage.read_bytes

    def failing(self: Storage, path: str) -> bytes:
        if path == "rank-0001.json":
            raise OSError(errno.EIO, "the disk is on fire")
        return real(self, path)

    monkeypatch.setattr(Storage, "read_bytes", failing)
    for step, error, events in Ranks().restore(root):
        assert step is None
        assert "rank 1" in error
        assert "on fire" in error
        assert events == []
    assert contents(root.uri()) == before
