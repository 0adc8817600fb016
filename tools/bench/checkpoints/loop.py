"""How much longer a training takes that saves every 20 steps. One pair of DDP processes trains blocks of 20 steps, with
a save at the first one or without, the first of a pair of blocks by lot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from environment import fresh_directory, settle, tell
from figures import median, median_interval
from group import Group
from plan import OURS, Plan
from rows import Row, at_most, printed

STEPS = 20
WORKERS = 2
BARS = {256: 2.0, 1024: 5.0}
"""MiB of state -> percent."""


def measure(plan: Plan, pairs: int, *, is_quick: bool) -> Iterator[Row]:
    for size_mib, percent in BARS.items():
        scaled = size_mib // 8 if is_quick else size_mib
        yield from _of_size(replace(plan, size_mib=scaled), pairs, percent)


def _of_size(plan: Plan, pairs: int, percent: float) -> Iterator[Row]:
    what = f"{plan.size_mib} MiB, a checkpoint every {STEPS} steps, {WORKERS} ranks"
    by_lot = random.Random(0)
    found: dict[str, list[float]] = {"with": [], "without": []}
    unfinished = 0
    with (
        fresh_directory(plan.directory) as directory,
        Group(plan.python, directory, WORKERS) as group,
    ):
        group.ask("prepare", size_mib=plan.size_mib, tensors=150, is_trained=True)
        group.ask("open", contender=OURS[0], directory=str(directory / "0"))
        group.ask("lost", contender=OURS[0], steps=2)
        for number in range(pairs):
            for kind in by_lot.sample(sorted(found), 2):
                tell(f"loop, {what}: pair {number + 1} of {pairs}, {kind}")
                settle()
                answer = group.ask("loop", contender=OURS[0] if kind == "with" else "", steps=STEPS)[0]
                found[kind].append(answer["seconds"])
                unfinished += not answer["is_durable"]
    ratios = [100 * (saving / plain - 1) for saving, plain in zip(found["with"], found["without"], strict=True)]
    low, high = median_interval(ratios)
    yield at_most(f"training loop, {what}: % longer", median(ratios), percent, "%")
    yield printed(f"training loop, {what}: % longer, median is at least (95 %)", low, "%")
    yield printed(f"training loop, {what}: % longer, median is at most (95 %)", high, "%")
    yield printed(f"training loop, {what}: a step without", 1000 * median(found["without"]) / STEPS, "ms")
    yield printed(f"training loop, {what}: blocks that ended before it was durable", float(unfinished))
