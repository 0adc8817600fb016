"""A train function whose failures are answered."""

from __future__ import annotations

from dataclasses import dataclass


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
