"""Who gives way to whom on a busy machine, asked of the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.priority import Niceness

SHOW = """
import os, threading
from orchestrator.priority import Niceness, give_way

over = threading.Event()
before = threading.Thread(target=over.wait)
before.start()
give_way(Niceness.checkpoints)
give_way(Niceness.records)
after = threading.Thread(target=over.wait)
after.start()
print(*(os.getpriority(os.PRIO_PROCESS, each.native_id) for each in (threading.main_thread(), before, after)))
over.set()
"""


def said(code: str, *, leads_session: bool = False) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, text=True, stdout=subprocess.PIPE, start_new_session=leads_session
    ).stdout


def test_all_threads_of_a_process_give_way_and_none_comes_nearer_again() -> None:
    expected = max(Niceness.checkpoints, os.getpriority(os.PRIO_PROCESS, 0))
    assert said(SHOW).split() == [f"{expected:d}"] * 3


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel groups no processes by session")
def test_a_leader_of_a_session_gives_way_with_the_whole_session() -> None:
    show = "from orchestrator.priority import *; give_way(Niceness.copies); print(open('/proc/self/autogroup').read())"
    assert said(show, leads_session=True).split()[-1] == f"{Niceness.copies:d}"
