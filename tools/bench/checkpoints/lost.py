"""What a checkpoint takes from a training until it is durable: the excess of every iteration up to then over an
iteration of a training that does not save, which takes turns with the saving ones. A call that returns early and then
lives on the training's cores pays for it here."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from environment import fresh_directory, settle, tell
from figures import median, median_interval
from group import Failed, Group, GroupLost
from plan import ON_RAY, OURS, OURS_ON_RAY, Plan, ranks_of
from rows import Row, at_most, printed

TENSORS = 150
STEPS = 6
"""Iterations of a turn, at least: the first one saves."""
NONE = "none"
_SECONDS_PER_GIB = 0.5


@dataclass(kw_only=True)
class Series:
    lost: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    """Seconds for so many steps and until everything is written."""
    cpu: list[float] = field(default_factory=list)
    """CPU-seconds of the machine beyond those of as many iterations without a save."""
    iterations: list[float] = field(default_factory=list)
    """How many until it was durable."""
    why_not: str = ""


def measure(plan: Plan, world_size: int) -> Iterator[Row]:
    what = f"{plan.size_mib} MiB, {ranks_of(world_size)}"
    local = [name for name in plan.contenders if name not in ON_RAY]
    on_ray = [name for name in plan.contenders if name in ON_RAY]
    found: dict[str, Series] = defaultdict(Series)
    copy, base = _side(plan, what, local, world_size, found, on_ray=False)
    if on_ray:
        _side(plan, f"{what}, in Ray Train", [OURS_ON_RAY, *on_ray], world_size, found, on_ray=True)
    yield printed(f"training, {what}: an iteration without a save, median", 1000 * base, "ms")
    for name, series in found.items():
        yield from _of_one(f"{name}, {what}", series)
    yield from _bars(what, found, copy, plan.size_mib / 1024)


def _side(
    plan: Plan, what: str, names: Sequence[str], world_size: int, found: dict[str, Series], *, on_ray: bool
) -> tuple[float, float]:
    """The floor's copy and an iteration, both in seconds."""
    with fresh_directory(plan.directory) as directory:
        try:
            with Group(plan.python, directory, world_size, on_ray=on_ray) as group:
                tell(f"lost, {what}: preparing")
                group.ask("prepare", size_mib=plan.size_mib, tensors=TENSORS, is_trained=True)
                running = [
                    name for number, name in enumerate(names) if _begin(group, name, directory / f"{number}", found)
                ]
                copies = [group.slowest("floor", "seconds") for _ in range(5)]
                base = _rounds(plan, what, group, running, found)
                return median(copies), base
        except GroupLost as error:
            tell(f"lost, {what}: LOST: {error.why}")
            for name in names:
                found[name].why_not = found[name].why_not or error.why
    return 0.0, 0.0


def _begin(group: Group, name: str, directory: Any, found: dict[str, Series]) -> bool:
    try:
        tell(f"lost: {name}, first save")
        group.ask("open", contender=name, directory=str(directory))
        group.ask("lost", contender=name, steps=2)
    except Failed as error:
        found[name].why_not = error.why
        tell(f"{name} FAILED: {error.why}")
    return not found[name].why_not


def _rounds(plan: Plan, what: str, group: Group, names: Sequence[str], found: dict[str, Series]) -> float:
    by_lot, all_walls = random.Random(0), []
    for number in range(plan.lost_rounds):
        turns = [*names, NONE, NONE]
        by_lot.shuffle(turns)
        answers = {}
        walls: list[float] = []
        cpu: list[float] = []
        for turn in turns:
            if turn != NONE and found[turn].why_not:
                continue
            tell(f"lost, {what}: round {number + 1} of {plan.lost_rounds}, {turn}")
            settle()
            try:
                answer = group.ask("lost", contender=turn, steps=STEPS)[0]
            except Failed as error:
                found[turn].why_not = error.why
                continue
            if turn == NONE:
                walls += answer["walls"]
                cpu.append(answer["cpu"] / len(answer["walls"]))
            else:
                answers[turn] = answer
        for name, answer in answers.items():
            _add(found[name], answer, median(walls), median(cpu))
        all_walls += walls
    return median(all_walls)


def _add(series: Series, answer: dict[str, Any], base: float, cpu: float) -> None:
    until = answer["walls"][: answer["durable_after"]]
    series.lost.append(sum(wall - base for wall in until))
    series.total.append(sum(answer["walls"][: max(STEPS, answer["durable_after"])]) + answer["flush"])
    series.cpu.append(answer["cpu"] - cpu * len(answer["walls"]))
    series.iterations.append(answer["durable_after"])


def _of_one(what: str, series: Series) -> Iterator[Row]:
    if series.why_not:
        yield Row(bar=f"NOT MEASURED: lost to training until durable, {what}: {series.why_not}", measured=0.0)
        return
    low, high = median_interval(series.lost)
    yield printed(f"lost to training until durable, {what}: median", 1000 * median(series.lost), "ms")
    yield printed(f"lost to training until durable, {what}: median is at least (95 %)", 1000 * low, "ms")
    yield printed(f"lost to training until durable, {what}: median is at most (95 %)", 1000 * high, "ms")
    yield printed(f"iterations until durable, {what}", median(series.iterations))
    yield printed(f"{STEPS} steps and a flush, {what}", median(series.total), "s")
    yield printed(f"CPU-seconds of a checkpoint beside training, {what}", median(series.cpu), "s")


def _bars(what: str, found: dict[str, Series], copy: float, gib: float) -> Iterator[Row]:
    for name in OURS:
        series = found.get(name)
        if series is None:
            continue
        bar = f"lost to training until durable, {name}, {what}"
        if not series.lost:
            yield Row(bar=f"{bar}: NOT MEASURED", measured=0.0, required=copy + _SECONDS_PER_GIB * gib, holds=False)
            continue
        yield at_most(f"{bar}: the copy and 0.5 s per GiB", median(series.lost), copy + _SECONDS_PER_GIB * gib, "s")
    for name, series in found.items():
        ours = found.get(OURS_ON_RAY if name in ON_RAY else OURS[0])
        if name in (*OURS, OURS_ON_RAY) or ours is None or not ours.lost or not series.lost:
            continue
        yield at_most(
            f"lost to training, ours eager against {name}, {what}", median(ours.lost), median(series.lost), "s"
        )
