"""The writer as a process: `python -m orchestrator.checkpoints.local.process --root DIR`.

It ends by itself when no trainer has memory and nothing is sealed. All state is in slabs and the storage: it may be
killed at any time, and the next one goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from orchestrator.checkpoints.service import WriterService
from orchestrator.priority import Niceness, give_way

logger = logging.getLogger(__name__)

IDLE = 60.0
"""Seconds without a trainer and without work after which the process ends."""


class WriterProcess:
    """Serves until `stop`, or until there was nothing to do for `idle` seconds."""

    def __init__(self, root: str, *, threads: int = 2, memory_bytes: int = 0, idle: float = IDLE) -> None:
        self._idle = idle
        self._service = WriterService(root, threads=threads, memory_bytes=memory_bytes)
        self._service.serve()
        self._stopped = threading.Event()

    def run(self) -> None:
        worker = threading.Thread(target=self._service.run, name="writer-0")
        worker.start()
        used_at = time.monotonic()
        while not self._stopped.wait(min(1.0, self._idle / 4)) and worker.is_alive():
            if not self._service.is_idle():
                used_at = time.monotonic()
            elif time.monotonic() - used_at >= self._idle:
                logger.info("nothing is left to do")
                self._service.remove_orphans()
                break
        self._service.stop()
        worker.join(timeout=30)  # a storage that stalls does not keep us: what is sealed is the next one's
        if not worker.is_alive():
            self._service.close()

    def stop(self) -> None:
        self._stopped.set()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="orchestrator.checkpoints.local.process", description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--idle", type=float, default=IDLE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-bytes", type=int, default=0)
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    give_way(Niceness.checkpoints)
    process = WriterProcess(str(given.root), threads=given.threads, memory_bytes=given.memory_bytes, idle=given.idle)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    process.run()
    logging.shutdown()
    os._exit(0)  # a thread may still wait for the storage


if __name__ == "__main__":
    sys.exit(main())
