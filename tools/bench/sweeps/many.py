"""What a driver costs: instant trials on lanes of one worker, at the beginning of a sweep and late in it; and how soon
a sweep with many trials goes on."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from environment import HERE, BenchStack, Swept, child, tell
from rows import Row, at_most, printed

STEP = 100
REAL = 4
"""Trials of a sweep that has only to begin."""
WORDS = ("x=uniform(0,1)", "resources.workers=1", "resources.cpus_per_worker=0.5")


def lanes(trials: int) -> Iterator[Row]:
    """From a trial's end to the next first step on the same lane, with several lanes of one worker each that take a
    second for a trial and little of the machine, and from when all of them are there. So many trials per lane."""
    with BenchStack(cpus=2) as stack:
        for count in (2, 4):
            tell(f"{count} lanes")
            found = _sweep(stack, trials * count, count, train="trials:brief")
            gaps = found.gaps(since=found.all_began)
            what = f"trial's end to the next one's first step, {count} lanes"
            yield at_most(f"{what}, median", statistics.median(gaps), 0.7, "s")
            yield printed(f"{what}, longest", max(gaps), "s")
            yield at_most(f"groups of workers started, {count} lanes", found.groups, count)
            yield printed(f"trials that began on one of {found.groups} lanes while all were there", len(gaps))


def late(before: int, trials: int) -> Iterator[Row]:
    """Instant trials on a sweep that has `before` finished ones, nearly all of them copies made by `finished.py`."""
    with BenchStack(cpus=2) as stack:
        first = _sweep(stack, REAL, 2)
        stack.copied()
        tell(f"{before:,} finished trials")
        command = [sys.executable, str(HERE / "finished.py"), str(stack.home), first.sweep, str(before)]
        subprocess.run(command, env=child(), cwd=HERE, check=True)
        tell(f"{trials} instant trials more")
        stack.orc("sweep", "extend", first.sweep, f"+{before - REAL + trials}")
        found = stack.sweep(trials=before + trials, resumed=first.sweep, first=before)
        ends = [trial.end for trial in found.trials]
        pace = 1e3 * (ends[-1] - ends[0]) / (len(ends) - 1)
        yield at_most(f"instant trials on a sweep of {before:,} finished ones, 2 lanes: per trial", pace, 100, "ms")
        yield printed(f"a sweep of {before:,} finished trials: memory of the driver", found.driver_mb, "MB")
        first_step = min(trial.first_step for trial in found.trials) - found.began
        yield printed(f"resume of a sweep with {before:,} trials, to the first new step", first_step, "s")


def instant(trials: int, late: int) -> Iterator[Row]:
    """`trials` on a new sweep, then `late` more on the same one, resumed; each hundred by itself."""
    with BenchStack(cpus=2) as stack:
        tell("a few trials, for comparison")
        _sweep(stack, 1, 2)  # what is loaded for the first time must not count for the comparison
        fresh = _sweep(stack, REAL, 2)
        start = min(trial.first_step for trial in fresh.trials) - fresh.began
        stack.copied()
        tell(f"{trials} instant trials")
        found = _sweep(stack, trials, 2)
        pace = [1e3 * seconds for seconds in _per_trial(found)]
        yield at_most(
            f"{trials:,} instant trials, 2 lanes: per trial, median of the hundreds", _median(pace), 100, "ms"
        )
        yield printed(f"{trials:,} instant trials: per trial, the first hundred", pace[0], "ms")
        yield at_most(f"{trials:,} instant trials: per trial, the slowest hundred", max(pace), 100, "ms")
        yield printed(f"{trials:,} instant trials: memory of the driver", found.driver_mb, "MB")
        stack.copied()
        tell(f"{late} more")
        stack.orc("sweep", "extend", found.sweep, f"+{late}")
        more = stack.sweep(trials=trials + late, resumed=found.sweep)
        fresh_ends = [trial for trial in more.trials if trial.first_step > more.began]
        first = min(trial.first_step for trial in fresh_ends) - more.began
        what = f"resume of a sweep with {trials:,} trials, to the first new step"
        yield printed(what, first, "s")
        yield printed("the same for a new sweep with as many lanes", start, "s")
        yield at_most(f"{what}, beyond what a new one takes", first - start, 5, "s")
        late_pace = 1e3 * (fresh_ends[-1].end - fresh_ends[0].end) / max(len(fresh_ends) - 1, 1)
        yield at_most(f"instant trials after {trials:,} others: per trial", late_pace, 100, "ms")
        yield printed(f"instant trials after {trials:,} others: memory of the driver", more.driver_mb, "MB")


def _sweep(stack: BenchStack, trials: int, count: int, train: str = "trials:instant") -> Swept:
    return stack.sweep(
        f"train={train}", *WORDS, f"sweep.samples={trials}", f"sweep.concurrency={count}", "run.experiment=bench-many",
        trials=trials,
    )  # fmt: skip


def _per_trial(found: Swept) -> list[float]:
    """Seconds per trial, of each hundred ends in a row."""
    ends = [trial.end for trial in found.trials]
    blocks = [ends[at : at + STEP + 1] for at in range(0, max(len(ends) - 1, 1), STEP)]
    return [(block[-1] - block[0]) / (len(block) - 1) for block in blocks if len(block) > 1]


_median = statistics.median
