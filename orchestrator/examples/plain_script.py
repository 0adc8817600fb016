"""A run in a script of your own, without Ray and without `orc run`: `python -m orchestrator.examples.plain_script`.

The same lines work in a notebook, and under torchrun (every rank enters the block).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import orchestrator


def main(args: argparse.Namespace, run: orchestrator.Run) -> None:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 256).unsqueeze(1)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    state = run.state(model=model, optimizer=optimizer)
    for _ in run.epochs(args.epochs):
        loss = nn.functional.mse_loss(model(x), torch.sin(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report({"loss": loss.item()}, state=state)
    print(f"run {run.name}: loss {loss.item():.4f}, more: orc show {run.id}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()
    with orchestrator.start_run(experiment="sine", params=args, resume=True) as run:
        main(args, run)
