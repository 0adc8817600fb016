"""Checkpoints of runs without Ray: through shared memory to a writer of the data directory's own."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import orchestrator
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.local.ending import await_sealed, end_writers
from orchestrator.checkpoints.manifest import CheckpointState
from orchestrator.checkpoints.slab import Owner, slot_bytes_for
from orchestrator.records import RunStatus
from orchestrator.store.views import RunDetail
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT, wait_until
from tests.plugins.slab_saves import job, plan, put

ORC = ("-m", "orchestrator.cli.main")
STEPS = 15


def newest(local: LocalStack) -> RunDetail:
    return local.store.run(local.store.runs(limit=1)[0].run)


def curve(local: LocalStack, run: str, rank: int) -> dict[int, float]:
    """The loss by step; what a later attempt did again must be the same."""
    points, by_step = local.store.points(run, "loss", rank=rank), {}
    for step, value in zip(points.steps.tolist(), points.values.tolist(), strict=True):
        assert by_step.setdefault(step, value) == value
    return by_step


def weights(directory: Path, name: str) -> list[object]:
    return [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def test_a_killed_training_goes_on_bit_for_bit_and_leaves_no_memory_behind(local: LocalStack, tmp_path: Path) -> None:
    kill_at = random.randint(3, STEPS - 1)
    settings = ("checkpoints.every_steps=2", "checkpoints.every_epochs=0", f"out={tmp_path}", "failures.max_restarts=1")
    runs = {}
    for name, step in (("whole", 0), ("parts", kill_at)):
        words = ("run", "--local", "train=exact:train", f"run.name={name}", f"kill_at={step}", *settings)
        local.run(*ORC, *words, cwd=PROJECT, timeout=180)
        runs[name] = newest(local)
    attempts = local.store.attempts(runs["parts"].run)
    assert [attempt.status for attempt in attempts] == [RunStatus.crashed, RunStatus.finished], "the fault happened"
    assert attempts[0].error["kind"] == "worker_killed"
    assert weights(tmp_path, "parts") == weights(tmp_path, "whole"), f"killed at step {kill_at}"
    for rank in range(2):
        whole, parts = (curve(local, runs[name].run, rank) for name in ("whole", "parts"))
        assert parts == whole
        assert sorted(whole) == list(range(1, STEPS + 1))

    root = places.slab_root(str(local.home))
    kinds = [event.kind for event in local.store.events(runs["parts"].run)]
    assert kinds.count("resumed") == 1
    told = local.store.checkpoints(runs["parts"].run)
    kept = {Path(row.uri).name for row in told if row.state == "committed"}
    stored = {path.parent.name for path in Path(runs["parts"].directory).glob("checkpoints/*/MANIFEST.json")}
    assert kept == stored, "all of them are in the record when the run has ended"
    assert len(kept) == 3

    assert SlabClient(str(root), may_start=False).health()["committed"] > 0, "they went through its memory"
    (local.home / "up.lock").touch()  # what `orc up` leaves
    out, _ = local.run(*ORC, "down", cwd=tmp_path)
    assert "checkpoint writer" in out
    assert not root.exists()


def test_a_script_hands_its_checkpoints_over_and_ends_when_they_are_safe(local: LocalStack) -> None:
    states = []
    with orchestrator.start_run(home=local.home, checkpoints={"every_steps": 1}) as run:
        model = torch.nn.Linear(2, 2)
        state = run.state(model=model)
        for _ in range(3):
            run.log({"a": 1.0})
            info = run.report(state=state)
            states.append(info and info.state)
    assert CheckpointState.staged in states, "it did not wait for them"
    told = {row.step: row.state for row in local.store.checkpoints(run.id)}
    assert told[3] == "committed"
    slabs = places.slabs(places.slab_root(str(local.home)))
    assert list(slabs.iterdir()), "the memory stays warm for a while"


def test_an_exception_leaves_the_state_behind_for_the_next_attempt(local: LocalStack) -> None:
    def train(fails: bool) -> str:
        with orchestrator.start_run(experiment="rescue", resume=True, home=local.home) as run:
            model = torch.nn.Linear(2, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            state = run.state(model=model, optimizer=optimizer)
            while run.step < 5:
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                run.log({"a": 1.0})
                run.report(state=state)
                if fails and run.step == 3:
                    raise RuntimeError("broken")
        return run.id

    with pytest.raises(RuntimeError, match="broken"):
        train(fails=True)
    run = train(fails=False)
    kinds = [event.kind for event in local.store.events(run)]
    assert "checkpoint-rescued" in kinds
    (resumed,) = [event for event in local.store.events(run) if event.kind == "resumed"]
    assert resumed.details["is_exact"]
    assert "step 3" in resumed.message


@pytest.mark.parametrize("hindrance", ["no memory", "no writer"])
def test_without_memory_or_writer_checkpoints_are_written_by_the_rank_itself(
    local: LocalStack, hindrance: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    if hindrance == "no writer":
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        root.chmod(0o755)  # not ours alone: nothing is put there
    else:
        monkeypatch.setattr("orchestrator.checkpoints.local.client.SlabClient.lease", lambda *_, **__: None)
    monkeypatch.setattr("orchestrator.execution.script.slab_directory", lambda stack: str(root))
    with orchestrator.start_run(home=local.home, checkpoints={"every_steps": 1}) as run:
        state = run.state(model=torch.nn.Linear(2, 2))
        for _ in range(3):
            run.log({"a": 1.0})
            info = run.report(state=state)
            assert info is not None
            assert info.state is CheckpointState.committed
    (event,) = [event for event in local.store.events(run.id) if event.kind.startswith("checkpoint-")]
    assert event.kind == "checkpoint-writer-missing"
    assert "writes its checkpoints by itself" in event.message


@pytest.fixture
def root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield root
    end_writers(root)
    assert not root.exists()


def sealed_without_a_writer(root: Path, storage: Path) -> None:
    """The trainer and the writer are gone, and a save is in memory."""
    client, what = SlabClient(str(root), may_start=True), plan()
    slab = client.lease(slot_bytes_for(what[0]), Owner(run="r1", attempt=1, rank=0, pid=os.getpid()))
    assert slab is not None
    wait_until(slab.is_ready, 30, "its pages exist")
    os.kill(client.describe()["pid"], signal.SIGKILL)
    wait_until(lambda: client.ring() == 0, 30, "the writer is gone")
    put(slab.slots[0], what)
    slab.slots[0].seal(job(storage))
    slab.stop_filling()
    slab.close()


def committed(storage: Path) -> list[int]:
    return [manifest.step for manifest in catalog.scan(Storage(str(storage))).committed]


def test_before_the_memory_goes_what_is_sealed_in_it_is_written(root: Path, tmp_path: Path) -> None:
    sealed_without_a_writer(root, tmp_path)
    assert committed(tmp_path) == []
    assert end_writers(root)
    assert committed(tmp_path) == [1]
    assert not root.exists()
    assert not end_writers(root), "there is nothing any more"


def test_the_next_attempt_waits_for_what_was_sealed_and_for_nothing_else(root: Path, tmp_path: Path) -> None:
    sealed_without_a_writer(root, tmp_path)
    assert await_sealed(root, lambda job: job.run == "another", may_start=True, patience=0.0)
    assert not await_sealed(root, lambda job: job.run == "r1", may_start=False, patience=0.0), "nobody writes it"
    assert await_sealed(root, lambda job: job.run == "r1", may_start=True)
    assert (tmp_path / "step_00000001-a1" / "rank-0000.json").exists()
