"""Which nodes of the cluster are taken away, and by when. The only module that knows where Ray says so.

Ray Train's own `get_preemption_info` is a barrier of all ranks and restarts by itself; this asks the control store what
its watcher would ask, from the driver.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping

from orchestrator.execution.place import Notice

UNTIL_ASKED = math.inf


def draining() -> dict[str, float]:
    """Ray's id of each node that is being drained -> the time in seconds since 1970 when it is shut down; infinite
    where nobody has said."""
    from ray._private.state import state

    return {node: deadline / 1000 if deadline else UNTIL_ASKED for node, deadline in state.get_draining_nodes().items()}


def notice_of(leaving: Mapping[str, float], ours: Collection[str], labels: Mapping[str, str]) -> Notice | None:
    """What the ranks on the nodes `ours` are to be told, if one of these is taken away. Pure but for the clock."""
    hit = sorted(set(leaving) & set(ours), key=lambda node: leaving[node])
    if not hit:
        return None
    deadline = leaving[hit[0]]
    names = " and ".join(labels.get(node, node) for node in hit)
    left = f" in {max(deadline - time.time(), 0):.0f} s" if math.isfinite(deadline) else ""
    what = "is taken away" if len(hit) == 1 else "are taken away"
    return Notice(why=f"{names} {what}{left}", nodes=tuple(hit), deadline=deadline)
