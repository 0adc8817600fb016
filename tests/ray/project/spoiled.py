"""Train functions that go wrong: by a batch, or by a learning rate."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass


@dataclass
class Batch:
    sample: int = 43
    """In epoch 1 the loss of its batch is no number, on the rank that has it."""
    avoids: bool = False
    """That batch is never looked at."""


def train(run, cfg: Batch) -> None:
    """Three epochs of 8 steps, 8 samples each over two ranks; the reported loss is the rank's own."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(1)
    inputs = torch.randn(64, 4)
    data = TensorDataset(torch.arange(64), inputs, inputs.sum(1, keepdim=True))
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    model, loader = run.prepare(network, DataLoader(data, 4, shuffle=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(3):
        for numbers, values, targets in loader:
            has_it = epoch == 1 and cfg.sample in numbers.tolist()
            if run.sum(float(has_it)) and cfg.avoids:
                continue
            loss = nn.functional.mse_loss(model(values), targets) * (float("nan") if has_it else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.report({"loss": loss.item()}, state=state)
            if has_it:
                run.event("spoilt", "the sample is in this batch")
    weights = torch.cat([each.detach().flatten() for each in model.parameters()])
    run.params({"weights": weights.tolist()})


@dataclass
class Rate:
    lr: float = 2.6
    dies: int = 2
    """The attempt that is killed before it has saved anything."""


def climb(run, cfg: Rate) -> None:
    """One weight, whose loss grows from step 15 on, where the schedule comes to the full learning rate."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    loader = run.prepare(DataLoader(TensorDataset(torch.zeros(8)), 1, shuffle=True))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step >= 14 else 0.0)
    state = run.state(model=torch.nn.ParameterList([weight]), optimizer=optimizer, scheduler=schedule, loader=loader)
    if run.attempt == cfg.dies:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in run.epochs(5):
        for _ in loader:
            loss = weight.square().sum() / 2
            optimizer.zero_grad()
            loss.backward()
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            run.report({"loss": loss.item(), "rate": rate, "base": schedule.base_lrs[0]}, state=state)
