"""Ray Train hears where the newest checkpoint is: a file of about 300 bytes, by `ray.train.report`, so that its
dashboard and its `Result` name it. Nobody of ours ever reads it; a run resumes from its own directory.

`ray.train.report` waits for all ranks and then for room in a queue of one that the controller empties a few times a
second, so no training thread may call it. Rank 0 says with the decision that `run.report` broadcasts anyway that a
pointer is due; each rank then has a thread of its own report it. So the ranks agree on the order without a message
more, and a report that takes long delays the next pointer and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.manifest import CheckpointInfo

logger = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two pointers; the newest one counts. Ray's controller writes a file for each while all else waits."""
KEPT = 2
"""Pointers that Ray keeps."""
POINTER = "pointer.json"
_MARKER = ".validate_storage_marker"
"""Ray Train's own file in its directory: who sees it sees what the controller sees."""

Report = Callable[[dict[str, Any], bytes | None], None]
"""(metrics, content of the pointer; None on ranks other than 0)"""


class RayPointers:
    """Implements `training.pointers.Pointers` in a worker of Ray Train. `directory` is Ray Train's of this attempt;
    where this host does not see it, there are no pointers."""

    def __init__(self, directory: Path, *, rank: int, report: Report | None = None) -> None:
        self._directory, self._rank = directory, rank
        self._report: Report = report or _report
        self._newest = self._given = ""
        self._given_at = float("-inf")
        self._texts: queue.Queue[str] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._is_given_up = False

    def offer(self, info: CheckpointInfo) -> None:
        pointer = {"uri": info.uri, "step": int(info.step), "manifest_sha256": info.manifest_sha256}
        self._newest = json.dumps(pointer)

    def due(self, *, is_last: bool = False) -> str:
        if self._newest == self._given or self._is_given_up:
            return ""
        if not is_last and (time.monotonic() - self._given_at < INTERVAL or self._texts.unfinished_tasks):
            return ""
        if not (self._directory / _MARKER).exists():
            self._is_given_up = True
            logger.info("Ray Train's directory %s is on another host: it hears of no checkpoints", self._directory)
            return ""
        self._given, self._given_at = self._newest, time.monotonic()
        return self._given

    def put(self, pointer: str) -> None:
        self._texts.put(pointer)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pointers for Ray Train", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._texts.all_tasks_done:
            while self._texts.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self._texts.all_tasks_done.wait(left)

    def _run(self) -> None:
        while True:
            text = self._texts.get()
            try:
                if not self._is_given_up:
                    self._report({"step": json.loads(text)["step"]}, text.encode() if self._rank == 0 else None)
            except Exception as error:
                # The others may wait for this one; a further report would be counted against another of theirs.
                self._is_given_up = True
                logger.warning("Ray Train hears of no further checkpoints, which disturbs no training: %s", error)
            finally:
                self._texts.task_done()


def _report(metrics: dict[str, Any], pointer: bytes | None) -> None:
    import ray.train
    from ray.train import Checkpoint

    for module in ("context", "storage"):  # two lines each time in the logs of the user's run
        with contextlib.suppress(Exception):  # a Ray that looks different inside may speak
            importlib.import_module(f"ray.train.v2._internal.execution.{module}").logger.setLevel(logging.WARNING)
    if pointer is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="orc-pointer-") as directory:
        Path(directory, POINTER).write_bytes(pointer)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))


def forgive_pointers() -> None:
    """In Ray Train's controller: what goes wrong while it notes a checkpoint (a full disk, a directory that somebody
    removed) ends no run. Without this, Ray Train takes it for an error of its own and gives up."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager

    original = CheckpointManager.after_report
    if hasattr(original, "forgives"):
        return

    @functools.wraps(original)
    def after_report(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except Exception:
            logger.warning("Ray Train could not note a checkpoint, which disturbs no training", exc_info=True)

    after_report.forgives = True  # type: ignore[attr-defined]
    CheckpointManager.after_report = after_report  # type: ignore[method-assign]


def pointer_callbacks() -> list[Any]:
    """For Ray Train's RunConfig; see `forgive_pointers`. Empty where this Ray looks different inside."""
    with contextlib.suppress(ImportError):
        from orchestrator.execution.ray_callbacks import ForgivingController

        return [ForgivingController()]
    logger.warning("this Ray has no callbacks in its controller: it hears of no checkpoints")
    return []
