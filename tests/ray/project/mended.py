"""A train function whose failures are answered."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Full:
    fits: int = 4
    """Samples for which rank 1 has memory."""
    fails_at: int = 6
    """The step after which it loses its GPU, every time."""


def train(run, cfg: Full) -> None:
    """Four steps of 8 samples per epoch and rank, in as many micro-batches as it takes."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(64.0).unsqueeze(1))
    model, loader = run.prepare(torch.nn.Linear(1, 1), DataLoader(data, 8, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(3):
        for (samples,) in loader:
            with run.accumulate(model) as is_complete:
                if run.rank == 1 and len(samples) > cfg.fits:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                (model(samples).square().mean() / run.accumulation_steps).backward()
            if is_complete:
                optimizer.step()
                optimizer.zero_grad()
                if run.rank == 1 and run.step == cfg.fails_at:
                    run.fail("device_fault", "the GPU fell off the bus")
                run.report({"samples": len(samples) * run.accumulation_steps}, state=state)


@dataclass
class Journal:
    journal: str
    """A directory."""
    kind: str = ""


def scripted(run, cfg: Journal) -> None:
    """Each attempt ends as its number says: out of memory, a lost GPU, with its driver, twice a lost GPU, well."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    model, loader = run.prepare(torch.nn.Linear(1, 1), DataLoader(TensorDataset(torch.zeros(8, 1)), 8, shuffle=True))
    for (samples,) in loader:
        with run.accumulate(model):
            model(samples).sum().backward()
    with Path(cfg.journal, "splits").open("a") as file:
        file.write(str(run.accumulation_steps))
    run.report({"samples": 8})
    if run.attempt == 1:
        run.fail("device_out_of_memory", "no room")
    if run.attempt == 3:
        Path(cfg.journal, "attempt-3").touch()
        time.sleep(600)
    if run.attempt < 6:
        run.fail("device_fault", f"attempt {'abcdef'[run.attempt]} has lost its GPU")


def unlucky(run, cfg: Journal) -> None:
    run.report({"loss": 1.0})
    print("a black cat went by")
    run.fail("no_luck", "it was Friday")


def last_word(failure: dict, decision: dict) -> str | None:
    """Of what follows: nothing in time about the first attempt, no more of them about the second."""
    if failure["attempt"] == 1:
        time.sleep(600)
    Path(os.environ["TOLD"]).write_text(json.dumps([failure, decision]))
    return "stop"


def searched(run, cfg: Journal) -> None:
    """A trial that dies with words of its own in the log, or of what a restart may mend."""
    if cfg.kind == "gives_up":
        run.fail("device_fault", "give it up")
    if run.attempt == 1:
        print("the licence server is away", flush=True)
        os._exit(3)
    run.report({"loss": 1.0})
