"""Disks that are full, storages that fail, do not answer or were never there, two trainings in one place, deletions cut
short: training goes on, what is lost is told, and whatever can be loaded afterwards is right.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import disk
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.engine import CheckpointEngine, SaveFailed
from orchestrator.checkpoints.job import KeepRules
from orchestrator.checkpoints.keeping import Keeping
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.reader import verify
from orchestrator.checkpoints.service import WriterService
from orchestrator.checkpoints.slab import Owner
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager
from orchestrator.clock import SystemClock
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.group import Group
from orchestrator.training.run import Run
from tests.plugins.checkpoint_training import Diary, Journal, Trained, forked, save, wait
from tests.plugins.s3_server import S3Server

CHANGES = ("write", "fallocate", "mkdir", "truncate", "replace", "fsync")
"""What a failing disk may refuse; removing goes on. A full one makes durable what it has."""


@pytest.fixture
def root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield root / "r"
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _no_watcher() -> Iterator[None]:
    yield
    disk.watch(None)


class Writer:
    """A member that works in a thread of ours."""

    def __init__(self, root: Path) -> None:
        self.service = WriterService(str(root), threads=2)
        self.service.serve()
        self._thread = threading.Thread(target=self.service.run, daemon=True)
        self._thread.start()
        self.client = SlabClient(str(root), may_start=False)

    def close(self) -> None:
        self.service.stop()
        self._thread.join()
        self.service.close()


@pytest.fixture
def writer(root: Path) -> Iterator[Writer]:
    writer = Writer(root)
    yield writer
    writer.close()


class Training:
    """One rank that saves when it is told to."""

    def __init__(self, url: str, directory: Path, *, client: SlabClient | None = None, attempt: int = 1) -> None:
        self.url, self.trained = url, Trained(count=3, numel=1500)
        self.storage, self.diary = Storage(url), Diary(Journal(directory / "journal"), attempt)
        owner = Owner(run="r1", attempt=attempt, rank=0, pid=os.getpid())
        self.stager = client and SlabStager(
            client, owner=owner, fallback=DirectStager(self.storage), tell=lambda event, why: None
        )
        self.engine = CheckpointEngine(
            self.storage, run="r1", attempt=attempt, group=Group(), policy=CheckpointPolicy(keep_last=2, wait=30.0),
            clock=SystemClock(), diary=self.diary, stager=self.stager,
        )  # fmt: skip

    def save(self, step: int) -> bool:
        """Whether there is a checkpoint of it, as the engine says."""
        self.trained.go_to(step)
        try:
            save(self.engine, self.trained, step, waits=True)
        except SaveFailed:
            return False
        return True

    def judge(self, newest: int) -> None:
        """The newest is there, and right; nothing else looks like a checkpoint that is none."""
        found = catalog.scan(self.storage)
        assert found.corrupt == ()
        for manifest in found.committed:
            assert verify(self.storage.join(manifest.name), manifest) == []
        assert max((manifest.step for manifest in found.committed), default=0) == newest
        if newest:
            self.trained.forget()
            stored = self.engine.restore(self.trained.state)
            assert stored is not None
            assert stored.manifest.step == newest
            assert self.trained.is_right(newest)

    def close(self) -> None:
        self.engine.close()


def partial_files(directory: Path) -> list[Path]:
    return list(directory.rglob("*.partial"))


def failing(number: int, code: int, *, once: bool) -> Callable[[], int]:
    """The disk refuses change `number` from now on, and all that follow unless `once`; gives how many it refused."""
    left, refused = number, 0

    def watcher(call: str, path: str) -> None:
        nonlocal left, refused
        if call not in CHANGES or (call == "fsync" and code == errno.ENOSPC):
            return
        left -= 1
        if left == -1 or (left < 0 and not once):
            refused += 1
            raise OSError(code, os.strerror(code), path)

    disk.watch(watcher)
    return lambda: refused


@pytest.mark.parametrize(
    ("way", "code", "once"),
    [
        ("direct", errno.ENOSPC, True),
        ("direct", errno.ENOSPC, False),
        ("direct", errno.EIO, True),
        ("slab", errno.ENOSPC, True),
        ("slab", errno.EIO, True),
    ],
)
def test_a_disk_that_refuses_any_write_costs_that_save_at_most(
    tmp_path: Path, writer: Writer, way: str, code: int, once: bool
) -> None:
    """Full or failing, at each of its writes in turn, once or (`once` is False) from then on."""
    training = Training(str(tmp_path / "c"), tmp_path, client=writer.client if way == "slab" else None)
    assert training.save(1)
    newest, failures = 1, 0
    every = 1 if code == errno.ENOSPC and once else 3
    for step in itertools.count(2):
        refused = failing(every * (step - 2), code, once=once)
        is_saved = training.save(step)
        disk.watch(None)
        failures += not is_saved
        newest = step if is_saved else newest
        training.judge(newest)
        assert partial_files(tmp_path) == []
        if not refused():
            break
    assert is_saved
    assert failures >= 15 // every, "it was refused at each of its writes"
    training.close()


# -- a run whose storage is gone for a while -----------------------------------------------------------------


class Recorder:
    """What a run says of itself."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.points: dict[str, float] = {}

    def log(self, metrics: Any, step: int | None = None) -> None:
        self.points |= {key: float(value) for key, value in metrics.items()}

    def fact(self, fact: Fact) -> None:
        self.facts.append(fact)

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True

    def events(self) -> list[str]:
        return [fact.data["kind"] for fact in self.facts if fact.kind is FactKind.event]

    def committed(self) -> list[int]:
        return [
            fact.data["step"]
            for fact in self.facts
            if fact.kind is FactKind.checkpoint and fact.data["state"] == "committed"
        ]


class Trainer:
    """A run that reports every step and saves every second one."""

    def __init__(self, url: str, client: SlabClient | None = None) -> None:
        self.recorder, self.trained, self.step = Recorder(), Trained(count=3, numel=1500), 0
        self.storage = Storage(url).join("checkpoints")
        owner = Owner(run="r1", attempt=1, rank=0, pid=os.getpid())
        stager = client and SlabStager(
            client, owner=owner, fallback=DirectStager(self.storage), tell=lambda event, why: None
        )
        ticket = RunTicket(run="r1", name="n", experiment="e", attempt=1, directory=url)
        policy = CheckpointPolicy(every_steps=2, every_epochs=0, keep_last=2, wait=60.0)
        self.run = Run(ticket, self.recorder, checkpoints=policy, stager=stager)
        self.state = self.run.state(model=self.trained.model, optimizer=self.trained.optimizer)

    def train_until(self, what: Callable[[], object], why: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{why}: {self.recorder.events()}"
            self.step += 1
            self.trained.go_to(self.step)
            self.run.report({"loss": 1.0}, state=self.state)

    def judge(self) -> None:
        """All that can be loaded is right, and the newest is the last that was told."""
        found = catalog.scan(self.storage)
        assert found.corrupt == ()
        assert found.committed[0].step == self.recorder.committed()[-1]
        engine = CheckpointEngine(
            self.storage, run="r1", attempt=2, group=Group(), policy=CheckpointPolicy(), clock=SystemClock(),
            diary=Diary(Journal(Path(os.devnull)), 2),
        )  # fmt: skip
        self.trained.forget()
        stored = engine.restore(self.trained.state)
        assert stored is not None
        assert stored.manifest.step == found.committed[0].step
        assert self.trained.is_right(stored.manifest.step)


@pytest.mark.parametrize("way", ["direct", "slab"])
def test_a_storage_that_cannot_be_written_from_the_start_is_told_and_used_when_it_can(
    tmp_path: Path, writer: Writer, way: str
) -> None:
    refused = failing(0, errno.EROFS, once=False)
    trainer = Trainer(str(tmp_path / "r1"), writer.client if way == "slab" else None)
    trainer.train_until(lambda: "checkpoint-failed" in trainer.recorder.events(), "it is told")
    before = trainer.step
    trainer.train_until(lambda: trainer.step >= before + 10, "training goes on")
    assert refused() > 1
    assert trainer.recorder.committed() == []
    assert list(tmp_path.iterdir()) == []
    disk.watch(None)
    trainer.train_until(trainer.recorder.committed, "it is used")
    trainer.run.finish()
    trainer.judge()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.close()


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> Iterator[str]:
    bucket = server.bucket(request.node.name)
    yield f"s3://key:secret@{bucket}/runs/r1?{server.options}&connect_timeout=1&request_timeout=1"
    server.fault = lambda method, path: ""
    server.faults.clear()


@pytest.mark.parametrize(("fault", "at"), [("500", "safetensors"), ("500", ""), ("stall", "MANIFEST"), ("stall", "")])
def test_a_store_that_fails_for_a_while_costs_saves_and_no_training(
    server: S3Server, url: str, writer: Writer, fault: str, at: str
) -> None:
    trainer = Trainer(url, writer.client)
    trainer.train_until(trainer.recorder.committed, "a checkpoint is there")
    server.fault = lambda method, path: fault if at in path else ""
    trainer.train_until(lambda: server.faults, "the store is asked")
    begun, skipped = trainer.step, trainer.run._checkpoints.skipped
    trainer.train_until(lambda: trainer.run._checkpoints.skipped > skipped + 3, "saves are skipped")
    trainer.train_until(lambda: trainer.step >= begun + 50, "training goes on")
    assert "checkpoint-skipped" in trainer.recorder.events(), "it is told"
    server.fault = lambda method, path: ""
    server.over.set()  # who waits for an answer has it now
    server.over.clear()
    told = len(trainer.recorder.committed())
    trainer.train_until(lambda: len(trainer.recorder.committed()) > told + 1, "it goes on as before")
    trainer.run.finish()
    trainer.judge()


# -- two in one place ----------------------------------------------------------------------------------------


def saves_many(directory: Path, attempt: int, plus: int) -> None:
    training = Training(str(directory / "c"), directory, attempt=attempt)
    for step in range(1, 16):
        training.trained.go_to(step + plus)
        with suppress(SaveFailed):
            save(training.engine, training.trained, step, waits=True)


def test_an_attempt_that_should_be_dead_cannot_harm_the_next_one(tmp_path: Path) -> None:
    pids = [forked(partial(saves_many, tmp_path, attempt, 1000 * attempt), tmp_path / "said") for attempt in (1, 2)]
    assert [wait(pid) for pid in pids] == [0, 0], (tmp_path / "said").read_text()
    training = Training(str(tmp_path / "c"), tmp_path, attempt=3)
    stored = training.engine.restore(training.trained.state)
    assert stored is not None
    assert (stored.manifest.attempt, stored.manifest.step) == (2, 15)
    assert training.trained.is_right(2015)
    for manifest in catalog.scan(training.storage).committed:
        assert verify(training.storage.join(manifest.name), manifest) == []


def test_two_trainings_that_take_one_attempt_for_theirs_never_mix(tmp_path: Path) -> None:
    """What is loaded is all of one of them."""
    pids = [forked(partial(saves_many, tmp_path, 1, plus), tmp_path / "said") for plus in (1000, 2000)]
    assert [wait(pid) for pid in pids] == [0, 0], (tmp_path / "said").read_text()
    training = Training(str(tmp_path / "c"), tmp_path, attempt=2)
    stored = training.engine.restore(training.trained.state)
    if stored is not None:
        step = stored.manifest.step
        assert training.trained.is_right(1000 + step) or training.trained.is_right(2000 + step)


# -- deletions -----------------------------------------------------------------------------------------------


def test_a_deletion_interrupted_anywhere_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """Each call that removes a file or a directory, those inside of a tree's removal too."""

    def dies_at(number: int, directory: Path, name: str) -> None:
        left = number

        def count(*_: Any) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        def counted(real: Callable[..., None]) -> Callable[..., None]:
            return lambda *given, **more: [count(), real(*given, **more)][1]

        disk.watch(count)
        os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)  # type: ignore[assignment]
        catalog.remove(Storage(str(directory)), name)

    made = Training(str(tmp_path / "made"), tmp_path)
    for step in (1, 2):
        assert made.save(step)
    made.judge(2)
    for number in itertools.count():
        directory = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "made", directory)
        ended = wait(forked(partial(dies_at, number, directory, "step_00000002-a1"), tmp_path / "said"))
        assert ended in (0, -signal.SIGKILL)
        left = Training(str(directory), tmp_path, attempt=2)
        # Between its manifest and its receipt nothing is missing yet: who resumes then makes it a checkpoint again.
        is_there = (directory / "step_00000002-a1" / "rank-0000.json").exists()
        left.engine.restore(left.trained.state)
        left.judge(2 if is_there else 1)
        assert left.save(3), "the next one goes on"
        catalog.sweep(left.storage, attempt=3, now=time.time() + 7200)
        assert catalog.scan(left.storage).incomplete == ()
        assert partial_files(directory) == []
        if ended == 0:
            break
    assert number >= 8


def test_retention_interrupted_and_taken_up_again_keeps_what_it_should(tmp_path: Path) -> None:
    made = Training(str(tmp_path / "c"), tmp_path)
    for step in (1, 2):
        assert made.save(step)
    removed: list[str] = []

    def interrupted(call: str, path: str) -> None:
        if call == "rmtree":
            removed.append(path)
            raise OSError(errno.EIO, "the disk is on fire", path)

    disk.watch(interrupted)
    assert made.save(3)
    disk.watch(None)
    assert removed
    made.judge(3)
    newest = catalog.scan(made.storage).committed[0]
    Keeping(made.storage, KeepRules(last=1), attempt=1).after_commit(newest, now=time.time())
    made.judge(3)
    assert [manifest.step for manifest in catalog.scan(made.storage).committed] == [3]


def test_nothing_of_a_writer_is_left_at_its_end(root: Path, tmp_path: Path) -> None:
    """Threads, memory, sockets, and files that are being written."""
    before = threading.active_count()
    writer = Writer(root)
    try:
        training = Training(str(tmp_path / "c"), tmp_path, client=writer.client)
        for step in range(1, 6):
            assert training.save(step)
        training.close()
        writer.service.remove_orphans()
    finally:
        writer.close()
    assert threading.active_count() <= before + 1, "but for one that answers a request"
    assert list((root / "slabs").iterdir()) == []
    assert list((root / "members").glob("*.bell")) == []
    assert partial_files(tmp_path) == []


def test_a_writer_whose_memory_is_taken_away_ends(root: Path) -> None:
    writer = WriterService(str(root))
    working = threading.Thread(target=writer.run, daemon=True)
    working.start()
    while root.exists():  # the writer, too, makes files in it
        shutil.rmtree(root, ignore_errors=True)
    working.join(30)
    assert not working.is_alive()
    writer.close()
    root.mkdir()  # for the fixture
