"""Two ranks are killed at a random step, without a word: the next attempt ends as if nothing had happened. Or they
raise: what they could still save together is where it goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.checkpoints.local.ending import end_writers
from orchestrator.checkpoints.policy import CheckpointPolicy, Mode
from orchestrator.checkpoints.staging import Stager
from orchestrator.execution.worker import stager_of_rank
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.run import Run

WORLD, STEPS = 2, 12
KILLED, RAISED = -signal.SIGKILL, 3


class Broken(Exception):
    pass


class Recorder:
    """Keeps what one rank records; kills its process at a step, or raises."""

    def __init__(self, kill_at: int | None, ending: int) -> None:
        self.points: list[list[Any]] = []
        self.resumed: list[dict[str, Any]] = []
        self._kill_at, self._ending = kill_at, ending

    def log(self, metrics: Any, step: int | None = None) -> None:
        if step == self._kill_at and self._ending == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self._kill_at:
            raise Broken
        self.points += [[step, key, float(value)] for key, value in metrics.items() if not key.startswith("perf/")]

    def fact(self, fact: Fact) -> None:
        if fact.kind is FactKind.event and fact.data["kind"] == "resumed":
            self.resumed.append(fact.data["details"])

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


def staging(slabs: str, ticket: RunTicket, rank: int, policy: CheckpointPolicy, recorder: Recorder) -> Stager | None:
    return stager_of_rank(ticket, rank, policy, recorder, directory=slabs, may_start=True)  # type: ignore[arg-type]


def train(
    directory: Path, meeting: Path, rank: int, attempt: int, kill_at: int | None, slabs: str, mode: str, ending: int
) -> None:
    """Three epochs of four steps, with shuffling, dropout and momentum; a checkpoint every second step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    recorder = Recorder(kill_at, ending)
    ticket = RunTicket(run="r1", name="n", experiment="e", attempt=attempt, directory=str(directory))
    policy = CheckpointPolicy(every_steps=2, every_epochs=0, mode=Mode(mode))
    stager = staging(slabs, ticket, rank, policy, recorder)
    run = Run(
        ticket, recorder, rank=rank, world_size=WORLD, local_rank=rank, seed=7, checkpoints=policy, stager=stager
    )  # fmt: skip
    try:
        values = trained(run)
    except Broken as error:  # as the launcher does
        run.rescue(error)
        run.close()
        os._exit(RAISED)
    run.close()
    result = {"weights": values, "points": recorder.points, "resumed": recorder.resumed}
    (directory / f"attempt-{attempt}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def trained(run: Run) -> list[float]:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    model, loader = run.prepare(model, DataLoader(data, batch_size=5, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(3):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()})
            run.report(state=state)
    run.finish()
    return torch.cat([value.flatten().double() for value in model.state_dict().values()]).tolist()


def play(
    directory: Path,
    attempt: int,
    kill_at: int | None = None,
    slabs: str = "",
    mode: str = "eager",
    endings: Sequence[int] = (KILLED, KILLED),
) -> list[int | None]:
    """All ranks in processes of their own, forked because torch is loaded here; gives their exit codes."""
    directory.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    meeting = directory / f"meeting-{attempt}"
    ranks = [
        context.Process(target=train, args=(directory, meeting, rank, attempt, kill_at, slabs, mode, endings[rank]))
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
    return [process.exitcode for process in ranks]


def results(directory: Path, attempt: int) -> list[dict[str, Any]]:
    return [json.loads((directory / f"attempt-{attempt}-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture
def memory() -> Iterator[str]:
    """A slab root of the test's own; nothing is left of it."""
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield str(root)
    end_writers(root)
    assert not root.exists()


@pytest.mark.parametrize("mode", ["direct", "eager", "overlap"])
def test_a_killed_training_ends_bit_equal_to_one_that_was_not(tmp_path: Path, memory: str, mode: str) -> None:
    kill_at = random.randint(3, STEPS)
    assert play(tmp_path / "whole", 1) == [0, 0]
    assert play(tmp_path / "parts", 1, kill_at, memory, mode) == [-signal.SIGKILL, -signal.SIGKILL], (
        "the fault happened"
    )
    assert play(tmp_path / "parts", 2, slabs=memory, mode=mode) == [0, 0]
    assert list(Path(memory).iterdir()) == [] if mode == "direct" else list((Path(memory) / "members").iterdir())
    for whole, rest in zip(results(tmp_path / "whole", 1), results(tmp_path / "parts", 2), strict=True):
        assert rest["weights"] == whole["weights"], f"killed at step {kill_at}"
        assert rest["points"] == whole["points"][-len(rest["points"]) :]
    (details,) = results(tmp_path / "parts", 2)[0]["resumed"]
    assert details["is_exact"]
    step = STEPS - len(results(tmp_path / "parts", 2)[0]["points"])
    assert details["checkpoint"].startswith(f"r1/step_{step:08d}-a1")
    due = (kill_at - 1) // 2 * 2
    assert step == due if mode == "direct" else 0 < step <= due, "a writer that was busy may have let one be skipped"


@pytest.mark.parametrize("kill_at", [1, 2])
def test_before_the_first_checkpoint_it_begins_anew(tmp_path: Path, kill_at: int) -> None:
    assert play(tmp_path, 1, kill_at) == [-signal.SIGKILL, -signal.SIGKILL]
    assert play(tmp_path, 2) == [0, 0]
    assert [len(each["points"]) for each in results(tmp_path, 2)] == [STEPS, STEPS]


@pytest.mark.parametrize("mode", ["direct", "eager"])
def test_what_both_ranks_could_still_save_is_a_checkpoint(tmp_path: Path, memory: str, mode: str) -> None:
    assert play(tmp_path, 1, 6, memory, mode, (RAISED, RAISED)) == [RAISED, RAISED]
    assert play(tmp_path, 2, slabs=memory, mode=mode) == [0, 0]
    one, two = results(tmp_path, 2)
    (details,) = one["resumed"]
    assert details["checkpoint"].startswith("r1/step_00000006-a1.")
    assert details["why"] == ["it was saved when something went wrong, in the middle of a step"]
    assert one["weights"][:40] == two["weights"][:40], "the ranks go on together"
    assert [point[0] for point in one["points"]] == list(range(7, STEPS + 1))


@pytest.mark.parametrize("mode", ["direct", "eager"])
def test_what_one_rank_alone_could_save_is_none(tmp_path: Path, memory: str, mode: str) -> None:
    assert play(tmp_path, 1, 6, memory, mode, (RAISED, KILLED)) == [RAISED, KILLED]
    assert play(tmp_path / "whole", 1) == [0, 0]
    assert play(tmp_path, 2, slabs=memory, mode=mode) == [0, 0]
    (details,) = results(tmp_path, 2)[0]["resumed"]
    assert (details["checkpoint"], details["is_exact"]) == ("r1/step_00000004-a1", True)
    assert [each["weights"] for each in results(tmp_path, 2)] == [
        each["weights"] for each in results(tmp_path / "whole", 1)
    ]
