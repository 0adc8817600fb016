"""The end of a data directory's writers, as `orc down` wants it: nothing sealed is lost, no memory is left behind."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.checkpoints.job import SaveJob
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.slab import SUFFIX, SlabDamaged, SlabFile, State

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds for writing what is sealed, a storage being slow at times."""
COMMIT = 5.0
"""Seconds for the commit of what is written; the next restore can do it as well."""
END = 30.0
SETTLE = 30.0
"""Seconds that a restore waits for what was sealed before."""


def stop_writer(home: Path) -> bool:
    """Ends the writers of a data directory that says nothing else, see `end_writers`."""
    return end_writers(places.slab_root(str(home)))


def end_writers(root: Path) -> bool:
    """Lets what is sealed be written, ends the writers under `root` and frees the memory. False if there was nothing.
    What cannot be written in time stays in memory for the next writer, and the log says so."""
    if not root.is_dir():
        return False
    if not _is_written(root):
        count = len(_sealed(root))
        logger.warning("%d sealed part(s) of checkpoints are not written yet and stay in %s", count, root)
        _end(root)
        return True
    _end(root)
    shutil.rmtree(places.members(root), ignore_errors=True)
    shutil.rmtree(places.sockets(root), ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    return True


def _is_written(root: Path) -> bool:
    """Waits until nothing is sealed; a writer is started if there is none."""
    deadline = time.monotonic() + PATIENCE
    if _sealed(root, State.written):
        SlabClient(str(root), may_start=True).ensure()
    while _sealed(root):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    deadline = min(deadline, time.monotonic() + COMMIT)
    while _sealed(root, State.written) and time.monotonic() < deadline:
        time.sleep(0.02)
    return True


def await_sealed(
    root: Path, is_wanted: Callable[[SaveJob], bool], *, may_start: bool, patience: float = SETTLE
) -> bool:
    """Waits until the saves that are wanted, of those sealed here, are written: who looks into the storage then finds
    them. False if it takes longer: they are found later, or never needed."""
    deadline = time.monotonic() + patience
    if _sealed(root, is_wanted=is_wanted):
        SlabClient(str(root), may_start=may_start).ensure()
    while _sealed(root, is_wanted=is_wanted):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _sealed(
    root: Path, until: State = State.writing, *, is_wanted: Callable[[SaveJob], bool] | None = None
) -> list[Path]:
    """The slab of each slot that was sealed and has not come further than `until`."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in places.slabs(root).iterdir():
            if path.suffix == SUFFIX:
                with contextlib.suppress(FileNotFoundError, SlabDamaged), contextlib.closing(SlabFile(path)) as slab:
                    slots = [slot for slot in slab.slots if State.sealed <= slot.state <= until]
                    found += [path for slot in slots if is_wanted is None or is_wanted(slot.job()[1])]
    return found


def _end(root: Path) -> None:
    """All of them, one after the other: the next one serves when one has ended."""
    client, deadline = SlabClient(str(root), may_start=False), time.monotonic() + END
    while _is_there(root) and time.monotonic() < deadline:
        client.stop()
        time.sleep(0.02)


def _is_there(root: Path) -> bool:
    """Whether any writer lives: it holds the lock of its number."""
    for path in places.members(root).glob("*.lock"):
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(fd)
    return False
