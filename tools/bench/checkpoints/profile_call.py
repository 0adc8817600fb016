"""Where the time of our own call goes: printed, no rows."""

from __future__ import annotations

from collections.abc import Iterator

from environment import fresh_directory
from group import Group
from plan import Plan
from rows import Row


def measure(plan: Plan, tensors: int, world_size: int) -> Iterator[Row]:
    with (
        fresh_directory(plan.directory) as directory,
        Group(plan.python, directory, world_size) as group,
    ):
        group.ask("prepare", size_mib=plan.size_mib, tensors=tensors, is_trained=False)
        group.ask("open", contender="ours eager", directory=str(directory / "0"))
        for _ in range(3):
            group.ask("save", contender="ours eager")
        print(f"{plan.size_mib} MiB, {tensors} tensors, {world_size} ranks")
        print(group.ask("profile", contender="ours eager")[0]["text"], flush=True)
    yield from ()
