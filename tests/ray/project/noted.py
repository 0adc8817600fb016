"""A train function that waits at gates and notes what it saved and what it was given back, as digests of the bytes."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Gates:
    journal: str
    """A directory. Step 3 begins when there is a file `gate-3`; see `note` for what is put there."""
    steps: int = 3


def note(journal: str, name: str, *words: object) -> None:
    path = Path(journal, name)
    path.with_suffix(".new").write_text(" ".join(map(str, words)))
    path.with_suffix(".new").rename(path)


def digest(model: dict[str, torch.Tensor], optimizer: dict[int, dict[str, torch.Tensor]]) -> str:
    """Of the model's and the optimizer's tensors, by name."""
    found = hashlib.sha256()
    named = {f"model.{name}": tensor for name, tensor in model.items()}
    named |= {f"{n}.{name}": tensor for n, each in optimizer.items() for name, tensor in each.items()}
    for name in sorted(named):
        found.update(name.encode() + b"\0" + named[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def steps(run, cfg: Gates) -> None:
    """Each step ends with a save; only the first one is waited for."""
    torch.manual_seed(run.attempt)  # another model in each attempt: what is not restored shows
    model = run.prepare(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    bare = getattr(model, "module", model)
    state = run.state(model=model, optimizer=optimizer)

    def now() -> str:
        return digest(bare.state_dict(), optimizer.state_dict()["state"])

    note(cfg.journal, f"begun-{run.attempt}-rank-{run.rank}", os.getpid(), run.step, now())
    while run.step < cfg.steps:
        step = run.step + 1
        while not Path(cfg.journal, f"gate-{step}").exists():
            time.sleep(0.02)
        loss = model(torch.full((8, 32), float(run.rank + step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log({"loss": loss.detach()})
        note(cfg.journal, f"saving-{step}-attempt-{run.attempt}-rank-{run.rank}", now())
        run.save(state, wait=step == 1)
        run.report({"done": step})
