"""The main job: 1,797 handwritten digits, a small convolutional network, any number of DDP workers.

orc run experiment=digits
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.errors import UserError
from orchestrator.provenance.datasets import fingerprint
from orchestrator.training.run import Run


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 0.005
    """The highest of the one-cycle schedule."""
    weight_decay: float = 0.01


@dataclass(kw_only=True)
class DigitsConfig:
    epochs: int = 15
    batch_size: int = 32
    """Per worker."""
    hidden: int = 32
    """Channels of the first convolution; the second has twice as many."""
    dropout: float = 0.4
    test_share: float = 0.2
    optim: OptimConfig = field(default_factory=OptimConfig)


def train(run: Run, cfg: DigitsConfig) -> None:
    training, test = datasets(cfg.test_share)
    for split, samples in (("train", training), ("test", test)):
        run.dataset("digits", split=split, size=len(samples), fingerprint=fingerprint(samples.tensors))
    model, loader = run.prepare(network(cfg), DataLoader(training, cfg.batch_size, shuffle=True))
    test_loader = run.prepare(DataLoader(test, batch_size=256), even=False)  # each sample counts once
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=cfg.optim.lr, epochs=cfg.epochs, steps_per_epoch=len(loader)
    )
    state = run.state(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    run.metric("val/accuracy", direction="max")
    for _ in run.epochs(cfg.epochs):
        model.train()
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.log({"train/loss": loss})
        accuracy, val_loss, _ = evaluate(run, model, test_loader)
        run.report({"val/accuracy": accuracy, "val/loss": val_loss}, state=state)
    _, _, confusion = evaluate(run, model, test_loader)
    run.artifact(as_csv(confusion), "confusion.csv")


def network(cfg: DigitsConfig) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, cfg.hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(cfg.hidden, 2 * cfg.hidden, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(cfg.dropout),
        nn.Linear(2 * cfg.hidden * 4 * 4, 10),
    )


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, loader: Any) -> tuple[float, float, Tensor]:
    """Accuracy, loss, and how often each digit (row) was taken for each (column), over the test samples of all
    ranks."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    confusion = torch.zeros(10, 10, dtype=torch.int64, device=run.device)
    for images, labels in loader:
        output = model(images)
        loss += cross_entropy(output, labels, reduction="sum")
        confusion += torch.bincount(10 * labels + output.argmax(1), minlength=100).view(10, 10)
    loss, confusion = run.sum(loss), run.sum(confusion)
    count = confusion.sum()
    return (confusion.trace() / count).item(), (loss / count).item(), confusion


def datasets(test_share: float) -> tuple[TensorDataset, TensorDataset]:
    """Training and test samples. The split is always the same and has all digits in equal shares."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        what = "The digits ship inside scikit-learn, which is not installed."
        raise UserError(f"{what} Install it: pip install 'ray-orchestrator[demo]'") from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    parts = train_test_split(range(len(labels)), test_size=test_share, random_state=0, stratify=digits.target)
    training, test = (TensorDataset(images[part], labels[part]) for part in parts)
    return training, test


def as_csv(confusion: Tensor) -> bytes:
    head = ",".join(["digit", *map(str, range(10))])
    rows = [",".join(map(str, [digit, *row])) for digit, row in enumerate(confusion.tolist())]
    return "\n".join([head, *rows, ""]).encode()
