"""What one save costs the caller: the call, and what the optimizer's step waits for.

A run is a fresh group of processes and a fresh directory. In it saves of all contenders and copies of the floor take
turns in an order by lot; every turn ends when the checkpoint is durable, and the next begins after a `sync`. Right
after a save returns every tensor changes; what is loaded must be what was there before, bit for bit.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environment import fresh_directory, settle, tell
from figures import median, p95, ratio_interval
from group import Failed, Group, GroupLost
from plan import ON_RAY, OURS, OURS_ON_RAY, PAGE_CACHE, Plan, ranks_of
from rows import Row, at_most, printed

FLOOR = "floor"


@dataclass(kw_only=True)
class Series:
    """What was measured of one contender."""

    stall: list[float] = field(default_factory=list)
    """Seconds in the call and the fence, on the slowest rank."""
    call: list[float] = field(default_factory=list)
    fence: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    written: int = 0
    why_not: str = ""
    """Why there are none."""
    wrong: str = ""
    """What was not as it should be when it was loaded."""


def measure(plan: Plan, tensors: int, world_size: int) -> Iterator[Row]:
    what = f"{plan.size_mib} MiB, {tensors:,} tensors, {ranks_of(world_size)}"
    found: dict[str, Series] = defaultdict(Series)
    sides = [(False, [name for name in plan.contenders if name not in ON_RAY])]
    if on_ray := [name for name in plan.contenders if name in ON_RAY]:
        sides.append((True, [OURS_ON_RAY, *on_ray]))
    for number in range(plan.rounds):
        for on_ray_, everyone in sides:
            names = [name for name in everyone if number < plan.peer_rounds or name == OURS[0]]
            if not names:
                continue
            where = " in Ray Train" if on_ray_ else ""
            label = f"stall, {what}{where}: run {number + 1} of {plan.rounds}"
            _run(plan, label, names, tensors, world_size, found, on_ray=on_ray_, seed=number)
    yield from _rows(what, found)


def _run(
    plan: Plan, label: str, names: Sequence[str], tensors: int, world_size: int, found: dict[str, Series], *,
    on_ray: bool, seed: int,
) -> None:  # fmt: skip
    """One round. A contender that fails is left out of what is left of it."""
    remaining = [name for name in names if not found[name].why_not]
    with fresh_directory(plan.directory) as directory:
        try:
            with Group(plan.python, directory, world_size, on_ray=on_ray) as group:
                tell(label)
                found[FLOOR].written = int(
                    group.slowest("prepare", "size_bytes", size_mib=plan.size_mib, tensors=tensors, is_trained=False)
                )
                _turns(plan, label, group, directory, remaining, found, random.Random(seed))
        except GroupLost as error:
            for name in remaining:
                if not found[name].stall:
                    found[name].why_not = found[name].why_not or error.why
            tell(f"{label}: LOST: {error.why}")


def _turns(
    plan: Plan, label: str, group: Group, directory: Path, names: Sequence[str], found: dict[str, Series],
    by_lot: random.Random,
) -> None:  # fmt: skip
    running = [name for number, name in enumerate(names) if _begin(group, name, directory / f"{number}", found[name])]
    turns = [name for name in running for _ in range(plan.saves if name == OURS[0] else plan.peer_saves)]
    turns += [FLOOR] * (plan.saves if OURS[0] in running else 0)
    by_lot.shuffle(turns)
    last = {name: position for position, name in enumerate(turns)}
    for position, name in enumerate(turns):
        tell(f"{label}: {position + 1} of {len(turns)}, {name}")
        settle()
        if name == FLOOR:
            found[FLOOR].stall.append(group.slowest("floor", "seconds"))
        elif not found[name].why_not:
            _take(group, name, found[name], is_last=position == last[name])
    for name in running:
        if not found[name].why_not:
            group.ask("close", contender=name)


def _begin(group: Group, name: str, directory: Path, series: Series) -> bool:
    """The first save, which makes what later ones reuse, is told apart."""
    try:
        group.ask("open", contender=name, directory=str(directory))
        answers = group.ask("save", contender=name)
        series.first.append(max(answer["call"] + answer["fence"] for answer in answers))
    except Failed as error:
        series.why_not = error.why
        tell(f"{name} FAILED: {error.why}")
    return not series.why_not


def _take(group: Group, name: str, series: Series, *, is_last: bool) -> None:
    try:
        answers = group.ask("save", contender=name)
        series.stall.append(max(answer["call"] + answer["fence"] for answer in answers))
        series.call.append(max(answer["call"] for answer in answers))
        series.fence.append(max(answer["fence"] for answer in answers))
        series.durable.append(max(answer["durable"] for answer in answers))
        series.cpu.append(answers[0]["cpu"])
        if is_last:
            _verify(group, name, series)
            series.written = group.ask("written", contender=name)[0]["bytes"]
    except Failed as error:
        series.why_not = error.why
        tell(f"{name} FAILED: {error.why}")


def _verify(group: Group, name: str, series: Series) -> None:
    answer = group.ask("verify", contender=name)[0]
    if answer["count"]:
        series.wrong = f"{answer['count']} tensors are not what they were, {', '.join(answer['wrong'])}"
        tell(f"{name} DISQUALIFIED: {series.wrong}")


# -- what is said of it ------------------------------------------------------------------------------------------------


def _rows(what: str, found: dict[str, Series]) -> Iterator[Row]:
    floor, ours = found[FLOOR], found.get(OURS[0], Series())
    size = floor.written
    if floor.stall:
        yield printed(f"floor, one copy of 1/N, {what}: median", 1000 * median(floor.stall), "ms")
        yield printed(f"floor, one copy of 1/N, {what}: p95", 1000 * p95(floor.stall), "ms")
    for name, series in found.items():
        if name != FLOOR:
            is_weaker = name in (*PAGE_CACHE, *ON_RAY)
            yield from _of_one(f"{name}, {what}", series, size, "in the page cache" if is_weaker else "durable")
    if ours.stall and floor.stall:
        low, high = ratio_interval(ours.stall, floor.stall)
        yield at_most(f"ours eager against the floor, {what}", median(ours.stall) / median(floor.stall), 1.25, "times")
        yield printed(f"ours eager against the floor, {what}: at least (95 %)", low, "times")
        yield printed(f"ours eager against the floor, {what}: at most (95 %)", high, "times")
        yield at_most(f"anti-cheat, ours, {what}: tensors that were not as before", float(bool(ours.wrong)), 0.0)
    yield from _against(what, found)


def _of_one(what: str, series: Series, size: int, end: str) -> Iterator[Row]:
    if series.why_not or not series.stall:
        yield Row(bar=f"NOT MEASURED: {what}: {series.why_not or 'its processes were lost'}", measured=0.0)
        return
    if series.wrong:
        yield Row(bar=f"DISQUALIFIED: {what}: {series.wrong}", measured=0.0)
    for name, values in (("call and fence", series.stall), ("call", series.call), ("fence", series.fence)):
        yield printed(f"{what}: {name}, median", 1000 * median(values), "ms")
    yield printed(f"{what}: saves measured", len(series.stall))
    yield printed(f"{what}: call and fence, p95", 1000 * p95(series.stall), "ms")
    yield printed(f"{what}: first save of a run", 1000 * median(series.first), "ms")
    yield printed(f"{what}: until {end}, median", median(series.durable), "s")
    yield printed(f"{what}: CPU-seconds until {end}, median", median(series.cpu), "s")
    yield printed(f"{what}: until {end}", size / median(series.durable) / (1 << 20), "MiB/s")
    yield printed(f"{what}: bytes on the disk for each of the state", series.written / max(size, 1), "times")


_SHARES = (
    ("dcp.async_save THREAD", 1 / 4), ("dcp.async_save PROCESS", 1 / 4), ("torch.save + fsync", 1 / 12),
    ("Ray Train SYNC", 1 / 10), ("Ray Train ASYNC", 1 / 10),
)  # fmt: skip


def _against(what: str, found: dict[str, Series]) -> Iterator[Row]:
    for name, share in _SHARES:
        series, ours = found.get(name), found[OURS_ON_RAY if name in ON_RAY else OURS[0]]
        if series is None:
            continue
        bar = f"ours eager against {name}, {what}"
        if not series.stall or not ours.stall:
            why = series.why_not or ours.why_not or "nothing was measured"
            yield Row(bar=f"{bar}: NOT MEASURED, {why}", measured=0.0, required=share, holds=False)
        elif series.wrong:
            yield Row(bar=f"{bar}: IT IS DISQUALIFIED", measured=0.0)
        else:
            low, high = ratio_interval(ours.stall, series.stall)
            bar += " (it stops at the page cache)" if name in ON_RAY else ""
            yield at_most(bar, median(ours.stall) / median(series.stall), share, "times")
            yield printed(f"{bar}: at least (95 %)", low, "times")
            yield printed(f"{bar}: at most (95 %)", high, "times")
