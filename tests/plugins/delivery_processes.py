"""The parts of delivery as processes of their own, to be killed: producers, an agent, trackers, the merging.

`python -m tests.plugins.delivery_processes` imports everything once and then forks a part whenever it is told to on its
stdin, so that a part which was killed is there again within milliseconds. `Parts` is the other side of that pipe. With
`PART '{"argument": …}'` it runs one part, as for strace.
What runs in a part are the real classes; only the wire between agent and tracker is a plain socket instead of Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator import disk
from orchestrator.records import Ack, Stream
from orchestrator.store.store import Store
from orchestrator.tracking import logger as logger_module
from orchestrator.tracking import wal
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper
from orchestrator.tracking.spool import spools as spools_in
from tests.plugins.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
_HEAD = struct.Struct("<II")


# -- the wire between agent and tracker --------------------------------------------------------------------------------


def _send(connection: socket.socket, head: Any, frames: Sequence[bytes] = ()) -> None:
    text = json.dumps({"head": head, "frames": [len(frame) for frame in frames]}).encode()
    connection.sendall(_HEAD.pack(len(text), sum(map(len, frames))) + text + b"".join(frames))


def _receive(connection: socket.socket) -> tuple[Any, list[bytes]]:
    text_bytes, frames_bytes = _HEAD.unpack(_exactly(connection, _HEAD.size))
    message = json.loads(_exactly(connection, text_bytes))
    data = _exactly(connection, frames_bytes)
    frames, start = [], 0
    for length in message["frames"]:
        frames.append(data[start : start + length])
        start += length
    return message["head"], frames


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(min(count - len(found), 1 << 20))
        if not piece:
            raise ConnectionError("the other side went away")
        found += piece
    return bytes(found)


class SocketTracker:
    """A tracker in another process, as the agent sees it."""

    def __init__(self, path: Path, timeout: float = 5.0) -> None:
        self._path, self._timeout = path, timeout
        self._connection: socket.socket | None = None

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        return self._ask("push", None, frames)

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        return self._ask("acknowledged", list(producers))

    def _ask(self, method: str, argument: Any, frames: Sequence[bytes] = ()) -> list[Ack]:
        try:
            if self._connection is None:
                self._connection = socket.socket(socket.AF_UNIX)
                self._connection.settimeout(self._timeout)
                self._connection.connect(str(self._path))
            _send(self._connection, [method, argument], frames)
            answer, _ = _receive(self._connection)
        except OSError as error:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionError(str(error)) from error
        return [Ack(**{**raw, "stream": Stream(raw["stream"])}) for raw in answer]


def _serve(tracker: TrackerService, path: Path) -> None:
    path.unlink(missing_ok=True)  # of a tracker that was killed
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(16)
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(tracker, connection), daemon=True).start()


def _answer(tracker: TrackerService, connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while True:
            (method, argument), frames = _receive(connection)
            if method == "push":
                acks = tracker.push(frames)
            else:
                acks = tracker.acknowledged([(producer, run, attempt) for producer, run, attempt in argument])
            _send(connection, [asdict(ack) for ack in acks])


# -- the parts ---------------------------------------------------------------------------------------------------------


def die_at(number: int, kind: str = "") -> None:
    """From now on this process kills itself before its call `number` (0, 1, …) of disk.py, of that kind if given."""
    left = number

    def watcher(call: str, path: str) -> None:
        nonlocal left
        if kind and call != kind:
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    disk.watch(watcher)


def tracker(
    *, log: str, database_url: str, socket: str, wait: float = 20.0, segment_bytes: int = 1 << 20,
    die: int | None = None,
) -> None:  # fmt: skip
    """Serves until it is killed."""
    defaults: Any = wal.WriteAheadLog.__init__.__kwdefaults__
    defaults["segment_bytes"] = segment_bytes  # small: many of them begin and go
    if die is not None:
        die_at(die)
    service = TrackerService(log, database_url, log_wait=wait)
    service.start()
    _serve(service, Path(socket))


def shipper(*, spools: str, socket: str, timeout: float = 5.0, die: int | None = None) -> None:
    """Ships until it is killed. `timeout`: how long it waits for an answer of the tracker."""
    if die is not None:
        die_at(die)
    Shipper(Path(spools), SocketTracker(Path(socket), timeout)).run()


def producer(
    *, spools: str, run: str, rank: int, journal: str, burst: int = 100, pause: float = 0.01, rate: float = 0.0,
    calls: int = 0,
    die: int | None = None, clock_offset: float = 0.0,
) -> None:  # fmt: skip
    """Logs `burst` calls, pauses (as long as `rate` calls per second need, if given), and so on: for ever, or `calls`
    of them and then it closes. `clock_offset`: how wrong its clock goes, now one way, now the other."""
    if clock_offset:
        _move_clock(clock_offset)
    kept = Journal(Path(journal), rank)
    if die is not None:
        die_at(die)
    logger = Logger(Path(spools), run=run, attempt=1, rank=rank)
    call, begun = 0, time.monotonic()
    while not calls or call < calls:
        for _ in range(burst):
            kept.log_once(logger, call)
            call += 1
        late = time.monotonic() - begun
        time.sleep(max(call / rate - late, 0.0) if rate else pause)  # how fast it logs, not a wait for anything
    logger.close()


def _move_clock(offset: float) -> None:
    real, state = time.time, {"calls": 0}

    def moved() -> float:
        state["calls"] += 1
        return real() + (offset if state["calls"] // 50 % 2 else -offset)

    logger_module._now = moved


def merging(*, database_url: str) -> None:
    from orchestrator.tracking.merging import MergeConfig, MergeService

    MergeService(Store(database_url), config=MergeConfig(head_start=0.0)).run()


def everything(
    *, directory: str, database_url: str, run: str, rank: int, journal: str, calls: int = 17_000,
    die: int | None = None,
) -> None:  # fmt: skip
    """All parts in one process, step by step, so that each change of a file is one call with a number: it logs into
    more than one segment, ships, commits, rotates the log, closes and removes. `die`: before which of these calls."""
    if die is not None:
        die_at(die)
    defaults: Any = wal.WriteAheadLog.__init__.__kwdefaults__
    defaults["segment_bytes"] = 1 << 18
    service = TrackerService(Path(directory) / "log", database_url)
    agent = Shipper(Path(directory) / "spools", service)
    kept = Journal(Path(journal), rank)
    logger = Logger(Path(directory) / "spools", run=run, attempt=1, rank=rank)
    for part in range(4):
        for call in range(part * calls // 4, (part + 1) * calls // 4):
            kept.log_once(logger, call)
        agent.step()
        if part % 2:
            service.commit_step()
    logger.close()
    drain(service, agent, Path(directory) / "spools")
    service.stop()


def drain(service: TrackerService, agent: Shipper, root: Path, patience: float = 30.0) -> None:
    """Steps until no spool is left."""
    deadline = time.monotonic() + patience
    while list(spools_in(root)):
        moved = agent.step()
        moved |= service.commit_step()
        if not moved:
            time.sleep(0.01)  # the agent asks what is committed ten times a second
        assert time.monotonic() < deadline, f"spools are left: {agent.backlog()}, {service.health()}"


PARTS: dict[str, Callable[..., None]] = {
    "tracker": tracker, "shipper": shipper, "producer": producer, "merging": merging, "everything": everything,
}  # fmt: skip


# -- starting and killing them -----------------------------------------------------------------------------------------


def wait_for(what: Callable[[], object], why: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {why}"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z (ended, and its parent was not asked yet) …, as the kernel calls it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Parts:
    """`with Parts(directory) as parts: pid = parts.start("tracker", …)`. At the end all of them are killed."""

    def __init__(self, directory: Path) -> None:
        self.output = directory / "parts.log"
        self.living: dict[int, str] = {}

    def __enter__(self) -> Parts:
        command = [sys.executable, "-m", "tests.plugins.delivery_processes"]
        with self.output.open("ab") as said:
            self._nursery = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe().close()
        self._nursery.wait(timeout=30)

    def _pipe(self) -> Any:
        assert self._nursery.stdin is not None
        return self._nursery.stdin

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._pipe().write(json.dumps(request) + "\n")
        self._pipe().flush()
        assert self._nursery.stdout is not None
        answer = self._nursery.stdout.readline()
        assert answer, f"no process can be started any more: {self.output.read_text()[-2000:]}"
        return json.loads(answer)

    def start(self, part: str, **arguments: Any) -> int:
        """The pid of the part. `stopped=True`: it begins with SIGCONT."""
        pid = self._ask({"start": part, "arguments": arguments})["pid"]
        self.living[pid] = part
        return pid

    def kill(self, pid: int) -> None:
        """SIGKILL, and proof that it was what ended the process."""
        os.kill(pid, signal.SIGKILL)
        ended = self.wait(pid)
        assert ended == -signal.SIGKILL, (
            f"the {self.living.get(pid, 'part')} had ended by itself: {ended}; {self.said()}"
        )

    def wait(self, pid: int) -> int:
        """How it ended: 0, an exit code, or minus a signal."""
        self.living.pop(pid, None)
        return self._ask({"wait": pid})["ended"]

    def said(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]


def _start(part: str, arguments: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(0)
        os.dup2(2, 1)
        if arguments.pop("stopped", False):
            os.kill(os.getpid(), signal.SIGSTOP)  # until somebody who wants to watch it lets it go on
        PARTS[part](**arguments)
        code = 0
    except BaseException:
        logging.exception("the %s failed", part)
    finally:
        os._exit(code)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    children: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "start" in request:
            pid = _start(request["start"], request["arguments"])
            children.add(pid)
            answer = {"pid": pid}
        else:
            _, status = os.waitpid(request["wait"], 0)
            children.discard(request["wait"])
            answer = {"ended": os.waitstatus_to_exitcode(status)}
        print(json.dumps(answer), flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        PARTS[sys.argv[1]](**json.loads(sys.argv[2]))
    else:
        main()
