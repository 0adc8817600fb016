"""A training whose continuation shows whether anything was forgotten: shuffling, dropout, momentum, running means."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Config:
    out: str = ""
    kill_at: int = 0
    """In the first attempt every rank is gone at this step; 0: none is."""


def train(run, cfg: Config) -> None:
    """Three epochs of five steps, saved at every second one."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(50, 4, generator=generator), torch.randn(50, 1, generator=generator))
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    )
    model, loader = run.prepare(model, DataLoader(data, batch_size=5, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(3):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()})
            run.report(state=state)
            if run.attempt == 1 and run.step == cfg.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    values = [value.flatten().double().tolist() for value in model.state_dict().values()]
    Path(cfg.out, f"{run.name}-{run.rank}.json").write_text(json.dumps(values))
