"""How much memory saving takes at the most, beside the training's own: each contender in processes of its own, three
saves, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from environment import MemoryWatch, fresh_directory, settle, tell
from group import Failed, Group, GroupLost
from plan import ON_RAY, OURS, Plan, ranks_of
from rows import Row, at_most, printed

from orchestrator.checkpoints.local.ending import end_writers
from orchestrator.checkpoints.local.places import slab_root

_WINDOW_MIB = 256
"""The writer's own process, and what the saving side needs besides the slots."""
_SAVES = 3


def measure(plan: Plan, world_size: int) -> Iterator[Row]:
    for name in plan.contenders:
        what = f"{plan.size_mib} MiB, {ranks_of(world_size)}"
        tell(f"memory: {name}, {what}")
        try:
            extra = _extra_mib(plan, name, world_size)
        except (Failed, GroupLost) as error:
            yield Row(
                bar=f"NOT MEASURED: peak extra memory, {name}, {what}: {' '.join(error.why.split())[:300]}",
                measured=0.0,
            )
            continue
        if name in OURS:
            bar = f"peak extra memory, {name}, {what}: two slots of 1/N per rank and {_WINDOW_MIB} MiB"
            yield at_most(bar, extra, 2 * plan.size_mib + _WINDOW_MIB, "MiB")
        else:
            yield printed(f"peak extra memory, {name}, {what}", extra, "MiB")


def _extra_mib(plan: Plan, name: str, world_size: int) -> float:
    with (
        fresh_directory(plan.directory) as directory,
        Group(plan.python, directory, world_size, on_ray=name in ON_RAY) as group,
    ):
        group.ask("prepare", size_mib=plan.size_mib, tensors=150, is_trained=False)
        settle()
        end_writers(slab_root())  # the memory that an earlier contender gave back would be used again, and not counted
        with MemoryWatch() as watch:
            group.ask("open", contender=name, directory=str(directory / "0"))
            for _ in range(_SAVES):
                group.ask("save", contender=name)
        return watch.extra_bytes / (1 << 20)
