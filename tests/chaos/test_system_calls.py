"""What the kernel is asked to do, seen and disturbed with strace; promises no test inside the process can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
MEMORY_CALLS = {"brk", "mmap", "munmap", "madvise", "mremap"}
"""The allocator may ask for pages at any time; that waits for nobody."""

LOG = """
import os, sys
from pathlib import Path
from orchestrator.tracking.logger import Logger

logger = Logger(Path(sys.argv[1]), run="r1", attempt=1, rank=0)
for step in range(3000):  # a new key is written down, known ones are not; the first, small segments are behind
    logger.log({"loss": 1.0, "accuracy": 0.5}, step=step)
os.access("/mark-begin", os.F_OK)
for step in range(1, 5000):
    logger.log({"loss": 1.0 / step, "accuracy": 0.5}, step=step)
os.access("/mark-end", os.F_OK)
"""

PUSH = """
import os, sys
from orchestrator.records import POINT, Batch, Stream
from orchestrator.tracking.service import TrackerService
import numpy as np

def batch(first):
    return Batch(producer="ab" * 16, run="r1", attempt=1, rank=0, stream=Stream.points, first=first, count=3,
                 keys=("loss",), payload=np.zeros(3, POINT).tobytes()).encode()

tracker = TrackerService(sys.argv[1], sys.argv[2])
tracker.push([batch(1)])
os.access("/mark-begin", os.F_OK)
(ack,) = tracker.push([batch(4)])
assert ack.accepted == 6, ack
os.access("/mark-accepted", os.F_OK)
"""


def strace(trace: Path, options: list[str], code: str, *arguments: str) -> tuple[int, list[str]]:
    """The exit code of a Python program, and its system calls in order."""
    # -y names the file of each descriptor, -f follows threads.
    command = ["strace", "-f", "-y", "-s", "16", "-o", str(trace), *options, sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    assert any("/mark-begin" in call for call in calls), done.stderr
    return done.returncode, calls


def between(calls: list[str], begin: str, end: str) -> list[str]:
    (first,) = (number for number, call in enumerate(calls) if begin in call)
    last = next(number for number, call in enumerate(calls) if end in call)
    return calls[first + 1 : last]


def schema_ready(database_url: str) -> None:
    """The tracker asks the database what it knows of a producer before it accepts."""
    command = "from orchestrator.store import migrate; import sys; migrate.upgrade(sys.argv[1])"
    subprocess.run([sys.executable, "-c", command, database_url], cwd=ROOT, check=True, timeout=60)


def test_log_makes_no_system_call(tmp_path: Path) -> None:
    code, calls = strace(tmp_path / "trace", [], LOG, str(tmp_path / "spools"))
    assert code == 0
    made = {re.split(r"\(", call)[0] for call in between(calls, "/mark-begin", "/mark-end")}
    assert made - MEMORY_CALLS == set()


def test_nothing_is_acknowledged_before_it_is_synced(tmp_path: Path, database_url: str) -> None:
    schema_ready(database_url)
    code, calls = strace(tmp_path / "trace", [], PUSH, str(tmp_path / "wal"), database_url)
    assert code == 0
    on_log = [call for call in between(calls, "/mark-begin", "/mark-accepted") if ".log>" in call]
    names = [call.split("(")[0] for call in on_log]
    assert any(name.startswith("pwrite") for name in names)
    assert names[-1] in ("fsync", "fdatasync"), "the last thing before the acknowledgement"
    assert on_log[-1].endswith("= 0") or "resumed" in on_log[-1], on_log[-1]


def test_a_disk_that_cannot_sync_ends_the_tracker_without_an_acknowledgement(tmp_path: Path, database_url: str) -> None:
    schema_ready(database_url)
    syncs = ["-e", "trace=fsync,fdatasync,access,faccessat,faccessat2"]
    _, healthy = strace(tmp_path / "healthy", syncs, PUSH, str(tmp_path / "wal"), database_url)
    before = sum(call.startswith("fsync") for call in between(["/start", *healthy], "/start", "/mark-begin"))
    broken = [*syncs, "-e", f"inject=fsync:error=EIO:when={before + 1}+"]
    code, calls = strace(tmp_path / "broken", broken, PUSH, str(tmp_path / "wal2"), database_url)
    assert any("(INJECTED)" in call for call in calls)
    assert code == 1
    assert not any("/mark-accepted" in call for call in calls)
