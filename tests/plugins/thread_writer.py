"""A checkpoint writer in threads of the test's process, for what must not depend on another process being quick."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.checkpoints.service import WriterService
from orchestrator.checkpoints.slab import Owner, SlabFile


class ThreadWriter:
    """Stands where a SlabClient does. Nothing is written before `start`."""

    def __init__(self, root: Path) -> None:
        self.service = WriterService(str(root), threads=2)
        self.service.step(0.0)
        self.is_there = True
        self._thread: threading.Thread | None = None
        self.rung = 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self.service.run)
        self._thread.start()

    def lease(self, slot_bytes: int, owner: Owner, *, slots: int = 2) -> SlabFile | None:
        if not self.is_there:
            raise ConnectionError("no writer")
        given = self.service.lease(
            slot_bytes, {"run": owner.run, "attempt": owner.attempt, "rank": owner.rank, "pid": owner.pid}, slots=slots
        )
        if not given["slots"]:
            return None
        slab = SlabFile(Path(given["slab"]))
        assert slab.fill()
        return slab

    def ring(self) -> int:
        self.rung += 1
        self.service._ring()
        return 1

    def ensure(self) -> bool:
        return True

    def close(self) -> None:
        if self._thread is not None:
            self.service.stop()
            self.service._ring()  # or its threads see it only when they look by themselves
            self._thread.join()
        self.service.close()


@contextmanager
def slab_root() -> Iterator[Path]:
    """An empty directory in shared memory, where there is any."""
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield root / "r"
    finally:
        shutil.rmtree(root)
