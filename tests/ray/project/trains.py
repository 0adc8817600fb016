"""Train functions of a user's project, for the tests: each shows one thing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field


@dataclass
class Slow:
    seconds: float = 60.0
    per_second: int = 200
    report: bool = True
    journal: str = ""


def slow(run, cfg: Slow) -> None:
    """Logs a counter for a while; every rank notes beside its points how many it logged."""
    journal = os.path.join(cfg.journal, f"rank-{run.rank}") if cfg.journal else ""
    n = 0
    for _ in range(round(cfg.seconds * 20)):  # counted, not timed: all ranks must come to the same reports
        for _ in range(cfg.per_second // 20):
            run.log({"count": n}, step=n)
            n += 1
        if journal:
            with open(journal, "w") as file:
                file.write(str(n))
        if cfg.report and n % (cfg.per_second // 2) == 0:
            run.report({"beat": n})
        time.sleep(0.05)


@dataclass
class Odd:
    secret: str = ""
    values: list[float] = field(default_factory=list)


def odd_values(run, cfg: Odd) -> None:
    """Every kind of number, from every rank, with prints that contain a secret."""
    import numpy as np
    import torch

    print("connecting with", cfg.secret)
    run.params(
        {"optimizer": "adam", "layers": 3, "dropout": 0.5, "nested": {"a": [1, 2]}, "flag": True, "nothing": None}
    )
    run.tags({"team": "tests"})
    run.note("a note")
    run.event("milestone", "half way", part=0.5)
    run.log({"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf"), "bool": True, "big": 2**53}, step=1)
    run.log({"numpy": np.float32(0.5), "tensor": torch.tensor(2.0), "rank": run.rank}, step=-5)
    run.log({"rank": run.rank + 10}, step=2**40)
    if run.is_main:
        run.artifact(b"hello", name="greeting.txt")


def raises(run, cfg) -> None:
    """Rank 1 fails; rank 0 waits for it in a collective."""
    import torch

    run.log({"before": 1.0})
    if run.rank == 1:
        raise ValueError("the data of rank 1 is broken")
    torch.distributed.barrier()


def empty_shard(run, cfg) -> None:
    """Rank 1 says itself of what it fails."""
    import torch

    run.report({"before": 1.0})
    if run.rank == 1:
        run.fail("data_error", "shard 7 is empty")
    torch.distributed.barrier()


def prints_and_dies(run, cfg) -> None:
    """Rank 1 prints what is wrong and leaves without a word to anybody."""
    import torch

    run.report({"before": 1.0})
    if run.rank == 1:
        print("the shapes of batch 12 differ")
        os._exit(5)
    torch.distributed.barrier()


def dies_once(run, cfg) -> None:
    """Four epochs with a checkpoint after each; in the first attempt rank 1 is gone after two."""
    import torch

    model = torch.nn.Linear(2, 2)
    state = run.state(model=model)
    for epoch in run.epochs(4):
        if run.attempt == 1 and epoch == 2:
            if run.rank == 1:
                os.kill(os.getpid(), 9)
            time.sleep(60)
        run.log({"epoch_done": epoch})
        run.report({}, state=state)


@dataclass
class Patient:
    journal: str = ""


def patient(run, cfg: Patient) -> None:
    """Counts, and saves what it can, until there is a file `end` in the journal's directory."""
    import torch

    model = run.prepare(torch.nn.Linear(4, 4))
    state = run.state(model=model)
    journal = os.path.join(cfg.journal, f"rank-{run.rank}")
    n = 0
    while not os.path.exists(os.path.join(cfg.journal, "end")):
        for _ in range(10):
            run.log({"count": n}, step=n)
            n += 1
        run.report({"beat": n}, state=state)
        with open(f"{journal}.new", "w") as file:
            file.write(str(n))
        os.replace(f"{journal}.new", journal)
        time.sleep(0.1)
