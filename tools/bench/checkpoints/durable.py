"""From shared memory to the disk, against a plain sequential write and fsync of as many bytes; and back, verified,
against a plain read."""

from __future__ import annotations

import random
from collections.abc import Iterator

from environment import drop_page_cache, fresh_directory, settle, tell
from figures import median, p95, ratio_interval
from group import Group
from plan import OURS, Plan, ranks_of
from rows import Row, at_least, at_most, printed

TENSORS = 150


def measure(plan: Plan, world_size: int, rounds: int) -> Iterator[Row]:
    what = f"{plan.size_mib} MiB, {ranks_of(world_size)}"
    by_lot = random.Random(0)
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    with fresh_directory(plan.directory) as directory, Group(plan.python, directory, world_size) as group:
        _begin(plan, group, str(directory / "0"))
        for number in range(rounds):
            for kind in by_lot.sample(sorted(found), 2):
                tell(f"durable, {what}: {number + 1} of {rounds}, {kind}")
                settle()
                if kind == "ours":
                    found[kind].append(group.slowest("write", "seconds", contender=OURS[0]))
                else:
                    found[kind].append(group.slowest("plain_write", "seconds", directory=str(directory)))
    low, high = ratio_interval(found["plain"], found["ours"])
    yield at_least(
        f"from the seal to durable against a plain write and fsync, {what}",
        median(found["plain"]) / median(found["ours"]), 0.8, "times",
    )  # fmt: skip
    yield printed(f"from the seal to durable against a plain write, {what}: at least (95 %)", low, "times")
    yield printed(f"from the seal to durable against a plain write, {what}: at most (95 %)", high, "times")
    for kind, seconds in found.items():
        yield printed(f"bytes to the disk, {kind}, {what}: median", plan.size_mib / median(seconds), "MiB/s")
        yield printed(f"bytes to the disk, {kind}, {what}: slowest of 20", plan.size_mib / p95(seconds), "MiB/s")


def restore(plan: Plan, rounds: int) -> Iterator[Row]:
    """One rank."""
    by_lot = random.Random(0)
    found: dict[tuple[str, bool], list[float]] = {}
    is_root = True
    with fresh_directory(plan.directory) as directory, Group(plan.python, directory, 1) as group:
        _begin(plan, group, str(directory / "0"))
        for number in range(rounds):
            for kind in by_lot.sample(["restore", "plain_read"], 2):
                for is_cold in (True, False):  # the second read of a pair finds everything in the page cache
                    tell(f"restore, {plan.size_mib} MiB: {number + 1} of {rounds}, {kind}, {'cold' * is_cold}")
                    is_root = (not is_cold or drop_page_cache()) and is_root
                    seconds = group.slowest(kind, "seconds", contender=OURS[0])
                    found.setdefault((kind, is_cold), []).append(seconds)
    for is_cold, how in ((True, "page cache dropped" if is_root else "NOT COLD: dropping takes root"), (False, "warm")):
        ours, plain = found["restore", is_cold], found["plain_read", is_cold]
        low, high = ratio_interval(ours, plain)
        bar = f"restore and verify against a plain read, {plan.size_mib} MiB, {how}"
        if is_cold:
            yield at_most(bar, median(ours) / median(plain), 1.5, "times")
        else:
            yield printed(bar, median(ours) / median(plain), "times")
        yield printed(f"{bar}: at least (95 %)", low, "times")
        yield printed(f"{bar}: at most (95 %)", high, "times")
        yield printed(f"restore and verify, {plan.size_mib} MiB, {how}: median", 1000 * median(ours), "ms")
        yield printed(f"plain read, {plan.size_mib} MiB, {how}: median", 1000 * median(plain), "ms")


def _begin(plan: Plan, group: Group, directory: str) -> None:
    group.ask("prepare", size_mib=plan.size_mib, tensors=TENSORS, is_trained=False)
    group.ask("open", contender=OURS[0], directory=directory)
    group.ask("save", contender=OURS[0])
