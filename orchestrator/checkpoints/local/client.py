"""A trainer's way to the writers of its machine: asks for memory, rings their bells, starts one if it may."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.requests import ask
from orchestrator.checkpoints.slab import Owner, SlabDamaged, SlabFile
from orchestrator.errors import ServiceUnavailable

START_TIMEOUT = 60.0
_TRIES = 3
_LOG_LIMIT_BYTES = 8 << 20
_children: list[subprocess.Popen[bytes]] = []
"""Writers started by this process: asked now and then, so that one that ended does not stay as a zombie."""


class SlabClient:
    """The writers under one slab root. May be used by several threads.

    `may_start`: a writer that is not there is started, as a process of its own that outlives us. Never from a Ray
    worker, whose children Ray kills. `idle`: after how many seconds without work it ends.
    """

    def __init__(self, root: str, *, may_start: bool, idle: float = 60.0) -> None:
        self.root, self._may_start, self._idle = Path(root), may_start, idle
        self._starting = threading.Lock()

    def lease(self, slot_bytes: int, owner: Owner, *, slots: int = 2, timeout: float = 10.0) -> SlabFile | None:
        """Memory whose lock we then hold; it may not be ready yet. None: there is no room. Raises ConnectionError or
        TimeoutError when no writer answers, ServiceUnavailable when none can be started."""
        for _ in range(_TRIES):
            given = self._ask("lease", timeout, slot_bytes=slot_bytes, owner=asdict(owner), slots=slots)
            if not given["slots"]:
                return None
            with contextlib.suppress(FileNotFoundError, SlabDamaged):  # given up between answer and here
                slab = SlabFile(Path(given["slab"]))
                if slab.fill():
                    return slab
                slab.close()
        return None

    def ring(self) -> int:
        """Tells all writers that something is sealed; gives how many heard it. One that does not looks by itself twice
        a second."""
        heard = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            for bell in places.bells(self.root):
                try:
                    sender.sendto(b"!", str(bell))
                    heard += 1
                except BlockingIOError:
                    heard += 1  # its queue is full: it will look
                except OSError:
                    continue  # of one that was killed
        return heard

    def ensure(self) -> bool:
        """A writer is there afterwards, if we may start one. False if none is. Waits until it answers."""
        try:
            if not self._may_start:
                return self._answers()
            self._ask("describe", 10.0)
            return True
        except (OSError, ServiceUnavailable):
            return False

    def describe(self) -> dict[str, Any]:
        return self._ask("describe", 10.0)

    def health(self) -> dict[str, Any]:
        return self._ask("health", 10.0)

    def stop(self) -> None:
        """Ends the serving writer, if there is one. What is sealed stays for the next one."""
        with contextlib.suppress(OSError):
            ask(places.request_socket(self.root), "stop", {}, 10.0)

    def _ask(self, method: str, timeout: float, **arguments: Any) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return ask(places.request_socket(self.root), method, arguments, timeout)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if self._may_start:
                    self._start()
                if time.monotonic() > deadline:
                    raise ConnectionError(f"no checkpoint writer answers at {self.root}") from error
            except ConnectionError:  # it is about to end, and its socket is still there
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    # -- starting one

    def _start(self) -> None:
        _children[:] = [child for child in _children if child.poll() is None]
        places.prepare(self.root)
        with self._starting, _locked(places.start_lock(self.root)):  # two callers at once start one
            if not self._answers():
                self._start_process()

    def _start_process(self) -> None:
        output = places.output(self.root)
        if output.exists() and output.stat().st_size > _LOG_LIMIT_BYTES:
            output.replace(output.with_suffix(".log.old"))
        command = [
            sys.executable, "-P", "-m", "orchestrator.checkpoints.local.process", "--root", str(self.root),
            "--idle", str(self._idle),
        ]  # fmt: skip
        with output.open("ab") as said:
            start = said.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, cwd="/",
                env=_environment(),
            )  # fmt: skip
        _children.append(process)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServiceUnavailable(
                    "the checkpoint writer", str(self.root), f"it does not start. {_last_words(output, start)}",
                    f"All of it: {output}",
                )  # fmt: skip
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            ask(places.request_socket(self.root), "describe", {}, 10.0)
        except OSError:
            return False
        return True


def _environment() -> dict[str, str]:
    """Ours, with this package where it was found: a project's directory on the path comes first otherwise, or it was
    only the current directory."""
    here = str(Path(__file__).resolve().parents[3])
    paths = [here, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != here)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _last_words(output: Path, start: int) -> str:
    with output.open("rb") as content:
        content.seek(start)
        lines = content.read().decode(errors="replace").strip().splitlines()
    return f"Last words: {lines[-1]}" if lines else "It said nothing."
