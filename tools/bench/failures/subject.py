"""The digits training that is disturbed: the example itself, with the moment of every step in a file per rank.

The moments are what the benchmark and the chaos run judge by: written by the process that makes the steps, before
anything of ours has seen them.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_STEP = struct.Struct("<qqd")


@dataclass(kw_only=True)
class Config:
    """That of the example, and a directory for the moments."""

    epochs: int = 15
    batch_size: int = 32
    hidden: int = 32
    dropout: float = 0.4
    test_share: float = 0.2
    pause: float = 0.0
    """Seconds that a step takes besides."""
    journal: str = ""


class Step(NamedTuple):
    number: int
    """Optimizer steps, from 1."""
    epoch: int
    at: float
    """Seconds since 1970, when the step was made."""


def digits(run: Any, cfg: Config) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from orchestrator.examples.digits import DigitsConfig, train

    said = {"pid": os.getpid(), "rank": run.rank, "attempt": run.attempt, "at": time.time(), "world": run.world_size}
    with open(Path(cfg.journal, "began"), "a") as began:
        began.write(json.dumps(said) + "\n")
    steps = os.open(_file(Path(cfg.journal), run.attempt, run.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    made = 0

    def note(*_: Any) -> None:
        nonlocal made
        if not made:  # only now is it known from where the run goes on
            made = run.step
        made += 1
        os.write(steps, _STEP.pack(made, run.epoch, time.time()))
        if cfg.pause:
            time.sleep(cfg.pause)

    hook = register_optimizer_step_post_hook(note)
    try:
        given = {name: value for name, value in vars(cfg).items() if name not in ("pause", "journal")}
        train(run, DigitsConfig(**given))
    finally:
        hook.remove()
        os.close(steps)


def began(journal: Path) -> list[dict[str, Any]]:
    """What every rank said when its function began: pid, rank, attempt, at, world."""
    path = journal / "began"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # a killed rank may have left half a line
    return found


def steps(journal: Path, attempt: int, rank: int = 0) -> list[Step]:
    path = Path(_file(journal, attempt, rank))
    data = path.read_bytes() if path.exists() else b""
    return list(_whole(data))


def _whole(data: bytes) -> Iterator[Step]:
    return (Step(*each) for each in _STEP.iter_unpack(data[: len(data) - len(data) % _STEP.size]))


def _file(journal: Path, attempt: int, rank: int) -> str:
    return str(journal / f"attempt-{attempt}-rank-{rank}")
