"""A training for sweeps whose score says how many steps it really made, and which processes make them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Config:
    lr: float = 0.1
    width: int = 8
    epochs: int = 9
    pause: float = 0.05
    """Seconds that an epoch takes."""
    journal: str = ""
    """A directory where each rank says that it began, and its process."""


def train(run, cfg: Config) -> None:
    """The loss of a line that is fitted by steps of `lr`: crossing curves, and noise from torch's generator, which a
    continuation must get back."""
    import torch

    if cfg.journal:
        said = {"pid": os.getpid(), "rank": run.rank, "run": run.id, "attempt": run.attempt, "at": time.time()}
        with open(Path(cfg.journal, "began"), "a") as file:
            file.write(json.dumps(said) + "\n")
    line = torch.nn.Linear(cfg.width, 1, bias=False)
    torch.nn.init.ones_(line.weight)
    model = run.prepare(line)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.5)
    state = run.state(model=model, optimizer=optimizer)
    for _ in run.epochs(cfg.epochs):
        for _ in range(4):
            inputs = torch.randn(16, cfg.width)
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        time.sleep(cfg.pause)
        run.report({"loss": run.mean(loss.detach())}, state=state)


def member(run, cfg: Config) -> None:
    """A member of a population: each attempt says what it begins with, after whatever it continues from."""
    import torch

    line = torch.nn.Linear(cfg.width, 1, bias=False)
    torch.nn.init.ones_(line.weight)
    model = run.prepare(line)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.5)
    state = run.state(model=model, optimizer=optimizer)
    if cfg.journal and run.is_main:
        (group,) = optimizer.param_groups
        held = optimizer.state.get(line.weight, {}).get("momentum_buffer")
        said = {
            "run": run.id, "attempt": run.attempt, "step": run.step, "lr": group["lr"],
            "weights": line.weight.flatten().tolist(), "momentum": None if held is None else held.flatten().tolist(),
        }  # fmt: skip
        with open(Path(cfg.journal, "began"), "a") as file:
            file.write(json.dumps(said) + "\n")
    for _ in run.epochs(cfg.epochs):
        for _ in range(4):
            loss = model(torch.randn(16, cfg.width)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        time.sleep(cfg.pause)
        run.report({"loss": run.mean(loss.detach())}, state=state)


@dataclass
class Bad:
    kind: str = "good"


def bad(run, cfg: Bad) -> None:
    """A trial that ends as its `kind` says, after one good report where it can."""
    import torch

    if cfg.kind == "silent":
        return
    if cfg.kind == "memory":
        torch.empty(1 << 50, dtype=torch.uint8)
    run.report({"loss": 1.0})
    if cfg.kind == "raises":
        raise ArithmeticError("this trial cannot be trained")
    if cfg.kind == "exits":
        os._exit(3)
    while cfg.kind == "hangs":
        time.sleep(0.1)
    run.report({"loss": float("nan") if cfg.kind == "no_number" else 0.5})


leftovers = 0
"""Jobs of this process that have found the module as an earlier one left it."""


def exact(run, cfg: Config) -> None:
    """All that a job could leave to the next one in the same process, and that would change its numbers."""
    global leftovers
    import torch

    leftovers += 1
    model = torch.nn.Sequential(
        torch.nn.Linear(4, cfg.width), torch.nn.BatchNorm1d(cfg.width), torch.nn.Dropout(0.5),
        torch.nn.Linear(cfg.width, 1),
    )  # fmt: skip
    model, loader = run.prepare(
        model,
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4)), batch_size=8, shuffle=True),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(cfg.epochs):
        for (inputs,) in loader:
            loss = model(inputs).square().mean() + 0.0 * leftovers
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
        run.report({"loss": run.mean(loss.detach()), "weights": weights, "leftovers": leftovers}, state=state)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    os.environ["SEARCHED"] = "left behind"
    torch.manual_seed(99)
