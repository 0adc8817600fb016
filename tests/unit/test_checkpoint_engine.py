"""Saving and restoring: what comes back, and what a crash, a full disk or a damaged file leave behind."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.engine import CheckpointEngine, Closed, SaveFailed, StateRefused, TooLarge, Unreadable
from orchestrator.checkpoints.manifest import CheckpointInfo
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.reader import read_manifest, verify
from orchestrator.checkpoints.staging import Stager
from orchestrator.checkpoints.state import CheckpointMismatch, TrainState
from orchestrator.clock import ManualClock
from orchestrator.training.group import Group
from tests.plugins.delayed_stager import DelayedStager

torch.set_num_threads(1)


class Diary:
    def __init__(self) -> None:
        self.checkpoints: list[CheckpointInfo] = []
        self.events: list[str] = []

    def checkpoint(self, info: CheckpointInfo) -> None:
        self.checkpoints.append(info)

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self.events.append(kind)


class Saver:
    """One attempt's checkpoints, with the arguments that these tests do not care about filled in."""

    def __init__(self, storage: Storage, attempt: int = 1, stager: Stager | None = None, **policy: Any) -> None:
        self.storage, self.diary, self.clock = storage, Diary(), ManualClock()
        self.engine = CheckpointEngine(
            storage, run="r1", attempt=attempt, group=Group(), policy=CheckpointPolicy(**policy), clock=self.clock,
            diary=self.diary, stager=stager,
        )  # fmt: skip

    def save(self, state: TrainState, step: int, **metrics: float) -> CheckpointInfo:
        info = self.begin(state, step, must=True, waits=True, metrics=metrics)
        assert info is not None
        return info

    def begin(
        self, state: TrainState, step: int, *, must: bool = False, waits: bool = False, metrics: Any = None
    ) -> CheckpointInfo | None:
        """A save that need not be and is not waited for."""
        return self.engine.save(
            state, step=step, epoch=0, epoch_complete=True, metrics=metrics or {}, is_best=False, reasons=("now",),
            progress={"n": 1}, rank_state={"generators": {"torch": torch.get_rng_state()}}, data={}, must=must,
            waits=waits,
        )  # fmt: skip

    def restored_step(self, state: TrainState) -> int | None:
        stored = self.engine.restore(state)
        return None if stored is None else stored.manifest.step


def names_in(storage: Storage) -> list[str]:
    return [entry.name for entry in storage.entries() if entry.is_dir and entry.name != catalog.DELETED]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def saver(root: Path) -> Saver:
    return Saver(Storage(str(root)))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 3))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": list(p), "lr": torch.tensor(0.01)}], foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01),
}
LR = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "onecycle": lambda o: LR.OneCycleLR(o, 0.1, total_steps=50, cycle_momentum=False),
    "milestones": lambda o: LR.MultiStepLR(o, [2, 4, 4]),
    "plateau": lambda o: LR.ReduceLROnPlateau(o),
    "sequence": lambda o: LR.SequentialLR(o, [LR.ConstantLR(o), LR.CosineAnnealingLR(o, 9)], [3]),
    "lambda": lambda o: LR.LambdaLR(o, lambda epoch: 0.9**epoch),
}


def trained(optimizer: str = "adam", scheduler: str = "onecycle", steps: int = 3) -> tuple[nn.Module, Any, Any]:
    model = network()
    optim = OPTIMIZERS[optimizer](model.parameters())
    schedule = SCHEDULERS[scheduler](optim)
    train(model, optim, schedule, steps)
    return model, optim, schedule


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(8, 1, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(*([loss.item()] if isinstance(scheduler, LR.ReduceLROnPlateau) else []))


def assert_same(one: Any, other: Any) -> None:
    """Equal in every bit, in nested state dicts too."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        ("adam", "onecycle"),
        ("adamw", "sequence"),
        ("momentum", "plateau"),
        ("momentum", "milestones"),
        ("plain", "lambda"),
    ],
)
def test_a_restored_training_continues_bit_for_bit(saver: Saver, optimizer: str, scheduler: str) -> None:
    model, optim, schedule = trained(optimizer, scheduler)
    saver.save(TrainState(model=model, optimizer=optim, scheduler=schedule), step=3)
    other = trained(optimizer, scheduler, steps=1)
    saver.engine.restore(TrainState(model=other[0], optimizer=other[1], scheduler=other[2]))
    for parts in ((model, optim, schedule), other):
        torch.manual_seed(5)
        train(*parts, steps=3)
    for one, two in zip((model, optim, schedule), other, strict=True):
        assert_same(one.state_dict(), two.state_dict())


def test_extras_of_all_kinds_come_back(saver: Saver) -> None:
    generator = nn.Linear(2, 2)
    averaged = torch.ones(3)
    state = TrainState(
        model={"g": generator, "d": nn.Linear(1, 1)}, averaged=averaged, best=0.5, seen=[1, 2], twin=generator
    )
    saver.save(state, step=1)
    want = generator.weight.clone()
    with torch.no_grad():
        generator.weight.zero_()
        averaged.zero_()
    state.extra.update(best=0.0, seen=[])
    saver.engine.restore(state)
    assert torch.equal(generator.weight, want)
    assert torch.equal(averaged, torch.ones(3)), "a tensor is restored in place"
    assert state.extra["best"] == 0.5
    assert state.extra["seen"] == [1, 2]


def test_files_open_with_safetensors_and_the_index_names_every_tensor(saver: Saver, root: Path) -> None:
    model, optim, _ = trained()
    info = saver.save(TrainState(model=model, optimizer=optim), step=1200)
    assert info.uri == str(root / "step_00001200-a1")
    assert info.id == "r1/step_00001200-a1"
    loaded = load_file(Path(info.uri) / "model" / "model-00001-of-00001.safetensors")
    assert_same(dict(model.state_dict()), loaded)
    network().load_state_dict(loaded)
    for group in ("model", "optim"):
        index = json.loads((Path(info.uri) / group / f"{group}.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            assert name in load_file(Path(info.uri) / group / file)


def test_it_works_on_a_pyarrow_filesystem() -> None:
    saver = Saver(Storage("mock:///runs").join("r1", "checkpoints"), keep_last=2)
    model, optim, _ = trained()
    state = TrainState(model=model, optimizer=optim)
    for step in (1, 2, 3):
        saver.save(state, step)
    assert names_in(saver.storage) == ["step_00000002-a1", "step_00000003-a1"]
    assert saver.restored_step(state) == 3


def test_a_model_inside_a_compiled_one_has_its_own_names(saver: Saver) -> None:
    compiled = nn.Module()
    compiled._orig_mod = nn.Linear(2, 2)  # what torch.compile gives, without the seconds that it takes
    saver.save(TrainState(model=compiled), step=1)
    saver.engine.restore(TrainState(model=nn.Linear(2, 2)))


def test_the_same_step_twice_makes_two(saver: Saver) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    names = [saver.save(state, 5).id for _ in range(3)]
    assert names == ["r1/step_00000005-a1", "r1/step_00000005-a1.2", "r1/step_00000005-a1.3"]


def test_what_cannot_be_stored_is_named_and_leaves_nothing(saver: Saver, root: Path) -> None:
    with pytest.raises(StateRefused, match=r"extra\.thing is a builtins\.object"):
        saver.save(TrainState(model=nn.Linear(1, 1), thing=object()), step=1)
    assert not root.exists()


def test_another_model_is_a_mismatch_and_no_damage(saver: Saver, root: Path) -> None:
    saver.save(TrainState(model=nn.Linear(2, 2)), step=1)
    for other in (TrainState(model=nn.Linear(3, 3)), TrainState(model=nn.Linear(2, 2), ema=1), TrainState()):
        with pytest.raises(CheckpointMismatch):
            saver.engine.restore(other)
    assert saver.diary.events == []
    assert saver.restored_step(TrainState(model=nn.Linear(2, 2))) == 1


# -- damage --------------------------------------------------------------------------------------------------


def two_saved(saver: Saver) -> tuple[TrainState, Path]:
    """A state saved at steps 1 and 2, and the newer one's directory."""
    model, optim, _ = trained()
    state = TrainState(model=model, optimizer=optim)
    saver.save(state, step=1)
    return state, Path(saver.save(state, step=2).uri)


FILES = (
    "MANIFEST.json",
    "state.json",
    "rank-0000.json",
    "model/model-00001-of-00001.safetensors",
    "model/model.safetensors.index.json",
    "optim/optim-00001-of-00001.safetensors",
)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "missing": lambda path: path.unlink(),
}


TENSORS, TEXT = "optim/optim-00001-of-00001.safetensors", "MANIFEST.json"
ALL_DAMAGES = [(file, damage) for file in FILES for damage in DAMAGES if file in (TENSORS, TEXT) or damage == "flipped"]


@pytest.mark.parametrize(("file", "damage"), ALL_DAMAGES)
def test_a_damaged_checkpoint_is_never_used_and_the_older_one_is(saver: Saver, file: str, damage: str) -> None:
    state, newer = two_saved(saver)
    DAMAGES[damage](newer / file)
    if (file, damage) == ("MANIFEST.json", "missing"):  # all ranks' receipts are there: it is committed again
        assert saver.restored_step(state) == 2
        return
    assert saver.restored_step(state) == 1
    assert saver.diary.events == ["checkpoint-quarantined", *["checkpoint-fallback"] * (file != "MANIFEST.json")]
    assert not (newer / "MANIFEST.json").exists()
    again = Saver(saver.storage)
    assert again.restored_step(state) == 1
    assert again.diary.events == [], "a quarantined one is not looked at again"


def test_verify_finds_damage_in_files_of_other_ranks_too(saver: Saver) -> None:
    _, newer = two_saved(saver)
    storage = Storage(str(newer))
    assert verify(storage, read_manifest(storage)) == []
    flip(newer / "rank-0000.json")
    assert [damage.file for damage in verify(storage, read_manifest(storage))] == ["rank-0000.json"]


def test_when_nothing_valid_is_left_the_training_says_so(saver: Saver) -> None:
    state, newer = two_saved(saver)
    for directory in newer.parent.glob("step_*"):
        flip(directory / "state.json")
    assert saver.restored_step(state) is None
    assert saver.diary.events == ["checkpoint-quarantined"] * 2 + ["checkpoint-fallback"]


def test_an_extra_file_does_not_matter(saver: Saver) -> None:
    state, newer = two_saved(saver)
    (newer / "model" / "notes.txt").write_text("mine")
    (newer.parent / "my-backup").mkdir()
    assert saver.restored_step(state) == 2


def test_a_manifest_that_names_files_elsewhere_is_refused(saver: Saver, tmp_path: Path) -> None:
    state, newer = two_saved(saver)
    (newer / "state.json").rename(tmp_path / "state.json")
    (newer / "state.json").symlink_to(tmp_path / "state.json")
    assert saver.restored_step(state) == 1


def test_storage_that_does_not_answer_is_no_damage(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    state, newer = two_saved(saver)

    def stalled(self: Storage, path: str) -> int:
        raise OSError(errno.EIO, "the disk is on fire")

    monkeypatch.setattr(Storage, "size_bytes", stalled)
    with pytest.raises(Unreadable, match="on fire"):
        saver.engine.restore(state)
    monkeypatch.undo()
    assert saver.restored_step(state) == 2


# -- crashes -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def failing_after(count: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`real`, which works `count` times and then fails once and for all."""
    left = count

    def call(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        return real(*arguments)

    return call


@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir"])
def test_a_crash_at_any_write_leaves_the_older_one(saver: Saver, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    model, optim, _ = trained()
    state = TrainState(model=model, optimizer=optim)
    saver.save(state, step=1)
    crashes = 0
    while crashes < 100:
        crashing = Saver(saver.storage, attempt=2 + crashes)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing_after(crashes, getattr(os, call), Killed()))
            try:
                crashing.save(state, step=2)
                break
            except Killed:
                crashes += 1
        found = Saver(saver.storage).restored_step(state)
        committed = (saver.storage.join(f"step_00000002-a{1 + crashes}")).exists("MANIFEST.json")
        assert found == (2 if committed else 1)
        if committed:  # it died after the manifest had its name: that is a checkpoint
            catalog.remove(saver.storage, f"step_00000002-a{1 + crashes}")
    assert 3 <= crashes < 100
    later = Saver(saver.storage, attempt=1000)
    later.clock.advance(time.time() + 7200)
    later.save(state, step=3)
    assert catalog.scan(saver.storage).incomplete == (), "what the crashes left is swept"


def test_a_full_disk_at_any_write_fails_the_save_and_nothing_else(
    saver: Saver, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(model=nn.Linear(2, 2))
    saver.save(state, step=1)
    failures = 0
    while True:
        with monkeypatch.context() as patch:
            no_space = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(os, "replace", failing_after(failures, os.replace, no_space))
            try:
                saver.save(state, step=2)
                break
            except SaveFailed:
                failures += 1
        assert [each.name for each in root.iterdir() if (each / "MANIFEST.json").exists()] == ["step_00000001-a1"]
        assert saver.restored_step(state) == 1
    assert failures >= 4
    assert saver.restored_step(state) == 2


# -- keeping -------------------------------------------------------------------------------------------------


def test_old_ones_are_deleted_manifest_first_after_the_new_one_is_there(root: Path, monkeypatch: Any) -> None:
    saver = Saver(Storage(str(root)), keep_last=2, keep_best=1, best_metric="accuracy")
    state = TrainState(model=nn.Linear(1, 1))
    for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], start=1):
        saver.save(state, step, accuracy=accuracy)
    assert names_in(saver.storage) == [f"step_{n:08d}-a1" for n in (2, 4, 5)]
    told = [(info.step, info.state.value) for info in saver.diary.checkpoints]
    assert [entry for entry in told if entry[1] == "deleted"] == [(1, "deleted"), (3, "deleted")]
    assert told.index((3, "committed")) < told.index((1, "deleted"))

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(Killed):
        catalog.remove(saver.storage, "step_00000005-a1")
    assert (root / "step_00000005-a1" / "state.json").exists(), "the deletion was interrupted"
    assert Saver(saver.storage).restored_step(state) == 4


def test_a_pinned_one_stays(root: Path) -> None:
    saver = Saver(Storage(str(root)), keep_last=1)
    state = TrainState(model=nn.Linear(1, 1))
    saver.save(state, 1)
    (root / "step_00000001-a1" / catalog.PINNED).write_text("")
    saver.save(state, 2)
    saver.save(state, 3)
    assert names_in(saver.storage) == ["step_00000001-a1", "step_00000003-a1"]


def test_a_failing_deletion_costs_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(Storage(str(root)), keep_last=1)
    state = TrainState(model=nn.Linear(1, 1))
    saver.save(state, 1)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr("shutil.rmtree", refuse)
    saver.save(state, 2)
    assert saver.diary.events == ["checkpoint-retention-failed"]
    assert saver.restored_step(state) == 2


def test_one_that_a_user_removed_is_not_counted_among_those_kept(root: Path) -> None:
    saver = Saver(Storage(str(root)), keep_last=2)
    state = TrainState(model=nn.Linear(1, 1))
    saver.save(state, 1)
    saver.save(state, 2)
    catalog.remove(saver.storage, "step_00000002-a1")
    saver.save(state, 3)
    assert names_in(saver.storage) == ["step_00000001-a1", "step_00000003-a1"]


def test_pointers_follow(root: Path) -> None:
    saver = Saver(Storage(str(root)), best_metric="accuracy")
    state = TrainState(model=nn.Linear(1, 1))
    for step, accuracy in enumerate([0.1, 0.9, 0.2], start=1):
        saver.save(state, step, accuracy=accuracy)
    pointed = {name: json.loads((root / f"{name}.json").read_text())["name"] for name in ("latest", "best")}
    assert pointed == {"latest": "step_00000003-a1", "best": "step_00000002-a1"}


# -- where writing is another's ------------------------------------------------------------------------------


@pytest.fixture
def delayed(root: Path) -> Saver:
    storage = Storage(str(root))
    return Saver(storage, stager=DelayedStager(storage), keep_last=2)


def writer_of(saver: Saver) -> DelayedStager:
    stager = saver.engine._stager
    assert isinstance(stager, DelayedStager)
    return stager


class _ThreadGroup(Group):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, told: dict[int, Any], meeting: threading.Barrier) -> None:
        super().__init__(rank, meeting.parties)
        self._told, self._meeting = told, meeting

    def _all(self, mine: Any) -> list[Any]:
        self._told[self.rank] = mine
        self._meeting.wait(30)
        found = [self._told[rank] for rank in range(self.world_size)]
        self._meeting.wait(30)
        return found

    def share(self, text: str) -> str:
        return str(self._all(text)[0])

    def gather(self, text: str) -> list[str]:
        return self._all(text)

    def lowest(self, value: int) -> int:
        return min(self._all(value))


@pytest.mark.parametrize("direct", [0, 1])
def test_where_one_rank_writes_by_itself_no_rank_hands_over(root: Path, direct: int) -> None:
    storage, told, meeting = Storage(str(root)), dict[int, Any](), threading.Barrier(2)
    stager = DelayedStager(storage)
    stager.writes_while_waited_for = False  # its writer hangs
    savers = [Saver(storage, stager=None if rank == direct else stager) for rank in (0, 1)]
    for rank, saver in enumerate(savers):
        saver.engine._group = _ThreadGroup(rank, told, meeting)
    with ThreadPoolExecutor(2) as ranks:
        saves = [ranks.submit(each.begin, TrainState(model=nn.Linear(4, 4)), 1) for each in savers]
        infos = [save.result(60) for save in saves]
    assert [info.state.value for info in infos if info] == ["committed", "committed"]
    assert (stager.abandoned, stager.sealed) == (1, [])


def test_a_staged_save_is_what_was_there_at_the_return(delayed: Saver) -> None:
    model, optim, schedule = trained()
    state = TrainState(model=model, optimizer=optim, scheduler=schedule)
    info = delayed.begin(state, 1)
    assert info is not None
    assert (info.state.value, info.manifest_sha256, delayed.diary.checkpoints) == ("staged", "", [])
    want = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, optim, schedule, steps=2)
    assert delayed.engine.poll() == []
    writer_of(delayed).write()
    (ended,) = delayed.engine.poll()
    assert (ended.why, ended.info.id, ended.info.state.value) == ("", info.id, "committed")
    assert delayed.diary.checkpoints == [ended.info]
    delayed.engine.restore(state)
    assert_same(dict(model.state_dict()), want)


def test_without_room_a_periodic_save_is_skipped_counted_and_told(delayed: Saver) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    found = [delayed.begin(state, step) for step in range(1, 6)]
    assert [info is None for info in found] == [False, False, True, True, True]
    assert delayed.engine.skipped == 3
    assert delayed.diary.events == ["checkpoint-skipped"], "told once a minute"
    assert set(writer_of(delayed).patience) == {0.0}
    with pytest.raises(SaveFailed, match="no room"):
        delayed.begin(state, 6, must=True)
    assert writer_of(delayed).patience[-1] == CheckpointPolicy().wait
    writer_of(delayed).write()
    assert delayed.begin(state, 7) is not None


def test_one_that_is_waited_for_is_durable_at_the_return(delayed: Saver) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    delayed.begin(state, 1)
    info = delayed.save(state, 2)
    assert info.state.value == "committed"
    assert (Path(info.uri) / "MANIFEST.json").exists()
    assert [each.info.step for each in delayed.engine.poll()] == [1], "the earlier one was written before"


def test_one_that_takes_too_long_may_still_become_durable(delayed: Saver) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    writer_of(delayed).writes_while_waited_for = False
    with pytest.raises(SaveFailed, match="not durable after"):
        delayed.save(state, 1)
    assert not delayed.engine.drain(0.0)
    writer_of(delayed).write()
    assert [(each.info.step, each.why) for each in delayed.engine.poll()] == [(1, "")]


def test_a_staged_save_that_fails_is_an_event(delayed: Saver) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    delayed.begin(state, 1)
    writer_of(delayed).fail("the disk is on fire")
    (ended,) = delayed.engine.poll()
    assert ended.why == "the disk is on fire"
    assert delayed.diary.events == ["checkpoint-failed"]
    assert delayed.diary.checkpoints == []


def test_draining_waits_for_all_that_is_staged(delayed: Saver) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    delayed.begin(state, 1)
    delayed.begin(state, 2)
    assert delayed.engine.drain(1.0)
    assert [each.info.step for each in delayed.engine.poll()] == [1, 2]
    delayed.engine.close()
    assert writer_of(delayed).is_closed


def test_room_is_asked_for_as_soon_as_the_state_is_known(delayed: Saver) -> None:
    model, optim, _ = trained()
    state = TrainState(model=model, optimizer=optim)
    delayed.engine.expect(state)
    (layout,) = writer_of(delayed).expected
    assert [image.path.partition("/")[0] for image in layout.images] == ["model", "optim"]
    assert layout.size_bytes > 3 * sum(value.nbytes for value in model.parameters())


def test_what_all_ranks_wrote_before_they_died_is_committed_by_the_next_attempt(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(model=nn.Linear(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.checkpoints.commit.finish", failing_after(0, print, Killed()))
        with pytest.raises(Killed):
            saver.save(state, 4)
    later = Saver(saver.storage, attempt=2)
    assert later.restored_step(state) == 4
    assert [(info.step, info.state.value) for info in later.diary.checkpoints] == [(4, "committed")]


def test_two_attempts_that_save_at_once_leave_each_other_alone_and_the_later_one_counts(root: Path) -> None:
    old, new = (Saver(Storage(str(root)), attempt=attempt, keep_last=1) for attempt in (1, 2))
    models = {saver: nn.Linear(1, 1) for saver in (old, new)}
    for step in (1, 2, 3):
        for saver, model in models.items():
            nn.init.constant_(model.weight, step + (10 if saver is new else 0))
            saver.save(TrainState(model=model), step)
    old.save(TrainState(model=models[old]), 9)
    assert names_in(old.storage) == ["step_00000003-a2", "step_00000009-a1"]
    again = nn.Linear(1, 1)
    assert Saver(Storage(str(root)), attempt=3).restored_step(TrainState(model=again)) == 3
    assert again.weight.item() == 13.0


def test_after_the_end_a_save_is_refused(saver: Saver) -> None:
    saver.engine.close()
    saver.engine.close()
    with pytest.raises(Closed, match="the training has ended"):
        saver.save(TrainState(model=nn.Linear(1, 1)), 1)


# -- size ----------------------------------------------------------------------------------------------------


def test_a_state_over_the_limit_is_refused_before_anything_is_written(root: Path) -> None:
    saver = Saver(Storage(str(root)), max_gb=1e-6)
    saver.save(TrainState(model=nn.Linear(10, 10)), 1)
    state = TrainState(model=nn.Linear(100, 100))
    saver.engine.expect(state)
    assert saver.diary.events == ["checkpoint-too-large"]
    with pytest.raises(TooLarge, match="max_gb allows 1e-06"):
        saver.save(state, 2)
    assert names_in(saver.storage) == ["step_00000001-a1"]


def test_a_disk_without_room_is_said_before_anything_is_written(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 400)
    with pytest.raises(TooLarge, match="a tenth more"):
        saver.save(TrainState(model=nn.Linear(10, 10)), 1)
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 500)
    saver.save(TrainState(model=nn.Linear(10, 10)), 1)


def test_labels_follow_the_template(root: Path) -> None:
    saver = Saver(Storage(str(root)), attempt=3, label="{attempt}/{epoch}-{step}")
    assert saver.save(TrainState(model=nn.Linear(1, 1)), 7).label == "3/0-7"
