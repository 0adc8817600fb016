"""The tracker, or a checkpoint writer, is killed again and again beside a training: what its steps notice of that.

A run with one worker, and one with two. What dies is started again by Ray, which takes a processor for a second or two:
on a machine of two, a training of one worker leaves one for that and one of two workers none, so the former tells what
a training notices of a service that is gone, and the latter what a busy machine does besides.

Of each run, blocks of time by turns: in some of them the service is killed every ten seconds, in the others it is left
in peace. A step is timed by the training itself, from one optimizer step to the next within an epoch: what it does
between epochs, to evaluate, to report and to save, is looked at on its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import kill
import psutil
import subject
from rows import Row, at_most, printed

from tools.bench.sweeps.environment import BenchStack, child, tell

BAR_PERCENT = 5.0
EVERY = 10.0
"""Seconds between two kills."""
TITLES = {"tracker": "ray::TrackerProcess", "writer": "ray::CheckpointWriterProcess"}


def measure(blocks: int, seconds: float) -> Iterator[Row]:
    with BenchStack(cpus=2) as stack:
        kill.warm(stack)
        for service in TITLES:
            for workers in (1, 2):
                yield from _killed(stack, service, workers, blocks, seconds)


def _killed(stack: BenchStack, service: str, workers: int, blocks: int, seconds: float) -> Iterator[Row]:
    by_lot = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory)
        command = stack.command("run", *kill.words(journal, name=f"without-{service}-{workers}", workers=workers))
        process = subprocess.Popen(command, env=child(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        """Begin and end of each block, with kills and without."""
        kills = 0
        try:
            kill.until(lambda: len(subject.steps(journal, 1)) > 500, "it trains", process)
            for number in range(blocks):
                for is_disturbed in by_lot.sample((True, False), 2):
                    began = time.time()
                    while time.time() < began + seconds:
                        kills += is_disturbed and _kill(stack, service)
                        time.sleep(EVERY)
                    times[is_disturbed].append((began, time.time()))
                tell(f"{service}, {workers} workers: block {number + 1} of {blocks}, {kills} kills")
            assert process.poll() is None, "the run has ended"
            assert len(subject.began(journal)) == workers, "no worker was started again"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        made = subject.steps(journal, 1)
    quiet, disturbed = ([_percentiles(made, *block) for block in times[which]] for which in (False, True))
    ratios = [100 * (after[1] / before[1] - 1) for before, after in zip(quiet, disturbed, strict=True)]
    middles = [100 * (after[0] / before[0] - 1) for before, after in zip(quiet, disturbed, strict=True)]
    name = f"{service} killed every {EVERY:.0f} s, {workers} worker{'s' * (workers > 1)} on {os.cpu_count()} cores"
    yield at_most(f"{name}: % that the p99 of the step time grows", statistics.median(ratios), BAR_PERCENT, "%")
    yield printed(f"{name}: % that the median of the step time grows", statistics.median(middles), "%")
    yield printed(f"{name}: p99 of the step time in peace", 1e3 * statistics.median(each[1] for each in quiet), "ms")
    yield printed(f"{name}: kills that landed", kills)


def _kill(stack: BenchStack, service: str) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_it = (process.cmdline() or [""])[0].startswith(TITLES[service])
            if is_it and process.environ().get("ORC_HOME") == str(stack.home):
                process.kill()
                return True
    return False


def _percentiles(made: list[subject.Step], began: float, ended: float) -> tuple[float, float]:
    """Median and p99 of the steps' times within epochs."""
    inside = [step for step in made if began <= step.at <= ended]
    times = sorted(b.at - a.at for a, b in pairwise(inside) if a.epoch == b.epoch)
    return statistics.median(times), times[int(len(times) * 0.99)]


if __name__ == "__main__":
    sys.exit("python tools/bench/failures --only services")
