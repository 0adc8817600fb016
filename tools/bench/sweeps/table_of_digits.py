"""The tabular benchmark: every configuration trained once to the end, so that a search over it costs a look-up.

    python tools/bench/sweeps/table_of_digits.py       # a minute of one core; writes digits.npz

A small network on one half of the digits, the number of right answers on the other half after every epoch. Like
LCBench and NAS-Bench, only small: Klein and Hutter, Tabular Benchmarks for Joint Architecture and Hyperparameter
Optimization, 2019.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

CONFIGURATIONS, EPOCHS = 288, 27
TABLE = Path(__file__).with_name("digits.npz")
KEYS = ("lr", "hidden", "dropout", "batch", "momentum", "weight_decay")


def configuration(number: int) -> dict[str, float]:
    stream = random.Random(f"configuration {number}")
    return {
        "lr": 10 ** stream.uniform(-4, 0.5),
        "hidden": float(round(2 ** stream.uniform(2, 7))),
        "dropout": stream.uniform(0, 0.7),
        "batch": float(stream.choice([32, 64, 128, 256])),
        "momentum": 1 - 10 ** stream.uniform(-2, 0),
        "weight_decay": 10 ** stream.uniform(-6, -1),
    }


@functools.cache
def halves() -> tuple[Any, Any, Any, Any]:
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.images.reshape(-1, 64) / 16, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    middle = len(labels) // 2
    return images[:middle], labels[:middle], images[middle:], labels[middle:]


def right_answers(given: dict[str, float], number: int) -> list[int]:
    """After each epoch, of `len(halves()[3])`."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    torch.manual_seed(number)
    images, labels, others, answers = halves()
    hidden = int(given["hidden"])
    model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(given["dropout"]), nn.Linear(hidden, 10))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=given["lr"], momentum=given["momentum"], weight_decay=given["weight_decay"]
    )
    found = []
    for _ in range(EPOCHS):
        model.train()
        for part in torch.randperm(len(labels)).split(int(given["batch"])):
            loss = cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            output = model(others)
        found.append(int((output.argmax(1) == answers).sum()) if math.isfinite(float(output.sum())) else 0)
    return found


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, default=CONFIGURATIONS, help="so many more, the rest in further calls")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(np.load(TABLE)["right"]) if TABLE.exists() else []
    for number in range(len(rows), min(len(rows) + given.only, CONFIGURATIONS)):
        rows.append(right_answers(configuration(number), number))
        if len(rows) % 32 == 0:  # a call that is ended early has not worked for nothing
            save(rows)
            print(f"{len(rows)} of {CONFIGURATIONS} configurations, best {max(map(max, rows))}", file=sys.stderr)
    save(rows)


def save(rows: list[Any]) -> None:
    values = np.array([[configuration(number)[key] for key in KEYS] for number in range(len(rows))], dtype=np.float32)
    right, of = np.array(rows, dtype=np.uint16), np.array(len(halves()[3]))
    np.savez_compressed(TABLE, right=right, of=of, keys=np.array(KEYS), values=values)


if __name__ == "__main__":
    main()
