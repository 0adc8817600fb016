"""Where the ranks of an attempt are in their code, told from outside: also of a rank that holds the interpreter's lock,
waits in a collective, or is stopped.

Each rank keeps a file in memory (`answers_with_stacks`) into which faulthandler writes all its threads when the process
gets SIGUSR2; whoever is on the same host, as the same user, reads it through /proc. A process that does not answer is
read by py-spy where that is installed. Who asks: the driver on its own host, the node agents on theirs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.records import Stream
from orchestrator.tracking.spool import MEMBER, SpoolReader, SpoolUnusable, spools

logger = logging.getLogger(__name__)

ANSWER = 5.0
"""Seconds in which a process writes its stacks."""
READING = 10.0
"""Seconds that py-spy may take."""
_SETTLED = 0.3
"""Seconds without a further line after which an answer is whole."""
_MEMORY = "orc-stacks"
HELD = "a debugger holds it"
_STATES = {
    "T": "it is stopped (SIGSTOP)", "t": HELD, "D": "it waits in the kernel, for a disk or network",
    "Z": "it is dead",
}  # fmt: skip

_file: BinaryIO | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """What one rank was doing. Survives JSON."""

    rank: int
    pid: int
    host: str = ""
    text: str = ""
    """Its threads, innermost lines first, as faulthandler writes them."""
    why: str = ""
    """Why it did not answer by itself, in words; "" where it did."""
    is_late: bool = False
    """It has logged what the tracker has not accepted: the record stands still, not the rank."""


def answers_with_stacks() -> None:
    """In a rank, before it logs: SIGUSR2 makes it write where all its threads are. Where the system has no such files
    nobody will ask."""
    global _file
    if _file is not None:
        return
    with contextlib.suppress(OSError, AttributeError, ValueError, RuntimeError):
        file = os.fdopen(os.memfd_create(_MEMORY), "ab", buffering=0)
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)
        _file = file


# -- asking, on the host of the ranks


def here(
    root: Path, run: str, attempt: int, pids: Mapping[int, int] | None = None, *, seconds: float = ANSWER
) -> list[Dump]:
    """Of the living ranks of an attempt on this host: of `pids` (rank -> pid) where known, else of those that log into
    the spool directory `root`. Takes up to `seconds`, and what py-spy takes."""
    logging_ranks = _producers(root, run, attempt)
    asked = dict(pids) if pids is not None else {rank: pid for rank, (pid, _) in logging_ranks.items()}
    late = {rank for rank, (_, is_late) in logging_ranks.items() if is_late}
    texts = _answers(asked, seconds)
    found = []
    for rank, pid in sorted(asked.items()):
        text, why = texts.get(rank, ""), ""
        if not text:
            why = _STATES.get(_state(pid), "it does not answer")
            text = _spied(pid)
        found.append(Dump(rank=rank, pid=pid, host=socket.gethostname(), text=text, why=why, is_late=rank in late))
    return found


def end_here(root: Path, run: str, attempt: int) -> list[int]:
    """Kills the ranks of an attempt that log into `root`, also those that are stopped. Gives the ranks."""
    ended = []
    for rank, (pid, _) in sorted(_producers(root, run, attempt).items()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            ended.append(rank)
    return ended


def _producers(root: Path, run: str, attempt: int) -> dict[int, tuple[int, bool]]:
    """rank -> its pid, and whether it has logged what is not accepted. A rank's forked children log, too: its first
    spool is its own."""
    found: dict[int, tuple[int, int, bool]] = {}
    for path in spools(root):
        with contextlib.suppress(OSError, SpoolUnusable):
            spool = SpoolReader(path)
            owner = spool.owner
            if (owner.run, owner.attempt, owner.role) != (run, attempt, MEMBER) or owner.rank < 0:
                continue
            if not spool.is_owned():
                continue
            made = (path / "owner").stat().st_mtime_ns
            is_late = spool.logged(Stream.points) > spool.accepted(Stream.points)
            spool.rest()
            before = found.get(owner.rank)
            if before is None or made < before[0]:
                found[owner.rank] = (made, owner.pid, is_late)
    return {rank: (pid, is_late) for rank, (_, pid, is_late) in found.items()}


def _answers(pids: Mapping[int, int], seconds: float) -> dict[int, str]:
    """What the processes write when they are asked, by rank; without those that do not."""
    files = {rank: file for rank, pid in pids.items() if (file := _memory_of(pid)) is not None}
    before = {rank: _read(file) for rank, file in files.items()}
    for rank in files:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pids[rank], signal.SIGUSR2)
    texts: dict[int, str] = {}
    deadline = changed = time.monotonic()
    deadline += seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = {rank: _read(file)[len(before[rank]) :] for rank, file in files.items()}
        if now != texts:
            texts, changed = now, time.monotonic()
        elif all(texts.values()) and time.monotonic() - changed > _SETTLED:
            break
    return {rank: text for rank, text in texts.items() if text}


def _memory_of(pid: int) -> Path | None:
    """The file into which a process writes its stacks; None where it does not catch the signal, which would kill it."""
    directory = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        caught = next(line for line in (directory / "status").read_text().splitlines() if line.startswith("SigCgt:"))
        if not int(caught.split()[1], 16) & 1 << (signal.SIGUSR2 - 1):
            return None
        for entry in (directory / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry).startswith(f"/memfd:{_MEMORY}"):
                    return entry
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "Z"


def _spied(pid: int) -> str:
    """What py-spy reads of a process, in faulthandler's words; "" where it is not installed or may not."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    words = [program, "dump", "--pid", str(pid), "--nonblocking", "--json"]
    try:
        told = subprocess.run(words, capture_output=True, timeout=READING, check=True, stdin=subprocess.DEVNULL)
        threads: list[dict[str, Any]] = json.loads(told.stdout)
        return "\n\n".join(_thread(int(each.get("thread_id") or 0), each["frames"]) for each in threads)
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        logger.debug("py-spy does not tell of process %d", pid, exc_info=True)
        return ""


def _thread(number: int, frames: Sequence[Mapping[str, Any]]) -> str:
    lines = [f'  File "{each["filename"]}", line {each["line"]} in {each["name"]}' for each in frames]
    return "\n".join([f"Thread 0x{number:x} (most recent call first):", *lines])


# -- reading


_FRAME = re.compile(r'^ *File "([^"]+)", line (\d+) in (.+)$', re.MULTILINE)
_FOREIGN = re.compile(
    r"site-packages|/lib/python3\.\d+/|^<|/orchestrator/(backends|checkpoints|execution|tracking|training)/"
)
"""What is not the user's own."""
_OURS = re.compile(r"/orchestrator/execution/(worker|local_rank|trainer|lane_worker)\.py$")
"""Where the user's function is called."""
_WAITS = re.compile(
    r"/torch/distributed/|/torch/autograd/|/torch/nn/parallel/|/torch/cuda/|/orchestrator/training/group\.py$"
)
"""Modules in which a rank stands that waits for the others."""
_SAVES = re.compile(r"/orchestrator/checkpoints/|/orchestrator/backends/storage\.py$")
_COMPILES = re.compile(
    r"/torch/_dynamo/(convert_frame|symbolic_convert)\.py$"
    r"|/torch/_inductor/(graph|scheduler|codecache|async_compile)\.py$|/triton/(compiler|backends)/"
)
"""Only what compiles: compiled code runs inside other modules of these packages."""


@dataclass(frozen=True, slots=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} at {self.file}:{self.line}"


def working(text: str) -> list[Frame]:
    """The thread that runs the user's function, innermost first; of several the longest, [] where there is none."""
    threads = [
        [Frame(file, int(line), function) for file, line, function in _FRAME.findall(part)]
        for part in re.split(r"\n\s*\n", text)
    ]
    threads.sort(key=lambda frames: (any(_OURS.search(frame.file) for frame in frames), len(frames)), reverse=True)
    return threads[0] if threads else []


def told(frames: Sequence[Frame]) -> str:
    """Where a rank is, in words. Example: read at /home/me/data.py:12, in recv at …/socket.py:706."""
    if not frames:
        return ""
    own = [frame for frame in frames if not _FOREIGN.search(frame.file)]
    if not own or own[0] == frames[0]:
        return str(frames[0])
    return f"{own[0]}, in {frames[0]}"


def is_waiting(frames: Sequence[Frame]) -> bool:
    """The rank waits for others: the innermost lines before the user's are those of a collective."""
    for frame in frames:
        if _WAITS.search(frame.file):
            return True
        if not _FOREIGN.search(frame.file):
            return False
    return False


def occupation(dump: Dump) -> str:
    """What a rank does that may take long and ends by itself, in words; "" for nothing of that kind."""
    files = [frame.file for frame in working(dump.text)]
    if any(_SAVES.search(file) for file in files):
        return "a checkpoint is being saved or loaded"
    return "code is being compiled" if any(_COMPILES.search(file) for file in files) else ""


def at_work(dumps: Sequence[Dump]) -> list[Dump]:
    """Ranks that answer and wait for no other; none where one does not answer: then the others wait for that."""
    if any(dump.why for dump in dumps):
        return []
    return [dump for dump in dumps if dump.text and not is_waiting(working(dump.text))]


def movement(before: Sequence[Dump], now: Sequence[Dump]) -> str:
    """Which rank is elsewhere in its code than before, in words; "" where none is, or one does not answer. In the
    innermost function the line does not count: a loop that never ends has several, too; nor where in a collective a
    rank waits.
    """
    if any(dump.why for dump in now):
        return ""
    then = {dump.rank: working(dump.text) for dump in before if not dump.why}
    for dump in now:
        frames, earlier = working(dump.text), then.get(dump.rank, [])
        if not frames or not earlier or (is_waiting(frames) and is_waiting(earlier)):
            continue
        if _where(frames) != _where(earlier):
            return f"rank {dump.rank} moves, now in {told(frames)}"
    return ""


def _where(frames: Sequence[Frame]) -> tuple[Any, ...]:
    return (frames[0].file, frames[0].function), *frames[1:]


def suspect(dumps: Sequence[Dump], behind: int = 0) -> Dump | None:
    """The rank that the others wait for, as far as that can be told: one that does not answer, else one that is not in
    a collective, else `behind`, which logged longest ago."""
    silent = [dump for dump in dumps if dump.why]
    busy = [dump for dump in dumps if dump.text and not is_waiting(working(dump.text))]
    for some in (silent, busy if len(busy) < len(dumps) else []):
        if some:
            return min(some, key=lambda dump: (dump.rank != behind, dump.rank))
    return min(dumps, key=lambda dump: (dump.rank != behind, dump.rank), default=None)


def words(dumps: Sequence[Dump], behind: int = 0) -> str:
    """What is known of a standstill, in two sentences."""
    found = suspect(dumps, behind)
    if found is None:
        return ""
    place = told(working(found.text))
    said = f"Rank {found.rank} (pid {found.pid} on {found.host})"
    said += f" does not answer: {found.why.removesuffix('.')}" if found.why else ""
    said += f"{', in' if found.why else ' is in'} {place}" if place else ""
    others = [dump for dump in dumps if dump is not found and (place := told(working(dump.text)))]
    if others:
        said += f". Rank {others[0].rank} is in {told(working(others[0].text))}"
    return f"{said}."


def written(directory: Path) -> list[Path]:
    """What `write` wrote there."""
    return sorted(directory.glob("rank-*.stack"))


def write(directory: Path, dumps: Sequence[Dump], at: float) -> list[Path]:
    """`rank-0.stack` … in the directory of an attempt's logs; a later dump is added below. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    files = []
    for dump in dumps:
        file = directory / f"rank-{dump.rank}.stack"
        silent = f"\nIt does not answer: {dump.why}." if dump.why else ""
        text = dump.text.strip() or "Nothing could be read of it."
        with file.open("a") as out:
            out.write(f"Rank {dump.rank}, pid {dump.pid} on {dump.host}, {when}{silent}\n\n{text}\n\n")
        files.append(file)
    return files


def to_json(dumps: Sequence[Dump]) -> list[dict[str, Any]]:
    return [asdict(dump) for dump in dumps]


def from_json(raw: Sequence[Mapping[str, Any]]) -> list[Dump]:
    return [Dump(**each) for each in raw]
