"""How much memory staging may take. Pure: numbers in, numbers out."""

from __future__ import annotations

NO_LIMIT = 1 << 62


def grant(
    wanted_slot_bytes: int, *, free_shm: int, available: int, cgroup: tuple[int, int] | None, limit: int = NO_LIMIT
) -> int:
    """How many slots of that size a trainer gets: 2, 1, or 0 when there is no room.

    All in bytes. `free_shm` and `available` are what the tmpfs and the machine have left, `cgroup` what the control
    group uses and may use, `limit` what staging may still take by its settings. A tenth of what each has left is kept.
    """
    left = [free_shm, available]
    if cgroup is not None:
        used, allowed = cgroup
        left.append(allowed - used)
    room = min(limit, *(free - free // 10 for free in left))
    return max(0, min(2, room // max(wanted_slot_bytes, 1)))
