"""What every contender trains: the digits, ten epochs, two gloo processes, a report with a checkpoint after each."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from orchestrator.examples.digits import DigitsConfig, datasets, network

EPOCHS, WORKERS, HIDDEN, BATCH = 10, 2, 8, 96
"""Eighty steps: a trial is short, as trials of a sweep often are, and what is measured is what lies around them."""


def rates(trials: int) -> list[float]:
    """The learning rates of the other contenders' trials; ours draws its own, from the same range."""
    return [10 ** random.Random(f"rate {number}").uniform(-4, -1) for number in range(trials)]


def together() -> None:
    """All ranks are here: what a report costs is not what it waits for the slower rank's training."""
    torch.distributed.barrier()


def parts(lr: float) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader, DataLoader]:
    """Model, optimizer, and loaders of training and test samples; not distributed yet."""
    training, test = datasets(0.2)
    model = network(DigitsConfig(hidden=HIDDEN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, DataLoader(training, BATCH, shuffle=True), DataLoader(test, batch_size=256)


def distributed(loader: DataLoader) -> DataLoader:
    """As `ray.train.torch.prepare_data_loader` does it."""
    return DataLoader(loader.dataset, BATCH, sampler=DistributedSampler(loader.dataset))  # type: ignore[arg-type]


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, on_step: Any = None) -> None:
    model.train()
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    """On this process' share of the test samples."""
    model.eval()
    found = [(model(images).argmax(1) == labels).float().mean().item() for images, labels in loader]
    return sum(found) / len(found)
