"""Checkpoints on Ray: trainers hand them over in memory, the node's writer takes them to the storage, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import ray_head
from tests.plugins.gated_runs import Gated, end_gated, kill, sealed, start_gated, writer
from tests.plugins.runs import Orc, wait_until


def writers(orc: Orc) -> list[str]:
    """Numbers of the node's writers that live."""
    states = ray_head.services(orc.stack.ray_dashboard, orc.stack.ray_token_path)
    return [name.rpartition("-")[2] for name, state in states.items() if "-writer-" in name and state == "ALIVE"]


@pytest.fixture
def gated(orc: Orc, tmp_path: Path) -> Iterator[Callable[[], Gated]]:
    started: list[Gated] = []

    def start() -> Gated:
        started.append(start_gated(orc, tmp_path))
        return started[-1]

    yield start
    for run in started:
        end_gated(run)


def test_a_node_has_a_writer_and_status_shows_it(orc: Orc) -> None:
    status = orc.json("status")
    (name,) = [part["name"] for part in status["parts"] if part["name"].startswith("orc-checkpoint-writer-")]
    assert name.endswith("-0")
    assert writers(orc) == ["0"]
    shown = status["checkpoint_writers"]
    assert (shown["status"], shown["pending"], shown["root"]) == ("up", 0, orc.stack.slab_directory)
    assert psutil.Process(writer(orc)["pid"]).cmdline()[0].startswith("ray::CheckpointWriterProcess")
    assert "writers here  up" in orc("status")


def test_a_killed_writer_comes_back_under_its_name_and_writes_what_was_sealed(
    orc: Orc, gated: Callable[[], Gated]
) -> None:
    run = gated()
    run.open(1)
    assert [state for _, state, _ in run.saved(1)] == ["committed"] * 2
    before = writer(orc)["pid"]
    os.kill(before, signal.SIGSTOP)
    run.open(2)
    (_, state, name), _ = run.saved(2)
    assert (state, sealed(orc), run.is_committed(name)) == ("staged", 2, False)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: run.is_committed(name), 60, "committed by the next writer")
    assert writer(orc)["pid"] != before
    wait_until(lambda: writers(orc) == ["0"], 60, "Ray says so, too")
    run.open(3)
    run.open(4)
    code, said = run.end()
    assert code == 0, said
    assert run.recorded() == [2, 3, 4], "three are kept"
    assert [event.kind for event in run.store.events(run.run) if "checkpoint-" in event.kind] == []


def test_what_all_ranks_had_sealed_when_they_were_killed_is_committed_told_and_continued_from(
    orc: Orc, gated: Callable[[], Gated]
) -> None:
    run = gated()
    run.open(1)
    run.saved(1)
    snapshot = run.ray_snapshot(attempt=1)
    pid = writer(orc)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        run.open(2)
        saved = run.saved(2)
        name = saved[0][2]
        assert (sealed(orc), run.is_committed(name)) == (2, False)
        kill([rank for rank, _, _ in saved])
        assert run.recorded() == [1]
    finally:
        os.kill(pid, signal.SIGCONT)
    code, said = run.end()
    assert code == 1, said
    assert run.store.run(run.run).status.value == "CRASHED"
    assert writer(orc)["pid"] == pid
    wait_until(lambda: run.recorded() == [1, 2], 60, "the writer told the record in the trainer's place")

    shutil.rmtree(snapshot.parent)
    again = run.resumed()
    again.open(3)
    saved = again.saved(3)
    snapshot = again.ray_snapshot(attempt=2)
    kill([rank for rank, _, _ in saved])
    code, said = again.end()
    assert code == 1, said
    assert again.continued_from() == [name]

    for path in snapshot.parent.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 100)
    run.open(4)
    outcome = orc.json("resume", run.run)
    assert (outcome["status"], outcome["attempt"]) == ("FINISHED", 3)
    assert run.continued_from() == [name, saved[0][2]]
    assert run.recorded() == [2, 3, 4]


def test_other_settings_replace_the_writers(orc: Orc) -> None:
    before = writer(orc)
    orc("up", "checkpoints.memory_gb=2", "checkpoints.writers=2")
    after = writer(orc)
    assert after["pid"] != before["pid"]
    assert (before["memory_bytes"], after["memory_bytes"]) == (0, 2_000_000_000)
    assert sorted(writers(orc)) == ["0", "1"]
    orc("up")
    wait_until(lambda: writers(orc) == ["0"], 60, "one writer")
    assert writer(orc)["memory_bytes"] == 0
    refused = orc("up", "checkpoints.slab_dir=/dev/shm/elsewhere", code=2)
    assert "checkpoints.slab_dir" in refused
