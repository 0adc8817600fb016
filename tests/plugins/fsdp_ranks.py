"""Ranks that train with FSDP2 and checkpoint together, forked from one warm process: torch is imported once.

`python -m tests.plugins.fsdp_ranks DIRECTORY CASE…`, a case being a function of this module with `ranks` of its own.
What a rank finds is `DIRECTORY/CASE-RANK.json`; a rank that fails writes its traceback to stderr and the exit is 1.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import engine as engine_module
from orchestrator.checkpoints.engine import CheckpointEngine, StateRefused
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.reader import read_manifest
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import SystemClock
from orchestrator.training.group import Group

Case = Callable[[Path, int, int], Any]
CASES: dict[str, tuple[int, Case]] = {}


def ranks(count: int) -> Callable[[Case], Case]:
    def add(case: Case) -> Case:
        CASES[case.__name__] = count, case
        return case

    return add


class Silent:
    """A Diary."""

    def checkpoint(self, info: Any) -> None:
        return

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        return


# -- what is trained -----------------------------------------------------------------------------------------


def model_and_optimizer(
    mesh: DeviceMesh | None = None, *, seed: int = 0
) -> tuple[nn.Module, torch.optim.Optimizer, TrainState]:
    """Rows that no number of ranks divides, one row alone, buffers, a parameter that stays whole."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Linear(5, 1, bias=False))
    if mesh is not None:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model[1].weight})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, optimizer, TrainState(model=model, optimizer=optimizer, ema={"w": model[0].weight}, note="ä")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        generator = torch.Generator().manual_seed(i)
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Collective."""
    found = {f"model/{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        found |= {f"optim/optimizer.state.{i}.{key}": whole(value) for key, value in values.items()}
    return found


def differing(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    if found.keys() != wanted.keys():
        return sorted(found.keys() ^ wanted.keys())
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


def engine_for(directory: Path, name: str, rank: int, world_size: int) -> CheckpointEngine:
    return CheckpointEngine(
        Storage(str(directory / name)), run="r", attempt=1, group=Group(rank, world_size),
        policy=CheckpointPolicy(keep_last=0), clock=SystemClock(), diary=Silent(),
    )  # fmt: skip


def saved(engine: CheckpointEngine, state: TrainState, number: int, **more: Any) -> str:
    info = engine.save(
        state, step=number, epoch=0, epoch_complete=False, metrics={}, is_best=False, reasons=("now",), progress={},
        rank_state={}, data={}, **more,
    )  # fmt: skip
    assert info is not None
    return info.id.rpartition("/")[2]


# -- cases ---------------------------------------------------------------------------------------------------


@ranks(2)
def two_save(directory: Path, rank: int, world_size: int) -> Any:
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer, state = model_and_optimizer(mesh)
    engine = engine_for(directory, "two", rank, world_size)
    step(model, optimizer, 2)
    model[1].running_mean.add_(rank)  # nobody makes a rank's buffers those of another
    names = [saved(engine, state, 1)]
    sharded = everything(model, optimizer)
    kept: list[int] = []
    gathered = engine_module.Snapshot.gathered

    def counted(self: Any, mine: Any) -> Any:
        found = gathered(self, mine)
        kept.append(len(found))
        return found

    engine_module.Snapshot.gathered = counted  # type: ignore[method-assign]
    full = engine_for(directory, "full", rank, world_size)
    saved(full, state, 1, full=True)
    step(model, optimizer, 1, start=2)
    names.append(saved(engine, state, 2))  # by the quick way
    last = everything(model, optimizer)
    if rank == 0:
        save_file(sharded, directory / "after-2.safetensors")
        save_file(last, directory / "after-3.safetensors")
    # The same group, begun anew, goes on bit for bit.
    again, its_optimizer, its_state = model_and_optimizer(mesh, seed=9)
    first = CheckpointEngine.restore(engine, its_state, which=names[0])
    assert first is not None
    at_once = differing(everything(again, its_optimizer), sharded)
    parts = len(first.snapshot.parts)
    step(again, its_optimizer, 1, start=2)
    return {
        "names": names, "restored": at_once, "later": differing(everything(again, its_optimizer), last),
        "parts": parts, "kept": kept, "note": its_state.extra["note"],
        "ema": its_state.extra["ema"]["w"] is again[0].weight,
    }  # fmt: skip


@ranks(2)
def two_go_on_from_one(directory: Path, rank: int, world_size: int) -> Any:
    """What one process saved without FSDP, and with."""
    mesh, found = init_device_mesh("cpu", (world_size,)), {}
    for name in ("one", "one-fsdp", "full"):
        model, optimizer, state = model_and_optimizer(mesh, seed=9)
        assert engine_for(directory, name, rank, world_size).restore(state) is not None
        wanted = load_file(directory / "after-2.safetensors")
        if name == "full":  # as many ranks saved it, with buffers of their own
            wanted["model/1.running_mean"].add_(rank)
        found[name] = differing(everything(model, optimizer), wanted)
    alone, its_optimizer, _ = model_and_optimizer(mesh, seed=9)
    step(alone, its_optimizer, 1)
    load_checkpoint(directory / "two" / "step_00000001-a1", model=alone, optimizer=its_optimizer)
    found["load_checkpoint"] = differing(everything(alone, its_optimizer), load_file(directory / "after-2.safetensors"))
    return found


@ranks(1)
def one(directory: Path, rank: int, world_size: int) -> Any:
    wanted, found = load_file(directory / "after-2.safetensors"), {}
    for name, mesh in (("one", None), ("one-fsdp", init_device_mesh("cpu", (1,)))):
        for source in ("two", "full"):
            model, optimizer, state = model_and_optimizer(mesh, seed=9)
            assert engine_for(directory, source, 0, 1).restore(state, which="step_00000001-a1") is not None
            found[f"{name} from {source}"] = differing(everything(model, optimizer), wanted)
        saved(engine_for(directory, name, 0, 1), state, 1)
    return found


@ranks(3)
def three(directory: Path, rank: int, world_size: int) -> Any:
    wanted, found = load_file(directory / "after-2.safetensors"), {}
    for name, mesh in (("plain", None), ("fsdp", init_device_mesh("cpu", (3,)))):
        model, optimizer, state = model_and_optimizer(mesh, seed=9)
        engine = engine_for(directory, "two", rank, world_size)
        assert engine.restore(state, which="step_00000001-a1") is not None
        found[name] = differing(everything(model, optimizer), wanted)
    # torch's own reader, into the parts of these ranks.
    model, optimizer, state = model_and_optimizer(mesh, seed=9)
    content = model.state_dict()
    reader = HuggingFaceStorageReader(str(directory / "two" / "step_00000001-a1" / "model"))
    dcp.load(content, storage_reader=reader)
    model.load_state_dict(content)
    found["dcp"] = differing(
        {f"model/{name}": whole(tensor) for name, tensor in model.state_dict().items()},
        {name: tensor for name, tensor in wanted.items() if name.startswith("model/")},
    )
    return found


@ranks(4)
def four_in_two_copies(directory: Path, rank: int, world_size: int) -> Any:
    """HSDP: two copies of everything, each in two parts. And rows divided once, columns once more."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer, state = model_and_optimizer(mesh)
    step(model, optimizer, 2)
    model[1].running_mean.add_(rank)
    engine = engine_for(directory, "hsdp", rank, world_size)
    name = saved(engine, state, 1)
    content = everything(model, optimizer)
    if rank == 0:
        save_file(content, directory / "hsdp.safetensors")
    again, its_optimizer, its_state = model_and_optimizer(mesh, seed=9)
    assert engine.restore(its_state) is not None
    manifest = read_manifest(Storage(str(directory / "hsdp" / name)))
    mine = [file for file in manifest.files if f"-{rank + 1:05d}-of" in file.path]
    table = distribute_tensor(torch.arange(35.0).reshape(5, 7), mesh, [Shard(0), Shard(1)])
    saved(engine_for(directory, "grid", rank, world_size), TrainState(table=table), 1)
    target = TrainState(table=distribute_tensor(torch.zeros(5, 7), mesh, [Shard(1), Shard(0)]))
    assert engine_for(directory, "grid", rank, world_size).restore(target) is not None
    sums = DTensor.from_local(torch.ones(2), mesh, [Partial(), Partial()])
    part_of_them = DTensor.from_local(torch.ones(2), mesh["shard"], [Shard(0)])
    refused = []
    for value in (sums, part_of_them):
        try:
            saved(engine_for(directory, "refused", rank, world_size), TrainState(odd=value), 1)
        except StateRefused as error:
            refused.append(str(error))
    return {
        "restored": differing(everything(again, its_optimizer), content),
        "bytes": sum(tensor.size_bytes for file in mine for tensor in file.tensors if tensor.offsets is not None),
        "grid": torch.equal(target.extra["table"].full_tensor(), torch.arange(35.0).reshape(5, 7)),
        "refused": refused,
    }  # fmt: skip


# -- processes -----------------------------------------------------------------------------------------------


def played(directory: Path, name: str) -> bool:
    """Forks the ranks of a case and waits for all; whether they all did well."""
    count, case = CASES[name]
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            os._exit(_as_rank(directory, name, case, rank, count))
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    return not any(ends)


def _as_rank(directory: Path, name: str, case: Case, rank: int, count: int) -> int:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{directory}/{name}.meeting", rank=rank, world_size=count)
        found = case(directory, rank, count)
        (directory / f"{name}-{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(0 if all(played(Path(sys.argv[1]), each) for each in sys.argv[2:]) else 1)
