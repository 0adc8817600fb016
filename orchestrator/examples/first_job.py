"""A first job: fits a sine. `orc run train=first_job:train epochs=5 lr=0.05`"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(run, cfg):
    x = torch.linspace(-3, 3, 1024).unsqueeze(1)
    data = DataLoader(TensorDataset(x, torch.sin(x)), batch_size=32, shuffle=True)
    model, data = run.prepare(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), data)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=data)
    for _ in run.epochs(cfg.epochs):
        for inputs, targets in data:
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss})
        run.report({"epoch_loss": run.mean(loss.item())}, state=state)
