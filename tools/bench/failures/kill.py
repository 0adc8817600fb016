"""SIGKILL of a worker of two: how long until the training does something new, and where that time goes.

One run is killed several times, at moments by lot. What counts is from the kill to the first step that no attempt had
made before, against the worker's start time (from the moment at which the first attempt's workers are asked for to its
first step) and the time since the checkpoint from which the next attempt went on: what has to be started, and what has
to be done again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import subject
from rows import Row, at_most, printed

from tools.bench.sweeps.environment import BenchStack, child, tell

CHECKPOINT_EVERY = 5.0
"""Seconds, at least: the training saves when an epoch ends after them."""
BAR, DETECTION_BAR = 1.2, 3.0
LONGEST = 180.0
"""Seconds within which a training must get on."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Moments after a kill, in seconds from it."""

    detected: float
    """Ray Train has said that the worker is gone."""
    ended: float
    """The group is gone, and the attempt is over in the driver."""
    opened: float
    """The next attempt has a number."""
    began: float
    """The train function is called, on the last rank."""
    first: float
    """Its first step is made."""
    new: float
    """The first step that no attempt had made before is made."""
    since_checkpoint: float
    """From the state that the next attempt began with to the kill; of one that an earlier attempt had saved, from this
    attempt's first step."""
    start: float
    """The worker start time, of the run's first attempt."""

    @property
    def ratio(self) -> float:
        return self.new / (self.start + self.since_checkpoint)


def measure(repetitions: int) -> Iterator[Row]:
    with BenchStack(cpus=2) as stack:
        warm(stack)
        found = list(recoveries(stack, repetitions, random.Random(0)))
    yield at_most(
        "SIGKILL of a worker to a new step, against worker start + time since the checkpoint, median",
        statistics.median(each.ratio for each in found), BAR, "times",
    )  # fmt: skip
    yield printed("… worst", max(each.ratio for each in found), "times")
    yield at_most(
        "SIGKILL of a worker to its detection, worst", max(each.detected for each in found), DETECTION_BAR, "s"
    )
    for name, of in PHASES.items():
        yield printed(f"SIGKILL of a worker: {name}, median", statistics.median(of(each) for each in found), "s")


PHASES: dict[str, Callable[[Recovery], float]] = {
    "until a new step": lambda each: each.new,
    "until the first step": lambda each: each.first,
    "until its detection": lambda each: each.detected,
    "from there to the attempt's end": lambda each: each.ended - each.detected,
    "from there to the next attempt": lambda each: each.opened - each.ended,
    "from there to the train function": lambda each: each.began - each.opened,
    "from there to the first step": lambda each: each.first - each.began,
    "from there to a new step": lambda each: each.new - each.first,
    "time since the checkpoint": lambda each: each.since_checkpoint,
    "worker start time": lambda each: each.start,
}


def warm(stack: BenchStack) -> None:
    """What only the first run on a machine pays: bytecode, the page cache."""
    with tempfile.TemporaryDirectory() as journal:
        stack.orc("run", *words(Path(journal), epochs=2))


def words(journal: Path, *, epochs: int = 1_000_000, name: str = "", workers: int = 2) -> list[str]:
    return [
        "train=tools.bench.failures.subject:digits", f"journal={journal}", f"epochs={epochs}", f"run.name={name}",
        "run.experiment=bench-failures", f"resources.workers={workers}", "checkpoints.every_epochs=0",
        f"checkpoints.every_minutes={CHECKPOINT_EVERY / 60}", "failures.max_restarts=-1", "failures.max_repeats=0",
    ]  # fmt: skip


def recoveries(stack: BenchStack, repetitions: int, by_lot: random.Random) -> Iterator[Recovery]:
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory)
        command = stack.command("run", *words(journal, name="killed"))
        process = subprocess.Popen(command, env=child(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            for attempt in range(1, repetitions + 1):
                newest = until(lambda a=attempt: saves(stack, journal, a), "a checkpoint", process)
                pause = by_lot.random() * CHECKPOINT_EVERY
                time.sleep(pause)  # when the kill comes, not a wait for anything
                victim = by_lot.choice([each for each in subject.began(journal) if each["attempt"] == attempt])
                reached = subject.steps(journal, attempt)[-1].number
                killed = time.time()
                os.kill(victim["pid"], signal.SIGKILL)
                until(lambda a=attempt, r=reached: is_past(journal, a + 1, r), "new steps", process)
                found = recovery(stack, journal, attempt, killed)
                tell(f"kill {attempt} at step {reached}, {newest} checkpoints: {found} ratio {found.ratio:.2f}")
                yield found
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def recovery(stack: BenchStack, journal: Path, attempt: int, killed: float) -> Recovery:
    (run,) = [row.run for row in stack.store.runs(search="killed")]
    logs = Path(stack.store.run(run).directory.removeprefix("file://")) / "logs"
    before, after = subject.steps(journal, attempt), subject.steps(journal, attempt + 1)
    first_attempt = subject.steps(journal, 1)
    said = [line for number in (attempt, attempt + 1) for line in driver_lines(logs / f"attempt-{number}")]
    lines = [(moment(line) - killed, str(line.get("message", ""))) for line in said]
    beginning = [moment(line) for line in driver_lines(logs / "attempt-1")][0]
    at = {step.number: step.at for step in before}
    last = before[-1].number
    return Recovery(
        detected=next((when for when, text in lines if when > 0 and text.startswith("Ray Train says")), float("nan")),
        ended=next(when for when, text in lines if text.startswith("it ended")),
        opened=next(when for when, text in lines if text.startswith(f"attempt {attempt + 1} of")),
        began=max(each["at"] for each in subject.began(journal) if each["attempt"] == attempt + 1) - killed,
        first=after[0].at - killed,
        new=next(step.at for step in after if step.number > last) - killed,
        since_checkpoint=killed - at.get(after[0].number - 1, before[0].at),
        start=first_attempt[0].at - beginning,
    )


def driver_lines(directory: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(directory.glob("driver*.json*")):
        for line in path.read_text().splitlines():
            found.append(json.loads(line))
    return found


def moment(line: dict[str, Any]) -> float:
    at = line.get("at") or line.get("time") or line.get("timestamp")
    return float(at) if isinstance(at, int | float) else datetime.fromisoformat(str(at)).timestamp()


def saves(stack: BenchStack, journal: Path, attempt: int) -> int:
    """Checkpoints of that attempt, once it has one."""
    rows = stack.store.runs(search="killed")
    if not rows or not subject.steps(journal, attempt):
        return 0
    return sum(row.attempt == attempt for row in stack.store.checkpoints(rows[0].run))


def is_past(journal: Path, attempt: int, step: int) -> bool:
    made = subject.steps(journal, attempt)
    return bool(made) and made[-1].number > step + 50


def until(what: Callable[[], Any], why: str, process: Any) -> Any:
    deadline = time.monotonic() + LONGEST
    while not (found := what()):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before: {why}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {LONGEST:.0f} s: {why}")
        time.sleep(0.1)
    return found


if __name__ == "__main__":
    sys.exit("python tools/bench/failures --only kill")
