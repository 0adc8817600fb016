"""A training with FSDP2 whose continuation shows whether anything was forgotten, and that notes what it had at each
step: shuffling, dropout, moments, running means that differ between the ranks.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from noted import digest


@dataclass
class Config:
    out: str = ""
    kill_at: int = 0
    """In the first attempt every rank is gone at this step; 0: none is."""


def train(run, cfg: Config) -> None:
    """Four epochs of five steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.utils.data import DataLoader, TensorDataset

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(50, 4, generator=generator), torch.randn(50, 1, generator=generator))
    torch.manual_seed(run.attempt)  # another model in each attempt: what is not restored shows
    if run.attempt == 1:
        torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 33), torch.nn.BatchNorm1d(33), torch.nn.Dropout(0.5), torch.nn.Linear(33, 1)
    )
    mesh = init_device_mesh("cpu", (run.world_size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    loader = run.prepare(DataLoader(data, batch_size=5, shuffle=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = run.state(model=model, optimizer=optimizer, loader=loader)

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    def now() -> str:
        """Collective. Of all ranks' parts."""
        return digest(
            {name: whole(tensor) for name, tensor in model.state_dict().items()},
            {
                n: {key: whole(value) for key, value in each.items()}
                for n, each in optimizer.state_dict()["state"].items()
            },
        )

    def report() -> None:
        found = now()
        with Path(cfg.out, f"{run.name}-{run.rank}.digests").open("a") as file:
            file.write(f"{run.step} {found}\n")
        run.report(state=state)

    for _ in run.epochs(4):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()})
            report()
            if run.attempt == 1 and run.step == cfg.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        report()
    Path(cfg.out, f"{run.name}-{run.rank}.json").write_text(json.dumps(now()))
