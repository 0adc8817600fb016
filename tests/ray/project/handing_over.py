"""A train function that hands checkpoints over and waits at gates, so that something may happen in between."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Gates:
    journal: str
    """A directory. Step 3 begins when there is a file `gate-3`; `saved-3-rank-0` says what rank 0 then saved."""
    steps: int = 3


def steps(run, cfg: Gates) -> None:
    """Each step ends with a save that only the first one waits for, and a report."""
    torch.manual_seed(run.attempt)
    model = run.prepare(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    state = run.state(model=model, optimizer=optimizer)
    run.event("begins", "a rank", after=run.step, pid=os.getpid())
    journal = Path(cfg.journal)
    while run.step < cfg.steps:
        step = run.step + 1
        while not (journal / f"gate-{step}").exists():
            time.sleep(0.02)
        loss = model(torch.full((8, 32), float(run.rank + step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log({"loss": loss.detach()})
        info = run.save(state, wait=step == 1)
        note = journal / f"saved-{step}-rank-{run.rank}"
        note.with_suffix(".new").write_text(f"{os.getpid()} {info.state} {Path(info.uri).name}")
        note.with_suffix(".new").rename(note)
        run.report({"done": step})
