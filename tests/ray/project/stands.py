"""Train functions that stop getting on."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass


@dataclass
class Stands:
    at: int = 30
    """The step after those of the attempts before at which it happens."""
    ways: str = "stop"
    """What happens in the first attempt, the second, … with - between: stop, spin, lock, late, work or none."""
    steps: int = 60
    pause: float = 0.05


def train(run, cfg: Stands) -> None:
    """Steps in which the ranks meet; at one of them the last rank stands still."""
    import torch

    model = torch.nn.Linear(2, 2)
    state = run.state(model=model)
    ways = dict(enumerate(cfg.ways.split("-"), start=1))
    while run.step < cfg.steps:
        run.mean(1.0)
        if run.step == cfg.at + 10 * (run.attempt - 1) and run.rank == run.world_size - 1:
            WAYS[ways.get(run.attempt, "none")](run)
        run.report({"loss": 1.0 / (run.step + 1)}, state=state)
        time.sleep(cfg.pause)


def stopped(run) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spins(run) -> None:
    while True:
        pass


def waits_for_a_lock(run) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def comes_late(run) -> None:
    """Later than the others wait for it. It says that it gets on."""
    for _ in range(120):
        run.alive()
        time.sleep(1)


def works_without_a_word(run) -> None:
    """Longer than a rank may stand still, here and there in its code."""
    for _ in range(4):
        reads()
        counts()


def reads() -> None:
    time.sleep(3)


def counts() -> None:
    time.sleep(3)


def nothing(run) -> None: ...


WAYS = {
    "stop": stopped, "spin": spins, "lock": waits_for_a_lock, "late": comes_late, "work": works_without_a_word,
    "none": nothing,
}  # fmt: skip


@dataclass
class Grows:
    mb: int = 40
    """Each step."""
    most_mb: int = 2000


def grows(run, cfg: Grows) -> None:
    """One rank takes more memory with each step, and keeps it."""
    import torch

    model, kept = torch.nn.Linear(2, 2), []
    state = run.state(model=model)
    for _ in range(20_000):
        if run.is_main and len(kept) * cfg.mb < cfg.most_mb:
            kept.append(bytearray(os.urandom(1 << 10) * (cfg.mb << 10)))
        run.report({"kept": len(kept)}, state=state)
        time.sleep(0.05)
