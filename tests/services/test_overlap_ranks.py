"""Two ranks that train and save at once: the copy goes on into the next step, on each of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import orchestrator
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, slab_stager
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.manifest import CheckpointInfo
from orchestrator.checkpoints.policy import CheckpointPolicy, Mode
from orchestrator.checkpoints.slab import Owner
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import SystemClock
from orchestrator.training.group import Group

WORLD, STEPS = 2, 4
KINDS = ("SGD", "AdamW foreach", "AdamW fused")


class Diary:
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def checkpoint(self, info: CheckpointInfo) -> None:
        return

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self.said.append(f"{kind}: {message}")


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), foreach="foreach" in kind, fused="fused" in kind)


def train(rank: int, directory: str, root: str, kind: str) -> None:
    """Saves after every step, and keeps what each save must hold."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Linear(512, 64)))
    optimizer = optimizer_of(kind, model)
    state = TrainState(model=model, optimizer=optimizer)
    said: list[str] = []
    storage = Storage(directory)
    stager = SlabStager(
        SlabClient(root, may_start=True), owner=Owner(run="r", attempt=1, rank=rank, pid=os.getpid()),
        fallback=DirectStager(storage), tell=lambda event, why: said.append(f"{event}: {why}"), mode=Mode.overlap,
    )  # fmt: skip
    engine = CheckpointEngine(
        storage, run="r", attempt=1, group=Group(rank, WORLD), policy=CheckpointPolicy(keep_last=0),
        clock=SystemClock(), diary=Diary(said), stager=stager,
    )  # fmt: skip
    kept = {}
    for step in range(1, STEPS + 1):
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        info = engine.save(
            state, step=step, epoch=0, epoch_complete=False, metrics={}, is_best=False, reasons=("now",), progress={},
            rank_state={}, data={}, must=True, waits=False,
        )  # fmt: skip
        assert info is not None
        kept[f"step_{step:08d}-a1"] = {
            "model": {name: tensor.clone() for name, tensor in model.module.state_dict().items()},
            "optimizer": {
                f"{n}.{name}": tensor.clone()
                for n, each in optimizer.state_dict()["state"].items()
                for name, tensor in each.items()
            },
        }
    assert engine.drain(60)
    engine.poll()
    engine.close()
    assert said == []
    if rank == 0:
        torch.save(kept, Path(directory, "kept.pt"))


def rank_of_two(rank: int, directory: str, root: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=WORLD)
    for kind in KINDS:
        place = Path(directory, kind.replace(" ", "-"))
        place.mkdir(exist_ok=True)
        train(rank, str(place), root, kind)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield str(root / "r")
    finally:
        SlabClient(str(root / "r"), may_start=False).stop()
        deadline = time.monotonic() + 20
        while list((root / "r" / "members").glob("*.bell")) and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: str) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(rank_of_two, args=(str(directory), root), nprocs=WORLD, start_method="fork")
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_holds_the_bits_of_its_moment(kind: str, trained: Path) -> None:
    place = trained / kind.replace(" ", "-")
    kept = torch.load(place / "kept.pt", weights_only=True)
    found = catalog.scan(Storage(str(place))).committed
    assert sorted(manifest.name for manifest in found) == sorted(kept)
    for name, expected in kept.items():
        loaded = orchestrator.load_checkpoint(str(place / name))
        assert loaded.model.keys() == expected["model"].keys()
        assert all(torch.equal(loaded.model[key], tensor) for key, tensor in expected["model"].items())
        optimizer = {
            f"{n}.{key}": tensor for n, each in loaded.optimizer["state"].items() for key, tensor in each.items()
        }
        assert optimizer.keys() == expected["optimizer"].keys()
        assert all(torch.equal(optimizer[key], tensor) for key, tensor in expected["optimizer"].items())


def save_and_end(directory: str, root: str) -> None:
    """A program that is over before the copy has begun."""
    real = slab_stager._copy

    def copy(places: Any, tensors: Any, **how: Any) -> None:
        if threading.current_thread().name == "staging copy":
            threading.main_thread().join()
        real(places, tensors, **how)

    slab_stager._copy = copy
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    checkpoints = orchestrator.Checkpoints(directory, mode="overlap", slab_directory=root)
    state = checkpoints.state(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    checkpoints.save(state, step=1)


def test_a_program_that_ends_right_after_a_save_has_saved(tmp_path: Path, root: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=save_and_end, args=(str(tmp_path), root))
    process.start()
    process.join()
    assert process.exitcode == 0
    deadline = time.monotonic() + 20
    while not catalog.scan(Storage(str(tmp_path))).committed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    torch.manual_seed(0)
    expected = nn.Linear(100, 100)
    loaded = orchestrator.load_checkpoint(str(tmp_path))
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in expected.state_dict().items())
