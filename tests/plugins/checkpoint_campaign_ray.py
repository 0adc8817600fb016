"""The campaign against Ray Train's own checkpoints: `ray.train.report(checkpoint=…)`, its controller restarts.

Run as a program this is the training with its driver, `go` is the other side: it kills workers at random and judges
what the next ones got from `ray.train.get_checkpoint()`. "Committed" is here what `report` returned for.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tests.plugins.checkpoint_training import KEEP, Place, Trained, _counter

if TYPE_CHECKING:
    from tests.plugins.checkpoint_campaign import Score

WORLD = 2
MOST_PAUSE = 3.0
"""Seconds: with Ray's controller looking every now and then, a report may take long."""
START = 300.0


def go(kills: int, seconds: float, random: random.Random, directory: Path) -> Score:
    """Kills one worker or both, again and again, but not longer than that; gives what became of it."""
    from tests.plugins.checkpoint_campaign import Score

    directory.mkdir(parents=True)
    place, score, began = Place(directory=directory), Score(contender="ray", world_size=WORLD), time.monotonic()
    place.storage.mkdir()
    journal, newest, killed_at = place.journal, 0, 0
    token = directory / "token"  # or Ray would make one in the user's home
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with place.output.open("ab") as said:
        command = [sys.executable, "-m", __name__, str(directory)]
        driver = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
    try:
        start = 0
        for kill in range(kills + 1):  # once more than it kills: the last one is judged too
            lines = _grown(place, start, driver)
            loaded = {line["step"] for line in lines}
            score.loads += sum(line["step"] > 0 for line in lines)
            score.corrupt += sum(not line["right"] for line in lines) + (len(loaded) > 1)
            score.lost += min(loaded) < newest
            if kill:
                score.steps_lost.append(max(killed_at - min(loaded), 0))
            if kill == kills or time.monotonic() - began > seconds:
                break
            start = len(journal.lines())
            time.sleep(random.random() * MOST_PAUSE)  # when the kill comes, not a wait for anything
            victim = random.choice(["one rank", "all ranks"])
            pids = [line["pid"] for line in lines]
            for pid in pids if victim == "all ranks" else [random.choice(pids)]:
                os.kill(pid, signal.SIGKILL)
            score.kills[victim] += 1
            new = journal.lines()[start:]
            ends = {line["step"] for line in new if line["what"] == "committed"}
            score.inside += bool({line["step"] for line in new if line["what"] == "begin"} - ends)
            newest = max([min(loaded), *ends])
            killed_at = place.progress()
    finally:
        started = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        driver.terminate()
        with suppress(subprocess.TimeoutExpired):
            driver.wait(20)
        driver.kill()
        for process in psutil.wait_procs(started, timeout=5)[1]:  # Ray's own, whose driver is gone
            process.kill()
    score.committed = sum(line["what"] == "committed" for line in journal.lines())
    score.unfinished = sum(1 for path in place.storage.rglob("checkpoint_*") if path.is_dir()) - KEEP
    score.partial = sum(1 for pattern in ("*.tmp", "*.partial") for _ in place.storage.rglob(pattern))
    score.left_after_sweep = score.unfinished + score.partial
    score.seconds = time.monotonic() - began
    return score


def _grown(place: Place, start: int, driver: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """What all workers of a new group say that they have loaded."""
    deadline = time.monotonic() + START
    while True:
        found = {line["rank"]: line for line in place.journal.lines()[start:] if line["what"] == "resumed"}
        if len(found) == WORLD:
            return list(found.values())
        assert driver.poll() is None, place.said()
        assert time.monotonic() < deadline, f"no new workers: {place.said()}"
        time.sleep(0.02)


def train(config: dict[str, Any]) -> None:
    """Each worker's loop, as Ray's documentation has it: rank 0 saves what is the same on all, all of them report."""
    import ray.train
    from ray.train import Checkpoint

    torch.set_num_threads(1)
    place, trained, rank = (
        Place(directory=Path(config["directory"])),
        Trained(),
        ray.train.get_context().get_world_rank(),
    )
    journal, step, is_right = place.journal, 0, True
    trained.forget()
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as directory:
            found = torch.load(Path(directory) / "state.pt", weights_only=True)
        with torch.no_grad():
            for name, tensor in trained.named().items():
                tensor.copy_(found[name])
        step = int(found["steps"])
        is_right = trained.is_right(step)
    journal.say("resumed", rank=rank, step=step, right=is_right, pid=os.getpid())
    with _counter(place, rank) as count:
        while True:
            step += 1
            trained.go_to(step)
            count(step)
            if step % 4:
                continue
            if rank == 0:
                journal.say("begin", step=step)
            with tempfile.TemporaryDirectory() as directory:
                if rank == 0:
                    torch.save(trained.named(), Path(directory) / "state.pt")
                    ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(directory))
                    journal.say("committed", step=step)
                else:
                    ray.train.report({"step": step})


def main() -> None:
    import ray
    from ray.train import CheckpointConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig

    directory = Path(sys.argv[1])
    ray.init(num_cpus=WORLD + 1, include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        train,
        train_loop_config={"directory": str(directory)},
        scaling_config=ScalingConfig(num_workers=WORLD),
        run_config=RunConfig(
            name="campaign", storage_path=str(directory / "checkpoints"),
            failure_config=FailureConfig(max_failures=-1), checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
    )  # fmt: skip
    trainer.fit()  # until somebody ends it


if __name__ == "__main__":
    main()
