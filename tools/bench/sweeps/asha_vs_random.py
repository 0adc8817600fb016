"""How many epochs ASHA needs to find what random search has found, on the tabular benchmark.

Both draw the same configurations in the same order, one order per seed. Random search trains so many of them to the
end; ASHA is our own scheduler on one lane, drawing on until a report of it is as good as the best that random search
has ever reported. Every epoch that is trained counts, on both sides; what a promoted trial had is not trained again.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator

import numpy as np
from rows import Row, at_most, printed
from table_of_digits import EPOCHS, TABLE

from orchestrator.sweeps.asha import AshaScheduler, milestones
from orchestrator.sweeps.state import Asha, Decision, Direction, End, Kind, New, Settings, State

SEEDS = 10
TRIALS = 64
"""Of random search."""
REDUCTION = 3
BAR = 0.25


def measure() -> Iterator[Row]:
    table = np.load(TABLE)["right"].astype(int)
    shares = []
    for seed in range(SEEDS):
        order = random.Random(f"order {seed}").sample(range(len(table)), len(table))
        goal = int(table[order[:TRIALS]].max())
        shares.append(asha(table, order, goal) / (TRIALS * EPOCHS))
    what = f"of random search's {TRIALS} × {EPOCHS} epochs"
    yield at_most(
        f"ASHA to random search's best: share {what}, median of {SEEDS} seeds", statistics.median(shares), BAR
    )
    yield printed(f"ASHA to random search's best: share {what}, worst seed", max(shares))
    yield printed("ASHA to random search's best: seeds within the bar", sum(share <= BAR for share in shares))


def asha(table: np.ndarray, order: list[int], goal: int) -> float:
    """Epochs that our ASHA trains until it has seen `goal`; infinite if it never does."""
    rungs = Asha(milestones=milestones(1, EPOCHS, REDUCTION), reduction=REDUCTION)
    state = State(Settings(samples=len(order), direction=Direction.max, asha=rungs))
    scheduler, epochs, job = AshaScheduler(), 0, 0

    def decide(kind: Kind, trial: int, outcome: dict[str, object]) -> None:
        state.apply(Decision(seq=state.seq + 1, kind=kind, trial=trial, job=job, outcome=outcome))

    while True:
        choice = scheduler.next(state)
        if choice.__class__.__name__ in ("Over", "Wait"):
            return float("inf")
        outcome = dict(choice.outcome())  # type: ignore[union-attr]
        trial = len(state.trials) if isinstance(choice, New) else choice.trial  # type: ignore[union-attr]
        if isinstance(choice, New):
            outcome["values"] = {"row": order[trial]}
        until, rung = int(outcome["until"]), outcome["rung"]
        began = int(rungs.milestones[rung - 1]) if rung else 0
        decide(choice.kind, trial, outcome)  # type: ignore[union-attr]
        curve = table[order[trial]]
        for epoch in range(began, until):
            epochs += 1
            if curve[epoch] >= goal:
                return epochs
        score = {"score": float(curve[until - 1]), "resource": float(until), "reports": [], "checkpoint": {}}
        decide(Kind.result, trial, {"end": str(End.complete if until == EPOCHS else End.paused), **score})
        job += 1
