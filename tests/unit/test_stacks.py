"""Where ranks are in their code: read from outside, told in words, and which of them the others wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.execution import stacks
from orchestrator.execution.stacks import Dump

WORKER = '  File "/lib/orchestrator/execution/worker.py", line 210 in _run_user_function'
COLLECTIVE = '  File "/venv/site-packages/torch/distributed/distributed_c10d.py", line 2806 in all_reduce'
LOADS = f"""Thread 0x00007f11 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f22 (most recent call first):
  File "/usr/lib/python3.11/socket.py", line 706 in readinto
  File "/home/me/shards.py", line 31 in load
  File "/home/me/train.py", line 9 in train
{WORKER}
  File "/lib/orchestrator/execution/local_rank.py", line 80 in <module>
"""
WAITS = f"""Current thread 0x00007f33 (most recent call first):
{COLLECTIVE}
  File "/lib/orchestrator/training/group.py", line 40 in sum
  File "/lib/orchestrator/training/run.py", line 380 in sum
  File "/home/me/train.py", line 12 in train
{WORKER}
"""
SAVES = f"""Current thread 0x00007f44 (most recent call first):
  File "/lib/orchestrator/checkpoints/engine.py", line 300 in save
  File "/lib/orchestrator/training/run.py", line 880 in _save
  File "/home/me/train.py", line 14 in train
{WORKER}
"""
COMPILES = f"""Current thread 0x00007f55 (most recent call first):
  File "/venv/site-packages/torch/_dynamo/symbolic_convert.py", line 1300 in step
  File "/venv/site-packages/torch/_dynamo/convert_frame.py", line 700 in transform
  File "/home/me/train.py", line 15 in train
{WORKER}
"""
RUNS_COMPILED = f"""Current thread 0x00007f66 (most recent call first):
  File "/venv/site-packages/torch/_inductor/output_code.py", line 600 in __call__
  File "/venv/site-packages/torch/_dynamo/eval_frame.py", line 900 in _fn
  File "/home/me/train.py", line 15 in train
{WORKER}
"""


def dump(rank: int, text: str = "", why: str = "") -> Dump:
    return Dump(rank=rank, pid=100 + rank, host="h", text=text, why=why)


def test_the_rank_that_is_in_no_collective_is_the_one_that_the_others_wait_for() -> None:
    dumps = [dump(0, WAITS), dump(1, LOADS), dump(2, WAITS)]
    found = stacks.suspect(dumps, behind=2)
    assert found is dumps[1]
    assert stacks.words(dumps) == (
        "Rank 1 (pid 101 on h) is in load at /home/me/shards.py:31, in readinto at /usr/lib/python3.11/socket.py:706. "
        "Rank 0 is in train at /home/me/train.py:12, in all_reduce at "
        "/venv/site-packages/torch/distributed/distributed_c10d.py:2806."
    )


def test_a_rank_that_does_not_answer_is_it_whatever_the_others_do() -> None:
    dumps = [dump(0, LOADS), dump(1, "", "it is stopped (SIGSTOP)")]
    assert stacks.suspect(dumps) is dumps[1]
    said = stacks.words(dumps)
    assert said.startswith("Rank 1 (pid 101 on h) does not answer: it is stopped (SIGSTOP). Rank 0 is in load at")


@pytest.mark.parametrize("text", [WAITS, LOADS])
def test_where_all_are_alike_it_is_the_one_that_logged_longest_ago(text: str) -> None:
    dumps = [dump(0, text), dump(1, text), dump(2, text)]
    assert stacks.suspect(dumps, behind=2) is dumps[2]
    assert stacks.suspect(dumps, behind=7) is dumps[0]
    assert stacks.suspect([]) is None
    assert stacks.words([]) == ""


def test_saving_and_compiling_are_told_from_training() -> None:
    assert stacks.occupation(dump(0, SAVES)) == "a checkpoint is being saved or loaded"
    assert stacks.occupation(dump(0, COMPILES)) == "code is being compiled"
    assert not any(stacks.occupation(dump(0, text)) for text in (LOADS, WAITS, RUNS_COMPILED, ""))
    assert stacks.is_waiting(stacks.working(WAITS))
    assert not stacks.is_waiting(stacks.working(LOADS))


def test_dumps_are_written_one_below_the_other(tmp_path: Path) -> None:
    dumps = stacks.from_json(stacks.to_json([dump(0, WAITS), dump(1, "", "it does not answer")]))
    for at in (0.0, 60.0):
        files = stacks.write(tmp_path / "logs", dumps, at)
    assert [file.name for file in files] == ["rank-0.stack", "rank-1.stack"]
    first, second = (file.read_text() for file in files)
    assert first.count("all_reduce") == first.count("Rank 0, pid 100 on h, 1970-01-01 00:0") == 2
    assert "It does not answer: it does not answer.\n\nNothing could be read of it." in second


PROGRAM = """
import sys, threading, time
from orchestrator.execution.stacks import answers_with_stacks
def spin(): 
    while True: pass
answers_with_stacks(); answers_with_stacks()
threading.Thread(target=spin, daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_tells_where_its_threads_are_one_that_is_stopped_is_told_as_such_and_no_other_is_hurt(
    tmp_path: Path,
) -> None:
    file = tmp_path / "spins.py"
    file.write_text(PROGRAM)
    ours = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE)
    foreign = subprocess.Popen(["sleep", "60"])
    try:
        assert ours.stdout is not None
        assert ours.stdout.readline() == b"ready\n"
        pids = {0: ours.pid, 1: foreign.pid}
        spinning, sleeping = stacks.here(tmp_path, "r", 1, pids, seconds=1.0)
        assert f'File "{file}", line 5 in spin' in spinning.text
        assert (spinning.why, spinning.is_late) == ("", False)
        assert (sleeping.why, sleeping.text, foreign.poll()) == ("it does not answer", "", None)
        again = stacks.here(tmp_path, "r", 1, {0: ours.pid}, seconds=5.0)[0]
        assert again.text.count("most recent call first") == 2, "only what is new"
        os.kill(ours.pid, signal.SIGSTOP)
        stopped = stacks.here(tmp_path, "r", 1, {0: ours.pid}, seconds=0.5)[0]
        assert stopped.why == "it is stopped (SIGSTOP)"
    finally:
        for process in (ours, foreign):
            process.kill()
            process.communicate()
    assert stacks.here(tmp_path, "r", 1, {0: ours.pid}, seconds=0.5)[0].why == "it is dead"
    assert stacks.here(tmp_path, "r", 1) == []


def test_a_rank_moves_that_is_elsewhere_than_before_but_not_in_another_line_of_a_loop() -> None:
    other = LOADS.replace("line 31 in load", "line 35 in load")
    assert stacks.movement([dump(0, WAITS), dump(1, LOADS)], [dump(0, WAITS), dump(1, other)]) == (
        "rank 1 moves, now in load at /home/me/shards.py:35, in readinto at /usr/lib/python3.11/socket.py:706"
    )
    assert stacks.movement([dump(1, LOADS)], [dump(1, LOADS)]) == ""
    assert stacks.movement([dump(1, LOADS)], [dump(1, LOADS.replace("706", "707"))]) == "", "the innermost line"
    assert stacks.movement([dump(0, WAITS)], [dump(0, WAITS.replace("line 12", "line 13"))]) == "", "it waits"
    assert stacks.movement([dump(1, LOADS)], [dump(1, WAITS)]).startswith("rank 1 moves, now in train at"), "it is done"
    assert stacks.movement([dump(1, WAITS)], [dump(1, LOADS)]).startswith("rank 1 moves, now in load at")
    assert stacks.movement([], [dump(1, LOADS)]) == "", "nobody knows where it was"
    assert stacks.movement([dump(1, LOADS)], [dump(0, why="it is stopped"), dump(1, other)]) == "", "for rank 0"
