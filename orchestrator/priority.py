"""How much a process gives way to training, as nice levels: the processors are the ranks' first."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import IntEnum
from pathlib import Path


class Niceness(IntEnum):
    """What stands behind training, the most urgent first. Ranks and drivers have 0."""

    records = 5
    """Tracker and agents: a late point is in the spool, a late answer is waited for."""
    checkpoints = 10
    """Writers: what is sealed is safe, and written soon."""
    copies = 15
    """MLflow and what copies into it: behind by a second is no loss."""


def give_way(niceness: Niceness) -> None:
    """From now on, for all threads of this process and for what they start. On a kernel that groups processes by
    session first (autogroup), for the session, too, if this process leads it."""
    for thread in os.listdir("/proc/self/task") if sys.platform == "linux" else ["0"]:
        with contextlib.suppress(OSError):  # it has ended; or it gave way further before, which takes a right to undo
            if os.getpriority(os.PRIO_PROCESS, int(thread)) < niceness:
                os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(int(niceness)))
