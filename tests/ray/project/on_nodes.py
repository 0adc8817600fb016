"""Train functions for jobs that are spread over several nodes."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass


@dataclass
class Epochs:
    epochs: int = 4
    steps: int = 20
    pause: float = 0.0
    """Seconds per step."""
    journal: str = ""


def averages(run, cfg: Epochs) -> None:
    """DDP: each step averages the ranks' gradients; each epoch ends with a checkpoint. Says where its ranks are, and
    notes beside its points how many it logged.
    """
    import ray
    import torch

    context = ray.get_runtime_context()
    run.event(
        "placed", run.rank, node=context.get_node_id(), address=ray.util.get_node_ip_address(), pid=os.getpid(),
        actor=context.get_actor_id(),
    )  # fmt: skip
    model = torch.nn.Linear(4, 1)
    model = run.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = run.state(model=model, optimizer=optimizer)
    journal = os.path.join(cfg.journal, f"attempt-{run.attempt}-rank-{run.rank}") if cfg.journal else ""
    count = 0
    for epoch in run.epochs(cfg.epochs):
        for _ in range(cfg.steps):
            optimizer.zero_grad()
            loss = model(torch.full((8, 4), float(run.rank + 1))).pow(2).mean()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss, "count": count}, step=epoch * cfg.steps + count % cfg.steps)
            count += 1
            if journal:
                with open(f"{journal}.new", "w") as file:
                    file.write(str(count))
                os.replace(f"{journal}.new", journal)  # a kill in between must not leave an empty file
            time.sleep(cfg.pause)
        run.report({"epoch_done": epoch}, state=state)


@dataclass
class Until:
    epochs: int = 1000
    steps: int = 10
    pause: float = 0.02
    """Seconds per step."""
    journal: str = ""
    """A directory; the training ends after the epoch in which a file `end` appears there."""


def goes_on(run, cfg: Until) -> None:
    """Each epoch ends with a checkpoint. Says how many workers there are and, on Ray, on which node each is."""
    import torch

    ray = sys.modules.get("ray")
    node = ray.get_runtime_context().get_node_id() if ray is not None else ""
    run.event("placed", run.rank, node=node, workers=run.world_size)
    model = torch.nn.Linear(4, 1)
    model = run.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = run.state(model=model, optimizer=optimizer)
    for epoch in run.epochs(cfg.epochs):
        for step in range(cfg.steps):
            optimizer.zero_grad()
            loss = model(torch.full((8, 4), float(run.rank + 1))).pow(2).mean()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss}, step=epoch * cfg.steps + step)
            time.sleep(cfg.pause)
        is_over = run.sum(float(os.path.exists(os.path.join(cfg.journal, "end")))) > 0
        run.report({"epoch_done": epoch, "workers": run.world_size}, state=state)
        if is_over:
            return
