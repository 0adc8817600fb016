"""Sixteen short trials with everything recorded: ours, Ray Tune over TorchTrainer (twice), and bare processes.

They take turns, so that a busy machine is slow for all; ours and the bare ones run before each turn of the other side,
which takes so much longer. All meet one stack: its Ray, its MLflow. Each side trains one trial at a time on two
workers. Ours has ended when MLflow has everything, too. A Tuner that hangs (with a short poll the callback of Ray 2.60
can, see DECISIONS.md) is ended after three minutes without a report, counted, and its turn made again.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from environment import HANG, HERE, BenchStack, Swept, child, tell
from rows import Row, at_most, printed

SPACE = "lr=loguniform(1e-4,1e-1)"
BARS = {"defaults": (1 / 15, "2"), "poll of 0.2 s": (1 / 8, "0.2")}
"""Of the other side: our share of its wall-clock, at most; and its poll."""
ATTEMPTS = 3


def measure(trials: int, rounds: int) -> Iterator[Row]:
    ours: list[Swept] = []
    peers: dict[str, list[float]] = {name: [] for name in BARS}
    peer_reports: dict[str, list[float]] = {name: [] for name in BARS}
    copied: list[float] = []
    bare: list[tuple[float, float]] = []
    hangs = 0
    with BenchStack(cpus=4) as stack:  # the other side needs one for Tune's process, besides the workers'
        tell("warming up")
        sweep(stack, 2)
        stack.copied()
        for number in range(rounds):
            for name, (_, poll) in BARS.items():
                tell(f"round {number + 1} of {rounds}: ours")
                ours.append(sweep(stack, trials))
                stack.copied()
                copied.append(time.time() - ours[-1].began)
                tell(f"round {number + 1} of {rounds}: {ours[-1].seconds:.1f} s, {copied[-1]:.1f} s; bare processes")
                bare.append(bare_processes(stack, trials))
                for _ in range(ATTEMPTS):
                    tell(f"round {number + 1} of {rounds}: Ray Tune, {name}")
                    found = peer(stack, trials, poll)
                    if found is not None:
                        tell(f"round {number + 1} of {rounds}: {found[0]:.0f} s")
                        peers[name].append(found[0])
                        peer_reports[name] += found[1]
                        break
                    hangs += 1
    mine = statistics.median(copied)
    what = f"{trials} short trials, 2 workers, 10 reports with checkpoints, all recorded"
    yield printed(f"{what}: ours, until `orc sweep` ends", statistics.median(each.seconds for each in ours), "s")
    yield printed(f"{what}: ours, until MLflow has all of it", mine, "s")
    for name, (bar, _) in BARS.items():
        if not peers[name]:
            yield printed(f"{what}: Ray Tune, {name}: always hung", 0)
            continue
        theirs = statistics.median(peers[name])
        yield printed(f"{what}: Ray Tune, {name}", theirs, "s")
        yield at_most(f"{what}: share of Ray Tune's time, {name}", mine / theirs, bar)
        yield printed(f"a report of Ray Tune, {name}, median", 1e3 * statistics.median(peer_reports[name]), "ms")
    yield printed("rounds of Ray Tune that hung and were made again", hangs)
    gaps = [gap for each in ours for gap in each.gaps()]
    yield at_most("trial's end to the next one's first step, 1 lane, median", statistics.median(gaps), 0.7, "s")
    yield printed("trial's end to the next one's first step, 1 lane, longest", max(gaps), "s")
    yield at_most("groups of workers started, 1 lane", max(each.groups for each in ours), 1)
    reports = [seconds for each in ours for trial in each.trials for seconds in trial.reports]
    yield at_most("a report with its checkpoint, median", 1e3 * statistics.median(reports), 5, "ms")
    yield printed("ours: after the first trial", statistics.median(each.after_first for each in ours), "s")
    yield printed("bare processes: after the first trial", statistics.median(rest for _, rest in bare), "s")
    ratio = statistics.median(mine.after_first / rest for mine, (_, rest) in zip(ours, bare, strict=True))
    yield at_most("after the first trial, against bare processes that track nothing", ratio, 1.5, "times")
    yield printed("memory of the driver", max(each.driver_mb for each in ours), "MB")


def sweep(stack: BenchStack, trials: int) -> Swept:
    return stack.sweep(
        "train=trials:digits", SPACE, f"sweep.samples={trials}", "sweep.concurrency=1", "resources.workers=2",
        "run.experiment=bench-short", trials=trials,
    )  # fmt: skip


def bare_processes(stack: BenchStack, trials: int) -> tuple[float, float]:
    """Seconds in all, and from the first trial's end to the last one's."""
    directory = Path(tempfile.mkdtemp(dir=stack.directory))
    began = time.time()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = subprocess.run(
        [*command, str(HERE / "bare.py"), str(trials), str(directory)], env=child(), check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ).stdout  # fmt: skip
    seconds = time.time() - began
    shutil.rmtree(directory)
    ends = [float(line.split()[1]) for line in out.splitlines() if line.startswith("end ")]
    return seconds, ends[-1] - ends[0]


def peer(stack: BenchStack, trials: int, poll: str) -> tuple[float, list[float]] | None:
    """Seconds in all, and of each report; None if it hung."""
    directory = Path(tempfile.mkdtemp(dir=stack.directory))
    journal = directory / "journal"
    given = stack.stack
    environment = child(**given.client_environment())
    errors = directory / "stderr"
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "peer.py"), str(trials), str(directory), given.ray_address, given.mlflow_uri, poll],
        env=environment, stdout=subprocess.PIPE, stderr=errors.open("w"), text=True,
    )  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(0.05)
            last = os.path.getmtime(journal) if journal.exists() else began
            if time.time() - last > HANG:
                process.kill()
                return None
        seconds = time.time() - began
        assert process.stdout is not None
        said = process.stdout.read().split()
        if process.returncode or said[-2:] != ["ended", str(trials)]:
            told = errors.read_text()[-3000:]
            raise RuntimeError(f"Ray Tune ended with {process.returncode}: {said}\n{told}")
        reports = [float(line.split()[1]) for line in journal.read_text().splitlines()]
        return seconds, reports
    finally:
        process.wait(30)
        shutil.rmtree(directory, ignore_errors=True)
