"""A training that saves through shared memory and a writer process, and is continued from there."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.manifest import CheckpointInfo, CheckpointState
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.slab import Owner
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import SystemClock
from orchestrator.errors import UserError
from orchestrator.training import standalone
from orchestrator.training.group import Group
from orchestrator.training.standalone import Checkpoints


class Diary:
    def __init__(self) -> None:
        self.told: list[CheckpointInfo] = []
        self.events: list[str] = []

    def checkpoint(self, info: CheckpointInfo) -> None:
        self.told.append(info)

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self.events.append(f"{kind}: {message}")


class Training:
    def __init__(self, storage: Path, client: SlabClient | None, attempt: int = 1) -> None:
        torch.manual_seed(attempt)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state = TrainState(model=self.model, optimizer=self.optimizer)
        self.diary = Diary()
        direct = DirectStager(Storage(str(storage)))
        owner = Owner(run="r1", attempt=attempt, rank=0, pid=os.getpid())
        told = self.diary.events
        stager = client and SlabStager(
            client, owner=owner, fallback=direct, tell=lambda event, why: told.append(f"{event}: {why}")
        )
        self.engine = CheckpointEngine(
            Storage(str(storage)), run="r1", attempt=attempt, group=Group(), policy=CheckpointPolicy(keep_last=2),
            clock=SystemClock(), diary=self.diary, stager=stager,
        )  # fmt: skip

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model(torch.randn(4, 8)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> CheckpointInfo | None:
        return self.engine.save(
            self.state, step=step, epoch=0, epoch_complete=False, metrics={}, is_best=False, reasons=("now",),
            progress={}, rank_state={}, data={}, must=True, waits=False,
        )  # fmt: skip

    def bits(self) -> list[torch.Tensor]:
        of = [*self.model.state_dict().values()]
        of += [value for each in self.optimizer.state_dict()["state"].values() for value in each.values()]
        return [tensor.clone() for tensor in of]


@pytest.fixture
def client() -> Iterator[SlabClient]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    client = SlabClient(str(root / "r"), may_start=True)
    yield client
    client.stop()
    deadline = time.monotonic() + 20
    while list((root / "r" / "members").glob("*.bell")) and time.monotonic() < deadline:
        time.sleep(0.01)
    shutil.rmtree(root)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_training_goes_on_while_its_state_is_written(tmp_path: Path, client: SlabClient) -> None:
    training = Training(tmp_path, client)
    training.step(0)
    training.engine.expect(training.state)
    kept: dict[int, list[torch.Tensor]] = {}
    for step in range(1, 7):
        training.step(step)
        kept[step] = training.bits()
        info = training.save(step)
        assert info is not None
        assert info.state is CheckpointState.staged
        if step == 3:
            os.kill(client.describe()["pid"], signal.SIGKILL)  # the next one goes on
    assert training.engine.drain(30)
    ended = training.engine.poll()
    assert [(each.info.step, each.info.state, each.why) for each in ended] == [
        (step, CheckpointState.committed, "") for step in range(1, 7)
    ]
    training.engine.close()
    found = catalog.scan(Storage(str(tmp_path))).committed
    assert [manifest.step for manifest in found] == [6, 5]
    assert training.diary.events == []

    again = Training(tmp_path, None, attempt=2)
    stored = again.engine.restore(again.state)
    assert stored is not None
    assert stored.manifest.step == 6
    assert same(again.bits(), kept[6])


def test_what_the_dead_training_had_sealed_is_where_the_next_one_begins(tmp_path: Path, client: SlabClient) -> None:
    assert client.ensure()
    pid = os.fork()
    if pid == 0:
        try:
            training = Training(tmp_path, client)
            training.step(1)
            training.save(1)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 20
    while not catalog.scan(Storage(str(tmp_path))).committed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    expected = Training(tmp_path, None)
    expected.step(1)
    again = Training(tmp_path, None, attempt=2)
    stored = again.engine.restore(again.state)
    assert stored is not None
    assert stored.manifest.step == 1
    assert same(again.bits(), expected.bits())


def test_a_script_killed_right_after_a_save_finds_it_again(
    tmp_path: Path, client: SlabClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "slab_root", lambda: client.root)
    monkeypatch.chdir(tmp_path)
    pid = os.fork()
    if pid == 0:
        try:
            torch.manual_seed(0)
            checkpoints = Checkpoints("here")
            info = checkpoints.save(checkpoints.state(model=nn.Linear(4, 4)), step=3)
            (tmp_path / "told").write_text(info.state.value if info else "skipped")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "told").read_text() == "staged"
    torch.manual_seed(0)
    expected, model = nn.Linear(4, 4), nn.Linear(4, 4)
    with Checkpoints("here") as again:
        found = again.load_latest(again.state(model=model))
    assert found is not None
    assert found.step == 3
    assert same([*model.state_dict().values()], [*expected.state_dict().values()])


def test_a_mode_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'eager', 'overlap', 'direct'"):
        Checkpoints(str(tmp_path), mode="lazy")
