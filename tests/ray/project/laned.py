"""A training for lanes: one good kind whose numbers any leftover would change, and the bad ones beside it."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Config:
    kind: str = "good"
    lr: float = 0.1
    width: int = 8
    epochs: int = 3
    journal: str = ""
    """A directory where each rank says when it trained."""


trained = 0
"""Jobs that have found the module as an earlier one left it."""


def train(run, cfg: Config) -> None:
    global trained
    import torch

    trained += 1
    torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, cfg.width), torch.nn.BatchNorm1d(cfg.width), torch.nn.Dropout(0.5),
        torch.nn.Linear(cfg.width, 1),
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.randn(64, 4))
    model, loader = run.prepare(model, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    first = 0.0
    for _ in run.epochs(cfg.epochs):
        for (inputs,) in loader:
            loss = model(inputs).square().mean() + float(trained - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = first or time.time()
        weights = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
        run.report({"loss": run.mean(loss.detach()), "weights": weights}, state=state)
        _fail(cfg.kind, run.rank, model)
    if cfg.journal:
        line = {"run": run.id, "rank": run.rank, "pid": os.getpid(), "first": first, "last": time.time()}
        with open(Path(cfg.journal, f"rank-{run.rank}"), "a") as file:
            file.write(json.dumps(line) + "\n")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(99)
    os.environ["LEFT"] = "behind"
    if cfg.kind == "leaves" and run.rank == 1:
        threading.Thread(target=threading.Event().wait, name="left-behind", daemon=True).start()


def _fail(kind: str, rank: int, model) -> None:
    import torch

    if rank != 1:
        return  # the other rank goes on to its next collective, and must be freed
    if kind == "raises":
        raise ArithmeticError("this trial cannot be trained")
    if kind == "backward":

        def fail(_: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("no gradient today")

        next(model.parameters()).register_hook(fail)
    if kind == "exits":
        os._exit(3)
    while kind == "hangs":
        time.sleep(0.1)
